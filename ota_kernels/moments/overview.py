"""Show: what a file of second moments holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..factors import as_float32
from ..io.header import quoted
from ..io.reader import Checkpoint, advise
from ..tensors import Buffer
from .checking import ValueCheck

_LABEL = "second moments"
_DTYPES = ("float32", "bfloat16", "float16")
_PIECE_ELEMENTS = 1 << 22
_DIGIT = 1 << 16


@dataclass(frozen=True)
class TensorOverview:
    """One tensor. median: the lower of the middle two; minimum, median, maximum: None where it is empty;
    zeros: elements that are 0; nbytes: in the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    minimum: float | None
    median: float | None
    maximum: float | None
    zeros: int
    nbytes: int


@dataclass(frozen=True)
class Overview:
    """A file. source_format, step, beta2: as its metadata says, None where it does not."""

    source_format: str | None
    step: str | None
    beta2: str | None
    tensors: tuple[TensorOverview, ...]

    def as_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


def show(file: str | Path) -> Overview:
    """Read a safetensors file (an index, a folder) of second moments, each tensor two times, in pieces.

    Raises InputError for anything else: another format, type, negative or non-finite values.
    """
    checkpoint = Checkpoint.open(Path(file), _LABEL)
    metadata = [checkpoint.metadata_of(name) for name in checkpoint.tensors]

    def common(key: str) -> str | None:
        values = {entry.get(key) for entry in metadata}
        return values.pop() if len(values) == 1 else None

    tensors = tuple(_overview(checkpoint, name) for name in checkpoint.tensors)
    return Overview(common("source_format"), common("step"), common("beta2"), tensors)


def _overview(checkpoint: Checkpoint, name: str) -> TensorOverview:
    info = checkpoint.tensors[name]
    where = f"{_LABEL}: {checkpoint.path_of(name)}: tensor {quoted(name)}"
    if info.dtype.name not in _DTYPES:
        raise InputError(f"{where} is {info.dtype.name}; second moments are {', '.join(_DTYPES)}")
    values = checkpoint.buffer(name)
    check, zeros = ValueCheck(), 0
    minimum, maximum = np.float32(np.inf), np.float32(0)
    digits = np.zeros(_DIGIT, np.int64)
    for piece in _pieces(values):
        check.add(piece)
        minimum, maximum = min(minimum, piece.min()), max(maximum, piece.max())
        zeros += int(piece.size - np.count_nonzero(piece))
        digits += np.bincount(_bits(piece) >> 16, minlength=_DIGIT)
    check.finish(where)
    empty = info.numel == 0
    return TensorOverview(
        name,
        info.shape,
        info.dtype.name,
        None if empty else float(minimum),
        None if empty else _median(values, digits),
        None if empty else float(maximum),
        zeros,
        info.nbytes,
    )


def _median(values: Buffer, high: np.ndarray) -> float:
    """The element in the middle: numbers >= 0 are ordered as their bits are, of which two digits select it.

    high: int64[65536], how many elements have each upper digit.
    """
    rank = (len(values) - 1) // 2
    upper = int(np.searchsorted(np.cumsum(high), rank, side="right"))
    rank -= int(high[:upper].sum())
    low = np.zeros(_DIGIT, np.int64)
    for piece in _pieces(values):
        bits = _bits(piece)
        low += np.bincount(bits[bits >> 16 == upper] & 0xFFFF, minlength=_DIGIT)
    lower = int(np.searchsorted(np.cumsum(low), rank, side="right"))
    return float(np.array(upper << 16 | lower, np.uint32).view(np.float32))


def _bits(values: np.ndarray) -> np.ndarray:
    """float32 >= 0 as uint32 of the same order."""
    return np.abs(values).view(np.uint32)  # -0 is 0


def _pieces(values: Buffer) -> Iterator[np.ndarray]:
    for start in range(0, len(values), _PIECE_ELEMENTS):
        part = values.slice(start, start + _PIECE_ELEMENTS)
        yield as_float32(part)
        advise(part.data, "dontneed")
