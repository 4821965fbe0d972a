"""The registry of merge methods: one row of data each."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .decide import selection_of
from .errors import RecipeError
from .formula import Formula

if TYPE_CHECKING:
    from .recipe import Recipe


def _masked_edits(recipe: Recipe) -> Formula:
    """FFG masks, then the recipe's variant of combining the masked edits (arXiv 2509.11167)."""
    p = recipe.parameters
    variant = p.masked_task_vector_merge_method
    rules = [selection_of(m.parameters) for m in recipe.models]
    return Formula(
        power=p.power,
        lambda_=p.lambda_,
        denominator=None if variant == "precond" else float(len(rules)),
        curvature_weights=variant == "precond",
        masked=any(r.surveyed or (r.rule == "threshold" and r.value > 0) for r in rules),
        mask_weights=p.mask_weights,
        elect_signs=variant == "ties",
        fallback_to_base=p.fallback_to_base,
        repair_nonfinite=p.on_nonfinite == "base",
    )


def _weights(recipe: Recipe) -> list[float]:
    return [m.parameters.weight for m in recipe.models]


def _weighted_mean(recipe: Recipe) -> Formula:
    """sum_t weight_t w_t over the sum of the weights, or over 1."""
    total = sum(_weights(recipe)) if recipe.parameters.normalize else 1.0
    return Formula(denominator=total, curvature_weights=False, masked=False)


@dataclass(frozen=True)
class Method:
    """What a merge method needs and which recipe keys it accepts.

    formula: one line in the symbols of README, "Methods"; base: "required", "optional" or "unused";
    curvature: whether each model brings second moments; parameters: keys for the whole merge;
    model_parameters: keys of one model, each of which may also stand in the recipe's global `parameters`
    as the default of all models; kernel: what the kernels compute for a recipe; weights: one weight per
    model where the recipe gives them, None where curvature does.
    """

    name: str
    formula: str
    base: str
    curvature: bool
    parameters: frozenset[str]
    model_parameters: frozenset[str]
    kernel: Callable[[Recipe], Formula] = _masked_edits
    weights: Callable[[Recipe], list[float]] | None = None

    @property
    def keys(self) -> frozenset[str]:
        """Every key that the method accepts somewhere."""
        return self.parameters | self.model_parameters


_REGISTRY: dict[str, Method] = {}


def register(method: Method) -> None:
    """Add a row; a name that is taken raises ValueError."""
    if method.name in _REGISTRY:
        raise ValueError(f"the merge method `{method.name}` is registered twice")
    _REGISTRY[method.name] = method


def get(name: str) -> Method:
    """The row called name; RecipeError names the nearest one when there is none."""
    if name not in _REGISTRY:
        raise RecipeError(f"unknown merge_method {name!r}; {suggest(name, _REGISTRY)}")
    return _REGISTRY[name]


def names() -> tuple[str, ...]:
    """Every registered name, sorted."""
    return tuple(sorted(_REGISTRY))


def suggest(word: str, known: Iterable[str]) -> str:
    """The end of an "unknown word" message: the nearest known word, or all of them if none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"


register(
    Method(
        name="ota",
        formula="w_0 + lambda * sum_t P_t d_t / sum_t P_t, P_t = m_t * (n(g_t * h_t^p) + eps)",
        base="optional",
        curvature=True,
        parameters=frozenset(
            {
                "epsilon",
                "normalise",
                "power",
                "lambda",
                "fallback_to_base",
                "density_scope",
                "mask_weights",
                "masked_task_vector_merge_method",
                "ties_density",
                "rescale",
                "approximate_norm",
                "rescale_relative_threshold",
                "bias_correction",
                "missing_curvature",
                "on_nonfinite",
                "extra_tensors",
            }
        ),
        model_parameters=frozenset(
            {
                "preconditioner_path",
                "precond_threshold",
                "density",
                "saliency_mass",
                "scaling_factor",
                "rank",
                "rank1_approx",
                "weight",
            }
        ),
    )
)
register(
    Method(
        name="linear",
        formula="sum_t weight_t w_t / sum_t weight_t (normalize: false: not divided)",
        base="unused",
        curvature=False,
        parameters=frozenset({"normalize", "extra_tensors"}),
        model_parameters=frozenset({"weight"}),
        kernel=_weighted_mean,
        weights=_weights,
    )
)
