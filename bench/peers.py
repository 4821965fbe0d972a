"""Whole processes: mergekit 0.1.5 and this package on the same files and recipes.

    tools/setup_mergekit.sh
    python -m bench.peers [--only ties,slerp] [--parameters 250000000] [--runs 3] [--cores 2] [--json]

Each recipe is first merged by this package, which warms the page cache, then once by mergekit; the results
are compared, and this package merges `--runs` times more. mergekit, up to a minute a row and far more than
its own spread, is measured once: the table is meant to take 10 to 15 minutes on two quiet cores. A ratio is
mergekit's time over that of one run. Both see the same processors, and nothing but weights is written. Times
of a machine that does something else mean nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from safetensors import safe_open

from ota_kernels.errors import OtaError
from ota_kernels.sizes import format_bytes

from .data import DEFAULT_FOLDER, WEIGHTS, llama_set
from .end_to_end import OTA_MERGE, Usage, run_process
from .mergekit import PLAIN, Case, program
from .output import RESULTS, print_table, save_json

_GIB = 1 << 30


class Peer(NamedTuple):
    """A recipe that both run. apart: the share of elements that may differ by more than a bfloat16 unit, as
    mergekit computes in bfloat16 and chooses among equals as its sort likes; of random methods: how far the
    lengths of the merged edits may be apart; target: how many times faster this package is meant to be.

    Among equals: where a share c of an expert's differences equals a threshold and f of these are kept, two
    free choices differ in 2 f (1 - f) c of its elements. Of these models, over five experts and both ends of
    breadcrumbs, that is 15.0 %; 1.1 % of the other elements differ by rounding (bench/NOTES.md)."""

    case: Case
    apart: float
    target: float


_W = {"weight": 1.0}
_SPARSE = _W | {"density": 0.3}
PEERS = (
    Peer(Case("linear", own=_W, experts=5, base=""), 0.0, 8),
    Peer(Case("task_arithmetic", own={"weight": 0.3}, experts=5), 0.05, 8),
    Peer(Case("slerp", {"t": 0.4}, experts=1), 0.001, 8),
    Peer(Case("ties", own=_SPARSE, experts=5), 0.1, 40),
    Peer(Case("dare_ties", own=_SPARSE, experts=5, drawn=True), 0.02, 25),
    Peer(Case("sce", {"select_topk": 0.3}, experts=5), 0.01, 25),
    Peer(Case("breadcrumbs", own=_SPARSE, experts=5), 0.17, 25),
    Peer(Case("karcher", experts=5, base=""), 0.05, 10),
    Peer(Case("multislerp", own=_W, experts=5), 0.025, 10),
    Peer(Case("model_stock", experts=5), 0.01, 10),
    Peer(Case("della", own=_SPARSE | {"epsilon": 0.1}, experts=5, drawn=True), 0.02, 10),
)


def _pairs(one: Path, other: Path, base: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The tensors of two merged models and their base, one by one, in float32."""
    holders = {}
    for folder in (one, other):
        for file in sorted(folder.glob("model*.safetensors")):
            with safe_open(file, "pt") as opened:
                holders |= {(folder, name): file for name in opened.keys()}  # noqa: SIM118 (not a dict)
    names = [name for folder, name in holders if folder == one]
    assert {name for folder, name in holders if folder == other} == set(names), "other tensors are written"
    with safe_open(base / WEIGHTS, "pt") as of_base:
        for name in names:
            found = []
            for folder in (one, other):
                with safe_open(holders[folder, name], "pt") as opened:
                    found.append(opened.get_tensor(name).float())
            yield (*found, of_base.get_tensor(name).float())


def difference(peer: Peer, ours: Path, theirs: Path, base: Path) -> float:
    """The share of elements more than a bfloat16 unit apart; of a random method the relative difference of
    the lengths of the merged edits. AssertionError where it is more than `apart`."""
    elements = wrong = 0
    lengths = [0.0, 0.0]
    for a, b, w in _pairs(ours, theirs, base):
        _, exponent = torch.frexp(torch.maximum(a.abs(), b.abs()))
        wrong += int(((a - b).abs() > torch.ldexp(torch.ones_like(a), exponent - 8)).sum())
        elements += a.numel()
        lengths = [total + float((x - w).abs().sum()) for total, x in zip(lengths, (a, b), strict=True)]
    found = abs(lengths[0] / lengths[1] - 1) if peer.case.drawn else wrong / elements
    assert found <= peer.apart, f"{peer.case.label}: {found:.2%} apart, at most {peer.apart:.2%} expected"
    return found


