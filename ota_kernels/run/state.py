"""What is done of a merge, in memory; io/journal.py keeps the same on the disk."""

from __future__ import annotations

from dataclasses import asdict

from ..select.bracket import Bracket
from ..select.pending import Held
from ..tensors.segment import Segment
from .counts import Tally
from .engine import Decided, Event, Merged, Open
from .survey import ModelDecisions

FORMAT = 5  # of the records, of the file of candidates, and of which runs are sampled


def record_of(event: Event) -> dict | None:
    """The journal's record of something that happened; None for what a kill undoes."""
    if isinstance(event, Merged):
        return {"unit": [[*segment, asdict(tally)] for segment, tally in event.done]}
    if isinstance(event, Open):
        if event.held.memory is not None:
            return None
        held = [event.held.count, event.held.steps, event.held.alternatives, event.held.offset]
        return {"open": [*event.segment, asdict(event.tally), event.reached, event.censuses, held]}
    return {"decided": [event.index, event.thresholds, event.repeat]}


class Ledger:
    """What is done of a merge: model-wide decisions, ranges that are final with their tallies, ranges that
    wait for thresholds, thresholds of groups. repeats: groups that were merged again for their thresholds;
    backends: those that ran, the first one first.

    records: a journal's, empty for a new merge; tensors: how many the output has.
    """

    def __init__(self, records: list[dict], tensors: int) -> None:
        self.fresh = not records
        self.decisions: ModelDecisions | None = None
        self.tallies: list[Tally | None] = [None] * tensors
        self.decided: dict[int | None, list[float | None]] = {}
        self.repeats = 0
        self.backends: list[str] = []
        self._final: dict[int, list[tuple[int, int]]] = {}
        self._open: dict[Segment, Open] = {}
        self._again: set[Segment] = set()  # merged before by this process, and to be merged once more
        for record in records:
            self._replay(record)
        self._again.clear()

    def begin(self, backend: str) -> dict:
        """Note that a process runs on `backend`; returns the record."""
        if backend not in self.backends:
            self.backends.append(backend)
        return {"backend": backend}

    def _replay(self, record: dict) -> None:
        if "backend" in record:
            self.begin(record["backend"])
        if "decisions" in record:
            made = record["decisions"]
            brackets = tuple(None if b is None else Bracket(**b) for b in made["brackets"])
            thresholds, means = tuple(made["thresholds"]), tuple(made["mean_weights"])
            self.decisions = ModelDecisions(thresholds, brackets, means, made["spread"])
        if "unit" in record:
            self.add(Merged([(Segment(*place), Tally(**tally)) for *place, tally in record["unit"]]))
        if "open" in record:
            *place, tally, reached, censuses, (count, steps, alternatives, offset) = record["open"]
            held = Held(count, tuple(steps), tuple(alternatives), offset=offset)
            self.add(Open(Segment(*place), Tally(**tally), reached, censuses, held))
        if "decided" in record:
            self.add(Decided(*record["decided"]))

    def add(self, event: Event) -> list[Segment]:
        """Note what happened; returns the segments that were not merged before."""
        new: list[Segment] = []
        if isinstance(event, Merged):
            new = [s for s, _ in event.done if s not in self._open and s not in self._again]
            for segment, tally in event.done:
                self._finish(segment, tally)
        elif isinstance(event, Open):
            new = [] if event.segment in self._open else [event.segment]
            self._open[event.segment] = event
        else:
            self.decided[event.index] = event.thresholds
            if event.repeat:
                self.repeats += 1
                self._again |= {s for s in self._open if event.index in (None, s.index)}
                self._open = {s: o for s, o in self._open.items() if s not in self._again}
        return new

    def _finish(self, segment: Segment, tally: Tally) -> None:
        self._open.pop(segment, None)
        self._final.setdefault(segment.index, []).append((segment.start, segment.stop))
        if self.tallies[segment.index] is None:
            self.tallies[segment.index] = tally
        else:
            self.tallies[segment.index].add(tally)

    @property
    def open(self) -> list[Open]:
        """Ranges that are merged but for their candidates."""
        return list(self._open.values())

    def _ranges(self, index: int) -> list[tuple[int, int]]:
        return sorted(
            self._final.get(index, []) + [(s.start, s.stop) for s in self._open if s.index == index]
        )

    def gaps(self, index: int, numel: int) -> list[tuple[int, int]]:
        """The ranges of a tensor that are to be merged; an empty tensor has one until it is done."""
        done = self._ranges(index)
        if numel == 0:
            return [] if done else [(0, 0)]
        gaps, position = [], 0
        for start, stop in [*done, (numel, numel)]:
            if position < start:
                gaps.append((position, start))
            position = max(position, stop)
        return gaps

    def done_elements(self, index: int) -> int:
        """How many elements of a tensor are merged."""
        return sum(stop - start for start, stop in self._ranges(index))
