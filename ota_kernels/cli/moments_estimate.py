"""`ota-merge moments estimate`: curvature for a model that came without its optimizer state."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

_LINE_SECONDS = 10.0  # between lines where there is no terminal


@click.command(short_help="Estimate curvature where there is no optimizer state.")
@click.argument("model", type=click.Path(), metavar="MODEL_DIR")
@click.argument("data", type=click.Path(), metavar="DATA.jsonl")
@click.argument("out", type=click.Path(), metavar="OUT.safetensors")
@click.option("--samples", type=click.IntRange(min=1), default=256, show_default=True, help="Texts to draw.")
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    help="Tokens of a text that are used.",
)
@click.option("--text-key", default="text", show_default=True, help="The text's key in a line's JSON object.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the lines that are drawn."
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to compute: a GPU if there is one (auto).",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of weights and gradients; bfloat16 takes half the memory and blurs small gradients.",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace OUT; without --resume, start an unfinished estimate again."
)
@click.option(
    "--resume", is_flag=True, help="Go on with an unfinished estimate; nothing to do if OUT is complete."
)
def estimate(model: str, data: str, out: str, **options) -> None:
    """Estimate the curvature of MODEL_DIR on texts: the mean of their squared gradients (empirical Fisher).

    MODEL_DIR is a causal language model that transformers loads, with its tokenizer, or BASE+ADAPTER with a
    LoRA adapter. DATA.jsonl has one JSON
    object a line. OUT.safetensors is what `preconditioner_path` in a recipe takes; it appears only when it is
    complete. An estimate that was stopped, however hard, goes on with --resume.
    """
    from ..moments.estimate import estimate as run

    try:
        with _progress() as progress:
            done = run(model, data, out, progress=progress, **options)
    except KeyboardInterrupt:
        click.echo("interrupted; the same command with --resume goes on", err=True)
        raise SystemExit(130) from None
    notes = [f"{done.tokens} tokens"]
    if done.samples < options["samples"]:
        notes.append(f"{options['samples']} were asked for")
    if done.cut:
        notes.append(f"{done.cut} cut at {options['max_length']}")
    if done.skipped:
        notes.append(f"{done.skipped} too short, skipped")
    if done.resumed:
        notes.append(f"{done.resumed} done before")
    click.echo(f"estimated from {done.samples} samples ({', '.join(notes)}): {done.out}")


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, a line now and then elsewhere; called with samples done and wanted."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("samples"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines() -> Callable[[int, int], None]:
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _LINE_SECONDS:
            last = time.monotonic()
            click.echo(f"{done} of {total} samples", err=True)

    return report
