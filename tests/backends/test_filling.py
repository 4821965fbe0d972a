"""Bytes of mapped files on their way to pinned memory: by both ways the same, and the faster one stays."""

from __future__ import annotations

import logging
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ota_kernels import InputError
from ota_kernels.backends.triton.filling import Filling
from ota_kernels.io.pages import read_into
from ota_kernels.io.reader import MappedFile
from ota_kernels.tensors.buffer import Buffer

ELEMENTS = 300_000


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.arange(ELEMENTS, dtype=torch.float32)}, path)
    return path


@pytest.fixture
def mapped(path):
    with MappedFile(path) as file:
        yield file.buffer("w")


def test_a_part_is_read_from_its_place(mapped: Buffer):
    piece = mapped.data[1001:900_001]
    target = np.zeros(piece.size, np.uint8)
    assert read_into(target, piece)
    assert target.tobytes() == piece.tobytes()


def test_memory_that_is_no_file_is_not_read():
    assert not read_into(np.zeros(4, np.uint8), np.ones(9, np.uint8)[2:6])


def test_a_file_that_replaced_the_mapped_one_is_not_read(mapped: Buffer, path):
    """The map goes on to show what it was made of."""
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    os.replace(other, path)
    assert not read_into(np.zeros(8, np.uint8), mapped.data[:8])


def test_a_shortened_file_is_told(mapped: Buffer, path):
    os.truncate(path, 1000)
    with pytest.raises(InputError, match=r"model.safetensors: changed while in use"):
        read_into(np.zeros(mapped.data.size, np.uint8), mapped.data)


@pytest.mark.parametrize("read_is_faster", [False, True])
def test_both_ways_are_tried_and_the_faster_one_stays(mapped: Buffer, caplog, monkeypatch, read_is_faster):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    filling, piece = Filling(), mapped.data
    ways = []
    with caplog.at_level(logging.INFO, "ota_kernels"):
        for _ in range(40):
            target = np.zeros(piece.size, np.uint8)
            tile = filling.tile()
            tile.fill(target, piece)
            ways.append(tile.reads)
            clock[0] += 1.0 if tile.reads == read_is_faster else 2.0
            tile.done()
            assert target.tobytes() == piece.tobytes()
    assert ways[:4] == [False, True, False, True]
    assert set(ways[20:]) == {read_is_faster}
    assert caplog.messages[-1].endswith("reads" if read_is_faster else "copies")


def test_memory_decides_nothing():
    """Only bytes of files can be read."""
    filling = Filling()
    for _ in range(40):
        tile = filling.tile()
        tile.fill(np.zeros(9, np.uint8), np.ones(9, np.uint8))
        tile.done()
    assert filling.reads is None
