"""The four levels at which a recipe gives parameters (model, slice, module, whole recipe), made one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RecipeError
from . import methods
from .methods import Method
from .parameters import (
    REQUIRED,
    Conditions,
    Parameter,
    Value,
    dump_value,
    followed_by,
    is_constant,
    parse_value,
    show,
    suggest,
)

# Of each group a model may have one; what a level says replaces the whole group of the levels further out.
EXCLUSIVE = (("precond_threshold", "density", "saliency_mass"), ("rank", "rank1_approx"))

TOP_KEYS = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "modules",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
)

# What mergekit's recipes carry although their method does not read it. Recipes in the wild have them
# everywhere.
_MERGEKIT_SHARED = frozenset(
    [
        "normalize",
        "rescale",
        "lambda",
        "int8_mask",
        "t",
        "select_topk",
        "r",
        "alpha",
        "nuslerp_flatten",
        "nuslerp_row_wise",
        "normalize_weights",
        "eps",
        "max_iter",
        "tol",
        "filter_wise",
        "embed_slerp",
    ]
)
_MERGEKIT = _MERGEKIT_SHARED | {"weight", "density", "gamma", "epsilon", "scale"}


@dataclass(frozen=True)
class Level:
    """The `parameters` of one place in a recipe."""

    where: str
    values: Mapping[str, Value]


class Notes:
    """Warnings of one recipe: one line for each key, with all its places."""

    def __init__(self) -> None:
        self._places: dict[str, list[str]] = {}

    def add(self, text: str, where: str) -> None:
        """text: what is wrong, with {} where the places stand."""
        self._places.setdefault(text, []).append(where)

    def lines(self) -> list[str]:
        """One line each."""
        return [text.format(", ".join(f"`{w}`" for w in places)) for text, places in self._places.items()]


def parse_level(data: Any, where: str, method: Method, notes: Notes, *, of_model: bool = False) -> Level:
    """One `parameters` mapping. of_model: it stands under a model, so that what the experts share is not read
    there."""
    if data is None:
        data = {}
    if not isinstance(data, Mapping):
        raise RecipeError(f"`{where}` is {show(data)}: it must be a mapping of keys to values")
    fields = {p.key: p for p in (method.own if of_model else method.by_key.values())}
    values = {}
    for key, value in data.items():
        if key not in fields:
            _check_unused(key, value, where, method, fields, notes)
            continue
        name = f"`{key}` in `{where}`"
        values[key] = parse_value(value, name, fields[key].kind)
        if not fields[key].varies and not is_constant(values[key]):
            raise RecipeError(
                f"{name} is {show(value)}: it holds for all tensors and takes no gradient or filter; "
                f"it must be {fields[key].kind.allowed}"
            )
    for group in EXCLUSIVE:
        chosen = _chosen(values, group)
        if len(chosen) > 1:
            both = " and ".join(f"`{key}`" for key in chosen)
            raise RecipeError(f"{both} in `{where}` exclude each other: keep one of them")
    return Level(where, values)


def _check_unused(
    key: Any, value: Any, where: str, method: Method, fields: Mapping[str, Parameter], notes: Notes
) -> None:
    """A key that the method does not read there: a note where mergekit would ignore it, else an error."""
    name = show(key) if not isinstance(key, str) else f"`{key}`"
    if key in method.keys and key not in _MERGEKIT_SHARED:
        raise RecipeError(
            f"{name} in `{where}` holds for the whole merge: move it to the global `parameters`"
        )
    if key in method.keys:
        notes.add(
            f"{name} in {{}} holds for the whole merge and is not read there: move it to the global "
            "`parameters`",
            where,
        )
    elif key in _MERGEKIT or any(key in methods.get(other).keys for other in methods.names()):
        notes.add(f"{name} in {{}} is not used by `{method.name}`", where)
    else:
        hint = suggest(key if isinstance(key, str) else "", fields)
        if key in TOP_KEYS:
            hint = "move it to the top level of the recipe"
        raise RecipeError(f"unknown key {show(key)} (value {show(value)}) in `{where}`; {hint}")


def place_of(key: Any, of_model: bool) -> str | None:
    """Where a key belongs that stands in the recipe itself, or beside a model's path; None for one that
    belongs nowhere."""
    if any(key in methods.get(name).keys for name in methods.names()):
        if key == "int8_mask":
            return "it has no effect on values: remove it"
        return "move it under `parameters`" + (" of that model" if of_model else "")
    return "move it to the top level of the recipe" if of_model and key in TOP_KEYS else None


def _chosen(values: Mapping[str, Value], group: Iterable[str]) -> list[str]:
    """The keys of an exclusive group that take effect: a density of 0 does, `rank1_approx: false` not."""
    return [key for key in group if key in values and values[key] is not False]


def combined(parameters: Sequence[Parameter], levels: Sequence[Level], owner: str) -> dict[str, Value]:
    """The value of each parameter, by the levels from the inside out, then the default; those that are not
    set are left out. owner: what an error calls the model or slice. RecipeError where a required one is given
    nowhere."""
    values = [dict(level.values) for level in levels]
    for group in EXCLUSIVE:
        _keep_one(group, values, owner)
    found = {}
    for parameter in parameters:
        value: Value = Conditions(())
        for level in values:
            if parameter.key in level:
                value = followed_by(value, level[parameter.key])
        if parameter.default is REQUIRED:
            if value == Conditions(()):
                raise RecipeError(
                    f"`{parameter.key}` is missing for {owner}: it must be {parameter.kind.allowed}"
                )
        elif parameter.default is not None:
            value = followed_by(value, parameter.default)
        if value != Conditions(()):
            found[parameter.key] = value
    return found


def _keep_one(group: tuple[str, ...], levels: list[dict[str, Value]], owner: str) -> None:
    """Of an exclusive group, take away what an inner level replaces."""
    key, closed = None, False
    for values in levels:
        if closed:
            for other in group:
                values.pop(other, None)
            continue
        for other in _chosen(values, group):
            if key not in (None, other):
                raise RecipeError(
                    f"`{key}` of {owner} is for some tensors only, and `{other}` for the rest: they exclude "
                    "each other, so "
                    f"give `{key}` a value without a filter"
                )
            key = other
            closed = not isinstance(values[other], Conditions) or values[other].complete


def dumped(values: Mapping[str, Value]) -> dict[str, Any]:
    """As a recipe writes them."""
    return {key: dump_value(value) for key, value in values.items()}
