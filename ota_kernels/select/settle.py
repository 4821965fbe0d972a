"""Tiles whose masks wait for the same thresholds: decide by counts and undecided elements, then settle.

tile merged with brackets --> Pending: its counts, the scores in brackets, its undecided elements
all of a group --> thresholds: the (k - scores above)-th largest score in the bracket, if it is there
each tile --> alternatives below the thresholds, other elements merged again: patched into the output
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..tensors import array as resident
from ..tensors.array import BINS, Array
from ..tensors.found import Selection, Threshold
from ..tensors.result import CENSUS, Counts, dropped
from ..tensors.segment import Map
from ..tensors.terms import ExpertTerms, Terms, is_open, score_bits, score_of_bits
from ..tensors.tile import TensorInputs
from . import thresholds as decide
from .pending import Pending, Store

if TYPE_CHECKING:
    from ..backends import Backend

FEW = 1 << 22  # scores in a bracket that a thread holds in memory; a device holds as many as there are
BATCH = 1 << 20  # scores that are counted at once


class Group:
    """Pending tiles of one tensor, or of the whole model.

    selections: per expert; elements: how many the selections are over; store: holds the undecided elements;
    few: scores in a bracket that a thread holds in memory; batch: scores that are counted at once;
    brackets: of the model's experts (None: settled elsewhere), where other ranks have tiles of the group,
    too; total: adds up arrays of all of them.
    """

    def __init__(
        self,
        selections: Sequence[Selection],
        elements: int,
        backend: Backend,
        store: Store,
        few: int = FEW,
        batch: int = BATCH,
        brackets: Sequence[Threshold | None] | None = None,
        total: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.pending: list[Pending] = []
        self._ready: dict[int, tuple[TensorInputs, Terms]] = {}
        self._selections, self._elements = selections, elements
        self._backend, self._store = backend, store
        self._few, self._batch = few, batch
        self._brackets, self._total = brackets, total

    def add(self, pending: Pending, tensor: TensorInputs, terms: Terms) -> None:
        """A tile merged by these terms; tensor: the one it is of."""
        self.pending.append(pending)
        self._ready[pending.segment.index] = tensor, terms

    def tensor(self, pending: Pending) -> TensorInputs:
        return self._ready[pending.segment.index][0]

    def terms(self, pending: Pending) -> Terms:
        """By which the tile was merged, brackets in place of thresholds."""
        return self._ready[pending.segment.index][1]

    @property
    def merged(self) -> int:
        """Elements of all tiles."""
        return sum(p.elements for p in self.pending)

    def thresholds(self, run: Map) -> tuple[list[float | None], list[int]]:
        """The exact score threshold of each expert that has a bracket (None for the others), and the experts
        whose threshold is outside of theirs (None, too)."""
        terms = self._brackets or self.terms(self.pending[0]).experts
        wanted = [t for t, e in enumerate(terms) if e is not None and is_open(e)]
        if self._total is not None:  # ranks add up one expert after the other
            run = map
        # One expert a task: each goes through the candidates on its own.
        answers = dict(zip(wanted, run(lambda t: self._threshold(t, terms[t]), wanted), strict=True))
        listed = {t: x for t, x in answers.items() if x is not None and not isinstance(x, float)}
        if listed:
            bits = resident.numbers(*listed.values())
            answers |= {t: score_of_bits(int(b)) for t, b in zip(listed, bits, strict=True)}
        return [answers.get(t) for t in range(len(terms))], [t for t in wanted if answers[t] is None]

    def settle(self, pending: Pending, terms: Terms) -> tuple[Array, Array, Counts]:
        """A tile's candidates with the exact thresholds of `terms`: (positions of those that change, their
        values as uint8, what all count)."""
        candidates = self._store.get(pending, self.tensor(pending))
        operands, several = candidates.operands, len(candidates.positions)
        size, single = operands.out_dtype.itemsize, sum(len(a.positions) for a in candidates.alternatives)
        merged = resident.empty((several + single) * size, operands.experts[0].data)
        counts = Counts.of(self._backend.merge(operands, terms, merged[: several * size]), [])
        if single == 0:
            return candidates.positions, merged, counts
        positions = np.empty(several + single, np.uint32)
        positions[:several] = candidates.positions
        steps = [
            _step(a, b.threshold) for a, b in zip(self.terms(pending).experts, terms.experts, strict=True)
        ]
        rest = positions[several:], merged[several * size :]
        found = dropped(candidates.alternatives, steps, size, *rest)
        for t, (count, unkept) in enumerate(found):
            counts.kept[t] += len(candidates.alternatives[t].positions) - count
            counts.unkept += unkept
        n = several + sum(count for count, _ in found)
        return positions[:n], merged[: n * size], counts

    def _summed(self, *numbers: int) -> list[int]:
        """Of all ranks."""
        return list(numbers) if self._total is None else self._total(np.array(numbers, np.int64)).tolist()

    def _threshold(self, t: int, terms: ExpertTerms | Threshold) -> float | Array | None:
        """Expert t's threshold: the least kept score of the k largest, or of the share of mass; None where it
        lies outside the bracket. Where it is among the steps, its bits, int64 of shape ()."""
        selection, lowest = self._selections[t], terms.threshold
        (listed,), histogram = self._summed(sum(p.listed(t) for p in self.pending)), None
        few = self._total is None and (listed <= self._few or self.pending[0].is_resident)
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

    def _account(self, t: int, terms: ExpertTerms | Threshold, listed: int) -> tuple[int, int, int]:
        """What is wanted of expert t's scores, what is above its bracket and what inside: counts, or masses.
        listed: what the steps hold: all that is inside, unless the bracket is one value."""
        selection, (reached,) = self._selections[t], self._summed(sum(p.reached[t] for p in self.pending))
        if not terms.census:
            return decide.wanted(selection, self._elements, 0), reached - listed, listed
        census = np.sum([np.zeros(CENSUS, np.int64), *(p.censuses[t] for p in self.pending)], axis=0)
        census = census if self._total is None else self._total(census)
        tied = reached - int(census[-1])
        if selection.rule == "density":
            return decide.wanted(selection, self._elements, 0), int(census[-1]), tied
        at_most, above = map(decide.total_mass, np.split(census[:-1], 2))
        inside = listed if terms.span else tied * decide.mass(np.float32([terms.threshold]))
        return decide.wanted(selection, 0, at_most + above + listed), above, inside

    def _largest(self, t: int, lowest: float, rest: int) -> Array:
        """The bits of the rest-th largest score in expert t's bracket."""
        steps = resident.joined([x for p in self.pending for x in self._store.steps(p, self.tensor(p), t)])
        return resident.int64(resident.kth_largest(steps, rest)) + score_bits(lowest)

    def _histogram(self, t: int, lowest: float, prefix: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the scores in expert t's bracket, as a backend's `histogram`."""
        counts, lows = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
        for bits in self._in_bracket(t, lowest):
            more_counts, more_lows = resident.histogram(bits, prefix)
            counts += more_counts
            lows += more_lows
        if self._total is not None:
            counts, lows = self._total(np.stack([counts, lows]))
        return counts, lows

    def _in_bracket(self, t: int, lowest: float) -> Iterator[Array]:
        """The bits of the scores in expert t's bracket, int64, many at a time."""
        batch: list[Array] = []
        for pending in self.pending:
            batch += self._store.steps(pending, self.tensor(pending), t)
            if pending is self.pending[-1] or sum(map(len, batch)) >= self._batch:
                yield resident.int64(resident.joined(batch)) + score_bits(lowest)
                batch = []


def _step(bracket: ExpertTerms, threshold: float) -> int:
    """How many float32 numbers an exact threshold lies above its bracket's lowest; the span where nothing is
    kept, 0 where there is no bracket."""
    if math.isnan(threshold):
        return bracket.span
    return score_bits(threshold) - score_bits(bracket.threshold) if bracket.span else 0
