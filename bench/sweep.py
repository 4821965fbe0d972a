"""A sweep over six values against six runs: whole processes on the set of `bench.end_to_end`.

    python -m bench.sweep [--parameters 250000000] [--runs 3] [--recipe threshold] [--set KEY=V1,V2,...]...
    [--cold]

Both must write the same bytes. Then sweep and runs take turns, every input read once before each turn
(--cold: dropped from the page cache before each process instead, which needs root). Seconds of the six runs
are their sum.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import yaml

from ota_kernels.errors import OtaError
from ota_kernels.recipe.setting import with_values
from ota_kernels.run.sweep import combinations

from .data import CURVATURE, DEFAULT_FOLDER, WEIGHTS, llama_set
from .density import digest_of
from .end_to_end import DROP_CACHES, OTA_MERGE, Usage, in_child, run_process
from .output import RESULTS, print_table, save_json

_DEFAULT = ("lambda=0.6,1.0,1.4", "density=0.1,0.3")


def values_of(settings: list[str]) -> dict[str, list]:
    pairs = (setting.partition("=")[::2] for setting in settings)
    return {key: [yaml.safe_load(text) for text in texts.split(",")] for key, texts in pairs}


class Race:
    """recipe: a file; its sweep, and one run for each combination."""

    def __init__(self, data: Path, recipe: Path, settings: list[str], cold: bool, more: list[str]) -> None:
        self._data, self._recipe, self._settings, self._cold, self._more = data, recipe, settings, cold, more
        self._chosen = combinations(values_of(settings))

    def _before(self) -> None:
        for file in (*self._data.glob(f"*/{WEIGHTS}"), *self._data.glob(f"*/{CURVATURE}")):
            if not self._cold:
                digest_of(file, lambda part: None)
        if self._cold:
            DROP_CACHES.write_text("3")

    def sweep(self, out: Path) -> Usage:
        self._before()
        sets = itertools.chain(*(("--set", setting) for setting in self._settings))
        return run_process([OTA_MERGE, "sweep", "-q", *self._more, *sets, str(self._recipe), str(out)])

    def runs(self, out: Path) -> Usage:
        data = yaml.safe_load(self._recipe.read_text())
        found = []
        out.mkdir()
        for name, chosen in self._chosen.items():
            path = out / f"{name}.yaml"
            path.write_text(yaml.safe_dump(with_values(data, chosen)))
            if self._cold or not found:
                self._before()
            found.append(run_process([OTA_MERGE, "run", "-q", *self._more, str(path), str(out / name)]))
        return Usage(
            sum(u.seconds for u in found),
            sum(u.processor_seconds for u in found),
            max(u.peak_bytes for u in found),
            sum(u.disk_bytes for u in found),
        )

    def digests(self, out: Path) -> list[str]:
        found = []
        for name in self._chosen:
            digest = hashlib.sha256()
            digest_of(out / name / WEIGHTS, digest.update)
            found.append(digest.hexdigest())
        return found

    def turn(self, folder: Path, check: bool) -> tuple[Usage, Usage]:
        with tempfile.TemporaryDirectory(dir=folder, prefix="scratch-") as scratch:
            one, other = Path(scratch) / "sweep", Path(scratch) / "runs"
            swept = self.sweep(one)
            digests = self.digests(one) if check else []
            shutil.rmtree(one)
            run = self.runs(other)
            assert not check or self.digests(other) == digests, "the sweep and the runs write other bytes"
        return swept, run


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a sweep against the runs that it stands for.")
    parser.add_argument(
        "--data", type=Path, default=DEFAULT_FOLDER, help="where sets are cached [%(default)s]"
    )
    parser.add_argument("--parameters", type=int, default=250_000_000, help="of each model [%(default)s]")
    parser.add_argument("--recipe", default="density_model", help="of the set [%(default)s]")
    parser.add_argument("--set", action="append", dest="settings", help=f"[{' '.join(_DEFAULT)}]")
    parser.add_argument("--options", default="", help="of both commands, in one text")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--json", type=Path, nargs="?", const=RESULTS / "sweep.json", help="also write JSON")
    arguments = parser.parse_args()
    settings = arguments.settings or list(_DEFAULT)
    try:
        data = in_child(llama_set, arguments.data, arguments.parameters)
    except OtaError as error:
        sys.exit(f"error: {error}")
    race = Race(data, data / f"{arguments.recipe}.yaml", settings, arguments.cold, arguments.options.split())
    turns = [race.turn(arguments.data, check=i == 0) for i in range(arguments.runs)]
    rows = []
    for i, name in enumerate(("sweep", "runs")):
        usages = [turn[i] for turn in turns]
        ratio = statistics.median(turn[i].seconds / turn[1].seconds for turn in turns)
        of_processor = statistics.median(
            turn[i].processor_seconds / turn[1].processor_seconds for turn in turns
        )
        rows.append(
            [
                name,
                f"{statistics.median(u.seconds for u in usages):.2f}",
                f"{ratio:.2f}",
                f"{statistics.median(u.processor_seconds for u in usages):.2f}",
                f"{of_processor:.2f}",
                f"{max(u.peak_bytes for u in usages) / 2**20:.0f}",
                f"{statistics.median(u.disk_bytes for u in usages) / 1e9:.1f}",
            ]
        )
    print_table(
        (", ".join(settings), "median s", "ratio", "processor s", "ratio", "peak MiB", "disk GB"), rows
    )
    if arguments.json:
        figures = {"set": data.name, "settings": settings, "turns": [[u._asdict() for u in t] for t in turns]}
        save_json(arguments.json, figures)


if __name__ == "__main__":
    main()
