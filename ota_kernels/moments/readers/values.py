"""Tensors of a state as flat numbers that are read piece by piece, however they are stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ...errors import InputError
from ...io import torchfile
from ...io.header import quoted
from ...io.inert import Inert
from ...io.pages import advise
from ...tensors.buffer import Buffer
from ..source import Piece
from . import quantized, sharded

# A piece is 16 MiB of float32; a multiple of every block size of 8-bit states.
PIECE_ELEMENTS = 1 << 22
FLOATS = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Values:
    """Elements in row-major order. read: [start, stop) of them as float32; cuts: ranges that are read well,
    where others would read more than they return."""

    numel: int
    read: Callable[[int, int], np.ndarray]
    cuts: tuple[tuple[int, int], ...] | None = None

    def all(self) -> np.ndarray:
        """float32[numel]."""
        return self.read(0, self.numel)

    def part(self, offset: int, numel: int) -> Values:
        """Elements [offset, offset + numel)."""
        return Values(numel, lambda start, stop: self.read(offset + start, offset + stop))

    def pieces(self, factor: float = 1.0) -> tuple[Piece, ...]:
        """Times `factor`."""
        ranges = cut(self.numel) if self.cuts is None else self.cuts
        return tuple(
            Piece(start, stop - start, partial(_scaled, self.read, start, stop, factor))
            for start, stop in ranges
        )


class Lazy:
    """A tensor that is not in memory: what readers of other files put into a state. shape; dtype: torch's
    name; values: its elements."""

    def __init__(self, shape: tuple[int, ...], dtype: str, values: Callable[[], Values]) -> None:
        self.shape, self.dtype, self.values = shape, dtype, values


class LazyObject:
    """What is no tensor and not in memory. load: reads it."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self.load = load


def shape_of(value: Any) -> tuple[int, ...] | None:
    """The shape of what stands for a tensor; None for anything else."""
    if isinstance(value, (torch.Tensor, Lazy)):
        return tuple(value.shape)
    if isinstance(value, Inert):
        return quantized.shape_of(value) or sharded.shape_of(value)
    return None


def dtype_of(value: Any) -> str:
    """The name of its elements' type; "" where it has none."""
    return str(getattr(value, "dtype", "")).removeprefix("torch.")


def values_of(value: Any, what: str, path: Any, dtypes: tuple[str, ...] = FLOATS) -> Values:
    """The elements of what stands for a tensor. Raises InputError, naming `what`, for anything else, and for
    a type that is not among `dtypes`."""
    if sharded.is_dtensor(value):
        return values_of(sharded.whole([value], what), what, path, dtypes)
    if isinstance(value, Inert) and quantized.shape_of(value) is not None:
        return Values(math.prod(quantized.shape_of(value)), quantized.reader(value, what))
    if not isinstance(value, (torch.Tensor, Lazy)) or not _is_dense(value):
        raise InputError(f"{what} is not a plain tensor but {_kind(value)}")
    if dtype_of(value) not in dtypes:
        raise InputError(f"{what} is {dtype_of(value)}, not {' or '.join(dtypes)}")
    if isinstance(value, Lazy):
        return value.values()
    if torchfile.is_plain(value):
        buffer = torchfile.buffer(value, path)
        return Values(value.numel(), lambda start, stop: read_once(buffer.slice(start, stop)))
    return Values(value.numel(), partial(_read_strided, value))


def cut(numel: int) -> list[tuple[int, int]]:
    """[start, stop) ranges of at most PIECE_ELEMENTS that cover `numel` elements."""
    return [(start, min(start + PIECE_ELEMENTS, numel)) for start in range(0, numel, PIECE_ELEMENTS)]


def read_once(buffer: Buffer) -> np.ndarray:
    """The elements as float32; the mapped pages are let go of."""
    values = buffer.float32()
    advise(buffer.data, "dontneed")
    return values


def _scaled(read: Callable[[int, int], np.ndarray], start: int, stop: int, factor: float) -> np.ndarray:
    values = read(start, stop)
    # In float64: a factor as 1e12 of Prodigy's may be beyond float32 where the product is not.
    return values if factor == 1.0 else (values.astype(np.float64) * factor).astype(np.float32)


def _read_strided(tensor: torch.Tensor, start: int, stop: int) -> np.ndarray:
    """Of a dense tensor in another order of memory (channels_last, a transpose): whole rows at a time."""
    row = math.prod(tensor.shape[1:])
    first = start // row
    block = tensor[first : -(-stop // row)].to(torch.float32).contiguous().view(-1)
    return block[start - first * row : stop - first * row].numpy()


def _is_dense(value: Any) -> bool:
    return isinstance(value, Lazy) or (
        value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
    )


def _kind(value: Any) -> str:
    if isinstance(value, Inert):
        return f"of {quoted(value.path)}"
    return "sparse" if isinstance(value, torch.Tensor) else quoted(value)
