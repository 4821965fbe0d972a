"""The cases of bench.kernels through pytest-benchmark: python -m pytest bench/ --benchmark-only"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ota_kernels.processors import default_threads
from ota_kernels.run.pool import Pool

from . import bandwidth
from .bandwidth import Bandwidth
from .kernels import CASES, RUNNERS, Workload


@pytest.fixture(scope="session")
def machine() -> Bandwidth:
    return bandwidth.measure(default_threads())


@pytest.fixture(scope="module", params=CASES, ids=str)
def workload(request) -> Iterator[Workload]:
    with Pool(default_threads()) as pool:
        yield Workload(request.param, pool)


@pytest.mark.parametrize("name", RUNNERS)
def test_merge(benchmark, workload: Workload, machine: Bandwidth, name: str) -> None:
    benchmark.group = str(workload.case)
    benchmark.pedantic(workload.runner(name), rounds=7)
    if benchmark.stats:  # None where benchmarks are disabled: the result is checked all the same
        rate = workload.case.nbytes / benchmark.stats.stats.median
        benchmark.extra_info["gb_per_s"] = round(rate / 1e9, 2)
        benchmark.extra_info["share_of_read_bandwidth"] = round(rate / machine.read, 3)
