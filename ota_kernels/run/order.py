"""Exact order statistics of scores, of one tensor or of a whole model, before it merges.

    a small sample --> an interval of scores around each rank --> one read: count above, collect inside

A rank is a place in the total order (score, place of the tensor, flat index): of the k largest scores exactly
k are kept, also where many are equal. What is found is the score there, the tensor, and the element's index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..backends import Backend, native
from ..select.bracket import DEVIATIONS, error_of_sum
from ..select.order_statistics import squared_differences
from ..tensors import array as resident
from ..tensors.found import At, Rank
from ..tensors.result import NonFinite
from ..tensors.segment import CHUNK
from ..tensors.terms import LAST_INDEX, Terms
from ..tensors.tile import TensorInputs
from .statistics import Pieces, Reader


class Interval(NamedTuple):
    """Scores from lowest to highest, both included."""

    lowest: float
    highest: float


EVERYTHING = Interval(-math.inf, math.inf)


class _Piece(NamedTuple):
    """One tile: its tensor, and flat index of its first element; scores that are not 0; for each interval how
    many scores are above, and those inside."""

    name: str
    start: int
    nonzero: int
    above: list[int]
    inside: list[np.ndarray]


@dataclass(frozen=True)
class Collected(Pieces):
    """The scores of expert t around some places of their order."""

    t: int
    intervals: Sequence[Interval]

    def update(self, arrays: list, backend: Backend, tile: TensorInputs, terms: Terms) -> Iterable[NonFinite]:
        found, bad = backend.scores(tile, self.t, terms)
        scores, infinity = resident.host(found), np.float32(math.inf)
        piece = _Piece(tile.name, tile.start, int(np.count_nonzero(scores)), [], [])
        for low, high in self.intervals:
            inside, above = native.between(scores, low, np.nextafter(np.float32(high), infinity))
            piece.inside.append(inside.copy())
            piece.above.append(above)
        arrays.append(piece)
        return bad

    def finish(self, arrays: list) -> list[_Piece]:
        return arrays


Ranks = Callable[[int], list[Rank]]  # the ranks that are wanted, from how many scores are not 0
Ready = Callable[[TensorInputs], tuple[TensorInputs, Terms]]

_WIDER = 8.0  # intervals around ranks that a sample misjudged, before everything is collected


def order_statistics(
    reader: Reader,
    tensors: Sequence[TensorInputs],
    t: int,
    ready: Ready,
    ranks: Ranks,
    sample: np.ndarray | None,
) -> list[Located]:
    """What stands at the ranks of expert t's scores over these tensors, in their order. ready: a tensor as it
    is read, and its terms; sample: float32[clusters, elements] of the scores, None where they are sorted at
    once."""
    n, found = sum(tensor.numel for tensor in tensors), None
    if sample is not None:
        nonzero = round(np.count_nonzero(sample) / sample.size * n)
        ordered = np.sort(sample, axis=None)
        for deviations in (DEVIATIONS, _WIDER * DEVIATIONS):
            if found is None:
                intervals = [_interval(ordered, sample, rank, n, deviations) for rank in ranks(nonzero)]
                found = _read(reader, tensors, t, ready, ranks, intervals)
    if found is None:
        found = _read(reader, tensors, t, ready, ranks, [EVERYTHING])
    by_name = {tensor.name: tensor for tensor in tensors}
    return [_located(reader, by_name[tie.name], t, ready, tie) for tie in found]


def _read(
    reader: Reader,
    tensors: Sequence[TensorInputs],
    t: int,
    ready: Ready,
    ranks: Ranks,
    intervals: list[Interval],
) -> list[_Tie] | None:
    """One read: what stands at the ranks, None where one lies outside of its interval. One interval may
    serve all."""
    pieces = [
        piece for tensor in tensors for piece in reader.of_tensor(Collected(t, intervals), *ready(tensor))
    ]
    wanted, n = ranks(sum(p.nonzero for p in pieces)), sum(tensor.numel for tensor in tensors)
    last = len(intervals) - 1
    found = [_at(pieces, min(i, last), rank, n) for i, rank in enumerate(wanted)]
    return None if None in found else found


def _interval(ordered: np.ndarray, sample: np.ndarray, rank: Rank, n: int, deviations: float) -> Interval:
    """Sampled scores around a rank, as far away as the sample errs (see select/bracket.py)."""
    ascending = rank.place if not rank.descending else n - 1 - rank.place
    m = len(ordered)
    target = (min(max(ascending, 0), n - 1) + 0.5) / n * m
    at = ordered[min(int(target), m - 1)]
    squares = squared_differences(sample, at)
    margin = deviations * float(error_of_sum(squares, len(sample))) + 1 if len(sample) > 1 else m
    low, high = math.floor(target - margin), math.ceil(target + margin)
    return Interval(
        float(ordered[low]) if low >= 0 else -math.inf, float(ordered[high]) if high < m else math.inf
    )


class _Tie(NamedTuple):
    """Of the elements of this score, number `within` of the piece of a tensor that begins at `start`."""

    score: float
    name: str
    start: int
    within: int


def _at(pieces: list[_Piece], k: int, rank: Rank, n: int) -> _Tie | None:
    """The element at a rank, None where it lies outside the k-th interval."""
    inside = np.concatenate([p.inside[k] for p in pieces]) if pieces else np.zeros(0, np.float32)
    above = sum(p.above[k] for p in pieces)
    from_top = rank.place if rank.descending else n - 1 - rank.place
    place = from_top - above
    if not 0 <= place < len(inside):
        return None
    score = np.partition(inside, len(inside) - 1 - place)[len(inside) - 1 - place]
    larger = above + int(np.count_nonzero(inside > score))
    equal = [int(np.count_nonzero(p.inside[k] == score)) for p in pieces]
    tie = from_top - larger if rank.descending else rank.place - (n - larger - sum(equal))
    ends = np.cumsum(equal)
    piece = int(np.searchsorted(ends, tie, side="right"))
    return _Tie(
        float(score), pieces[piece].name, pieces[piece].start, tie - (int(ends[piece - 1]) if piece else 0)
    )


class Located(NamedTuple):
    """An element: its score, its tensor, its flat index there."""

    score: float
    name: str
    index: int

    def seen_from(self, name: str, places: Mapping[str, int]) -> At:
        """As a bound of the elements of a tensor: those of earlier tensors stand before it, those of later
        ones after it."""
        before = places[name] - places[self.name]
        return At(self.score, self.index if before == 0 else LAST_INDEX if before < 0 else -1)


def _located(reader: Reader, tensor: TensorInputs, t: int, ready: Ready, tie: _Tie) -> Located:
    """With the index of the element, from its piece's scores once more."""
    tensor, terms = ready(tensor)
    begin = tie.start - tensor.start
    step = resident.TILE if tensor.is_resident else CHUNK
    tile = tensor.slice(begin, min(begin + step, tensor.numel))
    scores = resident.host(reader.backend.scores(tile, t, terms)[0])
    index = tie.start + int(np.flatnonzero(scores == np.float32(tie.score))[tie.within])
    return Located(tie.score, tie.name, index)
