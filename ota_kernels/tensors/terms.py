"""The numbers a merge kernel needs beside its tensors, and how they follow from the recipe's.

A kernel computes, per element and in this order (README, "How it works"; arXiv 2509.11167):

    d_t = w_t - w_0                                 (w_t, without a base)
    s_t = (h_t * score_scale_t) * (2^16 d_t)^2      (h_t * score_scale_t, without a base)
    m_t = s_t >= threshold_t
    P_t = h_t^power * weight_scale_t + epsilon      (weight_scale_t, where weights ignore curvature)
    out = w_0 + lambda * sum_t m_t P_t (edit_scale_t d_t) / (sum_t m_t P_t, or a fixed denominator)

Scales are powers of two times the recipe's numbers, so that float32 neither underflows nor loses the order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

# Scores are saliencies times 2^64: 2^32 on the curvature, 2^16 on each factor d.
SCORE_EXPONENT = 64
_CURVATURE_EXPONENT = 32

# Weights are multiplied by 2^40 (it cancels in the quotient): epsilon 1e-26 times an edit of 1e-15 would
# otherwise be a float32 subnormal. Weights near 1, after normalisation, have the room for it.
_WEIGHT_EXPONENT = 40
_LARGEST_SCALED_WEIGHT = 2.0**60


@dataclass(frozen=True, slots=True)
class Formula:
    """What holds for every tensor of a merge.

    power: exponent of the curvature; lambda_: factor of the merged edit; denominator: None for the sum of
    the P_t; curvature_weights: whether P_t depends on h_t; masked: whether any threshold can drop an element;
    mask_weights: whether dropped elements leave the denominator too; elect_signs: TIES consensus;
    fallback_to_base: what an element kept by nobody gets (the base, or the mean of the w_t);
    repair_nonfinite: write the base value where an input is not finite instead of failing.
    """

    power: float = 0.5
    lambda_: float = 1.0
    denominator: float | None = None
    curvature_weights: bool = True
    masked: bool = True
    mask_weights: bool = True
    elect_signs: bool = False
    fallback_to_base: bool = True
    repair_nonfinite: bool = False


@dataclass(frozen=True, slots=True)
class ExpertTerms:
    """One expert's numbers for one tensor, scaled as the kernels want them.

    threshold: float32 score from which an edit is kept (0 keeps all, NaN none); trim: least |d| that
    survives TIES trimming; span: where the threshold is not known yet, how many float32 numbers from
    `threshold` upwards it may be (0: it is known); census: whether the scores are to be summed; the rest as
    in the module's formula.
    """

    threshold: float = 0.0
    score_scale: float = 1.0
    weight_scale: float = 1.0
    edit_scale: float = 1.0
    trim: float = 0.0
    span: int = 0
    census: bool = False


@dataclass(frozen=True, slots=True)
class Terms:
    """Everything a kernel needs for one tensor beside its elements. epsilon is scaled like the weights."""

    formula: Formula
    epsilon: float
    experts: tuple[ExpertTerms, ...]


def is_open(terms: ExpertTerms) -> bool:
    """Whether this threshold is still a bracket."""
    return terms.span > 0 or terms.census


def close(terms: Terms, thresholds: Sequence[float | None]) -> Terms:
    """Terms with these thresholds in place of the brackets (None: not a bracket)."""
    pairs = zip(terms.experts, thresholds, strict=True)
    experts = tuple(e if x is None else replace(e, threshold=x, span=0, census=False) for e, x in pairs)
    return replace(terms, experts=experts)


def score_scale(has_base: bool, bias_correction: float = 1.0) -> float:
    """score_scale of an expert whose curvature must be divided by `bias_correction` (1 - beta2^step)."""
    exponent = _CURVATURE_EXPONENT if has_base else SCORE_EXPONENT
    return float(np.float32(2.0**exponent / bias_correction))


def score_of_saliency(saliency: float) -> float:
    """The float32 score of an absolute saliency threshold."""
    with np.errstate(over="ignore"):
        return float(np.float32(saliency * 2.0**SCORE_EXPONENT))


def score_bits(score: float) -> int:
    """The bits of a float32 score, which order like the scores."""
    return int(np.float32(score).view(np.uint32))


def score_of_bits(bits: int) -> float:
    """The float32 score of these bits."""
    return float(np.uint32(bits).view(np.float32))


def saliency_of_score(score: float) -> float:
    """The saliency that a score stands for, finite also where the score overflowed."""
    return min(score, float(np.finfo(np.float32).max)) * 2.0**-SCORE_EXPONENT


def scale_weights(weights: list[float], epsilon: float) -> tuple[list[float], float]:
    """Weight scales and epsilon times one power of two, which cancels in the quotient."""
    factor = 2.0**_WEIGHT_EXPONENT if max([*weights, epsilon]) < _LARGEST_SCALED_WEIGHT else 1.0
    return [w * factor for w in weights], epsilon * factor
