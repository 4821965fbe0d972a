"""What lands beside the tensors: configuration, tokenizer, code, recipe and model card."""

import itertools
import json
import os

import pytest
import yaml

from ota_kernels.errors import InputError, RecipeError, RunError
from ota_kernels.io.assets import Asset, plan_assets, recipe_asset, write_assets, write_file
from ota_kernels.io.leftovers import asset_notes
from ota_kernels.run.card import model_card


def make_folder(path, **files):
    """A folder of files by name; dicts become JSON. `__` in a name stands for a dot."""
    path.mkdir(parents=True, exist_ok=True)
    for key, content in files.items():
        put(path / key.replace("__", "."), content)
    return path


def put(path, content):
    if isinstance(content, dict | list):
        content = json.dumps(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def word_level(*tokens, added=()):
    """A tokenizer.json of the tokenizers library: `tokens` numbered from 0, then `added`."""
    return {
        "added_tokens": [{"id": len(tokens) + i, "content": token} for i, token in enumerate(added)],
        "model": {"type": "WordLevel", "vocab": {token: i for i, token in enumerate(tokens)}},
    }


def unigram(*tokens):
    return {"added_tokens": [], "model": {"type": "Unigram", "vocab": [[token, -1.5] for token in tokens]}}


def content(assets):
    """Asset contents as bytes, by name; a name planned twice fails."""
    assert len({asset.name for asset in assets}) == len(assets)
    return {a.name: a.content if isinstance(a.content, bytes) else a.content.read_bytes() for a in assets}


def planned_config(folder, **options):
    return json.loads(content(plan_assets({"m": folder}, **options))["config.json"])


# config.json


@pytest.mark.parametrize(
    ("before", "options", "after"),
    [
        pytest.param(
            {"a": 1, "torch_dtype": "float32", "z": 2},
            {"dtype": "bfloat16"},
            {"a": 1, "torch_dtype": "bfloat16", "z": 2},
            id="torch_dtype",
        ),
        pytest.param(
            {"dtype": "float32", "a": 1}, {"dtype": "float16"}, {"dtype": "float16", "a": 1}, id="dtype"
        ),
        pytest.param(
            {"dtype": "float32", "torch_dtype": None},
            {"dtype": "float16"},
            {"dtype": "float16", "torch_dtype": "float16"},
            id="both",
        ),
        pytest.param({"a": 1}, {"dtype": "float16"}, {"a": 1, "torch_dtype": "float16"}, id="neither"),
        pytest.param(
            {"torch_dtype": "float32", "tie_word_embeddings": True},
            {},
            {"torch_dtype": "float32", "tie_word_embeddings": True},
            id="unchanged",
        ),
        pytest.param(
            {"tie_word_embeddings": True, "torch_dtype": "float32"},
            {"untied": True},
            {"tie_word_embeddings": False, "torch_dtype": "float32"},
            id="untied",
        ),
        # Absent means tied to transformers.
        pytest.param({"a": 1}, {"untied": True}, {"a": 1, "tie_word_embeddings": False}, id="untied absent"),
        pytest.param(
            {"text_config": {"dtype": "float32", "tie_word_embeddings": True}, "dtype": "float32"},
            {"dtype": "bfloat16", "untied": True},
            {
                "text_config": {"dtype": "bfloat16", "tie_word_embeddings": False},
                "dtype": "bfloat16",
                "tie_word_embeddings": False,
            },
            id="nested",
        ),
        pytest.param(
            {"quantization_config": {"dtype": "int8"}, "dtype": "float32"},
            {"dtype": "bfloat16"},
            {"dtype": "bfloat16"},
            id="quantization is not claimed",
        ),
        pytest.param(
            {"text_config": {"quantization_config": {"quant_method": "fp8"}, "a": 1}, "quantization": None},
            {},
            {"text_config": {"a": 1}},
            id="quantization, nested",
        ),
    ],
)
def test_config_states_the_output_and_keeps_the_rest_in_order(tmp_path, before, options, after):
    folder = make_folder(tmp_path / "m", config__json=before)
    # Compared as text, because equal dicts may differ in order.
    assert json.dumps(planned_config(folder, **options)) == json.dumps(after)


def test_config_without_changes_is_copied_byte_for_byte(tmp_path):
    text = b'{\t"weird":   "spacing"}'
    folder = make_folder(tmp_path / "m", config__json=text)
    assert content(plan_assets({"m": folder})) == {"config.json": text}


def test_config_keeps_text_beyond_ascii(tmp_path):
    folder = make_folder(tmp_path / "m", config__json={"name": "é\ud800"})
    assert planned_config(folder, dtype="float16")["name"] == "é\ud800"


def test_a_folder_without_any_asset_gives_none(tmp_path):
    folder = make_folder(tmp_path / "m", model__safetensors=b"", README__md="not mine to copy")
    for source in ("base", "union"):
        assert plan_assets({"m": folder}, tokenizer_source=source, dtype="float16", untied=True) == []


@pytest.mark.parametrize(
    "text", [b"{", b"[1]", b"\xff", b"[" * 100_000], ids=["cut", "list", "binary", "deep"]
)
def test_a_malformed_config_is_an_input_error_that_names_it(tmp_path, text):
    folder = make_folder(tmp_path / "m", config__json=text)
    with pytest.raises(InputError, match=r"m/config\.json"):
        plan_assets({"m": folder}, dtype="float16")


def test_the_first_model_gives_the_configuration(tmp_path):
    base = make_folder(tmp_path / "base", config__json={"a": 1}, generation_config__json={"b": 1})
    expert = make_folder(
        tmp_path / "expert",
        config__json={"a": 2},
        generation_config__json={"b": 2},
        processor_config__json={},
    )
    assert content(plan_assets({"base": base, "expert": expert})) == {
        "config.json": b'{"a": 1}',
        "generation_config.json": b'{"b": 1}',
    }


# Tokenizer files


TOKENIZER_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "qwen.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
)


