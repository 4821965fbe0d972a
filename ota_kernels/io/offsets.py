"""Whole arrays at an offset of a file, from any thread: the system may take or give less than asked for."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

# Bytes of one write: whole tiles of some megabytes take the page cache up to twice the processor time.
_WRITE = 1 << 18


def write_at(fd: int, offset: int, data: bytes | np.ndarray) -> None:
    """Write all bytes of `data` (contiguous uint8). Raises OSError."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view[:_WRITE], offset)
        view, offset = view[written:], offset + written


def copy_at(source: str, begin: int, fd: int, offset: int, count: int) -> bool:
    """Copy `count` bytes from `begin` of a file without taking them out of the system, by shared blocks where
    the file system has them. False where that cannot be done; then some of them may be copied."""
    if not hasattr(os, "copy_file_range"):
        return False
    try:
        own = os.open(source, os.O_RDONLY)
        try:
            while count:
                copied = os.copy_file_range(own, fd, count, begin, offset)
                if copied == 0:
                    return False
                begin, offset, count = begin + copied, offset + copied, count - copied
        finally:
            os.close(own)
    except OSError:  # another file system, an old one, no room: what is wrong, a write says
        return False
    return True


def read_at(fd: int, offset: int, data: np.ndarray) -> bool:
    """Fill `data` (contiguous uint8); False where the file ends before. Raises OSError."""
    view = memoryview(data)
    while view:
        count = os.preadv(fd, [view], offset)
        if count == 0:
            return False
        view, offset = view[count:], offset + count
    return True


def of_rank(path: Path, rank: int) -> Path:
    """The file of that rank: rank 0's has no number ("journal.jsonl", "journal.1.jsonl")."""
    return path.with_name(f"{path.stem}.{rank}{path.suffix}") if rank else path
