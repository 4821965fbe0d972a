"""From a sample of scores to a bracket that should hold the exact threshold.

A bracket that misses is found out by the counts of the merge (group.py); it costs time, never exactness.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..tensors import array as resident
from ..tensors.array import Array
from ..tensors.terms import score_bits
from . import order_statistics as ranks
from .thresholds import SMALLEST, Selection

# Half the width in standard errors of the sample: a bracket of one expert misses once in 2000.
DEVIATIONS = 3.5
_MOST_CLUSTERS = 50_000
# Beyond this share of undecided elements, two histogram passes are cheaper than candidates.
_WORTH_IT = 1 / 4
# Deviation between successive clusters of the share that is kept, in those of a single element. Measured.
_CLUSTER_DEVIATION = 0.11


@dataclass(frozen=True, slots=True)
class Bracket:
    """The threshold is `lowest` or one of the span - 1 next float32 numbers; span 0: it is `lowest`, a value
    that so many scores share that they are kept or dropped together."""

    lowest: float
    span: int


def cluster_count(elements: int) -> int:
    """How many clusters to sample of so many elements: sampling costs time in proportion to their number, and
    candidates to the root of its inverse. The windows of large models are at most 1 % of their elements; of
    the largest (above 60 billion) no more, since the scores of all clusters are held, 1 KB of each expert."""
    return max(1, int(min(elements ** (2 / 3) / 80, max(1_400, elements / 1_200_000), _MOST_CLUSTERS)))


def bracket_share(selection: Selection, elements: int) -> float:
    """Estimate of the share of elements that a bracket holds."""
    kept = selection.value if selection.rule == "density" else 1 / 2
    deviation = _CLUSTER_DEVIATION * math.sqrt(kept * (1 - kept))
    return min(1.0, 2 * DEVIATIONS * deviation / math.sqrt(cluster_count(elements)))


def bracket_of(selection: Selection, scores: Array) -> Bracket | None:
    """The bracket of a selection, from sampled scores float32[clusters, elements]; None where so many scores
    lie close together that it would not be worth it. Of resident scores, with one wait for the device.

    The elements of a cluster are alike, so that the error is estimated between clusters.
    """
    lib = resident.library(scores)
    n, smallest = scores.shape[0] * scores.shape[1], resident.scalar(SMALLEST, scores, "float32")
    if selection.rule == "mass":
        # A score that overflowed would leave no finite sum to compare with.
        scores = lib.minimum(scores, resident.scalar(np.finfo(np.float32).max, scores, "float32"))
        total, score_at = _by_mass(scores)
        count = functools.partial(ranks.count_between, scores)
    else:
        total, by_rank = resident.scalar(n, scores, "float64"), ranks.Ranks(scores, selection.value * n)
        count = by_rank.count

        def score_at(target: Array) -> Array:
            return by_rank.at(lib.ceil(target) - 1)

    least = total / n  # what one element adds, on average
    target = selection.value * total
    margin = DEVIATIONS * _standard_error(selection, scores, score_at(target), total) + least
    lowest = lib.maximum(score_at(target + margin), smallest)
    highest = lib.maximum(score_at(target - margin), smallest)
    highest = lib.where(target > margin, highest, lib.full_like(highest, math.inf))
    lowest, highest, inside = resident.numbers(lowest, highest, count(lowest, highest))
    if lowest == highest:
        return Bracket(lowest, 0)
    if inside > _WORTH_IT * n:
        return None
    return Bracket(lowest, score_bits(highest) - score_bits(lowest) + 1)


def _by_mass(scores: Array) -> tuple[Array, Callable[[Array], Array]]:
    """The sum of all, and: a sum -> the score down to which they add up to it, 0 where they do not."""
    lib, ascending = resident.library(scores), resident.ascending(scores)
    sums = lib.cumsum(lib.flip(ascending, (0,)), 0, dtype=lib.float64)
    return sums[-1], lambda target: resident.from_top(ascending, lib.searchsorted(sums, target))


def _standard_error(selection: Selection, scores: Array, threshold: Array, total: Array) -> Array:
    """Of the sum above the threshold (a count, or a mass) less its expected share of the total."""
    clusters = len(scores)
    if clusters < 2:
        return total
    if selection.rule == "mass":
        worth = resident.float64(scores)
        residuals = (worth * (scores >= threshold)).sum(axis=1) - selection.value * worth.sum(axis=1)
        squares = resident.squared_differences(residuals)
    else:
        squares = ranks.squared_differences(scores, threshold)
    return _few(clusters) * error_of_sum(squares, clusters)


def reach_of(clusters: int) -> float:
    """Half a bracket's width, of counts, in roots of the sum of squared differences (see `error_of_sum`)."""
    return DEVIATIONS * _few(clusters) * float(error_of_sum(np.float64(1), clusters))


def _few(clusters: int) -> float:
    """A few clusters tell little about their own deviation (Student's t)."""
    return 1 + 8 / clusters


def error_of_sum(squares: Array, clusters: int) -> Array:
    """Standard error of a sum over clusters (at least 2), shape (). squares: the sum of squared differences
    within pairs of neighbours.

    What the two of a pair have in common, as the curvature of their row, is no part of the error ("collapsed
    strata"; Cochran, Sampling Techniques, 5A.12)."""
    return resident.library(squares).sqrt(squares / (clusters // 2) / 2 * clusters)