@pytest.mark.parametrize("name", TOKENIZER_NAMES)
def test_every_tokenizer_file_is_copied_from_the_base(tmp_path, name):
    base, expert = make_folder(tmp_path / "base"), make_folder(tmp_path / "expert")
    put(base / name, b'{"from": "base"}')
    put(expert / name, b'{"from": "expert"}')
    assert content(plan_assets({"base": base, "expert": expert})) == {name: b'{"from": "base"}'}


def test_tokenizer_source_names_a_model_or_a_folder(tmp_path):
    base = make_folder(tmp_path / "base", vocab__txt="a\n", config__json={"a": 1})
    hub = make_folder(tmp_path / "cache" / "snapshot", vocab__txt="b\n", config__json={"a": 2})
    other = make_folder(tmp_path / "other", vocab__txt="c\n")
    models = {"base": base, "org/expert": hub}
    for source, text in (("base", b"a\n"), ("org/expert", b"b\n"), (str(other), b"c\n")):
        assert content(plan_assets(models, tokenizer_source=source)) == {
            "config.json": b'{"a": 1}',
            "vocab.txt": text,
        }


@pytest.mark.parametrize("source", ["org/expert", "no/such/folder", "~nobody-of-that-name/x"])
def test_a_tokenizer_source_without_tokenizer_is_an_error_that_names_it(tmp_path, source):
    base = make_folder(tmp_path / "base", vocab__txt="a\n")
    # A chat template alone is no tokenizer.
    expert = make_folder(tmp_path / "expert", chat_template__jinja="{{ x }}")
    with pytest.raises(RecipeError, match=f"tokenizer_source: {source} "):
        plan_assets({"base": base, "org/expert": expert}, tokenizer_source=source)


def test_a_link_whose_target_is_gone_is_an_input_error(tmp_path):
    folder = make_folder(tmp_path / "m")
    (folder / "tokenizer.json").symlink_to(tmp_path / "blobs" / "gone")
    with pytest.raises(InputError, match=r"m/tokenizer\.json"):
        plan_assets({"m": folder})


# Union of vocabularies


