"""What the backends receive: flat views of the inputs of one output tensor, cut into tiles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from . import log8
from .dtypes import BY_NAME, DType
from .resident import Array, beside, is_resident, joined, library, raw, take


@dataclass(frozen=True, slots=True)
class Buffer:
    """A flat, read-only view of one tensor's elements, usually over mapped pages.

    data: uint8[n * dtype.itemsize], possibly unaligned, or a tensor on a device (resident); origin: what an
    error calls it (a file, or "experts[2]"); offset: of the first byte in the file `origin`, -1 where it is
    no file.
    """

    data: Array
    dtype: DType
    origin: str = ""
    offset: int = -1

    def __len__(self) -> int:
        return self.data.nbytes // self.dtype.itemsize

    def slice(self, start: int, stop: int) -> Buffer:
        """Elements [start, stop)."""
        size = self.dtype.itemsize
        offset = self.offset if self.offset < 0 else self.offset + start * size
        return Buffer(self.data[start * size : stop * size], self.dtype, self.origin, offset)

    def gather(self, positions: Array) -> Buffer:
        """A copy of the elements at `positions` (integers[m])."""
        return Buffer(take(self.data, positions, self.dtype.itemsize), self.dtype, self.origin)

    def float32(self) -> Array:
        """Float32, bfloat16 or float16 elements as float32[n]: a copy, unless they are resident."""
        if is_resident(self.data):
            return self.data.view(getattr(library(self.data), self.dtype.name)).float()
        if self.dtype.name == "bfloat16":
            return (self.data.copy().view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return self.data.copy().view(self.dtype.name).astype(np.float32, copy=False)


class Curvature:
    """h_t of a tensor or of one tile of it, in one of the forms below.

    bias_correction: what h_t must be divided by (1 - beta2^step; 1 where it is used as it is); origin: what
    an error calls it; buffers: those with one value per element; factors: arrays beside them, which slices
    share.
    """

    __slots__ = ()
    bias_correction: float = 1.0
    origin: str = "curvature"
    buffers: tuple[Buffer, ...] = ()
    factors: tuple[np.ndarray, ...] = ()

    def slice(self, start: int, stop: int) -> Curvature:
        """Elements [start, stop)."""
        raise NotImplementedError

    def gather(self, positions: Array) -> Uniform | Full:
        """A copy of the elements at `positions` (int64[m]), each a value."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Uniform(Curvature):
    """Curvature 1 everywhere: no second moments are used."""

    def slice(self, start: int, stop: int) -> Uniform:
        return self

    def gather(self, positions: Array) -> Uniform:
        return self


@dataclass(frozen=True, slots=True)
class Full(Curvature):
    """One curvature value per element: float32, bfloat16 or float16."""

    values: Buffer
    bias_correction: float = 1.0

    @property
    def origin(self) -> str:
        return self.values.origin

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        return (self.values,)

    def slice(self, start: int, stop: int) -> Full:
        return Full(self.values.slice(start, stop), self.bias_correction)

    def gather(self, positions: Array) -> Full:
        return Full(self.values.gather(positions), self.bias_correction)

    def float32(self) -> Array:
        """The values, float32[n]."""
        return self.values.float32()


