"""Whole processes: `ota-merge run` against its reference backend and against plain torch.

    python -m bench.end_to_end [--recipe threshold] [--only native] [--runs 5] [--cold] [--json]

Each contender first merges once: its result is checked, and the page cache is warm. Then they run in turn,
A B C A B C, so that a slow moment of the machine hits all of them. Outputs are deleted after every run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import yaml

from ota_kernels.errors import OtaError

from .data import CURVATURE, DEFAULT_FOLDER, WEIGHTS, llama_set
from .output import RESULTS, check_close, print_table, save_json

_ROOT = Path(__file__).parent.parent
OTA_MERGE = str(Path(sys.executable).parent / "ota-merge")
_CONTENDERS = {
    "native": [OTA_MERGE, "run", "-q", "--backend", "native"],
    # Plain torch holds whole tensors, so its temporaries do not fit the default limit with every recipe.
    "reference": [OTA_MERGE, "run", "-q", "--backend", "reference", "--memory-limit", "4GiB"],
    "plain torch": [sys.executable, "-m", "bench.plain_torch"],
}
_RECIPES = ("threshold", "density_model", "density_tensor", "linear")
_STARTS = 11
_CHECKED_ROWS = 16
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


class Usage(NamedTuple):
    """One process. processor_seconds: of all its threads, the kernel's included; peak_bytes: resident, mapped
    files included; disk_bytes: read from the disk; sync_seconds: waiting for the disk to have the output (0
    where the process does not)."""

    seconds: float
    processor_seconds: float
    peak_bytes: int
    disk_bytes: int
    sync_seconds: float = 0.0


def run_process(command: list[str]) -> Usage:
    """Run a command to its end. Raises RuntimeError with the last line of its stderr if it fails."""
    with tempfile.TemporaryFile("w+", errors="replace") as stderr:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, cwd=_ROOT)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)  # reaped above, where Popen cannot see it
        if process.returncode:
            stderr.seek(0)
            lines = stderr.read().strip().splitlines()
            raise RuntimeError(lines[-1] if lines else f"exit code {process.returncode}")
    # Linux counts memory in KiB, and disk reads (read_bytes of /proc/PID/io) in blocks of 512 bytes.
    processor_seconds = usage.ru_utime + usage.ru_stime
    return Usage(seconds, processor_seconds, usage.ru_maxrss * 1024, usage.ru_inblock * 512)


def in_child(task: Callable, *arguments, **named):
    """Run in a process of its own: Linux starts a child's peak memory at its parent's, which stays small."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(task, *arguments, **named).result()


def check_merge(recipe: dict, out: Path) -> None:
    """Compare some rows of every merged tensor with the reference backend on the same rows, at the thresholds
    of merge_report.json (or else the recipe's). Raises AssertionError."""
    import torch
    from safetensors import safe_open

    from ota_kernels import merge_tensors
    from ota_kernels.backends import reference
    from ota_kernels.io.curvature import CurvatureFile
    from ota_kernels.planning.plan import TILE_ELEMENTS

    def ranges(n: int, columns: int = 1) -> list[tuple[int, int]]:
        """Rows about the first border of two tiles, where the tensor has one, and the end."""
        border = TILE_ELEMENTS // columns
        found = ((border - _CHECKED_ROWS, border + _CHECKED_ROWS), (n - _CHECKED_ROWS, n))
        return [(max(0, start), min(stop, n)) for start, stop in found if start < n]

    def rows(path: Path, name: str) -> torch.Tensor:
        part = safe_open(path, framework="pt").get_slice(name)
        return torch.cat([part[start:stop] for start, stop in ranges(*part.get_shape())])

    def moments(file: CurvatureFile, name: str) -> torch.Tensor:
        whole, (_, *columns) = file.curvature(name), file.shape(name)
        size = (columns or [1])[0]
        parts = [(start * size, stop * size) for start, stop in ranges(*file.shape(name))]
        found = [reference.curvature(whole.slice(start, stop), stop - start) for start, stop in parts]
        return torch.cat(found).reshape(-1, *columns)

    experts = [Path(model["model"]) for model in recipe["models"]]
    names = safe_open(experts[0] / WEIGHTS, framework="pt").keys()
    report = _report(out)
    paths = [Path(x["parameters"]["preconditioner_path"]) for x in recipe["models"] if "parameters" in x]
    files = [CurvatureFile.open(path, path.name) for path in paths]
    for name in names:
        base = curvatures = None
        parameters = {}
        if recipe["merge_method"] == "ota":
            base = rows(Path(recipe["base_model"]) / WEIGHTS, name)
            curvatures = [moments(file, name) for file in files]
            by_recipe = [model["parameters"].get("precond_threshold") for model in recipe["models"]]
            thresholds = report["tensors"][name]["thresholds"] if report else by_recipe
            parameters = {"precond_threshold": [x or 0.0 for x in thresholds]}
        weights = [rows(e / WEIGHTS, name) for e in experts]
        method = recipe["merge_method"]
        expected = merge_tensors(base, weights, curvatures, method=method, backend="reference", **parameters)
        pair = (
            t.contiguous().view(torch.uint8).numpy().reshape(-1)
            for t in (rows(out / WEIGHTS, name), expected)
        )
        check_close(*pair, "bfloat16", name)


