"""Elements that are computed where they are needed, whole rows at a time, instead of lying somewhere."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from .array import Array, raw
from .buffer import Buffer
from .dtypes import DType

_MOST = 1 << 18  # elements of whole rows that are computed at a time, where a row is not longer


class Computed(ABC):
    """A tensor whose rows are computed; stands where a Buffer of a whole tensor may stand.

    shape; dtype: of the elements that `slice` gives, float32 or float64; origin: what an error calls it;
    offset: -1, it lies in no file; bytes_per_element: bytes that are read for each element. A row is what one
    index of the first axis holds; a scalar or vector has rows of one element.
    """

    offset = -1

    def __init__(self, shape: tuple[int, ...], dtype: DType, origin: str, bytes_per_element: int) -> None:
        self.shape, self.dtype, self.origin = shape, dtype, origin
        self.bytes_per_element = bytes_per_element
        self._numel = math.prod(shape)
        self.columns = max(1, math.prod(shape[1:]))

    @abstractmethod
    def rows(self, first: int, stop: int) -> np.ndarray:
        """Rows [first, stop) as [stop - first, columns] of `dtype`: new memory, or memory that nobody
        changes."""

    @abstractmethod
    def parts(self, first: int, stop: int) -> Iterator[Buffer]:
        """The stored elements that rows [first, stop) are computed from."""

    def __len__(self) -> int:
        return self._numel

    def slice(self, start: int, stop: int) -> Buffer:
        """Elements [start, stop), computed; at whole rows nothing is computed twice."""
        out = np.empty(max(0, stop - start), self.dtype.name)
        step = max(1, _MOST // self.columns)
        for first in range(start // self.columns, -(-stop // self.columns), step):
            last = min(first + step, -(-stop // self.columns))
            values = self.rows(first, last).reshape(-1)
            begin, end = max(start, first * self.columns), min(stop, last * self.columns)
            out[begin - start : end - start] = values[
                begin - first * self.columns : end - first * self.columns
            ]
        return Buffer(raw(out), self.dtype, self.origin)

    def gather(self, positions: Array) -> Buffer:
        """The elements at `positions` (integers[m]); a row that holds several is computed once."""
        positions = np.asarray(positions)
        rows, place = np.unique(positions // self.columns, return_inverse=True)
        out = np.empty(positions.size, self.dtype.name)
        step = max(1, _MOST // self.columns)
        for first in range(0, rows.size, step):
            chosen = rows[first : first + step]
            values = np.concatenate([self.rows(*run) for run in _runs(chosen)])
            inside = (place >= first) & (place < first + step)
            out[inside] = values[place[inside] - first, positions[inside] % self.columns]
        return Buffer(raw(out), self.dtype, self.origin)


def _runs(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ascending numbers as ranges."""
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    for run in np.split(rows, cuts):
        yield int(run[0]), int(run[-1]) + 1


Source = Buffer | Computed


def is_computed(source: object) -> bool:
    """Whether its elements have no address until they are sliced."""
    return isinstance(source, Computed)
