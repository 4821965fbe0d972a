"""What headers say of tensors, a row each: models have hundreds of thousands, and an object for each would
take more memory than a merge does."""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from ..tensors.dtypes import DType


class TensorInfo(NamedTuple):
    """Where one tensor lies. begin, end: absolute byte offsets in its file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        """Elements; 1 for a 0-d tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return self.end - self.begin


class Table(Mapping[str, TensorInfo]):
    """TensorInfo by name, made when it is asked for; in the order in which rows were added."""

    __slots__ = ("_begins", "_dtypes", "_ends", "_rows", "_shapes")

    def __init__(self, infos: Iterable[TensorInfo] = ()) -> None:
        self._rows: dict[str, int] = {}
        self._dtypes: list[DType] = []
        self._shapes: list[tuple[int, ...]] = []
        self._begins, self._ends = array("q"), array("q")
        for info in infos:
            self.add(*info)

    def add(self, name: str, dtype: DType, shape: tuple[int, ...], begin: int, end: int) -> None:
        """One more row; name: of none that is there."""
        self._rows[sys.intern(name)] = len(self._dtypes)  # files of a merge have the same names
        self._dtypes.append(dtype)
        self._shapes.append(shape)
        self._begins.append(begin)
        self._ends.append(end)

    def row(self, name: str) -> int:
        """The number of a tensor. KeyError for a name that is not there."""
        return self._rows[name]

    def __getitem__(self, name: str) -> TensorInfo:
        i = self._rows[name]
        return TensorInfo(name, self._dtypes[i], self._shapes[i], self._begins[i], self._ends[i])

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def infos(self) -> Iterator[TensorInfo]:
        """All rows, in order."""
        return map(TensorInfo, self._rows, self._dtypes, self._shapes, self._begins, self._ends)
