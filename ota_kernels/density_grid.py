"""Which density to take: thresholds, kept counts and their split for a whole grid, from one read.

A small sample says where each threshold will be, as a few high halves of the scores' bits (see decide.py).
One pass then takes the histogram of all high halves and, at the predicted ones, the low halves by tensor
group. The histogram proves which predictions were right; what was not predicted takes a further pass. The
sample decides how many passes there are, never a number.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from . import backends, decide
from .bracket import cluster_count
from .errors import RecipeError
from .formula import ExpertTerms, saliency_of_score, score_bits
from .inputs import COPY, MERGE, Inputs
from .io.reader import release
from .job import Options, Progress, Silent, as_recipe
from .planning import PROCESS_BYTES, memory_limit_of, pinned_bytes, worker_threads
from .pool import Pool
from .recipe import Recipe
from .roles import DETAILED_ROLES, detailed_role, layer_of
from .sampling import CLUSTER, are_cached, sample
from .survey import Survey, score_scale_of
from .tensors import TensorInputs
from .tiling import units
from .units import format_bytes

logger = logging.getLogger(__name__)

DEFAULT_GRID = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
DEFAULT_MASSES = (0.5, 0.8, 0.9, 0.95, 0.99)
NO_LAYER = "none"  # the layer of embeddings, final norm and output

_BINS = 1 << 16
_HISTOGRAM_BYTES = 8 * _BINS
_OCTAVE = 128  # high halves of one power of two

_SAMPLE_BATCHES = 64  # the sample holds the curvature factors of this share of the model at a time
_STANDARD_ERRORS = 4.0
_ESTIMATE_MARGIN = 1.25  # expected collections grow by this before they are compared with the room there is

# A tile's histograms (1 MB) and its scores stay in a core's cache together.
_TILE_ELEMENTS, _SMALLEST_TILE = 1 << 18, 1 << 14
_TEMPORARY_BYTES = {"native": 24, "reference": 72, "triton": 24}  # per element of a tile in flight
_ENTRY_BYTES = 256  # Python's share of one collected tile


def densities(
    recipe: Recipe | str | os.PathLike | dict,
    grid: Iterable[float | str] = DEFAULT_GRID,
    masses: Iterable[float | str] = DEFAULT_MASSES,
    *,
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    memory_limit: int | str | None = None,
    progress: Progress | None = None,
) -> dict:
    """What each density of `grid` keeps of every expert of an `ota` recipe, with one threshold per expert
    over the whole model; the recipe's own densities and thresholds play no part. Exact: ties are kept.

    recipe: a YAML file, a mapping of the same form, or a Recipe; grid, masses: numbers in (0, 1]; backend,
    device, threads, memory_limit: as in `job.Options`. Returns a dict that JSON can hold:

    elements: how many take part; always_kept: elements of tensors without curvature beside others that have
    it (`missing_curvature: uniform`), which every density keeps and no count below includes; roles, layers:
    elements by what a tensor is ("q", "norms", ...) and by layer ("0", "1", ..., "none"); passes: reads of
    the inputs after the sample; experts: per expert `model`, and
      densities: by grid value, ascending: density, threshold (a saliency, for `precond_threshold`; None
      where nothing is kept, 0 where everything is), kept (elements), roles and layers (kept elements of
      each);
      masses: by share of the expert's total saliency: mass, threshold, kept, density (kept / elements).

    Raises RecipeError (not an `ota` recipe, a bad grid, too little memory), InputError or BackendError.
    """
    recipe = as_recipe(recipe)
    if recipe.merge_method != "ota":
        raise RecipeError(
            f"merge_method: {recipe.merge_method} selects no edits, so that no density is to be chosen: "
            "give an `ota` recipe"
        )
    grid, masses = _shares("grid", grid), _shares("masses", masses)
    options = Options.of(backend=backend, device=device, threads=threads, memory_limit=memory_limit)
    chosen = backends.select(options.backend, options.device)
    limit = memory_limit_of(options.memory_limit, chosen)
    with Inputs(recipe) as inputs, Pool(worker_threads(options.threads, chosen)) as pool:
        try:
            search = _Search(inputs, grid, masses, chosen, limit, pool, progress or Silent())
            search.run()
            return search.result()
        finally:
            chosen.release()


def _shares(name: str, values: Iterable[float | str]) -> list[float]:
    """Distinct numbers in (0, 1], ascending."""
    found: list[float] = []
    for value in values:
        try:
            share = float(value)
        except (TypeError, ValueError):
            share = math.nan
        if not 0 < share <= 1:
            raise RecipeError(f"{name}: {value!r} is not a number in (0, 1]; write it like 0.01,0.1,0.5")
        if share in found:
            raise RecipeError(f"{name}: {value} is given twice")
        found.append(share)
    if not found:
        raise RecipeError(f"{name}: no values; write it like 0.01,0.1,0.5")
    return sorted(found)


@dataclass
class _Target:
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


class _Sample:
    """One expert's sampled scores, float32[clusters, elements], and where they expect its thresholds."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = np.abs(rows)  # no -0, whose bits are not those of 0
        order = np.argsort(self.rows, axis=None)[::-1]
        self.ordered = self.rows.ravel()[order]
        self.weights = {
            "density": np.ones(rows.shape),
            "mass": np.minimum(self.rows, np.finfo(np.float32).max).astype(np.float64),
        }
        self.held = {rule: np.cumsum(weights.ravel()[order]) for rule, weights in self.weights.items()}

    def bracket(self, selection: decide.Selection) -> np.ndarray:
        """The high halves that a threshold may have, uint32, the likeliest first; none where there is nothing
        to go by."""
        share, weights, held = selection.value, self.weights[selection.rule], self.held[selection.rule]
        total = held[-1]
        if total == 0:
            return np.zeros(0, np.uint32)
        # Runs are the clusters of a ratio estimate, compared with their neighbours since they are stratified
        # (as in bracket.py); the second term is for shares of a few elements only.
        above = np.where(self.rows >= self._at(held, share), weights, 0.0).sum(axis=1)
        errors = np.diff(above - share * weights.sum(axis=1))
        width = _STANDARD_ERRORS * math.sqrt(float((errors**2).sum()) / 2) / total
        width += _STANDARD_ERRORS**2 / self.rows.size
        low, middle, high = (_prefix(self._at(held, share + w)) for w in (width, 0.0, -width))
        least, most = self._ends()
        near = np.arange(max(low, least), (high if share > width else most) + 1, dtype=np.int64)
        near = near[np.argsort(np.abs(near - middle), kind="stable")]
        zero = [0] if low < least else []
        return np.array([*zero, *near.tolist()] if middle < least else [*near.tolist(), *zero], np.uint32)

    def _at(self, held: np.ndarray, share: float) -> float:
        """The score down to which the share is held."""
        place = int(np.searchsorted(held, share * held[-1]))
        return float(self.ordered[place]) if place < held.size else 0.0

    def _ends(self) -> tuple[int, int]:
        """High halves of the least score above 0 and of the greatest, an octave further: what lies beyond is
        so rare that it may take a second pass."""
        positive = self.ordered[self.ordered > 0]
        if positive.size == 0:
            return 1, 0
        return max(_prefix(positive[-1]) - _OCTAVE, 1), _prefix(positive[0]) + _OCTAVE

    def share_at(self, prefixes: np.ndarray) -> float:
        """The share of scores above 0 whose high half is one of `prefixes`."""
        found = np.isin(self.ordered.view(np.uint32) >> 16, prefixes) & (self.ordered > 0)
        return float(found.mean())


