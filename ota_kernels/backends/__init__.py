"""The backends, and which of them runs."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from ..errors import BackendError, RecipeError
from ..sizes import format_bytes
from . import triton
from .speed import seconds
from .triton import bus

if TYPE_CHECKING:
    import numpy as np

    from ..tensors.curvature import Curvature
    from ..tensors.result import Around, MergeStats, NonFinite
    from ..tensors.terms import ExpertTerms, Terms
    from ..tensors.tile import TensorInputs

logger = logging.getLogger(__name__)

NAMES = ("triton", "native", "reference")  # the fastest first
_ON_CPU = ("native", "reference")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+(,\d+)*)?")


class Backend(Protocol):
    """What computes: a module (native, reference), or an object bound to one device (triton). All functions
    are over one tile of one tensor, and may be called by many threads at once."""

    NAME: str

    def verify(self) -> tuple[bool, str]:
        """(ok, reason): whether it can run here."""

    def release(self) -> None:
        """Give up memory that is kept for the next tiles."""

    def merge(self, tile: TensorInputs, terms: Terms, out: np.ndarray) -> MergeStats: ...

    def histogram(
        self,
        tile: TensorInputs,
        t: int,
        terms: ExpertTerms,
        of_edits: bool,
        prefix: int,
        counts: np.ndarray,
        lows: np.ndarray,
    ) -> tuple[NonFinite, ...]: ...

    def edits(
        self, tile: TensorInputs, t: int, terms: ExpertTerms
    ) -> tuple[np.ndarray, tuple[NonFinite, ...]]: ...

    def scores(
        self, tile: TensorInputs, t: int, terms: ExpertTerms
    ) -> tuple[np.ndarray, tuple[NonFinite, ...]]: ...

    def around(
        self, tile: TensorInputs, t: int, terms: ExpertTerms, intervals: Sequence[tuple[float, float]]
    ) -> tuple[Around, tuple[NonFinite, ...]]: ...

    def power_sum(self, tile: TensorInputs, t: int, power: float) -> tuple[float, tuple[NonFinite, ...]]: ...

    def row_column_sums(self, matrix: Curvature, row_sums: np.ndarray, column_sums: np.ndarray) -> None: ...


def check_device(device: str) -> None:
    """RecipeError unless `device` is auto, cpu, cuda, cuda:N, or several of these (cuda:0,2)."""
    if not _DEVICE.fullmatch(device):
        raise RecipeError(f"unknown device {device!r}: choose auto, cpu, cuda, cuda:N or cuda:N,M")
    _, _, numbers = device.partition(":")
    if len(set(numbers.split(","))) <= numbers.count(","):
        raise RecipeError(f"device {device!r} names one twice: a GPU works for one process")


def select(name: str = "auto", device: str = "auto", python: bool = False) -> Backend:
    """The backend of that name on that device; where both are "auto", the fastest that runs here. python: for
    a method that is a function of torch tensors, which `reference` runs.

    device: "auto", "cpu", "cuda" or "cuda:N". torch and triton are imported only for a backend that was asked
    for, or where a GPU is in sight. Raises BackendError with the reason when what was asked for cannot run.
    """
    if name != "auto" and name not in NAMES:
        raise BackendError(f"unknown backend {name!r}: choose auto, {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    check_device(device)
    if "," in device:
        raise BackendError(f"{device} takes a process for each: `ota-merge run` starts them, or torchrun")
    if python:
        if name not in ("auto", "reference") or device.startswith("cuda"):
            raise BackendError(
                f"a method of a Python function runs by the reference backend on the CPU, not by {name} "
                f"on {device}"
            )
        name = "reference"
    on_gpu = device.startswith("cuda")
    if on_gpu and name in _ON_CPU:
        raise BackendError(
            f"backend {name!r} runs on the CPU, not on {device}: choose triton, or leave out the device"
        )
    candidates = (name,)
    if name == "auto":
        candidates = ("triton",) if on_gpu else _ON_CPU if device == "cpu" else NAMES
    passed_over: list[str] = []
    for candidate in candidates:
        ok, reason = _verify(candidate, device, asked_for=len(candidates) == 1)
        if ok:
            others = f"; not {'; not '.join(passed_over)}" if passed_over else ""
            logger.info("backend: %s (%s)%s", candidate, reason, others)
            return triton.on(device) if candidate == "triton" else _module(candidate)
        passed_over.append(f"{candidate}: {reason}")
    if len(candidates) > 1:
        raise BackendError(f"no backend can run here ({'; '.join(passed_over)})")
    where = "" if device == "auto" else f" (--device {device})"
    hint = "; `native` runs on the CPU" if candidates == ("triton",) else ""
    raise BackendError(f"backend {candidates[0]!r}{where} cannot run: {reason}{hint}")


def for_files(
    name: str = "auto", device: str = "auto", python: bool = False, *, nbytes: int, threads: int
) -> Backend:
    """As `select`, for inputs in files, of which all `nbytes` must cross the bus to a GPU: where both
    are "auto", a GPU is taken only if it would be done before `threads` threads of this machine are."""
    if name == device == "auto" and not python and triton.gpu_in_sight()[0]:
        rate, known = bus.bandwidth()
        by_cpu, on_gpu = seconds("native", nbytes, threads), seconds("triton", nbytes, threads, rate)
        device, other = ("cpu", "cuda") if by_cpu <= on_gpu else ("auto", "cpu")
        logger.info(
            f"files of {format_bytes(nbytes)}: {by_cpu:.2g} s on {threads} threads, {on_gpu:.2g} s on a GPU, "
            f"by a bus of {rate / 1e9:.0f} GB/s ({known}) with its start; --device {other} takes the other"
        )
    return select(name, device, python)


def _verify(name: str, device: str, asked_for: bool) -> tuple[bool, str]:
    if name != "triton":
        return _module(name).verify()
    in_sight, reason = (True, "") if asked_for else triton.gpu_in_sight()
    return triton.verify(device) if in_sight else (False, reason)


def _module(name: str) -> Backend:
    return importlib.import_module(f"{__name__}.{name}")
