"""How many processors there are, and which of them this process stays on."""

from __future__ import annotations

import os

_all: int | None = None  # that the process might run on before `stay_on`


def default_threads() -> int:
    """The processors this process may run on; its share of them, where torchrun has started several here."""
    processors = _all or len(_allowed()) or os.cpu_count() or 1
    return max(processors // int(os.environ.get("LOCAL_WORLD_SIZE") or 1), 1)


def stay_on(processors: set[int]) -> None:
    """Run this thread, and those that it starts, on these of the processors that it may run on; on all, where
    none of these is among them. `default_threads` stays what it was."""
    global _all
    allowed = _allowed()
    if near := allowed & processors:
        _all = _all or len(allowed)
        os.sched_setaffinity(0, near)


def _allowed() -> set[int]:
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set()
