"""Runs a merge over tensors: survey, decide, merge. Knows neither files nor the command line.

    tensors --units--> worker threads: terms (small tensors), kernel per tile --> sink.write --> Tally

A tensor that is one tile of at most one chunk is decided by the worker that merges it; a larger one once, by
all workers, before its first tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Protocol

import numpy as np

from .factors import CHUNK
from .formula import Terms
from .pool import Pool
from .survey import ModelDecisions, Survey
from .tensors import TensorInputs
from .tiling import Segment, units

Range = tuple[int, int, int]  # tensor index, first element, end


class Sink(Protocol):
    """Where merged tiles go. Called from worker threads."""

    def room(self, segment: Segment, nbytes: int) -> np.ndarray:
        """uint8[nbytes] to merge into, aligned to 8 bytes; used by one thread until `write` returns."""

    def write(self, segment: Segment, merged: np.ndarray) -> None: ...

    def done_with(self, tile: TensorInputs) -> None:
        """The tile's inputs will not be read again."""


@dataclass
class Tally:
    """What a merge counted for one tensor: per expert the kept edits and the saliency threshold (None where
    everything is kept)."""

    kept: list[int]
    unkept: int = 0
    overflow: int = 0
    repaired: int = 0
    thresholds: list[float | None] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Count another part of the same tensor."""
        self.kept = [a + b for a, b in zip(self.kept, other.kept, strict=True)]
        self.unkept += other.unkept
        self.overflow += other.overflow
        self.repaired += other.repaired
        self.thresholds = other.thresholds


Done = list[tuple[Segment, Tally]]


def merge_tensors(
    tensors: Sequence[TensorInputs],
    sink: Sink,
    *,
    backend: ModuleType,
    pool: Pool,
    tile_elements: int,
    survey: Survey,
    decisions: ModelDecisions,
    todo: Iterable[Range] | None = None,
) -> Iterator[Done]:
    """Merge the ranges `todo` (default: everything), yielding each finished unit in order.

    Raises InputError where an input is not finite.
    """
    ready: dict[int, tuple[TensorInputs, Terms]] = {}

    def decide(index: int, run) -> tuple[TensorInputs, Terms]:
        tensor = survey.prepare(tensors[index], run)
        return tensor, survey.terms(tensor, decisions, run)

    def ranges() -> Iterator[Range]:
        everything = ((i, 0, t.numel) for i, t in enumerate(tensors))
        for index, start, stop in everything if todo is None else todo:
            if tensors[index].numel > min(CHUNK, tile_elements) and index not in ready:
                ready[index] = decide(index, pool.run)
            yield index, start, stop

    def with_terms(unit: list[Segment]) -> list[tuple[Segment, tuple[TensorInputs, Terms] | None]]:
        given = [(segment, ready.get(segment.index)) for segment in unit]
        for index, _, stop in unit:
            if stop == tensors[index].numel:
                ready.pop(index, None)  # units in flight hold what they need
        return given

    def merge_unit(unit) -> Done:
        return [(s, merge_segment(s, *(given or decide(s.index, map)))) for s, given in unit]

    def merge_segment(segment: Segment, tensor: TensorInputs, terms: Terms) -> Tally:
        tile = tensor.slice(segment.start, segment.stop)
        room = sink.room(segment, tile.numel * tile.out_dtype.itemsize)
        stats = backend.merge(tile, terms, room)
        survey.check(tile, segment.start, stats.nonfinite)
        sink.write(segment, room)
        sink.done_with(tile)
        thresholds = [survey.saliency_threshold(terms, t) for t in range(len(terms.experts))]
        return Tally(list(stats.kept), stats.unkept, stats.overflow, stats.repaired, thresholds)

    yield from pool.run(merge_unit, (with_terms(unit) for unit in units(ranges(), tile_elements)))
