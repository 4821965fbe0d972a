"""A tile that the device has no room for, merged in two halves: the same masks, values and counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from ...tensors.array import Array, joined
from ...tensors.result import Candidates, MergeStats, NonFinite
from ...tensors.terms import Terms
from ...tensors.tile import TensorInputs, concatenated

Merge = Callable[[TensorInputs, Terms, Array], MergeStats]


def merge_in_halves(
    merge: Merge, tile: TensorInputs, terms: Terms, out: Array, columns: int = 1
) -> MergeStats:
    """What `merge` does, by two calls of it. tile: of two rows of so many columns at least; out: uint8."""
    middle = tile.numel // (2 * columns) * columns
    end = middle * tile.out_dtype.itemsize
    first = merge(tile.slice(0, middle), terms, out[:end])
    second = merge(tile.slice(middle, tile.numel), terms, out[end:])
    return joined_stats(first, second, middle)


def joined_stats(first: MergeStats, second: MergeStats, start: int) -> MergeStats:
    """The stats of a tile from those of its parts; start: the tile's element at which the second begins."""
    return MergeStats(
        kept=_sums(first.kept, second.kept),
        reached=_sums(first.reached, second.reached),
        unkept=first.unkept + second.unkept,
        overflow=first.overflow + second.overflow,
        repaired=first.repaired + second.repaired,
        nonfinite=_joined_nonfinite(first.nonfinite, second.nonfinite, start),
        candidates=_joined_candidates(first.candidates, second.candidates, start),
        censuses=tuple(
            None if a is None else a + b for a, b in zip(first.censuses, second.censuses, strict=True)
        ),
    )


def _sums(first: Iterable[int], second: Iterable[int]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(first, second, strict=True))


def _joined_nonfinite(
    first: Iterable[NonFinite], second: Iterable[NonFinite], start: int
) -> tuple[NonFinite, ...]:
    """In the order in which backends list them: the base, then each expert's weights and curvature."""
    found = {(bad.expert, bad.role == "curvature"): bad for bad in first}
    for bad in second:
        key = (bad.expert, bad.role == "curvature")
        before = found.get(key, replace(bad, count=0, first=start + bad.first))
        found[key] = replace(before, count=before.count + bad.count)
    return tuple(found[key] for key in sorted(found))


def _joined_candidates(first: Candidates | None, second: Candidates | None, start: int) -> Candidates | None:
    if first is None or second is None:
        return None
    steps = tuple(joined(pair) for pair in zip(first.steps, second.steps, strict=True))
    positions = joined([first.positions, second.positions + start])
    return Candidates(positions, concatenated([first.operands, second.operands]), steps)
