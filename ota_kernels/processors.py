"""How many processors there are."""

from __future__ import annotations

import os


def default_threads() -> int:
    """The processors this process may run on; its share of them, where torchrun has started several here."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(processors // int(os.environ.get("LOCAL_WORLD_SIZE") or 1), 1)
