"""Moments rearranged as weights are on saving: a part of a tensor, a permutation of its rows, several in one.

An arrangement only moves elements. It is known by shapes and strides, and read in pieces like its sources.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..errors import InputError
from ..io.header import quoted
from .source import FactoredMoment, Moment, Piece

_PIECE_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Part:
    """A strided view of a parameter. shape, strides, offset: in elements of its row-major order."""

    source: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0


@dataclass(frozen=True)
class Arrangement:
    """One stored tensor: its parts, put together along dimension `axis`. shape: of the stored tensor, which
    may merge dimensions of the parts."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    axis: int = 0

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.source for part in self.parts))

    @property
    def is_whole(self) -> bool:
        """Whether it is one parameter as it is."""
        (part, *others) = self.parts
        return not others and part.offset == 0 and part.strides == row_major(part.shape)


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor in one piece."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def whole(name: str, shape: tuple[int, ...]) -> Arrangement:
    """The parameter `name` as it is."""
    return Arrangement(shape, (Part(name, shape, row_major(shape)),))


def arranged(
    name: str, arrangement: Arrangement, moments: Mapping[str, Moment | FactoredMoment]
) -> Moment | FactoredMoment:
    """The moments of the stored tensor `name`. Raises InputError for factors that would have to be split."""
    sources = [moments[source] for source in arrangement.sources]
    factored = next((moment for moment in sources if isinstance(moment, FactoredMoment)), None)
    if factored is not None:
        if not arrangement.is_whole:
            raise InputError(
                f"{quoted(factored.name)}: row and column means cannot be rearranged into {quoted(name)}"
            )
        return FactoredMoment(
            name, factored.shape, factored.rows, factored.columns, factored.step, factored.beta2
        )
    steps, beta2s = {m.step for m in sources}, {m.beta2 for m in sources}
    step, beta2 = (found.pop() if len(found) == 1 else None for found in (steps, beta2s))
    if arrangement.is_whole and sources[0].shape == arrangement.shape:
        return Moment(name, sources[0].shape, sources[0].pieces, step, beta2)
    readers = {moment.name: _Reader(moment) for moment in sources}
    return Moment(name, arrangement.shape, tuple(_pieces(arrangement, readers)), step, beta2)


class _Reader:
    """Any range of a moment's elements."""

    # The piece that was read last, of all readers: the next range often needs it, too, and one is what memory
    # has room for.
    _last: tuple[Piece, np.ndarray] | None = None

    def __init__(self, moment: Moment) -> None:
        self._pieces = moment.pieces

    def read(self, start: int, stop: int) -> np.ndarray:
        result = np.empty(stop - start, np.float32)
        for piece in self._pieces:
            low, high = max(start, piece.start), min(stop, piece.start + piece.numel)
            if low < high:
                values = self._read(piece)
                result[low - start : high - start] = values[low - piece.start : high - piece.start]
        return result

    @classmethod
    def _read(cls, piece: Piece) -> np.ndarray:
        if cls._last is None or cls._last[0] is not piece:
            cls._last = None  # before the next one takes its room
            cls._last = piece, piece.read()
        return cls._last[1]


def _pieces(arrangement: Arrangement, readers: Mapping[str, _Reader]):
    """Some rows at a time; part by part where these follow one another."""
    if arrangement.axis == 0 or len(arrangement.parts) == 1:
        start = 0
        for part in arrangement.parts:
            for first, last, numel in _rows([part]):
                yield Piece(start, numel, partial(_read, [part], readers, 0, first, last))
                start += numel
        return
    start = 0
    for first, last, numel in _rows(arrangement.parts):
        yield Piece(start, numel, partial(_read, arrangement.parts, readers, arrangement.axis, first, last))
        start += numel


def _rows(parts) -> list[tuple[int, int, int]]:
    """[first, last) of their first dimension, and the elements in it."""
    count = parts[0].shape[0] if parts[0].shape else 1
    row = sum(math.prod(part.shape[1:]) for part in parts)
    step = max(1, _PIECE_ELEMENTS // max(1, row))
    return [(i, min(i + step, count), row * (min(i + step, count) - i)) for i in range(0, count, step)]


def _read(parts, readers: Mapping[str, _Reader], axis: int, first: int, last: int) -> np.ndarray:
    found = [_read_part(part, readers[part.source], first, last) for part in parts]
    return np.ascontiguousarray(found[0] if len(found) == 1 else np.concatenate(found, axis)).reshape(-1)


def _read_part(part: Part, reader: _Reader, first: int, last: int) -> np.ndarray:
    if not part.shape:
        return reader.read(part.offset, part.offset + 1)
    shape = (last - first, *part.shape[1:])
    if 0 in shape:
        return np.zeros(shape, np.float32)
    begin = part.offset + first * part.strides[0]
    reach = 1 + sum((size - 1) * stride for size, stride in zip(shape, part.strides, strict=True))
    flat = reader.read(begin, begin + reach)
    return np.lib.stride_tricks.as_strided(flat, shape, [4 * stride for stride in part.strides])
