"""Train, merge through the engine, measure on held-out digits, average over seeds: the demo's table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import click
from rich.table import Table

import ota_kernels

from ..errors import OutputError
from . import digits, folders
from .digits import EXPERTS, VIEWS, Images, Settings

_MERGE_LABELS = {
    "linear": "linear",
    "ota": "OTA",
    "ota_ffg_density": "OTA+FFG density 0.2",
    "ota_ffg_mass": "OTA+FFG mass 0.9",
    "advised": "ota-merge recipe",
    "advised_one": "the same, lambda 1",
}


@dataclass(frozen=True)
class Row:
    """One model's measurements.

    accuracies: share of held-out digits labelled right, one per view in the order of VIEWS; kept: share of
    the experts' edits that the model holds, None for the base, which has none.
    """

    label: str
    accuracies: tuple[float, ...]
    kept: float | None

    @property
    def mean(self) -> float:
        """Accuracy over all views."""
        return fmean(self.accuracies)


def run(
    folder: Path, seeds: int = 3, settings: Settings | None = None, say: Callable[[str], None] = click.echo
) -> list[Row]:
    """Make or reuse the experts of `seeds` seeds in `folder`, merge them, and measure everything.

    settings: the training's, whose seed is replaced by 0, 1, ...; say: receives one line per seed.
    Returns one row per model, averaged over the seeds. Raises RecipeError where scikit-learn is missing,
    OutputError where `folder` cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder} ({error.strerror}): name another one") from error
    settings = settings or Settings()
    return average(
        [_run_seed(folder / f"seed{seed}", replace(settings, seed=seed), say) for seed in range(seeds)]
    )


def _run_seed(folder: Path, settings: Settings, say: Callable[[str], None]) -> list[Row]:
    start = time.perf_counter()
    trained = folders.prepare(folder, settings)
    prepared = time.perf_counter()
    kept = {name: _merge(folder, name) for name in folders.RECIPES}
    merged = time.perf_counter()
    say(
        f"seed {settings.seed}: base and {len(EXPERTS)} experts "
        f"{f'trained in {prepared - start:.1f} s' if trained else 'reused'}, "
        f"{len(kept)} merges in {merged - prepared:.1f} s"
    )
    return _measure(folder, settings, kept)


def _merge(folder: Path, name: str) -> float:
    """Run one recipe into the folder beside it; returns the share of edits kept, over all experts."""
    report = ota_kernels.merge(folder / f"{name}.yaml", folder / name, overwrite=True)
    return sum(e["kept"] for e in report["experts"]) / sum(e["total"] for e in report["experts"])


def _measure(folder: Path, settings: Settings, kept: dict[str, float]) -> list[Row]:
    _, held_out = digits.split(settings)
    tests = [held_out.seen_as(view) for view in VIEWS]
    return [
        _row("base", folder / "base", tests, None),
        *(_row(f"expert {view}", folders.expert_folder(folder, view), tests, 1.0) for view in EXPERTS),
        *(_row(label, folder / name, tests, kept[name]) for name, label in _MERGE_LABELS.items()),
    ]


def _row(label: str, folder: Path, tests: Iterable[Images], kept: float | None) -> Row:
    model = folders.load_model(folder)
    return Row(label, tuple(digits.accuracy(model, test) for test in tests), kept)


def average(seeds: list[list[Row]]) -> list[Row]:
    """The mean of each row over the seeds; every seed has the same rows in the same order."""
    return [
        Row(
            rows[0].label,
            tuple(fmean(values) for values in zip(*(row.accuracies for row in rows), strict=True)),
            None if rows[0].kept is None else fmean(row.kept for row in rows),
        )
        for rows in zip(*seeds, strict=True)
    ]


def render(rows: list[Row], seeds: int) -> Table:
    """The table to print, all numbers in percent; it fits 80 columns."""
    table = Table(
        title=f"accuracy on held-out digits, %, mean of {seeds} seed{'s' if seeds > 1 else ''}",
        box=None,
        padding=(0, 0, 0, 1),
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for heading in [*VIEWS, "mean", "kept"]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        kept = "-" if row.kept is None else f"{round(100 * row.kept, 1):g}"
        table.add_row(row.label, *(f"{100 * a:.1f}" for a in row.accuracies), f"{100 * row.mean:.1f}", kept)
    return table
