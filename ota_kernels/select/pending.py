"""Undecided elements that wait until their thresholds are known: in memory up to a budget, the rest in a
file. Those on a device stay there: what holds the tensors has room for a few of their elements."""

from __future__ import annotations

import itertools
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import RunError
from ..io.offsets import of_rank, read_at, write_at
from ..tensors.array import Array
from ..tensors.result import STEP_BYTES, Alternatives, Candidates, Counts, MergeStats
from ..tensors.segment import Segment
from ..tensors.tile import TensorInputs

_LISTS = len(Alternatives._fields)  # of each expert


@dataclass(frozen=True)
class Pending:
    """One merged tile with what waits of it: in memory, or at `offset` of one of the store's files.

    counts: of what is decided; reached, censuses: per expert, as in MergeStats; several: how many elements
    have their operands there; steps: how many scores each expert's bracket holds of them; alternatives: how
    many of each expert; file: of which rank.
    """

    segment: Segment
    counts: Counts
    reached: tuple[int, ...]
    censuses: tuple[list[int] | None, ...]
    several: int
    steps: tuple[int, ...]
    alternatives: tuple[int, ...] = ()
    memory: Candidates | None = None
    offset: int = -1
    file: int = 0

    @classmethod
    def of(cls, segment: Segment, tensor: TensorInputs, stats: MergeStats, counts: Counts) -> Pending:
        """What `stats` says of a tile merged with brackets, in memory."""
        found = stats.candidates or Candidates.none(tensor)
        return cls(
            segment,
            counts,
            tuple(stats.reached),
            tuple(None if c is None else c.tolist() for c in stats.censuses),
            len(found.positions),
            tuple(map(len, found.steps)),
            tuple(len(a.positions) for a in found.alternatives),
            found,
        )

    @property
    def elements(self) -> int:
        """Of the tile."""
        return self.segment.stop - self.segment.start

    def listed(self, t: int) -> int:
        """How many scores expert t's bracket holds."""
        return self.steps[t] + (self.alternatives[t] if self.alternatives else 0)

    @property
    def is_resident(self) -> bool:
        """Whether the elements are on a device."""
        return self.memory is not None and self.memory.operands.is_resident

    def nbytes(self, tensor: TensorInputs) -> int:
        """Bytes that the elements take; tensor: the one (or the tile) they are elements of."""
        return sum(self.sizes(tensor))

    def owned(self) -> Pending:
        """The same in one piece of memory of its own: a backend's lists are views until its next tile."""
        if self.is_resident:
            return self
        data = np.concatenate([np.empty(0, np.uint8), *_arrays(self.memory)])
        return replace(self, memory=self.unpacked(data, self.memory.operands))

    def unpacked(self, data: np.ndarray, tensor: TensorInputs) -> Candidates:
        """The elements from their arrays one after the other; tensor: as for `nbytes`."""
        tensor = replace(tensor, start=self.segment.start, index=None)  # positions count from there
        bounds = itertools.pairwise(itertools.accumulate(self.sizes(tensor), initial=0))
        parts = iter([data[begin:end] for begin, end in bounds])
        columns = [next(parts) for _ in Candidates.columns(tensor)]
        steps = [next(parts) for _ in self.steps]
        alternatives = map(Alternatives.of, zip(*[parts] * _LISTS, strict=True))
        # Positions are those in the segment, whether `tensor` is gathered elements or the whole.
        tile = replace(tensor, start=self.segment.start, index=None)
        return Candidates.of(tile, columns, steps, alternatives)

    def sizes(self, tensor: TensorInputs) -> list[int]:
        """Bytes of each array, in the order of `_arrays`."""
        sizes = [self.several * size for size in Candidates.columns(tensor)]
        sizes += [STEP_BYTES * n for n in self.steps]
        return sizes + [n * size for n in self.alternatives for size in Alternatives.columns(tensor)]


