"""The machine's own memory bandwidth, the floor that every kernel is compared with.

    python -m bench.bandwidth

numpy's reductions are bound by arithmetic, not by memory. libc's are not: memchr for a byte that never occurs
streams one array, memcmp of two equal halves streams two, both through ctypes, which releases the GIL. The
best of both and of all repeats is the read bandwidth. The copy is numpy's, reads and writes counted.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ota_kernels.processors import default_threads

BYTES = 1 << 29  # far more than any last-level cache
_REPEATS = 12

_libc = ctypes.CDLL(None)
_libc.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
_libc.memchr.restype = ctypes.c_void_p
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


class Bandwidth(NamedTuple):
    """Bytes per second of all threads together; a copy counts what it reads and what it writes."""

    read: float
    copy: float


def measure(threads: int) -> Bandwidth:
    """Best of several passes over 512 MiB."""
    # Pages that were never written all map to one physical page, which would be read from the cache.
    parts = np.array_split(np.full(BYTES, 1, np.uint8), threads)
    with ThreadPoolExecutor(threads) as pool:
        rates = [_best(pool, parts, task) for task in (_scan, _compare_halves, _copy_half)]
    return Bandwidth(max(rates[:2]), rates[2])


def _best(pool: ThreadPoolExecutor, parts: list[np.ndarray], task: Callable[[np.ndarray], None]) -> float:
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        list(pool.map(task, parts))
        seconds.append(time.perf_counter() - started)
    return BYTES / min(seconds)


def _scan(part: np.ndarray) -> None:
    if _libc.memchr(part.ctypes.data, 0, part.nbytes) is not None:
        raise AssertionError("the scan stopped early")


def _compare_halves(part: np.ndarray) -> None:
    half = part.nbytes // 2
    if _libc.memcmp(part.ctypes.data, part.ctypes.data + half, half) != 0:
        raise AssertionError("the comparison stopped early")


def _copy_half(part: np.ndarray) -> None:
    half = part.nbytes // 2
    np.copyto(part[half : 2 * half], part[:half])


if __name__ == "__main__":
    for count in sorted({1, default_threads()}):
        found = measure(count)
        print(f"{count} thread(s): read {found.read / 1e9:.1f} GB/s, copy {found.copy / 1e9:.1f} GB/s")
