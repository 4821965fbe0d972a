"""The thresholds of a grid: sampled, counted, settled.

A small sample says where each threshold will be, as a few high halves of the scores' bits. One pass then
takes the histogram of all high halves and, at the predicted ones, the low halves by tensor group. The
histogram proves which predictions were right; what was not predicted takes a further pass. The sample decides
how many passes there are, never a number.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ... import backends
from ...errors import RecipeError
from ...io.pages import release
from ...planning.inputs import Inputs
from ...planning.outputs import MERGE
from ...planning.plan import PROCESS_BYTES, low_rank_bytes, pinned_bytes
from ...select import thresholds as decide
from ...select.bracket import cluster_count
from ...select.sample import CLUSTER, sample
from ...sizes import format_bytes
from ...tensors.segment import units
from ...tensors.terms import Terms, score_bits
from ...tensors.tile import TensorInputs
from ..decide import Decider
from ..found import scores_of
from ..job import Progress
from ..pool import Pool
from ..readahead import ReadAhead
from .counts import BINS, ENTRY_BYTES, Collected, Counted, Pass, low_halves
from .expected import SampledScores
from .groups import Groups

logger = logging.getLogger(__name__)

_HISTOGRAM_BYTES = 8 * BINS

_SAMPLE_BATCHES = 64  # the sample holds the curvature factors of this share of the model at a time
_ESTIMATE_MARGIN = 1.25  # expected collections grow by this before they are compared with the room there is

_TEMPORARY_BYTES = {"native": 24, "reference": 72, "triton": 24}  # per element of a tile in flight


@dataclass
class Target:
    """A threshold that is looked for: its high half, its score, and the kept elements of each group
    (int64[groups]) as they become known."""

    expert: int
    selection: decide.Selection
    digit: decide.Digit | None = None
    threshold: float | None = None
    kept: np.ndarray | None = None

    @property
    def low(self) -> int:
        """The low half of a threshold that is known."""
        return score_bits(self.threshold) & 0xFFFF


@dataclass(frozen=True)
class Reading:
    """How inputs are read: time and memory, never a number. Tests take others than the defaults.

    sample: as select.sample; tile, smallest: elements of a tile (its histograms, 1 MB, and its scores stay in
    a core's cache together); collected: what keeps low halves; collects: whether it is tried.
    """

    sample: Callable[..., list[np.ndarray]] = sample
    tile: int = 1 << 18
    smallest: int = 1 << 14
    collected: Callable[[int, int, int], Collected] = Collected
    collects: bool = True


READING = Reading()


class Search:
    """All targets of a recipe, and the passes that settle them."""

    def __init__(
        self,
        inputs: Inputs,
        grid: list[float],
        masses: list[float],
        backend: backends.Backend,
        memory_limit: int,
        pool: Pool,
        progress: Progress,
        reading: Reading = READING,
    ) -> None:
        self.reading = reading
        self.inputs, self.grid, self.masses = inputs, grid, masses
        self.pool, self.progress = pool, progress
        self.backend = backend
        self.passes = 0
        self.experts = len(inputs.recipe.models)
        entries = [e for e in inputs.entries if e.is_computed]
        everything = [e.inputs() for e in entries]
        of_each = {e.name: e.settings for e in entries}
        self.decider = Decider(inputs.method, everything, of_each, self.backend, pool, release)
        self.read_ahead = ReadAhead(everything)
        part = [self.decider.takes_part(tensor) for tensor in everything]
        self.tensors = [tensor for tensor, takes_part in zip(everything, part, strict=True) if takes_part]
        self.elements = sum(t.numel for t in self.tensors)
        self.always_kept = sum(
            e.numel
            for e, takes_part in zip(entries, part, strict=True)
            if e.action == MERGE and not takes_part
        )
        self.groups = Groups(self.tensors)
        self._find_room(memory_limit)
        self.targets = [self._target(t, s) for t in range(self.experts) for s in self._selections()]

    def _selections(self) -> Iterator[decide.Selection]:
        yield from (decide.Selection("density" if x < 1 else "all", x) for x in self.grid)
        yield from (decide.Selection("mass", x) for x in self.masses)

    def _target(self, t: int, selection: decide.Selection) -> Target:
        if selection.rule == "all":
            return Target(t, selection, threshold=decide.KEEP_ALL, kept=self.groups.sizes)
        return Target(t, selection)

    def _find_room(self, memory_limit: int) -> None:
        """Shares the memory limit out between tiles in flight and what a pass keeps; RecipeError if it is too
        small. tile: elements; room: bytes."""
        threads, name = self.pool.threads, self.backend.NAME
        widest = max((_input_bytes(t) // max(t.numel, 1) for t in self.tensors), default=0)
        in_flight = threads * (_TEMPORARY_BYTES[name] + widest) + pinned_bytes(self.backend, threads, widest)
        fixed = PROCESS_BYTES[name]
        if self.decider.needs.svd:
            fixed += low_rank_bytes(t.shape for t in self.tensors)
        fixed += 2 * _HISTOGRAM_BYTES * (self.experts + threads)
        least = self.experts * (len(self.grid) + len(self.masses)) * _HISTOGRAM_BYTES
        need = fixed + least + in_flight * self.reading.smallest
        if memory_limit < need:
            raise RecipeError(
                f"a memory limit of {format_bytes(memory_limit)} is too small for these densities on "
                f"{threads} threads: give it --memory-limit {math.ceil(need / 1e6)}MB, a shorter --grid, or "
                "lower --threads"
            )
        spare = memory_limit - fixed - least
        tile, smallest = self.reading.tile, self.reading.smallest
        self.tile = min(tile, max(smallest, spare // 2 // in_flight))
        self.room = memory_limit - fixed - in_flight * self.tile

    def run(self) -> None:
        """Settle every target: one pass where the sample was right and there is room, three at most."""
        wanted, expected = self._predict()
        read = self._read(wanted, expected)
        for target in self._unsettled():
            t = target.expert
            answer = decide.first_digit(target.selection, read.counts[t], read.lows[t])
            if isinstance(answer, decide.Digit):
                target.digit = answer
            else:
                target.threshold, target.kept = answer, np.zeros_like(self.groups.sizes)
        self._settle(read)
        while unsettled := self._unsettled():
            logger.info("%d thresholds or their splits need a further pass", len(unsettled))
            prefixes = [{x.digit.prefix for x in unsettled if x.expert == t} for t in range(self.experts)]
            wanted = [np.array(sorted(p), np.uint32) for p in prefixes]
            # Scores of 0 are not collected; each other score of bin 0 adds to its sum of low halves.
            expected = sum(
                min(int(read.counts[t][p]), int(read.lows[t][p])) if p == 0 else int(read.counts[t][p])
                for t in range(self.experts)
                for p in prefixes[t]
            )
            read = self._read(wanted, expected)
            self._settle(read)

    def _terms(self, tile: TensorInputs) -> Terms:
        """By which scores are computed, also where the recipe selects nothing."""
        return scores_of(self.experts, tile)

    def _unsettled(self) -> list[Target]:
        return [target for target in self.targets if target.kept is None]

    def _predict(self) -> tuple[list[np.ndarray], float]:
        """The high halves to look into, per expert, and how many scores they are expected to hold."""
        self.progress.stage("sample", 0)
        if self.elements == 0:
            return [_united([])] * self.experts, 0.0
        brackets: list[list[np.ndarray]] = []
        wanted, expected = [], 0.0
        for t, rows in enumerate(self._sample()):
            found = SampledScores(rows)
            brackets.append([found.bracket(x.selection) for x in self._unsettled() if x.expert == t])
            wanted.append(_united(brackets[t]))
            expected += _ESTIMATE_MARGIN * self.elements * found.share_at(wanted[t])
        if self._fits(wanted, expected):
            return wanted, expected
        # The likeliest high halves of each target, as many as there is room to count.
        each = self.room // _HISTOGRAM_BYTES // max(sum(map(len, brackets)), 1)
        return [_united([b[:each] for b in of_expert]) for of_expert in brackets], expected

    def _sample(self) -> list[np.ndarray]:
        """Scores of random runs, float32[clusters, elements] per expert; a batch of tensors at a time."""
        # The parts and their whole; one expert in order.
        bytes_per_cluster = CLUSTER * (8 * self.experts + 64)
        runs = max(min(cluster_count(self.elements), self.room // 2 // bytes_per_cluster), 2)

        spread, found, experts = self.read_ahead.is_idle, [], range(self.experts)
        for batch in _batches(self.tensors, self.elements // _SAMPLE_BATCHES):
            prepared = [self.decider.prepare(tensor) for tensor in batch]
            count = math.ceil(runs * sum(t.numel for t in batch) / self.elements)
            found.append(
                self.reading.sample(
                    prepared, count, experts, self._terms, self.backend, self.pool.run, release, spread
                )
            )
        return [np.concatenate(of_expert) for of_expert in zip(*found, strict=True)]

    def _fits(self, wanted: list[np.ndarray], expected: float) -> bool:
        """Whether that many low halves can be collected."""
        tiles = self.elements // self.tile + len(self.tensors)
        of_tiles = tiles * sum(ENTRY_BYTES + 4 * (w.size + 1) for w in wanted)
        return self.reading.collects and 2 * expected + of_tiles <= self.room

    def _read(self, wanted: list[np.ndarray], expected: float) -> Pass:
        """One pass over all tensors."""
        groups = len(self.groups)
        read = Pass(
            wanted,
            [np.zeros((groups, w.size), np.int64) for w in wanted],
            [np.zeros(BINS, np.int64) for _ in wanted],
            [np.zeros(BINS, np.int64) for _ in wanted],
            self.reading.collected(self.experts, groups, self.room),
        )
        if not self._fits(wanted, expected):
            found = [x for x in self._unsettled() if x.threshold is not None]
            known = [(x.expert, read.slot(x.expert, x.digit.prefix), x.low) for x in found]
            read.sink = Counted(wanted, groups, known)
        self.passes += 1
        self.progress.stage(f"pass {self.passes}", sum(map(_input_bytes, self.tensors)))
        member = np.zeros((self.experts, BINS), bool)
        for t, prefixes in enumerate(wanted):
            member[t, prefixes] = True
        lock = threading.Lock()

        def of_unit(unit: list[tuple[TensorInputs, int, int]]) -> int:
            for tile, start, group in unit:
                for t in range(self.experts):
                    self._add(read, lock, member[t], tile, start, group, t)
                release(tile)
            return sum(_input_bytes(tile) for tile, _, _ in unit)

        for nbytes in self.pool.run(of_unit, self._units()):
            self.progress.advance(nbytes)
        return read

    def _units(self) -> Iterator[list[tuple[TensorInputs, int, int]]]:
        """Units of work: (prepared tile, flat index of its first element, its tensor's group)."""
        prepared: dict[int, TensorInputs] = {}

        def ranges() -> Iterator[tuple[int, int, int]]:
            for index, tensor in enumerate(self.tensors):
                prepared[index] = self.decider.prepare(tensor)
                yield index, 0, tensor.numel

        for unit in units(ranges(), self.tile):
            tiles = [(prepared[i].slice(start, stop), start, self.groups.of[i]) for i, start, stop in unit]
            for tile, _, _ in tiles:
                self.read_ahead(tile.buffers)
            yield tiles
            for i, _, stop in unit:
                if stop == self.tensors[i].numel:
                    del prepared[i]

    def _add(
        self,
        read: Pass,
        lock: threading.Lock,
        member: np.ndarray,
        tile: TensorInputs,
        start: int,
        group: int,
        t: int,
    ) -> None:
        """Count expert t's scores of one tile."""
        terms = self._terms(tile)
        counts, lows = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
        bad = self.backend.histogram(tile, t, terms, False, -1, counts, lows)
        self.decider.check(tile, bad)
        above = tile.numel - np.cumsum(counts)[read.wanted[t]]
        found = None
        if counts[read.wanted[t]].any():
            scores, _ = self.backend.scores(tile, t, terms)
            found = low_halves(scores, read.wanted[t], member)
        with lock:  # sums of integers: their order does not matter
            read.counts[t] += counts
            read.lows[t] += lows
            read.above[t][group] += above
            if found is not None:
                read.sink.add(t, group, *found)

    def _settle(self, read: Pass) -> None:
        for target in self._unsettled():
            t, slot = target.expert, read.slot(target.expert, target.digit.prefix)
            if slot is None:
                continue
            if target.threshold is None:
                lows = read.sink.low_counts(t, slot)
                if lows is None:
                    continue
                lows[0] += read.counts[t][target.digit.prefix] - lows.sum()  # scores of 0, which no sink gets
                target.threshold = decide.second_digit(target.selection, target.digit, lows)
            in_bin = read.sink.at_least(t, slot, target.low)
            if in_bin is not None:
                target.kept = read.above[t][:, slot] + in_bin


def _united(prefixes: Sequence[np.ndarray]) -> np.ndarray:
    """All high halves of some arrays: uint32, ascending, each once."""
    return np.unique(np.concatenate([*prefixes, np.zeros(0, np.uint32)]))


def _batches(tensors: Sequence[TensorInputs], elements: int) -> Iterator[list[TensorInputs]]:
    """Neighbouring tensors, in batches of at least so many elements; the rest is the last batch."""
    batch: list[TensorInputs] = []
    filled = 0
    for tensor in tensors:
        batch.append(tensor)
        filled += tensor.numel
        if filled > elements:
            yield batch
            batch, filled = [], 0
    if filled:
        yield batch


def _input_bytes(tile: TensorInputs) -> int:
    return sum(buffer.data.nbytes for buffer in tile.buffers)
