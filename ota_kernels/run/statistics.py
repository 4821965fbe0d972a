"""Statistics: one reduction over tiles each, by four verbs.

    new() -> arrays                                 combine(into, arrays)
    update(arrays, backend, tile, terms): a tile    finish(arrays) -> value

Work is cut into fixed chunks that are folded in order, so that sums depend on neither tiles, threads nor
memory; threads, devices and ranks differ only in who combines. Of several tensors, sums are folded tensor by
tensor, then over all tensors in order: ranks take whole tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..backends import Backend
from ..select import thresholds as decide
from ..tensors import array as resident
from ..tensors.array import BINS
from ..tensors.buffer import Buffer
from ..tensors.found import Selection
from ..tensors.result import NonFinite
from ..tensors.segment import CHUNK, units
from ..tensors.terms import Terms
from ..tensors.tile import TensorInputs
from .pool import Pool
from .ranks import ALONE, Ranks

Arrays = Any  # what a statistic holds while it is taken: arrays, or a list of them
Check = Callable[[TensorInputs, Iterable[NonFinite]], None]


class Statistic(Protocol):
    """One reduction. reads: the buffers of a tile that it reads; by_rows: whether tiles are whole rows."""

    by_rows: bool
    exact: bool  # whether arrays add up to the same in any order

    def new(self) -> Arrays: ...

    def update(
        self, arrays: Arrays, backend: Backend, tile: TensorInputs, terms: Terms
    ) -> Iterable[NonFinite]: ...

    def combine(self, into: Arrays, arrays: Arrays) -> None: ...

    def finish(self, arrays: Arrays) -> Any: ...

    def reads(self, tile: TensorInputs) -> Iterable[Buffer]: ...


class _Sums:
    """What statistics share whose arrays are one array that adds up."""

    by_rows = exact = False

    def combine(self, into: np.ndarray, arrays: np.ndarray) -> None:
        into += arrays

    def finish(self, arrays: np.ndarray) -> np.ndarray:
        return arrays

    def reads(self, tile: TensorInputs) -> Iterable[Buffer]:
        return tile.buffers


@dataclass(frozen=True)
class MeanWeight(_Sums):
    """Per expert the sum of g_t h_t^p: float64[T]. gains: g of each expert's second moments, bias correction
    divided out; power: p."""

    gains: Callable[[TensorInputs], Sequence[float]]
    power: float
    experts: int

    def new(self) -> np.ndarray:
        return np.zeros(self.experts)

    def update(self, arrays, backend: Backend, tile: TensorInputs, terms: Terms) -> Iterable[NonFinite]:
        found: list[NonFinite] = []
        for t, gain in enumerate(self.gains(tile)):
            total, bad = backend.power_sum(tile, t, self.power)
            arrays[t] += total * gain
            found += bad
        return found

    def reads(self, tile: TensorInputs) -> Iterator[Buffer]:
        return (buffer for c in tile.curvatures for buffer in c.buffers)


@dataclass(frozen=True)
class Histograms(_Sums):
    """Of scores by 16 of their bits (see `native.histogram`): int64[experts, 2, 65536], counts and sums of
    low halves. prefixes: by expert; of_edits: magnitudes of what masks keep in place of scores."""

    prefixes: dict[int, int]
    of_edits: bool = False
    exact = True

    def new(self) -> np.ndarray:
        return np.zeros((len(self.prefixes), 2, BINS), np.int64)

    def update(self, arrays, backend: Backend, tile: TensorInputs, terms: Terms) -> Iterable[NonFinite]:
        found: list[NonFinite] = []
        for (t, prefix), (counts, lows) in zip(self.prefixes.items(), arrays, strict=True):
            found += backend.histogram(tile, t, terms, self.of_edits, prefix, counts, lows)
        return found

    def reads(self, tile: TensorInputs) -> Iterator[Buffer]:
        if tile.base is not None:
            yield tile.base
        for t in self.prefixes:
            yield from (tile.experts[t], *tile.curvatures[t].buffers)
            if tile.origins and tile.origins[t] is not None:
                yield tile.origins[t]


@dataclass(frozen=True)
class MaskedSums(_Sums):
    """float64[T, columns] of what masks keep: see `native.masked_sums`."""

    experts: int
    columns: int

    def new(self) -> np.ndarray:
        return np.zeros((self.experts, self.columns))

    def update(self, arrays, backend: Backend, tile: TensorInputs, terms: Terms) -> Iterable[NonFinite]:
        arrays += backend.masked_sums(tile, terms)
        return ()


@dataclass(frozen=True)
class Gram(_Sums):
    """The inner products of the experts' edits, or weights without a base: float64[T, T]."""

    experts: int

    def new(self) -> np.ndarray:
        return np.zeros((self.experts, self.experts))

    def update(self, arrays, backend: Backend, tile: TensorInputs, terms: Terms) -> Iterable[NonFinite]:
        arrays += backend.gram(tile, "tensor")
        return ()


