"""The float64 oracle: slerp, nuslerp, multislerp, karcher and model_stock."""

from __future__ import annotations

import math

import numpy as np
import pytest

from oracle import Tensor
from oracle.examples import SHAPES, close, merge, tensor, vectors


@pytest.mark.parametrize("shape", SHAPES[:-1])
def test_slerp_ends(shape):
    x = tensor(shape, 1, step=0.05)
    close(merge(x, "slerp", t=0).out, x.base)
    close(merge(x, "slerp", t=1).out, x.experts[0])


def test_slerp_of_a_quarter_circle():
    x = vectors([2.0, 0.0], [0.0, 2.0])
    half = math.sqrt(2)
    np.testing.assert_allclose(merge(x, "slerp", t=0.5).out, [half, half])
    np.testing.assert_allclose(merge(x, "slerp", t=1 / 3).out, [2 * math.cos(math.pi / 6), 1])
    np.testing.assert_allclose(merge(x, "slerp", t=-1 / 3).out, [2 * math.cos(math.pi / 6), -1])  # beyond


@pytest.mark.parametrize("other", [[1.0, 0.02], [-1.0, 0.02], [1.0, 0.0], [-1.0, 0.0]], ids=str)
def test_slerp_of_parallel_and_opposite_vectors_is_linear(other):
    x = vectors([1.0, 0.0], other)
    np.testing.assert_allclose(merge(x, "slerp", t=0.25).out, [0.75 + 0.25 * other[0], 0.25 * other[1]])


def test_slerp_of_a_zero_vector_turns_by_a_right_angle():
    x = vectors([0.0, 0.0], [1.0, 2.0])
    np.testing.assert_allclose(merge(x, "slerp", t=1 / 3).out, [0.5, 1])


@pytest.mark.parametrize("shape", [(6, 9), (54,), (5, 3, 9)])
@pytest.mark.parametrize("has_base", [True, False])
def test_nuslerp_groups(shape, has_base):
    x = tensor(shape, 2, has_base=has_base)

    def each(axis):
        one, two = (np.moveaxis(d, axis, -1) for d in x.edits())
        cosine = (one * two).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(two, axis=-1)
        theta = np.arccos(cosine)[..., None]
        found = (np.sin(0.25 * theta) * one + np.sin(0.75 * theta) * two) / np.sin(theta)
        return np.moveaxis(found, -1, axis) + (x.base if has_base else 0)

    rows = merge(x, "nuslerp", weight=[1, 3], nuslerp_flatten=False).out
    columns = merge(x, "nuslerp", weight=[1, 3], nuslerp_flatten=False, nuslerp_row_wise=True).out
    flat = merge(x, "nuslerp", weight=[1, 3]).out
    close(rows, each(-1), 1e-13)
    close(columns, each(0), 1e-13)
    if len(shape) == 1:
        np.testing.assert_array_equal(rows, flat)
        np.testing.assert_array_equal(columns, flat)
    else:
        assert np.abs(rows - flat).max() > 1e-6


def test_nuslerp_edges():
    x = vectors(None, [2.0, 0.0], [0.0, 2.0])
    close(merge(x, "nuslerp", weight=[1, -1]).out, merge(x, "nuslerp", weight=[1, 1]).out)  # sum 0: t = 1/2
    close(merge(x, "nuslerp", weight=[0, 1]).out, [0, 2])
    opposite = vectors(None, [1.0, 0.0], [-3.0, 0.0])
    np.testing.assert_array_equal(merge(opposite, "nuslerp", weight=[1, 1]).out, [-1, 0])
    zero = vectors(None, [0.0, 0.0], [3.0, 0.0])
    np.testing.assert_allclose(merge(zero, "nuslerp", weight=[2, 1]).out, [1.5, 0])
    # one group opposite, the other not: each takes its own way
    mixed = vectors(None, [[1.0, 0.0], [1.0, 0.0]], [[-3.0, 0.0], [0.0, 1.0]])
    found = merge(mixed, "nuslerp", weight=[1, 1], nuslerp_flatten=False).out
    np.testing.assert_allclose(found, [[-1, 0], [math.sqrt(0.5)] * 2])


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.2, 1.0, 2.0], [1.5, -0.4, 0.5]], ids=str)
def test_multislerp_is_what_its_tangent_space_gives(has_base, weights):
    """The published way, written out: project at the mean direction, average, map back."""
    x = tensor(n_experts=3, has_base=has_base)
    d = x.edits().reshape(3, -1)
    omega = np.array(weights) / sum(weights)
    norms = np.linalg.norm(d, axis=1)
    u = d / (norms + 1e-8)[:, None]
    mean = omega @ u
    mean = mean / np.linalg.norm(mean)
    average = omega @ (u - (u @ mean)[:, None] * mean)
    angle = np.linalg.norm(average)
    assert angle < 1e-15  # identically zero
    expected = (omega @ norms * mean).reshape(x.shape) + (x.base if has_base else 0)
    close(merge(x, "multislerp", weight=weights).out, expected, 1e-12)


