"""From a recipe's values to the settings of one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import RecipeError
from ..recipe.methods import Method
from ..recipe.parameters import REQUIRED, Parameter, Value, filters_of, is_constant, value_at
from ..recipe.recipe import Recipe, Slice
from ..recipe.settings import Settings

# What says where curvature lies is no setting of a tensor.
_PATHS = ("preconditioner_path", "weights_path")


class Resolver:
    """The settings of each tensor of one slice. known: settings that other slices of the recipe found, so
    that equal ones are one object; table: the models' weights by tensor, where `weights_path` gives them."""

    def __init__(
        self,
        part: Slice,
        method: Method,
        known: dict[tuple, Settings],
        table: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        self._part, self._method, self._known, self._table = part, method, known, table
        self._plain, self._varying = _divided(method.shared, part.shared)
        self._of_experts = [_divided(method.own, entry.parameters) for entry in part.experts]
        self._found: dict[tuple, Settings] = {}

    def settings(
        self, name: str, names: Sequence[str], position: float, present: Sequence[int] | None = None
    ) -> Settings:
        """For the output tensor `name`. names: of each expert's tensor in its model, which filters of an
        expert's parameters are parts of; position: of its layer, 0 to 1; present: numbers of the experts in
        the slice that have the tensor, None for all. RecipeError where a value is missing or wrong for this
        tensor."""
        values = [value_at(p, value, name, position) for p, value in self._varying]
        for (_, varying), own in zip(self._of_experts, names, strict=True):
            values += [value_at(p, value, own, position) for p, value in varying]
        weights = None if self._table is None else self._weights(name)
        key = (*values, weights, present if present is None else tuple(present))
        if key not in self._found:
            self._found[key] = self._made(iter(values), name, present, weights)
        return self._found[key]

    def _weights(self, name: str) -> tuple[float, ...]:
        if name not in self._table:
            raise RecipeError(f"the table of `weights_path` has no row for {name}: every tensor needs one")
        return tuple(self._table[name][entry.number] for entry in self._part.experts)

    def _made(
        self,
        values: Iterable[Any],
        name: str,
        present: Sequence[int] | None,
        weights: Sequence[float] | None,
    ) -> Settings:
        shared = self._plain | {p.key: next(values) for p, _ in self._varying}
        experts = [plain | {p.key: next(values) for p, _ in varying} for plain, varying in self._of_experts]
        for own, weight in zip(experts, weights or (), strict=False):
            own["weight"] = weight
        if present is not None:
            experts = [experts[i] for i in present]
        for parameters, found in ((self._method.shared, [shared]), (self._method.own, experts)):
            for p in parameters:
                if p.default is REQUIRED and any(each[p.key] is None for each in found):
                    raise RecipeError(
                        f"`{p.key}` is missing for {name}: no condition of the recipe holds for it; add a "
                        "`value` without "
                        "a filter"
                    )
        has_base = self._part.base is not None
        whole = (has_base, tuple(shared.values()), tuple(tuple(e.values()) for e in experts))
        if whole not in self._known:
            settings = Settings.of(self._method.name, has_base, shared, experts)
            if fault := self._method.check(settings):
                raise RecipeError(f"{name}: {fault}")
            self._known[whole] = settings
        return self._known[whole]


def _divided(
    parameters: Iterable[Parameter], values: dict[str, Value]
) -> tuple[dict[str, Any], list[tuple[Parameter, Value]]]:
    """(values of all tensors by key, None where nothing is set; those that vary)."""
    plain: dict[str, Any] = {}
    varying = []
    for p in parameters:
        if p.key in _PATHS:
            continue
        value = values.get(p.key)
        plain[p.key] = value if is_constant(value) else None
        if not is_constant(value):
            varying.append((p, value))
    return plain, varying


def unused_filters(recipe: Recipe, of_tensors: Iterable[str]) -> list[str]:
    """One line for each filter that is no part of any name. of_tensors: names of outputs
    and inputs."""
    filters: dict[str, set[str]] = {}
    for part in recipe.slices:
        for values in (part.shared, *(entry.parameters for entry in part.experts)):
            for key, value in values.items():
                for pattern in filters_of(value):
                    filters.setdefault(pattern, set()).add(key)
    names = set(of_tensors) if filters else set()
    return [
        f"the filter {pattern!r} of {', '.join(f'`{key}`' for key in sorted(keys))} matches no tensor"
        for pattern, keys in filters.items()
        if not any(pattern in name for name in names)
    ]
