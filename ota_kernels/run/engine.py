"""Runs a merge over tensors: survey, decide, merge, settle. Knows neither files nor the command line.

    tensors --units--> worker threads: terms (small tensors), kernel per tile --> sink.write --> Merged, Part
    all parts of a group --> exact thresholds --> candidates merged again --> sink.patch --> Merged
    a threshold outside its bracket --> exact thresholds by histograms --> the group's tiles once more

A tensor that is one tile is decided by the worker that merges it (surveys of more than a chunk apart); a
larger one once, by all workers, before its first tile. A group is the whole model, or one tensor
(`density_scope`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from typing import NamedTuple, Protocol, TypeVar

from ..select.pending import Held, Store
from ..select.settle import Group, Part
from ..tensors import array as resident
from ..tensors.array import Array
from ..tensors.segment import Segment, units
from ..tensors.terms import Terms, close, is_open
from ..tensors.tile import TensorInputs
from .counts import Tally
from .factors import CHUNK, Map
from .pool import Pool
from .survey import ModelDecisions, Survey

Range = tuple[int, int, int]  # tensor number, first element, end


class Sink(Protocol):
    """Where merged tiles go, on a device where they are resident. Called from worker threads, `wants` from
    the one that hands tiles to them."""

    def room(self, segment: Segment, nbytes: int) -> Array:
        """uint8[nbytes] to merge into, aligned to 8 bytes; used by one thread until `write` returns."""

    def write(self, segment: Segment, merged: Array) -> None: ...

    def patch(self, segment: Segment, positions: Array, merged: Array) -> None:
        """Replace the elements at `positions` (integers[m], in the segment) by merged (uint8, m elements)."""

    def wants(self, tensor: TensorInputs, segment: Segment) -> None:
        """The segment's inputs will be read soon."""

    def done_with(self, tile: TensorInputs) -> None:
        """The tile's inputs will not be read again."""


class Merged(NamedTuple):
    """Segments whose values are final."""

    done: list[tuple[Segment, Tally]]


class Open(NamedTuple):
    """A segment that waits for thresholds; fields as in Part. To be recorded once its candidates are in the
    store's file: then it comes a second time, if it was in memory before."""

    segment: Segment
    tally: Tally
    reached: list[int]
    censuses: list[list[int] | None]
    held: Held


class Decided(NamedTuple):
    """The exact score thresholds of a group, per expert (None: not a bracket). index: the group's tensor,
    None for the whole model; repeat: a threshold lay outside its bracket: all segments are merged again."""

    index: int | None
    thresholds: list[float | None]
    repeat: bool = False


Event = Merged | Open | Decided

# How much work a kill may undo. Candidates are a tenth of what is read: spilling them takes no time.
_CHECKPOINT_SECONDS = 10.0
_BATCH_SECONDS = 1.0

Result = TypeVar("Result")


def _opened(part: Part) -> Open:
    return Open(part.segment, part.tally, part.reached, part.censuses, part.held)


def _in_batches(results: Iterable[Result]) -> Iterator[list[Result]]:
    """As many at a time as come within a second: recording them waits for the disk."""
    batch: list[Result] = []
    begun = time.monotonic()
    for result in results:
        batch.append(result)
        if time.monotonic() - begun > _BATCH_SECONDS:
            yield batch
            batch, begun = [], time.monotonic()
    if batch:
        yield batch


def _owned(result: tuple[Segment, Tally] | Part) -> tuple[Segment, Tally] | Part:
    """Candidates on the host are views until the thread's next tile."""
    if isinstance(result, Part) and not result.held.is_resident:
        result.held = result.held.owned()
    return result


