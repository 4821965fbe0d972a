"""The C++ backend (csrc/): the same formulas as `reference`, at memory speed on a CPU.

Environment: OTA_KERNELS_ISA=base|v3|v4 picks an instruction set narrower than the widest one available.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import BackendError
from ..tensors.buffer import Buffer
from ..tensors.curvature import Curvature
from ..tensors.result import (
    CENSUS,
    COUNTED,
    STEP_BYTES,
    SUMS,
    Alternatives,
    Around,
    Candidates,
    MergeStats,
    NonFinite,
)
from ..tensors.terms import Terms
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


def _nonfinite(t: int, base, weights, curvature) -> tuple[NonFinite, ...]:
    named = ("base", -1, base), ("weights", t, weights), ("curvature", t, curvature)
    return tuple(NonFinite(role, at, bad.count, bad.first) for role, at, bad in named if bad and bad.count)


@dataclass(frozen=True, slots=True)
class Sums:
    """N = sum_t g_t P_t y_t and D = sum_t P_t of a tile's elements, for a merge that goes on later: bytes
    of float32, of float64 where outputs are wider than 16 bits. D has the sign bit where nobody keeps the
    element.

    numerator, denominator: of the experts before this tile's, None of the first; new_...: with its own,
    written; removes: its experts are taken out: their weights are negative.
    """

    new_numerator: np.ndarray
    new_denominator: np.ndarray
    numerator: np.ndarray | None = None
    denominator: np.ndarray | None = None
    removes: bool = False


def merge(tile: TensorInputs, terms: Terms, out: np.ndarray, sums: Sums | None = None) -> MergeStats:
    """Merge one tile into `out` (uint8, the tile's elements in its out_dtype; it overlaps no input). Releases
    the GIL. sums: what the merge goes on with, later.

    Candidates are views of memory that the thread's next merge with brackets uses again.
    """
    censuses = [np.zeros(CENSUS, np.int64) if e.census else None for e in terms.experts]
    room = _room(tile, terms) if any(e.span for e in terms.experts) else None
    found = _extension().merge(tile, terms, out, censuses, room, sums, instruction_set())
    if found.damaged[0] >= 0:
        raise tile.experts[found.damaged[0]].damaged(found.damaged[1])
    nonfinite = _nonfinite(-1, found.base, None, None)
    for t, (weights, curvature) in enumerate(zip(found.weights, found.curvatures, strict=True)):
        nonfinite += _nonfinite(t, None, weights, curvature)
    return MergeStats(
        tuple(found.kept),
        tuple(found.reached),
        found.unkept,
        found.overflow,
        found.repaired,
        nonfinite,
        None if room is None else room.candidates(tile, found),
        tuple(censuses),
    )


@dataclass(frozen=True, slots=True)
class Room:
    """Lists that hold a tile of `numel` elements as candidates, of which only what is used becomes memory;
    uint8 arrays, one for each expert but of positions and base. sizes: bytes of an element of each list."""

    sizes: list[int]
    numel: int
    positions: np.ndarray
    base: np.ndarray
    weights: list[np.ndarray]
    origins: list[np.ndarray]
    curvatures: list[np.ndarray]
    steps: list[np.ndarray]
    alternatives: list[Alternatives]

    @classmethod
    def of(cls, sizes: list[int], tile: TensorInputs) -> Room:
        elements, experts = tile.numel + _extension().SPARE, len(tile.experts)
        lists = iter([np.empty(size * elements, np.uint8) for size in sizes])

        def take(n: int) -> list[np.ndarray]:
            return [next(lists) for _ in range(n)]

        return cls(
            sizes,
            tile.numel,
            *take(2),
            take(experts),
            take(len(tile.origins)),
            take(experts),
            take(experts),
            [Alternatives(*take(3)) for _ in range(experts)],
        )

    def candidates(self, tile: TensorInputs, found) -> Candidates:
        """What a merge has put into the lists."""
        lists = [self.positions, self.base, *self.weights, *self.origins, *self.curvatures]
        sizes = Candidates.columns(tile)
        columns = [a[: found.candidates * size] for a, size in zip(lists, sizes, strict=True)]
        steps = [a[: n * STEP_BYTES] for a, n in zip(self.steps, found.steps, strict=True)]
        alternatives = [
            Alternatives.of([a[: n * size] for a, size in zip(x, Alternatives.columns(tile), strict=True)])
            for x, n in zip(self.alternatives, found.alternatives, strict=True)
        ]
        return Candidates.of(tile, columns, steps, alternatives)


_local = threading.local()


def _room(tile: TensorInputs, terms: Terms) -> Room:
    """Each thread keeps its own: mapping new memory for every tile would cost as much as filling it."""
    sizes = Candidates.columns(tile)
    sizes += [STEP_BYTES if e.span else 0 for e in terms.experts]
    for e in terms.experts:
        sizes += Alternatives.columns(tile) if e.span else [0, 0, 0]
    kept = getattr(_local, "room", None)
    if kept is None or kept.sizes != sizes or kept.numel < tile.numel:
        kept = _local.room = Room.of(sizes, tile)
    return kept


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

    With `of_edits`, |d32| of the edits that are kept stands in place of the score (0 elsewhere). prefix -1:
    `counts` (int64[65536]) by the high 16 bits, and `lows` the sum of the low 16 bits in each bin; prefix p:
    counts by the low 16 bits of the scores whose high 16 bits are p.
    """
    bad = _extension().histogram(tile, t, terms, of_edits, prefix, counts, lows, instruction_set())
    return _nonfinite(t, bad.base, bad.weights, bad.curvature)


def edits(tile: TensorInputs, t: int, terms: Terms) -> tuple[np.ndarray, tuple[NonFinite, ...]]:
    """The masked edits m_t d_t of expert t, float32[n]."""
    out = np.empty(tile.numel, np.float32)
    bad = _extension().edits(tile, t, terms, out, instruction_set())
    return out, _nonfinite(t, bad.base, bad.weights, bad.curvature)


def power_sum(tile: TensorInputs, t: int, power: float) -> tuple[float, tuple[NonFinite, ...]]:
    """The sum of h_t^power over the tile, in float64."""
    total, bad = _extension().power_sum(tile.curvatures[t], tile.numel, power, instruction_set())
    return total, _nonfinite(t, None, None, bad)


def scores(tile: TensorInputs, t: int, terms: Terms) -> tuple[np.ndarray, tuple[NonFinite, ...]]:
    """The scores s_t of expert t, float32[n], 0 where an input is not usable."""
    out = np.empty(tile.numel, np.float32)
    bad = _extension().scores(tile, t, terms, out, instruction_set())
    return out, _nonfinite(t, bad.base, bad.weights, bad.curvature)


def around(
    tile: TensorInputs, t: int, terms: Terms, intervals: Sequence[tuple[float, float]]
) -> tuple[Around, tuple[NonFinite, ...]]:
    """Expert t's scores around places of their order: see Around. intervals: 4 at most."""
    rooms = [np.empty(tile.numel + _extension().SPARE, np.float32) for _ in intervals]
    counts = np.empty((-(-tile.numel // COUNTED), len(intervals), 4), np.int64)
    of = [(*interval, room) for interval, room in zip(intervals, rooms, strict=True)]
    found = _extension().around(tile, t, terms, of, counts.reshape(-1), instruction_set())
    nonzero, inside, bad = found
    some = [room[:n].copy() for room, n in zip(rooms, inside, strict=True)]
    return Around(nonzero, counts, some), _nonfinite(t, bad.base, bad.weights, bad.curvature)


def gram(tile: TensorInputs, by: str = "tensor") -> np.ndarray:
    """Products of edits (of weights, without a base), sum_i d_s d_t in float64: [T, T], or [groups, T, T]
    by "row" or "column" of a tile of whole rows."""
    experts = len(tile.experts)
    columns = max(tile.shape[-1] if tile.shape else 1, 1)
    groups = {"tensor": 1, "row": tile.numel // columns, "column": columns}[by]
    out = np.empty(groups * experts * experts, np.float64)
    _extension().gram(tile, ("tensor", "row", "column").index(by), out, instruction_set())
    return out.reshape((experts, experts) if by == "tensor" else (groups, experts, experts))


def masked_sums(tile: TensorInputs, terms: Terms) -> np.ndarray:
    """Sums over edits and masks, float64[T, 6]; columns as SUMS (tensors/result.py) names them."""
    found = _extension().masked_sums(tile, terms, instruction_set())
    return np.array([[getattr(sums, name) for name in SUMS] for sums in found], np.float64)


def row_divergence(tile: TensorInputs, t: int) -> np.ndarray:
    """KL(p | q) of each row, float64[rows]: p = softmax(w_t) + 1e-8, q = softmax(w_0) + 1e-8. Whole rows."""
    out = np.empty(tile.numel // max(tile.shape[-1] if tile.shape else 1, 1), np.float64)
    _extension().row_divergence(tile, t, out, instruction_set())
    return out


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
    place = None if fd_of is None else lambda buffer: (fd_of(buffer), buffer.offset)
    isa = instruction_set()
    return _extension().run_scores(tensor, terms, experts, starts, length, list(outs), place, together, isa)


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
    _extension().row_column_sums(matrix, row_sums, column_sums, instruction_set())
