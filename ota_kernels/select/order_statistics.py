"""A sample's scores by rank, in a third of the time of sorting all: a bracket reaches a few percent of them.

every 33rd score --sorted--> two scores around the wanted rank --one pass--> those between, sorted
"""

from __future__ import annotations

import functools
import math

import numpy as np

from ..backends import native
from ..tensors import array as resident
from ..tensors.array import Array

_EVERY = 33  # odd: what repeats in rows or runs does so in powers of 2
_FEW = 1 << 12  # scores that are sorted at once
# Scores to either side that are sorted, in square roots of the number of all: a bracket of independent scores
# reaches 2, and every 33rd of them errs by 10. A rank beyond takes time, no more.
_REACH = 16


class Ranks:
    """Scores (float32 of any shape, no NaN) by rank from the top; quick not far from the place `near`."""

    def __init__(self, scores: Array, near: float) -> None:
        self._scores = scores.reshape(-1)
        if not resident.is_resident(scores):
            self._middle, self._above = _around(self._scores, len(self._scores) - 1 - near)

    @functools.cached_property
    def _everything(self) -> Array:
        return resident.ascending(self._scores)

    def at(self, place: Array) -> Array:
        """The score at a place (an integral number, shape ()), as `resident.from_top`."""
        if resident.is_resident(self._scores):
            return resident.from_top(self._everything, place)
        place_in_middle = place - self._above
        if 0 <= place_in_middle < len(self._middle):
            return self._middle[len(self._middle) - 1 - int(place_in_middle)]
        return resident.from_top(self._everything, place)

    def count(self, lowest: Array, highest: Array) -> Array:
        """How many scores are from lowest to highest, both included."""
        if not resident.is_resident(self._scores):
            first, last = self._middle[[0, -1]] if len(self._middle) else (math.inf, -math.inf)
            if first < lowest and highest < last:  # all that equal them are in the middle
                begin = self._middle.searchsorted(lowest)
                return self._middle.searchsorted(highest, side="right") - begin
        return count_between(self._scores, lowest, highest)


def count_between(scores: Array, lowest: Array, highest: Array) -> Array:
    """How many scores are from lowest to highest, both included."""
    return resident.library(scores).count_nonzero((scores >= lowest) & (scores <= highest))


def squared_differences(scores: Array, least: Array) -> Array:
    """How many scores of each row (float32[rows, n]) are at least `least`: the sum of the squared differences
    within pairs of rows, float64 of shape (). An odd last row is left out."""
    if resident.is_resident(scores):
        return resident.squared_differences((scores >= least).sum(dim=1))
    return np.float64(native.squared_differences(scores, float(least)))


def _around(scores: np.ndarray, position: float) -> tuple[np.ndarray, int]:
    """(Scores around a position of the ascending order, themselves ascending; how many are above them)."""
    if len(scores) <= _FEW:
        return resident.ascending(scores), 0
    thin, reach = resident.ascending(scores[::_EVERY]), _REACH * math.sqrt(len(scores))
    low, high = (int((position + side) / _EVERY) for side in (-reach, reach))
    lowest = thin[low] if low >= 0 else -math.inf
    highest = np.nextafter(thin[high], np.float32(math.inf)) if high < len(thin) else math.inf
    middle, above = native.between(scores, lowest, highest)
    middle.sort()
    return middle, above