class Store:
    """Pending elements of many tiles. budget: bytes held in memory at most; path: the file for the rest
    (None: an unnamed temporary file), of rank 0; rank: whose file is written. Elements stay in the file of
    the rank that found them, whoever settles them. `get` and `sync` from any thread, the rest from one."""

    def __init__(self, budget: int, path: Path | None = None, rank: int = 0) -> None:
        self._budget, self._path, self._rank = budget, path, rank
        self._fds: dict[int, int] = {}
        self._end = 0

    def put(self, pending: Pending) -> Pending:
        """Keep its elements: in memory where the budget allows it."""
        if pending.is_resident:
            return pending
        size = pending.nbytes(pending.memory.operands)
        if size > self._budget:
            return self._write(pending)
        self._budget -= size
        return pending

    def spill(self, pending: Pending) -> Pending:
        """Move elements from the host's memory to the file. Raises RunError where it cannot be written."""
        self.drop(pending)
        return self._write(pending)

    def _write(self, pending: Pending) -> Pending:
        try:
            fd = self._open(self._rank)
            offset = self._end
            for array in _arrays(pending.memory):
                write_at(fd, self._end, array)
                self._end += array.size
        except OSError as error:
            name = self._name(self._rank)
            raise RunError(f"cannot write {name}: {error.strerror}; free some room and --resume") from error
        return replace(pending, memory=None, offset=offset, file=self._rank)

    def restore(self, pending: Pending, tensor: TensorInputs) -> None:
        """Know of elements of `tensor` that an earlier process put into a file. Raises RunError where they
        are not there."""
        try:
            size = os.fstat(self._open(pending.file)).st_size
        except OSError as error:
            raise self._unreadable(pending.file, error) from error
        if size < pending.offset + pending.nbytes(tensor):
            raise self._cut(pending.file)

    def get(self, pending: Pending, tensor: TensorInputs) -> Candidates:
        """The elements; tensor: the one (or the tile) they are elements of. Raises RunError where the file
        cannot be read."""
        if pending.memory is not None:
            return pending.memory
        return pending.unpacked(self._read(pending, 0, pending.nbytes(tensor)), tensor)

    def steps(self, pending: Pending, tensor: TensorInputs, t: int) -> list[Array]:
        """The steps of expert t, integers of 32 bits; without reading the elements."""
        found = pending.memory
        if found is not None:
            return [found.steps[t], *(a.steps for a in found.alternatives[t : t + 1])]
        sizes, of_steps = pending.sizes(tensor), len(Candidates.columns(tensor))
        places = [of_steps + t]
        if pending.alternatives:
            places.append(of_steps + len(pending.steps) + _LISTS * t + Alternatives._fields.index("steps"))
        return [self._read(pending, sum(sizes[:i]), sizes[i]).view(np.uint32) for i in places]

    def _read(self, pending: Pending, begin: int, size: int) -> np.ndarray:
        data = np.empty(size, np.uint8)
        try:
            whole = read_at(self._fds[pending.file], pending.offset + begin, data)
        except OSError as error:
            raise self._unreadable(pending.file, error) from error
        if not whole:
            raise self._cut(pending.file)
        return data

    def _unreadable(self, file: int, error: OSError) -> RunError:
        return RunError(f"cannot read {self._name(file)}: {error.strerror}; --resume when it can")

    def _cut(self, file: int) -> RunError:
        return RunError(f"{self._name(file)} was cut: start again with --overwrite")

    def drop(self, pending: Pending) -> None:
        """The elements will not be asked for again."""
        if pending.memory is not None and not pending.is_resident:
            self._budget += pending.nbytes(pending.memory.operands)

    def _name(self, file: int) -> str:
        return "the file of candidates" if self._path is None else str(of_rank(self._path, file))

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        if self._rank in self._fds:
            os.fdatasync(self._fds[self._rank])

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

    def _open(self, file: int) -> int:
        """The descriptor of a rank's file; what is written goes after what this rank's holds already."""
        if file not in self._fds:
            if self._path is None:
                with tempfile.TemporaryFile() as unnamed:
                    self._fds[file] = os.dup(unnamed.fileno())
            else:
                own = os.O_CREAT if file == self._rank else 0
                self._fds[file] = os.open(of_rank(self._path, file), os.O_RDWR | own, 0o644)
            if file == self._rank:
                self._end = os.fstat(self._fds[file]).st_size
        return self._fds[file]


def _arrays(candidates: Candidates) -> list[np.ndarray]:
    """Columns, the steps of each expert, then the alternatives of each."""
    arrays = [candidates.positions, *(b.data for b in candidates.operands.buffers), *candidates.steps]
    arrays += [column for a in candidates.alternatives for column in a]
    return [a.view(np.uint8) for a in arrays if a.size]
