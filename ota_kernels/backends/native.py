"""The C++ backend (csrc/): the same formulas as `reference`, at memory speed on a CPU.

Environment: OTA_KERNELS_ISA=base|v3|v4 picks an instruction set narrower than the widest one available.
"""

from __future__ import annotations

import functools
import os
import threading

import numpy as np

from ..errors import BackendError, InputError
from ..formula import ExpertTerms, Terms
from ..tensors import Buffer, Curvature, Full, Log8, LowRank, Rank1, TensorInputs
from .stats import CENSUS, STEP_BYTES, Candidates, MergeStats, NonFinite

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


def release() -> None:
    """Give up memory that is kept for the next tiles: a thread's, which goes with the thread."""


def _curvature(c: Curvature) -> tuple:
    if isinstance(c, Full):
        return (c.values.data, c.values.dtype.code)
    if isinstance(c, Log8):
        return (c.codes.data, c.scales, c.columns, c.start)
    if isinstance(c, Rank1):
        return (c.rows, c.columns, c.columns.size, 1, c.start, False)
    if isinstance(c, LowRank):
        rank, n_columns = c.right.shape
        return (c.left.reshape(-1), c.right.reshape(-1), n_columns, rank, c.start, True)
    return ()


def _expert(tile: TensorInputs, t: int, terms: ExpertTerms, census: np.ndarray | None = None) -> tuple:
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
        terms.span,
        census,
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
    """Merge one tile into `out` (uint8, the tile's elements in its out_dtype; it overlaps no input). Releases
    the GIL.

    Candidates are views of memory that the thread's next merge with brackets uses again.
    """
    f = terms.formula
    censuses = tuple(np.zeros(CENSUS, np.int64) if e.census else None for e in terms.experts)
    room = _candidate_room(tile, terms) if any(e.span for e in terms.experts) else None
    found = _extension().merge(
        *_base(tile),
        [
            _expert(tile, t, e, census)
            for t, (e, census) in enumerate(zip(terms.experts, censuses, strict=True))
        ],
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
        None if room is None else (*room[:2], *_thirds(room[2:])),
        instruction_set(),
    )
    kept, reached, unkept, overflow, repaired, base, weights, curvatures, undecided, n_steps = found
    nonfinite = [NonFinite("base", -1, *base)] if base[0] else []
    for t, (bad_weights, bad_curvature) in enumerate(zip(weights, curvatures, strict=True)):
        nonfinite += [NonFinite("weights", t, *bad_weights)] if bad_weights[0] else []
        nonfinite += [NonFinite("curvature", t, *bad_curvature)] if bad_curvature[0] else []
    candidates = None
    if room is not None:
        sizes = Candidates.columns(tile)
        columns = [column[: undecided * size] for column, size in zip(room[: len(sizes)], sizes, strict=True)]
        steps = [listed[: STEP_BYTES * n] for listed, n in zip(room[len(sizes) :], n_steps, strict=True)]
        candidates = Candidates.of(tile, columns, steps)
    return MergeStats(
        tuple(kept), tuple(reached), unkept, overflow, repaired, tuple(nonfinite), candidates, censuses
    )


_local = threading.local()


def _thirds(room: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Weights, curvatures and steps, per expert."""
    n = len(room) // 3
    return [room[:n], room[n : 2 * n], room[2 * n :]]


def _candidate_room(tile: TensorInputs, terms: Terms) -> list[np.ndarray]:
    """Columns of candidates, then steps of each expert, that would hold the whole tile, of which only what is
    used becomes memory. Each thread keeps its own: mapping new ones for every tile would cost as much as
    filling them."""
    sizes = [*Candidates.columns(tile), *(STEP_BYTES if e.span else 0 for e in terms.experts)]
    kept = getattr(_local, "room", None)
    if kept is None or kept[0] != sizes or kept[1] < tile.numel:
        kept = _local.room = sizes, tile.numel, [np.empty(n * tile.numel, np.uint8) for n in sizes]
    return kept[2]


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


def gather_runs(buffer: Buffer, starts: np.ndarray, length: int) -> Buffer:
    """Runs of `length` neighbouring elements that begin at `starts` (int64[m]), one after the other."""
    size = buffer.dtype.itemsize
    out = np.empty(len(starts) * length * size, np.uint8)
    _extension().copy_runs(buffer.data, starts * size, out, length * size)
    return Buffer(out, buffer.dtype, buffer.origin)


def read_runs(buffer: Buffer, starts: np.ndarray, length: int, together: int) -> Buffer:
    """The same from the buffer's file, without mapping its pages: `together` runs with one read. Raises
    InputError where the file was cut."""
    size = buffer.dtype.itemsize
    out = np.empty(len(starts) * length * size, np.uint8)
    try:
        with open(buffer.origin, "rb", buffering=0) as file:
            places = buffer.offset + starts * size
            if _extension().read_runs(file.fileno(), places, out, length * size, together):
                return Buffer(out, buffer.dtype, buffer.origin)
    except OSError as error:
        raise InputError(f"{buffer.origin}: cannot be read: {error.strerror}") from error
    raise InputError(f"{buffer.origin}: changed while in use: it is shorter than before")


def row_column_sums(matrix: Curvature, row_sums: np.ndarray, column_sums: np.ndarray) -> None:
    """Add the sums of whole rows of curvature: row_sums float64[rows] is set, column_sums float64[columns]
    grows. Values that are not finite or negative count as 0 (the kernels that use the result report them)."""
    _extension().row_column_sums(_curvature(matrix), row_sums, column_sums, instruction_set())
