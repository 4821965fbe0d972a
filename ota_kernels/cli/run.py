"""`ota-merge run`: the whole job."""

from __future__ import annotations

import click

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
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def run(recipe: str, out: str, dry_run: bool, quiet: bool, **options) -> None:
    """Merge the models of RECIPE (YAML) into the folder OUT.

    OUT appears only when it is complete. A merge that was stopped, however hard, goes on with --resume.
    """
    from ..run import job
    from . import show

    if dry_run:
        plan = job.plan(recipe, out=out, **options)
        if not quiet:
            show.plan(plan)
        return
    progress = job.Silent() if quiet else show.progress()
    try:
        with progress:
            report = job.merge(recipe, out, progress=progress, **options)
    except KeyboardInterrupt:
        click.echo("interrupted; the same command with --resume goes on", err=True)
        raise SystemExit(130) from None
    if not quiet:
        show.report(report, out)
