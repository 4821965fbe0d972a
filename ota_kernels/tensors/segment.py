"""Cuts tensors into units of work: a piece of one large tensor, or several small tensors together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

# Elements of one piece of work. Fixed, so that float64 sums do not depend on tiles, threads or memory.
CHUNK = 1 << 20

RUN = 16  # elements of a sample that lie side by side: one cache line of float32

Map = Callable[[Callable, Iterable], Iterable]  # as Pool.run


class Segment(NamedTuple):
    """Elements [start, stop) of tensor number `index`."""

    index: int
    start: int
    stop: int


def units(
    sizes: Iterable[tuple[int, int, int]], limit: int, whole: Callable[[int], int] = lambda index: 1
) -> Iterator[list[Segment]]:
    """Units of at most `limit` elements, in order, from (index, start, stop) ranges. Consumes lazily: a range
    is cut only when its first unit is asked for. Empty ranges are kept, so that every tensor is visited.
    whole: of so many elements each piece of a tensor is a multiple, also where that exceeds the limit."""
    batch: list[Segment] = []
    filled = 0
    for index, start, stop in sizes:
        if filled and filled + (stop - start) > limit:
            yield batch
            batch, filled = [], 0
        if stop - start > limit:
            of_each = max(whole(index), 1)
            size = max(limit // of_each, 1) * of_each
            while stop - start > size:
                yield [Segment(index, start, start + size)]
                start += size
        batch.append(Segment(index, start, stop))
        filled += max(stop - start, 1)
    if batch:
        yield batch
