"""Operator norms of edits against numpy's and torch's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ota_kernels.planning.roles import EMBEDDING, MATRIX, OUTPUT, VECTOR
from ota_kernels.run import norms

SIDES = st.integers(1, 40)


def close(expected: float, rel: float):
    """approx without its absolute tolerance, 1e-12, which is larger than many an edit."""
    return pytest.approx(expected, rel=rel, abs=0)


def random_matrix(seed: int, rows: int, columns: int) -> np.ndarray:
    return np.float32(np.random.default_rng(seed).normal(0, 1e-3, (rows, columns)))


@given(SIDES, SIDES, st.integers(0, 9))
def test_spectral_norm_of_matrices(rows, columns, seed):
    """sqrt(d_in / d_out) sigma_max: the largest RMS of M x over x of RMS 1."""
    matrix = random_matrix(seed, rows, columns)
    found = norms.edit_norm(matrix.ravel(), (rows, columns), MATRIX, approximate=False)
    singular = torch.linalg.matrix_norm(torch.from_numpy(matrix).double(), 2).item()
    assert found == close(math.sqrt(columns / rows) * singular, 1e-12)


def test_spectral_norm_in_row_blocks():
    """More rows than are multiplied at once, tall and wide."""
    matrix = random_matrix(1, 2 * norms._ROWS + 3, 9)
    exact = np.linalg.norm(matrix.astype(np.float64), 2)
    for m in (matrix, np.ascontiguousarray(matrix.T)):
        rows, columns = m.shape
        found = norms.edit_norm(m.ravel(), m.shape, MATRIX, approximate=False)
        assert found == close(math.sqrt(columns / rows) * exact, 1e-12)


@given(SIDES, SIDES, st.integers(0, 9))
def test_spectral_norm_is_attained(rows, columns, seed):
    """The definition, without an SVD: no x of RMS 1 gives more, and the leading one gives as much."""
    matrix = random_matrix(seed, rows, columns).astype(np.float64)
    found = norms.edit_norm(np.float32(matrix).ravel(), (rows, columns), MATRIX, approximate=False)

    def rms(x):
        return math.sqrt(np.mean(np.square(x)))

    leading = np.linalg.svd(matrix)[2][0]
    assert rms(matrix @ (leading / rms(leading))) == close(found, 1e-9)
    for x in np.random.default_rng(seed).normal(size=(20, columns)):
        assert rms(matrix @ (x / rms(x))) <= found * (1 + 1e-12)


@given(SIDES, SIDES, st.integers(0, 9))
def test_embeddings_and_outputs_take_the_largest_column(rows, columns, seed):
    """Over sqrt(rows), of the stored [vocabulary, hidden] matrix: of an output matrix, the largest RMS that a
    one-hot input selects; of an embedding, the published meaning."""
    matrix = random_matrix(seed, rows, columns)
    exact = matrix.astype(np.float64)
    of_columns = (np.linalg.norm(exact, axis=0) / math.sqrt(rows)).max()
    for approximate in (False, True):
        found = norms.edit_norm(matrix.ravel(), matrix.shape, EMBEDDING, approximate)
        assert found == close(of_columns, 1e-12)
        found = norms.edit_norm(matrix.ravel(), matrix.shape, OUTPUT, approximate)
        assert found == close(of_columns, 1e-12)


@pytest.mark.parametrize("shape", [(), (1,), (513,), (3, 4, 5)], ids=str)
def test_everything_else_is_rms(shape):
    edits = np.float32(np.random.default_rng(2).normal(0, 1e-3, math.prod(shape)))
    exact = torch.from_numpy(edits).double().square().mean().sqrt().item()
    assert norms.edit_norm(edits, shape, VECTOR, approximate=False) == close(exact, 1e-12)


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("role", [MATRIX, EMBEDDING, OUTPUT])
def test_norm_of_nothing_is_zero(role, approximate):
    assert norms.edit_norm(np.zeros(0, np.float32), (0, 4), role, approximate) == 0.0
    assert norms.edit_norm(np.zeros(12, np.float32), (3, 4), role, approximate) == 0.0


@given(SIDES, SIDES, st.integers(0, 9))
def test_approximate_norm_is_a_close_lower_bound(rows, columns, seed):
    """Random matrices are its worst case, their singular values are close to each other."""
    matrix = random_matrix(seed, rows, columns)
    exact = norms.edit_norm(matrix.ravel(), matrix.shape, MATRIX, approximate=False)
    found = norms.edit_norm(matrix.ravel(), matrix.shape, MATRIX, approximate=True)
    assert 0.9 * exact <= found <= exact * (1 + 1e-5)


@pytest.mark.parametrize("shape", [(50, 30), (30, 50), (200, 1), (1, 200)], ids=str)
def test_approximate_norm_where_one_direction_leads(shape):
    rng = np.random.default_rng(3)
    matrix = np.outer(rng.normal(size=shape[0]), rng.normal(size=shape[1])) + 0.1 * rng.normal(size=shape)
    edits = np.float32(matrix * 1e-3).ravel()
    exact = norms.edit_norm(edits, shape, MATRIX, approximate=False)
    assert norms.edit_norm(edits, shape, MATRIX, approximate=True) == close(exact, 1e-5)


def test_norms_of_tiny_edits_do_not_underflow():
    """Squares of 1e-30 are below float32; the exact norm is float64 throughout."""
    edits = np.full(12, 1e-30, np.float32)
    value = float(edits[0])
    assert norms.edit_norm(edits, (12,), VECTOR, False) == close(value, 1e-12)
    assert norms.edit_norm(edits, (3, 4), EMBEDDING, False) == close(value, 1e-12)
    # All equal: sigma_max = value sqrt(12), times sqrt(4 / 3).
    assert norms.edit_norm(edits, (3, 4), MATRIX, False) == close(value * 4, 1e-12)
    assert norms.edit_norm(edits, (3, 4), MATRIX, True) == close(value * 4, 1e-5)