def _prefix(score: float) -> int:
    return score_bits(score) >> 16


class _Collected:
    """Keeps the low halves, 2 bytes each, so that thresholds and groups follow from one pass. Gives up beyond
    `room` bytes."""

    def __init__(self, experts: int, groups: int, room: int) -> None:
        self._parts: list[list[tuple[int, np.ndarray, np.ndarray]]] | None = [[] for _ in range(experts)]
        self._groups, self._room = groups, room

    def add(self, t: int, group: int, offsets: np.ndarray, lows: np.ndarray) -> None:
        """lows: uint16, ascending within each slot; slot j of expert t is lows[offsets[j]:offsets[j + 1]]."""
        if self._parts is None:
            return
        self._room -= lows.nbytes + offsets.nbytes + _ENTRY_BYTES
        if self._room < 0:
            self._parts = None
        else:
            self._parts[t].append((group, offsets, lows))

    def low_counts(self, t: int, slot: int) -> np.ndarray | None:
        """Counts by low half, int64[65536]; None where that is not known."""
        if self._parts is None:
            return None
        parts = [lows[offsets[slot] : offsets[slot + 1]] for _, offsets, lows in self._parts[t]]
        return np.bincount(np.concatenate([*parts, np.zeros(0, np.uint16)]), minlength=_BINS)

    def at_least(self, t: int, slot: int, low: int) -> np.ndarray | None:
        """Elements of each group whose low half is `low` or more, int64[groups]; None where not known."""
        if self._parts is None:
            return None
        kept = np.zeros(self._groups, np.int64)
        for group, offsets, lows in self._parts[t]:
            kept[group] += _count_from(lows[offsets[slot] : offsets[slot + 1]], low)
        return kept


