"""`ota-merge moments show`: the numbers are those of numpy, and they are printed."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from checkpoints import save_sharded
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ota_kernels import InputError
from ota_kernels.moments import overview, show


def lower_median(values):
    return sorted(values.flatten().tolist())[(values.numel() - 1) // 2]


@pytest.fixture(params=[8, 1 << 22], ids=["many pieces", "one piece"])
def pieces(request, monkeypatch):
    monkeypatch.setattr(overview, "PIECE_ELEMENTS", request.param)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_numbers(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(13, 7, generator=generator) ** 2).to(dtype)
    values[3, :5] = 0
    values[4, 0] = -0.0
    save_file(
        {"w": values}, tmp_path / "v.safetensors", metadata={"step": "9", "beta2": "0.99", "format": "pt"}
    )
    found = show(tmp_path / "v.safetensors")
    assert (found.step, found.beta2, found.source_format) == (9, 0.99, None)
    (tensor,) = found.tensors
    assert dataclasses.asdict(tensor) == {
        "name": "w",
        "shape": (13, 7),
        "form": str(dtype).removeprefix("torch."),
        "minimum": 0.0,
        "median": lower_median(values),
        "maximum": values.max().item(),
        "zeros": 6,
        "nbytes": values.nbytes,
    }


@given(st.lists(st.floats(0, width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_the_median_of_anything(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("v") / "v.safetensors"
    tensor = torch.tensor(values, dtype=torch.float32)
    save_file({"w": tensor}, path)
    (found,) = show(path).tensors
    assert found.median == lower_median(tensor)
    assert (found.minimum, found.maximum) == (tensor.min().item(), tensor.max().item())


def test_scalars_and_empty_tensors(tmp_path):
    save_file({"s": torch.tensor(0.5), "e": torch.zeros(0, 3)}, tmp_path / "v.safetensors")
    by_name = {tensor.name: tensor for tensor in show(tmp_path / "v.safetensors").tensors}
    assert (by_name["s"].shape, by_name["s"].median) == ((), 0.5)
    assert (by_name["e"].minimum, by_name["e"].median, by_name["e"].maximum) == (None, None, None)


def test_shards_that_differ_in_step(tmp_path):
    save_sharded(
        tmp_path, {"a": torch.ones(3), "b": torch.ones(3)}, 2, metadata={"step": "4", "beta2": "0.9"}
    )
    assert (show(tmp_path).step, len(show(tmp_path).tensors)) == (4, 2)
    (shard, _) = sorted(tmp_path.glob("*.safetensors"))
    save_file({"a": torch.ones(3)}, shard, metadata={"step": "5", "beta2": "0.9"})
    assert (show(tmp_path).step, show(tmp_path).beta2) == (None, 0.9)


def test_what_is_no_file_of_second_moments(tmp_path):
    save_file({"w": torch.tensor([1.0, -1.0, np.nan])}, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match=r"weights.*'w': 2 of 3 .* element 1 "):
        show(tmp_path / "weights.safetensors")
    save_file({"w": torch.ones(3, dtype=torch.int32)}, tmp_path / "integers.safetensors")
    with pytest.raises(InputError, match=r"integers.*'w' is int32"):
        show(tmp_path / "integers.safetensors")


def test_the_table(ota_merge, tmp_path):
    tensors = {"a[red].weight": torch.tensor([[0.0, 0.25, 0.5], [1.5, 2.5, 1e-12]]), "e": torch.zeros(0)}
    save_file(tensors, tmp_path / "v.safetensors", metadata={"step": "20", "beta2": "0.999"})
    code, printed, errors = ota_merge("moments", "show", tmp_path / "v.safetensors")
    assert (code, errors) == (0, "")
    first, header, *rows = printed.splitlines()
    assert first == f"{tmp_path / 'v.safetensors'}: 2 tensors, 24 B, step 20, beta2 0.999"
    assert header.split() == ["tensor", "shape", "form", "min", "median", "max", "zeros", "size"]
    cells = {row.split()[0]: row.split()[1:] for row in rows}
    assert cells["a[red].weight"] == ["2", "x", "3", "float32", "0", "0.25", "2.5", "1", "24", "B"]
    assert cells["e"] == ["0", "float32", "-", "-", "-", "0", "0", "B"]


def test_json(ota_merge, tmp_path):
    save_file({"w": torch.tensor([0.0, 2.0])}, tmp_path / "v.safetensors", metadata={"source_format": "dcp"})
    code, printed, _ = ota_merge("moments", "show", tmp_path / "v.safetensors", "--json")
    assert code == 0
    assert json.loads(printed) == json.loads(json.dumps(show(tmp_path / "v.safetensors").as_dict()))
    assert json.loads(printed)["source_format"] == "dcp"


def test_a_missing_file(ota_merge, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name, fact in (
        ("none.safetensors", "not a hub file"),
        ("folder/none.safetensors", "its folder has none"),
    ):
        code, printed, errors = ota_merge("moments", "show", name)
        assert (code, printed) == (2, "")
        assert errors.startswith(f"error: '{name}' is not a local file")
        assert fact in errors
        assert errors.count("\n") == 1


def test_a_file_without_tensors(ota_merge, tmp_path):
    save_file({}, tmp_path / "v.safetensors")
    code, _, errors = ota_merge("moments", "show", tmp_path / "v.safetensors")
    assert (code, errors.endswith("v.safetensors: holds no second moments\n")) == (2, True)


def test_a_step_without_beta2(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "v.safetensors", metadata={"step": "5"})
    assert (show(tmp_path / "v.safetensors").step, show(tmp_path / "v.safetensors").beta2) == (5, None)


def test_a_model_is_no_file_of_second_moments(ota_merge, tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    code, _, errors = ota_merge("moments", "show", tmp_path)
    assert (code, errors.count("\n")) == (2, 1)
    assert f"{tmp_path}: is a model" in errors
