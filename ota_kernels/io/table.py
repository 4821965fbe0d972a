"""What headers say of tensors, a row each: models have hundreds of thousands, and an object for each would
take more memory than a merge does."""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from itertools import chain
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

from ..tensors.dtypes import DType

Said = TypeVar("Said")


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
    """Numbers of rows by name; those of equal names are one object. said: what functions say of the names."""

    __slots__ = ("__weakref__", "said")

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(zip(map(sys.intern, names), range(len(names)), strict=True))
        self.said: dict[Callable, Any] = {}


_known: WeakValueDictionary[tuple, _Rows] = WeakValueDictionary()


class Table(Mapping[str, TensorInfo]):
    """TensorInfo by name, made when it is asked for; in the order in which they were given."""

    __slots__ = ("_begins", "_dtypes", "_ends", "_rows", "_shapes")

    def __init__(self, infos: Iterable[TensorInfo] = ()) -> None:
        """infos: of different names."""
        names, *columns = tuple(zip(*infos, strict=True)) or ((),) * 5
        self._hold(names, *columns)

    @classmethod
    def joined(cls, tables: Sequence[Table], prefixes: Sequence[str]) -> Table:
        """The rows of several tables, whose names begin with these prefixes. ValueError with the first name
        that would be there twice."""
        together = cls.__new__(cls)
        named = (map(p.__add__, t) if p else t for t, p in zip(tables, prefixes, strict=True))
        columns = zip(*((t._dtypes, t._shapes, t._begins, t._ends) for t in tables), strict=True)
        together._hold(tuple(chain(*named)), *(tuple(chain(*column)) for column in columns))
        return together

    def _hold(self, names: tuple[str, ...], dtypes: tuple, shapes: tuple, begins: tuple, ends: tuple) -> None:
        self._rows = _rows_of(names)
        self._dtypes, self._shapes = dtypes, shapes
        self._begins, self._ends = array("q", begins), array("q", ends)

    @property
    def types(self) -> set[DType]:
        """Those that some tensor has."""
        return set(self._dtypes)

    def say(self, function: Callable[[Iterable[str]], Said]) -> Said:
        """What a function says of the names: asked once for all tables of the same ones."""
        if function not in self._rows.said:
            self._rows.said[function] = function(self._rows)
        return self._rows.said[function]

    def row(self, name: str) -> int:
        """The number of a tensor. KeyError for a name that is not there."""
        return self._rows[name]

    def __getitem__(self, name: str) -> TensorInfo:
        i = self._rows[name]
        row = name, self._dtypes[i], self._shapes[i], self._begins[i], self._ends[i]
        return tuple.__new__(TensorInfo, row)  # TensorInfo(*row) would take twice as long

    def get(self, name: str | None, default: Any = None) -> Any:
        return self[name] if name in self._rows else default

    def place(self, row: int) -> tuple[DType, int, int]:
        """(type, begin, end) of the tensor of this number."""
        return self._dtypes[row], self._begins[row], self._ends[row]

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def infos(self) -> Iterator[TensorInfo]:
        """All rows, in order."""
        return map(TensorInfo, self._rows, self._dtypes, self._shapes, self._begins, self._ends)

    def keys(self) -> KeysView[str]:
        return self._rows.keys()

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
        _known[key] = found = _Rows(names)
    if len(found) < len(names):
        raise ValueError(next(name for i, name in enumerate(names) if found[name] != i))
    return found


def say(names: Iterable[str], function: Callable[[Iterable[str]], Said]) -> Said:
    """`Table.say`, of whatever names."""
    return names.say(function) if isinstance(names, Table) else function(names)
