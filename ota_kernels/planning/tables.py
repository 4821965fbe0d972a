"""Tables of weights, one for each tensor and model: what learned coefficients (aTLAS, AdaMerging) or a search
over them end in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import InputError
from ..io.weights import read_weights
from ..recipe.parameters import suggest
from ..recipe.recipe import Recipe

Table = Mapping[str, list[float]]


def table_of(recipe: Recipe) -> Table | None:
    """Of a recipe's `weights_path`, None without. InputError for one that is not of its models."""
    path = recipe.parameters.get("weights_path")
    if path is None:
        return None
    table, count = read_weights(Path(path)), len(recipe.models)
    for name, row in table.items():
        if len(row) != count:
            raise InputError(
                f"{path}: {name!r} has {len(row)} weights, and the recipe {count} models: give one for each, "
                "in the recipe's order"
            )
    return table


def check_rows(table: Table | None, names: Iterable[str]) -> None:
    """InputError where the table has a row of no tensor. names: of all tensors."""
    known = set(names)
    unknown = next((name for name in table or () if name not in known), None)
    if unknown is not None:
        raise InputError(
            f"the table of `weights_path` has a row for {unknown!r}, which no model has; "
            f"{suggest(unknown, known)}"
        )
