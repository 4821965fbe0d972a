"""Tiles whose masks wait for the same thresholds: decide them exactly from counts and candidates, then settle.

    tile merged with brackets --> Part: its counts, its undecided elements (candidates)
    all parts --> thresholds: the (k - elements above the bracket)-th largest candidate, if it lies inside
    each part --> its candidates merged again with the exact thresholds, and patched into the output

The scores of candidates are never stored: a candidate's operands are, a tile like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np

from . import decide
from .backends.stats import CENSUS, EXPONENTS, MergeStats
from .candidates import Held, Store
from .factors import Map
from .formula import ExpertTerms, Terms, close, is_open
from .tally import Tally
from .tensors import TensorInputs
from .tiling import Segment

_BINS = 1 << 16
_FEW = 1 << 20  # candidates whose scores are selected from directly
_BATCH = 32  # parts that share a histogram


@dataclass
class Part:
    """One merged tile of a group. tally: with the undecided elements counted as kept; censuses: per expert;
    held: where its candidates are; assumed: what the tile's tally holds for the candidates, once counted."""

    segment: Segment
    tensor: TensorInputs
    terms: Terms
    tally: Tally
    censuses: list[list[int] | None]
    held: Held
    assumed: MergeStats | None = None


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

    def thresholds(self, run: Map) -> list[float | None] | None:
        """The exact score threshold of each expert that has a bracket; None if one lies outside its bracket."""
        for part, assumed in zip(self.parts, run(self._assumed, self.parts), strict=True):
            part.assumed = assumed
        terms = self.parts[0].terms.experts
        found = [self._threshold(t, e, run) if is_open(e) else None for t, e in enumerate(terms)]
        missed = any(is_open(e) and x is None for e, x in zip(terms, found, strict=True))
        return None if missed else found

    def settle(self, part: Part, thresholds: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray, Tally]:
        """A part's candidates merged with the exact thresholds: (positions, merged values as uint8, what they
        add to the part's tally)."""
        positions, operands = self._store.get(part.held, part.tensor)
        assumed = part.assumed or self._assumed(part)
        stats, out = self._merge(operands, close(part.terms, thresholds))
        change = Tally.of(stats, part.tally.thresholds)
        change.add(Tally.of(assumed, part.tally.thresholds), -1)
        return positions, out, change

    def _operands(self, part: Part) -> TensorInputs:
        return self._store.get(part.held, part.tensor).operands

    def _merge(self, operands: TensorInputs, terms: Terms) -> tuple[MergeStats, np.ndarray]:
        out = np.empty(operands.numel * operands.out_dtype.itemsize, np.uint8)
        return self._backend.merge(operands, terms, out), out

    def _assumed(self, part: Part) -> MergeStats:
        # A census needs the bracket; otherwise candidates would only be gathered once more.
        experts = tuple(e if e.census else replace(e, span=0) for e in part.terms.experts)
        stats, _ = self._merge(self._operands(part), replace(part.terms, experts=experts))
        return replace(stats, candidates=None)

    def _threshold(self, t: int, terms: ExpertTerms, run: Map) -> float | None:
        selection, lowest = self._selections[t], terms.threshold
        kept = sum(p.tally.kept[t] for p in self.parts)  # at least `lowest`
        inside = sum(p.assumed.kept[t] for p in self.parts)  # of those, candidates
        census = candidate_census = np.zeros(CENSUS, np.int64)
        if terms.census:
            census = np.sum([p.censuses[t] for p in self.parts], axis=0)
            candidate_census = np.sum([p.assumed.censuses[t] for p in self.parts], axis=0)
        at_most, above = (decide.total_mass(c) for c in np.split(census[:-1], 2))
        wanted = decide.wanted(selection, self._elements, at_most + above)
        if wanted == 0:
            return decide.KEEP_NOTHING
        by_mass = selection.rule == "mass"
        if terms.span == 0:
            tied = kept - int(census[-1])
            before, after = (
                (above, above + tied * decide.mass(lowest)) if by_mass else (int(census[-1]), kept)
            )
            return lowest if before < wanted and (wanted <= after or lowest == decide.SMALLEST) else None
        if by_mass:
            rest = wanted - (above - decide.total_mass(candidate_census[EXPONENTS:-1]))
        else:
            rest = wanted - (kept - inside)
        if rest <= 0:
            return None
        found = self._among_candidates(t, rest, run)
        steps = decide.score_bits(found) - decide.score_bits(lowest)
        return found if 0 <= steps < terms.span else None

    def _among_candidates(self, t: int, rest: int, run: Map) -> float:
        """The score that keeps the `rest` largest candidates, or candidates of that mass; the smallest score
        where all of them are not enough."""
        selection = self._selections[t]
        if selection.rule == "density" and sum(p.held.count for p in self.parts) <= _FEW:
            scores = np.concatenate(list(run(lambda p: self._scores(p, t), self.parts)))
            if rest > scores.size:
                return decide.SMALLEST
            return max(float(np.partition(scores, scores.size - rest)[scores.size - rest]), decide.SMALLEST)
        counts, lows = self._histogram(t, -1, run)
        if rest > decide.available(selection, counts, lows):
            return decide.SMALLEST
        digit = decide.digit_of_rest(selection, rest, counts, lows)
        return decide.second_digit(selection, digit, self._histogram(t, digit.prefix, run)[0])

    def _scores(self, part: Part, t: int) -> np.ndarray:
        return self._backend.scores(self._operands(part), t, part.terms.experts[t])[0]

    def _histogram(self, t: int, prefix: int, run: Map) -> tuple[np.ndarray, np.ndarray]:
        def of_parts(parts: list[Part]) -> tuple[np.ndarray, np.ndarray]:
            counts, lows = np.zeros(_BINS, np.int64), np.zeros(_BINS, np.int64)
            for part in parts:
                e = part.terms.experts[t]
                self._backend.histogram(self._operands(part), t, e, False, prefix, counts, lows)
            return counts, lows

        batches = [self.parts[i : i + _BATCH] for i in range(0, len(self.parts), _BATCH)]
        counts, lows = np.zeros(_BINS, np.int64), np.zeros(_BINS, np.int64)
        for more_counts, more_lows in run(of_parts, batches):
            counts += more_counts
            lows += more_lows
        return counts, lows
