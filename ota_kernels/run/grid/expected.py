"""Where a sample expects thresholds to be: a few high halves of the scores' bits (see decide.py)."""

from __future__ import annotations

import math

import numpy as np

from ...select import thresholds as decide
from ...tensors.terms import score_bits

_OCTAVE = 128  # high halves of one power of two
_STANDARD_ERRORS = 4.0


class SampledScores:
    """One expert's sampled scores, float32[clusters, elements], and where they expect its thresholds."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = np.abs(rows)  # no -0, whose bits are not those of 0
        order = np.argsort(self.rows, axis=None)[::-1]
        self.ordered = self.rows.ravel()[order]
        self.weights = {
            "density": np.ones(rows.shape),
            "mass": np.minimum(self.rows, np.finfo(np.float32).max).astype(np.float64),
        }
        self.held = {rule: np.cumsum(weights.ravel()[order]) for rule, weights in self.weights.items()}

    def bracket(self, selection: decide.Selection) -> np.ndarray:
        """The high halves that a threshold may have, uint32, the likeliest first; none where there is nothing
        to go by."""
        share, weights, held = selection.value, self.weights[selection.rule], self.held[selection.rule]
        total = held[-1]
        if total == 0:
            return np.zeros(0, np.uint32)
        # Runs are the clusters of a ratio estimate, compared with their neighbours since they are stratified
        # (as in bracket.py); the second term is for shares of a few elements only.
        above = np.where(self.rows >= self._at(held, share), weights, 0.0).sum(axis=1)
        errors = np.diff(above - share * weights.sum(axis=1))
        width = _STANDARD_ERRORS * math.sqrt(float((errors**2).sum()) / 2) / total
        width += _STANDARD_ERRORS**2 / self.rows.size
        low, middle, high = (_prefix(self._at(held, share + w)) for w in (width, 0.0, -width))
        least, most = self._ends()
        near = np.arange(max(low, least), (high if share > width else most) + 1, dtype=np.int64)
        near = near[np.argsort(np.abs(near - middle), kind="stable")]
        zero = [0] if low < least else []
        return np.array([*zero, *near.tolist()] if middle < least else [*near.tolist(), *zero], np.uint32)

    def _at(self, held: np.ndarray, share: float) -> float:
        """The score down to which the share is held."""
        place = int(np.searchsorted(held, share * held[-1]))
        return float(self.ordered[place]) if place < held.size else 0.0

    def _ends(self) -> tuple[int, int]:
        """High halves of the least score above 0 and of the greatest, an octave further: what lies beyond is
        so rare that it may take a second pass."""
        positive = self.ordered[self.ordered > 0]
        if positive.size == 0:
            return 1, 0
        return max(_prefix(positive[-1]) - _OCTAVE, 1), _prefix(positive[0]) + _OCTAVE

    def share_at(self, prefixes: np.ndarray) -> float:
        """The share of scores above 0 whose high half is one of `prefixes`."""
        found = np.isin(self.ordered.view(np.uint32) >> 16, prefixes) & (self.ordered > 0)
        return float(found.mean())


def _prefix(score: float) -> int:
    return score_bits(score) >> 16
