"""`ota-merge plan`: what a merge would do."""

from __future__ import annotations

import json

import click

from .options import merging


@click.command()
@click.argument("recipe", type=click.Path(dir_okay=False))
@merging
@click.option("--tensors", is_flag=True, help="List every output tensor: sources, shape, type, parameters.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
def plan(recipe: str, tensors: bool, as_json: bool, **options) -> None:
    """Show what merging RECIPE would read, write and hold in memory. Reads file headers only."""
    from ..run import job
    from . import show

    found = job.plan(recipe, **options)
    if as_json:
        click.echo(json.dumps(found.as_dict(tensors), indent=2))
        return
    show.plan(found)
    if tensors:
        show.tensors(found)
