"""python -m bench.gpu"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shlex
import signal
import sys
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
    parser.add_argument("--size", help="bytes in and out of one call [1.1GB]")
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
    try:
        figures = _measure(arguments)
    except OtaError as error:
        sys.exit(f"error: {error}")
    print(", ".join(f"{key} {value}" for key, value in figures["device"].items()))
    tables(figures)
    if arguments.quick:
        print("the sizes of --quick measure nothing: not compared, not written")
    else:
        for what, ratio, aim in ratios(figures):
            print(f"{what}: {ratio:.2f} (aim: {aim})")
    if arguments.json or not (arguments.only or arguments.quick):
        _store(arguments.json or RESULTS / f"gpu-{_slug(figures['device']['name'])}.json", figures)
    sys.exit(any("failed" in row for row in (*figures["rows"], *figures["files"])))


def _measure(arguments: argparse.Namespace) -> dict:
    """What is stored: device, date, command; copy_bytes_per_second: the yardstick, None where no copy worked;
    rows: of cases in device memory; files: of those from files."""
    from .cases import cases, copy_cases, rows
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

    def wanted(name: str) -> bool:
        return any(part in name for part in arguments.only.split(","))

    copies = _told(rows(copy_cases(bench), bench, repeats))
    measured = _told(rows((case for case in cases(bench) if wanted(case.name)), bench, repeats))
    files = _told(streams.rows(wanted))
    for row in _told(rows(copy_cases(bench), bench, repeats)):  # the GPU is warm now
        copies.append(row | {"case": f"{row['case']}, at the end"})
    return {
        "device": describe(bench.device),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", "bench.gpu", *sys.argv[1:]]),
        "copy_bytes_per_second": best_rate(copies),
        "rows": copies + measured,
        "files": files,
    }


def _told(rows: Iterable[dict]) -> list[dict]:
    """All rows; on stderr, which case is done."""
    done = []
    for row in rows:
        print(row["case"], *["failed"] * ("failed" in row), file=sys.stderr)
        done.append(row)
    return done


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