def _report(out: Path) -> dict | None:
    path = out / "merge_report.json"
    return json.loads(path.read_text()) if path.exists() else None


def race(names: Sequence[str], recipe_path: Path, folder: Path, runs: int, cold: bool) -> dict[str, dict]:
    """Per named contender its "runs" (Usage), and where it failed the reason ("failed"). Outputs live in
    `folder`, which should be on the inputs' disk, for as long as a run does."""
    recipe = yaml.safe_load(recipe_path.read_text())
    results: dict[str, dict] = {name: {"runs": []} for name in names}
    for turn in range(1 + runs):
        for name, result in results.items():
            if "failed" in result:
                continue
            os.sync()  # what others wrote is not this one's work
            if cold and turn:
                DROP_CACHES.write_text("3")
            with tempfile.TemporaryDirectory(dir=folder, prefix="scratch-") as scratch:
                out = Path(scratch) / "merged"
                try:
                    usage = run_process([*_CONTENDERS[name], str(recipe_path), str(out)])
                    if turn == 0:
                        in_child(check_merge, recipe, out)
                        continue
                    sync = report["seconds"]["sync"] if (report := _report(out)) else 0.0
                    result["runs"].append(usage._replace(sync_seconds=sync))
                except Exception as error:  # whatever is wrong with one contender, the others' rows stand
                    result["failed"] = f"{type(error).__name__}: {error}"
    return results


def moved_bytes(recipe_path: Path) -> int:
    """Bytes of the inputs, read once, and of the output."""
    recipe = yaml.safe_load(recipe_path.read_text())
    experts = [Path(model["model"]) for model in recipe["models"]]
    files = [experts[0] / WEIGHTS, *(e / WEIGHTS for e in experts)]  # the output is as large as an expert
    if recipe["merge_method"] == "ota":
        files += [Path(recipe["base_model"]) / WEIGHTS, *(e / CURVATURE for e in experts)]
    return sum(f.stat().st_size for f in files)


def _cells(name: str, results: dict[str, dict], nbytes: int) -> list[str]:
    if "failed" in results[name]:
        return [name, f"failed: {results[name]['failed']}"]
    usages: list[Usage] = results[name]["runs"]
    seconds, native = ([u.seconds for u in results.get(n, {"runs": []})["runs"]] for n in (name, "native"))
    median = statistics.median(seconds)
    return [
        name,
        f"{median:.2f}",
        f"{min(seconds):.2f}-{max(seconds):.2f}",
        f"{nbytes / median / 1e9:.2f}",
        f"{median / statistics.median(native):.1f}" if native else "",
        f"{max(u.peak_bytes for u in usages) / 2**20:.0f}",
        f"{statistics.median(u.sync_seconds / u.seconds for u in usages):.0%}",
        f"{statistics.median(u.disk_bytes for u in usages) / 1e9:.2f}",
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time whole merge processes.")
    parser.add_argument(
        "--data", type=Path, default=DEFAULT_FOLDER, help="where sets are cached [%(default)s]"
    )
    parser.add_argument("--parameters", type=int, default=250_000_000, help="of each model [%(default)s]")
    parser.add_argument("--hidden", type=int, help="columns of its matrices [what suits its size]")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--recipe", choices=_RECIPES, default="threshold")
    parser.add_argument("--only", choices=_CONTENDERS, action="append", help="may be given again [all]")
    parser.add_argument("--cold", action="store_true", help="drop the page cache before every run (root)")
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS / "end_to_end.json", help="also write JSON"
    )
    arguments = parser.parse_args()
    if arguments.runs < 1:
        parser.error("--runs must be at least 1")
    if arguments.cold and not os.access(DROP_CACHES, os.W_OK):
        parser.error(f"--cold writes {DROP_CACHES}, which needs root")
    return arguments


def main() -> None:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that scratch folders go then, too
    try:
        data = in_child(llama_set, arguments.data, arguments.parameters, hidden=arguments.hidden)
    except OtaError as error:
        sys.exit(f"error: {error}")
    recipe = data / f"{arguments.recipe}.yaml"
    contenders = arguments.only or list(_CONTENDERS)
    results = race(contenders, recipe, arguments.data, arguments.runs, arguments.cold)
    starts = [run_process([OTA_MERGE, "--help"]).seconds for _ in range(_STARTS)]
    nbytes = moved_bytes(recipe)
    print(f"{data.name}, {arguments.recipe}, {'cold' if arguments.cold else 'warm'} page cache")
    header = ("process", "median s", "min-max", "GB/s", "over native", "peak MiB", "sync", "GB from disk")
    print_table(header, [_cells(name, results, nbytes) for name in results])
    print(f"ota-merge --help: {statistics.median(starts):.3f} s ({min(starts):.3f}-{max(starts):.3f})")
    if arguments.json:
        for result in results.values():
            result["runs"] = [usage._asdict() for usage in result["runs"]]
        run = {"set": data.name, "recipe": arguments.recipe, "cold": arguments.cold, "bytes": nbytes}
        save_json(arguments.json, run | {"processes": results, "start_up_seconds": starts})


if __name__ == "__main__":
    main()
