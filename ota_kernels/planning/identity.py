"""Which models are the same one: by the files of their weights, however a recipe spells the place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import InputError, RecipeError
from ..recipe.recipe import Recipe, Slice
from ..recipe.reference import Reference


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


def without_base(recipe: Recipe, opened: Mapping[Reference, Any]) -> Recipe:
    """The recipe without models that are its base itself: the base's own edit is zero, and counting it would
    halve the others. opened: the files of each reference without an adapter.

    Raises RecipeError where none stays.
    """
    files = {reference: files_of(model) for reference, model in opened.items()}
    kept = [[_without(part, files) for part in module.slices] for module in recipe.modules]
    parts = [part for module in kept for part in module]
    if parts == list(recipe.slices):
        return recipe
    for part in parts:
        if not part.experts:
            raise RecipeError(
                f"`models` lists only the base model {part.base.model!r}: add the models to merge into it"
            )
        if len(part.experts) < recipe.method.least and recipe.method.base == "required":
            raise RecipeError(
                f"`models` lists the base model {part.base.model!r} again: `{recipe.method.name}` merges "
                f"{recipe.method.least} or more models beside it"
            )
    numbers = sorted({entry.number for part in parts for entry in part.experts})
    renumbered = [
        replace(module, slices=tuple(_renumbered(part, numbers) for part in own))
        for module, own in zip(recipe.modules, kept, strict=True)
    ]
    return replace(recipe, modules=tuple(renumbered))


def _without(part: Slice, files: Mapping[Reference, frozenset]) -> Slice:
    if part.base is None or part.base.reference not in files:
        return part
    own, layers = files[part.base.reference], part.base.layers
    experts = [
        e for e in part.experts if e.layers != layers or e.origin is not None or files.get(e.reference) != own
    ]
    return part if len(experts) == len(part.experts) else replace(part, experts=tuple(experts))


def _renumbered(part: Slice, numbers: list[int]) -> Slice:
    experts = tuple(replace(entry, number=numbers.index(entry.number)) for entry in part.experts)
    return replace(part, experts=experts)


def twins(models: Sequence[Any]) -> list[str]:
    """Labels of models that are listed more than once, each with the label that it repeats."""
    seen: dict[frozenset, str] = {}
    found = []
    for model in models:
        first = seen.setdefault(files_of(model), model.label)
        if first is not model.label:
            found.append(f"{model.label} is {first} again: it counts twice")
    return found
