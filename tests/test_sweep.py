"""Whatever model class of transformers is merged: every tensor is there, with its value, and it loads whole.

A sample by default; all classes with OTA_SWEEP=all, some with OTA_SWEEP=NameA,NameB.
"""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from checkpoints import load_merged
from safetensors import safe_open

from ota_kernels import merge

transformers = pytest.importorskip("transformers")

SAMPLE = (
    "LlamaForSequenceClassification",  # a head called score in a tied model
    "RwkvForCausalLM",  # layers that end in output.weight
    "GPT2LMHeadModel",
    "T5ForConditionalGeneration",  # shared embeddings
    "BertForMaskedLM",
    "GPTNeoXForCausalLM",  # a head called embed_out
    "Gemma2ForCausalLM",
    "WhisperForConditionalGeneration",
    "ResNetForImageClassification",  # running means and counters
)
ASKED = os.environ.get("OTA_SWEEP", "")


def names() -> list[str]:
    if ASKED != "all":
        return ASKED.split(",") if ASKED else list(SAMPLE)
    from sweep import classes

    return sorted(classes())


def stored(folder) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """The same model with other weights: trained a little."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


@pytest.fixture
def folder(tmp_path):
    """Emptied afterwards: all classes take 100 GB."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("name", names())
def test_every_tensor_is_merged_and_the_model_loads(folder, name):
    from sweep import build, classes

    known = classes()
    if name not in known:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model = build(*known[name])
    if model is None:
        pytest.skip("cannot be built small")
    try:
        model.save_pretrained(folder / "a")
        expected = type(model).from_pretrained(folder / "a", output_loading_info=True)[1]
    except Exception as error:
        pytest.skip(f"transformers cannot save and load it: {type(error).__name__}")
    moved(model).save_pretrained(folder / "b")
    models = [stored(folder / part) for part in "ab"]
    listed = [{"model": str(folder / part)} for part in "ab"]
    report = merge({"merge_method": "linear", "models": listed}, folder / "out")

    found = load_merged(folder / "out")
    assert report["left_out"] == {}
    assert found.keys() == models[0].keys()
    for tensor, value in found.items():
        one, other = models[0][tensor], models[1][tensor]
        assert value.dtype == one.dtype, tensor
        if torch.equal(one, other):
            assert torch.equal(value, one), tensor
        else:
            torch.testing.assert_close(value.float(), (one.float() + other.float()) / 2, rtol=1e-2, atol=1e-3)
    _, info = type(model).from_pretrained(folder / "out", output_loading_info=True)
    assert info["missing_keys"] == expected["missing_keys"]
    assert info["mismatched_keys"] == expected["mismatched_keys"]
