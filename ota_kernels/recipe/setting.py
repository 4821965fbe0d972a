"""A recipe's mapping with other values of some parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import RecipeError
from . import methods
from .levels import EXCLUSIVE
from .parameters import suggest


def with_values(data: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with these values for all models and tensors: they replace what it gives anywhere for these
    keys, and for keys that exclude them. RecipeError for keys that its method does not have."""
    known = methods.get(str(data.get("merge_method"))).keys - {"preconditioner_path"}
    for key in values:
        if key not in known:
            raise RecipeError(
                f"`{key}` is no parameter of `{data.get('merge_method')}`; {suggest(key, known)}"
            )
    groups = [group for group in EXCLUSIVE if any(key in group for key in values)]
    replaced = {*values, *(key for group in groups for key in group)}
    found = _without(data, replaced)
    return found | {"parameters": {**(found.get("parameters") or {}), **values}}


def _without(value: Any, keys: set[str]) -> Any:
    """A copy without these keys in any `parameters`."""
    if isinstance(value, Mapping):
        return {
            key: {k: v for k, v in inner.items() if k not in keys}
            if key == "parameters" and isinstance(inner, Mapping)
            else _without(inner, keys)
            for key, inner in value.items()
        }
    return [_without(item, keys) for item in value] if isinstance(value, list | tuple) else value
