"""Merges of packed experts against merges of the experts: whole processes.

    python -m bench.packs [--density 0.05] [--runs 5] [--cold] [--json]

Every expert is packed once, its weights exact, by magnitude. Three merges by task arithmetic then run in
turn: of the experts as they are (`experts`), of the same experts unpacked (`unpacked`, whose result must
be that of the packs, byte for byte), and of the packs (`packs`). The floor of a merge is what it reads
from memory and writes, at the bandwidths of bench.bandwidth, beside what a process takes that does nothing
(`ota-merge plan` of the same recipe).
"""

from __future__ import annotations

import argparse
import filecmp
import os
import signal
import statistics
import sys
import tempfile
from pathlib import Path

import yaml

from ota_kernels.errors import OtaError
from ota_kernels.processors import default_threads

from . import bandwidth
from .data import DEFAULT_FOLDER, WEIGHTS, llama_set
from .end_to_end import DROP_CACHES, OTA_MERGE, Usage, in_child, run_process
from .output import RESULTS, print_table, save_json

KINDS = ("experts", "unpacked", "packs")


def prepare(data: Path, folder: Path, density: float) -> dict[str, Path]:
    """Pack the experts of a set and unpack them again, in `folder`; recipes of each kind."""
    experts = sorted(data.glob("expert_*"))
    made: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for expert in experts:
        pack, unpacked = folder / f"{expert.name}.pack", folder / expert.name
        command = [OTA_MERGE, "pack", str(expert), str(pack), "--base", str(data / "base"), "-q"]
        run_process([*command, "--density", str(density)])
        run_process([OTA_MERGE, "unpack", str(pack), str(unpacked), "-q"])
        for kind, path in zip(KINDS, (expert, unpacked, pack), strict=True):
            made[kind].append(str(path))
    recipes = {}
    for kind, models in made.items():
        recipe = {
            "merge_method": "task_arithmetic",
            "base_model": str(data / "base"),
            "models": [{"model": model, "parameters": {"weight": 1 / len(models)}} for model in models],
        }
        recipes[kind] = folder / f"{kind}.yaml"
        recipes[kind].write_text(yaml.safe_dump(recipe))
    return recipes


def read_bytes(recipe: Path) -> int:
    """Bytes of the files that a merge reads."""
    content = yaml.safe_load(recipe.read_text())
    paths = [Path(content["base_model"]), *(Path(model["model"]) for model in content["models"])]
    return sum((path / WEIGHTS if path.is_dir() else path).stat().st_size for path in paths)


def race(recipes: dict[str, Path], folder: Path, runs: int, cold: bool) -> dict[str, list[Usage]]:
    """The runs of each kind, in turn; before them one of each, whose results are compared."""
    results: dict[str, list[Usage]] = {kind: [] for kind in recipes}
    for turn in range(1 + runs):
        with tempfile.TemporaryDirectory(dir=folder, prefix="scratch-") as scratch:
            for kind, recipe in recipes.items():
                os.sync()
                if cold and turn:
                    DROP_CACHES.write_text("3")
                usage = run_process([OTA_MERGE, "run", "-q", str(recipe), str(Path(scratch) / kind)])
                if turn:
                    results[kind].append(usage)
            pair = (Path(scratch) / kind / WEIGHTS for kind in ("unpacked", "packs"))
            if not filecmp.cmp(*pair, shallow=False):
                raise AssertionError("a merge of packs is not that of the unpacked experts")
    return results


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time merges of packed experts.")
    parser.add_argument(
        "--data", type=Path, default=DEFAULT_FOLDER, help="where sets are cached [%(default)s]"
    )
    parser.add_argument("--parameters", type=int, default=250_000_000, help="of each model [%(default)s]")
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the page cache before every run (root)")
    parser.add_argument("--json", type=Path, nargs="?", const=RESULTS / "packs.json", help="also write JSON")
    arguments = parser.parse_args()
    if arguments.cold and not os.access(DROP_CACHES, os.W_OK):
        parser.error(f"--cold writes {DROP_CACHES}, which needs root")
    return arguments


def main() -> None:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        data = in_child(llama_set, arguments.data, arguments.parameters)
    except OtaError as error:
        sys.exit(f"error: {error}")
    speed = bandwidth.measure(default_threads())
    with tempfile.TemporaryDirectory(dir=arguments.data, prefix="packs-") as folder:
        recipes = prepare(data, Path(folder), arguments.density)
        results = race(recipes, Path(folder), arguments.runs, arguments.cold)
        nothing = min(run_process([OTA_MERGE, "plan", str(recipes["packs"])]).seconds for _ in range(3))
        read = {kind: read_bytes(recipe) for kind, recipe in recipes.items()}
    written = (data / "base" / WEIGHTS).stat().st_size
    floors = {kind: nothing + size / speed.read + 2 * written / speed.copy for kind, size in read.items()}
    medians = {kind: statistics.median(u.seconds for u in runs) for kind, runs in results.items()}
    print(f"{data.name}, density {arguments.density:g}, {'cold' if arguments.cold else 'warm'} page cache")
    rows = [
        [
            kind,
            f"{medians[kind]:.2f}",
            f"{read[kind] / 1e9:.3f}",
            f"{medians['experts'] / medians[kind]:.2f}",
            f"{medians[kind] / floors[kind]:.2f}",
            f"{max(u.peak_bytes for u in runs) / 2**20:.0f}",
            f"{statistics.median(u.disk_bytes for u in runs) / 1e9:.2f}",
        ]
        for kind, runs in results.items()
    ]
    header = ("merge of", "median s", "GB read", "experts / it", "it / floor", "peak MiB", "GB from disk")
    print_table(header, rows)
    if arguments.json:
        runs = {kind: [usage._asdict() for usage in found] for kind, found in results.items()}
        run = {"set": data.name, "density": arguments.density, "cold": arguments.cold, "bytes_read": read}
        save_json(arguments.json, run | {"floors": floors, "processes": runs})


if __name__ == "__main__":
    main()
