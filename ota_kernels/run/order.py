"""Exact order statistics of scores, of one tensor or of a whole model, before it merges.

    a small sample --> an interval of scores around each rank --> one read: count by pieces, collect inside

A rank is a place in the total order (score, place of the tensor, flat index): of the k largest scores exactly
k are kept, also where many are equal. What is found is the score there, the tensor, and the element's index.
Of few distinct scores (edits in bfloat16) most that matter equal an end of the interval: only counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..backends import Backend
from ..select.bracket import DEVIATIONS, error_of_sum
from ..select.order_statistics import Ranks as Sampled
from ..select.order_statistics import squared_differences
from ..tensors import array as resident
from ..tensors.found import At, Rank
from ..tensors.result import COUNTED, Around, NonFinite
from ..tensors.terms import LAST_INDEX, Terms
from ..tensors.tile import TensorInputs
from .statistics import Pieces, Reader


class Interval(NamedTuple):
    """Scores from lowest to highest, both included."""

    lowest: float
    highest: float


EVERYTHING = Interval(-math.inf, math.inf)


class _Piece(NamedTuple):
    """One tile: its tensor, flat index of its first element, and its scores, by expert."""

    name: str
    start: int
    of: dict[int, Around]


@dataclass(frozen=True)
class Collected(Pieces):
    """The scores of experts around some places of their order: of each its intervals."""

    intervals: Mapping[int, Sequence[Interval]]

    def update(self, arrays: list, backend: Backend, tile: TensorInputs, terms: Terms) -> Iterable[NonFinite]:
        found: list[NonFinite] = []
        of = {}
        for t, intervals in self.intervals.items():
            of[t], bad = backend.around(tile, t, terms, intervals)
            found += bad
        arrays.append(_Piece(tile.name, tile.start, of))
        return found

    def finish(self, arrays: list) -> list[_Piece]:
        return arrays


Ranks = Callable[[int], list[Rank]]  # the ranks that are wanted, from how many scores are not 0
Ready = Callable[[TensorInputs], tuple[TensorInputs, Terms]]

_WIDER = 8.0  # intervals around ranks that a sample misjudged, before everything is collected


def order_statistics(
    reader: Reader,
    tensors: Sequence[TensorInputs],
    ready: Ready,
    wanted: Mapping[int, Ranks],
    samples: Mapping[int, np.ndarray],
) -> dict[int, list[Located]]:
    """What stands at the ranks of experts' scores over these tensors, by expert in the order of its ranks.
    ready: a tensor as it is read, and its terms; samples: float32[clusters, elements] of an expert's scores,
    none where they are sorted at once."""
    n = sum(tensor.numel for tensor in tensors)

    def tries(t: int) -> Iterable[list[Interval]]:
        if t in samples:
            sample = samples[t]
            ranks = wanted[t](round(np.count_nonzero(sample) / sample.size * n))
            for deviations in (DEVIATIONS, _WIDER * DEVIATIONS):
                yield [_interval(sample, rank, n, deviations) for rank in ranks]
        yield [EVERYTHING]

    left = {t: iter(tries(t)) for t in wanted}
    # All experts in one read of what they share; those whose sample misjudged, one by one.
    found = _read(reader, tensors, ready, wanted, {t: next(each) for t, each in left.items()})
    for t, each in left.items():
        while found[t] is None:
            found |= _read(reader, tensors, ready, wanted, {t: next(each)})
    by_name = {tensor.name: tensor for tensor in tensors}
    return {
        t: [_located(reader, by_name[tie.name], t, ready, tie) for tie in ties] for t, ties in found.items()
    }


def _read(
    reader: Reader,
    tensors: Sequence[TensorInputs],
    ready: Ready,
    wanted: Mapping[int, Ranks],
    intervals: Mapping[int, list[Interval]],
) -> dict[int, list[_Tie] | None]:
    """One read: what stands at the ranks of each expert that has intervals, None where one lies outside of
    its interval. One interval may serve all ranks."""
    pieces = [piece for tensor in tensors for piece in reader.of_tensor(Collected(intervals), *ready(tensor))]
    n, found = sum(tensor.numel for tensor in tensors), {}
    for t, own in intervals.items():
        ranks, last = wanted[t](sum(p.of[t].nonzero for p in pieces)), len(own) - 1
        ties = [_at(pieces, t, min(i, last), own[min(i, last)], rank, n) for i, rank in enumerate(ranks)]
        found[t] = None if None in ties else ties
    return found


def _interval(sample: np.ndarray, rank: Rank, n: int, deviations: float) -> Interval:
    """Sampled scores around a rank, as far away as the sample errs (see select/bracket.py)."""
    from_top = n - 1 - rank.place if not rank.descending else rank.place
    m = sample.size
    target = (min(max(from_top, 0), n - 1) + 0.5) / n * m
    sampled = Sampled(sample, target)
    at = sampled.at(np.int64(min(int(target), m - 1)))
    squares = squared_differences(sample, at)
    margin = deviations * float(error_of_sum(squares, len(sample))) + 1 if len(sample) > 1 else m
    high, low = math.floor(target - margin), math.ceil(target + margin)
    return Interval(
        float(sampled.at(np.int64(low))) if low < m else -math.inf,
        float(sampled.at(np.int64(high))) if high >= 0 else math.inf,
    )


class _Tie(NamedTuple):
    """Of the elements of this score, number `within` of the COUNTED elements of a tensor that begin at
    `start`."""

    score: float
    name: str
    start: int
    within: int


def _at(pieces: list[_Piece], t: int, k: int, interval: Interval, rank: Rank, n: int) -> _Tie | None:
    """The element at a rank, None where it lies outside of the k-th interval."""
    if not pieces:
        return None
    counts = np.concatenate([p.of[t].counts[:, k] for p in pieces])
    above, highest, between, lowest = counts.sum(axis=0).tolist()
    from_top = rank.place if rank.descending else n - 1 - rank.place
    place = from_top - above
    if not 0 <= place < highest + between + lowest:
        return None
    if place < highest:
        score, larger, equal = interval.highest, above, counts[:, 1]
    elif place >= highest + between:
        score, larger, equal = interval.lowest, above + highest + between, counts[:, 3]
    else:
        inside = np.concatenate([p.of[t].inside[k] for p in pieces])
        at = between - 1 - (place - highest)
        score = float(np.partition(inside, at)[at])
        larger = above + highest + int(np.count_nonzero(inside > score))
        before = np.concatenate(([0], np.cumsum(inside == score)))
        equal = np.diff(before[np.concatenate(([0], np.cumsum(counts[:, 2])))])
    ends = np.cumsum(equal)
    tie = from_top - larger if rank.descending else rank.place - (n - larger - int(ends[-1]))
    number = int(np.searchsorted(ends, tie, side="right"))
    within = tie - (int(ends[number - 1]) if number else 0)
    for piece in pieces:
        if number < len(piece.of[t].counts):
            return _Tie(score, piece.name, piece.start + number * COUNTED, within)
        number -= len(piece.of[t].counts)
    raise AssertionError("a rank of the interval is an element of a piece")


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
    """With the index of the element, from the scores of its elements once more."""
    tensor, terms = ready(tensor)
    begin = tie.start - tensor.start
    tile = tensor.slice(begin, min(begin + COUNTED, tensor.numel))
    scores = resident.host(reader.backend.scores(tile, t, terms)[0])
    index = tie.start + int(np.flatnonzero(scores == np.float32(tie.score))[tie.within])
    return Located(tie.score, tie.name, index)
