"""Host arithmetic on survey results: thresholds from counts. Reads no tensor.

Scores are non-negative float32, so their order is the order of their bit patterns read as integers: the k-th
largest is found digit by digit (16 bits each) from two histograms, exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ..tensors.found import Selection
from ..tensors.terms import score_of_bits

KEEP_ALL = 0.0
KEEP_NOTHING = math.nan  # every comparison with it is false
SMALLEST = float(np.float32(2.0**-149))  # keeps every score but 0
_BINS_PER_EXPONENT = 128  # of the high 16 bits, the lower 7 belong to the significand


def count_of_density(density: float, total: int) -> int:
    """k = floor(density * total), with the density taken as the decimal it was written as: 0.57 of 100 is 57,
    although the float64 product is 56.99..."""
    return math.floor(Fraction(repr(float(density))) * total)


def keeps_some(selection: Selection, count: int) -> bool:
    """Whether a surveyed selection among so many elements can keep any."""
    return count_of_density(selection.value, count) > 0 if selection.rule == "density" else count > 0


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


def wanted(selection: Selection, count: int, mass: int) -> int:
    """How many of `count` scores a selection keeps; or for "mass", how much of their sum `mass`."""
    if selection.rule == "density":
        return count_of_density(selection.value, count)
    return math.ceil(Fraction(repr(float(selection.value))) * mass)


def total_mass(by_exponent: np.ndarray) -> int:
    """The sum of scores in units of 2^-149, in which scores are integers and sums exact. by_exponent: sums of
    significands, int64[256] by the scores' exponents."""
    return sum(int(m) << max(e - 1, 0) for e, m in enumerate(by_exponent.tolist()))


def mass(scores: np.ndarray) -> int:
    """The sum of scores (float32[n], not negative) in the units of `total_mass`."""
    bits = scores.view(np.uint32).astype(np.int64)
    by_exponent = np.zeros(256, np.int64)
    np.add.at(by_exponent, bits >> 23, _significands(bits))
    return total_mass(by_exponent)


def available(selection: Selection, counts: np.ndarray, lows: np.ndarray) -> int:
    """How many scores a histogram of high halves holds; or for "mass", their sum."""
    if selection.rule == "density":
        return int(counts.sum())
    return total_mass(_bin_masses(counts, lows).reshape(-1, _BINS_PER_EXPONENT).sum(axis=1))


def _bin_masses(counts: np.ndarray, lows: np.ndarray) -> np.ndarray:
    """Sums of significands of each bin, from the histogram of high halves."""
    return counts * _significands(np.arange(len(counts), dtype=np.int64) << 16) + lows


def first_digit(selection: Selection, counts: np.ndarray, lows: np.ndarray) -> Digit | float:
    """From the histogram of high halves: the threshold's high half, or the whole answer where it is plain."""
    rest = wanted(selection, int(counts.sum()), available(selection, counts, lows))
    return KEEP_NOTHING if rest == 0 else digit_of_rest(selection, rest, counts, lows)


def digit_of_rest(selection: Selection, rest: int, counts: np.ndarray, lows: np.ndarray) -> Digit:
    """The high half of the threshold that keeps the `rest` largest scores, or scores of that mass (units of
    2^-149); 0 < rest <= what there is."""
    if selection.rule == "density":
        prefix, above = _find_from_top(counts, rest)
        return Digit(prefix, rest - above)
    # First over whole exponents, then over the bins of one, where sums of significands fit into 64 bits.
    masses = _bin_masses(counts, lows)
    by_exponent = masses.reshape(-1, _BINS_PER_EXPONENT).sum(axis=1)
    for exponent in map(int, np.flatnonzero(by_exponent)[::-1]):
        mass = int(by_exponent[exponent]) << max(exponent - 1, 0)
        if mass >= rest:
            break
        rest -= mass
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
    return max(score_of_bits(digit.prefix << 16 | low), SMALLEST)


def threshold_of_scores(selection: Selection, scores: np.ndarray) -> float:
    """The same threshold from the scores themselves (float32, not below 0, one tensor's; a zero may have a
    sign)."""
    if selection.rule == "density":
        k = count_of_density(selection.value, scores.size)
        if k == 0:
            return KEEP_NOTHING
        return max(float(np.partition(scores, scores.size - k)[scores.size - k]), SMALLEST)
    bits = np.abs(scores).view(np.uint32)
    counts = np.bincount(bits >> 16, minlength=1 << 16)
    lows = np.bincount(bits >> 16, weights=bits & 0xFFFF, minlength=1 << 16).astype(np.int64)
    digit = first_digit(selection, counts, lows)
    if not isinstance(digit, Digit):
        return digit
    return second_digit(
        selection, digit, np.bincount(bits[bits >> 16 == digit.prefix] & 0xFFFF, minlength=1 << 16)
    )