EQUAL = {
    "same file": ({"tokenizer.json": word_level("a", "b")}, {"tokenizer.json": word_level("a", "b")}),
    "other order": (
        {"vocab.json": {"a": 0, "b": 1}},
        {"vocab.json": {"b": 1, "a": 0}},
    ),
    "unigram and word level": (
        {"tokenizer.json": unigram("a", "b")},
        {"tokenizer.json": word_level("a", "b")},
    ),
    "added or in the vocabulary": (
        {"tokenizer.json": word_level("a", added=["<x>"])},
        {"tokenizer.json": word_level("a", "<x>")},
    ),
    "vocab.txt and tokenizer.json": (
        {"vocab.txt": "a\nb\u2028c\n"},
        {"tokenizer.json": word_level("a", "b\u2028c")},
    ),
    "vocab.txt of Windows": ({"vocab.txt": "a\r\nb\r\n"}, {"vocab.txt": "a\nb\n"}),
    "added_tokens.json": (
        {"vocab.json": {"a": 0}, "added_tokens.json": {"<x>": 1}},
        {"tokenizer.json": word_level("a", added=["<x>"])},
    ),
    "added_tokens_decoder": (
        {
            "vocab.json": {"a": 0},
            "tokenizer_config.json": {"added_tokens_decoder": {"1": {"content": "<x>"}}},
        },
        {"tokenizer.json": word_level("a", added=["<x>"])},
    ),
    "sentencepiece bytes": ({"tokenizer.model": b"\x00\xff"}, {"tokenizer.model": b"\x00\xff"}),
    "one has both formats": (
        {"tokenizer.json": word_level("a"), "tokenizer.model": b"1"},
        {"tokenizer.model": b"1"},
    ),
    "other settings": (
        {"vocab.json": {"a": 0}, "special_tokens_map.json": {"eos": "a"}},
        {"vocab.json": {"a": 0}, "special_tokens_map.json": {}},
    ),
}


@pytest.mark.parametrize(("first", "second"), EQUAL.values(), ids=EQUAL)
def test_union_of_equal_vocabularies_copies_the_first_tokenizer(tmp_path, first, second):
    base = make_folder(tmp_path / "base")  # without a tokenizer it takes no part
    models = {"base": base, "a": make_folder(tmp_path / "a"), "b": make_folder(tmp_path / "b")}
    for name, files in (("a", first), ("b", second)):
        for file, text in files.items():
            put(models[name] / file, text)
    copied = content(plan_assets(models, tokenizer_source="union"))
    assert copied == {file: (models["a"] / file).read_bytes() for file in first}


DIFFERENT = {
    "swapped ids": (
        {"tokenizer.json": word_level("a", "b", "c")},
        {"tokenizer.json": word_level("b", "a", "c")},
        "'a' is 0 and 1, 'b' is 1 and 0: write",
    ),
    "one more token": (
        {"tokenizer.json": word_level("a")},
        {"tokenizer.json": word_level("a", added=["<x>"])},
        "'<x>' is absent and 1: write",
    ),
    "one less token": ({"vocab.txt": "a\nb\n"}, {"vocab.txt": "a\n"}, "'b' is 1 and absent: write"),
    "an empty line is a token": ({"vocab.txt": "a\n\n"}, {"vocab.txt": "a\n"}, "'' is 1 and absent: write"),
    "many": (
        {"vocab.json": {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}},
        {"vocab.json": {}},
        "'a' is 0 and absent, 'b' is 1 and absent, 'c' is 2 and absent, and 2 more: write",
    ),
    "unigram": (
        {"tokenizer.json": unigram("a", "b\nc")},
        {"tokenizer.json": unigram("a")},
        "'b\\nc' is 1 and absent: write",
    ),
    "added_tokens.json": (
        {"vocab.json": {"a": 0}, "added_tokens.json": {"<x>": 1}},
        {"vocab.json": {"a": 0}},
        "'<x>' is 1 and absent: write",
    ),
    "sentencepiece bytes": ({"tokenizer.model": b"1"}, {"tokenizer.model": b"2"}, "'tokenizer.model' is "),
    "formats": ({"tokenizer.model": b"1"}, {"vocab.txt": "a\n"}, "different formats: write"),
}


