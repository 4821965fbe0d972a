"""Which pages of mapped files are asked for, and which go."""

from __future__ import annotations

import errno
import mmap
import os
import sys
import tempfile
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from checkpoints import cached_pages, drop_pages, make_set, resident_kib, within_seconds
from models import random_experts
from safetensors.torch import save_file

from ota_kernels import densities, merge
from ota_kernels.backends import native
from ota_kernels.io.pages import advise
from ota_kernels.io.reader import MappedFile
from ota_kernels.run import readahead
from ota_kernels.run.readahead import ReadAhead
from ota_kernels.select.sample import are_cached
from ota_kernels.tensors.buffer import Buffer
from ota_kernels.tensors.curvature import Uniform
from ota_kernels.tensors.dtypes import BY_NAME
from ota_kernels.tensors.tile import TensorInputs

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
    monkeypatch.setattr(native, "is_in_memory", lambda fd: False)

    def would_wait(*arguments):
        raise BlockingIOError

    monkeypatch.setattr(os, "preadv", would_wait)
    assert not are_cached(tensor.buffers)


def test_memory_that_is_no_file_counts_as_cached():
    assert are_cached(random_experts(1, (8, 8)).inputs("bfloat16").buffers)


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="/dev/shm")
def test_files_without_a_disk_are_cached(monkeypatch):
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        if not native.is_in_memory(file.fileno()):
            pytest.skip("/dev/shm lies on a disk")
        file.write(bytes(1 << 16))
        file.flush()
        buffer = Buffer(np.zeros(1 << 16, np.uint8), BY_NAME["float32"], file.name, 0)

        def cannot_tell(*arguments):
            raise OSError(errno.EOPNOTSUPP, "tmpfs")

        monkeypatch.setattr(os, "preadv", cannot_tell)
        assert are_cached([buffer])
        monkeypatch.setattr(native, "is_in_memory", lambda fd: False)
        assert not are_cached([buffer])


@linux_only
def test_what_is_asked_for_ahead_is_read(tensor, path, monkeypatch):
    drop_pages(path)
    monkeypatch.setattr(readahead, "are_cached", lambda buffers: False)
    half = PAGES // 2
    ReadAhead([tensor])(tensor.slice(0, tensor.numel // 2).buffers)
    assert within_seconds(lambda: cached_pages(path) >= half)
    assert cached_pages(path) < PAGES  # a window more than half of them, at most
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


def bytes_of(tensors: Sequence[dict[str, torch.Tensor]]) -> int:
    return sum(x.nbytes for file in tensors for x in file.values() if x.is_floating_point())


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("variant", ["plain", "density", "normalise model", "rank1"])
def test_a_merge_asks_for_what_it_reads_unless_it_is_cached(asked, monkeypatch, tmp_path, cached, variant):
    parameters = {
        "plain": {},
        "density": {"density": 0.3},
        "normalise model": {"normalise": "model"},
        "rank1": {"rank1_approx": True},
    }[variant]
    models = make_set(tmp_path)
    monkeypatch.setattr(readahead, "are_cached", lambda buffers: cached)
    merge(models.recipe(**parameters), tmp_path / "out", tile_elements=16)
    expected = bytes_of([models.base, *models.experts, *models.curvatures])
    if variant == "normalise model":  # the means are of curvature alone
        expected += bytes_of(models.curvatures)
    if variant == "rank1":  # matrices of several tiles have been read for their sums
        expected -= bytes_of([{n: x for n, x in v.items() if x.ndim == 2} for v in models.curvatures])
    assert sum(asked) == (0 if cached else expected)


def test_densities_ask_for_every_byte_ahead(asked, monkeypatch, tmp_path):
    models = make_set(tmp_path)
    monkeypatch.setattr(readahead, "are_cached", lambda buffers: False)
    densities(models.recipe())
    assert sum(asked) == bytes_of([models.base, *models.experts, *models.curvatures])
