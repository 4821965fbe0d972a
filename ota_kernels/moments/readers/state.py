"""One parameter's entry in the state dict of a torch optimizer, checked as it is looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from ...io import torchfile
from ...io.header import quoted
from ...io.pages import advise
from ...tensors.buffer import Buffer
from ..source import Piece

# A piece is 16 MiB of float32; a multiple of every block size of 8-bit states.
PIECE_ELEMENTS = 1 << 22
_FLOATS = ("float32", "bfloat16", "float16", "float64")


class State:
    """One entry. values: what the optimizer keeps for the parameter; where: what errors call it."""

    def __init__(self, values: Mapping[str, Any], path: Path, where: str) -> None:
        self.where = where
        self._values = values
        self._path = path

    @property
    def keys(self) -> list[str]:
        return [str(key) for key in self._values]

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    @property
    def step(self) -> float | None:
        """Steps taken; None where the entry does not say."""
        return as_number(self._values.get("step"), f"{self.where}: step")

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor. Raises InputError unless it is a plain one."""
        tensor = self._values.get(key)
        if not torchfile.is_plain(tensor):
            raise InputError(f"{self.where}: {key} is not a plain contiguous tensor: save it as one")
        return tuple(tensor.shape)

    def buffer(self, key: str, dtypes: tuple[str, ...] = _FLOATS) -> Buffer:
        """A view of a tensor in the mapped file. Raises InputError for one that is not plain or of a type
        that is not among `dtypes`."""
        self.shape(key)
        dtype = str(self._values[key].dtype).removeprefix("torch.")
        if dtype not in dtypes:
            raise InputError(f"{self.where}: {key} is {dtype}, not {' or '.join(dtypes)}")
        return torchfile.buffer(self._values[key], self._path)


def as_number(value: Any, what: str) -> float | None:
    """`value`, a number or a tensor of one, as float; None for None. Raises InputError for anything else."""
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InputError(f"{what} is not a number: {quoted(value)}") from error
    if not math.isfinite(number):
        raise InputError(f"{what} is {number}")
    return number


def cut(numel: int) -> list[tuple[int, int]]:
    """[start, stop) ranges of at most PIECE_ELEMENTS that cover `numel` elements."""
    return [(start, min(start + PIECE_ELEMENTS, numel)) for start in range(0, numel, PIECE_ELEMENTS)]


def read_once(buffer: Buffer) -> np.ndarray:
    """The elements as float32; the mapped pages are let go of."""
    values = buffer.float32()
    advise(buffer.data, "dontneed")
    return values


def pieces(buffer: Buffer) -> tuple[Piece, ...]:
    """The elements of `buffer` as they are stored."""
    return tuple(
        Piece(start, stop - start, partial(read_once, buffer.slice(start, stop)))
        for start, stop in cut(len(buffer))
    )