class Pieces:
    """What statistics share that keep a piece of each tile, in order."""

    by_rows = exact = False

    def new(self) -> list:
        return []

    def combine(self, into: list, arrays: list) -> None:
        into += arrays

    def reads(self, tile: TensorInputs) -> Iterable[Buffer]:
        return tile.buffers


@dataclass(frozen=True)
class Edits(Pieces):
    """Expert t's masked edits, whole: float32[n]. For norms that no sum gives."""

    t: int

    def update(self, arrays, backend: Backend, tile: TensorInputs, terms: Terms) -> Iterable[NonFinite]:
        values, bad = backend.edits(tile, self.t, terms)
        arrays.append(values)
        return bad

    def finish(self, arrays: list) -> resident.Array:
        return resident.joined(arrays) if arrays else np.zeros(0, np.float32)


@dataclass(frozen=True)
class Grams(Pieces):
    """Inner products by rows (of the last axis) or columns: float64[groups, T, T]."""

    groups: str
    by_rows = True

    def update(self, arrays, backend: Backend, tile: TensorInputs, terms: Terms) -> Iterable[NonFinite]:
        arrays.append(backend.gram(tile, self.groups))
        return ()

    def finish(self, arrays: list) -> np.ndarray:
        return np.concatenate(arrays) if self.groups == "row" else sum(arrays[1:], arrays[0])


@dataclass(frozen=True)
class RowDivergence(Pieces):
    """How far expert t's rows are from the base's (arcee_fusion): float32[rows], 2^32 KL, rounded once."""

    t: int
    by_rows = True

    def update(self, arrays, backend: Backend, tile: TensorInputs, terms: Terms) -> Iterable[NonFinite]:
        arrays.append(backend.row_divergence(tile, self.t))
        return ()

    def finish(self, arrays: list) -> np.ndarray:
        return np.float32(np.concatenate(arrays) * 2.0**32)


class Signs(_Sums):
    """How many more of the sums E of the votes are positive than negative: int64[1]."""

    exact = True

    def new(self) -> np.ndarray:
        return np.zeros(1, np.int64)

    def update(self, arrays, backend: Backend, tile: TensorInputs, terms: Terms) -> Iterable[NonFinite]:
        total, bad = np.zeros(tile.numel, np.float32), []
        for t, e in enumerate(terms.experts):
            edits, found = backend.edits(tile, t, terms)
            votes = np.float32(e.vote) * resident.host(edits)
            total += np.sign(votes) if terms.words.elect == "count" else votes
            bad += found
        arrays += np.count_nonzero(total > 0) - np.count_nonzero(total < 0)
        return bad


class ValidCurvature(_Sums):
    """Nothing but whether expert t's curvature is finite and not negative."""

    def __init__(self, t: int) -> None:
        self.t = t

    def new(self) -> np.ndarray:
        return np.zeros(0)

    def update(self, arrays, backend: Backend, tile: TensorInputs, terms: Terms) -> Iterable[NonFinite]:
        return backend.power_sum(tile, self.t, 1.0)[1]


