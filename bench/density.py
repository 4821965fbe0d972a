"""What an exact density costs over absolute thresholds, and what other ways to the k-th largest cost.

    python -m bench.density [--runs 5] [--densities 0.05,0.3,0.6] [--scores 16777216] [--json]

Whole `ota-merge run` processes on the set of `bench.end_to_end`: the thresholds that a density over the model
found are given to a merge with absolute thresholds, which must write the same bytes. Then the three merges
(thresholds, density over the model, density per tensor) run in turn, every file read once before each run; a
ratio is the median of the ratios within turns. Last, the k-th largest of many scores, by this package and by
torch and numpy.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from ota_kernels.errors import OtaError

from .data import CURVATURE, DEFAULT_FOLDER, WEIGHTS, llama_set
from .end_to_end import OTA_MERGE, Usage, in_child, run_process
from .output import RESULTS, print_table, save_json

_SCOPES = ("thresholds", "model", "tensor")
_REPEATS = 5


def recipe_of(data: Path, density: float, scope: str, thresholds: list[float] | None = None) -> dict:
    """The set's recipe with a density, or with absolute thresholds."""
    recipe = copy.deepcopy(yaml.safe_load((data / "density_model.yaml").read_text()))
    recipe["parameters"] = {} if thresholds else {"density": density, "density_scope": scope}
    for model, threshold in zip(recipe["models"], thresholds or [], strict=bool(thresholds)):
        model["parameters"]["precond_threshold"] = threshold
    return recipe


def merge(recipe: dict, data: Path, out: Path) -> tuple[Usage, dict, str]:
    """(usage, report, digest of the merged weights) of one process, from a warm page cache."""
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    for file in (*data.glob(f"*/{WEIGHTS}"), *data.glob(f"*/{CURVATURE}")):
        digest_of(file, lambda part: None)
    usage = run_process([OTA_MERGE, "run", "-q", str(path), str(out)])
    digest = hashlib.sha256()
    digest_of(out / WEIGHTS, digest.update)
    return usage, json.loads((out / "merge_report.json").read_text()), digest.hexdigest()


def digest_of(file: Path, update: Callable[[bytes], None]) -> None:
    """Read a file, part by part."""
    with file.open("rb", buffering=0) as stream:
        while part := stream.read(1 << 24):
            update(part)


def race(data: Path, folder: Path, density: float, runs: int) -> dict[str, list[Usage]]:
    """Per scope its runs. Raises AssertionError where a density over the model and its thresholds differ."""
    results: dict[str, list[Usage]] = {scope: [] for scope in _SCOPES}

    def once(recipe: dict) -> tuple[Usage, dict, str]:
        with tempfile.TemporaryDirectory(dir=folder, prefix="scratch-") as scratch:
            return merge(recipe, data, Path(scratch) / "merged")

    _, report, exact = once(recipe_of(data, density, "model"))
    thresholds = [expert["threshold"] for expert in report["experts"]]
    recipes = {scope: recipe_of(data, density, scope) for scope in ("model", "tensor")}
    recipes["thresholds"] = recipe_of(data, density, "model", thresholds)
    assert once(recipes["thresholds"])[2] == exact, "a density and its thresholds give different bytes"
    for _ in range(runs):
        for scope in _SCOPES:
            results[scope].append(once(recipes[scope])[0])
    return results


def selections(n: int) -> dict[str, list[float]]:
    """Seconds of each way to the k-th largest of n scores, k = 30 %, taking turns; all must agree."""
    import numpy as np
    import torch

    from ota_kernels import topk_threshold

    rng = np.random.default_rng(0)
    scores = np.exp(4 * rng.standard_normal(n, np.float32))
    tensor, k = torch.from_numpy(scores), n * 3 // 10
    ways = {
        "ota_kernels.topk_threshold": lambda: topk_threshold(scores, k),
        "torch.kthvalue": lambda: float(torch.kthvalue(tensor, n - k + 1).values),
        "torch.topk": lambda: float(torch.topk(tensor, k, sorted=False).values.min()),
        "numpy.partition": lambda: float(np.partition(scores, n - k)[n - k]),
    }
    assert len({way() for way in ways.values()}) == 1, "the ways disagree"
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_REPEATS):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def _rows(density: float, results: dict[str, list[Usage]]) -> list[list[str]]:
    rows = []
    for scope, usages in results.items():
        seconds, processor = [u.seconds for u in usages], [u.processor_seconds for u in usages]
        pairs = list(zip(usages, results["thresholds"], strict=True))
        ratio = statistics.median(u.seconds / base.seconds for u, base in pairs)
        of_processor = statistics.median(u.processor_seconds / base.processor_seconds for u, base in pairs)
        rows.append(
            [
                f"{density} {scope}",
                f"{statistics.median(seconds):.2f}",
                f"{min(seconds):.2f}-{max(seconds):.2f}",
                f"{ratio:.2f}",
                f"{statistics.median(processor):.2f}",
                f"{of_processor:.2f}",
                f"{max(u.peak_bytes for u in usages) / 2**20:.0f}",
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Time exact densities against absolute thresholds.")
    parser.add_argument(
        "--data", type=Path, default=DEFAULT_FOLDER, help="where sets are cached [%(default)s]"
    )
    parser.add_argument("--parameters", type=int, default=250_000_000, help="of each model [%(default)s]")
    parser.add_argument("--hidden", type=int, help="columns of its matrices [what suits its size]")
    parser.add_argument("--densities", default="0.05,0.3,0.6", help="[%(default)s]")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--scores", type=int, default=1 << 24, help="to find the k-th largest of [%(default)s]"
    )
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS / "density.json", help="also write JSON"
    )
    arguments = parser.parse_args()
    try:
        data = in_child(llama_set, arguments.data, arguments.parameters, hidden=arguments.hidden)
    except OtaError as error:
        sys.exit(f"error: {error}")
    merges = {
        float(d): race(data, arguments.data, float(d), arguments.runs) for d in arguments.densities.split(",")
    }
    header = ("density, scope", "median s", "min-max", "over thr.", "processor s", "over thr.", "peak MiB")
    print_table(header, [row for d, results in merges.items() for row in _rows(d, results)])
    seconds = in_child(selections, arguments.scores)
    best = {name: statistics.median(s) for name, s in seconds.items()}
    print_table(
        (f"k-th largest of {arguments.scores}", "median ms", "min-max"),
        [[n, f"{1e3 * best[n]:.0f}", f"{1e3 * min(s):.0f}-{1e3 * max(s):.0f}"] for n, s in seconds.items()],
    )
    if arguments.json:
        figures = {str(d): {s: [u._asdict() for u in r] for s, r in x.items()} for d, x in merges.items()}
        save_json(arguments.json, {"set": data.name, "merges": figures, "selections": seconds})


if __name__ == "__main__":
    main()
