"""What is done of a merge, in memory; io/journal.py keeps it on the disk."""

from __future__ import annotations

from .engine import Tally
from .survey import ModelDecisions
from .tiling import Segment


class Ledger:
    """What is done of a merge: model-wide decisions, ranges on the disk and their tallies.

    records: a journal's, empty for a new merge; tensors: how many the output has.
    """

    def __init__(self, records: list[dict], tensors: int) -> None:
        self.fresh = not records
        self.decisions: ModelDecisions | None = None
        self.tallies: list[Tally | None] = [None] * tensors
        self._ranges: dict[int, list[tuple[int, int]]] = {}
        for record in records:
            if "decisions" in record:
                self.decisions = ModelDecisions(**{k: tuple(v) for k, v in record["decisions"].items()})
            for index, start, stop, tally in record.get("unit", ()):
                self.add(Segment(index, start, stop), Tally(**tally))

    def add(self, segment: Segment, tally: Tally) -> None:
        """Note a finished range."""
        self._ranges.setdefault(segment.index, []).append((segment.start, segment.stop))
        if self.tallies[segment.index] is None:
            self.tallies[segment.index] = tally
        else:
            self.tallies[segment.index].add(tally)

    def gaps(self, index: int, numel: int) -> list[tuple[int, int]]:
        """The ranges of a tensor that are not done; an empty tensor has one empty range until it is done."""
        done = sorted(self._ranges.get(index, ()))
        if numel == 0:
            return [] if done else [(0, 0)]
        gaps, position = [], 0
        for start, stop in [*done, (numel, numel)]:
            if position < start:
                gaps.append((position, start))
            position = max(position, stop)
        return gaps

    def done_elements(self, index: int) -> int:
        """How many elements of a tensor are done."""
        return sum(stop - start for start, stop in self._ranges.get(index, ()))
