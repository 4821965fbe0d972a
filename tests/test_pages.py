"""Which pages of mapped files are asked for, and which go."""

from __future__ import annotations

import mmap
import os
import sys
import time

import numpy as np
import pytest
import torch
from checkpoints import ModelSet, make_set, resident_kib
from models import random_experts
from safetensors.torch import save_file

from ota_kernels import densities, merge, readahead
from ota_kernels.dtypes import BY_NAME
from ota_kernels.io.pages import advise
from ota_kernels.io.reader import MappedFile
from ota_kernels.readahead import ReadAhead
from ota_kernels.sampling import are_cached
from ota_kernels.tensors import TensorInputs, Uniform

PAGES = 64

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="madvise, /proc")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(PAGES * mmap.PAGESIZE // 4)}, path)
    return path


@linux_only
def test_pages_that_are_not_needed_leave_memory_and_come_back(path):
    with MappedFile(path) as mapped:
        data = mapped.buffer("w").data
        total = int(data.sum(dtype=np.int64))
        assert resident_kib(path) >= PAGES * mmap.PAGESIZE // 1024
        advise(data, "dontneed")
        assert resident_kib(path) == 0
        advise(data[100:5000], "willneed")
        assert int(data.sum(dtype=np.int64)) == total


def test_ordinary_memory_is_left_alone():
    array = np.ones(PAGES * mmap.PAGESIZE, np.uint8)
    advise(array, "dontneed")
    assert array.all()


def test_an_empty_array_is_accepted(path):
    with MappedFile(path) as mapped:
        advise(mapped.buffer("w").data[:0], "dontneed")


def test_does_nothing_where_the_system_has_no_madvise(path, monkeypatch):
    monkeypatch.setattr("ota_kernels.io.pages._madvise", lambda: None)
    with MappedFile(path) as mapped:
        advise(mapped.buffer("w").data, "willneed")


@pytest.fixture
def tensor(path):
    """One expert in a mapped file, without a base."""
    with MappedFile(path) as mapped:
        weights = mapped.buffer("w")
        yield TensorInputs("w", (len(weights),), BY_NAME["float32"], None, (weights,), (Uniform(),))


def test_what_was_just_written_is_cached(tensor, monkeypatch):
    assert are_cached(tensor.buffers)

    def would_wait(*arguments):
        raise BlockingIOError

    monkeypatch.setattr(os, "preadv", would_wait)
    assert not are_cached(tensor.buffers)


def test_memory_that_is_no_file_counts_as_cached():
    assert are_cached(random_experts(1, (8, 8)).inputs("bfloat16").buffers)


@linux_only
def test_what_is_asked_for_ahead_is_read(tensor, path):
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if are_cached(tensor.buffers):
        pytest.skip("this file system keeps its pages")
    ahead = ReadAhead([tensor])
    ahead(tensor, 0, tensor.numel // 2)
    until = time.monotonic() + 30
    while not are_cached(tensor.slice(0, tensor.numel // 2).buffers) and time.monotonic() < until:
        time.sleep(0.01)
    assert are_cached(tensor.slice(0, tensor.numel // 2).buffers)
    assert resident_kib(path) == 0  # read, not mapped


@pytest.fixture
def asked(monkeypatch):
    """Bytes that were asked for ahead, call by call."""
    calls = []

    def count(array, advice):
        if advice == "willneed":
            calls.append(array.nbytes)
        advise(array, advice)

    monkeypatch.setattr(readahead, "advise", count)
    return calls


def bytes_of(models: ModelSet) -> int:
    files = [models.base, *models.experts, *models.curvatures]
    return sum(tensor.nbytes for file in files for tensor in file.values() if tensor.is_floating_point())


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    ("parameters", "passes"), [({}, 1), ({"density": 0.3}, 1), ({"normalise": "model"}, 2)]
)
def test_a_merge_asks_for_every_byte_ahead_unless_it_is_cached(
    asked, monkeypatch, tmp_path, cached, parameters, passes
):
    models = make_set(tmp_path)
    monkeypatch.setattr(readahead, "are_cached", lambda buffers: cached)
    merge(models.recipe(**parameters), tmp_path / "out")
    assert sum(asked) == (0 if cached else passes * bytes_of(models))


def test_densities_ask_for_every_byte_ahead(asked, monkeypatch, tmp_path):
    models = make_set(tmp_path)
    monkeypatch.setattr(readahead, "are_cached", lambda buffers: False)
    densities(models.recipe())
    assert sum(asked) == bytes_of(models)
