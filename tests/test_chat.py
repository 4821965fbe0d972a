"""Chat templates of merged models."""

from __future__ import annotations

import json

import jinja2
import pytest
import torch
from checkpoints import save_model

from ota_kernels import merge
from ota_kernels.errors import RecipeError
from ota_kernels.io.chat import TEMPLATES, chosen_template, template_of
from ota_kernels.recipe.schema import CHAT_TEMPLATES, parse_recipe

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bye"},
]


def rendered(template, prompt=True):
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        messages=TALK, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>"
    )


EXPECTED = {
    "chatml": [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n",
        "<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    ],
    "llama3": [
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ],
    "mistral": ["<s>[INST] Be brief.\n\nHi [/INST] Yes?</s>[INST] Bye [/INST]"],
    "alpaca": [
        "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nYes?</s>\n\n",
        "### Instruction:\nBye\n\n### Response:\n",
    ],
    "exaone": [
        "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n",
        "[|assistant|]Yes?[|endofturn|]\n[|user|]Bye\n[|assistant|]",
    ],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_known_templates(name):
    assert rendered(TEMPLATES[name]) == "".join(EXPECTED[name])


def test_names_are_those_of_recipes():
    assert set(CHAT_TEMPLATES) == {"auto", *TEMPLATES}


def folder(path, config=None, **files):
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [
        ({"chat_template": " {{ x }} "}, {}, "{{ x }}"),
        (
            {"chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]},
            {},
            "d",
        ),
        ({"chat_template": {"default": "m"}}, {}, "m"),
        ({"chat_template": "old"}, {"chat_template__jinja": "new\n"}, "new"),
        (None, {"chat_template__json": '{"chat_template": "p"}'}, "p"),
        ({"chat_template": 3}, {}, ""),
        (None, {}, ""),
    ],
)
def test_a_models_own(tmp_path, config, files, expected):
    assert template_of(folder(tmp_path, config, **files)) == expected


def test_auto_takes_the_commonest(tmp_path):
    texts = ["a", "b", "b ", "", "a", "c"]
    folders = [folder(tmp_path / str(i), {"chat_template": text}) for i, text in enumerate(texts)]
    assert chosen_template("auto", folders) == "a"
    assert chosen_template("auto", folders[1:]) == "b"
    assert chosen_template("auto", folders[3:4]) == ""
    assert chosen_template("chatml", []) == TEMPLATES["chatml"]
    assert chosen_template("{{ my own template }}", []) == "{{ my own template }}"


@pytest.mark.parametrize("value", ["chatml", "auto", "{% for m in messages %}{{ m }}{% endfor %}", None])
def test_recipe(value):
    recipe = parse_recipe(
        {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "chat_template": value}
    )
    assert recipe.chat_template == value
    assert parse_recipe(recipe.as_dict()) == recipe


@pytest.mark.parametrize(
    ("value", "words"), [("chatmll", ["did you mean `chatml`?"]), ("{{ x }}", ["Jinja"]), (3, ["3"])]
)
def test_wrong(value, words):
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"merge_method": "linear", "models": [{"model": "a"}], "chat_template": value})
    for word in ("`chat_template`", *words):
        assert word in str(caught.value)


def test_it_is_written_to_the_merged_tokenizer(tmp_path):
    for name in "ab":
        save_model(
            folder(tmp_path / name, {"chat_template": "old", "x": 1}, chat_template__jinja="old"),
            {"w": torch.ones(2)},
        )
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / x)} for x in "ab"],
        "chat_template": "chatml",
    }
    merge(recipe, tmp_path / "out", backend="reference")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {
        "chat_template": TEMPLATES["chatml"],
        "x": 1,
    }
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATES["chatml"]
    for name in "ab":
        (tmp_path / name / "tokenizer.json").unlink()
    with pytest.raises(RecipeError, match="has no tokenizer to give it to"):
        merge(recipe, tmp_path / "other", backend="reference")
