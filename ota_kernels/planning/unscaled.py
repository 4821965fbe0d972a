"""A merge whose edit is divided by the factor that it was multiplied by: w_0 + (w - w_0) / factor, in
float64, made tile by tile."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..tensors.array import raw
from ..tensors.buffer import Buffer
from ..tensors.computed import Computed, Source
from ..tensors.dtypes import BY_NAME
from .buffers import as_float64
from .models import Model, Stored


class Unscaled(Stored):
    """The Model that a stored merge is without its factor."""

    def __init__(self, merged: Stored, base: Model, factor: float) -> None:
        super().__init__(merged.checkpoint)
        self._base, self._factor = base, factor

    def source(self, name: str, stands_for: str | None = None) -> Source:
        own, info = super().source(name), self._base.tensors.get(name)
        if not own.dtype.is_float or info is None or info.shape != self.tensors[name].shape:
            return own
        return _Edited(own, self._base.source(name), self._factor, tuple(info.shape))


class _Edited(Computed):
    def __init__(self, merged: Buffer, base: Buffer, factor: float, shape: tuple[int, ...]) -> None:
        super().__init__(shape, BY_NAME["float64"], merged.origin, merged.dtype.itemsize)
        self.columns = 1
        self._merged, self._base, self._factor = merged, base, factor

    def slice(self, start: int, stop: int) -> Buffer:
        stop = max(start, stop)
        return self._of(self._merged.slice(start, stop), self._base.slice(start, stop))

    def gather(self, positions: np.ndarray) -> Buffer:
        return self._of(self._merged.gather(positions), self._base.gather(positions))

    def _of(self, merged: Buffer, base: Buffer) -> Buffer:
        w, w_0 = (as_float64(b.data, b.dtype) for b in (merged, base))
        return Buffer(raw(w_0 + (w - w_0) / self._factor), self.dtype, self.origin)

    def rows(self, first: int, stop: int) -> np.ndarray:
        return self.slice(first, stop).data.view(np.float64).reshape(stop - first, -1)

    def parts(self, first: int, stop: int) -> Iterator[Buffer]:
        yield self._merged.slice(first, stop)
