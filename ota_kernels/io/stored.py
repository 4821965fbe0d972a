"""How a curvature file holds one tensor, and what says so: the names of its keys.

full    NAME.exp_avg_sq, or NAME: one value per element, float32, bfloat16 or float16
rank-1  NAME.exp_avg_sq_row, NAME.exp_avg_sq_col: row sums float32[m], column sums float32[n] of a matrix
log8    NAME.exp_avg_sq_log8: codes, uint8 of the tensor's shape; NAME.exp_avg_sq_scale: float32[rows], where
        a row is the last dimension (see ota_kernels.log8)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from ..errors import InputError
from ..tensors.buffer import Buffer
from ..tensors.curvature import Curvature, Full, Log8, Rank1
from ..tensors.dtypes import BY_NAME
from .header import quoted

MOMENT = "exp_avg_sq"
ROW, COLUMN = f"{MOMENT}_row", f"{MOMENT}_col"
CODES, SCALE = f"{MOMENT}_log8", f"{MOMENT}_scale"
FULL_TYPES = ("float32", "bfloat16", "float16")


class Tensors(Protocol):
    """A file's tensors by key. where: what an error begins with; compressed: the parameters that are there in
    a compressed form, or in part of one."""

    @property
    def where(self) -> str: ...
    @property
    def compressed(self) -> frozenset[str]: ...
    def has(self, key: str) -> bool: ...
    def key_shape(self, key: str) -> tuple[int, ...]: ...
    def key_dtype(self, key: str) -> str: ...
    def key_buffer(self, key: str) -> Buffer: ...


class Stored(ABC):
    """One tensor. name: of the parameter; keys: what holds it; itemsize: bytes that each element adds."""

    itemsize: int

    def __init__(self, file: Tensors, name: str, keys: tuple[str, ...]) -> None:
        self.file, self.name, self.keys = file, name, keys
        for key in keys:
            if not file.has(key):
                raise self.error(key, f"is missing, without which {quoted(keys[0])} says nothing")

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""

    @abstractmethod
    def curvature(self, bias_correction: float) -> Curvature:
        """A view; reads what is kept beside the elements. InputError for a wrong type, shape or value."""

    def error(self, key: str, fact: str) -> InputError:
        return InputError(f"{self.file.where}: tensor {quoted(key)} {fact}")

    def _require_dtype(self, key: str, *accepted: str) -> str:
        found = self.file.key_dtype(key)
        if found not in accepted:
            raise self.error(key, f"is {found}; curvature must be {', '.join(accepted)}")
        return found

    def _floats(self, key: str, shape: tuple[int, ...]) -> np.ndarray:
        """Sums or scales, float32[n], finite and >= 0; a copy only where the file does not align them."""
        self._require_dtype(key, "float32")
        if self.file.key_shape(key) != shape:
            raise self.error(key, f"has shape {list(self.file.key_shape(key))}, not {list(shape)}")
        data = self.file.key_buffer(key).data
        values = (data if data.ctypes.data % 4 == 0 else data.copy()).view(np.float32)
        bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
        if bad.size:
            count = f"{bad.size} of {values.size} values are negative or not finite"
            raise self.error(key, f"is damaged: {count}, the first at index {bad[0]}")
        return values


class StoredFull(Stored):
    @property
    def itemsize(self) -> int:
        return BY_NAME[self._require_dtype(self.keys[0], *FULL_TYPES)].itemsize

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.key_shape(self.keys[0])

    def curvature(self, bias_correction: float) -> Full:
        self._require_dtype(self.keys[0], *FULL_TYPES)
        return Full(self.file.key_buffer(self.keys[0]), bias_correction)


class StoredRank1(Stored):
    itemsize = 0

    @property
    def shape(self) -> tuple[int, ...]:
        for key in self.keys:
            if len(self.file.key_shape(key)) != 1:
                raise self.error(key, f"has shape {list(self.file.key_shape(key))}: sums are a vector")
        return tuple(size for key in self.keys for size in self.file.key_shape(key))

    def curvature(self, bias_correction: float) -> Rank1:
        rows, columns = self.keys
        m, n = self.shape
        return Rank1.of_sums(self._floats(rows, (m,)), self._floats(columns, (n,)), bias_correction)


class StoredLog8(Stored):
    itemsize = 1

    @property
    def shape(self) -> tuple[int, ...]:
        found = self.file.key_shape(self.keys[0])
        if len(found) < 2:
            raise self.error(self.keys[0], f"has shape {list(found)}: codes have 2 dimensions or more")
        return found

    def curvature(self, bias_correction: float) -> Log8:
        codes, scale = self.keys
        *leading, columns = self.shape
        self._require_dtype(codes, "uint8")
        scales = self._floats(scale, (math.prod(leading),))
        return Log8(self.file.key_buffer(codes), scales, columns, bias_correction=bias_correction)


def find(file: Tensors, name: str) -> Stored | None:
    """How `file` holds the curvature of `name`, None if it does not. InputError where it is there in two
    forms, or in half of one."""
    found: list[Stored] = []
    full = next((key for key in (f"{name}.{MOMENT}", name) if file.has(key)), None)
    if full is not None:
        found.append(StoredFull(file, name, (full,)))
    if name in file.compressed:
        for form, suffixes in ((StoredRank1, (ROW, COLUMN)), (StoredLog8, (CODES, SCALE))):
            keys = tuple(f"{name}.{suffix}" for suffix in suffixes)
            if any(map(file.has, keys)):
                found.append(form(file, name, keys))
    if len(found) > 1:
        one, other, *_ = (quoted(form.keys[0]) for form in found)
        raise InputError(f"{file.where}: holds {quoted(name)} in two forms, {one} and {other}: remove one")
    return found[0] if found else None


def compressed(keys: Iterable[str]) -> frozenset[str]:
    """The parameters of which a part of a compressed form is among the keys."""
    endings = tuple(f".{suffix}" for suffix in (ROW, COLUMN, CODES, SCALE))
    return frozenset(key.rpartition(".")[0] for key in keys if key.endswith(endings))


def parameter_of(key: str) -> str:
    """The parameter that a key belongs to."""
    name, _, suffix = key.rpartition(".")
    return name if name and suffix in (MOMENT, ROW, COLUMN, CODES, SCALE) else key
