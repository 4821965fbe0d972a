"""YAML text into plain mappings. What PyYAML lets through or meets raises RecipeError, in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..errors import RecipeError

# The longest published recipe has 2 KB; the limit keeps a mistyped path to a checkpoint from being read.
_MAX_FILE_BYTES = 1 << 20


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, of which PyYAML would silently keep the last."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                problem = f"the key `{key.value}` stands there twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def load_documents(path: Path) -> list[Any]:
    """The YAML documents of a file, at least one; empty ones after the first are left out."""
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"cannot read the recipe: {reason}") from error
    if len(text) > _MAX_FILE_BYTES:
        raise RecipeError(f"larger than {_MAX_FILE_BYTES} bytes, so not a recipe: give a YAML file")
    try:
        first, *others = list(yaml.load_all(text, _UniqueKeyLoader)) or [None]
    # Beside YAMLError, PyYAML lets through what its constructors meet: ValueError for the date 2001-99-99,
    # LookupError for `!!bool 3`, AttributeError for `!!timestamp x`, RecursionError for deep nesting.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise RecipeError(f"not readable as YAML: {_problem(error)}") from error
    return [first, *(other for other in others if other is not None)]


def _problem(error: Exception) -> str:
    """PyYAML's many-line text as one line."""
    mark = getattr(error, "problem_mark", None)
    text = f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else str(error)
    return " ".join(text.split())
