"""A model is the same one however its place is spelled; float32 tensors of 16-bit models stay float32."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from checkpoints import load_merged, random_tensors, save_model

from ota_kernels import RecipeError, merge, plan

SHAPES = {"w": (6, 5), "v": (4,)}


@pytest.fixture
def models(tmp_path):
    """base, a and b; the tensors by name."""
    tensors = {name: random_tensors(SHAPES, seed) for seed, name in enumerate(("base", "a", "b"))}
    for name, own in tensors.items():
        save_model(tmp_path / name, own)
    return tensors


def ota(base, *listed):
    return {
        "merge_method": "ota",
        "base_model": str(base),
        "models": [{"model": str(model)} for model in listed],
        "parameters": {"missing_curvature": "uniform"},
    }


def spelled(root: Path, name: str, way: str, monkeypatch) -> str:
    """The place of a model in other words."""
    folder = root / name
    if way == "home":
        monkeypatch.setenv("HOME", str(root))
        return f"~/{name}"
    if way == "relative":
        monkeypatch.chdir(root)
        return f"./{name}/../{name}/"
    if way == "link":
        (root / "link").symlink_to(folder)
        return str(root / "link")
    if way == "file":
        return str(folder / "model.safetensors")
    if way == "snapshot":
        snapshot = root / "hub" / "models--org--x" / "snapshots" / "0123"
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").symlink_to(folder / "model.safetensors")
        return str(snapshot)
    other = root / "hard"
    other.mkdir()
    os.link(folder / "model.safetensors", other / "model.safetensors")
    return str(other)


WAYS = ("home", "relative", "link", "file", "snapshot", "hard link")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("turned", [False, True], ids=["listed so", "the base so"])
def test_a_base_among_the_models_is_no_expert(models, tmp_path, monkeypatch, way, turned):
    other = spelled(tmp_path, "base", way, monkeypatch)
    base, listed = (other, tmp_path / "base") if turned else (tmp_path / "base", other)
    report = merge(ota(base, listed, tmp_path / "a"), tmp_path / "out")
    for name, tensor in load_merged(tmp_path / "out").items():
        torch.testing.assert_close(tensor, models["a"][name], rtol=1e-6, atol=1e-7)
    assert [expert["model"] for expert in report["experts"]] == [str(tmp_path / "a")]


@pytest.mark.parametrize("way", WAYS)
def test_only_the_base_is_refused(models, tmp_path, monkeypatch, way):
    other = spelled(tmp_path, "base", way, monkeypatch)
    with pytest.raises(RecipeError, match="lists only the base model"):
        plan(ota(tmp_path / "base", other))


def test_a_copy_is_a_model_of_its_own(models, tmp_path):
    save_model(tmp_path / "copy", models["base"])
    report = merge(ota(tmp_path / "base", tmp_path / "copy", tmp_path / "a"), tmp_path / "out")
    assert len(report["experts"]) == 2


def test_where_the_base_is_an_ordinary_input_it_stays(models, tmp_path):
    recipe = ota(tmp_path / "base", tmp_path / "base", tmp_path / "a")
    recipe |= {"merge_method": "linear", "parameters": {}}
    merge(recipe, tmp_path / "out")
    found = load_merged(tmp_path / "out")["w"]
    torch.testing.assert_close(found, (models["base"]["w"] + models["a"]["w"]) / 2)


def test_a_model_listed_twice_is_said(models, tmp_path, monkeypatch):
    other = spelled(tmp_path, "a", "link", monkeypatch)
    found = plan(ota(tmp_path / "base", tmp_path / "a", other, tmp_path / "b"))
    assert found.experts == 3
    assert f"{other} is {tmp_path / 'a'} again: it counts twice" in found.notes


def mixed(seed, bias=torch.float32, main=torch.bfloat16):
    """A 16-bit matrix and a routing bias near 7, as mixtures of experts have it."""
    tensors = random_tensors({"gate.weight": (64, 8)}, seed, main)
    return tensors | {"gate.bias": (6.8 + random_tensors({"x": (64,)}, seed + 9)["x"]).to(bias)}


class TestPrecision:
    def merged(self, root, models, **types):
        for t, tensors in enumerate(models):
            save_model(root / str(t), tensors)
        listed = [{"model": str(root / str(t))} for t in range(len(models))]
        report = merge({"merge_method": "linear", "models": listed, **types}, root / "out")
        return load_merged(root / "out"), report["notes"]

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_what_every_model_keeps_in_float32_stays_so_and_is_said(self, tmp_path, dtype):
        models = [mixed(1), mixed(2)]
        found, notes = self.merged(tmp_path, models, dtype=dtype)
        assert torch.equal(found["gate.bias"], (models[0]["gate.bias"] + models[1]["gate.bias"]) / 2)
        assert found["gate.weight"].dtype == getattr(torch, dtype)
        assert any("kept in float32" in note and "gate.bias" in note for note in notes)

    def test_out_dtype_rounds_and_says_so(self, tmp_path):
        found, notes = self.merged(tmp_path, [mixed(1), mixed(2)], out_dtype="bfloat16")
        assert {t.dtype for t in found.values()} == {torch.bfloat16}
        assert any("rounded to bfloat16" in note and "gate.bias" in note for note in notes)

    def test_without_dtype_nothing_is_to_be_said(self, tmp_path):
        found, notes = self.merged(tmp_path, [mixed(1), mixed(2)])
        assert found["gate.bias"].dtype == torch.float32
        assert notes == []

    def test_a_float32_model_is_rounded_as_asked(self, tmp_path):
        models = [mixed(1, main=torch.float32), mixed(2, main=torch.float32)]
        found, notes = self.merged(tmp_path, models, dtype="bfloat16")
        assert {t.dtype for t in found.values()} == {torch.bfloat16}
        assert notes == []

    def test_what_one_model_has_in_16_bits_is_written_so(self, tmp_path):
        found, _ = self.merged(tmp_path, [mixed(1), mixed(2, bias=torch.bfloat16)], dtype="bfloat16")
        assert found["gate.bias"].dtype == torch.bfloat16

    def test_a_float32_base_of_16_bit_experts(self, tmp_path):
        found, _ = self.merged(tmp_path, [mixed(1, main=torch.float32), mixed(2)], dtype="bfloat16")
        assert found["gate.bias"].dtype == torch.float32
        assert found["gate.weight"].dtype == torch.bfloat16
