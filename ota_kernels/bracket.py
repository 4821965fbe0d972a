"""From a sample of scores to a bracket that should hold the exact threshold.

A bracket that misses is found out by the counts of the merge (group.py); it costs time, never exactness.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from .decide import SMALLEST, Selection
from .formula import score_bits

# Half the width in standard errors of the sample: a bracket of one expert misses once in 2000.
DEVIATIONS = 3.5
# Beyond this share of undecided elements, two histogram passes are cheaper than candidates.
_WORTH_IT = 1 / 4
# Deviation between successive clusters of the share that is kept, as measured at densities around 0.3.
_CLUSTER_DEVIATION = 0.05


@dataclass(frozen=True, slots=True)
class Bracket:
    """The threshold is `lowest` or one of the span - 1 next float32 numbers; span 0: it is `lowest`, a value
    that so many scores share that they are kept or dropped together."""

    lowest: float
    span: int


def cluster_count(elements: int) -> int:
    """How many clusters to sample of so many elements: sampling costs time in proportion to their number, and
    candidates to the root of its inverse. The windows of large models are at most 1 % of their elements."""
    return max(1, int(min(elements ** (2 / 3) / 80, max(2_000, elements / 800_000))))


def bracket_share(elements: int) -> float:
    """Estimate of the share of elements that a bracket holds."""
    return min(1.0, 2 * DEVIATIONS * _CLUSTER_DEVIATION / math.sqrt(cluster_count(elements)))


def bracket_of(selection: Selection, scores: np.ndarray) -> Bracket | None:
    """The bracket of a selection, from sampled scores float32[clusters, elements]; None where so many scores
    lie close together that it would not be worth it.

    The elements of a cluster are alike, so that the error is estimated between clusters.
    """
    ascending = np.sort(scores, axis=None)
    if selection.rule == "mass":
        # A score that overflowed would leave no finite sum to compare with.
        scores, ascending = (np.minimum(x, np.finfo(np.float32).max) for x in (scores, ascending))
        from_top = np.cumsum(ascending[::-1], dtype=np.float64)
        position = functools.partial(np.searchsorted, from_top)
        total = float(from_top[-1])
        least = total / scores.size  # what one element holds
    else:
        position = math.ceil
        total, least = float(scores.size), 1.0

    def score_at(target: float) -> float:
        """The score at which the sum from the top reaches target."""
        if target > total:
            return 0.0
        return float(ascending[-1 - max(int(position(target)) - (selection.rule != "mass"), 0)])

    target = selection.value * total
    margin = DEVIATIONS * _standard_error(selection, scores, score_at(target)) + least
    lowest = max(score_at(target + margin), SMALLEST)
    highest = max(score_at(target - margin), SMALLEST) if target > margin else math.inf
    if lowest == highest:
        return Bracket(lowest, 0)
    inside = np.searchsorted(ascending, highest, "right") - np.searchsorted(ascending, lowest, "left")
    if inside > _WORTH_IT * scores.size:
        return None
    return Bracket(lowest, score_bits(highest) - score_bits(lowest) + 1)


def _standard_error(selection: Selection, scores: np.ndarray, threshold: float) -> float:
    """Of the sum above the threshold (a count, or a mass) less its expected share of everything."""
    above = scores >= np.float32(threshold)
    if selection.rule == "mass":
        worth = scores.astype(np.float64)
        residuals = np.where(above, worth, 0.0).sum(axis=1) - selection.value * worth.sum(axis=1)
        everything = worth.sum()
    else:
        residuals, everything = above.sum(axis=1), scores.size
    if len(residuals) < 2:
        return float(everything)
    # A few clusters tell little about their own deviation (Student's t).
    return (1 + 6 / len(residuals)) * error_of_sum(residuals)


def error_of_sum(of_clusters: np.ndarray) -> float:
    """Standard error of a sum over clusters. of_clusters: numbers[clusters], at least 2.

    From the differences of successive clusters, which leaves out what stratification evens out (Cochran,
    Sampling Techniques, 8.8)."""
    return math.sqrt(np.mean(np.diff(of_clusters.astype(np.float64)) ** 2) / 2 * len(of_clusters))
