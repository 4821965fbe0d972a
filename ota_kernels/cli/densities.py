"""`ota-merge densities`: which density to take."""

from __future__ import annotations

import json

import click

from .options import reading


@click.command()
@click.argument("recipe", type=click.Path(dir_okay=False))
@click.option(
    "--grid", help="Densities to show, like 0.01,0.1,0.5.  [default: 0.01,0.02,0.05,0.1,0.2,0.3,0.5,0.7]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
@reading
def densities(recipe: str, grid: str | None, as_json: bool, **options) -> None:
    """Show what each density would keep of the experts of RECIPE (method ota): how many edits, from which
    saliency on, in which roles and layers; and which density holds a share of the saliency.

    Reads the inputs once. Thresholds hold over the whole model, and are exact: one can be a model's
    precond_threshold. The recipe's own densities and thresholds play no part.
    """
    from ..run.grid import densities as of_grid
    from . import density_tables, show

    values = of_grid.DEFAULT_GRID if grid is None else grid.split(",")
    with show.progress() as progress:
        found = of_grid.densities(recipe, values, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(found, indent=2, allow_nan=False))
    else:
        density_tables.show(found)
