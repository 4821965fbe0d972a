"""What brackets are made from: the same runs from memory and from files, and when they are spread."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import second_moments
from safetensors.torch import save_file

from ota_kernels import sampling
from ota_kernels.dtypes import BY_NAME
from ota_kernels.io.reader import Checkpoint
from ota_kernels.sampling import RUN, RUNS, are_cached, sample
from ota_kernels.tensors import Buffer, Full, TensorInputs

SHAPES = {"a": (300, 70), "b": (17,), "c": (5,), "d": (40, 50)}


@pytest.fixture
def tensors(tmp_path):
    """One expert without a base, in mapped files."""
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}
    save_file(weights, tmp_path / "weights.safetensors")
    save_file(second_moments(weights, 4), tmp_path / "moments.safetensors")
    files = [Checkpoint.open(tmp_path / f"{name}.safetensors", name) for name in ("weights", "moments")]
    experts, curvatures = ([file.buffer(name) for name in SHAPES] for file in files)
    yield [
        TensorInputs(name, shape, BY_NAME["bfloat16"], None, (w,), (Full(h),))
        for (name, shape), w, h in zip(SHAPES.items(), experts, curvatures, strict=True)
    ]
    for file in files:
        file.close()


def both_inputs(tile: TensorInputs) -> list[np.ndarray]:
    bits = tile.experts[0].data.view(np.uint16).astype(np.uint32) << 16
    return [bits.view(np.float32), tile.curvatures[0].values.data.view(np.float32)]


@pytest.mark.parametrize("near", [0, 1 << 40], ids=["far apart", "near"])
@pytest.mark.parametrize("spread", [True, False])
def test_files_and_memory_give_the_same_runs(tensors, monkeypatch, spread, near):
    monkeypatch.setattr(sampling, "_NEAR", near)
    mapped, released = sample(tensors, 40, both_inputs, map, None, spread), []
    read = sample(tensors, 40, both_inputs, map, released.append, spread)
    assert bool(released) == (spread and near > 0)  # pages were mapped
    assert [x.shape for x in mapped] == [(40 * RUNS, RUN) if spread else (40, RUNS * RUN)] * 2
    for one, other in zip(mapped, read, strict=True):
        assert np.array_equal(one, other)


def test_runs_are_neighbours_in_order_and_reach_every_tensor(tensors):
    numbered = [np.arange(t.numel, dtype=np.float32) + 1e5 * n for n, t in enumerate(tensors)]
    experts = [(Buffer(x.view(np.uint8), BY_NAME["float32"]),) for x in numbered]
    found = [replace(t, experts=e) for t, e in zip(tensors, experts, strict=True)]
    runs, _ = sample(found, 1000, lambda t: [t.experts[0].data.view(np.float32)] * 2, map)
    of_short = runs[:, 0] // 1e5 == 2
    assert np.all(np.diff(runs[~of_short], axis=1) == 1)
    assert np.all(np.isin(runs[of_short], numbered[2]))
    assert np.all(np.diff(runs[:, 0] // 1e5) >= 0)
    assert set(runs[:, 0] // 1e5) == {0, 1, 2, 3}


def test_what_was_just_written_is_cached(tensors, monkeypatch):
    buffers = [b for t in tensors for b in t.buffers]
    assert are_cached(buffers)

    def would_wait(*arguments):
        raise BlockingIOError

    monkeypatch.setattr(os, "preadv", would_wait)
    assert not are_cached(buffers)
