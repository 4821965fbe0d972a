"""What is done of a merge, in memory; io/journal.py keeps the same on the disk."""

from __future__ import annotations

import math
from dataclasses import asdict, fields

from ..select.bracket import Bracket
from ..select.pending import Pending
from ..tensors.result import Counts
from ..tensors.segment import Segment
from .engine import Decided, Event, Merged
from .found import ModelFound
from .order import Located
from .scale import Scale

FORMAT = 8  # of the records, of the file of candidates, and of which runs are sampled


def as_found(reported: dict) -> ModelFound:
    """From what `State.model_found` gave a report."""
    thresholds = tuple(None if x is None else float(x) for x in reported["thresholds"])
    sums = None if reported["sums"] is None else tuple(map(tuple, reported["sums"]))
    none = (None,) * len(thresholds)
    at, signs = _located(reported.get("at")), reported.get("signs")
    means, scale = tuple(reported["mean_weights"]), _scale(reported)
    return ModelFound(thresholds, none, means, False, sums, scale, at, signs)


def _scale(record: dict) -> Scale | None:
    return None if record["scale"] is None else Scale(**record["scale"])


def _located(at: list | None) -> tuple[tuple[Located, ...], ...] | None:
    return None if at is None else tuple(tuple(Located(*x) for x in own) for own in at)


def record_of(event: Event) -> dict | None:
    """The journal's record of something that happened; None for what a kill undoes."""
    if isinstance(event, Merged):
        return {"unit": [[*segment, {**vars(counts)}] for segment, counts in event.done]}
    if isinstance(event, Pending):
        if event.memory is not None:
            return None
        names = (f.name for f in fields(event) if f.name not in ("segment", "counts", "memory"))
        rest = {name: getattr(event, name) for name in names}
        return {"pending": [*event.segment, {**vars(event.counts)}, rest]}
    return {"decided": [event.index, event.thresholds, event.repeat]}


class State:
    """What is done of a merge: model-wide decisions, ranges that are final with their counts, ranges that
    wait for thresholds, thresholds of groups. repeats: groups that were merged again for their thresholds;
    backends: those that ran, the first one first.

    records: of the journals of all ranks, in any order of the ranks; tensors: how many the output has.
    """

    def __init__(self, records: list[dict], tensors: int) -> None:
        self.fresh = not records
        self.found: ModelFound | None = None
        self.counts: list[Counts | None] = [None] * tensors
        self.decided: dict[int | None, list[float | None]] = {}
        self.repeats = 0
        self.backends: list[str] = []
        self._final: dict[int, dict[tuple[int, int], None]] = {}
        self._pending: dict[Segment, Pending] = {}
        self._waiting: dict[int, set[Segment]] = {}  # the same by tensor
        self._again: set[Segment] = set()  # merged before by this process, and to be merged once more
        self._repeated: set[int | None] = set()  # groups
        for record in records:
            self._replay(record)
        self._again.clear()
        for segment in list(self._pending):
            if not self._repeated.isdisjoint((None, segment.index)):
                self._leave(segment)

    def begin(self, backend: str) -> dict:
        """Note that a process runs on `backend`; returns the record."""
        if backend not in self.backends:
            self.backends.append(backend)
        return {"backend": backend}

    def _replay(self, record: dict) -> None:
        if "backend" in record:
            self.begin(record["backend"])
        if "found" in record:
            made = record["found"]
            brackets = tuple(None if b is None else Bracket(**b) for b in made["brackets"])
            thresholds, means = tuple(made["thresholds"]), tuple(made["mean_weights"])
            sums = None if made["sums"] is None else tuple(map(tuple, made["sums"]))
            at, signs, scale = _located(made["at"]), made["signs"], _scale(made)
            self.found = ModelFound(thresholds, brackets, means, made["spread"], sums, scale, at, signs)
        if "unit" in record:
            self.add(Merged([(Segment(*place), Counts(**counts)) for *place, counts in record["unit"]]))
        if "pending" in record:
            *place, counts, rest = record["pending"]
            lists = {key: tuple(value) if isinstance(value, list) else value for key, value in rest.items()}
            self.add(Pending(Segment(*place), Counts(**counts), **lists))
        if "decided" in record:
            self.add(Decided(*record["decided"]))

    def add(self, event: Event) -> list[Segment]:
        """Note what happened; returns the segments that were not merged before."""
        new: list[Segment] = []
        if isinstance(event, Merged):
            new = [s for s, _ in event.done if s not in self._pending and s not in self._again]
            for segment, counts in event.done:
                self._finish(segment, counts)
        elif isinstance(event, Pending):
            index, *place = event.segment
            if tuple(place) in self._final.get(index, ()):
                return []  # another rank has settled it since
            new = [] if event.segment in self._pending else [event.segment]
            self._pending[event.segment] = event
            self._waiting.setdefault(event.segment.index, set()).add(event.segment)
        else:
            self.decided[event.index] = event.thresholds
            if event.repeat and event.index not in self._repeated:  # ranks record it each
                self.repeats += 1
                self._repeated.add(event.index)
                self._again |= {s for s in self._pending if event.index in (None, s.index)}
                for segment in self._again & self._pending.keys():
                    self._leave(segment)
        return new

    def _leave(self, segment: Segment) -> None:
        if self._pending.pop(segment, None) is not None:
            self._waiting[segment.index].discard(segment)

    def _finish(self, segment: Segment, counts: Counts) -> None:
        self._leave(segment)
        self._final.setdefault(segment.index, {})[segment.start, segment.stop] = None
        if self.counts[segment.index] is None:
            self.counts[segment.index] = counts
        else:
            self.counts[segment.index].add(counts)

    def model_found(self) -> dict:
        """What was found of the whole model, thresholds for brackets: for the report, and `as_found`."""
        decided = self.decided.get(None) or [None] * len(self.found.thresholds)
        exact = [x if y is None else y for x, y in zip(self.found.thresholds, decided, strict=True)]
        thresholds = [x if x is None or math.isfinite(x) else str(x) for x in exact]  # "nan" keeps nothing
        sums = None if self.found.sums is None else [list(x) for x in self.found.sums]
        found = {"thresholds": thresholds, "mean_weights": list(self.found.mean_weights), "sums": sums}
        found["scale"] = None if self.found.scale is None else asdict(self.found.scale)
        found["at"] = None if self.found.at is None else [[list(x) for x in own] for own in self.found.at]
        return found | {"signs": self.found.signs}

    @property
    def pending(self) -> list[Pending]:
        """Ranges that are merged but for their candidates."""
        return list(self._pending.values())

    def _ranges(self, index: int) -> list[tuple[int, int]]:
        waiting = [(s.start, s.stop) for s in self._waiting.get(index, ())]
        return sorted([*self._final.get(index, ()), *waiting])

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
