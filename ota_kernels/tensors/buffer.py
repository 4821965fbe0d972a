"""Elements of one tensor where they lie: in a mapped file, in memory, on a device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .array import Array, is_resident, library, take
from .dtypes import DType


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