class _Counted:
    """Counts the low halves in a fixed amount of memory: by value over the whole model, and by group from the
    thresholds on that are known already."""

    def __init__(
        self, wanted: Sequence[np.ndarray], groups: int, known: Iterable[tuple[int, int, int]]
    ) -> None:
        """known: (expert, slot, low half) of thresholds."""
        self._counts = [np.zeros(w.size * _BINS, np.int64) for w in wanted]
        self._kept = {key: np.zeros(groups, np.int64) for key in known}

    def add(self, t: int, group: int, offsets: np.ndarray, lows: np.ndarray) -> None:
        slots = np.repeat(np.arange(offsets.size - 1), np.diff(offsets))
        np.add.at(self._counts[t], slots * _BINS + lows, 1)
        for (expert, slot, low), kept in self._kept.items():
            if expert == t:
                kept[group] += _count_from(lows[offsets[slot] : offsets[slot + 1]], low)

    def low_counts(self, t: int, slot: int) -> np.ndarray:
        return self._counts[t][slot * _BINS : (slot + 1) * _BINS].copy()

    def at_least(self, t: int, slot: int, low: int) -> np.ndarray | None:
        return self._kept.get((t, slot, low))


def _count_from(ascending: np.ndarray, low: int) -> int:
    return ascending.size - int(np.searchsorted(ascending, np.uint16(low)))


@dataclass
class _Pass:
    """What one read of the model counted, per expert t: wanted[t], the high halves it looked into (uint32,
    ascending; a slot is a place in it); above[t], int64[groups, slots], scores with a higher half; counts[t]
    and lows[t], the histogram of all high halves."""

    wanted: list[np.ndarray]
    above: list[np.ndarray]
    counts: list[np.ndarray]
    lows: list[np.ndarray]
    sink: _Collected | _Counted

    def slot(self, t: int, prefix: int) -> int | None:
        place = int(np.searchsorted(self.wanted[t], prefix))
        return place if place < self.wanted[t].size and self.wanted[t][place] == prefix else None