@pytest.mark.parametrize(("first", "second", "says"), DIFFERENT.values(), ids=DIFFERENT)
def test_union_of_different_vocabularies_names_models_and_tokens(tmp_path, first, second, says):
    models = {name: make_folder(tmp_path / name) for name in ("base", "same", "other")}
    for name, files in (("base", first), ("same", first), ("other", second)):
        for file, text in files.items():
            put(models[name] / file, text)
    with pytest.raises(RecipeError) as caught:
        plan_assets(models, tokenizer_source="union")
    text = str(caught.value)
    assert says in text
    assert "base and other" in text
    assert "tokenizer_source: base" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b'{"model": {"vocab": [1]}}'),
        ("tokenizer.json", b'{"model": {"vocab": [[["a"], 0]]}}'),
        ("tokenizer.json", b'{"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}'),
        ("tokenizer.json", b'{"model": {"vocab": {}}, "added_tokens": ["x"]}'),
        ("vocab.json", b"[]"),
        ("vocab.txt", b"\xff\n"),
    ],
)
def test_a_malformed_vocabulary_is_an_input_error_that_names_it(tmp_path, name, text):
    models = {"a": make_folder(tmp_path / "a", vocab__txt="a\n"), "b": make_folder(tmp_path / "b")}
    put(models["b"] / name, text)
    with pytest.raises(InputError, match=f"b/{name}"):
        plan_assets(models, tokenizer_source="union")


@pytest.mark.parametrize("decoder", [[1], {"x": {"content": "a"}}, {"1": "a"}])
def test_malformed_added_tokens_are_an_input_error(tmp_path, decoder):
    config = {"added_tokens_decoder": decoder}
    models = {
        name: make_folder(tmp_path / name, vocab__txt="a\n", tokenizer_config__json=config) for name in "ab"
    }
    with pytest.raises(InputError, match=r"tokenizer_config\.json"):
        plan_assets(models, tokenizer_source="union")


# Remote code


def test_code_is_copied_only_where_auto_map_asks_for_it(tmp_path):
    code = {"modeling_x__py": "class X: pass", "helper__py": ""}
    plain = make_folder(tmp_path / "plain", config__json={}, **code)
    remote = make_folder(
        tmp_path / "remote", config__json={"auto_map": {"AutoModel": "modeling_x.X"}}, **code
    )
    planned = {n: content(plan_assets({"m": f}, copy_code=True)) for n, f in (("p", plain), ("r", remote))}
    assert planned["p"].keys() == {"config.json"}
    assert planned["r"].keys() == {"config.json", "modeling_x.py", "helper.py"}


def test_code_is_copied_only_where_it_is_told_and_named_otherwise(tmp_path):
    folder = make_folder(
        tmp_path / "m",
        config__json={"auto_map": {"AutoModel": "modeling_x.X"}},
        modeling_x__py="class X: pass",
    )
    names = content(plan_assets({"m": folder})).keys()
    assert names == {"config.json"}
    (note,) = asset_notes({"m": folder}, names)
    assert "modeling_x.py" in note
    assert "--trust-remote-code" in note
    assert asset_notes({"m": folder}, {*names, "modeling_x.py"}) == []


def test_code_of_a_tokenizer_comes_with_it_and_must_not_clash(tmp_path):
    auto_map = {"auto_map": {"AutoX": "x.X"}}
    base = make_folder(tmp_path / "base", config__json=auto_map, x__py="1", y__py="2")
    other = make_folder(
        tmp_path / "other", vocab__txt="a\n", tokenizer_config__json=auto_map, x__py="1", z__py="3"
    )
    names = content(plan_assets({"base": base}, tokenizer_source=str(other), copy_code=True)).keys()
    assert names == {"config.json", "vocab.txt", "tokenizer_config.json", "x.py", "y.py", "z.py"}
    put(other / "x.py", "changed")
    with pytest.raises(RecipeError, match=r"base/x\.py and .*other/x\.py differ"):
        plan_assets({"base": base}, tokenizer_source=str(other), copy_code=True)


# What stays behind


def test_files_that_stay_behind_are_named(tmp_path):
    folder = make_folder(
        tmp_path / "m",
        config__json={},
        README__md="# x",
        training_args__json="{}",
        model__safetensors="weights",
        pytorch_model__bin="weights",
    )
    put(folder / "runs" / "events.log", "x")
    put(folder / ".git" / "config", "x")
    put(folder / "checkpoint-5" / "trainer_state.json", "{}")
    names = content(plan_assets({"m": folder})).keys()
    assert asset_notes({"m": folder}, names) == [
        "files of m that stay behind: training_args.json, runs/events.log"
    ]
    assert asset_notes({"m": make_folder(tmp_path / "bare", config__json={})}, ["config.json"]) == []


