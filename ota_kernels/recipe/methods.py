"""The table of merge methods: one row each. A row is words (tensors/terms.py), its own parameters, and two
pure functions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import RecipeError
from ..tensors.found import Found, selection_of
from ..tensors.terms import ExpertTerms, Terms, Words, scale_weights
from .parameters import (
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_INTEGER,
    SHARE,
    SWITCH,
    TEXT,
    Parameter,
    choice,
    number,
    show,
    suggest,
)
from .settings import Settings


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

    formula: one line in the symbols of README, "Methods"; base: "required", "optional" or "ignored" (there
    it is one more model); parameters: its keys, each of which may stand at every level of a recipe, those of
    an expert also under a model; terms: what the kernels compute for a tensor, from its settings and what was
    found; needs: what must be known before a tensor merges, read after read; check: what is wrong with the
    settings of a tensor, None where nothing is; least: models that it merges at least where it has no base.
    """

    name: str
    formula: str
    base: str
    parameters: tuple[Parameter, ...]
    terms: Callable[[Settings, Found], Terms]
    needs: Callable[[Settings], list[Need]] = lambda settings: []
    check: Callable[[Settings], str | None] = lambda settings: None
    least: int = 2

    @functools.cached_property
    def by_key(self) -> dict[str, Parameter]:
        """The parameters by their keys, in order."""
        return {p.key: p for p in self.parameters}

    @property
    def keys(self) -> frozenset[str]:
        """Every key that the method accepts somewhere."""
        return frozenset(self.by_key)

    @functools.cached_property
    def shared(self) -> tuple[Parameter, ...]:
        """The parameters that all experts share."""
        return tuple(p for p in self.parameters if p.level == "shared")

    @functools.cached_property
    def own(self) -> tuple[Parameter, ...]:
        """The parameters of which each expert has its own."""
        return tuple(p for p in self.parameters if p.level == "expert")

    @property
    def curvature(self) -> bool:
        """Whether each model brings second moments."""
        return "preconditioner_path" in self.by_key


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


# ota

_ONE = number("1.0: `ota` weights by curvature; use `scaling_factor`", at_least=1, at_most=1)

# The parameters of `ota`, in the order in which they are shown.
_OTA = (
    Parameter("epsilon", NOT_NEGATIVE, 1e-26, "eps, added to each weight P_t"),
    Parameter(
        "normalise",
        choice("none", "global", "model"),
        "none",
        "n: divide g_t * h_t^p by its mean over the tensor (global) or over the whole model (model)",
        varies=False,
    ),
    Parameter("power", POSITIVE, 0.5, "p, the exponent of the curvature"),
    Parameter("lambda", FINITE, 1.0, "the factor of the merged task vector"),
    Parameter(
        "fallback_to_base",
        SWITCH,
        True,
        "an element that no expert keeps takes the base's value; false: the experts' mean",
    ),
    Parameter(
        "density_scope",
        choice("model", "tensor"),
        "model",
        "`density` and `saliency_mass` count over the model or each tensor",
        varies=False,
    ),
    Parameter(
        "mask_weights",
        SWITCH,
        True,
        "masked experts leave the denominator too; false: their weights stay in it",
    ),
    Parameter(
        "masked_task_vector_merge_method",
        choice("precond", "linear", "ties"),
        "precond",
        "how masked task vectors are combined: by curvature, by mean, or by TIES",
        varies=False,
    ),
    Parameter("ties_density", SHARE, 1.0, "the share that the ties variant keeps when it trims"),
    Parameter("rescale", SWITCH, False, "scale masked task vectors back to the norm they had", varies=False),
    Parameter("approximate_norm", SWITCH, False, "estimate the spectral norms that `rescale` needs"),
    Parameter(
        "rescale_relative_threshold",
        NOT_NEGATIVE,
        0.0,
        "`rescale` zeroes a masked task vector whose norm is below this share of its former norm",
    ),
    Parameter(
        "bias_correction",
        SWITCH,
        False,
        "divide curvature by 1 - beta2^step, read from its file's metadata",
        varies=False,
    ),
    Parameter(
        "missing_curvature",
        choice("error", "uniform", "base"),
        "error",
        "a parameter without curvature: an error, curvature 1, or the base's value",
        varies=False,
    ),
    Parameter(
        "on_nonfinite",
        choice("error", "base"),
        "error",
        "NaN, infinity or negative curvature: an error, or the base's value there",
        varies=False,
    ),
    Parameter(
        "preconditioner_path",
        TEXT,
        None,
        "file of the model's second moments (exp_avg_sq)",
        "expert",
        varies=False,
    ),
    Parameter(
        "precond_threshold",
        NOT_NEGATIVE,
        None,
        "theta_t: edits of at least this saliency are kept",
        "expert",
    ),
    Parameter("density", SHARE, None, "share of the edits that are kept, the most salient ones", "expert"),
    Parameter(
        "saliency_mass",
        SHARE,
        None,
        "keep the fewest edits that hold this share of the total saliency",
        "expert",
    ),
    Parameter("scaling_factor", POSITIVE, 1.0, "g_t, the factor of the model's curvature", "expert"),
    Parameter(
        "rank",
        POSITIVE_INTEGER,
        None,
        "use the curvature's truncated SVD of this rank",
        "expert",
        varies=False,
    ),
    Parameter(
        "rank1_approx", SWITCH, False, "use the curvature's row and column sums only", "expert", varies=False
    ),
    Parameter(
        "weight", _ONE, 1.0, "accepted where it is 1: `ota` weights by curvature", "expert", varies=False
    ),
)


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
        parameters=_OTA,
        needs=_ota_needs,
        terms=_ota_terms,
    )
)


# linear

_LINEAR = (
    Parameter("normalize", SWITCH, True, "divide by the sum of the weights"),
    Parameter("weight", FINITE, 1.0, "the model's weight", "expert"),
)


def _sum_of_weights(settings: Settings) -> str | None:
    weights = settings.each("weight")
    # 0.1 + 0.2 - 0.3 is 3e-17 in binary: a sum that is rounding only counts as zero.
    if settings["normalize"] and abs(math.fsum(weights)) <= 1e-12 * math.fsum(map(abs, weights)):
        return f"the weights {show(weights)} sum to 0: change them, or set `normalize: false`"
    return None


def _linear_terms(settings: Settings, found: Found) -> Terms:
    weights = settings.each("weight")
    experts = tuple(ExpertTerms(weight_scale=w, position=t) for t, w in enumerate(weights))
    words = Words(score="none", select="all", weigh="constant", divide="number")
    return Terms(words, experts, denominator=sum(weights) if settings["normalize"] else 1.0)


register(
    Method(
        name="linear",
        formula="sum_t weight_t w_t / sum_t weight_t (normalize: false: not divided)",
        base="ignored",
        parameters=_LINEAR,
        terms=_linear_terms,
        check=_sum_of_weights,
        least=1,
    )
)