@dataclass(frozen=True)
class Reader:
    """Takes statistics. check: raises for inputs that are not finite; release: told of each tile of a large
    read, whose pages may go; wants: told what will be read soon."""

    backend: Backend
    pool: Pool
    check: Check
    release: Callable[[TensorInputs], None]
    wants: Callable[[Iterable[Buffer]], None]
    ranks: Ranks = ALONE

    def over(
        self,
        statistic: Statistic,
        tensors: Sequence[TensorInputs],
        ready_for: Callable[[TensorInputs], tuple[TensorInputs, Terms]],
    ) -> Any:
        """The statistic (arrays that add up) of all these tensors, by all ranks together. ready_for: a tensor
        as it is read, and its terms; asked right before its first tile."""
        size = max(map(_size, tensors), default=CHUNK)
        ready: dict[int, tuple[TensorInputs, Terms]] = {}
        own = self.ranks.take(range(len(tensors)), [t.numel for t in tensors])

        def ranges() -> Iterator[tuple[int, int, int]]:
            for index in own:
                ready[index] = ready_for(tensors[index])
                yield index, 0, tensors[index].numel

        def tiles() -> Iterator[list[tuple[int, TensorInputs, int, int, Terms]]]:
            for unit in units(ranges(), size, lambda index: _whole(statistic, *ready[index])):
                found = [(i, ready[i][0], a, b, ready[i][1]) for i, a, b in unit]
                for _, tensor, a, b, _ in found:
                    if not tensor.is_computed:
                        self.wants(statistic.reads(tensor.slice(a, b)))
                yield found
                for i, _, stop in unit:
                    if stop == tensors[i].numel:
                        ready.pop(i, None)

        def of_unit(unit: list[tuple[int, TensorInputs, int, int, Terms]]) -> list[tuple[int, Arrays]]:
            """Arrays by tensor; exact ones together."""
            arrays: dict[int, Arrays] = {}
            for index, tensor, start, stop, terms in unit:
                into = arrays.setdefault(-1 if statistic.exact else index, statistic.new())
                self._add(statistic, into, tensor.slice(start, stop), terms)
            return list(arrays.items())

        parts = (part for found in self.pool.run(of_unit, tiles()) for part in found)
        if statistic.exact:
            total = statistic.new()
            for _, arrays in parts:
                statistic.combine(total, arrays)
            return statistic.finish(self.ranks.total(total))
        of_each = np.stack([statistic.new() for _ in tensors]) if tensors else np.zeros(0)
        for index, arrays in parts:
            statistic.combine(of_each[index], arrays)
        return _folded(statistic, self.ranks.total(of_each))

    def of_tensor(self, statistic: Statistic, tensor: TensorInputs, terms: Terms) -> Any:
        """The statistic of one tensor, chunk by chunk."""
        whole = _whole(statistic, tensor, terms)
        step = max(_size(tensor) // whole, 1) * whole

        def of_chunk(start: int) -> Arrays:
            arrays = statistic.new()
            self._add(statistic, arrays, tensor.slice(start, min(start + step, tensor.numel)), terms)
            return arrays

        return _folded(statistic, self.pool.run(of_chunk, range(0, tensor.numel, step)))

    def _add(self, statistic: Statistic, arrays: Arrays, tile: TensorInputs, terms: Terms) -> None:
        self.check(tile, statistic.update(arrays, self.backend, tile, terms))
        self.release(tile)


def _size(tensor: TensorInputs) -> int:
    """Elements of one piece of work. Of tensors on a device, sums are torch's own order anyway."""
    return resident.TILE if tensor.is_resident else CHUNK


def _whole(statistic: Statistic, tensor: TensorInputs, terms: Terms) -> int:
    """Of so many elements a piece is a multiple."""
    columns = max(tensor.shape[-1] if tensor.shape else 1, 1)
    return math.lcm(terms.whole, tensor.columns, columns if statistic.by_rows else 1)


def _folded(statistic: Statistic, parts: Iterable[Arrays]) -> Any:
    total = statistic.new()
    for arrays in parts:
        statistic.combine(total, arrays)
    return statistic.finish(total)


def exact_thresholds(
    take: Callable[[Histograms], np.ndarray], selections: dict[int, Selection], of_edits: bool = False
) -> dict[int, float]:
    """The exact score thresholds of experts, in one or two reads. take: takes histograms of all
    that the selections are over."""
    found: dict[int, float] = {}
    digits: dict[int, decide.Digit] = {}
    first = take(Histograms(dict.fromkeys(selections, -1), of_edits))
    for t, (counts, lows) in zip(selections, first, strict=True):
        answer = decide.first_digit(selections[t], counts, lows)
        (digits if isinstance(answer, decide.Digit) else found)[t] = answer
    if digits:
        prefixes = {t: digit.prefix for t, digit in digits.items()}
        second = take(Histograms(prefixes, of_edits))
        for (t, digit), (counts, _) in zip(digits.items(), second, strict=True):
            found[t] = decide.second_digit(selections[t], digit, counts)
    return found