def test_other_weights_are_named_where_some_are_merged(tmp_path):
    folder = make_folder(
        tmp_path / "m",
        model__safetensors="x",
        pytorch_model__bin="x",
        optimizer__pt="x",
        consolidated__safetensors="x",
    )
    read = [folder / "model.safetensors"]
    assert asset_notes({"m": folder}, [], read=read) == [
        "other weights of m that stay behind: consolidated.safetensors, pytorch_model.bin"
    ]
    assert asset_notes({"m": folder}, []) == []  # a base that is not merged gives no weights


def test_a_chat_template_of_another_model_is_hinted_at(tmp_path):
    base, chat = (
        make_folder(tmp_path / "base"),
        make_folder(tmp_path / "chat", vocab__txt="a", chat_template__jinja="x"),
    )
    models = {"base": base, "chat": chat}
    (note,) = asset_notes(models, [])
    assert note.startswith("chat has chat_template.jinja, which the output lacks: `tokenizer_source: chat`")
    assert asset_notes(models, ["vocab.txt", "chat_template.jinja"], "chat") == []


def test_a_generation_config_comes_with_the_tokenizer_where_the_first_model_has_none(tmp_path):
    base = make_folder(tmp_path / "base", config__json={})
    chat = make_folder(tmp_path / "chat", vocab__txt="a", generation_config__json={"eos_token_id": 7})
    models = {"base": base, "chat": chat}
    planned = content(plan_assets(models, tokenizer_source="chat"))
    assert json.loads(planned["generation_config.json"]) == {"eos_token_id": 7}
    assert any("generation_config.json is that of" in n for n in asset_notes(models, planned, "chat"))
    put(base / "generation_config.json", {"eos_token_id": 1})
    planned = content(plan_assets(models, tokenizer_source="chat"))
    assert json.loads(planned["generation_config.json"]) == {"eos_token_id": 1}
    assert not any("is that of" in note for note in asset_notes(models, planned, "chat"))


def test_a_weight_file_brings_the_files_of_its_folder(tmp_path):
    folder = make_folder(tmp_path / "m", config__json={"a": 1}, vocab__txt="a", model__safetensors="weights")
    file = {"m": folder / "model.safetensors"}
    planned = content(plan_assets(file))
    assert planned.keys() == {"config.json", "vocab.txt"}
    assert any("is a file" in note for note in asset_notes(file, planned))
    bare = make_folder(tmp_path / "bare", x__safetensors="weights", vocab__txt="a")
    assert content(plan_assets({"m": bare / "x.safetensors"})) == {}


# Writing


def test_write_assets_copies_links_as_files_and_makes_subfolders(tmp_path):
    blob = tmp_path / "blobs" / "0123"
    put(blob, b"{}")
    snapshot = make_folder(tmp_path / "snapshot")
    (snapshot / "tokenizer.json").symlink_to(os.path.relpath(blob, snapshot))
    put(snapshot / "additional_chat_templates" / "rag.jinja", "{{ rag }}")
    out = make_folder(tmp_path / "out", tokenizer__json="an earlier attempt, longer")
    write_assets(out, [*plan_assets({"m": snapshot}), Asset("README.md", b"# x")])
    written = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert written == {
        "tokenizer.json": b"{}",
        "additional_chat_templates/rag.jinja": b"{{ rag }}",
        "README.md": b"# x",
    }
    assert not (out / "tokenizer.json").is_symlink()


