"""What a matrix takes is what `plan` counts for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from alone import alone

from bench.spectral import FORMULAS, InMemory, check, peak_bytes
from ota_kernels.spectral.algebra import one_thread


def test_the_bench_checks_what_it_times():
    check()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
@alone
def test_memory_of_one_matrix():
    spare = 3 << 20  # of what torch keeps for the next call
    for shape in ((350, 700), (600, 200), (350, 350)):
        edits = InMemory(shape, 5)
        with one_thread():
            for name, formula in FORMULAS.items():
                formula.merged(InMemory((40, 40), 2))  # what the first call loads
                used = peak_bytes(lambda formula=formula, edits=edits: formula.merged(edits))
                assert used < formula.bytes(shape) + spare, (name, shape)
