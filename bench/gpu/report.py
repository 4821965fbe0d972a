"""Rows as tables, as the ratios that matter, and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..output import print_table
from .merges import HEADLINE

# (what, case, what it is compared with, the ratio of their times that is aimed at)
_RATIOS = (
    ("exact density of a tensor over thresholds", "tensor-density", "tensor-thresholds", "at most 1.25"),
    ("exact density of a model over thresholds", "model-density", "model-thresholds", "at most 1.25"),
    ("eager torch over the merge kernel", f"eager-{HEADLINE}", f"merge-{HEADLINE}", "at least 8"),
    ("torch.compile over the merge kernel", f"compile-{HEADLINE}", f"merge-{HEADLINE}", "at least 1.3"),
    (
        "exact density of 291 tensors over thresholds",
        "model291-density",
        "model291-thresholds",
        "at most 1.25",
    ),
    ("torch.topk over topk_threshold", "topk-torch", "topk-threshold", "above 1"),
    ("topk_threshold over one read", "topk-threshold", "one read", "at most 1.3"),
    ("next call of a Merger over the first", "merger-next", "merger-first", "below 1"),
)


def rate(row: dict) -> float:
    """Bytes per second, of the median time."""
    return row["bytes"] / statistics.median(row["seconds"])


def best_rate(rows: Sequence[dict]) -> float | None:
    """The highest rate, None where every row failed."""
    return max((rate(row) for row in rows if "seconds" in row), default=None)


def tables(figures: dict) -> None:
    """Print what was measured in memory; and from files, beside reading them."""
    copy, files = figures["copy_bytes_per_second"], figures["files"]
    header = ("case", "median ms", "min-max", "GB/s", "of copy", "MHz", "instr.", "issue")
    print_table(header, [[*_cells(row, copy, 1e3), *_code(row)] for row in figures["rows"]])
    if files:
        read = best_rate(files[:1])
        header = ("case", "median s", "min-max", "GB/s", "of read", "process s")
        print_table(header, [[*_cells(row, read, 1), *_process(row)] for row in files])


def _cells(row: dict, yardstick: float | None, unit: float) -> list[str]:
    if "failed" in row:
        return [row["case"], f"failed: {row['failed']}"]
    if "skipped" in row:
        return [row["case"], f"not run: {row['skipped']}"]
    median, *ends = (
        f"{unit * reduced(row['seconds']):.{3 if unit > 1 else 2}f}"
        for reduced in (statistics.median, min, max)
    )
    share = f"{rate(row) / yardstick:.0%}" if yardstick else ""
    return [row["case"], median, "-".join(ends), f"{rate(row) / 1e9:.1f}", share]


def _code(row: dict) -> list[str]:
    """Clock, instructions per element, and their share of what can be issued."""
    if "seconds" not in row:
        return []
    instructions = f"{row['instructions']:.0f}" if "instructions" in row else ""
    return [str(row.get("megahertz") or ""), instructions, f"{row['issue']:.0%}" if "issue" in row else ""]


def _process(row: dict) -> list[str]:
    if "seconds" not in row:
        return []
    return [f"{statistics.median(row['process_seconds']):.2f}" if "process_seconds" in row else ""]


def ratios(figures: dict) -> Iterator[tuple[str, float, str]]:
    """(what, ratio, what is aimed at) of all that was measured."""
    rows = {row["case"]: row for row in figures["rows"] if "seconds" in row}
    copy, kernel = figures["copy_bytes_per_second"], rows.get(f"merge-{HEADLINE}")
    if copy and kernel:
        yield "merge kernel, share of the copy bandwidth", rate(kernel) / copy, "at least 0.9"
    seconds = {name: statistics.median(row["seconds"]) for name, row in rows.items()}
    if "read" in rows and "topk-threshold" in rows:
        seconds["one read"] = rows["topk-threshold"]["bytes"] / rate(rows["read"])
    for what, case, other, aim in _RATIOS:
        if case in seconds and other in seconds:
            yield what, seconds[case] / seconds[other], aim


def plot(path: Path, figures: dict) -> None:
    """Bars of GB/s with the copy's as a line; whiskers are the fastest and the slowest call."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in figures["rows"] if "seconds" in row][::-1]  # bars are drawn upwards
    rates = [rate(row) / 1e9 for row in rows]
    slowest, fastest = ([row["bytes"] / end(row["seconds"]) / 1e9 for row in rows] for end in (max, min))
    whiskers = (
        [middle - low for middle, low in zip(rates, slowest, strict=True)],
        [high - middle for middle, high in zip(rates, fastest, strict=True)],
    )
    figure, axis = plt.subplots(figsize=(8, 1 + 0.24 * len(rows)), constrained_layout=True)
    axis.barh([row["case"] for row in rows], rates, xerr=whiskers, color="#2f6f4f", ecolor="#9aa5b1")
    if copy := figures["copy_bytes_per_second"]:
        axis.axvline(copy / 1e9, color="#d9822b", label="copy")
        axis.legend(frameon=False)
    axis.set(xlabel="GB/s", title=figures["device"]["name"])
    figure.savefig(path, dpi=120)
    plt.close(figure)
