"""`ota-merge files`: single files into one."""

from __future__ import annotations

import functools

import click

from .compat import mergekit_flags
from .options import merging_files


@click.command()
@click.argument("recipe", type=click.Path(dir_okay=False))
@click.argument("out", type=click.Path(), metavar="OUT.safetensors")
@click.option(
    "-i",
    "--intersection",
    "--tensor-intersection",
    is_flag=True,
    help="Merge the tensors that all files have.",
)
@click.option(
    "-u",
    "--union",
    "--tensor-union",
    is_flag=True,
    help="Merge all tensors, each over the files that have it.",
)
@merging_files
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
@click.option("--resume", is_flag=True, help="Go on with an unfinished merge; nothing to do if OUT is it.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@functools.partial(mergekit_flags, of_files=True)
def files(recipe: str, out: str, intersection: bool, union: bool, quiet: bool, **options) -> None:
    """Merge single files (.safetensors, .pt, .pth, .ckpt, .bin), which RECIPE names as models, into OUT:
    checkpoints of ComfyUI and diffusers, state dictionaries of anything.

    All files must have the same tensors, unless -i or -u says what is merged. There are no layers,
    vocabularies or configurations.
    """
    from ..errors import RecipeError
    from ..run.files import merge_files
    from ..run.options import Silent
    from . import show

    if intersection and union:
        raise RecipeError("-i and -u exclude each other: keep one of them")
    names = "intersection" if intersection else "union" if union else "same"
    progress = Silent() if quiet else show.progress()
    try:
        with progress:
            report = merge_files(recipe, out, names, progress=progress, **options)
    except KeyboardInterrupt:
        click.echo("interrupted; the same command with --resume goes on", err=True)
        raise SystemExit(130) from None
    if not quiet:
        show.report(report, out) if report else click.echo(f"{out} is complete already")
