"""Holds undecided elements until their thresholds are known: in memory up to a budget, the rest in a file.
Those on a device stay there: what holds the tensors has room for a few of their elements."""

from __future__ import annotations

import itertools
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import RunError
from ..io.offsets import read_at, write_at
from ..tensors.array import Array
from ..tensors.result import STEP_BYTES, Alternatives, Candidates
from ..tensors.tile import TensorInputs

DEFAULT_BUDGET = 256 << 20
_LISTS = len(Alternatives._fields)  # of each expert


@dataclass(frozen=True)
class Held:
    """The candidates of one tile: in memory, or at `offset` of the store's file. count: how many have their
    operands there; steps: how many scores each expert's bracket holds of them; alternatives: how many of
    each expert."""

    count: int
    steps: tuple[int, ...]
    alternatives: tuple[int, ...] = ()
    memory: Candidates | None = None
    offset: int = -1

    @classmethod
    def of(cls, candidates: Candidates, offset: int = -1) -> Held:
        """In memory, unless an offset is given."""
        steps = tuple(map(len, candidates.steps))
        alternatives = tuple(len(a.positions) for a in candidates.alternatives)
        memory = None if offset >= 0 else candidates
        return cls(len(candidates.positions), steps, alternatives, memory, offset)

    def listed(self, t: int) -> int:
        """How many scores expert t's bracket holds."""
        return self.steps[t] + (self.alternatives[t] if self.alternatives else 0)

    @property
    def is_resident(self) -> bool:
        """Whether they are on a device."""
        return self.memory is not None and self.memory.operands.is_resident

    def nbytes(self, tensor: TensorInputs) -> int:
        """Bytes that they take; tensor: the one (or the tile) they are elements of."""
        return sum(self.sizes(tensor))

    def owned(self) -> Held:
        """The same in one piece of memory of their own."""
        data = np.concatenate([np.empty(0, np.uint8), *_arrays(self.memory)])
        return replace(self, memory=self.unpacked(data, self.memory.operands))

    def unpacked(self, data: np.ndarray, tensor: TensorInputs) -> Candidates:
        """Candidates from their arrays one after the other; tensor: as for `nbytes`."""
        bounds = itertools.pairwise(itertools.accumulate(self.sizes(tensor), initial=0))
        parts = iter([data[begin:end] for begin, end in bounds])
        columns = [next(parts) for _ in Candidates.columns(tensor)]
        steps = [next(parts) for _ in self.steps]
        alternatives = map(Alternatives.of, zip(*[parts] * _LISTS, strict=True))
        return Candidates.of(tensor, columns, steps, alternatives)

    def sizes(self, tensor: TensorInputs) -> list[int]:
        """Bytes of each array, in the order of `_arrays`."""
        sizes = [self.count * size for size in Candidates.columns(tensor)]
        sizes += [STEP_BYTES * n for n in self.steps]
        return sizes + [n * size for n in self.alternatives for size in Alternatives.columns(tensor)]


class Store:
    """Candidates of many tiles. budget: bytes held in memory at most; path: the file for the rest (None: an
    unnamed temporary file). `get` and `sync` from any thread, the rest from one."""

    def __init__(self, budget: int, path: Path | None = None) -> None:
        self._budget, self._path = budget, path
        self._fd = -1
        self._end = 0

    def put(self, candidates: Candidates) -> Held:
        """Keep candidates: in memory where the budget allows it."""
        held = Held.of(candidates)
        if held.is_resident:
            return held
        size = held.nbytes(candidates.operands)
        if size > self._budget:
            return self._write(candidates)
        self._budget -= size
        return held

    def spill(self, held: Held) -> Held:
        """Move candidates from the host's memory to the file. Raises RunError where it cannot be written."""
        self.drop(held)
        return self._write(held.memory)

    def _write(self, candidates: Candidates) -> Held:
        try:
            self._open()
            offset = self._end
            for array in _arrays(candidates):
                write_at(self._fd, self._end, array)
                self._end += array.size
        except OSError as error:
            raise RunError(
                f"cannot write {self._name}: {error.strerror}; free some room and --resume"
            ) from error
        return Held.of(candidates, offset)

    def restore(self, held: Held, tensor: TensorInputs) -> Held:
        """Candidates of `tensor` that an earlier process put into the file."""
        self._open()
        self._end = max(self._end, held.offset + held.nbytes(tensor))
        return held

    def get(self, held: Held, tensor: TensorInputs) -> Candidates:
        """The candidates; tensor: the one (or the tile) they are elements of. Raises RunError where the file
        cannot be read."""
        if held.memory is not None:
            return held.memory
        return held.unpacked(self._read(held.offset, held.nbytes(tensor)), tensor)

    def steps(self, held: Held, tensor: TensorInputs, t: int) -> list[Array]:
        """The steps of expert t, integers of 32 bits; without reading the candidates."""
        if held.memory is not None:
            return [held.memory.steps[t], *(a.steps for a in held.memory.alternatives[t : t + 1])]
        sizes, of_steps = held.sizes(tensor), len(Candidates.columns(tensor))
        places = [of_steps + t]
        if held.alternatives:
            places.append(of_steps + len(held.steps) + _LISTS * t + Alternatives._fields.index("steps"))
        return [self._read(held.offset + sum(sizes[:i]), sizes[i]).view(np.uint32) for i in places]

    def _read(self, offset: int, size: int) -> np.ndarray:
        data = np.empty(size, np.uint8)
        try:
            whole = read_at(self._fd, offset, data)
        except OSError as error:
            raise RunError(f"cannot read {self._name}: {error.strerror}; --resume when it can") from error
        if not whole:
            raise RunError(f"{self._name} was cut: start again with --overwrite")
        return data

    def drop(self, held: Held) -> None:
        """The candidates will not be asked for again."""
        if held.memory is not None and not held.is_resident:
            self._budget += held.nbytes(held.memory.operands)

    @property
    def _name(self) -> str:
        return str(self._path or "the file of candidates")

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


def _arrays(candidates: Candidates) -> list[np.ndarray]:
    """Columns, the steps of each expert, then the alternatives of each."""
    arrays = [candidates.positions, *(b.data for b in candidates.operands.buffers), *candidates.steps]
    arrays += [column for a in candidates.alternatives for column in a]
    return [a.view(np.uint8) for a in arrays if a.size]
