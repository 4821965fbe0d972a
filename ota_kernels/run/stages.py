"""Several merges in one file, each a YAML document: the results of some are models of others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import RecipeError
from ..recipe.documents import load_documents
from ..recipe.parameters import show
from ..recipe.recipe import Recipe
from ..recipe.schema import parse_recipe

_NAME = re.compile(r"[\w.-]+")


class Stage(NamedTuple):
    """One merge of a file. name: None for the one whose result is the output; data: its document, in which
    names of other stages stand for their folders; needs: the names of those."""

    name: str | None
    data: Mapping[str, Any]
    needs: tuple[str, ...]

    def recipe(self, path: Path, folder: Path) -> Recipe:
        """folder: where the results of named stages lie."""
        places = {name: str(folder / name) for name in self.needs}
        data = {key: value for key, value in _placed(self.data, places).items() if key != "name"}
        try:
            return parse_recipe(data, path.parent)
        except RecipeError as error:
            raise RecipeError(f"{path}: {self.name or 'the last merge'}: {error}") from error


def load_stages(path: Path) -> list[Stage]:
    """The documents of a file in the order in which they can run, whatever their order in the file.
    RecipeError for names that are taken or go in a circle."""
    try:
        documents = load_documents(path)
        if len(documents) == 1:
            return [Stage(None, documents[0], ())]
        return _ordered(_stages(documents))
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def _stages(documents: list[Any]) -> list[Stage]:
    found: dict[str | None, Mapping[str, Any]] = {}
    for i, data in enumerate(documents):
        if not isinstance(data, Mapping):
            raise RecipeError(f"document {i + 1} is {show(data)}: it must be a mapping of keys to values")
        name = data.get("name")
        if name is not None and (
            not isinstance(name, str) or not _NAME.fullmatch(name) or name in (".", "..")
        ):
            raise RecipeError(f"`name` in document {i + 1} is {show(name)}: it must be a folder's name")
        if name in found:
            text = f"the name {name!r}" if name is not None else "no name, which one may have:"
            raise RecipeError(f"two documents have {text}; give each its own `name`")
        found[name] = data
    names = {name for name in found if name is not None}
    return [
        Stage(name, data, tuple(sorted(names & set(_texts(data)) - {None}))) for name, data in found.items()
    ]


def _ordered(stages: list[Stage]) -> list[Stage]:
    done: list[Stage] = []
    left = list(stages)
    while left:
        ready = [s for s in left if all(any(d.name == n for d in done) for n in s.needs)]
        if not ready:
            names = ", ".join(repr(stage.name) for stage in left)
            raise RecipeError(
                f"the merges {names} need each other in a circle: none of them can be the first"
            )
        done += ready
        left = [stage for stage in left if stage not in ready]
    return [s for s in done if s.name is not None] + [s for s in done if s.name is None]


def _texts(value: Any, key: str | None = None) -> Iterator[str]:
    """Every text of a document that may name a model."""
    if isinstance(value, str) and key != "name":
        yield value
    elif isinstance(value, Mapping):
        for inner, item in value.items():
            yield from _texts(item, inner)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _placed(value: Any, places: Mapping[str, str], key: str | None = None) -> Any:
    """With folders in place of the names of stages."""
    if isinstance(value, str):
        return places.get(value, value) if key != "name" else value
    if isinstance(value, Mapping):
        return {inner: _placed(item, places, inner) for inner, item in value.items()}
    return [_placed(item, places) for item in value] if isinstance(value, list | tuple) else value


def run_stages(
    path: Path, out: Path, folder: Path, merge: Callable[[Recipe, Path], dict]
) -> Iterator[tuple[Path, dict]]:
    """Run the merges of a file; yields each result's folder and report. folder: where named results go;
    merge: runs one; with its `resume`, what is complete is found so."""
    stages = load_stages(path)
    for stage in stages:
        place = out if stage.name is None else folder / stage.name
        folder.mkdir(parents=True, exist_ok=True)
        yield place, merge(stage.recipe(path, folder), place)
