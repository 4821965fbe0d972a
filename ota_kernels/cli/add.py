"""`ota-merge add`: one more expert for a finished merge."""

from __future__ import annotations

from typing import Any

import click

from .options import reading


@click.command(short_help="Merge one more expert into a finished merge.")
@click.argument("out", type=click.Path(), metavar="OUT")
@click.argument("expert", type=click.Path(), metavar="EXPERT")
@click.argument("new", type=click.Path(), metavar="NEW")
@click.option("--moments", type=click.Path(), help="The expert's second moments (`preconditioner_path`).")
@click.option("--density", type=float, help="Share of its edits that is kept.")
@click.option("--saliency-mass", type=float, help="Share of its saliency that is kept.")
@click.option("--precond-threshold", type=float, help="Least saliency of an edit that is kept.")
@click.option("--scaling-factor", type=float, help="Factor of its curvature.")
@click.option("--overwrite", is_flag=True, help="Replace NEW.")
@click.option("--resume", is_flag=True, help="Go on where it was stopped.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@reading
def add(out: str, expert: str, new: str, quiet: bool, **options: Any) -> None:
    """Merge EXPERT into the merge OUT, which was made with `keep_sums: true`, and write the folder NEW:
    byte for byte the merge of all experts from the start. Reads OUT's sums, the base and EXPERT. A merge by
    `opcm` needs no sums: NEW is the merge of all but for the rounding of OUT's weights.

    What all experts of OUT share (a density, say) holds for EXPERT too, unless it is given.
    """
    from ..run.options import Silent
    from ..run.sums import add as run
    from . import show

    keys = ("density", "saliency_mass", "precond_threshold", "scaling_factor")
    parameters = {key: value for key in keys if (value := options.pop(key)) is not None}
    moments = options.pop("moments")
    if moments is not None:
        parameters["preconditioner_path"] = moments
    progress = Silent() if quiet else show.progress()
    with progress:
        report = run(out, expert, new, parameters=parameters, progress=progress, **options)
    if not quiet:
        show.report(report, new)
