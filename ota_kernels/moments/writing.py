"""The file of second moments: one safetensors file in float32, written piece by piece and published whole.

Tensors are named as parameters; factored moments are <parameter>.exp_avg_sq_row [m] and .exp_avg_sq_col [n],
row and column sums. `__metadata__` has step and beta2 where all parameters agree: a merge corrects one
bias per file, so a file without them cannot be corrected wrongly.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..io.header import quoted
from ..io.new_file import NewFile, new_file
from ..io.stored import COLUMN, ROW
from ..tensors.dtypes import BY_NAME
from .checking import ValueCheck
from .source import FactoredMoment, Moment, Source

_FLOAT32 = BY_NAME["float32"]


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file. parameter: whose moments it holds; parts: (first element, values float32[n]),
    read one by one."""

    name: str
    parameter: str
    shape: tuple[int, ...]
    parts: Iterable[tuple[int, np.ndarray]]


@dataclass(frozen=True)
class Written:
    """nbytes: of the file; zeros: the parameters all of whose second moments are 0."""

    nbytes: int
    zeros: tuple[str, ...]


def write_moments(source: Source, out: Path, step: float | None, beta2: float | None, where: str) -> Written:
    """Write all second moments of `source` to `out`, which appears when it is whole.

    step, beta2: what all parameters share. Holds one piece in memory. Raises InputError, naming `where`, for
    a moment that is negative or not finite, and where all of them are 0; OutputError where the disk refuses.
    Then `out` is as it was.
    """
    metadata = {"format": "pt", "source_format": source.format}
    metadata |= {key: _text(n) for key, n in (("step", step), ("beta2", beta2)) if n is not None}
    tensors = [tensor for moment in source.moments for tensor in _tensors(moment)]
    twice = [name for name, count in Counter(tensor.name for tensor in tensors).items() if count > 1]
    if twice:
        raise InputError(f"{where}: {quoted(twice[0])} occurs twice: every parameter needs a name of its own")
    with new_file(out, [(t.name, _FLOAT32, t.shape) for t in tensors], metadata) as new:
        zeros = [t.parameter for t in tensors if not _write(t, new, f"{where}: {quoted(t.name)}")]
        if zeros and len(zeros) == sum(math.prod(tensor.shape) > 0 for tensor in tensors):
            raise InputError(
                f"{where}: all second moments are 0, as before an optimizer's first step, or where a resumed "
                "run lost its state: they know nothing; extract from another checkpoint"
            )
        return Written(new.size, tuple(dict.fromkeys(zeros)))


def _write(tensor: _Tensor, new: NewFile, what: str) -> bool:
    """Whether some element is not 0, or there is none."""
    check, position = ValueCheck(), 0
    for start, values in tensor.parts:
        if start != position or values.dtype != np.float32:
            raise InputError(f"{what}: elements {position} to {start} are missing")
        check.add(values)
        new.write(tensor.name, start, values)
        position += values.size
    if position != math.prod(tensor.shape):
        raise InputError(f"{what}: has {position} second moments for shape {list(tensor.shape)}")
    check.finish(what)
    return check.some or position == 0


def _tensors(moment: Moment | FactoredMoment) -> list[_Tensor]:
    if isinstance(moment, Moment):
        parts = ((piece.start, piece.read()) for piece in moment.pieces)
        return [_Tensor(moment.name, moment.name, moment.shape, parts)]
    rows, columns = moment.shape
    return [
        _Tensor(f"{moment.name}.{ROW}", moment.name, (rows,), ((0, read()) for read in (moment.rows,))),
        _Tensor(
            f"{moment.name}.{COLUMN}", moment.name, (columns,), ((0, read()) for read in (moment.columns,))
        ),
    ]


def _text(number: float) -> str:
    """The number as metadata holds it: the shortest text that reads back as the same float."""
    return str(int(number)) if number == int(number) else repr(number)
