"""`ota-merge demo`: experts on handwritten digits, trained and merged here, measured in one table."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

import click


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Repetitions to average over."
)
def demo(folder: Path, seeds: int) -> None:
    """Train small experts on handwritten digits, merge them, and print what came out.

    DIR receives, per seed, the base, the experts with their second moments, the recipes and the merged
    models. A second run reuses what is trained. Needs the `demo` extra; downloads nothing.
    """
    from rich.console import Console

    from ..demo import table

    rows = table.run(folder, seeds)
    first = folder / "seed0"
    click.echo()
    Console().print(table.render(rows, seeds))
    click.echo(
        "\nkept: share of the experts' edits that is in the model.\n"
        "density 0.2: the most salient 20 % of each expert's edits.\n"
        "mass 0.9: the fewest edits that hold 90 % of an expert's saliency; no share to tune.\n"
        "ota-merge recipe: mass 0.99, power 1, one unit for all weights, lambda auto. Where experts undo "
        "each other,\nas these do, that lambda is too large.\n"
        f"\nBase, experts, recipes and merges: {first} and so on. Try next:\n"
        f"  ota-merge run {quote(str(first / 'ota_ffg_mass.yaml'))} {quote(str(folder / 'my_merge'))}"
    )
