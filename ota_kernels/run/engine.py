"""Runs a merge over tensors: decide, merge, settle. Knows neither files nor the command line.

    tensors --units--> worker threads: terms (small tensors), kernel per tile --> sink.write --> Merged,
    Pending all tiles of a group --> exact thresholds --> undecided elements merged again --> sink.patch -->
    Merged a threshold outside its bracket --> exact thresholds by histograms --> the group's tiles once
    more

A tensor that is one tile is decided by the worker that merges it (statistics of more than a chunk apart); a
larger one once, by all workers, before its first tile. A matrix that is merged whole (run/matrices.py) is one
worker's. A group is the whole model, or one tensor
(`density_scope`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol, TypeVar

from ..backends import Backend
from ..select.pending import Pending, Store
from ..select.settle import Group
from ..tensors import array as resident
from ..tensors.array import Array
from ..tensors.result import Counts, MergeStats
from ..tensors.segment import CHUNK, Segment, units
from ..tensors.terms import Terms, close, is_open
from ..tensors.tile import TensorInputs
from . import on_device
from .bundles import Bundle, kept_by_member
from .decide import Decider
from .found import ModelFound, open_thresholds
from .ranks import ALONE, Ranks
from .rules import Rules

Range = tuple[int, int, int]  # tensor number, first element, end


class Sink(Protocol):
    """Where merged tiles go, on a device where they are resident. Called from worker threads, `wants` from
    the one that hands tiles to them."""

    def room(self, segment: Segment, nbytes: int) -> Array:
        """uint8[nbytes] to merge into, aligned to 8 bytes; used by one thread until `write` returns."""

    def write(self, segment: Segment, merged: Array, final: bool) -> None:
        """final: whether nothing of it will be patched."""

    def patch(self, segment: Segment, positions: Array, merged: Array) -> None:
        """Replace the elements at `positions` (integers[m], in the segment) by merged (uint8, m elements)."""

    def wants(self, tensor: TensorInputs, segment: Segment) -> None:
        """The segment's inputs will be read soon."""

    def done_with(self, tile: TensorInputs) -> None:
        """The tile's inputs will not be read again."""


class Merged(NamedTuple):
    """Segments whose values are final."""

    done: list[tuple[Segment, Counts]]


class Decided(NamedTuple):
    """The exact score thresholds of a group, per expert (None: not a bracket). index: the group's tensor,
    None for the whole model; repeat: a threshold lay outside its bracket: all segments are merged again."""

    index: int | None
    thresholds: list[float | None]
    repeat: bool = False


# A Pending is to be recorded once its elements are in the store's file: then it comes a second time, if it
# was in memory before.
Event = Merged | Pending | Decided

Result = TypeVar("Result")


class _Tile(NamedTuple):
    """A segment to merge by these terms; alone: it is a whole tensor, decided right before it is merged."""

    segment: Segment
    tensor: TensorInputs
    terms: Terms
    alone: bool


def _in_batches(results: Iterable[Result], rules: Rules) -> Iterator[list[Result]]:
    """As many at a time as come within a second: recording them waits for the disk."""
    batch: list[Result] = []
    begun = rules.clock()
    for result in results:
        batch.append(result)
        if rules.clock() - begun > rules.batch_seconds:
            yield batch
            batch, begun = [], rules.clock()
    if batch:
        yield batch


