"""`ota-merge inspect`: what it shows is what a merge understands."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import random_tensors, save_model
from click.testing import CliRunner
from safetensors.torch import save_file

from ota_kernels.cli import cli
from ota_kernels.inspection import inspect

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHAPES = {EMBED: (12, 4), "model.layers.0.mlp.up_proj.weight": (6, 4)}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 12,
    "num_hidden_layers": 1,
    "tie_word_embeddings": True,
    "rope_theta": 1e4,
}


@pytest.fixture
def model(tmp_path):
    def make(name, config=CONFIG, seed=0, **extra):
        tensors = random_tensors(SHAPES, seed, torch.bfloat16)
        tensors |= {key.replace("__", "."): tensor for key, tensor in extra.items()}
        folder = save_model(tmp_path / name, tensors, config=config)
        (folder / "tokenizer.json").write_text(
            json.dumps({"model": {"vocab": {f"t{i}": i for i in range(11)}}})
        )
        return folder

    return make


def run(*arguments):
    return CliRunner().invoke(cli, ["inspect", *map(str, arguments)])


def test_one_model(model):
    inv_freq = torch.ones(2)
    folder = model("a", model__layers__0__rotary_emb__inv_freq=inv_freq)
    (found,) = inspect([folder])["models"]
    expected = {
        "model": str(folder),
        "problem": None,
        "kind": "a model",
        "files": 1,
        "parts": {".": "model"},
        "tensors": 3,
        "elements": 12 * 4 + 6 * 4 + 2,
        "bytes": 2 * (12 * 4 + 6 * 4) + 8,
        "types": {"bfloat16": 72, "float32": 2},
        "buffers": {"fixed": 1},
        "output_matrices": {},
        "tied_in_config": True,
        "rows": {EMBED: 12},
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "claims_quantisation": None,
        "contradictions": [],
        "tokenizer": ["tokenizer.json"],
        "tokens": 11,
        "chat_template": False,
    }
    assert found == expected
    shown = run(folder)
    assert shown.exit_code == 0
    for fact in (
        "LlamaForCausalLM (llama)",
        "72 bfloat16, 2 float32",
        f"{EMBED} has 12 rows",
        "11 tokens",
        "1 fixed",
    ):
        assert fact in shown.output, fact
    assert json.loads(run(folder, "--json").output) == {"models": [found]}


@pytest.mark.parametrize("own", [False, True])
def test_a_stored_head(model, own):
    tensors = random_tensors(SHAPES, 0, torch.bfloat16)
    head = random_tensors({HEAD: (12, 4)}, 5, torch.bfloat16)[HEAD] if own else tensors[EMBED].clone()
    (found,) = inspect([model("a", lm_head__weight=head)])["models"]
    assert found["output_matrices"] == {HEAD: "its own" if own else f"a copy of {EMBED}"}


def test_a_claim_and_contradictions(model):
    config = CONFIG | {"quantization_config": {"quant_method": "gptq"}, "vocab_size": 99}
    shown = run(model("a", config)).output
    assert "none, though config.json says gptq" in shown
    assert f"vocab_size is 99, but {EMBED} has 12 rows" in shown


@pytest.mark.parametrize("json_too", [False, True])
def test_what_cannot_be_merged(model, tmp_path, json_too):
    good = model("good")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"q.lora_A.weight": torch.ones(2, 3)}, adapter / "adapter_model.safetensors")
    shown = run(good, adapter, *(["--json"] if json_too else []))
    assert shown.exit_code == 2
    assert "is a LoRA adapter, not a full model" in shown.output
    assert "a model cannot be merged, see above" in shown.output


@pytest.mark.parametrize(
    ("tensors", "kind", "mergeable"),
    [
        (
            {"q.qweight": torch.ones(2, 2, dtype=torch.int32), "q.g_idx": torch.ones(2, dtype=torch.int32)},
            "GPTQ",
            False,
        ),
        (
            {"q.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "q.weight_scale": torch.ones(1)},
            "float8 with scales",
            True,
        ),
    ],
)
def test_quantised_models(tmp_path, tensors, kind, mergeable):
    save_model(tmp_path / "a", tensors)
    (found,) = inspect([tmp_path / "a"])["models"]
    assert found["quantisation"] == kind
    assert found["problem"] is None if mergeable else f"is quantised: {kind}" in found["problem"]


def test_a_missing_shard(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    shown = run(tmp_path)
    assert shown.exit_code == 2
    assert "missing: model-00002-of-00002.safetensors" in shown.output


def test_a_file(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    (found,) = inspect([tmp_path / "x.safetensors"])["models"]
    assert (found["kind"], found["tensors"], found["tokenizer"]) == ("a file", 1, [])


class TestTogether:
    def test_models_of_one_kind(self, model):
        shown = run(model("a"), model("b", seed=1))
        assert shown.exit_code == 0
        assert "nothing that a merge refuses" in shown.output

    def test_what_differs(self, model):
        a, b = model("a"), model("b", CONFIG | {"rope_theta": 1e6}, 1)
        found = inspect([a, b])["together"]
        assert found == {
            "problem": None,
            "differences": [f"rope_theta: 10000 in {a}, 1000000 in {b}"],
            "notes": [],
        }
        assert run(a, b).exit_code == 2

    def test_tensors_that_one_lacks_and_notes(self, model):
        a = model("a")
        found = inspect([a, model("b", seed=1, extra__weight=torch.ones(3, 2))])["together"]
        assert "has no tensor extra.weight" in found["problem"]
        buffered = model("c", seed=1, rotary_emb__inv_freq=torch.ones(3))
        found = inspect([a, buffered])["together"]
        assert found["problem"] is None
        assert found["notes"] == [
            f"buffers taken from {buffered}: the other model lacks them: rotary_emb.inv_freq"
        ]
