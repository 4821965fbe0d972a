"""`ota-merge moments compress`: second moments in less room."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from ..errors import one_line

if TYPE_CHECKING:
    from ..moments.compress import Summary


@click.command(short_help="Write a file of second moments in less room.")
@click.argument("source", type=click.Path(), metavar="IN")
@click.argument("out", type=click.Path(), metavar="OUT.safetensors")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["rank1", "bf16", "log8"]),
    required=True,
    help="rank1: row and column sums of matrices; bf16: half the size; log8: a quarter, within 8.8 %.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
@click.option("--base", type=click.Path(), metavar="DIR", help="With --expert: compare masks, too.")
@click.option("--expert", type=click.Path(), metavar="DIR", help="The model whose second moments these are.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
def compress(
    source: str,
    out: str,
    format_name: str,
    overwrite: bool,
    base: str | None,
    expert: str | None,
    as_json: bool,
) -> None:
    """Compress the second moments in IN, whatever `preconditioner_path` takes, to OUT.safetensors.

    OUT is what `preconditioner_path` takes, too: merges read it as it is, and never expand it. It appears
    only when it is complete.
    """
    from ..moments.agreement import check_models, mask_agreement
    from ..moments.compress import compress as run

    if (base is None) != (expert is None):
        raise click.UsageError("--base and --expert go together")
    if base is not None:
        check_models(base, expert, source)
    summary = run(source, out, format_name, overwrite)
    agreement = {} if base is None else mask_agreement(base, expert, source, out)
    if as_json:
        click.echo(json.dumps(summary.as_dict() | {"mask_agreement": agreement}, indent=2, allow_nan=False))
    else:
        _print(summary, agreement, out)


def _print(summary: Summary, agreement: dict[float, float], out: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..sizes import format_bytes, format_count

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    before, after = format_bytes(summary.bytes_before), format_bytes(summary.bytes_after)
    ratio, sense = (summary.ratio, "smaller") if summary.ratio >= 1 else (1 / summary.ratio, "larger")
    table.add_row("size", f"{before} to {after}, {ratio:.3g} times {sense}")
    table.add_row("compressed", f"{summary.tensors} tensors, {format_count(summary.elements)} elements")
    if summary.copied:
        table.add_row("copied", f"{summary.copied} tensors")
    errors = (summary.error_median, summary.error_99, summary.error_max)
    sizes = ", ".join(f"{100 * error:.3g} %" for error in errors)
    table.add_row("relative error: median, 99 %, largest", sizes)
    table.add_row("zeros", f"{summary.zeros}, of which {summary.zeros_kept} stay 0")
    for density, index in agreement.items():
        table.add_row(f"Jaccard index of masks, density {density:g}", f"{index:.4f}")
    console = Console(highlight=False)
    console.print(f"compressed into {escape(one_line(out))} ({summary.format})", soft_wrap=True)
    console.print(table)
    if summary.step is None:
        console.print("step and beta2 are not known, or differ: `bias_correction` cannot use this file")
