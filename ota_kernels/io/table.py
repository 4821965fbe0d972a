"""What headers say of tensors, a row each: models have hundreds of thousands, and an object for each would
take more memory than a merge does."""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import ItemsView, Iterable, Iterator, Mapping, ValuesView
from typing import NamedTuple
from weakref import WeakValueDictionary

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


class _Rows(dict[str, int]):
    """Numbers of rows by name; those of equal names are one object."""

    __slots__ = ("__weakref__",)


_known: WeakValueDictionary[tuple, _Rows] = WeakValueDictionary()


class Table(Mapping[str, TensorInfo]):
    """TensorInfo by name, made when it is asked for; in the order in which they were given."""

    __slots__ = ("_begins", "_dtypes", "_ends", "_rows", "_shapes")

    def __init__(self, infos: Iterable[TensorInfo] = ()) -> None:
        """infos: of different names."""
        names, dtypes, shapes, begins, ends = tuple(zip(*infos, strict=True)) or ((),) * 5
        self._rows = _rows_of(names)
        self._dtypes, self._shapes = dtypes, shapes
        self._begins, self._ends = array("q", begins), array("q", ends)

    def row(self, name: str) -> int:
        """The number of a tensor. KeyError for a name that is not there."""
        return self._rows[name]

    def __getitem__(self, name: str) -> TensorInfo:
        i = self._rows[name]
        row = name, self._dtypes[i], self._shapes[i], self._begins[i], self._ends[i]
        return tuple.__new__(TensorInfo, row)  # TensorInfo(*row) would take twice as long

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def infos(self) -> Iterator[TensorInfo]:
        """All rows, in order."""
        return map(TensorInfo, self._rows, self._dtypes, self._shapes, self._begins, self._ends)

    def values(self) -> ValuesView[TensorInfo]:
        return _Values(self)

    def items(self) -> ItemsView[str, TensorInfo]:
        return _Items(self)


# Those of Mapping look every name up.


class _Values(ValuesView):
    def __iter__(self) -> Iterator[TensorInfo]:
        return self._mapping.infos()


class _Items(ItemsView):
    def __iter__(self) -> Iterator[tuple[str, TensorInfo]]:
        return zip(self._mapping, self._mapping.infos(), strict=True)


def _rows_of(names: tuple[str, ...]) -> _Rows:
    """Files of a merge have the same names: they are kept once."""
    key = (len(names), *names[:1], *names[-1:])
    found = _known.get(key)
    if found is None or tuple(found) != names:
        found = _Rows(zip(map(sys.intern, names), range(len(names)), strict=True))
        _known[key] = found
    return found
