"""The C++ backend (csrc/): the same formulas as `reference`, at memory speed on a CPU.

Environment: OTA_KERNELS_ISA=base|v3|v4 picks an instruction set narrower than the widest one available.
"""

from __future__ import annotations

import functools
import os

import numpy as np

from ..errors import BackendError
from ..formula import ExpertTerms, Terms
from ..tensors import Buffer, Curvature, Full, LowRank, Rank1, TensorInputs
from .stats import MergeStats, NonFinite

NAME = "native"


@functools.cache
def _extension():
    from .. import _native

    return _native


def instruction_sets() -> list[str]:
    """Instruction sets that this machine runs, widest first: "v4" (AVX-512), "v3" (AVX2), "base"."""
    return _extension().instruction_sets()


@functools.cache
def instruction_set() -> str:
    """The instruction set in use."""
    available = instruction_sets()
    wanted = os.environ.get("OTA_KERNELS_ISA") or available[0]
    if wanted not in available:
        raise BackendError(f"OTA_KERNELS_ISA={wanted}: this machine runs {', '.join(available)}")
    return wanted


def verify() -> tuple[bool, str]:
    """(ok, reason): whether this backend can run here."""
    try:
        return True, f"instruction set {instruction_set()}"
    except ImportError as error:
        return False, f"the compiled extension is missing ({error}); reinstall ota-kernels"


def _curvature(c: Curvature) -> tuple:
    if isinstance(c, Full):
        return (c.values.data, c.values.dtype.code)
    if isinstance(c, Rank1):
        return (c.rows, c.columns, c.columns.size, 1, c.start, False)
    if isinstance(c, LowRank):
        rank, n_columns = c.right.shape
        return (c.left.reshape(-1), c.right.reshape(-1), n_columns, rank, c.start, True)
    return ()


def _expert(tile: TensorInputs, t: int, terms: ExpertTerms) -> tuple:
    weights = tile.experts[t]
    return (
        weights.data,
        weights.dtype.code,
        _curvature(tile.curvatures[t]),
        terms.threshold,
        terms.score_scale,
        terms.weight_scale,
        terms.edit_scale,
        terms.trim,
    )


def _base(tile: TensorInputs) -> tuple:
    return (None, 0) if tile.base is None else (tile.base.data, tile.base.dtype.code)


def _nonfinite(t: int, counts) -> tuple[NonFinite, ...]:
    (base, weights, curvature) = counts
    found = (
        NonFinite("base", -1, *base),
        NonFinite("weights", t, *weights),
        NonFinite("curvature", t, *curvature),
    )
    return tuple(bad for bad in found if bad.count)


def merge(tile: TensorInputs, terms: Terms, out: np.ndarray) -> MergeStats:
    """Merge one tile into `out` (uint8, the tile's elements in its out_dtype). Releases the GIL."""
    f = terms.formula
    kept, unkept, overflow, repaired, base, weights, curvatures = _extension().merge(
        *_base(tile),
        [_expert(tile, t, e) for t, e in enumerate(terms.experts)],
        (
            f.power,
            terms.epsilon,
            f.lambda_,
            f.denominator or 0.0,
            f.curvature_weights,
            f.masked,
            f.mask_weights,
            f.elect_signs,
            f.fallback_to_base,
            f.repair_nonfinite,
        ),
        out,
        tile.out_dtype.code,
        instruction_set(),
    )
    nonfinite = [NonFinite("base", -1, *base)] if base[0] else []
    for t, (bad_weights, bad_curvature) in enumerate(zip(weights, curvatures, strict=True)):
        nonfinite += [NonFinite("weights", t, *bad_weights)] if bad_weights[0] else []
        nonfinite += [NonFinite("curvature", t, *bad_curvature)] if bad_curvature[0] else []
    return MergeStats(tuple(kept), unkept, overflow, repaired, tuple(nonfinite))


def histogram(
    tile: TensorInputs,
    t: int,
    terms: ExpertTerms,
    of_edits: bool,
    prefix: int,
    counts: np.ndarray,
    lows: np.ndarray,
) -> tuple[NonFinite, ...]:
    """Add the counts of expert t's float32 scores by their bits, for an exact k-th largest in two passes.

    The score is the saliency, or with `of_edits` the magnitude |d| where the saliency reaches the threshold
    (0 elsewhere). prefix -1: `counts` (int64[65536]) by the high 16 bits, and `lows` the sum of the low 16
    bits in each bin; prefix p: counts by the low 16 bits of the scores whose high 16 bits are p.
    """
    bad = _extension().histogram(
        *_base(tile), _expert(tile, t, terms), tile.numel, of_edits, prefix, counts, lows, instruction_set()
    )
    return _nonfinite(t, bad)


def edits(tile: TensorInputs, t: int, terms: ExpertTerms) -> tuple[np.ndarray, tuple[NonFinite, ...]]:
    """The masked edits m_t d_t of expert t, float32[n]."""
    out = np.empty(tile.numel, np.float32)
    bad = _extension().edits(*_base(tile), _expert(tile, t, terms), out, instruction_set())
    return out, _nonfinite(t, bad)


def power_sum(tile: TensorInputs, t: int, power: float) -> tuple[float, tuple[NonFinite, ...]]:
    """The sum of h_t^power over the tile, in float64."""
    total, bad = _extension().power_sum(_curvature(tile.curvatures[t]), tile.numel, power, instruction_set())
    return total, _nonfinite(t, ((0, -1), (0, -1), bad))


def scores(tile: TensorInputs, t: int, terms: ExpertTerms) -> tuple[np.ndarray, tuple[NonFinite, ...]]:
    """The scores s_t of expert t, float32[n], 0 where an input is not usable."""
    out = np.empty(tile.numel, np.float32)
    bad = _extension().scores(*_base(tile), _expert(tile, t, terms), out, instruction_set())
    return out, _nonfinite(t, bad)


def row_column_sums(values: Buffer, row_sums: np.ndarray, column_sums: np.ndarray) -> None:
    """Add the sums of a row-major matrix: row_sums float64[rows] is set, column_sums float64[columns] grows.
    Values that are not finite or negative count as 0 (the kernels that use the result report them)."""
    _extension().row_column_sums(values.data, values.dtype.code, row_sums, column_sums, instruction_set())
