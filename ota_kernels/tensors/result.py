"""What a merged tile reports, the same for every backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from . import array as resident
from .array import Array
from .buffer import Buffer
from .curvature import Curvature, Full, Uniform
from .dtypes import BY_NAME
from .tile import TensorInputs


@dataclass(frozen=True, slots=True)
class NonFinite:
    """Elements of one input that cannot be used. role: "base", "weights" or "curvature"; expert: its index,
    -1 for the base; first: index of the first one within the tile."""

    role: str
    expert: int
    count: int
    first: int


# A census of one expert's scores outside its bracket, int64[CENSUS]: sums of significands by exponent, of the
# scores up to the end of the bracket and of those above it; last, how many are above. The sums may stand at
# other exponents, as long as all together are the same.
EXPONENTS = 256
CENSUS = 2 * EXPONENTS + 1

# Columns of `masked_sums`: edits kept; sums of |d|, of |m d|, of (m d)^2; kept by others too, by no other.
SUMS = ("kept", "l1", "kept_l1", "kept_squares", "shared", "unique")


class Around(NamedTuple):
    """One expert's scores of a tile around places of their order: of intervals from lowest to highest.

    nonzero: scores that are not 0; counts: int64[pieces of COUNTED elements, intervals, 4]: scores above the
    highest, equal to it, between the two, equal to the lowest where that is another; inside: by interval
    those between, float32, in their order.
    """

    nonzero: int
    counts: np.ndarray
    inside: list[np.ndarray]

    @classmethod
    def of(cls, scores: np.ndarray, intervals: Sequence[tuple[float, float]]) -> Around:
        """From scores, float32[n]."""
        pieces, inside = np.arange(0, len(scores), COUNTED), []
        counts = np.zeros((len(pieces), len(intervals), 4), np.int64)
        for k, (lowest, highest) in enumerate(np.array(intervals, np.float32).reshape(-1, 2)):
            between = (lowest < scores) & (scores < highest)
            lowest_alone = (scores == lowest) & (lowest < highest)
            for i, these in enumerate((scores > highest, scores == highest, between, lowest_alone)):
                counts[:, k, i] = np.add.reduceat(these, pieces, dtype=np.int64) if len(pieces) else 0
            inside.append(scores[between])
        return cls(int(np.count_nonzero(scores)), counts, inside)


COUNTED = 4096  # elements that are counted together
STEP_BYTES = 4  # of one score that is listed
_INDEX, _CURVATURE = 4, BY_NAME["float32"]


class Alternatives(NamedTuple):
    """Elements of a tile that one expert's bracket alone leaves undecided, merged as if the expert kept them.

    positions: uint32[m], ascending but for the highest bit, which is set where no other expert keeps the
    element; steps: as in Candidates; merged: uint8, the m values of the output where the expert does not keep
    them.
    """

    positions: np.ndarray
    steps: np.ndarray
    merged: np.ndarray

    @staticmethod
    def columns(tile: TensorInputs) -> list[int]:
        """Bytes of one element: position, step, value."""
        return [_INDEX, STEP_BYTES, tile.out_dtype.itemsize]

    @classmethod
    def of(cls, columns: Sequence[np.ndarray]) -> Alternatives:
        """From uint8 columns."""
        positions, steps, merged = columns
        return cls(positions.view(np.uint32), steps.view(np.uint32), merged)


def dropped(
    alternatives: Sequence[Alternatives],
    steps: Sequence[int],
    size: int,
    positions: np.ndarray,
    merged: np.ndarray,
) -> list[tuple[int, int]]:
    """Put elements whose scores lie fewer than `steps` (per expert) above the lowest, one after the other,
    into positions (uint32) and merged (uint8, `size` bytes each: values without the expert), which have room
    for all alternatives. Returns per expert how many, and how many of them no expert keeps."""
    from .. import _native

    lists = [(*columns, step) for columns, step in zip(alternatives, steps, strict=True)]
    return _native.below(lists, size, positions, merged)


class Candidates(NamedTuple):
    """Elements of a tile that some expert's bracket leaves undecided.

    positions: uint32[m], ascending; operands: their inputs, m elements each, curvature as float32; steps: per
    expert, of each score in its bracket, how many float32 numbers it lies above the lowest one (uint32, empty
    for experts without a bracket). Of a resident tile, all are on its device: torch's int32 for uint32.
    alternatives: per expert, elements that are listed there instead; empty where a backend tells none apart.
    """

    positions: Array
    operands: TensorInputs
    steps: tuple[Array, ...]
    alternatives: tuple[Alternatives, ...] = ()

    @classmethod
    def none(cls, tile: TensorInputs) -> Candidates:
        """A tile without candidates."""
        nothing = tile.slice(0, 0)
        empty = resident.elements(resident.empty(0, nothing.experts[0].data), _INDEX)
        return cls(empty, nothing, (empty,) * len(tile.experts))

    @staticmethod
    def columns(tile: TensorInputs) -> list[int]:
        """Bytes of one candidate of `tile`: index, base, each expert's weights, origins if some has one, each
        expert's curvature (0: none)."""
        weights = [0 if b is None else b.dtype.itemsize for b in (tile.base, *tile.experts, *tile.origins)]
        return [
            _INDEX,
            *weights,
            *(0 if isinstance(c, Uniform) else _CURVATURE.itemsize for c in tile.curvatures),
        ]

    @classmethod
    def of(
        cls,
        tile: TensorInputs,
        columns: Sequence[Array],
        steps: Sequence[Array],
        alternatives: Sequence[Alternatives] = (),
    ) -> Candidates:
        """Candidates of `tile` (or of its tensor) from their columns and steps, uint8 each."""
        positions, base, *rest = columns
        n = len(tile.experts)
        experts, origins, curvatures = rest[:n], rest[n:-n], rest[-n:]
        index = resident.elements(positions, _INDEX)
        places = resident.int64(index)

        def like(buffer: Buffer, column: Array) -> Buffer:
            return Buffer(column, buffer.dtype, buffer.origin)

        def curvature(given: Curvature, column: Array) -> Curvature:
            if isinstance(given, Uniform):
                return given
            return Full(Buffer(column, _CURVATURE, given.origin), given.bias_correction)

        operands = replace(
            tile,
            base=None if tile.base is None else like(tile.base, base),
            experts=tuple(map(like, tile.experts, experts)),
            curvatures=tuple(map(curvature, tile.curvatures, curvatures)),
            origins=tuple(
                None if o is None else like(o, x) for o, x in zip(tile.origins, origins, strict=True)
            ),
            index=places + tile.start if tile.index is None else tile.index[places],
        )
        listed = tuple(resident.elements(s, STEP_BYTES) for s in steps)
        return cls(index, operands, listed, tuple(alternatives))


