"""What a merge of files takes, from the bytes that it reads and writes alone."""

from __future__ import annotations

from . import triton
from .triton import bus

CORE = 9e9  # bytes per second of the page cache that a core merges, as measured (bench/RESULTS.md)
FILLING = 12e9  # bytes per second that a core copies into pinned memory, as measured
START = 6.0  # seconds until a GPU works: torch, its context, kernels that compile


def seconds(backend: str, nbytes: int, threads: int, rate: float | None = None) -> float:
    """Estimate for files in the page cache. rate: of the bus to the GPU, where it has been looked for."""
    if backend == triton.NAME and not triton.interpreted():
        rate = bus.bandwidth()[0] if rate is None else rate
        return START + nbytes / min(rate, threads * FILLING)
    return nbytes / (threads * CORE)
