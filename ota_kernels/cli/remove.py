"""`ota-merge remove`: a finished merge without one of its experts."""

from __future__ import annotations

from typing import Any

import click

from .options import reading


@click.command(short_help="Take an expert out of a finished merge.")
@click.argument("out", type=click.Path(), metavar="OUT")
@click.argument("expert", type=click.Path(), metavar="EXPERT")
@click.argument("new", type=click.Path(), metavar="NEW")
@click.option("--overwrite", is_flag=True, help="Replace NEW.")
@click.option("--resume", is_flag=True, help="Go on where it was stopped.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@reading
def remove(out: str, expert: str, new: str, quiet: bool, **options: Any) -> None:
    """Take EXPERT out of the merge OUT, which was made with `keep_sums: true`, and write the folder NEW:
    the merge of the others within rounding. Reads OUT's sums, the base and EXPERT."""
    from ..run.options import Silent
    from ..run.sums import remove as run
    from . import show

    progress = Silent() if quiet else show.progress()
    with progress:
        report = run(out, expert, new, progress=progress, **options)
    if not quiet:
        show.report(report, new)
