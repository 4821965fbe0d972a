"""What the backends receive: flat views of the inputs of one output tensor, cut into tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .dtypes import BY_NAME, DType


@dataclass(frozen=True, slots=True)
class Buffer:
    """A flat, read-only view of one tensor's elements, usually over mapped pages.

    data: uint8[n * dtype.itemsize], possibly unaligned; origin: what an error calls it (a file, or
    "experts[2]"); offset: of the first byte in the file `origin`, -1 where it is no file.
    """

    data: np.ndarray
    dtype: DType
    origin: str = ""
    offset: int = -1

    def __len__(self) -> int:
        return self.data.size // self.dtype.itemsize

    def slice(self, start: int, stop: int) -> Buffer:
        """Elements [start, stop)."""
        size = self.dtype.itemsize
        offset = self.offset if self.offset < 0 else self.offset + start * size
        return Buffer(self.data[start * size : stop * size], self.dtype, self.origin, offset)

    def gather(self, positions: np.ndarray) -> Buffer:
        """A copy of the elements at `positions` (int64[m])."""
        elements = self.data.view(f"u{self.dtype.itemsize}")[positions]
        return Buffer(elements.view(np.uint8), self.dtype, self.origin)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Curvature 1 everywhere: no second moments are used."""

    def slice(self, start: int, stop: int) -> Uniform:
        return self

    def gather(self, positions: np.ndarray) -> Uniform:
        return self


@dataclass(frozen=True, slots=True)
class Full:
    """One curvature value per element: float32, bfloat16 or float16, to be divided by bias_correction
    (1 - beta2^step; 1 where the stored values are used as they are)."""

    values: Buffer
    bias_correction: float = 1.0

    def slice(self, start: int, stop: int) -> Full:
        return Full(self.values.slice(start, stop), self.bias_correction)

    def gather(self, positions: np.ndarray) -> Full:
        return Full(self.values.gather(positions), self.bias_correction)


@dataclass(frozen=True, slots=True)
class Rank1:
    """Curvature rows[i] * columns[j] of a matrix: R_i C_j / sum(R).

    rows: float32[m] row sums; columns: float32[n] column sums divided by the total; start: flat index of
    the first element of this slice.
    """

    rows: np.ndarray
    columns: np.ndarray
    start: int = 0

    def slice(self, start: int, stop: int) -> Rank1:
        return Rank1(self.rows, self.columns, self.start + start)

    def gather(self, positions: np.ndarray) -> Full:
        row, column = np.divmod(self.start + positions, self.columns.size)
        return _full(self.rows[row] * self.columns[column])


@dataclass(frozen=True, slots=True)
class LowRank:
    """Curvature max(0, left @ right) of a matrix. left: float32[m, r] (C order), right: float32[r, n]."""

    left: np.ndarray
    right: np.ndarray
    start: int = 0

    def slice(self, start: int, stop: int) -> LowRank:
        return LowRank(self.left, self.right, self.start + start)

    def gather(self, positions: np.ndarray) -> Full:
        row, column = np.divmod(self.start + positions, self.right.shape[1])
        h = np.zeros(len(positions), np.float32)
        for r in range(self.right.shape[0]):  # the kernels' order, so that scores are the same bits
            h += self.left[row, r] * self.right[r, column]
        return _full(np.where(h > 0, h, np.float32(0)))


def _full(h: np.ndarray) -> Full:
    return Full(Buffer(h.view(np.uint8), BY_NAME["float32"], "curvature"))


Curvature = Uniform | Full | Rank1 | LowRank


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
    def buffers(self) -> list[Buffer]:
        """Every buffer that has one value per element: base, experts, full curvature."""
        weights = [b for b in (self.base, *self.experts) if b is not None]
        return [*weights, *(c.values for c in self.curvatures if isinstance(c, Full))]

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

    def gather(self, positions: np.ndarray) -> TensorInputs:
        """The elements at `positions` (int64[m]) as a tile of their own, copied; factored curvature becomes
        one float32 value per element."""
        return TensorInputs(
            self.name,
            self.shape,
            self.out_dtype,
            None if self.base is None else self.base.gather(positions),
            tuple(e.gather(positions) for e in self.experts),
            tuple(c.gather(positions) for c in self.curvatures),
        )

    def copy(self) -> TensorInputs:
        """The same elements in memory of their own; factors are shared."""

        def own(buffer: Buffer) -> Buffer:
            return Buffer(buffer.data.copy(), buffer.dtype, buffer.origin)

        return replace(
            self,
            base=None if self.base is None else own(self.base),
            experts=tuple(map(own, self.experts)),
            curvatures=tuple(
                replace(c, values=own(c.values)) if isinstance(c, Full) else c for c in self.curvatures
            ),
        )
