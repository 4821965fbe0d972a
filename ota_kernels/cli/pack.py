"""`ota-merge pack`: an expert as its base plus a few bits."""

from __future__ import annotations

import json
from typing import Any

import click

from .options import reading


@click.command(short_help="Store an expert as its base plus packed edits.")
@click.argument("experts", type=click.Path(), metavar="EXPERT...", nargs=-1, required=True)
@click.argument("out", type=click.Path(), metavar="OUT")
@click.option(
    "--base", type=click.Path(), required=True, metavar="MODEL", help="What the expert was tuned from."
)
@click.option(
    "--form",
    type=click.Choice(["ffg", "compeft", "tswitch", "bitdelta", "emr"]),
    help="ffg: the most salient edits; compeft, tswitch: signs of the largest; bitdelta: signs of all; emr: "
    "several experts that share an edit.  [default: ffg; of several experts emr]",
)
@click.option(
    "--density", type=float, help="Share of the edits that is kept: ffg, compeft, tswitch (default 0.4)."
)
@click.option(
    "--saliency-mass", type=float, help="Share of the saliency that is kept, in place of --density: ffg."
)
@click.option(
    "--density-scope", type=click.Choice(["model", "tensor"]), default="model", help="Over what ffg counts."
)
@click.option(
    "--values",
    type=click.Choice(["exact", "sign"]),
    default="exact",
    help="Of ffg: kept weights bit for bit, or signs with one size per tensor.  [default: exact]",
)
@click.option(
    "--alpha", type=float, default=1.0, help="Of compeft: a factor of the edits' size.  [default: 1]"
)
@click.option(
    "--moments", type=click.Path(), help="The expert's second moments, for ffg; without, by magnitude."
)
@click.option(
    "--missing-curvature",
    type=click.Choice(["error", "uniform", "base"]),
    default="error",
    help="What becomes of tensors that --moments lack, as in recipes.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@reading
def pack(
    experts: tuple[str, ...],
    out: str,
    base: str,
    form: str | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Store EXPERT, a fine-tune of --base, in the file OUT.pack: a model wherever a recipe names one.

    Several experts share an edit (EMR): OUT is then a folder with a pack of each. OUT appears only when it is
    complete.
    """
    from ..run.options import Silent
    from ..run.packing import pack as run
    from . import show

    options = {key: given.pop(key) for key in ("backend", "device", "memory_limit", "threads")}
    form = form or ("ffg" if len(experts) == 1 else "emr")
    progress = Silent() if quiet or as_json else show.progress()
    with progress:
        found = run(
            experts,
            out,
            base=base,
            form=form,
            overwrite=overwrite,
            progress=progress,
            options=options,
            **given,
        )
    if as_json:
        click.echo(json.dumps(found, indent=2, allow_nan=False))
    elif not quiet:
        show.packed(found)
