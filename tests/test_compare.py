"""Models of equal shapes that compute other things are told apart by configuration and vocabulary."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import load_merged, random_tensors, save_model
from click.testing import CliRunner

from ota_kernels import InputError, merge, plan
from ota_kernels.cli import cli
from ota_kernels.io.tokenizer import sentencepiece_tokens
from ota_kernels.planning.compare import config_differences, contradictions
from ota_kernels.planning.tokens import conflicts, token_differences

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 12,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
SHAPES = {"model.embed_tokens.weight": (12, 4), "model.layers.0.mlp.up_proj.weight": (6, 4)}


def save(root, configs, shapes=SHAPES):
    """Models a, b, ... of these configurations; the recipe that merges them linearly."""
    names = [chr(ord("a") + i) for i in range(len(configs))]
    for seed, (name, config) in enumerate(zip(names, configs, strict=True)):
        save_model(root / name, random_tensors(shapes, seed), config=config)
    return {"merge_method": "linear", "models": [{"model": str(root / name)} for name in names]}


DIFFERENT = {
    "model_type": ({"model_type": "mistral"}, "model_type: 'llama' in a, 'mistral' in b"),
    "rope_theta": ({"rope_theta": 1e6}, "rope_theta: 10000 in a, 1000000 in b"),
    "rope_scaling": ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling: "),
    "rope_parameters": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta: "),
    "head counts": ({"num_attention_heads": 4}, "num_attention_heads: 2 in a, 4 in b"),
    "kv heads": ({"num_key_value_heads": 1}, "num_key_value_heads: 2 in a, 1 in b"),
    "head_dim": ({"head_dim": 8}, "head_dim: 2 in a, 8 in b"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act: 'silu' in a, 'gelu' in b"),
    "norm epsilon": ({"rms_norm_eps": 1e-6}, "rms_norm_eps: 1e-05 in a, 1e-06 in b"),
    "experts per token": ({"num_experts_per_tok": 2}, None),  # the other says nothing
    "nested": ({"vision_config": {"patch_size": 14}}, None),
}


@pytest.mark.parametrize(("change", "line"), DIFFERENT.values(), ids=DIFFERENT.keys())
def test_keys_that_change_the_mathematics(change, line):
    found = config_differences({"a": LLAMA, "b": LLAMA | change})
    assert (found == []) is (line is None)
    if line is not None:
        assert any(text.startswith(line) for text in found), found


@pytest.mark.parametrize(
    "change",
    [
        {"max_position_embeddings": 131072},
        {"eos_token_id": [1, 2], "bos_token_id": 3},
        {"sliding_window": None, "use_cache": False, "torch_dtype": "float16", "transformers_version": "5"},
        {"rope_theta": 10000},
        {"rope_theta": 10000.0, "rope_scaling": None},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"num_key_value_heads": 2, "head_dim": 2},
        {"rms_norm_eps": 0.00001},
        {"hidden_act": "swish"},
        {"_name_or_path": "somewhere", "architectures": ["X"]},
        {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}},
    ],
    ids=str,
)
def test_what_may_differ(change):
    assert config_differences({"a": LLAMA, "b": LLAMA | change, "c": None}) == []


GEMMA = {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None}
LLAMA3 = {"factor": 8.0, "rope_type": "llama3", "low_freq_factor": 1.0}


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        pytest.param(
            GEMMA,
            {
                "model_type": "gemma3_text",
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000},
                },
            },
            id="an entry per type of layer",
        ),
        pytest.param(
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
            {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
            id="llama3",
        ),
        pytest.param(
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            id="partial",
        ),
        pytest.param(
            {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3]}},
            {"rope_theta": 1e6, "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3]}},
            id="mrope",
        ),
        pytest.param(
            {"model_type": "gemma", "hidden_act": "gelu"},
            {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"},
            id="gemma's activation",
        ),
    ],
)
def test_configurations_of_other_versions_are_the_same(older, newer):
    assert config_differences({"a": older, "b": newer}) == []


def test_other_rotary_embeddings_of_other_versions_differ():
    newer = {"rope_parameters": LLAMA3 | {"rope_theta": 5e5, "factor": 32.0}}
    (line,) = config_differences({"a": {"rope_theta": 5e5, "rope_scaling": LLAMA3}, "b": newer})
    assert line.startswith("rope_scaling: ")
    (line,) = config_differences({"a": {"rope_theta": 5e5}, "b": {"rope_theta": 5e5, "rope_scaling": LLAMA3}})
    assert line.startswith("rope_scaling: 'none' in a, {")
    other = GEMMA | {"rope_local_base_freq": 2e4}
    assert config_differences({"a": GEMMA, "b": other}) == ["rope_local_base_freq: 10000 in a, 20000 in b"]


def test_nested_and_flat_configurations_are_compared():
    flat = {"model_type": "qwen2_5_vl", "rope_theta": 1e6, "vision_config": {"patch_size": 14}}
    nested = {"model_type": "qwen2_5_vl", "text_config": {"model_type": "qwen2_5_vl_text", "rope_theta": 1e6}}
    assert config_differences({"a": flat, "b": nested}) == []
    nested["text_config"]["rope_theta"] = 1e4
    assert config_differences({"a": flat, "b": nested}) == ["rope_theta: 1000000 in a, 10000 in b"]
    other = flat | {"vision_config": {"patch_size": 16}}
    assert config_differences({"a": flat, "b": other}) == ["vision_config.patch_size: 14 in a, 16 in b"]


def test_labels_of_classifiers():
    a, b = ({"id2label": {"0": one, "1": two}} for one, two in (("good", "bad"), ("bad", "good")))
    assert config_differences({"a": a, "b": b})[0].startswith("id2label: ")
    assert config_differences({"a": a, "b": {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}}) == []


@pytest.mark.parametrize(
    ("config", "lines"),
    [
        ({"vocab_size": 12, "num_hidden_layers": 1}, []),
        ({"vocab_size": 10}, ["vocab_size is 10, but model.embed_tokens.weight has 12 rows"]),
        ({"vocab_size": 10, "model_type": "mllama"}, []),
        (
            {"vocab_size": 14, "model_type": "mllama"},
            ["vocab_size is 14, but model.embed_tokens.weight has 12 rows"],
        ),
        (
            {"text_config": {"vocab_size": 14}},
            ["vocab_size is 14, but model.embed_tokens.weight has 12 rows"],
        ),
        ({"num_hidden_layers": 3}, ["there are to be 3 layers, but the tensors are those of 1"]),
        ({"num_hidden_layers": 0}, []),  # more than said: layers for speculation are stored beside
        (None, []),
    ],
)
def test_the_configuration_against_the_tensors(config, lines):
    assert contradictions(config, SHAPES) == lines


def test_two_stacks_of_layers_are_not_counted():
    shapes = {"encoder.layers.0.w": (1,), "decoder.layers.0.w": (1,)}
    assert contradictions({"num_hidden_layers": 6}, shapes) == []


def test_a_difference_is_refused_by_plan_and_merge_and_named_where_it_is_allowed(tmp_path):
    recipe = save(tmp_path, [LLAMA, LLAMA | {"rope_theta": 5e5}])
    for job in (lambda: plan(recipe), lambda: merge(recipe, tmp_path / "out")):
        with pytest.raises(InputError, match=r"rope_theta: 10000 in .*a, 500000 in .*b.*--allow-crimes"):
            job()
    report = merge(recipe, tmp_path / "out", allow_crimes=True)
    assert any("rope_theta" in note for note in report["notes"])
    assert any("rope_theta" in note for note in plan(recipe, allow_crimes=True).notes)
    assert load_merged(tmp_path / "out").keys() == SHAPES.keys()


def test_the_option_of_the_command_line(tmp_path):
    recipe = save(tmp_path, [LLAMA, LLAMA | {"hidden_act": "gelu"}])
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    call = ["plan", str(tmp_path / "recipe.yaml")]
    refused = CliRunner().invoke(cli, call)
    assert isinstance(refused.exception, InputError)
    allowed = CliRunner().invoke(cli, [*call, "--allow-crimes"])
    assert allowed.exit_code == 0
    assert "note: the models differ, merged all the same: hidden_act: 'silu' in" in allowed.output


def test_a_base_that_is_not_merged_still_gives_the_configuration(tmp_path):
    recipe = save(tmp_path, [LLAMA, LLAMA])
    save_model(tmp_path / "base", random_tensors(SHAPES, 9), config=LLAMA | {"vocab_size": 10})
    with pytest.raises(InputError, match=r"vocab_size: 10 in .*base, 12 in .*a and .*b"):
        plan(recipe | {"base_model": str(tmp_path / "base")})


def tokenizer(tokens, added=()):
    return {
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": []},
        "added_tokens": [{"id": len(tokens) + i, "content": token} for i, token in enumerate(added)],
    }


class TestVocabularies:
    @pytest.mark.parametrize(
        ("ours", "theirs", "rows"),
        [
            ({"a": 0, "b": 1}, {"a": 0, "b": 1}, []),
            ({"a": 0, "b": 1}, {"a": 0}, []),  # one has more
            ({"a": 0, "b": 1}, {"a": 0, "c": 1}, [1]),
            ({"a": 0, "b": 1}, {"b": 0, "a": 1}, [0, 1]),
            ({"a": 0, "b": 1}, {"a": 0, "b": 2}, [1, 2]),  # moved to a row that the other leaves free
            ({"a": 0, "<|reserved_special_token_3|>": 1}, {"a": 0, "<tool>": 1}, []),
            ({"a": 0, "<unused7>": 1, "<unused8>": 2}, {"a": 0, "<x>": 1, "<unused7>": 2}, []),
            ({"a": 0, "<unused7>": 1, "<x>": 2}, {"a": 0, "<x>": 1, "<unused7>": 2}, [1, 2]),
            ({"a": 0, "b": 99}, {"a": 0, "c": 99}, []),  # beyond the rows
        ],
    )
    def test_conflicts(self, ours, theirs, rows):
        assert [row for row, _, _ in conflicts(ours, theirs, 50)] == rows
        assert [row for row, _, _ in conflicts(theirs, ours, 50)] == rows

    def test_models_and_tokens_are_named(self, tmp_path):
        recipe = save(tmp_path, [LLAMA, LLAMA])
        words = [f"t{i}" for i in range(10)]
        for name, added in (("a", ["<|im_start|>", "<|im_end|>"]), ("b", ["<|pad|>", "<|sep|>"])):
            (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokenizer(words, added)))
        with pytest.raises(InputError) as caught:
            plan(recipe)
        assert "row 10 is '<|im_start|>' in " in str(caught.value)
        assert "and '<|pad|>' in " in str(caught.value)
        assert merge(recipe, tmp_path / "out", allow_crimes=True)["notes"]

    def test_rows_follow_the_tokenizer_that_is_written(self, tmp_path):
        recipe = save(tmp_path, [LLAMA, LLAMA])
        for name in "ab":
            (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokenizer("abc")))
        (tmp_path / "t").mkdir()
        (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(tokenizer("acb")))
        merge(recipe | {"tokenizer_source": str(tmp_path / "t")}, tmp_path / "out")
        name = "model.embed_tokens.weight"
        one, other = (random_tensors(SHAPES, seed)[name] for seed in (0, 1))
        expected = ((one.double() + other.double()) / 2).float()[[0, 2, 1]]
        torch.testing.assert_close(load_merged(tmp_path / "out")[name], expected, rtol=0, atol=1e-7)
        assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 3

    def test_tokens_that_two_models_add_to_a_base_are_compared_with_each_other(self, tmp_path):
        words = [f"t{i}" for i in range(10)]
        for name, added in (("base", []), ("a", ["<x>"]), ("b", ["<x>", "<z>"]), ("c", ["<y>"])):
            (tmp_path / name).mkdir()
            (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokenizer(words, added)))
        folders = {name: tmp_path / name for name in ("base", "a", "b", "c")}
        assert token_differences(folders) == ["tokens differ: row 10 is '<x>' in a and '<y>' in c"]

    def test_a_written_tokenizer_of_more_tokens_than_rows_is_a_difference(self, tmp_path):
        for name, tokens in (("base", "abcd"), ("a", "abc")):
            (tmp_path / name).mkdir()
            (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokenizer(tokens)))
        folders = {name: tmp_path / name for name in ("base", "a")}
        line = "the tokenizer of base has ids up to 3, but the embeddings 3 rows"
        assert token_differences(folders, 3, tmp_path / "base") == [line]
        assert token_differences(folders, 3, tmp_path / "a") == []
        assert token_differences(folders, 4, tmp_path / "base") == []
        assert token_differences(folders, 2, tmp_path / "base") == []  # all models are so

    def test_added_tokens_of_the_old_form_are_read(self, tmp_path):
        for name, token in (("a", "<x>"), ("b", "<y>")):
            (tmp_path / name).mkdir()
            (tmp_path / name / "vocab.json").write_text(json.dumps({"t": 0}))
            (tmp_path / name / "added_tokens.json").write_text(json.dumps({token: 1}))
        found = token_differences({name: tmp_path / name for name in "ab"})
        assert found == ["tokens differ: row 1 is '<x>' in a and '<y>' in b"]

    def test_a_merge_without_embeddings_needs_no_tokens(self, tmp_path):
        recipe = save(tmp_path, [None, None], {"w": (3, 3)})
        for name, tokens in (("a", "ab"), ("b", "ba")):
            (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokenizer(tokens)))
        assert plan(recipe).notes == ()

    def test_sentencepiece_models_are_compared_by_token(self, tmp_path):
        def model(*pieces):
            data = b""
            for piece in pieces:
                text = piece.encode()
                body = bytes([0x0A, len(text)]) + text + b"\x15\0\0\0\0" + b"\x18\x01"
                data += bytes([0x0A, len(body)]) + body
            return data + bytes([0x12, 2, 0x18, 1])  # the trainer's settings

        assert sentencepiece_tokens(model("<unk>", "▁the", "é")) == {"<unk>": 0, "▁the": 1, "é": 2}
        assert sentencepiece_tokens(b"\x0a\xff") is None
        assert sentencepiece_tokens(b"not a model") is None
        for name, pieces in (("a", ("x", "y")), ("b", ("x", "y")), ("c", ("y", "x"))):
            (tmp_path / name).mkdir()
            (tmp_path / name / "tokenizer.model").write_bytes(model(*pieces) + name.encode() * 0)
        assert token_differences({name: tmp_path / name for name in "ab"}) == []
        assert token_differences({name: tmp_path / name for name in "ac"}) == [
            "tokens differ: row 0 is 'x' in a and 'y' in c; row 1 is 'y' in a and 'x' in c"
        ]


def test_keys_that_nothing_is_known_of_are_remarked(tmp_path):
    """They may change the mathematics: not refused, and not passed over."""
    configs = [
        LLAMA | {"gate_scale": x, "attention_dropout": x, "text_config": {"twist": x}} for x in (1.0, 2.0)
    ]
    notes = plan(save(tmp_path, [*configs, LLAMA])).notes
    (note,) = [note for note in notes if "not compared" in note]
    assert "gate_scale: 1.0 in" in note
    assert "text_config.twist: 1.0 in" in note
    assert "dropout" not in note
    assert not any("not compared" in note for note in plan(save(tmp_path / "same", [LLAMA, LLAMA])).notes)


@pytest.mark.parametrize("key", ["attention_head_dim", "swiglu_limit", "prediction_type"])
def test_keys_of_other_families(key):
    found = config_differences({"a": LLAMA | {key: 8}, "b": LLAMA | {key: 16}})
    assert found == [f"{key}: 8 in a, 16 in b"]
