"""`ota-merge moments`: second moments, out of checkpoints and on the screen."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from ..errors import one_line
from .moments_compress import compress
from .moments_estimate import estimate
from .moments_lift import lift

if TYPE_CHECKING:
    from ..moments import Overview, Summary

_WIDTH, _UNLIMITED = 100, 1000
_LISTED = 5  # names that a line lists before it says how many more there are
_FORMATS = ("auto", "torch", "trainer", "deepspeed", "deepspeed-universal", "dcp")


@click.group()
@click.pass_context
def moments(context: click.Context) -> None:
    """Get second moments out of checkpoints, shrink them, look at them, lift or estimate them."""
    with contextlib.suppress(ValueError):  # not in the main thread
        before = signal.signal(signal.SIGTERM, _terminated)
        context.call_on_close(lambda: signal.signal(signal.SIGTERM, before))


def _terminated(number: int, _frame: object) -> None:
    """End as on an error, so that unfinished files are removed at once."""
    raise SystemExit(128 + number)


moments.add_command(compress)
moments.add_command(estimate)
moments.add_command(lift)


@moments.command(short_help="Write a checkpoint's second moments to one file.")
@click.argument("checkpoint", type=click.Path(), metavar="CHECKPOINT")
@click.argument("out", type=click.Path(), metavar="OUT.safetensors")
@click.option(
    "--model",
    type=click.Path(),
    metavar="MODEL_DIR",
    help="The trained model: names, shapes, order of parameters.  [default: CHECKPOINT, if it has one]",
)
@click.option(
    "--format",
    "format_name",
    type=click.Choice(_FORMATS),
    default="auto",
    show_default=True,
    help="What CHECKPOINT is.",
)
@click.option(
    "--base",
    type=click.Path(),
    metavar="DIR",
    help="What the model was trained from: parameters that equal it were frozen.",
)
@click.option(
    "--names",
    type=click.Path(),
    metavar="FILE",
    help="The parameters' names, one a line, as model.named_parameters() goes; a blank line between groups.",
)
@click.option(
    "--prefix",
    default="",
    metavar="TEXT",
    help="Take only what CHECKPOINT names TEXT..., without TEXT: one of several models in it.",
)
@click.option(
    "--as-adam", is_flag=True, help="Take keys and settings of the optimizer that are unknown for Adam's."
)
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
def extract(checkpoint: str, out: str, model: str | None, format_name: str, **options) -> None:
    """Write Adam's second moments in CHECKPOINT, a folder or a file, to OUT.safetensors.

    OUT is what `preconditioner_path` in a recipe takes; it appears only when it is complete and every value
    was checked. Where an optimizer numbers its parameters, they are taken to be in the model's order, in each
    group (as `model.parameters()` gives them); shapes must agree, and several possible orders are refused.
    """
    from .. import moments as package

    summary = package.extract(checkpoint, out, model, format_name, **options)
    for line in _summary_lines(summary, out):
        click.echo(line)


@moments.command(short_help="Show what a file of second moments holds.")
@click.argument("file", type=click.Path(), metavar="FILE")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
def show(file: str, as_json: bool) -> None:
    """Show the second moments in FILE: each tensor's range, zeros and size."""
    from .. import moments as package

    overview = package.show(file)
    if as_json:
        click.echo(json.dumps(overview.as_dict(), indent=2, allow_nan=False))
    else:
        _print_table(overview, file)


def _summary_lines(summary: Summary, out: str) -> list[str]:
    from ..sizes import format_bytes, format_count

    lines = [
        f"extracted {summary.format} into {out}: {summary.tensors} tensors, "
        f"{format_count(summary.elements)} parameters, {format_bytes(summary.nbytes)}",
        "  " + ", ".join(_number(name, summary) for name in ("step", "beta2")),
    ]
    if summary.step is None or summary.beta2 is None:
        lines.append("  without both, a recipe cannot ask for bias_correction of this file")
    if summary.missing:
        names = [f"{name} ({reason})" for name, reason in summary.missing.items()]
        lines.append(
            f"  no second moments for {len(names)} of {summary.parameters} parameters: {_listed(names)}"
        )
    if summary.zeros:
        lines.append(
            f"  all 0 for {len(summary.zeros)} of {summary.tensors} parameters, about which they say "
            f"nothing: {_listed(summary.zeros)}"
        )
    if summary.extra:
        lines.append(f"  not in the model, left out: {_listed(summary.extra)}")
    return [one_line(line) for line in lines + [f"  {note}" for note in summary.notes]]


def _number(name: str, summary: Summary) -> str:
    if name in summary.varying:
        return f"{name} differs between parameters"
    value = getattr(summary, name)
    return f"{name} unknown" if value is None else f"{name} {value:g}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _fact(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _print_table(overview: Overview, file: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..sizes import format_bytes, format_count

    # A table that is cut to a narrow terminal loses digits; one that wraps does not.
    screen = Console()
    width = max(screen.width, _WIDTH) if screen.is_terminal else _UNLIMITED
    console = Console(width=width, highlight=False)
    said = (("from", overview.source_format), ("step", overview.step), ("beta2", overview.beta2))
    facts = [f"{name} {_fact(value)}" for name, value in said if value is not None]
    size = format_bytes(sum(tensor.nbytes for tensor in overview.tensors))
    header = ", ".join([f"{file}: {len(overview.tensors)} tensors", size, *facts])
    console.print(escape(one_line(header)), soft_wrap=True)
    table = Table(box=None, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column("tensor", overflow="fold")
    for heading in ("shape", "form", "min", "median", "max", "zeros", "size"):
        table.add_column(heading, justify="right", no_wrap=True)
    for tensor in overview.tensors:
        values = (tensor.minimum, tensor.median, tensor.maximum)
        table.add_row(
            escape(one_line(tensor.name)),
            " x ".join(map(str, tensor.shape)) or "scalar",
            tensor.form,
            *("-" if value is None else f"{value:.3g}" for value in values),
            format_count(tensor.zeros),
            format_bytes(tensor.nbytes),
        )
    console.print(table)
