"""Whole arrays at an offset of a file, however little the system takes or gives at a time."""

from __future__ import annotations

import os

import numpy as np
import pytest

from ota_kernels.io.offsets import read_at, write_at


@pytest.mark.parametrize("most", [7, 1 << 30])
@pytest.mark.parametrize("size", [0, 1, 100, (1 << 18) + 5])
def test_what_was_written_is_read(tmp_path, monkeypatch, size, most):
    most = max(most, size // 50)
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:most], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:most]], offset))
    data = np.random.default_rng(size).integers(0, 256, size).astype(np.uint8)
    with (tmp_path / "file").open("wb+") as file:
        write_at(file.fileno(), 11, data)
        found = np.empty_like(data)
        assert read_at(file.fileno(), 11, found)
        assert np.array_equal(found, data)
        assert (tmp_path / "file").read_bytes() == (bytes(11) + data.tobytes() if size else b"")
        assert not read_at(file.fileno(), 12, np.empty(max(size, 1), np.uint8))
