"""Tiles whose masks wait for the same thresholds: decide exactly from counts and candidates, then settle.

    tile merged with brackets --> Part: its counts, its undecided elements (candidates)
    all parts --> thresholds: the (k - elements above the bracket)-th largest candidate, if it lies inside
    each part --> its candidates merged again with the exact thresholds, and patched into the output

The scores of candidates are never stored: a candidate's operands are, a tile like any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from . import decide
from .candidates import Held, Store
from .factors import Map
from .formula import ExpertTerms, Terms, close, is_open, score_bits, score_of_bits
from .tally import Tally
from .tensors import TensorInputs
from .tiling import Segment

_BINS = 1 << 16
_FEW = 1 << 26  # candidates whose scores are held in memory: those in one expert's bracket, a fraction
_BATCH = 32  # parts that share a histogram


@dataclass
class Part:
    """One merged tile of a group. tally, censuses (per expert): of what is decided; held: its candidates."""

    segment: Segment
    tensor: TensorInputs
    terms: Terms
    tally: Tally
    censuses: list[list[int] | None]
    held: Held


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
        """The exact score threshold of each expert that has a bracket; None if one is outside its bracket."""
        terms = self.parts[0].terms.experts
        wanted = [t for t, e in enumerate(terms) if is_open(e)]
        # One expert a task: each goes through the candidates on its own.
        answers = dict(zip(wanted, run(lambda t: self._threshold(t, terms[t], map), wanted), strict=True))
        if None in answers.values():
            return None
        return [answers.get(t) for t in range(len(terms))]

    def settle(self, part: Part, thresholds: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray, Tally]:
        """A part's candidates merged with the exact thresholds: (positions, merged values as uint8, what they
        count)."""
        positions, operands = self._store.get(part.held, part.tensor)
        out = np.empty(operands.numel * operands.out_dtype.itemsize, np.uint8)
        stats = self._backend.merge(operands, close(part.terms, thresholds), out)
        return positions, out, Tally.of(stats, [])

    def _operands(self, part: Part) -> TensorInputs:
        return self._store.get(part.held, part.tensor).operands

    def _threshold(self, t: int, terms: ExpertTerms, run: Map) -> float | None:
        """Expert t's threshold: the least kept score of the k largest, or of the share of mass."""
        if self._selections[t].rule == "mass":
            return self._of_mass(t, terms, run)
        wanted = decide.wanted(self._selections[t], self._elements, 0)
        if terms.span == 0:
            tied, above = self._tied(t, terms, run)
            enough = wanted <= above + tied or terms.threshold == decide.SMALLEST
            return terms.threshold if above < wanted and enough else None
        rest = wanted - sum(p.tally.kept[t] for p in self.parts)  # all above the bracket
        if rest <= 0:
            return None
        if sum(p.held.count for p in self.parts) <= _FEW:
            return self._largest_in_bracket(t, terms, rest, run)
        return self._among_candidates(t, terms, rest, run)

    def _of_mass(self, t: int, terms: ExpertTerms, run: Map) -> float | None:
        census = np.sum([p.censuses[t] for p in self.parts], axis=0)
        at_most, above = (decide.total_mass(c) for c in np.split(census[:-1], 2))
        counts, lows = self._histogram(t, -1, run)
        of_candidates = decide.available(self._selections[t], counts, lows)
        wanted = decide.wanted(self._selections[t], 0, at_most + above + of_candidates)
        if wanted == 0:
            return decide.KEEP_NOTHING
        if terms.span == 0:
            tied, _ = self._tied(t, terms, run)
            above += sum(map(decide.mass, self._candidates_above(t, terms, run)))
            enough = wanted <= above + tied * decide.mass(np.float32([terms.threshold]))
            return terms.threshold if above < wanted and enough else None
        rest = wanted - above
        return self._among_candidates(t, terms, rest, run) if rest > 0 else None

    def _tied(self, t: int, terms: ExpertTerms, run: Map) -> tuple[int, int]:
        """How many scores equal the threshold of a bracket of one value, and how many are above."""
        above = sum(p.censuses[t][-1] for p in self.parts)
        tied = sum(p.tally.kept[t] for p in self.parts) - above
        for inside, higher in run(lambda p: self._in_bracket(p, t, terms), self.parts):
            tied += len(inside)
            above += higher
        return tied, above

    def _candidates_above(self, t: int, terms: ExpertTerms, run: Map) -> list[np.ndarray]:
        """The scores of candidates above a bracket of one value."""
        next_above = score_of_bits(score_bits(terms.threshold) + 1)
        return [
            inside
            for inside, _ in run(
                lambda p: self._backend.in_bracket(
                    self._operands(p), t, p.terms.experts[t], next_above, math.inf
                ),
                self.parts,
            )
        ]

    def _in_bracket(self, part: Part, t: int, terms: ExpertTerms) -> tuple[np.ndarray, int]:
        """The scores of a part's candidates in expert t's bracket, and how many are above it."""
        highest = score_of_bits(score_bits(terms.threshold) + max(terms.span, 1) - 1)
        operands, own = self._operands(part), part.terms.experts[t]
        return self._backend.in_bracket(operands, t, own, terms.threshold, highest)

    def _largest_in_bracket(self, t: int, terms: ExpertTerms, rest: int, run: Map) -> float | None:
        """The rest-th largest candidate, if it lies in the bracket of expert t."""
        parts, above = zip(*run(lambda p: self._in_bracket(p, t, terms), self.parts), strict=True)
        scores, rest = np.concatenate(parts), rest - sum(above)
        if rest > len(scores) and terms.threshold == decide.SMALLEST:
            return decide.SMALLEST
        if not 0 < rest <= len(scores):
            return None
        return float(np.partition(scores, len(scores) - rest)[len(scores) - rest])

    def _among_candidates(self, t: int, terms: ExpertTerms, rest: int, run: Map) -> float | None:
        """The score that keeps the `rest` largest candidates, or candidates of that mass, if it lies in the
        bracket; in two passes over them, none of which holds more than histograms."""
        selection, found = self._selections[t], decide.SMALLEST
        counts, lows = self._histogram(t, -1, run)
        if rest <= decide.available(selection, counts, lows):
            digit = decide.digit_of_rest(selection, rest, counts, lows)
            found = decide.second_digit(selection, digit, self._histogram(t, digit.prefix, run)[0])
        steps = score_bits(found) - score_bits(terms.threshold)
        return found if 0 <= steps < terms.span else None

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
