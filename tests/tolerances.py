"""The one table of tolerances: how far a merged value may be from its float64 evaluation, given the masks."""

from __future__ import annotations

import numpy as np

# Bits of the significand (the leading one too) and the least exponent of a normal number.
_FORMATS = {"bfloat16": (8, -126), "float16": (11, -14), "float32": (24, -126), "float64": (53, -1022)}


def ulp(dtype: str, x: np.ndarray) -> np.ndarray:
    """One unit in the last place of `dtype` at the magnitude of x, float64."""
    bits, least = _FORMATS[dtype]
    exponent = np.frexp(np.abs(x))[1] - 1
    exponent = np.where(x == 0, least, np.maximum(exponent, least))
    return np.ldexp(1.0, exponent - bits + 1)


def tolerance(dtype: str, expected: np.ndarray, operand: np.ndarray, n_experts: int) -> np.ndarray:
    """How far results of type `dtype` may be from `expected`; operand: the largest of |w_0|, |w_t| and
    |lambda r d_t|.

    bfloat16, float16  1 ulp, and (T + 4) 2^-24 operand: they are computed in float32, whose rounding of the
                       T + 4 sums and products shows where the terms cancel to much less than each of them
    float32            1 ulp: computed in float64, whose rounding is 2^-29 of that
    float64            (T + 4) 2^-52 operand: both sides round that often
    """
    rounding = (n_experts + 4) * operand
    if dtype == "float64":
        return rounding * 2.0**-52
    if dtype == "float32":
        return ulp(dtype, expected)
    return ulp(dtype, expected) + rounding * 2.0**-24


def assert_close(
    dtype: str, actual: np.ndarray, expected: np.ndarray, operand: np.ndarray, n_experts: int
) -> None:
    """Every element within `tolerance`; the message lists the worst ones. NaN equals NaN, inf equals inf."""
    with np.errstate(invalid="ignore"):
        error = np.abs(actual - expected)
        allowed = tolerance(dtype, expected, operand, n_experts)
        same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
        wrong = ~(same | (error <= allowed))
    if not wrong.any():
        return
    worst = np.argsort(np.where(wrong, -error / allowed, np.inf), axis=None)[: min(5, int(wrong.sum()))]
    listed = "; ".join(
        f"[{i}] got {actual.flat[i]!r}, expected {expected.flat[i]!r}, allowed {allowed.flat[i]:.3g}"
        for i in worst
    )
    raise AssertionError(f"{int(wrong.sum())} of {wrong.size} {dtype} values are off: {listed}")
