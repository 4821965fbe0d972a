"""What rows of whole matrices take: time and memory of one matrix, on one thread.

    python -m bench.spectral [--shapes 1024x1024,1024x4096] [--experts 5] [--runs 3] [--json]

Formulas alone, on edits in memory; a merge gives each thread a matrix of its own. Seconds are the
processor's, which others on the machine lengthen least; those per billion parameters are of a model of such
matrices. Checked before: the singular values of what iso_c makes are all equal, and one expert's tsv and svc
are the expert. Memory: what the process held at most beyond the edits, beside what `plan` counts for it.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ota_kernels.spectral import formulas
from ota_kernels.spectral.algebra import one_thread
from ota_kernels.spectral.formulas import Edits, Formula

from .output import RESULTS, print_table, save_json

FORMULAS: dict[str, Formula] = {
    "tsv": Formula(formulas.tsv),
    "iso_c": Formula(formulas.iso_c),
    "iso_cts": Formula(lambda edits: formulas.iso_cts(edits, 8 * min(edits.shape) // 10)),
    "covariance": Formula(lambda edits: formulas.covariance(edits, by_norm=False), by_columns=True),
    "opcm": Formula(lambda edits: formulas.opcm(edits, 0.5)),
    "svc": Formula(lambda edits: formulas.svc(edits[0], edits, 1 / len(edits))),
}


class InMemory:
    """Edits of normal elements; each a new array whenever it is asked for, as a merge reads them."""

    def __init__(self, shape: tuple[int, int], experts: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.shape = shape
        self._edits = [torch.randn(shape, generator=generator) for _ in range(experts)]

    def __len__(self) -> int:
        return len(self._edits)

    def __getitem__(self, t: int) -> torch.Tensor:
        return self._edits[t].double()


class Case(NamedTuple):
    seconds: list[float]
    peak_bytes: int
    planned_bytes: int


def check() -> None:
    """Raises AssertionError where a formula does not do what it says."""
    edits, one = InMemory((60, 90), 3), InMemory((60, 90), 1)
    lengths = torch.linalg.svdvals(FORMULAS["iso_c"].merged(edits))
    torch.testing.assert_close(lengths, lengths.mean().expand(60))
    for name in ("tsv", "svc"):
        torch.testing.assert_close(FORMULAS[name].merged(one), one[0])


def peak_bytes(run: Callable[[], object]) -> int:
    """What the process holds at most during a call, beyond what it held before (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def measure(name: str, edits: Edits, runs: int) -> Case:
    formula = FORMULAS[name]
    with one_thread():
        peak = peak_bytes(lambda: formula.merged(edits))
        seconds = []
        for _ in range(runs):
            begun = time.thread_time()
            formula.merged(edits)
            seconds.append(time.thread_time() - begun)
    return Case(seconds, peak, formula.bytes(edits.shape))


def _row(name: str, shape: tuple[int, int], case: Case) -> list[str]:
    median = statistics.median(case.seconds)
    return [
        name,
        "x".join(map(str, shape)),
        f"{median:.2f}",
        f"{min(case.seconds):.2f}-{max(case.seconds):.2f}",
        f"{median * 1e9 / (shape[0] * shape[1]):.0f}",
        f"{case.peak_bytes / 2**20:.0f}",
        f"{case.planned_bytes / 2**20:.0f}",
    ]


def _shape(text: str) -> tuple[int, int]:
    rows, columns = text.split("x")
    return int(rows), int(columns)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the formulas of whole matrices.")
    parser.add_argument("--shapes", default="512x512,512x2048,1024x1024", help="[%(default)s]")
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS / "spectral.json", help="also write JSON"
    )
    arguments = parser.parse_args()
    check()
    rows, found = [], []
    for shape in map(_shape, arguments.shapes.split(",")):
        edits = InMemory(shape, arguments.experts)
        for name in FORMULAS:
            case = measure(name, edits, arguments.runs)
            rows.append(_row(name, shape, case))
            found.append({"method": name, "shape": shape, **case._asdict()})
    head = ["method", "matrix", "CPU s", "min-max", "CPU s per 1e9", "peak MiB", "planned MiB"]
    print_table(head, rows)
    if arguments.json:
        save_json(arguments.json, {"cases": found})


if __name__ == "__main__":
    main()
