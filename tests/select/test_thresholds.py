"""Thresholds from scores and from histograms, against sorting and exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import oracle
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ota_kernels.select import thresholds as decide
from ota_kernels.select.thresholds import Digit
from ota_kernels.tensors.found import Selection, selection_of

TINIEST = np.float32(2.0**-149)
LARGEST = np.finfo(np.float32).max


def histogram(scores: np.ndarray, prefix: int = -1) -> tuple[np.ndarray, np.ndarray]:
    """Counts by the high half of the bits, sums of the low halves; or counts by the low half in one bin."""
    bits = scores.view(np.uint32).astype(np.int64)
    high, low = bits >> 16, bits & 0xFFFF
    if prefix >= 0:
        return np.bincount(low[high == prefix], minlength=1 << 16), np.zeros(1 << 16, np.int64)
    lows = np.zeros(1 << 16, np.int64)
    np.add.at(lows, high, low)
    return np.bincount(high, minlength=1 << 16), lows


def by_digits(selection: Selection, scores: np.ndarray) -> float:
    """The threshold that two passes of histograms give."""
    answer = decide.first_digit(selection, *histogram(scores))
    if not isinstance(answer, Digit):
        return answer
    return decide.second_digit(selection, answer, histogram(scores, answer.prefix)[0])


def kept(threshold: float, scores: np.ndarray) -> np.ndarray:
    return scores >= np.float32(threshold)


SHARES = st.sampled_from(["0", "1", "0.5", "0.1", "0.07", "0.9", "0.999", "1e-9"]).map(float) | st.floats(
    0, 1
)
# Few different values make ties; many orders of magnitude make sums that float64 would round.
SCORES = hnp.arrays(
    np.float32,
    st.integers(1, 80),
    elements=st.sampled_from([0.0, float(TINIEST), 1e-40, 1e-20, 0.5, 1.0, 3.0, 1e30])
    | st.floats(0, 2.0**100, width=32),
)


@given(SCORES, SHARES)
def test_density_keeps_the_largest(scores, density):
    selection = Selection("density", density)
    expected = oracle.kept_by_density(scores, density) if density < 1 else scores > 0
    for find in (decide.threshold_of_scores, by_digits):
        np.testing.assert_array_equal(kept(find(selection, scores), scores), expected, find.__name__)


@given(SCORES, SHARES)
@example(np.float32([2.0] * 7 + [1.0] * 186), 0.07)  # 0.07 of 200 is 14, but 14.000000000000002 in float64
@example(np.float32([1.0, 1e-20]), 1.0)
@example(np.float32([1.0, 1e-20, 1e-30]), 1 - 2.0**-53)
@example(np.float32([3.0, 1.0]), 0.75)
def test_saliency_mass_keeps_the_fewest(scores, share):
    selection = Selection("mass", share)
    expected = oracle.kept_by_mass(scores, share)
    for find in (decide.threshold_of_scores, by_digits):
        np.testing.assert_array_equal(kept(find(selection, scores), scores), expected, find.__name__)


@pytest.mark.parametrize("n", [1, 511, 512, 513, 6000])
@pytest.mark.parametrize("kind", ["random", "clustered", "sorted", "one-bin"])
def test_many_scores(kind, n):
    rng = np.random.default_rng(n)
    scores = {
        "random": lambda: np.float32(10.0 ** rng.uniform(-44, 38, n)),
        "clustered": lambda: np.float32(10.0 ** rng.integers(-30, 30, n)) * np.float32(rng.integers(1, 4, n)),
        "sorted": lambda: np.arange(n, dtype=np.float32),
        # All share their high half: the second digit alone tells them apart.
        "one-bin": lambda: (np.uint32(0x3F80_0000) + rng.integers(0, 1 << 16, n, dtype=np.uint32)).view(
            np.float32
        ),
    }[kind]()
    for share in (1 / 3, 0.001, 0.5, 0.99999):
        for rule, truth in (("density", oracle.kept_by_density), ("mass", oracle.kept_by_mass)):
            expected = truth(scores, share)
            for find in (decide.threshold_of_scores, by_digits):
                threshold = find(Selection(rule, share), scores)
                np.testing.assert_array_equal(kept(threshold, scores), expected)


@pytest.mark.parametrize("find", [decide.threshold_of_scores, by_digits])
def test_infinite_scores_are_the_largest(find):
    scores = np.float32([1.0, np.inf, LARGEST, 0.0, np.inf])
    assert find(Selection("density", 0.2), scores) == np.inf
    assert find(Selection("density", 0.4), scores) == np.inf
    assert find(Selection("density", 0.6), scores) == LARGEST
    # An infinite score weighs 2^128, just above the largest finite one: two of the three hold 0.6.
    assert find(Selection("mass", 0.6), scores) == np.inf
    assert find(Selection("mass", 0.7), scores) == LARGEST
    assert find(Selection("mass", 1.0), scores) == 1.0


@pytest.mark.parametrize("find", [decide.threshold_of_scores, by_digits])
@pytest.mark.parametrize("rule", ["density", "mass"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_zeros_are_never_kept(find, rule, share):
    scores = np.zeros(100, np.float32)
    assert not kept(find(Selection(rule, share), scores), scores).any()
    scores[3] = TINIEST
    assert kept(find(Selection(rule, share), scores), scores).sum() == (share > 0)


@pytest.mark.parametrize("find", [decide.threshold_of_scores, by_digits])
def test_ties_at_the_threshold_are_all_kept(find):
    scores = np.float32([5, 3, 3, 3, 1])
    for density, count in ((0.2, 1), (0.4, 4), (0.6, 4), (0.8, 4), (0.19, 0)):
        assert kept(find(Selection("density", density), scores), scores).sum() == count


@pytest.mark.parametrize(
    ("density", "total", "count"),
    [
        (0.57, 100, 57),
        (0.29, 100, 29),
        (0.1, 10**12, 10**11),
        (1.0, 7, 7),
        (0.0, 7, 0),
        (0.999, 1, 0),
        (1e-9, 10**9, 1),
    ],
)
def test_count_of_density_reads_a_decimal(density, total, count):
    """floor(density * total) in float64 gives 56 and 28 for the first two."""
    assert decide.count_of_density(density, total) == count


@given(st.floats(0, 1), st.integers(0, 10**13))
def test_count_of_density_is_exact(density, total):
    assert decide.count_of_density(density, total) == Fraction(str(density)) * total // 1


@pytest.mark.parametrize(
    ("parameters", "selection"),
    [
        ({}, Selection("all")),
        ({"density": 1.0}, Selection("all")),
        ({"density": 0.2}, Selection("density", 0.2)),
        ({"density": 0.0}, Selection("density", 0.0)),
        ({"saliency_mass": 1.0}, Selection("mass", 1.0)),
        ({"precond_threshold": 0.0}, Selection("threshold", 0.0)),
        ({"precond_threshold": 1e-9}, Selection("threshold", 1e-9)),
    ],
)
def test_selection_of_parameters(parameters, selection):
    assert selection_of(parameters) == selection


def test_masses_of_many_elements_do_not_overflow():
    """2^39 scores of 1.99 in one bin, as a model of half a trillion parameters could have."""
    n = 1 << 39
    bits = 0x3FFF_0000
    counts, lows = np.zeros(1 << 16, np.int64), np.zeros(1 << 16, np.int64)
    counts[bits >> 16] = n
    digit = decide.first_digit(Selection("mass", 0.5), counts, lows)
    assert digit == Digit(bits >> 16, n // 2 * 0xFF_0000)
    low_counts = np.zeros(1 << 16, np.int64)
    low_counts[0] = n
    value = np.uint32(bits).view(np.float32)
    assert decide.second_digit(Selection("mass", 0.5), digit, low_counts) == value
