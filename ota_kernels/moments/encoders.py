"""One tensor of second moments on its way into a smaller form, block by block."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import numpy as np

from ..errors import InputError
from ..io.new_file import Entry
from ..io.pages import release
from ..io.stored import CODES, COLUMN, ROW, SCALE
from ..run.low_rank import row_column_sums
from ..tensors import log8
from ..tensors.curvature import Full, Log8, Rank1
from ..tensors.dtypes import BY_NAME
from ..tensors.segment import Map

_BLOCK = 1 << 17  # elements of a block, whose temporaries then stay in a core's cache

Write = Callable[[str, int, np.ndarray], None]  # tensor's name, flat index of the first element, elements


class Encoder(ABC):
    """A tensor and its new form. entries: the tensors of the file that it becomes; where: what errors begin
    with."""

    def __init__(self, name: str, shape: tuple[int, ...], curvature: Full | Log8, where: str) -> None:
        self.name, self.shape, self.curvature, self.where = name, shape, curvature, where
        self.numel = math.prod(shape)

    @property
    @abstractmethod
    def entries(self) -> list[Entry]: ...

    def begin(self, write: Write, run: Map) -> None:  # noqa: B027 (most forms have nothing to do here)
        """Write what takes the whole tensor."""

    @abstractmethod
    def encode(self, start: int, values: np.ndarray, write: Write) -> np.ndarray:
        """Write elements from flat index `start`; values: float32[n], finite and >= 0, whole rows. Returns
        what a reader gets back, float32[n]."""

    def blocks(self) -> Iterator[tuple[int, int]]:
        """[start, stop) of blocks of whole rows; a row is the last dimension."""
        columns = self.shape[-1] if len(self.shape) > 1 else 1
        step = max(1, _BLOCK // max(columns, 1)) * columns
        for start in range(0, self.numel, step):
            yield start, min(start + step, self.numel)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The second moments of elements [start, stop), float32."""
        part = self.curvature.slice(start, stop)
        values = part.float32()
        release(part)
        return values


class Bfloat16(Encoder):
    """Rounded to nearest even."""

    @property
    def entries(self) -> list[Entry]:
        return [(self.name, BY_NAME["bfloat16"], self.shape)]

    def encode(self, start: int, values: np.ndarray, write: Write) -> np.ndarray:
        bits = np.abs(values).view(np.uint32)  # -0 is 0
        rounded = bits + np.uint32(0x7FFF) + (bits >> 16 & 1) >> 16
        if rounded.max(initial=0) >= 0x7F80:
            raise InputError(f"{self.where}: second moments above 3.39e38 are infinite in bfloat16: use log8")
        write(self.name, start, rounded.astype(np.uint16))
        return (rounded << 16).view(np.float32)


class Log8Codes(Encoder):
    """See ota_kernels.log8."""

    @property
    def entries(self) -> list[Entry]:
        rows = math.prod(self.shape[:-1])
        return [
            (f"{self.name}.{CODES}", BY_NAME["uint8"], self.shape),
            (f"{self.name}.{SCALE}", BY_NAME["float32"], (rows,)),
        ]

    def encode(self, start: int, values: np.ndarray, write: Write) -> np.ndarray:
        columns = self.shape[-1]
        codes, scales = log8.encode(values.reshape(-1, columns))
        write(f"{self.name}.{CODES}", start, codes)
        write(f"{self.name}.{SCALE}", start // columns, scales)
        return log8.decode(codes, scales[:, None]).reshape(-1)


class Sums(Encoder):
    """Row and column sums of a matrix."""

    @property
    def entries(self) -> list[Entry]:
        suffixes = zip((ROW, COLUMN), self.shape, strict=True)
        return [(f"{self.name}.{suffix}", BY_NAME["float32"], (size,)) for suffix, size in suffixes]

    def begin(self, write: Write, run: Map) -> None:
        with np.errstate(over="ignore"):
            rows, columns = (
                s.astype(np.float32) for s in row_column_sums(self.curvature, self.shape, run, release)
            )
        if not (np.isfinite(rows).all() and np.isfinite(columns).all()):
            raise InputError(f"{self.where}: sums of its second moments overflow float32: use bf16 or log8")
        write(f"{self.name}.{ROW}", 0, rows)
        write(f"{self.name}.{COLUMN}", 0, columns)
        self._factors = Rank1.of_sums(rows, columns)

    def encode(self, start: int, values: np.ndarray, write: Write) -> np.ndarray:
        columns = self.shape[1]
        rows = self._factors.rows[start // columns : (start + values.size) // columns]
        return np.outer(rows, self._factors.columns).reshape(-1)


FORMATS: dict[str, tuple[type[Encoder], Callable[[tuple[int, ...]], bool]]] = {
    # name: (encoder, which shapes it is for)
    "rank1": (Sums, lambda shape: len(shape) == 2 and math.prod(shape) > 0),
    "bf16": (Bfloat16, lambda shape: True),
    "log8": (Log8Codes, lambda shape: len(shape) >= 2 and math.prod(shape) > 0),
}
