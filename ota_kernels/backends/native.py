"""The C++ backend (csrc/): the same formulas as `reference`, at memory speed on a CPU.

Environment: OTA_KERNELS_ISA=base|v3|v4 picks an instruction set narrower than the widest one available.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence

import numpy as np

from ..errors import BackendError
from ..tensors.buffer import Buffer
from ..tensors.curvature import Curvature, Full, Log8, LowRank, Rank1
from ..tensors.result import CENSUS, STEP_BYTES, Alternatives, Candidates, MergeStats, NonFinite
from ..tensors.terms import ExpertTerms, Terms
from ..tensors.tile import TensorInputs

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


def _formula(terms: Terms) -> tuple:
    words = terms.words
    fixed = words.divide == "number"
    return (
        terms.power,
        terms.epsilon,
        terms.lambda_,
        terms.denominator if fixed else 0.0,
        words.weigh == "curvature",
        words.select != "all",
        words.divide != "weights",
        words.elect == "sum",
        terms.fallback == "base",
        terms.repair,
    )


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
    censuses = tuple(np.zeros(CENSUS, np.int64) if e.census else None for e in terms.experts)
    room = _candidate_room(tile, terms) if any(e.span for e in terms.experts) else None
    found = _extension().merge(
        *_base(tile),
        [
            _expert(tile, t, e, census)
            for t, (e, census) in enumerate(zip(terms.experts, censuses, strict=True))
        ],
        _formula(terms),
        out,
        tile.out_dtype.code,
        None if room is None else (*room[:2], *_per_expert(room[2:], len(tile.experts))),
        instruction_set(),
    )
    kept, reached, unkept, overflow, repaired, base, weights, curvatures, *undecided = found
    nonfinite = [NonFinite("base", -1, *base)] if base[0] else []
    for t, (bad_weights, bad_curvature) in enumerate(zip(weights, curvatures, strict=True)):
        nonfinite += [NonFinite("weights", t, *bad_weights)] if bad_weights[0] else []
        nonfinite += [NonFinite("curvature", t, *bad_curvature)] if bad_curvature[0] else []
    candidates = None if room is None else _candidates(tile, room, *undecided)
    return MergeStats(
        tuple(kept), tuple(reached), unkept, overflow, repaired, tuple(nonfinite), candidates, censuses
    )


_local = threading.local()


def _per_expert(room: list[np.ndarray], experts: int) -> list[list[np.ndarray]]:
    """Weights, curvatures, steps, and three columns of alternatives."""
    return [room[i : i + experts] for i in range(0, len(room), experts)]


def _candidate_room(tile: TensorInputs, terms: Terms) -> list[np.ndarray]:
    """Columns of candidates, steps and alternatives of each expert, that would hold the whole tile, of which
    only what is used becomes memory. Each thread keeps its own: mapping new ones for every tile would cost as
    much as filling them."""
    sizes = Candidates.columns(tile)
    for size in (STEP_BYTES, *Alternatives.columns(tile)):
        sizes += [size if e.span else 0 for e in terms.experts]
    kept = getattr(_local, "room", None)
    if kept is None or kept[0] != sizes or kept[1] < tile.numel:
        elements = tile.numel + _extension().SPARE
        kept = _local.room = sizes, tile.numel, [np.empty(size * elements, np.uint8) for size in sizes]
    return kept[2]


def _candidates(
    tile: TensorInputs, room: list[np.ndarray], count: int, n_steps: list[int], n_alternatives: list[int]
) -> Candidates:
    """What a merge has put into the room."""
    columns, experts = Candidates.columns(tile), len(tile.experts)
    lengths = [count * size for size in columns] + [STEP_BYTES * n for n in n_steps]
    for size in Alternatives.columns(tile):
        lengths += [size * n for n in n_alternatives]
    used = [column[:length] for column, length in zip(room, lengths, strict=True)]
    steps, *alternatives = _per_expert(used[len(columns) :], experts)
    return Candidates.of(
        tile, used[: len(columns)], steps, map(Alternatives.of, zip(*alternatives, strict=True))
    )


def histogram(
    tile: TensorInputs,
    t: int,
    terms: Terms,
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
        *_base(tile),
        _expert(tile, t, terms.experts[t]),
        tile.numel,
        of_edits,
        prefix,
        counts,
        lows,
        instruction_set(),
    )
    return _nonfinite(t, bad)


def edits(tile: TensorInputs, t: int, terms: Terms) -> tuple[np.ndarray, tuple[NonFinite, ...]]:
    """The masked edits m_t d_t of expert t, float32[n]."""
    out = np.empty(tile.numel, np.float32)
    bad = _extension().edits(*_base(tile), _expert(tile, t, terms.experts[t]), out, instruction_set())
    return out, _nonfinite(t, bad)


def power_sum(tile: TensorInputs, t: int, power: float) -> tuple[float, tuple[NonFinite, ...]]:
    """The sum of h_t^power over the tile, in float64."""
    total, bad = _extension().power_sum(_curvature(tile.curvatures[t]), tile.numel, power, instruction_set())
    return total, _nonfinite(t, ((0, -1), (0, -1), bad))


def scores(tile: TensorInputs, t: int, terms: Terms) -> tuple[np.ndarray, tuple[NonFinite, ...]]:
    """The scores s_t of expert t, float32[n], 0 where an input is not usable."""
    out = np.empty(tile.numel, np.float32)
    bad = _extension().scores(*_base(tile), _expert(tile, t, terms.experts[t]), out, instruction_set())
    return out, _nonfinite(t, bad)


def run_scores(
    tensor: TensorInputs,
    terms: Terms,
    experts: Sequence[int],
    starts: np.ndarray,
    length: int,
    outs: Sequence[np.ndarray],
    fd_of: Callable[[Buffer], int] | None = None,
    together: int = 1,
) -> Buffer | None:
    """The scores of `experts` (numbers) at runs of `length` neighbouring elements that begin at `starts`
    (int64[m]) into outs, float32[m * length] each; 0 where an input is not usable.

    fd_of: the open file of a buffer, whose pages are then not mapped, -1 for what is in memory; `together`
    runs, of 1024 elements at most, are read at once. Returns None, or a buffer whose file could not be read.
    """
    specs = [_expert(tensor, t, terms.experts[t]) for t in experts]
    inputs = [tensor.base]
    for t in experts:
        inputs += [tensor.experts[t], next(iter(tensor.curvatures[t].buffers), None)]
    places = None
    if fd_of is not None:
        places = [(-1, 0) if b is None else (fd_of(b), b.offset) for b in inputs]
    numel, isa = tensor.numel, instruction_set()
    which = _extension().run_scores(*_base(tensor), specs, numel, starts, length, outs, places, together, isa)
    return None if which < 0 else inputs[which]


def between(values: np.ndarray, low: float, high: float) -> tuple[np.ndarray, int]:
    """(Those of values[n], float32, from low to below high, in their order; how many are at least high)."""
    room = np.empty(len(values) + _extension().SPARE, np.float32)
    inside, above = _extension().between(values, low, high, room, instruction_set())
    return room[:inside], above


def squared_differences(values: np.ndarray, least: float) -> int:
    """How many of each row of values (float32[rows, n]) are at least `least`: the sum over pairs of
    neighbouring rows of the squared difference. An odd last row is left out."""
    return _extension().squared_differences(values.reshape(-1), len(values), least, instruction_set())


def gather_runs(buffer: Buffer, starts: np.ndarray, length: int) -> Buffer:
    """Runs of `length` neighbouring elements that begin at `starts` (int64[m]), one after the other."""
    size = buffer.dtype.itemsize
    out = np.empty(len(starts) * length * size, np.uint8)
    _extension().copy_runs(buffer.data, starts * size, out, length * size)
    return Buffer(out, buffer.dtype, buffer.origin)


def ask_for_runs(buffer: Buffer, starts: np.ndarray, length: int, fd: int, together: int) -> None:
    """Have what `run_scores` would read of a file come from the disk, without waiting for it."""
    size = buffer.dtype.itemsize
    _extension().ask_for_runs(fd, buffer.offset + starts * size, length * size, together)


def is_in_memory(fd: int) -> bool:
    """Whether an open file has no disk to be read from: it lies in tmpfs, as those of /dev/shm do."""
    return _extension().is_in_memory(fd)


def row_column_sums(matrix: Curvature, row_sums: np.ndarray, column_sums: np.ndarray) -> None:
    """Add the sums of whole rows of curvature: row_sums float64[rows] is set, column_sums float64[columns]
    grows. Values that are not finite or negative count as 0 (the kernels that use the result report them)."""
    _extension().row_column_sums(_curvature(matrix), row_sums, column_sums, instruction_set())
