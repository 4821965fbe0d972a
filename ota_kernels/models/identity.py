"""Which models are the same one: by the files of their weights, however a recipe spells the place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import InputError, RecipeError
from ..recipe import Recipe


def files_of(model: Any) -> frozenset[tuple[int, int]]:
    """Device and inode of each of a model's `files`: equal for a link, a snapshot of the hub's cache, a path
    with `~` or `..`, and the file in place of its folder."""
    found = set()
    for path in model.files:
        try:
            status = os.stat(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        found.add((status.st_dev, status.st_ino))
    return frozenset(found)


def without_base(recipe: Recipe, base: Any, experts: Sequence[Any]) -> tuple[Recipe, list[int]]:
    """The recipe without models that are the base itself, and the indices of those that stay: the base's own
    edit is zero, and counting it would halve the others.

    Raises RecipeError where none stays.
    """
    own = files_of(base)
    kept = [t for t, expert in enumerate(experts) if files_of(expert) != own]
    if not kept:
        raise RecipeError(
            f"`models` lists only the base model {recipe.base_model!r}: add the models to merge into it"
        )
    return replace(recipe, models=tuple(recipe.models[t] for t in kept)), kept


def twins(models: Sequence[Any]) -> list[str]:
    """Labels of models that are listed more than once, each with the label that it repeats."""
    seen: dict[frozenset, str] = {}
    found = []
    for model in models:
        first = seen.setdefault(files_of(model), model.label)
        if first is not model.label:
            found.append(f"{model.label} is {first} again: it counts twice")
    return found
