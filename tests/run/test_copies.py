"""Tensors that are taken as they are go from file to file; where the system cannot, the same bytes arrive."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from checkpoints import load_merged, random_tensors, save_model

from ota_kernels import merge

SHAPES = {"embed_tokens.weight": (90, 64), "norm.weight": (64,), "scale": ()}
SHAPES |= {f"layers.{i}.mlp.weight": (100, 64) for i in range(3)}


@pytest.fixture
def stack(tmp_path):
    """Layers 0 and 1, and 1 and 2 again, of one model."""
    tensors = random_tensors(SHAPES, 0, torch.bfloat16)
    save_model(tmp_path / "m", tensors, config={"num_hidden_layers": 3})
    source = {"model": str(tmp_path / "m")}
    slices = [{"sources": [source | {"layer_range": r}]} for r in ([0, 2], [1, 3])]
    return tensors, {"merge_method": "passthrough", "slices": slices}


def copies_of(tensors):
    found = {name: t for name, t in tensors.items() if "layers" not in name}
    return found | {
        f"layers.{i}.mlp.weight": tensors[f"layers.{n}.mlp.weight"] for i, n in enumerate((0, 1, 1, 2))
    }


class Copying:
    """os.copy_file_range, counted, or in the way of systems that lack a part of it."""

    def __init__(self, way: str) -> None:
        self._way, self._own, self.copied = way, os.copy_file_range, 0

    def __call__(self, source, target, count, begin, offset):
        if self._way in ("EXDEV", "EIO"):
            raise OSError(getattr(errno, self._way), "no")
        if self._way == "stops" and self.copied:
            return 0
        done = self._own(source, target, min(count, 1000) if self._way != "whole" else count, begin, offset)
        self.copied += done
        return done


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="Linux copies from file to file")
@pytest.mark.parametrize("way", ["whole", "in parts", "stops", "EXDEV", "EIO", "none"])
def test_a_stack_is_copied(stack, tmp_path, monkeypatch, way):
    tensors, recipe = stack
    before = merge(recipe, tmp_path / "before", backend="reference")
    copying = Copying(way)
    if way == "none":
        monkeypatch.delattr(os, "copy_file_range")
    else:
        monkeypatch.setattr(os, "copy_file_range", copying)
    report = merge(recipe, tmp_path / "out", backend="reference")
    out, expected = load_merged(tmp_path / "out"), copies_of(tensors)
    assert out.keys() == expected.keys()
    assert all(torch.equal(out[name], tensor) for name, tensor in expected.items())
    sizes = sum(t.nbytes for t in expected.values())
    assert copying.copied == {"whole": sizes, "in parts": sizes, "stops": 1000}.get(way, 0)
    assert report["checksums"] == before["checksums"]
    assert report["checksums"]["tensors"].keys() == expected.keys()
    assert set(report["not_merged"].values()) == {"copy"}
