"""`ota-merge verify`: whether a merged folder holds what its recipe gives."""

from __future__ import annotations

import click

from .options import Share, reading


@click.command()
@click.argument("out", type=click.Path(file_okay=False))
@click.option(
    "--sample",
    "share",
    type=Share(),
    default="1%",
    show_default=True,
    help="How much is merged again and compared.",
)
@click.option("--full", is_flag=True, help="Merge everything again, model-wide thresholds included.")
@click.option(
    "--inputs",
    type=click.Path(file_okay=False, exists=True),
    help="A folder that the recipe's models were moved to.",
)
@reading
def verify(out: str, share: float, full: bool, inputs: str | None, **options) -> None:
    """Check the merged folder OUT; exit code 1 where something is wrong, with the tensors' names.

    Headers, index, sizes and the checksums of all that was written are checked always. Where the inputs are
    there, a sample is merged again, by another backend than the one that wrote it.
    """
    from pathlib import Path

    from ..errors import one_line
    from ..run import verify as checking

    found = checking.verify(
        Path(out), share=share, full=full, inputs=None if inputs is None else Path(inputs), **options
    )
    for line in found.done:
        click.echo(one_line(line))
    for name, what in found.wrong.items():
        click.echo(one_line(f"wrong: {name}: {what}"))
    if found.wrong:
        raise SystemExit(1)
    click.echo(f"{one_line(out)} is as it was written")
