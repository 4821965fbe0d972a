"""What the commands print: plans, progress, reports."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..planning.plan import Plan
from ..sizes import format_bytes, format_count, format_seconds
from . import remarks

_PLAIN_INTERVAL = 10.0  # seconds between lines where there is no terminal


def plan(found: Plan) -> None:
    """A table of the plan's numbers."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    rows = (
        ("experts", str(found.experts)),
        ("tensors", str(found.tensors)),
        ("parameters", format_count(found.parameters)),
        ("passes over the inputs", str(found.passes)),
        ("bytes in", format_bytes(found.bytes_in)),
        ("bytes out", f"{format_bytes(found.bytes_out)} in {len(found.layout.shards)} file(s)"),
        ("tiles", f"{found.tiles} of {format_count(found.tile_elements)} elements"),
        ("backend", f"{found.backend}, {found.threads} thread(s)"),
        *([("candidates", _candidates(found))] if found.candidate_bytes else []),
        ("peak memory", format_bytes(found.peak_memory)),
        ("estimated time", f"{format_seconds(found.seconds)} from a warm page cache"),
    )
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    notes(found.notes)


def notes(lines: Iterable[str]) -> None:
    """What a user should know of the inputs."""
    for line in lines:
        click.echo(f"note: {line}")


def tensors(found: Plan) -> None:
    """Every output tensor, in the order in which they are written."""
    for output in found.outputs:
        shape = " x ".join(map(str, output.shape)) or "scalar"
        click.echo(f"{output.name}: {shape}, {output.dtype.name}, {output.action}")
        described = output.as_dict()
        if described.get("parameters"):
            click.echo(f"  {_parameters(described['parameters'])}")
        for part in [described.get("base"), *described["sources"]]:
            if part is None:
                continue
            place = part["model"] if part["tensor"] == output.name else f"{part['model']}: {part['tensor']}"
            kind = "base" if part is described.get("base") else "from"
            own = f"  {_parameters(part['parameters'])}" if part.get("parameters") else ""
            click.echo(f"  {kind} {place}{own}")


def _parameters(values: dict) -> str:
    shown = {True: "true", False: "false"}
    pairs = (
        (key, shown[x] if isinstance(x, bool) else f"{x:g}" if isinstance(x, float) else x)
        for key, x in values.items()
    )
    return ", ".join(f"{key} {value}" for key, value in pairs)


def _candidates(found: Plan) -> str:
    """What waits for exact thresholds."""
    spilled = f", {format_bytes(found.spilled_bytes)} of it in the work folder" if found.spilled_bytes else ""
    return f"about {format_bytes(found.candidate_bytes)}{spilled}"


def report(merged: dict, out: str) -> None:
    """What came out, in a few lines."""
    seconds = max(sum(merged["seconds"].values()), 1e-3)
    moved = merged["bytes_read"] + merged["bytes_written"]
    written, read = format_bytes(merged["bytes_written"]), format_bytes(merged["bytes_read"])
    rate = f"{format_seconds(seconds)}, {moved / seconds / 1e9:.1f} GB/s"
    click.echo(f"merged into {out}: {read} read and {written} written in {rate}")
    for expert in merged["experts"]:
        threshold = "" if expert["threshold"] is None else f", threshold {expert['threshold']:.4g}"
        click.echo(f"  {expert['model']}: {expert['density']:.1%} of its edits kept{threshold}")
    if scale := merged["lambda"]:
        used = "by tensor" if scale["used"] is None else f"{scale['used']:.4g}"
        automatic = f"automatic: {scale['auto']:.4g}"
        click.echo(
            f"  lambda {used} ({automatic}): {scale['length']:.3g} of the mean length of the experts' edits"
        )
    if merged["repeats"]:
        click.echo(f"  {merged['repeats']} thresholds lay outside their bracket: merged again, exactly")
    if merged["repaired"]:
        click.echo(f"  {merged['repaired']} elements set to the base value: an input was not finite")
    notes(merged.get("notes", ()))


def packed(found: dict) -> None:
    """The packs that were written, in a few lines."""
    for path, size in found["packs"].items():
        click.echo(f"packed into {path}: {format_bytes(size)}")
    kept = ", ".join(f"{share:.2%}" for share in found["kept"])
    bits = f"{found['bits_per_parameter']:.3g} bits per parameter"
    click.echo(f"  {bits}, {kept} of {format_count(found['parameters'])} elements stored")
    notes(found["notes"])


def progress():
    """A bar on a terminal, plain lines elsewhere; a context manager that is a job.Progress."""
    return _Bar() if sys.stderr is not None and sys.stderr.isatty() else _Lines()


class _Bar:
    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task("open", total=None, rate="")
        self._started = time.perf_counter()
        self._done = 0

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stage(self, name: str, total_bytes: int) -> None:
        remarks.release()
        self._started, self._done = time.perf_counter(), 0
        self._progress.reset(self._task, description=name, total=total_bytes or None, rate="")

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        rate = self._done / max(time.perf_counter() - self._started, 1e-9)
        self._progress.update(self._task, advance=nbytes, rate=f"{rate / 1e9:.1f} GB/s")


class _Lines:
    """One line a stage, and one every few seconds."""

    def __init__(self) -> None:
        self._name, self._total, self._done, self._last = "", 0, 0, 0.0

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stage(self, name: str, total_bytes: int) -> None:
        remarks.release()
        self._name, self._total, self._done, self._last = name, total_bytes, 0, time.perf_counter()
        self._say(f"{name}: {format_bytes(total_bytes)}" if total_bytes else name)

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        if time.perf_counter() - self._last >= _PLAIN_INTERVAL:
            self._last = time.perf_counter()
            share = self._done / max(self._total, 1)
            self._say(f"{self._name}: {share:.0%} of {format_bytes(self._total)}")

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError):  # nobody reads it any more: no reason to end a merge
            click.echo(line, err=True)
