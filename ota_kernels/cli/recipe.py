"""`ota-merge recipe`: a recipe to begin with."""

from __future__ import annotations

from pathlib import Path

import click

_BESIDE = "exp_avg_sq.safetensors"


@click.command()
@click.argument("base")
@click.argument("experts", nargs=-1, required=True)
@click.option(
    "--moments",
    multiple=True,
    type=click.Path(dir_okay=False),
    help=f"File of an expert's second moments, once for each, in their order.  [default: its {_BESIDE}]",
)
def recipe(base: str, experts: tuple[str, ...], moments: tuple[str, ...]) -> None:
    """Print a recipe that merges fine-tuned EXPERTS of BASE and needs no tuning: OTA with the edits that hold
    99 % of each expert's saliency, weights in one unit, and the automatic lambda.

    `ota-merge recipe models/base models/math models/code > recipe.yaml`
    """
    import yaml

    from ..errors import RecipeError
    from ..recipe.advised import advised
    from ..recipe.schema import parse_recipe

    if len(experts) < 2:
        raise RecipeError("one expert is no merge: give two or more, or graft one (`ota-merge methods ffg`)")
    if moments and len(moments) != len(experts):
        raise RecipeError(f"--moments is given {len(moments)} times for {len(experts)} experts")
    files = list(moments) or [_beside(expert) for expert in experts]
    without = [expert for expert, file in zip(experts, files, strict=True) if file is None]
    made = "`ota-merge moments extract` makes it from an optimizer's state"
    if without and len(without) < len(experts):
        raise RecipeError(
            f"no {_BESIDE} in {', '.join(without)}, but in others: {made}, or name it by --moments"
        )
    data = advised(base, experts, files)
    parse_recipe(data)
    if without:
        click.echo(f"note: without {_BESIDE}, masks go by magnitude and means are plain: {made}", err=True)
    click.echo(yaml.safe_dump(data, sort_keys=False), nl=False)


def _beside(expert: str) -> str | None:
    path = Path(expert).expanduser() / _BESIDE
    return str(Path(expert) / _BESIDE) if path.is_file() else None
