"""What a reader of checkpoints finds: second moments by name, in pieces that are read when written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [start, start + numel) of a parameter in row-major order.

    read: returns them as float32[numel]; its result is dropped once it is written.
    """

    start: int
    numel: int
    read: Callable[[], np.ndarray]


@dataclass(frozen=True, slots=True)
class Moment:
    """The second moments of one parameter, one value per element.

    shape: the parameter's; pieces: cover every element once, ordered by start; step, beta2: of Adam's bias
    correction, None where the checkpoint does not say.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    step: float | None = None
    beta2: float | None = None


@dataclass(frozen=True, slots=True)
class FactoredMoment:
    """The second moments R_i C_j / sum(R) of one matrix, as Adafactor keeps them.

    shape: (m, n); rows: returns row sums R, float32[m]; columns: column sums C, float32[n].
    """

    name: str
    shape: tuple[int, int]
    rows: Callable[[], np.ndarray]
    columns: Callable[[], np.ndarray]
    step: float | None = None
    beta2: float | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """All second moments of one checkpoint.

    format: the name of `--format` that read it; skipped: parameters that the checkpoint knows but has no
    second moments for, with the reason ("frozen", "never stepped"); aliases: name -> the name of the
    parameter whose values it shares; notes: what the user must know of values, or of how names were found.
    """

    format: str
    moments: tuple[Moment | FactoredMoment, ...]
    skipped: dict[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def only(values: Iterable[T]) -> T | None:
    """The one value that all share; None where there are several, or none."""
    found = set(values)
    return found.pop() if len(found) == 1 else None
