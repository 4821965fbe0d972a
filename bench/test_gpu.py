"""The cases of bench.gpu through pytest-benchmark: python -m pytest bench/test_gpu.py --benchmark-only

Its times are from a call to the moment when the device is done: longer by a launch than those of bench.gpu.
"""

from __future__ import annotations

import itertools

import pytest

from ota_kernels.backends import triton

RUNS_HERE, REASON = triton.verify()
ROUNDS = 1 if triton.interpreted() else 30


@pytest.fixture(scope="module")
def bench():
    from .gpu.timing import Bench

    return Bench.here(quick=triton.interpreted())


@pytest.fixture(scope="module")
def copy_rate(bench) -> float:
    from .gpu.cases import copy_cases, rows
    from .gpu.report import best_rate

    return best_rate(list(rows(copy_cases(bench), bench, ROUNDS)))


def _names() -> list[str]:
    if not RUNS_HERE:
        return []
    from .gpu.cases import cases, copy_cases
    from .gpu.timing import Bench

    bench = Bench.here(quick=True)
    return [case.name for case in (*copy_cases(bench), *cases(bench))]


@pytest.mark.skipif(not RUNS_HERE, reason=REASON)
@pytest.mark.parametrize("name", _names())
def test_case(benchmark, bench, copy_rate: float, name: str) -> None:
    import torch

    from .gpu.cases import cases, copy_cases

    (case,) = (case for case in (*copy_cases(bench), *cases(bench)) if case.name == name)
    calls = itertools.cycle(case.prepare())

    def run() -> None:
        next(calls)()
        if bench.device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = name.partition("-")[0]
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=ROUNDS // 10)
    if benchmark.stats:  # None where benchmarks are disabled: the result is checked all the same
        rate = case.nbytes / benchmark.stats.stats.median
        benchmark.extra_info["gb_per_s"] = round(rate / 1e9, 2)
        benchmark.extra_info["share_of_copy_bandwidth"] = round(rate / copy_rate, 3)