def test_write_file_syncs_what_it_wrote(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    write_file(tmp_path / "x", b"12345")
    assert synced == [5]


def test_write_assets_syncs_the_folders_that_name_the_files(tmp_path, monkeypatch):
    synced = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    write_assets(tmp_path, [Asset("sub/x", b"1")])
    assert synced == {path.stat().st_ino for path in (tmp_path, tmp_path / "sub", tmp_path / "sub" / "x")}


def test_a_refused_write_is_a_run_error_that_names_the_file(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(RunError, match="taken cannot be written"):
        write_file(tmp_path / "taken", b"")


def test_recipe_asset_reads_back_as_the_recipe_in_its_order():
    recipe = {
        "merge_method": "ota",
        "base_model": "ünï: code",
        "parameters": {"epsilon": 1e-26, "density": 0.2},
    }
    asset = recipe_asset(recipe)
    assert asset.name == "merge_recipe.yaml"
    assert list(yaml.safe_load(asset.content).items()) == list(recipe.items())


# Model card


REPORT = {
    "experts": [
        {"model": "/home/me/runs/math", "threshold": 2.5e-13, "kept": 250, "total": 1000, "density": 0.25},
        {"model": "org/code", "threshold": None, "kept": 2_000_000, "total": 2_000_000, "density": 1.0},
    ]
}


def make_recipe(*models, base=None, **parameters):
    recipe = {"merge_method": "ota", "models": [{"model": model, "parameters": {}} for model in models]}
    return recipe | ({"base_model": base} if base else {}) | {"parameters": parameters}


def card(recipe, report=None, has_config=True):
    """With a report of the recipe's models, unless one is given."""
    if report is None:
        numbers = itertools.cycle(REPORT["experts"])
        report = REPORT | {"experts": [next(numbers) | {"model": m["model"]} for m in recipe["models"]]}
    return model_card(recipe, report, "1.2.3", formula="w_0 + x", has_config=has_config)


def front_matter(text):
    start, matter, _ = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(matter)


NAMES = [
    ("org/model-7B.v1", "org/model-7B.v1"),
    ("gpt2", "gpt2"),
    ("/home/me/runs/math/", "math"),
    ("~/runs/math", "math"),
    ("../runs/math", "math"),
    ("/", None),
    (".", None),
    ("org/model@main", None),
    ("a/b/c", None),
    ("org/-model", None),
    ("org/a--b", None),
    ('/data/it\'s: "quoted" #1', None),
    ("/data/modèle", None),
    ("model\n---\nlicense: mit", None),
]


@pytest.mark.parametrize(("name", "listed"), NAMES)
def test_front_matter_lists_only_what_the_hub_accepts(name, listed):
    fields = front_matter(card(make_recipe(name)))
    expected = {"library_name": "transformers", "tags": ["merge", "ota_kernels"]}
    assert fields == ({"base_model": [listed]} if listed else {}) | expected


def test_front_matter_lists_the_base_first_and_each_model_once():
    fields = front_matter(card(make_recipe("org/a", "org/b", "org/a", base="org/base"), has_config=False))
    assert fields == {"base_model": ["org/base", "org/a", "org/b"], "tags": ["merge", "ota_kernels"]}


def test_a_relative_folder_is_not_taken_for_a_hub_id(tmp_path, monkeypatch):
    make_folder(tmp_path / "experts" / "math")
    monkeypatch.chdir(tmp_path)
    assert front_matter(card(make_recipe("experts/math", "experts/code")))["base_model"] == [
        "math",
        "experts/code",
    ]


def test_card_shows_experts_method_and_version():
    text = card(make_recipe("/home/me/runs/math", "org/code", base="org/base"))
    assert "| math | 2.5e-13 | 250 of 1.0 K | 25 % |\n| org/code | none | 2.0 M of 2.0 M | 100 % |" in text
    assert "    out = w_0 + x\n" in text
    assert "2 models (base model: org/base)" in text
    assert "ota_kernels 1.2.3 with the method `ota`" in text
    assert "2509.11167" in text


def test_card_holds_the_recipe_without_the_folders_of_this_machine():
    recipe = make_recipe("/home/me/runs/math", "org/code", base="~/base", epsilon=1e-26)
    recipe["models"][0]["parameters"]["preconditioner_path"] = "/home/me/runs/math/exp_avg_sq.safetensors"
    text = card(recipe)
    block = text.split("```yaml\n")[1].split("```")[0]
    expected = make_recipe("math", "org/code", base="base", epsilon=1e-26)
    expected["models"][0]["parameters"]["preconditioner_path"] = "exp_avg_sq.safetensors"
    assert list(yaml.safe_load(block).items()) == list(expected.items())
    assert "/home" not in text
    assert "~/" not in text


def test_names_cannot_break_the_table():
    report = {"experts": [REPORT["experts"][0] | {"model": "/x/a|b `c`\n<d>"}]}
    text = card(make_recipe("org/a"), report)
    assert "\n| a\\|b \\`c\\` \\<d\\> | 2.5e-13 |" in text
