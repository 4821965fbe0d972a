"""Tiles whose masks wait for the same thresholds: decide exactly from counts and candidates, then settle.

tile merged with brackets --> Part: its counts, the scores in brackets, its undecided elements (candidates)
all parts --> thresholds: the (k - scores above the bracket)-th largest score in the bracket, if it is there
each part --> alternatives below the thresholds, other candidates merged again: patched into the output
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from ..run.counts import Tally
from ..run.factors import Map
from ..tensors import array as resident
from ..tensors.array import BINS, Array
from ..tensors.result import Candidates, MergeStats, dropped
from ..tensors.segment import Segment
from ..tensors.terms import ExpertTerms, Terms, is_open, score_bits, score_of_bits
from ..tensors.tile import TensorInputs
from . import thresholds as decide
from .pending import Held, Store

_FEW = 1 << 22  # scores in a bracket that a thread holds in memory; a device holds as many as there are
_BATCH = 1 << 20  # scores that are counted at once


@dataclass
class Part:
    """One merged tile of a group. tally: of what is decided; reached, censuses: per expert, as in MergeStats;
    held: its candidates."""

    segment: Segment
    tensor: TensorInputs
    terms: Terms
    tally: Tally
    reached: list[int]
    censuses: list[list[int] | None]
    held: Held

    @classmethod
    def of(
        cls, segment: Segment, tensor: TensorInputs, terms: Terms, stats: MergeStats, tally: Tally
    ) -> Part:
        """What `stats` says of a tile merged with brackets."""
        censuses = [None if c is None else c.tolist() for c in stats.censuses]
        candidates = stats.candidates or Candidates.none(tensor)
        return cls(segment, tensor, terms, tally, list(stats.reached), censuses, Held.of(candidates))


class Group:
    """The parts of one tensor, or of the whole model.

    selections: per expert; elements: how many the selections are over; store: holds the candidates.
    """

    def __init__(
        self, selections: Sequence[decide.Selection], elements: int, backend: ModuleType, store: Store
    ) -> None:
        self.parts: list[Part] = []
        self._selections, self._elements = selections, elements
        self._backend, self._store = backend, store

    @property
    def merged(self) -> int:
        """Elements of all parts."""
        return sum(p.segment.stop - p.segment.start for p in self.parts)

    def thresholds(self, run: Map) -> tuple[list[float | None], list[int]]:
        """The exact score threshold of each expert that has a bracket (None for the others), and the experts
        whose threshold is outside of theirs (None, too)."""
        terms = self.parts[0].terms.experts
        wanted = [t for t, e in enumerate(terms) if is_open(e)]
        # One expert a task: each goes through the candidates on its own.
        answers = dict(zip(wanted, run(lambda t: self._threshold(t, terms[t]), wanted), strict=True))
        listed = {t: x for t, x in answers.items() if x is not None and not isinstance(x, float)}
        if listed:
            bits = resident.numbers(*listed.values())
            answers |= {t: score_of_bits(int(b)) for t, b in zip(listed, bits, strict=True)}
        return [answers.get(t) for t in range(len(terms))], [t for t in wanted if answers[t] is None]

    def settle(self, part: Part, terms: Terms) -> tuple[Array, Array, Tally]:
        """A part's candidates with the exact thresholds of `terms`: (positions of those that change, their
        values as uint8, what all count)."""
        candidates = self._store.get(part.held, part.tensor)
        operands, several = candidates.operands, len(candidates.positions)
        size, single = operands.out_dtype.itemsize, sum(len(a.positions) for a in candidates.alternatives)
        merged = resident.empty((several + single) * size, operands.experts[0].data)
        tally = Tally.of(self._backend.merge(operands, terms, merged[: several * size]), [])
        if single == 0:
            return candidates.positions, merged, tally
        positions = np.empty(several + single, np.uint32)
        positions[:several] = candidates.positions
        steps = [_step(a, b.threshold) for a, b in zip(part.terms.experts, terms.experts, strict=True)]
        rest = positions[several:], merged[several * size :]
        found = dropped(candidates.alternatives, steps, size, *rest)
        for t, (count, unkept) in enumerate(found):
            tally.kept[t] += len(candidates.alternatives[t].positions) - count
            tally.unkept += unkept
        n = several + sum(count for count, _ in found)
        return positions[:n], merged[: n * size], tally

    def _threshold(self, t: int, terms: ExpertTerms) -> float | Array | None:
        """Expert t's threshold: the least kept score of the k largest, or of the share of mass; None where it
        lies outside the bracket. Where it is among the steps, its bits, int64 of shape ()."""
        selection, lowest = self._selections[t], terms.threshold
        listed, histogram = sum(p.held.listed(t) for p in self.parts), None
        few = listed <= _FEW or self.parts[0].tensor.is_resident
        if selection.rule == "mass" or not few:
            histogram = self._histogram(t, lowest, -1)
            listed = decide.available(selection, *histogram)
        wanted, above, inside = self._account(t, terms, listed)
        if wanted == 0 and above == 0 and terms.span:
            return decide.KEEP_NOTHING
        rest = wanted - above
        if rest <= 0:
            return None
        if rest > inside:  # scores of 0 are never kept
            return lowest if lowest == decide.SMALLEST else None
        if terms.span == 0:
            return lowest
        if histogram is None:
            return self._largest(t, lowest, rest)
        digit = decide.digit_of_rest(selection, rest, *histogram)
        return decide.second_digit(selection, digit, self._histogram(t, lowest, digit.prefix)[0])

    def _account(self, t: int, terms: ExpertTerms, listed: int) -> tuple[int, int, int]:
        """What is wanted of expert t's scores, what is above its bracket and what inside: counts, or masses.
        listed: what the steps hold: all that is inside, unless the bracket is one value."""
        selection, reached = self._selections[t], sum(p.reached[t] for p in self.parts)
        if not terms.census:
            return decide.wanted(selection, self._elements, 0), reached - listed, listed
        census = np.sum([p.censuses[t] for p in self.parts], axis=0)
        tied = reached - int(census[-1])
        if selection.rule == "density":
            return decide.wanted(selection, self._elements, 0), int(census[-1]), tied
        at_most, above = map(decide.total_mass, np.split(census[:-1], 2))
        inside = listed if terms.span else tied * decide.mass(np.float32([terms.threshold]))
        return decide.wanted(selection, 0, at_most + above + listed), above, inside

    def _largest(self, t: int, lowest: float, rest: int) -> Array:
        """The bits of the rest-th largest score in expert t's bracket."""
        steps = resident.joined([x for p in self.parts for x in self._store.steps(p.held, p.tensor, t)])
        return resident.int64(resident.kth_largest(steps, rest)) + score_bits(lowest)

    def _histogram(self, t: int, lowest: float, prefix: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the scores in expert t's bracket, as a backend's `histogram`."""
        counts, lows = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
        for bits in self._in_bracket(t, lowest):
            more_counts, more_lows = resident.histogram(bits, prefix)
            counts += more_counts
            lows += more_lows
        return counts, lows

    def _in_bracket(self, t: int, lowest: float) -> Iterator[Array]:
        """The bits of the scores in expert t's bracket, int64, many at a time."""
        batch: list[Array] = []
        for part in self.parts:
            batch += self._store.steps(part.held, part.tensor, t)
            if part is self.parts[-1] or sum(map(len, batch)) >= _BATCH:
                yield resident.int64(resident.joined(batch)) + score_bits(lowest)
                batch = []


def _step(bracket: ExpertTerms, threshold: float) -> int:
    """How many float32 numbers an exact threshold lies above its bracket's lowest; the span where nothing is
    kept, 0 where there is no bracket."""
    if math.isnan(threshold):
        return bracket.span
    return score_bits(threshold) - score_bits(bracket.threshold) if bracket.span else 0
