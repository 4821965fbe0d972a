"""The arguments of the functional API as a recipe, checked like a file's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import RecipeError
from .recipe import methods
from .recipe.schema import Recipe, parse_recipe


def recipe_of(
    has_base: bool,
    n: int,
    has_curvature: bool,
    method: str,
    out_dtype: str | None,
    parameters: dict[str, Any],
    origins: Sequence[int] = (),
) -> Recipe:
    """n: experts; parameters: the recipe's keys, `lambda_` for `lambda`; a key of one model may be a list
    with a value per expert; origins: numbers of experts with an origin of their own. The models are called
    "base", "experts[t]" and "origins[t]"."""
    row = methods.get(method)
    own_keys = {p.key for p in row.own}
    if "preconditioner_path" in parameters:
        raise RecipeError("`preconditioner_path` is for recipes: give the tensors as `curvatures`")
    if row.of_one_run and any(key in parameters for key in ("every", "last")):
        raise RecipeError("`every` and `last` choose among folders: give the tensors that are to be merged")
    if parameters.get("bias_correction"):
        raise RecipeError(
            "`bias_correction` reads a file's metadata: divide the curvatures by 1 - beta2^step instead"
        )
    for key in parameters:
        if key not in row.keys and any(key in methods.get(other).keys for other in methods.names()):
            raise RecipeError(f"`{key}` is not used by `{method}`: leave it out")
    if "lambda_" in parameters:
        parameters["lambda"] = parameters.pop("lambda_")
    whole, per_model = {}, [{} for _ in range(n)]
    for key, value in parameters.items():
        if key not in own_keys or not isinstance(value, (list, tuple)):
            whole[key] = value
            continue
        if len(value) != n:
            raise RecipeError(f"`{key}` has {len(value)} values for {n} experts")
        for own, one in zip(per_model, value, strict=True):
            own[key] = one
    if row.curvature:
        if not has_curvature and whole.get("missing_curvature", "error") == "error":
            whole["missing_curvature"] = "uniform"
        for t, own in enumerate(per_model):
            own["preconditioner_path"] = f"curvatures[{t}]"
    models = [{"model": f"experts[{t}]", "parameters": own} for t, own in enumerate(per_model)]
    for t in origins:
        models[t]["origin"] = f"origins[{t}]"
    data: dict[str, Any] = {
        "merge_method": method,
        "models": models,
        "parameters": whole,
        "out_dtype": out_dtype,
    }
    if has_base and row.base != "ignored":
        data["base_model"] = "base"
    return parse_recipe(data)
