"""Whether the parts of a recipe fit together. What does not raises RecipeError."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import RecipeError
from .methods import Method
from .parameters import AUTO, Conditions, Parameter, Value, is_constant, show
from .recipe import Recipe, Slice
from .settings import Settings

_OF_A_BASE = (
    ("on_nonfinite", "base"),
    ("missing_curvature", "base"),
    ("rescale", True),
    ("calibrate", "svc"),
    ("calibrate", "shrink"),
)
_SELECTIONS = ("precond_threshold", "density", "saliency_mass")


def check(recipe: Recipe) -> None:
    method = recipe.method
    for part in recipe.slices:
        _check_base(part, method)
        values = [*part.shared.values(), *(v for e in part.experts for v in e.parameters.values())]
        if all(map(is_constant, values)) and "weights_path" not in part.shared:
            settings = Settings.of(
                method.name,
                part.base is not None,
                filled(method.shared, part.shared),
                [filled(method.own, e.parameters) for e in part.experts],
            )
            if fault := method.check(settings):
                raise RecipeError(fault)
    _check_whole(recipe, method)
    _check_lambda(recipe)
    _check_selections(recipe)
    _check_mean(recipe)
    _check_curvature(recipe, method)


def filled(parameters: Iterable[Parameter], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of all parameters, None where one is not set."""
    return {p.key: values.get(p.key) for p in parameters}


def _check_base(part: Slice, method: Method) -> None:
    if part.base is not None:
        return
    if method.base == "required":
        raise RecipeError(f"`{method.name}` needs a `base_model`: add one")
    if "layers" in part.shared and method.edits:
        raise RecipeError("`layers` scales what is added to a `base_model`: add one, or remove the key")
    for key, value in _OF_A_BASE:
        if part.shared.get(key) == value:
            raise RecipeError(
                f"`{key}: {str(value).lower()}` needs a `base_model`: add one, or remove the key"
            )


def _check_whole(recipe: Recipe, method: Method) -> None:
    """What holds for all tensors holds for all slices."""
    for parameter in method.shared:
        found = [part.shared.get(parameter.key) for part in recipe.slices]
        other = next((value for value in found if value != found[0]), None)
        if not parameter.varies and other is not None:
            raise RecipeError(
                f"`{parameter.key}` is {show(found[0])} in one slice and {show(other)} in another: it holds "
                "for the whole "
                "merge; move it to the global `parameters`"
            )


def _check_lambda(recipe: Recipe) -> None:
    """What is found over the whole model is one factor, of an edit of a base."""
    values = [part.shared.get("lambda") for part in recipe.slices]
    conditions = [c.value for v in values if isinstance(v, Conditions) for c in v.items]
    automatic, matched = AUTO in (*values, *conditions), recipe.parameters.get("match_norm") is not None
    if automatic and any(value != AUTO for value in values):
        raise RecipeError(
            "`lambda: auto` is found over the whole model, and not for some tensors: give it no filter; "
            "`times`, a further factor, may have filters and gradients"
        )
    if automatic and matched:
        raise RecipeError("`lambda: auto` and `match_norm` exclude each other: keep one of them")
    if not (automatic or matched):
        return
    key = "lambda: auto" if automatic else "match_norm"
    if any(part.base is None for part in recipe.slices):
        raise RecipeError(f"`{key}` needs a `base_model`: add one, or remove the key")
    if any(part.shared.get("fallback_to_base", True) is not True for part in recipe.slices):
        raise RecipeError(
            f"`{key}` needs `fallback_to_base: true`: a fallback to the experts' mean is no edit of theirs"
        )


def _check_selections(recipe: Recipe) -> None:
    """A share of the whole model is one number for each model."""
    if recipe.parameters.get("density_scope", "tensor") != "model":
        return
    first: dict[int, dict[str, Value]] = {}
    for part in recipe.slices:
        for entry in part.experts:
            chosen = {key: entry.parameters[key] for key in _SELECTIONS if key in entry.parameters}
            counted = [key for key in ("density", "saliency_mass") if key in chosen]
            before = first.setdefault(entry.number, chosen)
            counted += [key for key in ("density", "saliency_mass") if key in before and before != chosen]
            if counted and (before != chosen or not is_constant(chosen[counted[0]])):
                raise RecipeError(
                    f"`{counted[0]}` of {entry.model!r} differs between tensors, but is a share of the whole "
                    "model: give it one "
                    "value, or set `density_scope: tensor`"
                )


def _check_mean(recipe: Recipe) -> None:
    """A mean of h^p over the whole model has one p."""
    if recipe.parameters.get("normalise") != "model":
        return
    powers = [part.shared.get("power") for part in recipe.slices]
    if any(power != powers[0] or not is_constant(power) for power in powers):
        raise RecipeError(
            "`power` differs between tensors, but `normalise: model` divides by a mean over all of them: "
            "give it one "
            "value, or set `normalise: global`"
        )


def _check_curvature(recipe: Recipe, method: Method) -> None:
    if not method.curvature or recipe.parameters["missing_curvature"] != "error":
        return
    entries = [entry for part in recipe.slices for entry in part.experts]
    without = dict.fromkeys(repr(e.model) for e in entries if "preconditioner_path" not in e.parameters)
    given = any("preconditioner_path" in e.parameters for e in entries)
    asked = any(recipe.parameters.get(k) == v for k, v in (("select", "saliency"), ("weigh", "curvature")))
    if method.curvature_optional and not given and not asked:
        return
    if without:
        raise RecipeError(
            f"no `preconditioner_path` for {', '.join(without)}: `{method.name}` needs one for each model; "
            "`missing_curvature: uniform` or `base` opts out"
        )
