"""`ota-merge sweep`: several merges with one read of the inputs."""

from __future__ import annotations

from typing import Any

import click

from .options import merging


@click.command()
@click.argument("recipe", type=click.Path(dir_okay=False))
@click.argument("out", type=click.Path())
@click.option(
    "--set",
    "settings",
    multiple=True,
    required=True,
    metavar="KEY=V1,V2,...",
    help="Values of a parameter; several --set give every combination.",
)
@merging
@click.option("--overwrite", is_flag=True, help="Replace the merges that are in OUT.")
@click.option(
    "--resume", is_flag=True, help="Go on: merges that are complete stay, the others are gone on with."
)
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def sweep(recipe: str, out: str, settings: tuple[str, ...], quiet: bool, **options: Any) -> None:
    """Merge the models of RECIPE (YAML) once for every combination of values, into folders in OUT.

    The values replace what the recipe gives for their keys, for all models and tensors. The inputs are read
    once; each folder is complete when it appears, with a report of its own.
    """
    from ..run.job import Silent
    from ..run.sweep import sweep as run
    from . import show

    values = dict(map(_parsed, settings))
    if len(values) < len(settings):
        raise click.UsageError("--set gives a key twice: list all its values in one")
    progress = Silent() if quiet else show.progress()
    try:
        with progress:
            reports = run(recipe, out, values, progress=progress, **options)
    except KeyboardInterrupt:
        click.echo("interrupted; the same command with --resume goes on", err=True)
        raise SystemExit(130) from None
    if not quiet:
        for name, report in reports.items():
            show.report(report, f"{out}/{name}")


def _parsed(setting: str) -> tuple[str, list[Any]]:
    import yaml

    key, equals, text = setting.partition("=")
    try:
        values = [yaml.safe_load(part) for part in text.split(",")]
    except yaml.YAMLError:
        values = [None]
    if not equals or not key or any(value is None for value in values):
        raise click.UsageError(f"--set {setting}: give it as KEY=VALUE,VALUE,...")
    return key.strip(), values