class _Search:
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
    ) -> None:
        self.inputs, self.grid, self.masses = inputs, grid, masses
        self.pool, self.progress = pool, progress
        self.backend = backend
        self.passes = 0
        self.experts = len(inputs.recipe.models)
        entries = [e for e in inputs.entries if e.action != COPY]
        everything = [inputs.tensor(e) for e in entries]
        self.survey = Survey(inputs.recipe, everything, self.backend, release)
        part = [self.survey.takes_part(tensor) for tensor in everything]
        self.tensors = [tensor for tensor, takes_part in zip(everything, part, strict=True) if takes_part]
        self.elements = sum(t.numel for t in self.tensors)
        self.always_kept = sum(
            e.numel
            for e, takes_part in zip(entries, part, strict=True)
            if e.action == MERGE and not takes_part
        )
        self._group_tensors()
        self._find_room(memory_limit)
        self.targets = [self._target(t, s) for t in range(self.experts) for s in self._selections()]

    def _selections(self) -> Iterator[decide.Selection]:
        yield from (decide.Selection("density" if x < 1 else "all", x) for x in self.grid)
        yield from (decide.Selection("mass", x) for x in self.masses)

    def _target(self, t: int, selection: decide.Selection) -> _Target:
        if selection.rule == "all":
            return _Target(t, selection, threshold=decide.KEEP_ALL, kept=self.sizes)
        return _Target(t, selection)

    def _group_tensors(self) -> None:
        """Groups are (role, layer) pairs: all that the splits ask for, and few, however many tensors there
        are. sizes: their elements, int64[groups]."""
        keys = [(detailed_role(t.name), layer_of(t.name)) for t in self.tensors]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        self.groups = list(numbers)
        self.group_of = [numbers[key] for key in keys]
        self.sizes = np.zeros(len(self.groups), np.int64)
        np.add.at(self.sizes, self.group_of, [t.numel for t in self.tensors])

    def _find_room(self, memory_limit: int) -> None:
        """Shares the memory limit out between tiles in flight and what a pass keeps; RecipeError if it is too
        small. tile: elements; room: bytes."""
        threads, name = self.pool.threads, self.backend.NAME
        widest = max((_input_bytes(t) // max(t.numel, 1) for t in self.tensors), default=0)
        in_flight = threads * (_TEMPORARY_BYTES[name] + widest) + pinned_bytes(self.backend, threads, widest)
        fixed = PROCESS_BYTES[name] + self._factor_bytes()
        fixed += 2 * _HISTOGRAM_BYTES * (self.experts + threads)
        least = self.experts * (len(self.grid) + len(self.masses)) * _HISTOGRAM_BYTES
        need = fixed + least + in_flight * _SMALLEST_TILE
        if memory_limit < need:
            raise RecipeError(
                f"a memory limit of {format_bytes(memory_limit)} is too small for these densities on "
                f"{threads} threads: give it --memory-limit {math.ceil(need / 1e6)}MB, a shorter --grid, or "
                "lower --threads"
            )
        spare = memory_limit - fixed - least
        self.tile = min(_TILE_ELEMENTS, max(_SMALLEST_TILE, spare // 2 // in_flight))
        self.room = memory_limit - fixed - in_flight * self.tile

    def _factor_bytes(self) -> int:
        """What the truncated SVD of the largest matrix takes (factors.low_rank)."""
        if not any(m.parameters.rank for m in self.inputs.recipe.models):
            return 0
        matrices = [t for t in self.tensors if len(t.shape) == 2]
        return max((16 * t.numel + 16 * min(t.shape) ** 2 for t in matrices), default=0)

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
                target.threshold, target.kept = answer, np.zeros_like(self.sizes)
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

    def _unsettled(self) -> list[_Target]:
        return [target for target in self.targets if target.kept is None]

    def _predict(self) -> tuple[list[np.ndarray], float]:
        """The high halves to look into, per expert, and how many scores they are expected to hold."""
        self.progress.stage("sample", 0)
        if self.elements == 0:
            return [_united([])] * self.experts, 0.0
        brackets: list[list[np.ndarray]] = []
        wanted, expected = [], 0.0
        for t, rows in enumerate(self._sample()):
            found = _Sample(rows)
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
        bytes_per_cluster = CLUSTER * (
            8 * self.experts + 64
        )  # the parts and their whole; one expert in order
        runs = max(min(cluster_count(self.elements), self.room // 2 // bytes_per_cluster), 2)

        def of_tensor(tensor: TensorInputs) -> list[tuple[int, ExpertTerms]]:
            return [(t, _terms(tensor, t)) for t in range(self.experts)]

        spread, found = are_cached([b for t in self.tensors for b in t.buffers]), []
        for batch in _batches(self.tensors, self.elements // _SAMPLE_BATCHES):
            prepared = [self.survey.prepare(tensor, self.pool.run) for tensor in batch]
            count = math.ceil(runs * sum(t.numel for t in batch) / self.elements)
            found.append(sample(prepared, count, of_tensor, self.backend, self.pool.run, release, spread))
        return [np.concatenate(of_expert) for of_expert in zip(*found, strict=True)]

    def _fits(self, wanted: list[np.ndarray], expected: float) -> bool:
        """Whether that many low halves can be collected."""
        tiles = self.elements // self.tile + len(self.tensors)
        of_tiles = tiles * sum(_ENTRY_BYTES + 4 * (w.size + 1) for w in wanted)
        return 2 * expected + of_tiles <= self.room

    def _read(self, wanted: list[np.ndarray], expected: float) -> _Pass:
        """One pass over all tensors."""
        groups = len(self.groups)
        read = _Pass(
            wanted,
            [np.zeros((groups, w.size), np.int64) for w in wanted],
            [np.zeros(_BINS, np.int64) for _ in wanted],
            [np.zeros(_BINS, np.int64) for _ in wanted],
            _Collected(self.experts, groups, self.room),
        )
        if not self._fits(wanted, expected):
            found = [x for x in self._unsettled() if x.threshold is not None]
            known = [(x.expert, read.slot(x.expert, x.digit.prefix), x.low) for x in found]
            read.sink = _Counted(wanted, groups, known)
        self.passes += 1
        self.progress.stage(f"pass {self.passes}", sum(map(_input_bytes, self.tensors)))
        member = np.zeros((self.experts, _BINS), bool)
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
                prepared[index] = self.survey.prepare(tensor, self.pool.run)
                yield index, 0, tensor.numel

        for unit in units(ranges(), self.tile):
            yield [(prepared[i].slice(start, stop), start, self.group_of[i]) for i, start, stop in unit]
            for i, _, stop in unit:
                if stop == self.tensors[i].numel:
                    del prepared[i]

    def _add(
        self,
        read: _Pass,
        lock: threading.Lock,
        member: np.ndarray,
        tile: TensorInputs,
        start: int,
        group: int,
        t: int,
    ) -> None:
        """Count expert t's scores of one tile."""
        terms = _terms(tile, t)
        counts, lows = np.zeros(_BINS, np.int64), np.zeros(_BINS, np.int64)
        bad = self.backend.histogram(tile, t, terms, False, -1, counts, lows)
        self.survey.check(tile, start, bad)
        above = tile.numel - np.cumsum(counts)[read.wanted[t]]
        found = None
        if counts[read.wanted[t]].any():
            scores, _ = self.backend.scores(tile, t, terms)
            found = _low_halves(scores, read.wanted[t], member)
        with lock:  # sums of integers: their order does not matter
            read.counts[t] += counts
            read.lows[t] += lows
            read.above[t][group] += above
            if found is not None:
                read.sink.add(t, group, *found)

    def _settle(self, read: _Pass) -> None:
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

    def result(self) -> dict:
        """What `densities` returns."""
        return {
            "method": self.inputs.recipe.merge_method,
            "backend": self.backend.NAME,
            "passes": self.passes,
            "elements": self.elements,
            "always_kept": self.always_kept,
            "grid": self.grid,
            "masses": self.masses,
            "roles": self._by_role(self.sizes),
            "layers": self._by_layer(self.sizes),
            "experts": [self._expert(t, m.model) for t, m in enumerate(self.inputs.recipe.models)],
        }

    def _expert(self, t: int, model: str) -> dict:
        mine = [target for target in self.targets if target.expert == t]
        by_density, by_mass = mine[: len(self.grid)], mine[len(self.grid) :]
        return {
            "model": model,
            "densities": [
                {
                    "density": target.selection.value,
                    **_outcome(target),
                    "roles": self._by_role(target.kept),
                    "layers": self._by_layer(target.kept),
                }
                for target in by_density
            ],
            "masses": [
                {
                    "mass": target.selection.value,
                    **_outcome(target),
                    "density": int(target.kept.sum()) / max(self.elements, 1),
                }
                for target in by_mass
            ],
        }

    def _by_role(self, counts: np.ndarray) -> dict[str, int]:
        present = {role for role, _ in self.groups}
        found = dict.fromkeys((role for role in DETAILED_ROLES if role in present), 0)
        for (role, _), count in zip(self.groups, counts.tolist(), strict=True):
            found[role] += count
        return found

    def _by_layer(self, counts: np.ndarray) -> dict[str, int]:
        layers = {layer for _, layer in self.groups}
        found = dict.fromkeys(map(str, sorted(layers - {None})), 0)
        if None in layers:
            found[NO_LAYER] = 0
        for (_, layer), count in zip(self.groups, counts.tolist(), strict=True):
            found[NO_LAYER if layer is None else str(layer)] += count
        return found


def _outcome(target: _Target) -> dict:
    nothing = math.isnan(target.threshold)
    return {
        "threshold": None if nothing else saliency_of_score(target.threshold),
        "kept": int(target.kept.sum()),
    }


def _terms(tile: TensorInputs, t: int) -> ExpertTerms:
    return ExpertTerms(score_scale=score_scale_of(tile, t))


def _low_halves(scores: np.ndarray, wanted: np.ndarray, member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The low halves of scores above 0 whose high half is wanted: (offsets int32[slots + 1], uint16), those
    of slot j in ascending order at [offsets[j], offsets[j + 1])."""
    bits = scores.view(np.uint32)
    chosen = member.take(bits >> 16)
    if member[0]:
        chosen &= bits > 0
    found = np.sort(bits[chosen])
    offsets = np.append(np.searchsorted(found, wanted << 16), found.size).astype(np.int32)
    return offsets, (found & 0xFFFF).astype(np.uint16)


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
