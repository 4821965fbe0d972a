"""`ota-merge run`: the whole job."""

from __future__ import annotations

import click

from .compat import mergekit_flags
from .options import merging


@click.command()
@click.argument("recipe", type=click.Path(dir_okay=False))
@click.argument("out", type=click.Path())
@merging
@click.option(
    "--overwrite", is_flag=True, help="Replace OUT; without --resume, start an unfinished merge again."
)
@click.option(
    "--resume", is_flag=True, help="Go on with an unfinished merge; nothing to do if OUT is complete."
)
@click.option(
    "--dry-run", is_flag=True, help="Check everything that can be checked, print the plan, write nothing."
)
@click.option(
    "-I",
    "--intermediate-dir",
    type=click.Path(),
    help="Of a RECIPE of several documents: where named results go.  [default: OUT.stages]",
)
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@mergekit_flags
def run(recipe: str, out: str, dry_run: bool, intermediate_dir: str | None, quiet: bool, **options) -> None:
    """Merge the models of RECIPE (YAML) into the folder OUT.

    Several documents in RECIPE are several merges: the `name` of one may stand for a model in others.

    OUT appears only when it is complete. A merge that was stopped, however hard, goes on with --resume.
    """
    from pathlib import Path

    from ..errors import RecipeError
    from ..run import job
    from ..run.stages import load_stages, run_stages
    from . import show

    several = len(load_stages(Path(recipe))) > 1
    if dry_run:
        if several:
            raise RecipeError(f"{recipe}: --dry-run plans one merge, and this is several")
        plan = job.plan(recipe, out=out, **options)
        if not quiet:
            show.plan(plan)
        return
    progress = job.Silent() if quiet else show.progress()
    try:
        with progress:
            if several:
                folder = Path(intermediate_dir or f"{out}.stages")
                stages = run_stages(
                    Path(recipe),
                    Path(out),
                    folder,
                    lambda r, o: job.merge(r, o, progress=progress, **options),
                )
                reports = list(stages)
            else:
                reports = [(out, job.merge(recipe, out, progress=progress, **options))]
    except KeyboardInterrupt:
        click.echo("interrupted; the same command with --resume goes on", err=True)
        raise SystemExit(130) from None
    if not quiet:
        for place, report in reports:
            show.report(report, str(place))