class Measured(NamedTuple):
    """One recipe. ours: run by run."""

    peer: Peer
    difference: float
    ours: list[Usage]
    theirs: Usage

    @property
    def ratios(self) -> list[float]:
        return sorted(self.theirs.seconds / a.seconds for a in self.ours)

    @property
    def cells(self) -> list[str]:
        ratios = self.ratios
        peaks = [max(u.peak_bytes for u in self.ours), self.theirs.peak_bytes]
        seconds = [statistics.median(u.seconds for u in self.ours), self.theirs.seconds]
        spread = f"{ratios[0]:.1f} to {ratios[-1]:.1f}"
        return [self.peer.case.label, f"{self.difference:.2%}", *(f"{s:.2f}" for s in seconds),
                f"{statistics.median(ratios):.1f}", spread, f"{self.peer.target:g}",
                *map(format_bytes, peaks)]  # fmt: skip


HEADER = ("recipe", "apart", "ours, s", "mergekit, s", "ratio", "spread", "target", "our peak", "its peak")


def measure(peer: Peer, models: Path, scratch: Path, runs: int) -> Measured:
    """Merge by both, compare, and measure this package `runs` times."""
    recipe = scratch / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(peer.case.recipe(models, "bfloat16"), sort_keys=False))
    ours, theirs = scratch / "ours", scratch / "theirs"
    commands = {
        ours: [OTA_MERGE, "run", "-q", str(recipe), str(ours)],
        theirs: [program("mergekit-yaml"), str(recipe), str(theirs), "--quiet", *PLAIN],
    }
    for out in commands:
        shutil.rmtree(out, ignore_errors=True)  # of a recipe that failed
    run_process(commands[ours])
    of_theirs = run_process(commands[theirs])
    # In a process of its own: the peak of a process that is started counts what its parent holds then.
    with ProcessPoolExecutor(1, get_context("spawn")) as comparing:
        found = comparing.submit(difference, peer, ours, theirs, models / "base").result()
    used = []
    for _ in range(runs):
        shutil.rmtree(ours)
        used.append(run_process(commands[ours]))
    return Measured(peer, found, used, of_theirs)


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--only", help="methods, with commas between them")
    parser.add_argument("--parameters", type=int, default=250_000_000, help="of each of the five experts")
    parser.add_argument("--runs", type=int, default=3, help="measurements of this package")
    parser.add_argument("--cores", type=int, default=2, help="processors that both may use")
    parser.add_argument("--json", action="store_true", help="store the figures in bench/results")
    args = parser.parse_args()
    only = args.only.split(",") if args.only else None
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    models = llama_set(DEFAULT_FOLDER, args.parameters)
    rows, failed = [], []
    with tempfile.TemporaryDirectory(dir=DEFAULT_FOLDER) as scratch:
        for peer in PEERS:
            if only is not None and peer.case.method not in only:
                continue
            try:
                rows.append(measure(peer, models, Path(scratch), args.runs))
            except (AssertionError, RuntimeError, OtaError) as error:
                failed.append([peer.case.label, str(error)])
            print(peer.case.label, file=sys.stderr)
    print_table(HEADER, [*(row.cells for row in rows), *failed])
    large = [r.peer.case.label for r in rows if max(u.peak_bytes for u in r.ours) > _GIB]
    if large:
        print(f"more than 1 GiB: {'; '.join(large)}")
    if args.json:
        save_json(RESULTS / "peers.json", {"parameters": args.parameters, "experts": 5, "cores": args.cores,
                  "rows": {r.peer.case.label: dict(zip(HEADER[1:], r.cells[1:], strict=True))
                           for r in rows}})  # fmt: skip
    return bool(failed or large)


if __name__ == "__main__":
    sys.exit(main())
