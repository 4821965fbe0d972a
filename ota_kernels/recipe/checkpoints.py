"""The checkpoints of one run: folders whose names end in a number, oldest first."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from ..errors import RecipeError
from .parameters import show

_NUMBER = re.compile(r"[0-9]+")


def matched(pattern: str, folder: Path | None) -> list[str]:
    """The folders that a pattern names, from the current folder, else from the recipe's, by their numbers.
    RecipeError where there is none, or one has no number of its own."""
    found = [path for path in glob.glob(os.path.expanduser(pattern)) if os.path.isdir(path)]
    if not found and folder is not None:
        found = [path for path in glob.glob(os.path.join(folder, pattern)) if os.path.isdir(path)]
    if not found:
        raise RecipeError(
            f"`models` is {show(pattern)}, which no folder matches: give a list, or a pattern such as "
            "run/checkpoint-*"
        )
    fixed = next((i for i, part in enumerate(Path(pattern).parts) if glob.has_magic(part)), None)
    parts = 1 if fixed is None else len(Path(pattern).parts) - fixed
    numbers = {path: _number(path, parts) for path in found}
    for path, number in numbers.items():
        if number is None:
            raise RecipeError(
                f"{path}, which `models` matches, has no number to sort by: narrow the pattern, to such as "
                "checkpoint-[0-9]*"
            )
        twin = next(other for other in found if numbers[other] == number)
        if twin != path:
            raise RecipeError(
                f"{twin} and {path}, which `models` matches, have one number: narrow the pattern"
            )
    return sorted(found, key=numbers.__getitem__)


def chosen(paths: list[str], every: int | None, last: int | None) -> list[int]:
    """Places of the checkpoints that are merged: those whose number is a multiple of `every`, and of them the
    `last` ones. RecipeError where none is."""
    found = list(range(len(paths)))
    if every is not None:
        numbers = [_number(path, 1) for path in paths]
        for path, number in zip(paths, numbers, strict=True):
            if number is None:
                raise RecipeError(f"`every` chooses by the numbers of checkpoints, and {path} has none")
        found = [i for i in found if numbers[i] % every == 0]
        if not found:
            raise RecipeError(f"`every` is {every}, and no checkpoint of `models` has a multiple of it")
    return found if last is None else found[-last:]


def _number(path: str, parts: int) -> int | None:
    """The last number in the last parts of a path, the last of them first."""
    for part in reversed(Path(path).parts[-parts:]):
        if found := _NUMBER.findall(part):
            return int(found[-1])
    return None
