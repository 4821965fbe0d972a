"""`ota-merge adapters`: LoRA adapters into one adapter."""

from __future__ import annotations

from typing import Any

import click

_KEYS = ("merge_method", "models", "parameters", "rank", "dtype")


@click.command()
@click.argument("recipe", type=click.Path(dir_okay=False))
@click.argument("out", type=click.Path())
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def adapters(recipe: str, out: str, overwrite: bool, quiet: bool) -> None:
    """Merge the LoRA adapters of RECIPE (YAML) in their core space into one adapter, OUT.

    RECIPE has `merge_method`, `models` (each an adapter's folder, with parameters of its own), `parameters`,
    and, if wanted, `rank` and `dtype` of the result.
    """
    from pathlib import Path

    from ..errors import RecipeError
    from ..integrations.core_space import merge_adapters
    from ..recipe.documents import load_documents

    documents = load_documents(Path(recipe))
    if len(documents) > 1:
        raise RecipeError(f"{recipe}: holds {len(documents)} documents: give one merge")
    try:
        folders, options = arguments_of(documents[0], Path(recipe).parent)
    except RecipeError as error:
        raise RecipeError(f"{recipe}: {error}") from error
    found = merge_adapters(folders, out, overwrite=overwrite, **options)
    if not quiet:
        click.echo(
            f"{out}: {found['modules']} modules of rank {found['rank']}; {found['lost']:.2e} of them lost"
        )


def arguments_of(data: Any, folder: Any) -> tuple[list[str], dict[str, Any]]:
    """Folders and keyword arguments of `merge_adapters`, from a recipe. RecipeError for what is not
    understood."""
    from ..errors import RecipeError
    from ..recipe.parameters import suggest
    from ..recipe.reference import resolve_path

    if not isinstance(data, dict) or not isinstance(data.get("models"), list):
        raise RecipeError("must be a mapping with `models`, a list of adapters")
    for key in data:
        if key not in _KEYS:
            raise RecipeError(f"unknown key `{key}`; {suggest(str(key), _KEYS)}")
    folders, own = [], []
    for i, entry in enumerate(data["models"]):
        if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
            raise RecipeError(f"`models[{i}]` must be a mapping with `model`, an adapter's folder")
        folders.append(resolve_path(entry["model"], folder))
        own.append(entry.get("parameters") or {})
    options: dict[str, Any] = dict(data.get("parameters") or {})
    for key in dict.fromkeys(key for parameters in own for key in parameters):
        default = options.get(key)
        values = [parameters.get(key, default) for parameters in own]
        if None in values:
            raise RecipeError(f"`{key}` is given for some models only: give it for all, or in `parameters`")
        options[key] = values
    if "lambda" in options:
        options["lambda_"] = options.pop("lambda")
    for key in ("rank", "dtype"):
        if data.get(key) is not None:
            options[key] = data[key]
    return folders, options | {"method": data.get("merge_method", "linear")}
