"""What a case is, and how long its calls take."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ota_kernels.backends.triton import on

COLUMNS = 1024  # of the matrices that elements are drawn as
_SIZE = 4_000_000_000  # bytes of a call: a millisecond of the fastest memory, many times a call's launches
_SHARE = 34  # of the device's memory: for smaller ones, as densities take four times as much, twice
_QUICK_SIZE = 70_000  # two rows of it
_WARM_UP = 3  # calls before those that are timed
_CACHES = 4  # last-level caches that the rotating sets fill together

Call = Callable[[], object]


@dataclass(frozen=True)
class Bench:
    """Where and how much. size: bytes in and out of one call, about; rotate: whether to use so many sets of
    inputs that none of them is in the cache when its turn comes (else one)."""

    device: torch.device
    size: int
    rotate: bool = True

    @classmethod
    def here(cls, quick: bool, size: int | None = None) -> Bench:
        """On the current GPU, or in Triton's interpreter; quick: as little as runs every kernel."""
        device = on().device
        if quick:
            return cls(device, _QUICK_SIZE, rotate=False)
        return cls(
            device, size or min(_SIZE, torch.cuda.get_device_properties(device).total_memory // _SHARE)
        )

    def larger(self, times: int) -> Bench:
        """With calls of so many times the bytes: where a call waits for the device, or launches much."""
        return replace(self, size=self.size * times) if self.rotate else self

    def rows(self, bytes_per_element: int) -> int:
        """Rows of COLUMNS elements that make up the size."""
        return max(1, self.size // (bytes_per_element * COLUMNS))

    def sets(self, nbytes: int) -> int:
        """Sets of inputs for a call of so many bytes."""
        if self.device.type != "cuda" or not self.rotate:
            return 1
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return max(2, -(-_CACHES * cache // nbytes))


@dataclass(frozen=True)
class Case:
    """One row. nbytes: in and out of one call; prepare: draws the inputs, checks the result of each call
    (AssertionError says what is wrong) and returns the calls, one for each set of inputs; elements: of one
    call's result, and variant: of tools/compile_kernels.py, where it is one launch of that."""

    name: str
    nbytes: int
    prepare: Callable[[], Sequence[Call]]
    elements: int = 0
    variant: str = ""

    def __str__(self) -> str:
        return self.name


def seconds_of(calls: Sequence[Call], repeats: int, device: torch.device) -> list[float]:
    """Seconds of each of `repeats` calls, which take turns.

    On a GPU they are launched back to back, so that the launches of one hide behind the work of those before.
    """
    turns = itertools.cycle(calls)
    for _ in range(min(_WARM_UP, repeats - 1)):
        next(turns)()
    timed = _between_events if device.type == "cuda" else _by_clock
    return timed([next(turns) for _ in range(repeats)])


def _between_events(calls: Sequence[Call]) -> list[float]:
    marks = []
    for call in calls:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in marks]


def _by_clock(calls: Sequence[Call]) -> list[float]:
    seconds = []
    for call in calls:
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return seconds
