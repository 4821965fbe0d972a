"""The table of merge methods: one row each. A row is words (tensors/terms.py), its own parameters, and two
pure functions."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..errors import RecipeError
from ..tensors.found import Found, selection_of
from ..tensors.terms import ExpertTerms, Terms, Words, scale_weights
from .settings import Settings

if TYPE_CHECKING:
    from .schema import Recipe


class Need(NamedTuple):
    """A statistic that must be known before a tensor merges, by its name in run/statistics.py.

    scope: over one "tensor" or the whole "model"; reads: of the inputs; of_masks: whether it looks at what
    thresholds keep, which then must be known before, and cannot be settled after the merge.
    """

    statistic: str
    scope: str = "tensor"
    reads: int = 1
    of_masks: bool = False


@dataclass(frozen=True)
class Method:
    """What a merge method needs and which recipe keys it accepts.

    formula: one line in the symbols of README, "Methods"; base: "required", "optional" or "unused";
    curvature: whether each model brings second moments; parameters: keys for the whole merge;
    model_parameters: keys of one model, each of which may also stand in the recipe's global `parameters`
    as the default of all models; needs: what must be known before a tensor merges, read after read;
    terms: what the kernels compute for a tensor, from its settings and what was found.
    """

    name: str
    formula: str
    base: str
    curvature: bool
    parameters: frozenset[str]
    model_parameters: frozenset[str]
    terms: Callable[[Settings, Found], Terms]
    needs: Callable[[Settings], list[Need]] = lambda settings: []

    @property
    def keys(self) -> frozenset[str]:
        """Every key that the method accepts somewhere."""
        return self.parameters | self.model_parameters

    def settings(self, recipe: Recipe) -> Settings:
        """The recipe's parameters for a tensor of which nothing special is said."""
        from .schema import values_of

        shared = values_of(recipe.parameters)
        experts = [values_of(m.parameters) for m in recipe.models]
        return Settings.of(
            self.name, recipe.base_model is not None and self.base != "unused", shared, experts
        )


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


# ota


def _ota_words(settings: Settings, masked: bool) -> Words:
    variant = settings["masked_task_vector_merge_method"]
    weighted = variant == "precond"
    return Words(
        score=("saliency" if settings.has_base else "curvature") if masked else "none",
        select="at least" if masked else "all",
        elect="sum" if variant == "ties" else "none",
        weigh="curvature" if weighted else "constant",
        divide=("kept weights" if settings["mask_weights"] else "weights") if weighted else "number",
    )


def _ota_needs(settings: Settings) -> list[Need]:
    needs = []
    if any(e["rank"] or e["rank1_approx"] for e in settings.experts):
        needs.append(Need("low rank", reads=2 if any(settings.each("rank")) else 1))
    if any(selection_of(e).surveyed for e in settings.experts):
        needs.append(Need("thresholds", settings["density_scope"]))
    weighted = settings["masked_task_vector_merge_method"] == "precond"
    if weighted and settings["normalise"] != "none":
        needs.append(Need("mean weight", "model" if settings["normalise"] == "model" else "tensor"))
    if settings["rescale"]:
        needs.append(Need("norms", reads=2, of_masks=True))
    if settings["masked_task_vector_merge_method"] == "ties" and settings["ties_density"] < 1:
        needs.append(Need("trims", reads=2, of_masks=True))
    return needs


def _ota_terms(settings: Settings, found: Found) -> Terms:
    """FFG masks, then the recipe's variant of combining the masked edits (arXiv 2509.11167)."""
    words = _ota_words(settings, any(b.masks for b in found.brackets))
    weights, epsilon = [1.0] * len(settings.experts), settings["epsilon"]
    if words.weigh == "curvature":
        weights = _gains(settings, found)
        weights, epsilon = scale_weights(weights, epsilon)
    experts = tuple(
        ExpertTerms(
            threshold=bracket.threshold,
            span=bracket.span,
            census=bracket.census,
            score_scale=found.score_scales[t],
            weight_scale=weights[t],
            edit_scale=found.edit_scales[t],
            vote=found.edit_scales[t],
            trim=found.trims[t],
            position=t,
        )
        for t, bracket in enumerate(found.brackets)
    )
    return Terms(
        words,
        experts,
        power=settings["power"],
        epsilon=epsilon,
        lambda_=settings["lambda"],
        denominator=float(len(experts)),
        fallback="base" if settings["fallback_to_base"] else "mean",
        repair=settings["on_nonfinite"] == "base",
    )


def _gains(settings: Settings, found: Found) -> list[float]:
    """g_t of n(g_t h_t^p), bias correction and means divided out. Means are those of g_t h_t^p."""
    corrections, power = found.bias_corrections, settings["power"]
    gains = [g * c**-power for g, c in zip(settings.each("scaling_factor"), corrections, strict=True)]
    if settings["normalise"] == "none" or found.means is None:
        return gains
    epsilon = settings["epsilon"]
    pairs = zip(gains, found.means, strict=True)
    return [g / (mean + epsilon) if mean + epsilon > 0 else 0.0 for g, mean in pairs]


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
        needs=_ota_needs,
        terms=_ota_terms,
    )
)


# linear


def _linear_terms(settings: Settings, found: Found) -> Terms:
    weights = settings.each("weight")
    experts = tuple(ExpertTerms(weight_scale=w, position=t) for t, w in enumerate(weights))
    words = Words(score="none", select="all", weigh="constant", divide="number")
    return Terms(words, experts, denominator=sum(weights) if settings["normalize"] else 1.0)


register(
    Method(
        name="linear",
        formula="sum_t weight_t w_t / sum_t weight_t (normalize: false: not divided)",
        base="unused",
        curvature=False,
        parameters=frozenset({"normalize"}),
        model_parameters=frozenset({"weight"}),
        terms=_linear_terms,
    )
)
