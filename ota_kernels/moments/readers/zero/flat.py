"""Where DeepSpeed ZeRO keeps each parameter: the arithmetic of flat partitions, on sizes alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements [start, start + numel) of a parameter: [offset, offset + numel) of `rank`'s partition."""

    rank: int
    offset: int
    start: int
    numel: int


def concatenated(
    numels: Mapping[str, int], gaps: Sequence[int], partitions: Sequence[int]
) -> dict[str, list[Fragment]]:
    """Fragments by name for ZeRO-1 and 2, which put the parameters of a group in a row and cut the row.

    numels: elements of each parameter, in the order of the row; gaps: padding after each; partitions: sizes
    of the ranks' partitions, which together hold the row, with any padding behind it.
    """
    bounds = [0, *accumulate(partitions)]
    fragments: dict[str, list[Fragment]] = {}
    begin = 0
    for (name, numel), gap in zip(numels.items(), gaps, strict=True):
        fragments[name] = _cut(begin, begin + numel, bounds)
        begin += numel + gap
    return fragments


def spread(numels: Mapping[str, int], ranks: int) -> dict[str, list[Fragment]]:
    """Fragments by name for ZeRO-3, which cuts every parameter of a group into one share per rank.

    A rank's partition is its shares in a row; the last shares are padded to the size of the first.
    """
    fragments: dict[str, list[Fragment]] = {}
    offset = 0
    for name, numel in numels.items():
        share = share_size(numel, ranks)
        fragments[name] = [
            Fragment(rank, offset, rank * share, min(share, numel - rank * share))
            for rank in range(ranks)
            if rank * share < numel
        ]
        offset += share
    return fragments


def share_size(numel: int, ranks: int) -> int:
    """Elements, padding included, that each rank keeps of a parameter under ZeRO-3."""
    return -(-numel // ranks)


def _cut(begin: int, end: int, bounds: Sequence[int]) -> list[Fragment]:
    """[begin, end) of the row, cut at the partitions' bounds."""
    fragments = []
    position = begin
    while position < end:
        rank = bisect_right(bounds, position) - 1
        stop = min(end, bounds[rank + 1])
        fragments.append(Fragment(rank, position - bounds[rank], position - begin, stop - position))
        position = stop
    return fragments
