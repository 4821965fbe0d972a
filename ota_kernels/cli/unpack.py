"""`ota-merge unpack`: the expert of a pack as a folder."""

from __future__ import annotations

import click

from .options import reading


@click.command(short_help="Write the expert of a pack as a model.")
@click.argument("pack", type=click.Path(), metavar="PACK")
@click.argument("out", type=click.Path(), metavar="OUT")
@click.option(
    "--base", type=click.Path(), metavar="MODEL", help="Where its base is. [default: where PACK says]"
)
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
@click.option("--resume", is_flag=True, help="Go on where it was stopped.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@reading
def unpack(pack: str, out: str, base: str | None, quiet: bool, **options) -> None:
    """Write the expert of PACK into the folder OUT. The base is read, and compared whole with what PACK
    says of it."""
    from ..run.options import Silent
    from ..run.packing import unpack as run
    from . import show

    progress = Silent() if quiet else show.progress()
    with progress:
        report = run(pack, out, base=base, progress=progress, **options)
    if not quiet:
        show.report(report, out)
