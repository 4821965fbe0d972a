"""OTA merging with Fast Fisher Grafting (arXiv 2509.11167).

s_t = h_t d_t^2;   m_t = s_t >= theta_t;   P_t = m_t (n(g_t h_t^p) + eps)
out = w_0 + lambda sum_t P_t d_t / sum_t P_t, or by the variants `linear` and `ties`
"""

from __future__ import annotations

from ...tensors.found import Found, selection_of
from ...tensors.terms import ExpertTerms, Terms, Words, scale_weights
from ..methods import Method, Need, register
from ..parameters import (
    AUTO,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_INTEGER,
    SCALE,
    SHARE,
    SWITCH,
    TEXT,
    Parameter,
    choice,
    number,
)
from ..settings import Settings

_ONE = number("1.0: `ota` weights by curvature; use `scaling_factor`", at_least=1, at_most=1)

# Where an expert's second moments are, and what becomes of tensors without.
MOMENTS = (
    Parameter(
        "preconditioner_path",
        TEXT,
        None,
        "file of the model's second moments (exp_avg_sq)",
        "expert",
        varies=False,
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
)

# Which edits an expert keeps: one of these.
SELECTION = (
    Parameter(
        "precond_threshold",
        NOT_NEGATIVE,
        None,
        "theta_t: edits of at least this saliency are kept",
        "expert",
        affects="masks",
    ),
    Parameter(
        "density",
        SHARE,
        None,
        "share of the edits that are kept, the most salient ones",
        "expert",
        affects="masks",
    ),
    Parameter(
        "saliency_mass",
        SHARE,
        None,
        "keep the fewest edits that hold this share of the total saliency",
        "expert",
        affects="masks",
    ),
)

SCOPE = Parameter(
    "density_scope",
    choice("model", "tensor"),
    "model",
    "`density` and `saliency_mass` count over the model or each tensor",
    varies=False,
    affects="masks",
)

# How curvature weighs.
POWER = Parameter("power", POSITIVE, 0.5, "p, the exponent of the curvature")
EPSILON = Parameter("epsilon", NOT_NEGATIVE, 1e-26, "eps, added to each weight P_t", affects="values")
GAIN = Parameter("scaling_factor", POSITIVE, 1.0, "g_t, the factor of the model's curvature", "expert")


def normalise(default: str) -> Parameter:
    """What each expert's weights are divided by."""
    return Parameter(
        "normalise",
        choice("none", "global", "model"),
        default,
        "n: divide g_t * h_t^p by its mean over the tensor (global) or over the whole model (model)",
        varies=False,
    )


# The parameters of `ota`, in the order in which they are shown.
_OTA = (
    EPSILON,
    normalise("none"),
    POWER,
    *SCALE,
    Parameter(
        "fallback_to_base",
        SWITCH,
        True,
        "an element that no expert keeps takes the base's value; false: the experts' mean",
        affects="values",
    ),
    SCOPE,
    Parameter(
        "mask_weights",
        SWITCH,
        True,
        "masked experts leave the denominator too; false: their weights stay in it",
        affects="values",
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
    *MOMENTS,
    Parameter(
        "on_nonfinite",
        choice("error", "base"),
        "error",
        "NaN, infinity or negative curvature: an error, or the base's value there",
        varies=False,
    ),
    Parameter(
        "keep_sums",
        SWITCH,
        False,
        "write the sums over experts beside the merge, so that `ota-merge add` can go on with it",
        varies=False,
    ),
    *SELECTION,
    GAIN,
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
    needs += selection_needs(settings)
    if settings["masked_task_vector_merge_method"] == "precond":
        needs += mean_needs(settings)
    if settings["rescale"]:
        needs.append(Need("norms", reads=2, of_masks=True))
    if settings["masked_task_vector_merge_method"] == "ties" and settings["ties_density"] < 1:
        needs.append(Need("trims", reads=2, of_masks=True))
    if settings["keep_sums"]:  # of what is kept for good
        needs.append(Need("kept sums", "model", reads=0, of_masks=True))
    return needs


def selection_needs(settings: Settings) -> list[Need]:
    """Thresholds, where some expert's depends on the tensors."""
    sparse = any(selection_of(e).surveyed for e in settings.experts)
    return [Need("thresholds", settings["density_scope"])] if sparse else []


def mean_needs(settings: Settings) -> list[Need]:
    """The mean that `normalise` divides by."""
    rule = settings["normalise"]
    return [] if rule == "none" else [Need("mean weight", "model" if rule == "model" else "tensor")]


def _ota_check(settings: Settings) -> str | None:
    if not settings["keep_sums"]:
        return None
    wrong = None
    if settings["masked_task_vector_merge_method"] == "ties":
        wrong = "masked_task_vector_merge_method: ties", "elects signs by all experts"
    if not settings["fallback_to_base"]:
        wrong = "fallback_to_base: false", "takes the mean of all experts"
    if settings["on_nonfinite"] == "base":
        wrong = "on_nonfinite: base", "looks at all experts"
    if settings.shared.get("calibrate", "none") != "none":
        wrong = "calibrate", "looks at the whole merged edit"
    if settings["lambda"] == AUTO or settings["match_norm"] is not None:
        wrong = "lambda: auto or match_norm", "measures the whole merged edit"
    if not settings.has_base:
        wrong = "a recipe without base_model", "has no edits to add to"
    if wrong is None:
        return None
    return f"`keep_sums` does not go with {wrong[0]}, which {wrong[1]}: leave one out"


def _ota_terms(settings: Settings, found: Found) -> Terms:
    """FFG masks, then the recipe's variant of combining the masked edits (arXiv 2509.11167)."""
    # Without a threshold the variants need no curvature: it is read all the same, and refused if wrong.
    weighted = settings["masked_task_vector_merge_method"] == "precond"
    words = _ota_words(settings, not weighted or any(b.masks for b in found.brackets))
    weights, epsilon = [1.0] * len(settings.experts), settings["epsilon"]
    if words.weigh == "curvature":
        weights = gains(settings, found)
        # One factor for all experts, whoever joins them later: none.
        if not settings["keep_sums"]:
            weights, epsilon = scale_weights(weights, epsilon)
    experts = thresholds(found, weights)
    return Terms(
        words,
        experts,
        power=settings["power"],
        epsilon=epsilon,
        lambda_=settings.lambda_,
        denominator=float(len(experts)),
        fallback="base" if settings["fallback_to_base"] else "mean",
        repair=settings["on_nonfinite"] == "base",
    )


def thresholds(found: Found, weights: list[float] | None = None) -> tuple[ExpertTerms, ...]:
    """Experts with the thresholds, or brackets, that were found; weights: 1 where there are none."""
    return tuple(
        ExpertTerms(
            threshold=bracket.threshold,
            span=bracket.span,
            census=bracket.census,
            wanted=bracket.wanted,
            score_scale=found.score_scales[t],
            weight_scale=1.0 if weights is None else weights[t],
            edit_scale=found.edit_scales[t],
            vote=found.edit_scales[t],
            trim=found.trims[t],
            position=found.positions[t],
        )
        for t, bracket in enumerate(found.brackets)
    )


def gains(settings: Settings, found: Found) -> list[float]:
    """g_t of n(g_t h_t^p), bias correction and means divided out. Means are those of g_t h_t^p."""
    own = settings.gains(found.bias_corrections)
    if settings["normalise"] == "none" or found.means is None:
        return own
    epsilon = settings["epsilon"]
    pairs = zip(own, found.means, strict=True)
    return [g / (mean + epsilon) if mean + epsilon > 0 else 0.0 for g, mean in pairs]


register(
    Method(
        name="ota",
        source="arXiv 2509.11167",
        formula="w_0 + lambda * sum_t P_t d_t / sum_t P_t, P_t = m_t * (n(g_t * h_t^p) + eps)",
        base="optional",
        parameters=_OTA,
        needs=_ota_needs,
        terms=_ota_terms,
        check=_ota_check,
    )
)