def test_multislerp_edges():
    base = [1.0, 2.0]
    assert merge(vectors(base, [3.0, 4.0]), "multislerp", weight=5).out.tolist() == [3, 4]
    assert merge(vectors(base, base, base, base), "multislerp", weight=1).out.tolist() == base
    opposite = vectors(base, [2.0, 2.0], [0.0, 2.0])
    np.testing.assert_allclose(merge(opposite, "multislerp", weight=[1, 1]).out, base)
    np.testing.assert_allclose(
        merge(opposite, "multislerp", weight=[1, 1.0], normalize_weights=False).out, base
    )
    with pytest.raises(ValueError, match=r"w: .*opposite"):
        merge(vectors([0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]), "multislerp", weight=[1, 1, 1])
    with pytest.raises(ValueError, match="sum to 0"):
        merge(opposite, "multislerp", weight=[1, -1])


@pytest.mark.parametrize("shape", [(12, 17), (203,), (3, 5, 7)])
def test_karcher_of_two_is_slerp_at_one_half(shape):
    x = tensor(shape, 2, has_base=False, step=0.05)
    one, two = x.experts
    two = two * (np.linalg.norm(one) / np.linalg.norm(two))
    midway = merge(Tensor(one, (two,)), "slerp", t=0.5).out
    close(merge(Tensor(None, (one, two)), "karcher", tol=1e-12, max_iter=50).out, midway, 1e-12)


def test_karcher_of_three_axes_is_their_diagonal():
    x = vectors(None, [3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 2.0])
    np.testing.assert_allclose(merge(x, "karcher").out, [2 / math.sqrt(3)] * 3)


def test_karcher_edges():
    one = [1.0, 2.0]
    np.testing.assert_array_equal(merge(vectors(None, one), "karcher").out, one)
    np.testing.assert_array_equal(merge(vectors(None, [0.0, 0.0], [1e-6, 0.0]), "karcher").out, [0, 0])
    # A zero counts in the mean of norms, not in the direction.
    np.testing.assert_allclose(merge(vectors(None, [0.0, 0.0], [0.0, 4.0]), "karcher").out, [0, 2])
    # Opposite: starts at the first, and neither gives a step.
    np.testing.assert_allclose(merge(vectors(None, [1.0, 0.0], [-3.0, 0.0]), "karcher").out, [2, 0])


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_of_equal_experts_is_the_expert(filter_wise):
    x = tensor((6, 40), 1, step=0.1)
    for n_experts in (2, 5):
        copies = Tensor(x.base, x.experts * n_experts)
        close(merge(copies, "model_stock", filter_wise=filter_wise).out, x.experts[0])


def test_model_stock_by_hand():
    base = [[1.0, 1.0], [0.0, 0.0]]
    x = vectors(base, [[2.0, 1.0], [0.0, 1.0]], [[2.0, 2.0], [1.0, 0.0]])
    # tensor: <d, d'> = 1, norms sqrt 2 and sqrt 3, c = 1/sqrt 6
    c = 1 / math.sqrt(6)
    mean = (x.experts[0] + x.experts[1]) / 2
    np.testing.assert_allclose(merge(x, "model_stock").out, x.base + 2 * c / (1 + c) * (mean - x.base))
    c = math.sqrt(0.5)  # first row; the second row's edits are at right angles: the base
    found = merge(x, "model_stock", filter_wise=True).out
    np.testing.assert_allclose(found[0], 1 + 2 * c / (1 + c) * (mean[0] - 1))
    np.testing.assert_allclose(found[1], [0, 0])


def test_model_stock_edges():
    opposite = vectors([0.0], [1.0], [-1.0])  # 1 + c = 0
    assert merge(opposite, "model_stock").out == [0]
    small = vectors([0.0], [1e-4], [1e-4])  # the floor of the product: c = 0.01
    np.testing.assert_allclose(merge(small, "model_stock").out, [0.02 / 1.01 * 1e-4])
    three = vectors([0.0, 0.0], [1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8])
    tau_beyond = merge(three, "model_stock", filter_wise=True)
    assert np.isfinite(tau_beyond.out).all()