class Engine:
    """Merges tensors (by number) into a sink, in units of tile_elements.

    found: what was found of the whole model; store: holds undecided elements; decided: thresholds of groups
    that were decided before, to which a run adds its own; bundles: what stands for several tensors, by
    number; ranks: who merges other ranges of the same tensors: thresholds over the model are decided
    together, undecided elements stay where they arose.
    """

    def __init__(
        self,
        tensors: Mapping[int, TensorInputs],
        sink: Sink,
        *,
        decider: Decider,
        found: ModelFound,
        tile_elements: int,
        store: Store,
        decided: Mapping[int | None, list[float | None]] | None = None,
        bundles: Mapping[int, Bundle] | None = None,
        ranks: Ranks = ALONE,
        backend: Backend | None = None,
    ) -> None:
        self._tensors, self._sink, self._store, self._bundles = tensors, sink, store, bundles or {}
        self._tile_elements, self._decider, self._found = tile_elements, decider, found
        self._backend, self._pool = backend or decider.backend, decider.pool
        self._ranks = ranks
        self._groups: dict[int | None, Group] = {}
        self.decided = dict(decided or {})
        self._rules = decider.rules
        self._checkpointed = self._rules.clock()
        self._finds_together = on_device.finds_together(decider)
        # Elements of a tensor that one worker decides. A sample is quick, other statistics want all workers.
        local = decider.brackets and not decider.model_scope
        self._alone = tile_elements if local else min(CHUNK, tile_elements)

    def run(self, todo: Iterable[Range] | None = None, pending: Iterable[Pending] = ()) -> Iterator[Event]:
        """Merge the ranges `todo` (default: everything) and settle what an earlier process left pending.
        Yields what happens, in an order that can be recorded. Raises InputError where an input is not
        finite."""
        for left in pending:
            yield from self._restore(left)
        everything = ((i, 0, t.numel) for i, t in self._tensors.items())
        for results in self._merge(everything if todo is None else todo):
            if done := [r for r in results if not isinstance(r[0], Pending)]:
                yield Merged(done)
            for result in results:
                if isinstance(result[0], Pending):
                    yield from self._add(*result)
        if self._settles_together:
            self._groups.setdefault(None, self._new_group(None))
        for key in list(self._groups):
            yield from self._finish(key)

    @property
    def _settles_together(self) -> bool:
        """Whether other ranks may have tiles whose thresholds are this one's."""
        opened = any(bracket is not None for bracket in self._found.brackets)
        return self._ranks.several and opened and None not in self.decided

    def _merge(self, todo: Iterable[Range]) -> Iterator[list[tuple]]:
        """The ranges' units in order: per segment (it, its final counts), or (what is pending of it, tensor,
        terms)."""
        ready: dict[int, tuple[TensorInputs, Terms]] = {}

        def ranges() -> Iterator[Range]:
            for index, start, stop in todo:
                numel = self._tensors[index].numel
                alone = stop - start == numel <= self._alone
                if not alone and index not in ready:
                    ready[index] = self._decide(index)
                yield index, start, stop

        def with_terms(unit: list[Segment]) -> list[tuple[Segment, tuple[TensorInputs, Terms] | None]]:
            given = [(segment, ready.get(segment.index)) for segment in unit]
            for segment, decided in given:
                tensor = decided[0] if decided else self._tensors[segment.index]
                self._sink.wants(tensor, segment)
                if segment.stop == tensor.numel:
                    ready.pop(segment.index, None)  # units in flight hold what they need
            return given

        def merge_unit(unit) -> list[tuple]:
            if all(self._tensors[segment.index].is_resident for segment, _ in unit):
                return self._merge_together(unit)
            merged = (self._merge_together([each]) for each in unit)
            return list(itertools.chain.from_iterable(merged))

        def whole(index: int) -> int:
            if index not in ready:
                return 1
            tensor, terms = ready[index]
            matrix = self._decider.matrices.shape(self._tensors[index])
            return math.prod(matrix) if matrix else math.lcm(terms.whole, tensor.columns)

        cut = units(ranges(), self._tile_elements, whole)
        if self._unbounded:
            cut = filter(None, [list(itertools.chain.from_iterable(cut))])
        yield from self._pool.together(merge_unit, map(with_terms, cut))

    @property
    def _unbounded(self) -> bool:
        """Whether all tiles are merged together: where nothing of them waits on a device for the host."""
        known = not self._decider.brackets and all(t.is_resident for t in self._tensors.values())
        return known or self._finds_together

    def _key(self, index: int) -> int | None:
        return None if self._decider.model_scope else index

    def _decide(self, index: int, whole: bool = False) -> tuple[TensorInputs, Terms]:
        tensor = self._decider.prepare(self._tensors[index])
        finds = self._finds_together if self._decider.model_scope else whole
        terms = self._decider.terms(tensor, self._found, finds)
        known = self.decided.get(self._key(index))
        return tensor, terms if known is None else close(terms, known)

    def _merge_together(
        self, unit: Sequence[tuple[Segment, tuple[TensorInputs, Terms] | None]]
    ) -> list[tuple]:
        """Segments of one thread, or all that a device is given at once. A tensor that comes without terms is
        one tile: it is decided here, and where densities are per tensor settled before it is written."""
        results, tiles = [], []
        for segment, given in unit:
            tile = _Tile(segment, *(given or self._decide(segment.index, True)), given is None)
            if self._decider.matrices.shape(self._tensors[segment.index]):
                results += self._merge_matrices(*tile[:3])
            else:
                tiles.append(tile)
        merged = zip(tiles, self._with_thresholds(tiles, self._run_kernel(tiles)), strict=True)
        return results + [self._written(tile, *result) for tile, result in merged]

    def _written(self, tile: _Tile, room: Array, result: Counts | Pending) -> tuple:
        segment, tensor, terms, alone = tile
        if alone and isinstance(result, Pending) and not self._decider.model_scope:
            group = self._new_group(segment.index)
            group.add(result, tensor, terms)
            thresholds, missed = self._exact_thresholds(group, tensor)
            self.decided[segment.index] = thresholds
            if missed:
                again = tile._replace(terms=close(terms, thresholds))
                ((room, result),) = self._run_kernel([again])
                result.repeats = 1
            else:
                positions, merged, result = self._settle(group, result, thresholds)
                resident.scatter(room, positions, merged, tensor.out_dtype.itemsize)
        self._sink.write(segment, room, not isinstance(result, Pending))
        stored = tensor.stored
        self._sink.done_with(stored if alone else stored.slice(segment.start, segment.stop))
        return (result.owned(), tensor, terms) if isinstance(result, Pending) else (segment, result)

    def _with_thresholds(
        self, tiles: Sequence[_Tile], merged: Sequence[tuple[Array, Counts | Pending | MergeStats]]
    ) -> list[tuple[Array, Counts | Pending]]:
        """The final counts where the backend was to find thresholds, too."""
        groups: dict[int | None, list[int]] = {}
        for i, (_, result) in enumerate(merged):
            if isinstance(result, MergeStats):
                groups.setdefault(self._key(tiles[i].segment.index), []).append(i)
        final = dict(enumerate(merged))
        for key, group in groups.items():
            counts = self._found_thresholds(key, [tiles[i] for i in group], [merged[i][1] for i in group])
            final |= {i: (merged[i][0], of_tile) for i, of_tile in zip(group, counts, strict=True)}
        return list(final.values())

    def _found_thresholds(
        self, key: int | None, tiles: Sequence[_Tile], stats: Sequence[MergeStats]
    ) -> list[Counts]:
        """Of the tiles of a group whose thresholds the backend was to find."""
        tensor, experts = None if key is None else tiles[0].tensor, tiles[0].terms.experts
        thresholds = list(stats[0].thresholds)
        missed = [t for t, e in enumerate(experts) if e.wanted and thresholds[t] is None]
        if missed:
            self._rules.before("missed", None)
            exact = self._decider.exact_thresholds(tensor, missed)
            thresholds = [x if e is None else e for x, e in zip(thresholds, exact, strict=True)]
        self.decided[key] = thresholds
        closed = [tile._replace(terms=close(tile.terms, thresholds)) for tile in tiles]
        if not missed:
            given = (tile.tensor.slice(tile.segment.start, tile.segment.stop) for tile in closed)
            return [self._counted(*of_tile) for of_tile in zip(closed, given, stats, strict=True)]
        counts = [of_tile for _, of_tile in self._run_kernel(closed)]
        for of_tile in counts:
            of_tile.repeats = 1
        return counts

    def _merge_matrices(
        self, segment: Segment, tensor: TensorInputs, terms: Terms
    ) -> Iterator[tuple[Segment, Counts]]:
        """A segment that is one matrix, or several."""
        index, matrices = segment.index, self._decider.matrices
        stored, thresholds = self._tensors[index], self._saliencies(tensor, terms)
        for matrix in matrices.of(stored, tensor, terms, segment.start, segment.stop):
            start, size = matrix.start, matrix.numel
            whole = Segment(index, start, start + size)
            self._rules.before("tile", whole)
            given, own, counts = matrices.merge(matrix, thresholds)
            for a in range(0, size, self._tile_elements):
                tile = given.slice(a, min(a + self._tile_elements, size))
                part = Segment(index, start + a, start + a + tile.numel)
                room = self._sink.room(part, tile.numel * tile.out_dtype.itemsize)
                counts.overflow += self._backend.merge(tile, own, room).overflow
                self._sink.write(part, room, True)
            self._sink.done_with(stored.stored.slice(start, start + size))
            yield whole, counts

    def _run_kernel(self, tiles: Sequence[_Tile]) -> list[tuple[Array, Counts | Pending | MergeStats]]:
        """The merged tiles, and the final counts of each or what is pending of it, or the thresholds that
        were found."""
        given = []
        for segment, tensor, terms, _ in tiles:
            self._rules.before("tile", segment)
            tile = tensor.slice(segment.start, segment.stop)
            given.append((tile, terms, self._sink.room(segment, tile.numel * tile.out_dtype.itemsize)))
        if given and given[0][0].is_resident:
            merged = self._backend.merge_all(given)
        else:
            merged = [self._backend.merge(*each) for each in given]
        return [
            (each[2], self._counted(tile, each[0], stats))
            for tile, each, stats in zip(tiles, given, merged, strict=True)
        ]

    def _counted(self, of: _Tile, tile: TensorInputs, stats: MergeStats) -> Counts | Pending | MergeStats:
        self._decider.check(tile, stats.nonfinite)
        if any(e.wanted for e in of.terms.experts):
            return stats
        counts = Counts.of(stats, self._saliencies(of.tensor, of.terms))
        if not any(map(is_open, of.terms.experts)):
            self._count_members(counts, of.segment, tile, of.terms)
            return counts
        return Pending.of(of.segment, of.tensor, stats, counts)

    def _count_members(self, counts: Counts, segment: Segment, tile: TensorInputs, terms: Terms) -> None:
        """What is counted of each tensor of a bundle, by exact thresholds."""
        bundle = self._bundles.get(segment.index)
        if bundle is not None:
            counts.members = kept_by_member(self._backend, tile, terms, bundle.ends, segment)

    def _saliencies(self, tensor: TensorInputs, terms: Terms) -> list[float | None]:
        return [self._decider.saliency_threshold(tensor, terms, t) for t in range(len(terms.experts))]

    def _new_group(self, index: int | None) -> Group:
        tensor = None if index is None else self._tensors[index]
        elements = self._decider.elements if tensor is None else tensor.numel
        selections, rules = self._decider.selections(tensor), self._rules
        together = {}
        if index is None and self._settles_together:
            brackets = open_thresholds(self._found, self._decider.selections())
            together = {"brackets": brackets, "total": self._ranks.total}
        return Group(selections, elements, self._backend, self._store, rules.few, rules.batch, **together)

    def _group(self, index: int) -> Group:
        key = self._key(index)
        if key not in self._groups:
            self._groups[key] = self._new_group(key)
        return self._groups[key]

    def _add(self, pending: Pending, tensor: TensorInputs, terms: Terms) -> Iterator[Event]:
        """Keep a tile's undecided elements until its group is complete."""
        pending = self._store.put(pending)
        group = self._group(pending.segment.index)
        group.add(pending, tensor, terms)
        yield pending
        if self._rules.clock() - self._checkpointed > self._rules.checkpoint_seconds:
            yield from self.checkpoint()
        yield from self._finish_if_complete(group, pending.segment.index)

    def _finish_if_complete(self, group: Group, index: int) -> Iterator[Event]:
        """One tensor's group is settled after its last tile, the model's after all."""
        if not self._decider.model_scope and group.merged == self._tensors[index].numel:
            yield from self._finish(index)

    def checkpoint(self) -> Iterator[Event]:
        """Move the undecided elements in the host's memory to the store's file: a killed merge need not find
        them again."""
        self._checkpointed = self._rules.clock()
        for group in self._groups.values():
            for i, pending in enumerate(group.pending):
                if pending.memory is not None and not pending.is_resident:
                    group.pending[i] = self._store.spill(pending)
                    yield group.pending[i]

    def _restore(self, pending: Pending) -> Iterator[Event]:
        index = pending.segment.index
        tensor = self._decider.prepare(self._tensors[index])
        terms = self._decider.terms(tensor, self._found)
        self._store.restore(pending, tensor)
        thresholds = self.decided.get(self._key(index))
        group = self._group(index) if thresholds is None else self._new_group(self._key(index))
        group.add(pending, tensor, terms)
        if thresholds is None:
            yield from self._finish_if_complete(group, index)
        else:
            yield Merged([self._patch(group, pending, thresholds)])

    def _finish(self, key: int | None) -> Iterator[Event]:
        """All tiles of a group are merged: decide, and patch what is undecided or merge them again."""
        group = self._groups.pop(key)
        tensor = None if key is None else group.tensor(group.pending[0])
        thresholds, missed = self._exact_thresholds(group, tensor)
        yield Decided(key, thresholds, missed)
        self.decided[key] = thresholds
        if missed:
            yield from map(Merged, self._merge(sorted(p.segment for p in group.pending)))
        else:
            patched = self._pool.run(lambda p: self._patch(group, p, thresholds), group.pending)
            yield from map(Merged, _in_batches(patched, self._rules))
        for pending in group.pending:
            self._store.drop(pending)

    def _exact_thresholds(self, group: Group, tensor: TensorInputs | None) -> tuple[list[float | None], bool]:
        """The thresholds of a group, of one tensor or of all (None); and whether one lay outside its bracket,
        so that passes over the tensors had to find it, and they must be merged again."""
        thresholds, missed = group.thresholds(self._pool.run)
        if not missed:
            return thresholds, False
        self._rules.before("missed", None)
        exact = self._decider.exact_thresholds(tensor, missed)
        return [x if e is None else e for x, e in zip(thresholds, exact, strict=True)], True

    def _settle(self, group: Group, pending: Pending, thresholds) -> tuple[Array, Array, Counts]:
        terms = close(group.terms(pending), thresholds)
        positions, merged, change = group.settle(pending, terms)
        counts = replace(pending.counts)
        counts.add(change)
        tensor, segment = group.tensor(pending), pending.segment
        counts.thresholds = self._saliencies(tensor, terms)
        if segment.index in self._bundles:
            self._count_members(counts, segment, tensor.slice(segment.start, segment.stop), terms)
        return positions, merged, counts

    def _patch(
        self, group: Group, pending: Pending, thresholds: list[float | None]
    ) -> tuple[Segment, Counts]:
        positions, merged, counts = self._settle(group, pending, thresholds)
        self._rules.before("patch", pending.segment)
        self._sink.patch(pending.segment, positions, merged)
        return pending.segment, counts
