"""Every case in device memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import copies, densities, merges, surveys
from .timing import Bench, Case, seconds_of


def cases(bench: Bench) -> Iterator[Case]:
    """All but the copies."""
    for group in (merges, densities, surveys):
        yield from group.cases(bench)


def copy_cases(bench: Bench) -> Iterator[Case]:
    """The copies."""
    return copies.cases(bench)


def rows(cases: Iterator[Case], bench: Bench, repeats: int) -> Iterator[dict]:
    """One row per case; one that fails says why."""
    for case in cases:
        row = {"case": case.name, "bytes": case.nbytes}
        try:
            yield row | {"seconds": seconds_of(case.prepare(), repeats, bench.device)}
        except Exception as error:  # whatever is wrong with one case, the others' rows stand
            reason = str(error).strip().splitlines() or [""]
            yield row | {"failed": f"{type(error).__name__}: {reason[0]}"}
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()  # cases differ in the sizes that they ask for
