"""One parameter's entry in an optimizer's state, and its group's settings, checked as they are looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...io.header import quoted
from . import values as stored
from .values import FLOATS, Values


class State:
    """One entry.

    values: what the optimizer keeps for the parameter; group: the settings of its group; path: of the file;
    where: what errors call it.
    """

    def __init__(
        self, values: Mapping[str, Any], path: Path, where: str, group: Mapping[str, Any] | None = None
    ) -> None:
        self.where = where
        self.group: Mapping[str, Any] = group or {}
        self._values = values
        self._path = path

    @property
    def keys(self) -> list[str]:
        """What it keeps; what is None is not kept."""
        return [str(key) for key, value in self._values.items() if value is not None]

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def number(self, key: str) -> float | None:
        """A number of the entry, else of its group; None where neither says it."""
        found = self._values.get(key)
        where = self.where
        if found is None:
            found, where = self.group.get(key), f"{self.where}: its group"
        return as_number(found, f"{where}: {key}")

    def dtype(self, key: str) -> str:
        """Of a tensor: the name of its elements' type, "" for what has none."""
        return stored.dtype_of(self._values.get(key))

    def find_shape(self, key: str) -> tuple[int, ...] | None:
        """The shape of a tensor; None where there is none."""
        return stored.shape_of(self._values.get(key))

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor. Raises InputError unless it is one."""
        found = self.find_shape(key)
        if found is None:
            self.values(key)
            raise InputError(f"{self.where}: {key} has no shape")
        return found

    def values(self, key: str, dtypes: tuple[str, ...] = FLOATS) -> Values:
        """The elements of a tensor. Raises InputError for anything else, or for a type not in `dtypes`."""
        return stored.values_of(self._values.get(key), f"{self.where}: {key}", self._path, dtypes)


def as_number(value: Any, what: str) -> float | None:
    """`value`, a number or a tensor of one, as float; None for None. Raises InputError for anything else."""
    if value is None:
        return None
    if isinstance(value, stored.LazyObject):
        value = value.load()
    elif isinstance(value, stored.Lazy):
        value = value.values().all() if math.prod(value.shape) == 1 else value
    try:
        number = float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InputError(f"{what} is not a number: {quoted(value)}") from error
    if not math.isfinite(number):
        raise InputError(f"{what} is {number}")
    return number