class Engine:
    """Merges tensors (by number) into a sink, in units of tile_elements.

    decisions: what the survey decided for the whole model; store: holds undecided elements; decided:
    thresholds of groups that an earlier process decided.
    """

    def __init__(
        self,
        tensors: Mapping[int, TensorInputs],
        sink: Sink,
        *,
        backend: ModuleType,
        pool: Pool,
        tile_elements: int,
        survey: Survey,
        decisions: ModelDecisions,
        store: Store,
        decided: Mapping[int | None, list[float | None]] | None = None,
    ) -> None:
        self._tensors, self._sink, self._store = tensors, sink, store
        self._backend, self._pool, self._tile_elements = backend, pool, tile_elements
        self._survey, self._decisions = survey, decisions
        self._groups: dict[int | None, Group] = {}
        self._decided = dict(decided or {})
        self._checkpointed = time.monotonic()
        # Elements of a tensor that one worker decides. A sample is quick, other surveys want all workers.
        local = survey.brackets and not survey.model_scope
        self._alone = tile_elements if local else min(CHUNK, tile_elements)

    def run(self, todo: Iterable[Range] | None = None, opened: Iterable[Open] = ()) -> Iterator[Event]:
        """Merge the ranges `todo` (default: everything) and settle what an earlier process left open. Yields
        what happens, in an order that can be recorded. Raises InputError where an input is not finite."""
        for event in opened:
            yield from self._restore(event)
        everything = ((i, 0, t.numel) for i, t in self._tensors.items())
        for results in self._merge(everything if todo is None else todo):
            if done := [r for r in results if not isinstance(r, Part)]:
                yield Merged(done)
            for part in results:
                if isinstance(part, Part):
                    yield from self._add(part)
        for key in list(self._groups):
            yield from self._finish(key)

    def _merge(self, todo: Iterable[Range]) -> Iterator[list[tuple[Segment, Tally] | Part]]:
        """The ranges' units in order: per segment its final tally, or what it adds to its group."""

        ready: dict[int, tuple[TensorInputs, Terms]] = {}

        def ranges() -> Iterator[Range]:
            for index, start, stop in todo:
                numel = self._tensors[index].numel
                alone = stop - start == numel <= self._alone
                if not alone and index not in ready:
                    ready[index] = self._decide(index, self._pool.run)
                yield index, start, stop

        def with_terms(unit: list[Segment]) -> list[tuple[Segment, tuple[TensorInputs, Terms] | None]]:
            given = [(segment, ready.get(segment.index)) for segment in unit]
            for segment, decided in given:
                tensor = decided[0] if decided else self._tensors[segment.index]
                self._sink.wants(tensor, segment)
                if segment.stop == tensor.numel:
                    ready.pop(segment.index, None)  # units in flight hold what they need
            return given

        def merge_unit(unit) -> list[tuple[Segment, Tally] | Part]:
            return [self._merge_segment(s, *given) if given else self._merge_alone(s) for s, given in unit]

        yield from self._pool.run(merge_unit, (with_terms(u) for u in units(ranges(), self._tile_elements)))

    def _key(self, index: int) -> int | None:
        return None if self._survey.model_scope else index

    def _decide(self, index: int, run: Map) -> tuple[TensorInputs, Terms]:
        tensor = self._survey.prepare(self._tensors[index], run)
        terms = self._survey.terms(tensor, self._decisions, run)
        known = self._decided.get(self._key(index))
        return tensor, terms if known is None else close(terms, known)

    def _merge_alone(self, segment: Segment) -> tuple[Segment, Tally] | Part:
        """A whole tensor in one tile: where densities are per tensor, it is settled before it is written."""
        tensor, terms = self._decide(segment.index, map)
        room, result = self._run_kernel(segment, tensor, terms)
        if isinstance(result, Part) and not self._survey.model_scope:
            group = self._new_group(segment.index)
            group.parts.append(result)
            thresholds, missed = self._exact_thresholds(group, tensor, map)
            if missed:
                room, result = self._run_kernel(segment, tensor, close(terms, thresholds))
                result[1].repeats = 1
            else:
                positions, merged, tally = self._settle(group, result, thresholds)
                resident.scatter(room, positions, merged, tensor.out_dtype.itemsize)
                result = segment, tally
        self._sink.write(segment, room)
        self._sink.done_with(tensor)
        return _owned(result)

    def _merge_segment(
        self, segment: Segment, tensor: TensorInputs, terms: Terms
    ) -> tuple[Segment, Tally] | Part:
        room, result = self._run_kernel(segment, tensor, terms)
        self._sink.write(segment, room)
        self._sink.done_with(tensor.slice(segment.start, segment.stop))
        return _owned(result)

    def _run_kernel(
        self, segment: Segment, tensor: TensorInputs, terms: Terms
    ) -> tuple[Array, tuple[Segment, Tally] | Part]:
        """The merged tile, and its final tally or what it adds to its group."""
        tile = tensor.slice(segment.start, segment.stop)
        room = self._sink.room(segment, tile.numel * tile.out_dtype.itemsize)
        stats = self._backend.merge(tile, terms, room)
        self._survey.check(tile, segment.start, stats.nonfinite)
        tally = Tally.of(stats, self._saliencies(terms))
        if not any(map(is_open, terms.experts)):
            return room, (segment, tally)
        return room, Part.of(segment, tensor, terms, stats, tally)

    def _saliencies(self, terms: Terms) -> list[float | None]:
        return [self._survey.saliency_threshold(terms, t) for t in range(len(terms.experts))]

    def _new_group(self, index: int | None) -> Group:
        elements = self._survey.elements if index is None else self._tensors[index].numel
        return Group(self._survey.selections, elements, self._backend, self._store)

    def _group(self, index: int) -> Group:
        key = self._key(index)
        if key not in self._groups:
            self._groups[key] = self._new_group(key)
        return self._groups[key]

    def _add(self, part: Part) -> Iterator[Event]:
        """Keep a part until its group is complete."""
        part.held = self._store.put(part.held.memory)
        group = self._group(part.segment.index)
        group.parts.append(part)
        yield _opened(part)
        if time.monotonic() - self._checkpointed > _CHECKPOINT_SECONDS:
            yield from self.checkpoint()
        yield from self._finish_if_complete(group, part.segment.index)

    def _finish_if_complete(self, group: Group, index: int) -> Iterator[Event]:
        """One tensor's group is settled after its last tile, the model's after all."""
        if not self._survey.model_scope and group.merged == self._tensors[index].numel:
            yield from self._finish(index)

    def checkpoint(self) -> Iterator[Event]:
        """Move the candidates in the host's memory to the store's file: a killed merge need not find them
        again."""
        self._checkpointed = time.monotonic()
        for group in self._groups.values():
            for part in group.parts:
                if part.held.memory is not None and not part.held.is_resident:
                    part.held = self._store.spill(part.held)
                    yield _opened(part)

    def _restore(self, event: Open) -> Iterator[Event]:
        index = event.segment.index
        tensor = self._survey.prepare(self._tensors[index], self._pool.run)
        terms = self._survey.terms(tensor, self._decisions, self._pool.run)
        held = self._store.restore(event.held, tensor)
        part = Part(event.segment, tensor, terms, event.tally, event.reached, event.censuses, held)
        thresholds = self._decided.get(self._key(index))
        if thresholds is None:
            group = self._group(index)
            group.parts.append(part)
            yield from self._finish_if_complete(group, index)
        else:
            yield Merged([self._patch(self._new_group(self._key(index)), part, thresholds)])

    def _finish(self, key: int | None) -> Iterator[Event]:
        """All parts of a group are merged: decide, and patch their candidates or merge them again."""
        group = self._groups.pop(key)
        tensor = None if key is None else group.parts[0].tensor
        thresholds, missed = self._exact_thresholds(group, tensor, self._pool.run)
        yield Decided(key, thresholds, missed)
        if missed:
            self._decided[key] = thresholds
            yield from map(Merged, self._merge(sorted(p.segment for p in group.parts)))
        else:
            patched = self._pool.run(lambda part: self._patch(group, part, thresholds), group.parts)
            yield from map(Merged, _in_batches(patched))
        for part in group.parts:
            self._store.drop(part.held)

    def _exact_thresholds(
        self, group: Group, tensor: TensorInputs | None, run: Map
    ) -> tuple[list[float | None], bool]:
        """The thresholds of a group, of one tensor or of all (None); and whether one lay outside its bracket,
        so that passes over the tensors had to find it, and they must be merged again."""
        thresholds, missed = group.thresholds(run)
        if not missed:
            return thresholds, False
        exact = self._survey.exact_thresholds(tensor, group.parts[0].terms, missed, run)
        return [x if e is None else e for x, e in zip(thresholds, exact, strict=True)], True

    def _settle(self, group: Group, part: Part, thresholds) -> tuple[Array, Array, Tally]:
        terms = close(part.terms, thresholds)
        positions, merged, change = group.settle(part, terms)
        tally = replace(part.tally)
        tally.add(change)
        tally.thresholds = self._saliencies(terms)
        return positions, merged, tally

    def _patch(self, group: Group, part: Part, thresholds: list[float | None]) -> tuple[Segment, Tally]:
        positions, merged, tally = self._settle(group, part, thresholds)
        self._sink.patch(part.segment, positions, merged)
        return part.segment, tally
