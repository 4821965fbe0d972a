"""What a kernel receives beside a tile's elements: words that say what it computes, and their numbers.

Per element i, in this order. Decisions (score, select, elect) are float32 operations in the order written
here, without contraction, the same bits on every backend; values are of the type acc, float32 for 16-bit
outputs and float64 for wider ones. w_0 is the base, 0 without one.

    d_t = w_t - o_t       the edit; o_t: the base, or the expert's own origin. d32_t: the same in float32
    edit
      difference          y_t = d_t
      clipped             y_t = clip(clip / max(|d_t|, 1e-6), 0, 1) d_t                      (nearswap)
      by chance           y_t = d_t / p_t(i) of `random by rank`; so are votes: d32_t / p_t in v_t (della)
    score
      none                select is all, random or random by rank
      saliency            s_t = (h_t score_scale_t) ((2^16 d32_t) (2^16 d32_t))                   (FFG)
      curvature           s_t = h_t score_scale_t
      magnitude           s_t = |d32_t|
      row magnitude       s_t = |2^16 d32_t| row_scores_t[row]                           (arcee_fusion)
      spread              e_t = 2^16 d32_t - 2^16 d32_1; m = (sum_{t > 1} e_t) float32(1 / T);
                          s = sum_t (e_t - m)^2, sums from 0 in recipe order: one score for all experts,
                          0 where their edits are equal                                           (sce)
    select
      all                 m_t = 1
      at least            m_t = s_t > threshold_t, or s_t = threshold_t and first_t <= i <= last_t
      between             as `at least`, and s_t < upper_t, or s_t = upper_t and i <= upto_t (breadcrumbs)
      above               m_t = s_t > threshold_t                                                 (ram)
      random              m_t = u_t(i) < probability_t, u of random.py                           (dare)
      random by rank      m_t = u_t(i) < p_t(rank of |d32_t| in its row), as random.py has it   (della)
      Of those, where trim_t is not 0, only edits of |d32_t| >= trim_t are elected and added; all count as
      kept.
    elect
      none                g_t = m_t
      sum                 v_t = float32(vote_t) d32_t; E = sum_t m_t v_t; g_t = m_t and sign(v_t) = sign(E);
                          where E is 0 its sign is `tie`, 0 (nobody agrees) or 1; v_t = 0 never agrees (ties)
      count               the same with E = sum_t m_t sign(v_t)
      largest             g_t = m_t for the last t of the largest |v_t| among those with m_t   (magmax)
      agreement           E as in `sum`; g_t = m_t where at least `needed` experts with m_t have
                          |v_t| > agreement |E - v_t|, a float32 product                    (consensus)
    weigh
      constant            P_t = weight_scale_t
      curvature           P_t = fma(h_t^power, weight_scale_t, epsilon)
      alone               P_t = weight_scale_t, times alone_t where no other expert has g     (ramplus)
      by row, by column   P_t = weights_t[row], weights_t[column]                (nuslerp, model_stock)
    divide
      number              D = denominator
      weights             D = sum_t P_t
      kept weights        D = max(sum_t g_t P_t, least); least 0 is no floor
      kept count          D = max(sum_t g_t, 1)                                                   (ram)
    N = sum_t g_t P_t (edit_scale_t y_t), each product fused into the sum, in recipe order
    out = w_0 + lambda (N / D)
    no m_t at all, or D = 0 with zero "fallback": the base (fallback "base", with one), or the mean of
    the w_t; D = 0 with zero "one": D is 1

Scales of scores are powers of two times the recipe's numbers: float32 neither underflows nor loses the order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import numpy as np

# Scores are saliencies times 2^64: 2^32 on the curvature, 2^16 on each factor d.
SCORE_EXPONENT = 64
_CURVATURE_EXPONENT = 32

# Weights are multiplied by 2^40 (it cancels in the quotient): epsilon 1e-26 times an edit of 1e-15 would
# otherwise be a float32 subnormal. Weights near 1, after normalisation, have the room for it.
_WEIGHT_EXPONENT = 40
_LARGEST_SCALED_WEIGHT = 2.0**60

LAST_INDEX = (1 << 63) - 1

BLOCK = 1 << 15  # elements that a function of Python computes at a time (backends/functions.py)

# The words of each step; kernels know them by their place here.
WORDS = {
    "edit": ("difference", "clipped", "by chance"),
    "score": ("none", "saliency", "curvature", "magnitude", "row magnitude", "spread"),
    "select": ("all", "at least", "between", "above", "random", "random by rank"),
    "elect": ("none", "sum", "count", "largest", "agreement"),
    "weigh": ("constant", "curvature", "alone", "by row", "by column"),
    "divide": ("number", "weights", "kept weights", "kept count"),
}


@dataclass(frozen=True, slots=True)
class Words:
    """What a kernel computes: one word for each step, of those in WORDS. ValueError for any other."""

    edit: str = "difference"
    score: str = "saliency"
    select: str = "at least"
    elect: str = "none"
    weigh: str = "curvature"
    divide: str = "kept weights"

    def __post_init__(self) -> None:
        for step in fields(self):
            word = getattr(self, step.name)
            if word not in WORDS[step.name]:
                raise ValueError(f"{step.name}: {word!r} is none of {', '.join(WORDS[step.name])}")
        if self.edit == "by chance" and self.select != "random by rank":
            raise ValueError("edit: 'by chance' goes with select: 'random by rank'")

    @property
    def codes(self) -> tuple[int, ...]:
        """The words by their places in WORDS."""
        return _codes(self)

    @property
    def curvature(self) -> bool:
        """Whether elements of curvature are read."""
        return self.score in ("saliency", "curvature") or self.weigh == "curvature"


@functools.cache
def _codes(words: Words) -> tuple[int, ...]:
    return tuple(known.index(getattr(words, step)) for step, known in WORDS.items())


@dataclass(frozen=True, slots=True)
class ExpertTerms:
    """One expert's numbers for one tensor, named as in the module's formulas.

    threshold: float32 score from which an edit is kept (0 keeps all, NaN none); first, last, upto: flat
    indices in the tensor; span: where the threshold is not known yet, how many float32 numbers from
    `threshold` upwards it may be (0: it is known); census: whether the scores are to be summed; position: the
    expert's number in the recipe, which keys its random numbers; wanted: how many elements are kept, where
    the backend finds the threshold itself (0: it is known, or a bracket is): of the tile or, with a span, of
    all that are merged at once; weights: float64[rows or columns], by row and by column; row_scores:
    float32[rows].
    """

    threshold: float = 0.0
    first: int = 0
    last: int = LAST_INDEX
    upper: float = float("inf")
    upto: int = LAST_INDEX
    score_scale: float = 1.0
    weight_scale: float = 1.0
    edit_scale: float = 1.0
    vote: float = 1.0
    trim: float = 0.0
    alone: float = 1.0
    probability: float = 1.0
    spread: float = 0.0
    position: int = 0
    span: int = 0
    census: bool = False
    wanted: int = 0
    weights: np.ndarray | None = field(default=None, compare=False)
    row_scores: np.ndarray | None = field(default=None, compare=False)


class Sample(NamedTuple):
    """Of one tensor, to find thresholds of `wanted` by. starts: int32[runs], in pairs of neighbours, flat
    indices at which RUN elements begin; reach: as far as a count over the sample may be off, in roots of the
    sum of squared differences within pairs."""

    starts: np.ndarray
    reach: float


@dataclass(frozen=True, slots=True)
class Terms:
    """Everything a kernel needs for one tensor beside its elements, named as in the module's formulas.

    epsilon: scaled like the weights; fallback: "base" or "mean"; zero: "fallback" or "one"; repair: write the
    base value where an input is not finite, instead of failing; seed, name_hash: keys of random numbers;
    ranked: rows of `random by rank`: how many elements, how far apart (1: neighbours); tiles are whole ones;
    sample: for thresholds that are `wanted`, None for all elements.

    function: of (base or None, experts, curvatures that the words read), torch tensors [n] in the type acc:
    it stands in place of all words; what: an error's name of it.
    """

    words: Words
    experts: tuple[ExpertTerms, ...]
    power: float = 0.5
    epsilon: float = 0.0
    lambda_: float = 1.0
    denominator: float = 1.0
    least: float = 0.0
    clip: float = 0.0
    tie: float = 0.0
    agreement: float = 0.0
    needed: int = 1
    fallback: str = "base"
    zero: str = "fallback"
    repair: bool = False
    seed: int = 0
    name_hash: int = 0
    ranked: tuple[int, int] = (1, 1)
    sample: Sample | None = field(default=None, compare=False)
    function: Callable | None = None
    what: str = ""

    @property
    def whole(self) -> int:
        """A tile is a whole number of so many elements."""
        if self.function is not None:
            return BLOCK
        return max(math.prod(self.ranked), 1) if self.words.select == "random by rank" else 1

    @property
    def gathers(self) -> bool:
        """Whether a tile may be of elements from anywhere."""
        return self.function is None and self.words.select != "random by rank"


def is_open(terms: ExpertTerms) -> bool:
    """Whether this threshold is still a bracket."""
    return terms.span > 0 or terms.census


def close(terms: Terms, thresholds: Sequence[float | None]) -> Terms:
    """Terms with these thresholds in place of the brackets (None: not a bracket)."""
    pairs = zip(terms.experts, thresholds, strict=True)
    closed = {"span": 0, "census": False, "wanted": 0}
    experts = tuple(e if x is None else replace(e, threshold=x, **closed) for e, x in pairs)
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
