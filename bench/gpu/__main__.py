"""python -m bench.gpu"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from ota_kernels.backends import triton
from ota_kernels.errors import OtaError
from ota_kernels.sizes import parse_size

from ..data import DEFAULT_FOLDER
from ..end_to_end import DROP_CACHES
from ..output import RESULTS, save_json

_PARAMETERS, _QUICK_PARAMETERS = 250_000_000, 1
_WARM_UPS = 1  # processes: the first one compiles


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Time the GPU backend.")
    parser.add_argument("--only", default="", help="cases whose name contains this, or one of A,B,...")
    parser.add_argument("--quick", action="store_true", help="run everything at a size that measures nothing")
    parser.add_argument("--size", help="bytes in and out of one call [4GB, densities 16GB]")
    parser.add_argument(
        "--budget", type=float, help="seconds after which no case begins; the most telling come first"
    )
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of a case [%(default)s]")
    parser.add_argument(
        "--parameters", type=int, default=_PARAMETERS, help="of each merged file [%(default)s]"
    )
    parser.add_argument("--runs", type=int, default=3, help="timed processes of a case [%(default)s]")
    parser.add_argument("--cold", action="store_true", help="drop the page cache before each process (root)")
    parser.add_argument(
        "--data", type=Path, default=DEFAULT_FOLDER, help="where files are cached [%(default)s]"
    )
    parser.add_argument(
        "--json", type=Path, help="where results go, with a .png beside [bench/results/, of a whole run]"
    )
    arguments = parser.parse_args()
    if min(arguments.repeats, arguments.runs) < 1:
        parser.error("--repeats and --runs must be at least 1")
    if arguments.budget is not None and arguments.budget <= 0:
        parser.error("--budget must be above 0 seconds")
    if arguments.cold and not os.access(DROP_CACHES, os.W_OK):
        parser.error(f"--cold writes {DROP_CACHES}, which needs root")
    if arguments.quick and (arguments.json or arguments.size):
        parser.error("--quick has a size of its own, at which there is nothing to store")
    return arguments


def main() -> None:
    arguments = _arguments()
    ok, reason = triton.verify()
    if not ok:
        sys.exit(f"error: there is no GPU to measure: {reason}")
    if triton.interpreted() and not arguments.quick:
        sys.exit("error: TRITON_INTERPRET=1 runs kernels on the CPU: add --quick, or unset it")
    from .report import ratios, tables

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that scratch folders go then, too
    path = arguments.json
    if path is None and not (arguments.only or arguments.quick):
        path = RESULTS / f"gpu-{_slug(_name())}.json"
    try:
        figures = _measure(arguments, path)
    except OtaError as error:
        sys.exit(f"error: {error}")
    print(", ".join(f"{key} {value}" for key, value in figures["device"].items()))
    tables(figures)
    if arguments.quick:
        print("the sizes of --quick measure nothing: not compared, not written")
    else:
        for what, ratio, aim in ratios(figures):
            print(f"{what}: {ratio:.2f} (aim: {aim})")
    if path:
        _store(path, figures)
    sys.exit(any("failed" in row for row in (*figures["rows"], *figures["files"])))


def _name() -> str:
    from .device import describe
    from .timing import Bench

    return describe(Bench.here(quick=True).device)["name"]


def _measure(arguments: argparse.Namespace, path: Path | None) -> dict:
    """What is stored, after each row: device, date, command; copy_bytes_per_second: the yardstick, None where
    no copy worked; rows: of cases in device memory; files: of those from files."""
    from .cases import cases, copy_cases, rows
    from .code import add_instructions
    from .device import describe
    from .report import best_rate
    from .streams import Streams
    from .timing import Bench

    quick = arguments.quick
    bench = Bench.here(quick, arguments.size and parse_size(arguments.size))
    repeats = 1 if quick else arguments.repeats
    parameters = _QUICK_PARAMETERS if quick else arguments.parameters
    runs = (1, 0) if quick else (arguments.runs, _WARM_UPS)
    streams = Streams(arguments.data, parameters, *runs, arguments.cold)
    until = time.monotonic() + (arguments.budget or math.inf)
    figures = {
        "device": describe(bench.device),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", "bench.gpu", *sys.argv[1:]]),
        "copy_bytes_per_second": None,
        "rows": [],
        "files": [],
    }
    copies: list[dict] = []

    def wanted(name: str) -> bool:
        return any(part in name for part in arguments.only.split(","))

    def measured(found: Iterable[dict], kept: list[dict]) -> None:
        """Keep all rows; on stderr, which case is done."""
        for row in found:
            said = [what for what in ("failed", "skipped") if what in row]
            print(row["case"], *said, file=sys.stderr)
            kept.append(row)
            if kept is not figures["files"]:
                figures["copy_bytes_per_second"] = best_rate(copies)
            if path:
                save_json(path, figures | {"rows": copies + figures["rows"]})

    measured(rows(copy_cases(bench), bench, repeats), copies)
    of_memory = (case for case in cases(bench) if wanted(case.name))
    measured(rows(of_memory, bench, repeats, until), figures["rows"])
    measured(streams.rows(wanted, until), figures["files"])
    again = [row | {"case": f"{row['case']}, at the end"} for row in rows(copy_cases(bench), bench, repeats)]
    measured(again, copies)  # the GPU is warm now
    if time.monotonic() < until:
        add_instructions(figures["rows"], bench.device)
    return figures | {"rows": copies + figures["rows"]}


def _slug(name: str) -> str:
    """A device's name as a part of a file's: nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _store(path: Path, figures: dict) -> None:
    from .report import plot

    save_json(path, figures)
    try:
        plot(path.with_suffix(".png"), figures)
    except ImportError as error:
        print(f"not plotted: {error}; install ota-kernels[bench]")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