@dataclass(frozen=True, slots=True)
class MergeStats:
    """kept: elements each expert keeps; reached: elements whose score reaches the threshold, or the lowest
    score of the bracket; unkept: kept by nobody; overflow: results beyond the output type's range; repaired:
    set to the base value because an input was not finite. Undecided elements count nowhere but in `reached`
    and as not finite; alternatives count for the experts that are decided. candidates: None where every
    threshold is known; censuses: per expert, None where not asked for; thresholds: per expert, of those that
    were `wanted`, None where it was not found."""

    kept: tuple[int, ...]
    reached: tuple[int, ...]
    unkept: int
    overflow: int
    repaired: int
    nonfinite: tuple[NonFinite, ...]
    candidates: Candidates | None = None
    censuses: tuple[np.ndarray | None, ...] = ()
    thresholds: tuple[float | None, ...] = ()


@dataclass
class Counts:
    """What a merge counted for one tensor or a part of it: per expert the kept edits and the saliency
    threshold (None where everything is kept). repeats: how often a tensor of one tile was merged again
    because a threshold lay outside its bracket; members: of a bundle (run/bundles.py), for each tensor in it
    the elements that nobody keeps and each expert's kept ones."""

    kept: list[int]
    unkept: int = 0
    overflow: int = 0
    repaired: int = 0
    thresholds: list[float | None] = field(default_factory=list)
    repeats: int = 0
    members: list[list[int]] | None = None

    @classmethod
    def of(cls, stats: MergeStats, thresholds: list[float | None]) -> Counts:
        return cls(list(stats.kept), stats.unkept, stats.overflow, stats.repaired, thresholds)

    def add(self, other: Counts, times: int = 1) -> None:
        """Count another part of the same tensor (times -1: no longer)."""
        self.kept = [a + times * b for a, b in zip(self.kept, other.kept, strict=True)]
        self.unkept += times * other.unkept
        self.overflow += times * other.overflow
        self.repaired += times * other.repaired
        self.repeats += times * other.repeats
        self.thresholds = other.thresholds
        if self.members is not None and other.members is not None:
            pairs = zip(self.members, other.members, strict=True)
            self.members = [[a + times * b for a, b in zip(*pair, strict=True)] for pair in pairs]
