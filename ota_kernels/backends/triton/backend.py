"""The backend's functions: over tiles of mapped files or host arrays, which pass through the ring, and over
tiles whose buffers are tensors on the device ("resident"), of which nothing is copied."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch

from ...errors import BackendError
from ...tensors.array import Array, host, is_captured, is_resident, library, needs_the_host
from ...tensors.curvature import Full, Log8, Uniform
from ...tensors.result import Around, Candidates, MergeStats, NonFinite
from ...tensors.terms import Terms, Words, close
from ...tensors.tile import TensorInputs
from .. import functions, triton
from . import batch, density, survey, tiles
from .batch import Request
from .device import FAULTS, DeviceMemoryError, is_out_of_memory, line_of, reported
from .halves import merge_in_halves
from .outcome import Merged, Undecided, of_exponents
from .ring import Ring, Slot
from .tiles import DeviceTile, Fetch, Load, device_curvature, device_tile, in_place, left_there

_SMALLEST_TILE = 1 << 14  # elements below which a tile is not halved any more

Result = TypeVar("Result")
Tile = tuple[TensorInputs, Terms, Array]  # to be merged by these terms into uint8[n]

Read = Callable[[Sequence[Merged]], list[list[int]]]


class Triton:
    """The backend on one device ("cuda:N"; "cpu" under the interpreter). Functions as in `native`.

    Of a resident tile, `out`, scores, edits and candidates are tensors on the device; work is launched on the
    calling thread's current stream. Functions raise BackendError where the device fails.
    """

    NAME = triton.NAME

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._ring = Ring(self.device)
        self._most: float = math.inf  # elements at once that found room, where more have not

    def verify(self) -> tuple[bool, str]:
        """(ok, reason): whether this backend can run here."""
        return triton.verify("auto" if triton.interpreted() else str(self.device))

    def release(self) -> None:
        """Give up the memory that is kept for the next tiles."""
        self._most = math.inf
        self._ring.release()

    def merge(self, tile: TensorInputs, terms: Terms, out: Array) -> MergeStats:
        """Merge one tile into `out` (uint8, the tile's elements in its out_dtype): in halves where the device
        has no room for it at once."""
        if terms.function is not None:
            return functions.merge(tile, terms, out)
        if is_captured(out):
            return self._captured([(tile, terms, out)])[0]
        columns = terms.whole
        halves = tile.numel >= 2 * max(_SMALLEST_TILE, columns)
        if halves and tile.numel > self._most:
            return merge_in_halves(self.merge, tile, terms, out, columns)
        with reported(self.device):
            try:
                if tile.is_resident:
                    return self._merge_resident(tile, terms, out)
                return self._ring.run(lambda slot: self._merge_in(slot, tile, terms, out))
            except (DeviceMemoryError, *FAULTS) as error:
                if not is_out_of_memory(error):
                    raise
                reason = line_of(error)
        # Here, past the handler, nothing refers to the failed attempt's tensors any more.
        if not halves:
            megabytes = sum(b.data.nbytes for b in tile.buffers) / 1e6
            raise BackendError(
                f"triton on {self.device}: no room for a tile of {megabytes:.1f} MB, alone in flight: "
                f"free some memory there ({reason})"
            )
        self._most = tile.numel // 2
        return merge_in_halves(self.merge, tile, terms, out, columns)

    def finds(self, words: Words, together: bool = False) -> bool:
        """Whether `merge_all` finds thresholds that are `wanted`; together: those of several tensors."""
        return density.finds(words)

    def merge_all(self, given: Sequence[Tile]) -> list[MergeStats]:
        """What `merge` does for each of these resident tiles: two launches for all of a form, one wait.

        Thresholds that are `wanted` are found meanwhile, of tiles that are whole tensors, or, where
        they have brackets, one over all tiles. Of one whose threshold is not found, nothing is merged.
        """
        if given and is_captured(given[0][2]):
            return self._captured(given)
        by_words = [i for i, (_, terms, _) in enumerate(given) if terms.function is None]
        wanted = [i for i in by_words if any(e.wanted for e in given[i][1].experts)]
        model = [i for i in wanted if _is_together(given[i][1])]
        known = sorted({*by_words} - {*wanted})
        found: dict[int, MergeStats] = {}
        with reported(self.device), self._current():
            for indices, merge in ((sorted({*wanted} - {*model}), self._found), (known, self._known)):
                found |= self._together(indices, merge, [given[i] for i in indices])
            found |= self._together(model, self._found, [given[i] for i in model], whole=True)
        return [found[i] if i in found else self._alone(*each) for i, each in enumerate(given)]

    def _captured(self, given: Sequence[Tile]) -> list[MergeStats]:
        """Launches alone, for a CUDA graph: nothing is allocated or copied by tile, and nothing counted. So
        inputs that are not finite must be repaired by the kernel, or show in the result."""
        for _, terms, out in given:
            w = terms.words
            shown = (w.edit, w.select, w.elect, w.weigh) == ("difference", "all", "none", "constant")
            opened = any(e.span or e.wanted or e.census for e in terms.experts)
            if terms.function is not None or opened or not (terms.repair or shown):
                needs_the_host(out)
        with reported(self.device), self._current():
            batch.merge_all([self._request(*each)._replace(exact_roots=True) for each in given])
        return [MergeStats((0,) * len(x.experts), (0,) * len(x.experts), 0, 0, 0, ()) for _, x, _ in given]

    def _together(
        self,
        indices: Sequence[int],
        merge: Callable[[Sequence[Tile]], list[MergeStats]],
        tiles: Sequence[Tile],
        whole: bool = False,
    ) -> dict[int, MergeStats]:
        """Stats by index, of half of the tiles at a time where there is no room for all; none of one alone
        that finds none, or, as a whole, of all."""
        elements = sum(tile.numel for tile, _, _ in tiles)
        if elements <= self._most:
            try:
                return dict(zip(indices, merge(tiles), strict=True))
            except (DeviceMemoryError, *FAULTS) as error:
                if not is_out_of_memory(error):
                    raise
            self._most = elements // 2
        if len(tiles) < 2 or whole:
            return {}
        middle = len(tiles) // 2
        first = self._together(indices[:middle], merge, tiles[:middle])
        return first | self._together(indices[middle:], merge, tiles[middle:])

    def _alone(self, tile: TensorInputs, terms: Terms, out: Array) -> MergeStats:
        """Where nothing is found of a threshold, its tile need not be merged."""
        if any(e.wanted for e in terms.experts):
            nothing = (0,) * len(terms.experts)
            return MergeStats(nothing, nothing, 0, 0, 0, (), thresholds=(None,) * len(terms.experts))
        return self.merge(tile, terms, out)

    def _known(self, given: Sequence[Tile]) -> list[MergeStats]:
        return self._merged(
            [self._request(*x) for x in given], [x[0] for x in given], batch.totals_of, left_there
        )

    def _found(self, given: Sequence[Tile]) -> list[MergeStats]:
        together = any(_is_together(terms) for _, terms, _ in given)
        found = density.merge_all([self._request(*x) for x in given], together)
        overdone = [
            i for i, (stats, again) in enumerate(found) if again and None not in _found_of(stats, given[i][1])
        ]
        stats = [of_tile for of_tile, _ in found]
        if overdone:
            closed = [(given[i][0], close(given[i][1], stats[i].thresholds), given[i][2]) for i in overdone]
            requests = [self._request(*x)._replace(exact_roots=True) for x in closed]
            merged = self._merged(requests, [x[0] for x in closed], batch.totals_of, left_there)
            for i, of_tile in zip(overdone, merged, strict=True):
                stats[i] = replace(of_tile, thresholds=stats[i].thresholds)
        return stats

    def _request(self, tile: TensorInputs, terms: Terms, out: torch.Tensor) -> Request:
        return Request(device_tile(tile, in_place(self.device), terms), terms, out.view(_type_of(tile)))

    def _merge_in(self, slot: Slot, tile: TensorInputs, terms: Terms, out: np.ndarray) -> MergeStats:
        merged = torch.empty(tile.numel, dtype=_type_of(tile), device=self.device)

        def read(launched: Sequence[Merged]) -> list[list[int]]:
            """With the merged elements: one wait for both."""
            (totals,) = (x.totals for x in launched)
            host = np.empty(totals.nbytes, np.uint8)
            slot.store([(merged, out), (totals, host)])
            return [host.view(np.int32).tolist()]

        request = Request(device_tile(tile, slot.load, terms), terms, merged)
        return self._merged([request], [tile], read, slot.fetch)[0]

    def _merge_resident(self, tile: TensorInputs, terms: Terms, out: torch.Tensor) -> MergeStats:
        with self._current():
            return self._merged([self._request(tile, terms, out)], [tile], batch.totals_of, left_there)[0]

    def _merged(
        self, requests: Sequence[Request], tiles: Sequence[TensorInputs], read: Read, fetch: Fetch
    ) -> list[MergeStats]:
        """read: waits for the totals of launches, fetch: for their undecided elements."""
        launched = batch.merge_all(requests)
        totals = read(launched)
        stats = [merged.stats(numbers) for merged, numbers in zip(launched, totals, strict=True)]
        overdone = [
            i for i, merged in enumerate(launched) if merged.is_overdone(totals[i], stats[i].nonfinite)
        ]
        if overdone:
            again = batch.merge_all([requests[i]._replace(exact_roots=True) for i in overdone])
            for i, merged, numbers in zip(overdone, again, read(again), strict=True):
                launched[i], stats[i] = merged, merged.stats(numbers)
        parts = zip(requests, launched, stats, tiles, strict=True)
        return [self._complete(*part, read, fetch) for part in parts]

    def _complete(
        self,
        request: Request,
        launched: Merged,
        stats: MergeStats,
        tile: TensorInputs,
        read: Read,
        fetch: Fetch,
    ) -> MergeStats:
        """With undecided elements and censuses."""
        undecided = launched.undecided() if launched.lists else None
        if undecided is None and launched.lists:
            return self._merged([request._replace(whole_room=True)], [tile], read, fetch)[0]
        wanted = [e.census for e in launched.terms.experts]
        sums = of_exponents(launched.censuses.cpu().numpy()) if any(wanted) else wanted
        return replace(
            stats,
            candidates=None if undecided is None else _candidates(tile, undecided, fetch),
            censuses=tuple(census if asked else None for census, asked in zip(sums, wanted, strict=True)),
        )

    def _current(self) -> contextlib.AbstractContextManager:
        """Where kernels are launched on this device."""
        if self.device.type == "cuda":
            return torch.cuda.device(self.device)
        return contextlib.nullcontext()

    def _run(self, resident: bool, work: Callable[[Load, Fetch], Result]) -> Result:
        """work, with what takes arrays to the device and tensors back."""
        with reported(self.device):
            if resident:
                with self._current():
                    needs_the_host(torch.empty(0, device=self.device))
                    return work(in_place(self.device), left_there)
            return self._ring.run(lambda slot: work(slot.load, slot.fetch))

    def scores(self, tile: TensorInputs, t: int, terms: Terms) -> tuple[Array, tuple[NonFinite, ...]]:
        """The scores s_t of expert t, float32[n], 0 where an input is not usable."""
        return self._values("scores", tile, t, terms)

    def around(
        self, tile: TensorInputs, t: int, terms: Terms, intervals: Sequence[tuple[float, float]]
    ) -> tuple[Around, tuple[NonFinite, ...]]:
        """Expert t's scores around places of their order, counted by the host: see Around."""
        found, nonfinite = self.scores(tile, t, terms)
        return Around.of(host(found), intervals), nonfinite

    def edits(self, tile: TensorInputs, t: int, terms: Terms) -> tuple[Array, tuple[NonFinite, ...]]:
        """The masked edits m_t d_t of expert t, float32[n]."""
        return self._values("edits", tile, t, terms)

    def _values(
        self, what: str, tile: TensorInputs, t: int, terms: Terms
    ) -> tuple[Array, tuple[NonFinite, ...]]:
        some, at, of_some = _needed(tile, t, terms)

        def work(load: Load, fetch: Fetch) -> tuple[Array, tuple[NonFinite, ...]]:
            inputs = device_tile(some, load, of_some)
            found, suspect = survey.values(what, inputs, at, of_some)
            (values,) = fetch([found])
            return values.view(library(values).float32), _nonfinite(inputs.expert(at), t, suspect)

        return self._run(tile.is_resident, work)

    def histogram(
        self,
        tile: TensorInputs,
        t: int,
        terms: Terms,
        of_edits: bool,
        prefix: int,
        counts: np.ndarray,
        lows: np.ndarray,
    ) -> tuple[NonFinite, ...]:
        """Add the counts of expert t's scores by their float32 bits to counts and lows, on the host."""
        some, at, of_some = _needed(tile, t, terms)

        def work(load: Load, _: Fetch) -> tuple[np.ndarray, tuple[NonFinite, ...]]:
            inputs = device_tile(some, load, of_some)
            new = torch.zeros(2, len(counts), dtype=torch.int64, device=self.device)
            suspect = survey.histogram(inputs, at, of_some, of_edits, prefix, new[0], new[1])
            return new.cpu().numpy(), _nonfinite(inputs.expert(at), t, suspect)

        new, bad = self._run(tile.is_resident, work)
        counts += new[0]
        if prefix < 0:
            lows += new[1]
        return bad

    def power_sum(self, tile: TensorInputs, t: int, power: float) -> tuple[float, tuple[NonFinite, ...]]:
        """The sum of h_t^power over the tile, in float64."""

        def work(load: Load, _: Fetch) -> tuple[float, tuple[NonFinite, ...]]:
            c = device_curvature(tile.curvatures[t], tile.numel, load)
            h = tiles.written_out(c, tile.numel, self.device)
            return survey.power_sum(h, power), tiles.nonfinite_curvature(h, t)

        return self._run(tile.is_resident, work)

    def row_column_sums(self, matrix: Full | Log8, row_sums: np.ndarray, column_sums: np.ndarray) -> None:
        """Add the sums of whole rows of curvature: see `native.row_column_sums`."""
        shape = len(row_sums), len(column_sums)

        def work(load: Load, _: Fetch) -> list[np.ndarray]:
            c = device_curvature(matrix, shape[0] * shape[1], load)
            h = tiles.written_out(c, shape[0] * shape[1], self.device)
            return [x.cpu().numpy() for x in survey.row_column_sums(h.view(shape))]

        row_sums[:], more = self._run(is_resident(matrix.buffers[0].data), work)
        column_sums += more

    def gram(self, tile: TensorInputs, by: str = "tensor") -> np.ndarray:
        """Sums of x_t x_u, x_t the edit d_t, or w_t without a base: float64[T, T]; with by "row" or "column",
        of a tile of whole rows, float64[groups, T, T]."""
        return self._reduced(_without_curvature(tile), lambda inputs: survey.gram(inputs, by))

    def masked_sums(self, tile: TensorInputs, terms: Terms) -> np.ndarray:
        """Sums over edits and masks, float64[T, 6]; columns as SUMS (tensors/result.py) names them."""
        return self._reduced(tile, lambda inputs: survey.masked_sums(inputs, terms), terms)

    def row_divergence(self, tile: TensorInputs, t: int) -> np.ndarray:
        """KL(p | q) of each whole row, p the softmax of w_t and q of what its edit is taken from, each plus
        1e-8: float64[rows]."""
        parts = {name: getattr(tile, name)[t : t + 1] for name in ("experts", "origins")}
        some = _without_curvature(replace(tile, **parts))
        return self._reduced(some, lambda inputs: survey.row_divergence(inputs, 0))

    def _reduced(
        self, tile: TensorInputs, reduce: Callable[[DeviceTile], torch.Tensor], terms: Terms | None = None
    ) -> np.ndarray:
        def work(load: Load, _: Fetch) -> np.ndarray:
            return reduce(device_tile(tile, load, terms)).cpu().numpy()

        return self._run(tile.is_resident, work)


def _type_of(tile: TensorInputs) -> torch.dtype:
    return getattr(torch, tile.out_dtype.name)


def _is_together(terms: Terms) -> bool:
    """Whether the thresholds that are wanted are over all tiles that are merged at once."""
    return any(e.wanted and e.span for e in terms.experts)


def _found_of(stats: MergeStats, terms: Terms) -> list[float | None]:
    """The thresholds that were wanted."""
    return [x for x, e in zip(stats.thresholds, terms.experts, strict=True) if e.wanted]


def _needed(tile: TensorInputs, t: int, terms: Terms) -> tuple[TensorInputs, int, Terms]:
    """What the scores of expert t are made of: (tile, its number there, terms)."""
    if terms.words.score == "spread":
        return tile, t, terms
    parts = {name: getattr(tile, name)[t : t + 1] for name in ("experts", "curvatures", "origins")}
    return replace(tile, **parts), 0, survey.terms_of(terms, t)


def _without_curvature(tile: TensorInputs) -> TensorInputs:
    return replace(tile, curvatures=(Uniform(),) * len(tile.experts))


def _nonfinite(of_one: DeviceTile, t: int, suspect: bool) -> tuple[NonFinite, ...]:
    found = tiles.nonfinite(of_one) if suspect else ()
    return tuple(bad if bad.role == "base" else replace(bad, expert=t) for bad in found)


def _candidates(tile: TensorInputs, undecided: Undecided, fetch: Fetch) -> Candidates:
    """The undecided elements of `tile`, where `fetch` puts them."""
    operands = undecided.operands
    origins = operands.origins or (None,) * len(tile.origins)
    columns = [undecided.positions, operands.base, *operands.experts, *origins, *operands.curvatures]
    fetched = iter(fetch([x for x in (*columns, *undecided.steps) if x is not None]))
    found = [None if x is None else next(fetched) for x in columns]
    return Candidates.of(tile, found, list(fetched))
