"""Show: what a file of second moments holds."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..io.curvature import CurvatureFile
from ..io.header import quoted
from ..io.hub import resolve_file
from ..io.pages import release
from ..tensors.curvature import Full, Log8, Rank1
from .checking import ValueCheck
from .source import only

_LABEL = "second moments"
PIECE_ELEMENTS = 1 << 22
_DIGIT = 1 << 16


@dataclass(frozen=True)
class TensorOverview:
    """The second moments of one parameter.

    form: a dtype, "log8" or "rank-1"; median: the lower of the middle two; minimum, median, maximum: None
    where there are no elements, median also for rank-1; zeros: elements that are 0; nbytes: in the file.
    """

    name: str
    shape: tuple[int, ...]
    form: str
    minimum: float | None
    median: float | None
    maximum: float | None
    zeros: int
    nbytes: int


@dataclass(frozen=True)
class Overview:
    """A file. source_format, step, beta2: what all its tensors share, None where they or it do not say."""

    source_format: str | None
    step: float | None
    beta2: float | None
    tensors: tuple[TensorOverview, ...]

    def as_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


def show(file: str | Path) -> Overview:
    """Read a file of second moments, whatever `preconditioner_path` takes, each tensor two times, in pieces.

    Raises InputError for anything else: another format, type, negative or non-finite values.
    """
    with contextlib.closing(CurvatureFile.open(resolve_file(str(file)), _LABEL)) as opened:
        if not opened.names:
            raise InputError(f"{opened.where}: holds no second moments")
        said = [_step_and_beta2(opened, name) for name in opened.names]
        step, beta2 = map(only, zip(*said, strict=True))
        source_format = opened.source_format
        return Overview(source_format, step, beta2, tuple(_overview(opened, name) for name in opened.names))


def _step_and_beta2(file: CurvatureFile, name: str) -> tuple[float | None, float | None]:
    with contextlib.suppress(InputError):  # one is not said
        return file.step_and_beta2(name)
    metadata = file.metadata(name)
    return _number(metadata.get("step")), _number(metadata.get("beta2"))


def _number(text: str | None) -> float | None:
    with contextlib.suppress(TypeError, ValueError):  # not said, or no number
        return float(text)
    return None


def _overview(file: CurvatureFile, name: str) -> TensorOverview:
    curvature, shape = file.curvature(name), file.shape(name)
    if isinstance(curvature, Rank1):
        form, (minimum, median, maximum), zeros = "rank-1", _range_of_product(curvature), _zeros(curvature)
    else:
        where = f"{file.where}: tensor {quoted(name)}"
        (minimum, median, maximum), zeros = _range(curvature, math.prod(shape), where)
        form = "log8" if isinstance(curvature, Log8) else curvature.values.dtype.name
    nbytes = sum(file.key_buffer(key).data.nbytes for key in file.keys_of(name))
    return TensorOverview(name, shape, form, minimum, median, maximum, zeros, nbytes)


Range = tuple[float | None, float | None, float | None]  # minimum, median, maximum


def _range_of_product(curvature: Rank1) -> Range:
    rows, columns = curvature.factors
    if not rows.size or not columns.size:
        return None, None, None
    return float(rows.min() * columns.min()), None, float(rows.max() * columns.max())


def _zeros(curvature: Rank1) -> int:
    rows, columns = curvature.factors
    return rows.size * columns.size - np.count_nonzero(rows) * np.count_nonzero(columns)


def _range(values: Full | Log8, numel: int, where: str) -> tuple[Range, int]:
    """The range, and how many elements are 0."""
    check, zeros = ValueCheck(), 0
    minimum, maximum = np.float32(np.inf), np.float32(0)
    digits = np.zeros(_DIGIT, np.int64)
    for piece in _pieces(values, numel):
        check.add(piece)
        minimum, maximum = min(minimum, piece.min()), max(maximum, piece.max())
        zeros += int(piece.size - np.count_nonzero(piece))
        digits += np.bincount(_bits(piece) >> 16, minlength=_DIGIT)
    check.finish(where)
    if numel == 0:
        return (None, None, None), 0
    return (float(minimum), _median(values, numel, digits), float(maximum)), zeros


def _median(values: Full | Log8, numel: int, high: np.ndarray) -> float:
    """The element in the middle: numbers >= 0 are ordered as their bits are, of which two digits select it.

    high: int64[65536], how many elements have each upper digit.
    """
    rank = (numel - 1) // 2
    upper = int(np.searchsorted(np.cumsum(high), rank, side="right"))
    rank -= int(high[:upper].sum())
    low = np.zeros(_DIGIT, np.int64)
    for piece in _pieces(values, numel):
        bits = _bits(piece)
        low += np.bincount(bits[bits >> 16 == upper] & 0xFFFF, minlength=_DIGIT)
    lower = int(np.searchsorted(np.cumsum(low), rank, side="right"))
    return float(np.array(upper << 16 | lower, np.uint32).view(np.float32))


def _bits(values: np.ndarray) -> np.ndarray:
    """float32 >= 0 as uint32 of the same order."""
    return np.abs(values).view(np.uint32)  # -0 is 0


def _pieces(values: Full | Log8, numel: int) -> Iterator[np.ndarray]:
    for start in range(0, numel, PIECE_ELEMENTS):
        part = values.slice(start, min(start + PIECE_ELEMENTS, numel))
        yield part.float32()
        release(part)
