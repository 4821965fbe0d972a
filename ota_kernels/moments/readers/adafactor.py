"""Adafactor: means r_i of the rows and c_j of the columns of v stand for v_ij = r_i c_j / mean(r).

With row sums R_i = n r_i and column sums C_j = m c_j of an m x n matrix, R_i C_j / sum(R) is the same value.
torch.optim.Adafactor calls them row_var [m, 1] and col_var [1, n], and divides by no less than eps[0];
transformers and fairseq exp_avg_sq_row [m] and exp_avg_sq_col [n]. Vectors keep v in full: variance, or
exp_avg_sq as in Adam. Its beta2 grows with the step from 0, so v needs no bias correction.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...errors import InputError
from ..source import FactoredMoment
from .state import State
from .values import Values

_ROWS, _COLUMNS = "exp_avg_sq_row", "exp_avg_sq_col"
_TORCH_ROWS, _TORCH_COLUMNS, _TORCH_FULL = "row_var", "col_var", "variance"


def shape(state: State) -> tuple[int, ...]:
    """The parameter's shape."""
    if _TORCH_FULL in state:
        return state.shape(_TORCH_FULL)
    if _TORCH_ROWS in state:
        return (*state.shape(_TORCH_ROWS)[:-1], *state.shape(_TORCH_COLUMNS)[-1:])
    return (*state.shape(_ROWS), *state.shape(_COLUMNS)[-1:])


def values(state: State) -> Values | None:
    """The elements of a vector; None for a matrix, which is kept as factors."""
    return state.values(_TORCH_FULL) if _TORCH_FULL in state else None


def factored(state: State, name: str, step: float | None, beta2: float | None) -> FactoredMoment:
    """Raises InputError for more than two dimensions, which Adafactor factors matrix by matrix."""
    found = shape(state)
    if len(found) != 2:
        raise InputError(
            f"{state.where}: Adafactor's factors of shape {list(found)} are one pair per matrix; "
            "only matrices and vectors can be extracted"
        )
    keys = (_TORCH_ROWS, _TORCH_COLUMNS) if _TORCH_ROWS in state else (_ROWS, _COLUMNS)
    m, n = found
    rows, columns = map(state.values, keys)
    if (rows.numel, columns.numel) != found:
        raise InputError(f"{state.where}: {rows.numel} x {columns.numel} factors do not fit {list(found)}")
    return FactoredMoment(name, (m, n), _sums(rows, n), _sums(columns, m), step, beta2)


def _sums(means: Values, count: int) -> Callable[[], np.ndarray]:
    """Sums of `count` elements each, from their means."""
    return lambda: means.all() * np.float32(count)
