"""How far compressed second moments are from what they were."""

from __future__ import annotations

import threading

import numpy as np

_SHIFT = 17  # bins of an error have 6 bits of significand: a quantile is within 1.6 %
_BINS = 1 << (31 - _SHIFT)


class Errors:
    """Relative errors |v' - v| / v of elements v that are not 0, counted by size; add from any thread.

    elements: how many were added, zeros included; zeros: those that were 0; zeros_kept: those that still are;
    largest: the largest error.
    """

    def __init__(self) -> None:
        self.elements = self.zeros = self.zeros_kept = 0
        self.largest = 0.0
        self._counts = np.zeros(_BINS, np.int64)
        self._lock = threading.Lock()

    def add(self, values: np.ndarray, decoded: np.ndarray) -> None:
        """values: float32[n], finite and >= 0; decoded: what became of them, float32[n]."""
        zero = values == 0
        zeros = values.size - int(np.count_nonzero(values))
        with np.errstate(divide="ignore", invalid="ignore"):
            errors = np.abs(decoded - values) / values
        if zeros:
            errors[zero] = 0
        counts = np.bincount(errors.view(np.uint32) >> _SHIFT, minlength=_BINS)
        counts[0] -= zeros
        kept = int(np.count_nonzero(zero & (decoded == 0)))
        with self._lock:
            self.elements += values.size
            self.zeros += zeros
            self.zeros_kept += kept
            self.largest = max(self.largest, float(errors.max(initial=0)))
            self._counts += counts

    def quantile(self, share: float) -> float:
        """An error that this share of the elements does not exceed, the least one to within 1.6 %; 0 without
        elements."""
        from_below = np.cumsum(self._counts)
        if from_below[-1] == 0:
            return 0.0
        found = int(np.searchsorted(from_below, share * from_below[-1]))
        edge = np.uint32((found + 1 << _SHIFT) - 1).view(np.float32) if found else 0.0
        return min(float(edge), self.largest)
