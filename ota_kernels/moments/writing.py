"""The file of second moments: one safetensors file in float32, written piece by piece and published whole.

Tensors are named as parameters; factored moments are <parameter>.exp_avg_sq_row [m] and .exp_avg_sq_col [n],
row and column sums. `__metadata__` has step and beta2 where all parameters agree: a merge corrects one
bias per file, so a file without them cannot be corrected wrongly.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..dtypes import BY_NAME
from ..errors import InputError, OutputError
from ..io.assets import sync_folder
from ..io.header import build_header, quoted
from ..io.reader import FILE_SUFFIX
from .checking import ValueCheck
from .source import FactoredMoment, Moment, Source

ROW_SUFFIX, COLUMN_SUFFIX = ".exp_avg_sq_row", ".exp_avg_sq_col"
_FLOAT32 = BY_NAME["float32"]


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file. parts: (first element, values float32[n]), read one by one."""

    name: str
    shape: tuple[int, ...]
    parts: Iterable[tuple[int, np.ndarray]]


def check_out(out: Path, *, overwrite: bool) -> None:
    """Raise OutputError where `out` cannot become a file of second moments."""
    if out.suffix != FILE_SUFFIX:
        raise OutputError(f"{out}: the output is a safetensors file: let its name end in {FILE_SUFFIX}")
    if os.path.isdir(out):
        raise OutputError(f"{out}: is a folder; name a file")
    if os.path.lexists(out) and not overwrite:
        raise OutputError(f"{out}: exists: choose another name, or add --overwrite")
    if not os.path.isdir(out.parent):
        raise OutputError(f"{out}: its folder does not exist; make it first")


def write_moments(source: Source, out: Path, step: float | None, beta2: float | None, where: str) -> int:
    """Write all second moments of `source` to `out`, which appears when it is whole; returns its bytes.

    step, beta2: what all parameters share. Holds one piece in memory. Raises InputError, naming `where`, for
    a moment that is negative or not finite, OutputError where the disk refuses; then `out` is as it was.
    """
    metadata = {"format": "pt", "source_format": source.format}
    metadata |= {key: _text(n) for key, n in (("step", step), ("beta2", beta2)) if n is not None}
    tensors = [tensor for moment in source.moments for tensor in _tensors(moment)]
    try:
        header, ranges = build_header(((t.name, _FLOAT32, t.shape) for t in tensors), metadata)
    except ValueError as error:
        raise InputError(f"{where}: {error}: every parameter needs a name of its own") from error
    size = ranges[-1][1]
    with _published(out, header, size) as descriptor:
        for tensor, (begin, end) in zip(tensors, ranges, strict=True):
            what = f"{where}: {quoted(tensor.name)}"
            check, position = ValueCheck(), 0
            for start, values in tensor.parts:
                if start != position or values.dtype != np.float32:
                    raise InputError(f"{what}: elements {position} to {start} are missing")
                check.add(values)
                with _refusals(out):
                    _write(descriptor, values.view(np.uint8), begin + start * _FLOAT32.itemsize)
                position += values.size
            if begin + position * _FLOAT32.itemsize != end:
                raise InputError(f"{what}: has {position} second moments for shape {list(tensor.shape)}")
            check.finish(what)
    return size


def _tensors(moment: Moment | FactoredMoment) -> list[_Tensor]:
    if isinstance(moment, Moment):
        parts = ((piece.start, piece.read()) for piece in moment.pieces)
        return [_Tensor(moment.name, moment.shape, parts)]
    rows, columns = moment.shape
    return [
        _Tensor(moment.name + ROW_SUFFIX, (rows,), ((0, read()) for read in (moment.rows,))),
        _Tensor(moment.name + COLUMN_SUFFIX, (columns,), ((0, read()) for read in (moment.columns,))),
    ]


def _text(number: float) -> str:
    """The number as metadata holds it: the shortest text that reads back as the same float."""
    return str(int(number)) if number == int(number) else repr(number)


@contextmanager
def _published(out: Path, header: bytes, size: int) -> Iterator[int]:
    """A descriptor of a new file of `size` bytes that begins with `header`; it is synced and renamed to `out`
    at the end, and removed on any exception."""
    hidden = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    with _refusals(out):
        descriptor = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            with _refusals(out):
                os.posix_fallocate(descriptor, 0, size)
                _write(descriptor, header, 0)
            yield descriptor
            with _refusals(out):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        with _refusals(out):
            os.replace(hidden, out)
            sync_folder(out.parent)
    except BaseException:
        hidden.unlink(missing_ok=True)
        raise


@contextmanager
def _refusals(out: Path) -> Iterator[None]:
    """The disk's refusals to write, as OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{out}: cannot be written: {error.strerror}; make room there, or name another folder"
        ) from error


def _write(descriptor: int, data: bytes | np.ndarray, offset: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