@dataclass(frozen=True, slots=True)
class Log8(Curvature):
    """One code per element and one scale per row (see log8).

    codes: uint8; scales: float32[rows] of the whole tensor; columns: elements of a row; start: flat index of
    the first element of this slice.
    """

    codes: Buffer
    scales: np.ndarray
    columns: int
    start: int = 0
    bias_correction: float = 1.0

    @property
    def origin(self) -> str:
        return self.codes.origin

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        return (self.codes,)

    @property
    def factors(self) -> tuple[np.ndarray, ...]:
        return (self.scales,)

    def slice(self, start: int, stop: int) -> Log8:
        return replace(self, codes=self.codes.slice(start, stop), start=self.start + start)

    def gather(self, positions: Array) -> Full:
        return _full(
            self._decoded(self.codes.gather(positions), positions), self.bias_correction, self.origin
        )

    def float32(self) -> np.ndarray:
        """The values, float32[n]."""
        return self._decoded(self.codes, np.arange(len(self.codes)))

    def _decoded(self, codes: Buffer, positions: np.ndarray) -> np.ndarray:
        return log8.decode(codes.data, self.scales[(self.start + positions) // self.columns])


@dataclass(frozen=True, slots=True)
class Rank1(Curvature):
    """Curvature rows[i] * columns[j] of a matrix: R_i C_j / sum(R).

    rows: float32[m] row sums; columns: float32[n] column sums divided by the total; start: flat index of
    the first element of this slice.
    """

    rows: np.ndarray
    columns: np.ndarray
    start: int = 0
    bias_correction: float = 1.0

    @classmethod
    def of_sums(cls, rows: np.ndarray, columns: np.ndarray, bias_correction: float = 1.0) -> Rank1:
        """From the sums of a matrix, float32[m] and float32[n], as a file holds them."""
        total = rows.sum(dtype=np.float64)
        shares = columns / total if total > 0 else columns
        return cls(rows, shares.astype(np.float32), bias_correction=bias_correction)

    @property
    def factors(self) -> tuple[np.ndarray, ...]:
        return (self.rows, self.columns)

    def slice(self, start: int, stop: int) -> Rank1:
        return replace(self, start=self.start + start)

    def gather(self, positions: Array) -> Full:
        row, column = _places(self.start + positions, self.columns.size)
        return _full(beside(self.rows, row)[row] * beside(self.columns, row)[column], self.bias_correction)


@dataclass(frozen=True, slots=True)
class LowRank(Curvature):
    """Curvature max(0, left @ right) of a matrix. left: float32[m, r] (C order), right: float32[r, n]."""

    left: np.ndarray
    right: np.ndarray
    start: int = 0
    bias_correction: float = 1.0

    @property
    def factors(self) -> tuple[np.ndarray, ...]:
        return (self.left, self.right)

    def slice(self, start: int, stop: int) -> LowRank:
        return replace(self, start=self.start + start)

    def gather(self, positions: Array) -> Full:
        row, column = _places(self.start + positions, self.right.shape[1])
        left, right = beside(self.left, row), beside(self.right, row)
        # The kernels' order, so that scores are the same bits.
        h = sum(left[row, r] * right[r, column] for r in range(len(right)))
        h[~(h > 0)] = 0
        return _full(h, self.bias_correction)


def _places(index: Array, columns: int) -> tuple[Array, Array]:
    """Row and column of flat indices."""
    row = index // columns
    return row, index - row * columns


def _full(h: Array, bias_correction: float, origin: str = Curvature.origin) -> Full:
    return Full(Buffer(raw(h), BY_NAME["float32"], origin), bias_correction)


@dataclass(frozen=True, slots=True)
class TensorInputs:
    """All inputs of one output tensor, or of one tile of it.

    base: None where the method has no base; experts and curvatures: one per expert, in recipe order.
    """

    name: str
    shape: tuple[int, ...]
    out_dtype: DType
    base: Buffer | None
    experts: tuple[Buffer, ...]
    curvatures: tuple[Curvature, ...]

    @property
    def numel(self) -> int:
        """Elements of this view."""
        return len(self.experts[0])

    @property
    def is_resident(self) -> bool:
        """Whether all buffers are on a device."""
        return is_resident(self.experts[0].data)

    @property
    def buffers(self) -> list[Buffer]:
        """Every buffer that has one value per element: base, experts, curvature that is not factored."""
        weights = [b for b in (self.base, *self.experts) if b is not None]
        return [*weights, *(b for c in self.curvatures for b in c.buffers)]

    def slice(self, start: int, stop: int) -> TensorInputs:
        """The tile of elements [start, stop); name and shape stay those of the whole tensor."""
        return TensorInputs(
            self.name,
            self.shape,
            self.out_dtype,
            None if self.base is None else self.base.slice(start, stop),
            tuple(e.slice(start, stop) for e in self.experts),
            tuple(c.slice(start, stop) for c in self.curvatures),
        )

    def gather(self, positions: Array) -> TensorInputs:
        """The elements at `positions` (int64[m]) as a tile of their own, copied; compressed curvature becomes
        one float32 value per element."""
        return replace(
            self,
            base=None if self.base is None else self.base.gather(positions),
            experts=tuple(e.gather(positions) for e in self.experts),
            curvatures=tuple(c.gather(positions) for c in self.curvatures),
        )


def concatenated(tiles: Sequence[TensorInputs]) -> TensorInputs:
    """The elements of tiles of one form, whose curvature has a value per element or none, as one tile."""
    if len(tiles) == 1:
        return tiles[0]

    def together(buffers: Iterable[Buffer]) -> Buffer:
        first, *rest = buffers
        return Buffer(joined([first.data, *(b.data for b in rest)]), first.dtype, first.origin)

    def curvature(curvatures: Sequence[Curvature]) -> Curvature:
        first = curvatures[0]
        if isinstance(first, Uniform):
            return first
        return Full(together(c.values for c in curvatures), first.bias_correction)

    return replace(
        tiles[0],
        base=None if tiles[0].base is None else together(t.base for t in tiles),
        experts=tuple(map(together, zip(*(t.experts for t in tiles), strict=True))),
        curvatures=tuple(map(curvature, zip(*(t.curvatures for t in tiles), strict=True))),
    )
