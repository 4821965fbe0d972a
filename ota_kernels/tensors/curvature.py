"""Second moments of a tensor or of one tile of it, in the forms that kernels read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from . import log8
from .array import Array, arange, beside, library, raw, scalar
from .buffer import Buffer
from .dtypes import BY_NAME


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
class Floored(Curvature):
    """max(h, floor * c) of another form with the bias correction c, a value per element in each tile: divided
    by c it is max(h / c, floor)."""

    inner: Curvature
    floor: float

    @property
    def bias_correction(self) -> float:
        return self.inner.bias_correction

    @property
    def origin(self) -> str:
        return self.inner.origin

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        return self.inner.buffers

    @property
    def factors(self) -> tuple[np.ndarray, ...]:
        return self.inner.factors

    def slice(self, start: int, stop: int) -> Curvature:
        tile = self.inner.slice(start, stop)
        return self._raised(tile.gather(arange(stop - start, self._like())))

    def gather(self, positions: Array) -> Uniform | Full:
        return self._raised(self.inner.gather(positions))

    def _like(self) -> Array:
        return self.buffers[0].data if self.buffers else self.factors[0]

    def _raised(self, full: Uniform | Full) -> Uniform | Full:
        if isinstance(full, Uniform):
            return full
        h = full.float32()
        least = scalar(self.floor * self.bias_correction, h, "float32")
        return _full(library(h).maximum(h, least), self.bias_correction, self.origin)


def floored(curvature: Curvature, floor: float) -> Curvature:
    """The curvature, at least `floor`."""
    return curvature if floor <= 0 or isinstance(curvature, Uniform) else Floored(curvature, floor)
