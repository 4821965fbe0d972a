"""Holds undecided elements until their thresholds are known: in memory up to a budget, the rest in a file."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .backends.stats import Candidates
from .errors import RunError
from .tensors import TensorInputs

DEFAULT_BUDGET = 256 << 20


@dataclass(frozen=True)
class Held:
    """The candidates of one tile: in memory, or `count` of them at `offset` of the store's file."""

    count: int
    memory: Candidates | None = None
    offset: int = -1


class Store:
    """Candidates of many tiles. budget: bytes held in memory at most; path: the file for the rest (None: an
    unnamed temporary file). `get` and `sync` from any thread, the rest from one."""

    def __init__(self, budget: int, path: Path | None = None) -> None:
        self._budget, self._path = budget, path
        self._fd = -1
        self._end = 0

    def put(self, candidates: Candidates) -> Held:
        """Keep candidates: in memory where the budget allows it."""
        size = nbytes(candidates)
        if size > self._budget:
            return self._write(candidates)
        self._budget -= size
        return Held(len(candidates.positions), candidates)

    def spill(self, held: Held) -> Held:
        """Move candidates from memory to the file. Raises RunError where it cannot be written."""
        self.drop(held)
        return self._write(held.memory)

    def _write(self, candidates: Candidates) -> Held:
        try:
            self._open()
            offset = self._end
            for array in _arrays(candidates):
                view = memoryview(array)
                while view:
                    written = os.pwrite(self._fd, view, self._end)
                    view, self._end = view[written:], self._end + written
        except OSError as error:
            raise RunError(
                f"cannot write {self._path or 'candidates'}: {error.strerror}; free some room and --resume"
            ) from error
        return Held(len(candidates.positions), offset=offset)

    def restore(self, held: Held, tensor: TensorInputs) -> Held:
        """Candidates of `tensor` that an earlier process put into the file."""
        self._open()
        self._end = max(self._end, held.offset + held.count * _bytes_each(tensor))
        return held

    def get(self, held: Held, tensor: TensorInputs) -> Candidates:
        """The candidates; tensor: the one (or the tile) they are elements of."""
        if held.memory is not None:
            return held.memory
        data = np.empty(held.count * _bytes_each(tensor), np.uint8)
        view, position = memoryview(data), held.offset
        while view:
            read = os.preadv(self._fd, [view], position)
            if read == 0:
                raise RunError(
                    f"{self._path or 'the file of candidates'} was cut: start again with --overwrite"
                )
            view, position = view[read:], position + read
        return _from_bytes(data, held.count, tensor)

    def drop(self, held: Held) -> None:
        """The candidates will not be asked for again."""
        if held.memory is not None:
            self._budget += nbytes(held.memory)

    def sync(self) -> None:
        """Wait until the file is on the disk."""
        if self._fd >= 0:
            os.fdatasync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        if self._fd >= 0:
            return
        if self._path is None:
            with tempfile.TemporaryFile() as file:
                self._fd = os.dup(file.fileno())
        else:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)


def nbytes(candidates: Candidates) -> int:
    return len(candidates.positions) * _bytes_each(candidates.operands)


def _bytes_each(tensor: TensorInputs) -> int:
    return sum(Candidates.columns(tensor))


def _arrays(candidates: Candidates) -> list[np.ndarray]:
    positions = candidates.positions.view(np.uint8)
    return [a for a in (positions, *(b.data for b in candidates.operands.buffers)) if a.size]


def _from_bytes(data: np.ndarray, count: int, tensor: TensorInputs) -> Candidates:
    ends = np.cumsum([count * size for size in Candidates.columns(tensor)])
    return Candidates.of(tensor, np.split(data, ends[:-1]))
