"""Every case in device memory."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from . import calls, copies, densities, merges, surveys
from .device import clock
from .timing import Bench, Case, seconds_of


def cases(bench: Bench) -> Iterator[Case]:
    """All but the copies, the most telling first."""
    for group in (merges, densities, calls, surveys):
        yield from group.cases(bench)
    yield from copies.other_cases(bench)


def copy_cases(bench: Bench) -> Iterator[Case]:
    """The copies."""
    return copies.cases(bench)


def rows(cases: Iterator[Case], bench: Bench, repeats: int, until: float = float("inf")) -> Iterator[dict]:
    """One row per case; one that fails says why, and one that would begin after `until` (time.monotonic) that
    it was not run. megahertz: of the multiprocessors, right after the calls."""
    for case in cases:
        row = {"case": case.name, "bytes": case.nbytes, "elements": case.elements, "variant": case.variant}
        if time.monotonic() >= until:
            yield row | {"skipped": "no time was left"}
            continue
        try:
            seconds = seconds_of(case.prepare(), repeats, bench.device)
            yield row | {"seconds": seconds, "megahertz": clock(bench.device)}
        except Exception as error:  # whatever is wrong with one case, the others' rows stand
            reason = str(error).strip().splitlines() or [""]
            yield row | {"failed": f"{type(error).__name__}: {reason[0]}"}
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()  # cases differ in the sizes that they ask for
