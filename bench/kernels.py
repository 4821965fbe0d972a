"""Merge kernels on tensors in memory: native against the reference and a plain copy of as many bytes.

    python -m bench.kernels [--only T5] [--repeats 9] [--json]
    python -m bench.kernels --words [--only ties]              every word of tensors/terms.py, native alone
    python -m pytest bench/ --benchmark-only [-k T5]           the same cases through pytest-benchmark

Tiles are spread over all threads as the engine does. GB/s count every byte in and out; the share is of the
read bandwidth that bench.bandwidth measures in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ota_kernels import backends
from ota_kernels.planning.plan import TILE_ELEMENTS
from ota_kernels.planning.resolve import Resolver
from ota_kernels.processors import default_threads
from ota_kernels.recipe.schema import parse_recipe
from ota_kernels.run.decide import Decider
from ota_kernels.run.pool import Pool
from ota_kernels.tensors.buffer import Buffer
from ota_kernels.tensors.curvature import Full, Uniform
from ota_kernels.tensors.dtypes import BY_NAME
from ota_kernels.tensors.terms import Terms
from ota_kernels.tensors.tile import TensorInputs

from . import bandwidth, data
from .bandwidth import Bandwidth
from .output import RESULTS, check_close, print_table, save_json

_COLUMNS = 1024
_SAMPLE = 1 << 16  # elements that are checked, and that estimate thresholds
_COPY_TILE = 1 << 24
RUNNERS = ("native", "reference", "copy")


@dataclass(frozen=True)
class Case:
    """One workload. curvature: None where the method reads none; out: type of the result, of the weights
    unless told; budget: bytes in and out, rounded down to whole rows; by default many times a last-level
    cache of 36 MB. parameters: of the recipe; each: of each model."""

    method: str
    experts: int
    weights: str
    curvature: str | None
    budget: int = 256_000_000
    out: str | None = None
    label: str = ""
    parameters: Mapping[str, object] = field(default_factory=dict, hash=False)
    each: Mapping[str, object] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        types = self.weights if self.curvature is None else f"{self.weights}+{self.curvature}"
        types += "" if self.out is None else f">{self.out}"
        label = f"-{self.label}" if self.label else ""
        return f"{self.method}-T{self.experts}-{types}-{self.elements / 1e6:.0f}M{label}"

    @property
    def has_base(self) -> bool:
        return self.method not in ("linear", "fisher")

    @property
    def result(self) -> str:
        return self.out or self.weights

    @property
    def bytes_per_element(self) -> int:
        moments = 0 if self.curvature is None else self.experts * BY_NAME[self.curvature].itemsize
        inputs = (self.experts + self.has_base) * BY_NAME[self.weights].itemsize
        return inputs + BY_NAME[self.result].itemsize + moments

    @property
    def elements(self) -> int:
        return self.budget // (self.bytes_per_element * _COLUMNS) * _COLUMNS

    @property
    def nbytes(self) -> int:
        """Bytes in and out."""
        return self.elements * self.bytes_per_element


HEADLINE = Case("ota", 5, "bfloat16", "float32", 34 << 25)  # 34 bytes for each of 32 Mi elements

CASES = (
    HEADLINE,
    *(
        Case("ota", experts, weights, curvature)
        for experts in (1, 2, 5, 8, 16)
        for weights in ("bfloat16", "float16", "float32")
        for curvature in ("float32", "bfloat16")
    ),
    *(Case("linear", 5, weights, None) for weights in ("bfloat16", "float16", "float32")),
)


def _word(
    method: str, label: str, curvature: str | None = None, experts: int = 5, out: str | None = None, **keys
):
    each = {
        key: keys.pop(key)
        for key in ("weight", "density", "gamma", "epsilon", "saliency_mass")
        if key in keys
    }
    return Case(method, experts, "bfloat16", curvature, 128_000_000, out, label, keys, each)


_OTA = {"method": "ota", "curvature": "float32"}

# Every word of tensors/terms.py; the first is what the others are compared with.
WORDS = (
    _word(**_OTA, label="thresholds"),
    _word(**_OTA, label="kept weights", mask_weights=False),
    _word(**_OTA, label="power 1", power=1),
    _word(**_OTA, label="power 0.3", power=0.3),
    _word(**_OTA, label="mean", masked_task_vector_merge_method="linear"),
    _word(**_OTA, label="ties", masked_task_vector_merge_method="ties", ties_density=0.5),
    _word(**_OTA, label="float32", out="float32"),
    _word(**_OTA, label="brackets", density=0.3),
    _word(**_OTA, label="mass brackets", saliency_mass=0.9),
    _word("fisher", "curvature", "float32"),
    _word("ffg", "one graft", "float32", experts=1, density=0.3),
    _word("linear", "all"),
    _word("linear", "float32", out="float32"),
    _word("task_arithmetic", "all", weight=0.3),
    _word("ties", "sum", weight=0.3, density=0.3),
    _word("ties", "count", weight=0.3, density=0.3, consensus="count"),
    _word("dare_linear", "random", weight=0.3, density=0.3),
    _word("dare_ties", "random, sum", weight=0.3, density=0.3),
    _word("della_linear", "random by rank", weight=0.3, density=0.5, epsilon=0.1),
    _word("della", "random by rank, sum", weight=0.3, density=0.5, epsilon=0.1),
    _word("breadcrumbs", "between", weight=0.3, density=0.5, gamma=0.01),
    _word("sce", "spread", select_topk=0.3),
    _word("ram", "above"),
    _word("ramplus_tl", "alone"),
    _word("magmax", "largest"),
    _word("consensus", "agreement"),
    _word("localize_stitch", "kept count", density=0.1),
    _word("arcee_fusion", "row magnitude", experts=1),
    _word("nearswap", "clipped", experts=1, t=0.001),
    _word("nuslerp", "two numbers", experts=2, weight=0.5),
    _word("nuslerp", "by row", experts=2, weight=0.5, nuslerp_row_wise=True, nuslerp_flatten=False),
    _word("model_stock", "one number"),
    _word("model_stock", "by row", filter_wise=True),
)


class Workload:
    """The tensors of a case, and what runs over them."""

    def __init__(self, case: Case, pool: Pool) -> None:
        self.case, self._pool = case, pool
        self._inputs, self._terms = _inputs(case, pool)
        self._out = np.empty(case.elements * self._inputs.out_dtype.itemsize, np.uint8)
        self._copied = [np.full(case.nbytes // 2, fill, np.uint8) for fill in (1, 2)]

    def runner(self, name: str) -> Callable[[], None]:
        """What is timed, one of RUNNERS. It has run once: AssertionError says where its result is wrong."""
        return self._checked_copy() if name == "copy" else self._checked_merge(name)

    def _checked_merge(self, name: str) -> Callable[[], None]:
        backend, n, size = backends.select(name), self.case.elements, self._inputs.out_dtype.itemsize

        def merge_tile(start: int) -> None:
            tile = self._inputs.slice(start, min(start + TILE_ELEMENTS, n))
            backend.merge(tile, self._terms, self._out[start * size : (start + tile.numel) * size])

        self._out[:] = 0xFF  # NaN, where nothing is written
        merge = self._spread(merge_tile, range(0, n, TILE_ELEMENTS))
        merge()
        for start in (min(TILE_ELEMENTS, n) - _SAMPLE // 2, n - _SAMPLE):  # over a border of tiles; the end
            tile = self._inputs.slice(start, min(start + _SAMPLE, n))
            expected = np.empty(tile.numel * size, np.uint8)
            backends.select("reference").merge(tile, self._terms, expected)
            actual = self._out[start * size : start * size + expected.size]
            check_close(actual, expected, self.case.result, f"{name}, from {start}")
        return merge

    def _checked_copy(self) -> Callable[[], None]:
        source, target = self._copied

        def copy_tile(start: int) -> None:
            np.copyto(target[start : start + _COPY_TILE], source[start : start + _COPY_TILE])

        copy = self._spread(copy_tile, range(0, source.size, _COPY_TILE))
        copy()
        if not np.array_equal(source, target):
            raise AssertionError("the copy differs")
        return copy

    def _spread(self, task: Callable[[int], None], starts: range) -> Callable[[], None]:
        def run() -> None:
            for _ in self._pool.run(task, starts):
                pass

        return run


def _inputs(case: Case, pool: Pool) -> tuple[TensorInputs, Terms]:
    rng = np.random.default_rng(0)
    shape = (case.elements // _COLUMNS, _COLUMNS)
    dtype = BY_NAME[case.weights]
    w_0 = data.draw_weights(rng, shape, data.BASE_DEVIATION)
    base = Buffer(data.encode(w_0, dtype.name), dtype)
    models, experts, curvatures = [], [], []
    thresholds = case.method == "ota" and not case.each
    for t in range(case.experts):
        edited = w_0 + data.draw_weights(rng, shape, data.EDIT_DEVIATION)
        experts.append(Buffer(data.encode(edited, dtype.name), dtype))
        models.append({"model": f"expert_{t}", "parameters": dict(case.each)})
        if case.curvature is None:
            curvatures.append(Uniform())
            continue
        h = data.draw_curvature(rng, shape, data.draw_factors(rng, _COLUMNS))
        curvatures.append(Full(Buffer(data.encode(h, case.curvature), BY_NAME[case.curvature])))
        models[-1]["parameters"] |= {"preconditioner_path": "curvature"}
        if thresholds:
            w, b = (data.decode(x.slice(0, _SAMPLE).data, dtype.name) for x in (experts[-1], base))
            threshold = data.threshold_of(h.reshape(-1)[:_SAMPLE], w - b)
            models[-1]["parameters"] |= {"precond_threshold": threshold}
    used = base if case.has_base else None
    inputs = TensorInputs("weight", shape, BY_NAME[case.result], used, tuple(experts), tuple(curvatures))
    head = {"merge_method": case.method} | ({"base_model": "base"} if case.has_base else {})
    recipe = parse_recipe(head | {"models": models, "parameters": dict(case.parameters)})
    resolver = Resolver(recipe.slices[0], recipe.method, {})
    settings = {"weight": resolver.settings("weight", ["weight"] * case.experts, 0.0)}
    decider = Decider(recipe.method, [inputs], settings, backends.select("native"), pool)
    return inputs, decider.terms(inputs, decider.decide_model())


def _measure(case: Case, pool: Pool, repeats: int, runners: Sequence[str] = RUNNERS) -> Iterator[dict]:
    """One row per runner; a row that fails says why."""
    workload = Workload(case, pool)
    for name in runners:
        row = {"case": str(case), "runner": name, "bytes": case.nbytes}
        try:
            run, seconds = workload.runner(name), []
            for _ in range(repeats):
                started = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - started)
            yield row | {"seconds": seconds}
        except Exception as error:  # whatever is wrong with one runner, the others' rows stand
            yield row | {"failed": f"{type(error).__name__}: {error}"}


def _cells(row: dict, read: float) -> list[str]:
    label = f"{row['case']} {row['runner']}"
    if "failed" in row:
        return [label, f"failed: {row['failed']}"]
    median = statistics.median(row["seconds"])
    spread = "-".join(f"{1e3 * seconds:.1f}" for seconds in (min(row["seconds"]), max(row["seconds"])))
    rate = row["bytes"] / median
    return [label, f"{1e3 * median:.1f}", spread, f"{rate / 1e9:.1f}", f"{rate / read:.0%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the merge kernels.")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--words", action="store_true", help="the cases of WORDS, by native alone")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS / "kernels.json", help="also write JSON"
    )
    arguments = parser.parse_args()
    threads = default_threads()
    before, rows = bandwidth.measure(threads), []
    with Pool(threads) as pool:
        cases, runners = (WORDS, ("native",)) if arguments.words else (CASES, RUNNERS)
        for case in (case for case in cases if arguments.only in str(case)):
            rows += _measure(case, pool, arguments.repeats, runners)
    # The best seen: noise only ever lowers a bandwidth.
    machine = Bandwidth(*map(max, before, bandwidth.measure(threads)))
    read, copy = (f"{rate / 1e9:.1f} GB/s" for rate in machine)
    print(f"{threads} threads, read bandwidth {read}, copy {copy}")
    print_table(("case", "median ms", "min-max", "GB/s", "of read"), [_cells(r, machine.read) for r in rows])
    if arguments.json:
        save_json(arguments.json, {"threads": threads, "bandwidth": machine._asdict(), "rows": rows})


if __name__ == "__main__":
    main()
