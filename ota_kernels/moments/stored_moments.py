"""A file that `extract` wrote, as a source again."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ..errors import InputError
from ..io.curvature import CurvatureFile
from ..tensors.curvature import Full
from .readers.values import Values, read_once
from .source import FactoredMoment, Moment, Source


def stored_source(path: Path, where: str) -> Source:
    """The second moments in a file of them; its buffers keep the file mapped. Raises InputError for one that
    is compressed."""
    file = CurvatureFile.open(path, where)
    moments = [_moment(file, name, where) for name in file.names]
    return Source(file.source_format or "a file", tuple(moments), {})


def _moment(file: CurvatureFile, name: str, where: str) -> Moment | FactoredMoment:
    curvature, shape = file.curvature(name), file.shape(name)
    step = beta2 = None
    with contextlib.suppress(InputError):  # not said
        step, beta2 = file.step_and_beta2(name)
    if isinstance(curvature, Full):
        buffer = curvature.values
        values = Values(len(buffer), lambda start, stop: read_once(buffer.slice(start, stop)))
        return Moment(name, shape, values.pieces(), step, beta2)
    raise InputError(f"{where}: is compressed: lift what `ota-merge moments extract` wrote")
