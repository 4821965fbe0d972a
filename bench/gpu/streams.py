"""Whole `ota-merge run` processes from files, on the GPU and natively, beside reading the files."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from ota_kernels.run.pool import Pool

from ..data import CURVATURE, WEIGHTS, llama_set
from ..end_to_end import DROP_CACHES, OTA_MERGE, check_merge, in_child, moved_bytes, run_process

RECIPES = ("threshold", "density_model")
BACKENDS = ("triton", "native")
_READERS = 16  # threads: one seldom reads as fast as a disk or the page cache can
_PART = 1 << 24  # bytes of one read


@dataclass(frozen=True)
class Streams:
    """data: where sets are cached; parameters: of each of the five experts; runs: that are timed, after
    `warm_ups` that are not; cold: whether each run begins with an empty page cache (root only), else every
    file is read before."""

    data: Path
    parameters: int
    runs: int
    warm_ups: int
    cold: bool

    def rows(self, wanted: Callable[[str], bool], until: float = float("inf")) -> Iterator[dict]:
        """Of the names that are wanted; none begins after `until` (time.monotonic). The first row: reading
        the files by threads. seconds: of the merge, between opening the files and having the
        output on the disk; process_seconds: of the process, with its start. What fails says why."""
        names = [f"run-{recipe}-{backend}" for recipe in RECIPES for backend in BACKENDS]
        names = list(filter(wanted, names))
        if not names or time.monotonic() >= until:
            yield from ({"case": name, "bytes": 0, "skipped": "no time was left"} for name in names)
            return
        folder = in_child(llama_set, self.data, self.parameters)
        files = sorted((*folder.glob(f"*/{WEIGHTS}"), *folder.glob(f"*/{CURVATURE}")))
        nbytes = sum(path.stat().st_size for path in files)
        yield {"case": "read", "bytes": nbytes, "seconds": self._reads(files)}
        for name in names:
            _, recipe, backend = name.split("-")
            path = folder / f"{recipe}.yaml"
            row = {"case": name, "bytes": moved_bytes(path)}
            if time.monotonic() >= until:
                yield row | {"skipped": "no time was left"}
                continue
            try:
                yield row | self._merges(path, backend, files)
            except Exception as error:  # whatever is wrong with one, the others' rows stand
                yield row | {"failed": f"{type(error).__name__}: {error}"}

    def _reads(self, files: Sequence[Path]) -> list[float]:
        return [self._prepared(files) or _read(files) for _ in range(self.runs)]

    def _merges(self, recipe: Path, backend: str, files: Sequence[Path]) -> dict[str, list[float]]:
        seconds, of_process = [], []
        for turn in range(self.warm_ups + self.runs):
            self._prepared(files)
            with tempfile.TemporaryDirectory(dir=self.data, prefix="scratch-") as scratch:
                out = Path(scratch) / "merged"
                usage = run_process([OTA_MERGE, "run", "-q", "--backend", backend, str(recipe), str(out)])
                if turn == 0:
                    in_child(check_merge, yaml.safe_load(recipe.read_text()), out)
                report = json.loads((out / "merge_report.json").read_text())
            if turn >= self.warm_ups:
                seconds.append(sum(report["seconds"].values()))
                of_process.append(usage.seconds)
        return {"seconds": seconds, "process_seconds": of_process}

    def _prepared(self, files: Sequence[Path]) -> None:
        os.sync()  # what others wrote is not this one's work
        if self.cold:
            DROP_CACHES.write_text("3")
        else:
            _read(files)


def _read(files: Sequence[Path]) -> float:
    """Seconds in which threads read all files."""
    parts = [(path, offset) for path in files for offset in range(0, path.stat().st_size, _PART)]

    def read(parts: Sequence[tuple[Path, int]]) -> None:
        room = bytearray(_PART)
        for path, offset in parts:
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                file.readinto(room)

    with Pool(_READERS) as pool:
        started = time.perf_counter()
        for _ in pool.run(read, [parts[i::_READERS] for i in range(_READERS)]):
            pass
        return time.perf_counter() - started
