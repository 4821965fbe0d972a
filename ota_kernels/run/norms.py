"""Operator norms of edits, for `rescale`.

Embeddings and output matrices: the largest norm of a column of the stored [vocabulary, hidden] matrix over
sqrt(rows). Of an output matrix that is l1 -> RMS, the largest RMS of what one hidden unit feeds; the
published OTA recipes take it of embeddings too. Other matrices: RMS -> RMS, sqrt(d_in / d_out) times the
spectral norm. Everything else: RMS.
"""

from __future__ import annotations

import math

from ..planning.roles import EMBEDDING, MATRIX, OUTPUT
from ..tensors import array as resident
from ..tensors.array import Array

_POWER_ITERATIONS = 20
_ROWS = 1024


def edit_norm(edits: Array, shape: tuple[int, ...], role: str, approximate: bool) -> float:
    """The norm of one tensor's edits, float32[n] in row-major order of `shape`. Holds, for matrices, the
    float64 Gram matrix of the smaller side, or with `approximate` the edits as float64."""
    if len(edits) == 0:
        return 0.0
    if role == MATRIX:
        d_out, d_in = shape
        matrix = edits.reshape(shape)
        spectral = _power_iteration(matrix) if approximate else _spectral_norm(matrix)
        return math.sqrt(d_in / d_out) * spectral
    if role in (EMBEDDING, OUTPUT):
        return math.sqrt(resident.squares(edits).reshape(shape).mean(axis=0).max())
    return math.sqrt(resident.squares(edits).mean())


def _spectral_norm(matrix: Array) -> float:
    """The largest singular value, from the float64 Gram matrix of the smaller side."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    gram = 0.0
    for row in range(0, tall.shape[0], _ROWS):
        part = resident.float64(tall[row : row + _ROWS])
        gram += part.T @ part
    return math.sqrt(max(float(resident.library(matrix).linalg.eigvalsh(gram)[-1]), 0.0))


def _power_iteration(matrix: Array) -> float:
    """A lower bound of the largest singular value, close after a few steps from the largest edit's row. In
    float64: products in float32 are what the library and the processor make of the order of their sums."""
    lib, matrix = resident.library(matrix), resident.float64(matrix)
    row = int(lib.argmax(lib.maximum(lib.amax(matrix, 1), -lib.amin(matrix, 1))))
    v, norm = _unit(matrix[row])
    for _ in range(_POWER_ITERATIONS):
        u, norm = _unit(matrix @ v)
        v, _ = _unit(matrix.T @ u)
    return norm


def _unit(v: Array) -> tuple[Array, float]:
    """v at length 1 (0 stays 0), and its length, in float64: squares of small edits underflow in float32."""
    length = float(resident.library(v).linalg.norm(resident.float64(v)))
    return v / (length or 1.0), length
