"""`ota-merge plan`: what a merge would do."""

from __future__ import annotations

import json

import click

from .options import merging


@click.command()
@click.argument("recipe", type=click.Path(dir_okay=False))
@merging
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
def plan(recipe: str, as_json: bool, **options) -> None:
    """Show what merging RECIPE would read, write and hold in memory. Reads file headers only."""
    from ..run import job
    from . import show

    found = job.plan(recipe, **options)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=2))
    else:
        show.plan(found)
