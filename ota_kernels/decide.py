"""Host arithmetic on survey results: thresholds from counts. Reads no tensor.

Scores are non-negative float32, so their order is the order of their bit patterns read as integers: the k-th
largest is found digit by digit (16 bits each) from two histograms, exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .recipe import ModelParameters

KEEP_ALL = 0.0
KEEP_NOTHING = math.nan  # every comparison with it is false
_SMALLEST = float(np.float32(2.0**-149))  # keeps every score but 0
_BINS_PER_EXPONENT = 128  # of the high 16 bits, the lower 7 belong to the significand


@dataclass(frozen=True, slots=True)
class Selection:
    """How one expert's threshold is found. rule: "all", "threshold" (an absolute saliency), "density" (share
    of elements) or "mass" (share of the total saliency)."""

    rule: str
    value: float = 0.0

    @property
    def surveyed(self) -> bool:
        """Whether the threshold depends on the tensors."""
        return self.rule in ("density", "mass")


def selection_of(parameters: ModelParameters) -> Selection:
    """The selection that a model's parameters ask for; a density of 1 keeps everything."""
    if parameters.precond_threshold is not None:
        return Selection("threshold", parameters.precond_threshold)
    if parameters.density is not None:
        return Selection("all") if parameters.density >= 1 else Selection("density", parameters.density)
    if parameters.saliency_mass is not None:
        return Selection("mass", parameters.saliency_mass)
    return Selection("all")


def count_of_density(density: float, total: int) -> int:
    """k = floor(density * total), with the density taken as the decimal it was written as: 0.57 of 100 is 57,
    although the float64 product is 56.99..."""
    return math.floor(Fraction(repr(float(density))) * total)


def _value(bits: int) -> float:
    return float(np.uint32(bits).view(np.float32))


def _find_from_top(weights: np.ndarray, target: int) -> tuple[int, int]:
    """The highest index at which the sum of weights from the top reaches target > 0, and the sum above it."""
    from_top = np.cumsum(weights[::-1])
    position = int(np.searchsorted(from_top, target))
    return len(weights) - 1 - position, int(from_top[position - 1]) if position else 0


def _significands(bits: np.ndarray) -> np.ndarray:
    """m of scores m * 2^(max(exponent, 1) - 150), int64, from their bits; infinity counts as 2^128."""
    return np.where(bits >> 23 > 0, 1 << 23, 0) + (bits & 0x7FFFFF)


@dataclass(frozen=True, slots=True)
class Digit:
    """The high 16 bits of a threshold, and what is left to find within its bin: the `rest` largest scores
    (density) or scores whose significands sum to `rest` (mass)."""

    prefix: int
    rest: int


def first_digit(selection: Selection, counts: np.ndarray, lows: np.ndarray) -> Digit | float:
    """From the histogram of high halves: the threshold's high half, or the whole answer where it is plain."""
    if selection.rule == "mass":
        return _first_mass_digit(selection.value, counts, lows)
    k = count_of_density(selection.value, int(counts.sum()))
    if k == 0:
        return KEEP_NOTHING
    prefix, above = _find_from_top(counts, k)
    return Digit(prefix, k - above)


def _first_mass_digit(share: float, counts: np.ndarray, lows: np.ndarray) -> Digit | float:
    """In units of 2^-149 scores are integers, so that sums and shares are exact: first over whole exponents,
    then over the bins of one exponent, where the sums of significands fit into 64 bits."""
    masses = counts * _significands(np.arange(len(counts), dtype=np.int64) << 16) + lows
    by_exponent = masses.reshape(-1, _BINS_PER_EXPONENT).sum(axis=1)
    exponents = [int(e) for e in np.flatnonzero(by_exponent)[::-1]]
    exact = {e: int(by_exponent[e]) << max(e - 1, 0) for e in exponents}
    rest = math.ceil(Fraction(repr(float(share))) * sum(exact.values()))
    if rest == 0:
        return KEEP_NOTHING
    for exponent in exponents:
        if exact[exponent] >= rest:
            break
        rest -= exact[exponent]
    rest = -(-rest >> max(exponent - 1, 0))  # rounded up
    first = exponent * _BINS_PER_EXPONENT
    offset, above = _find_from_top(masses[first : first + _BINS_PER_EXPONENT], rest)
    return Digit(first + offset, rest - above)


def second_digit(selection: Selection, digit: Digit, counts: np.ndarray) -> float:
    """The exact threshold, from the histogram of low halves in the bin of `digit`. Never 0: an element of
    saliency 0 is not kept."""
    weights = counts
    if selection.rule == "mass":
        weights = counts * _significands(digit.prefix << 16 | np.arange(len(counts), dtype=np.int64))
    low, _ = _find_from_top(weights, digit.rest)
    return max(_value(digit.prefix << 16 | low), _SMALLEST)


def threshold_of_scores(selection: Selection, scores: np.ndarray) -> float:
    """The same threshold from the scores themselves (float32, non-negative, one tensor's)."""
    if selection.rule == "density":
        k = count_of_density(selection.value, scores.size)
        if k == 0:
            return KEEP_NOTHING
        return max(float(np.partition(scores, scores.size - k)[scores.size - k]), _SMALLEST)
    bits = np.abs(scores).view(np.uint32)
    counts = np.bincount(bits >> 16, minlength=1 << 16)
    lows = np.bincount(bits >> 16, weights=bits & 0xFFFF, minlength=1 << 16).astype(np.int64)
    digit = first_digit(selection, counts, lows)
    if not isinstance(digit, Digit):
        return digit
    return second_digit(
        selection, digit, np.bincount(bits[bits >> 16 == digit.prefix] & 0xFFFF, minlength=1 << 16)
    )
