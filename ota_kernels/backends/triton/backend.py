"""The backend's functions: over tiles of mapped files or host arrays, which pass through the ring, and over
tiles whose buffers are tensors on the device ("resident"), of which nothing is copied."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch

from ...errors import BackendError
from ...tensors.array import Array, is_resident, library
from ...tensors.curvature import Full, Log8
from ...tensors.result import MergeStats, NonFinite
from ...tensors.terms import ExpertTerms, Terms
from ...tensors.tile import TensorInputs
from .. import triton
from . import merge as merging
from . import survey_kernels, tiles
from .faults import FAULTS, DeviceMemoryError, is_out_of_memory, line_of, reported
from .halves import merge_in_halves
from .operands import Fetch, Load, candidates, device_curvature, device_tile, in_place, left_there
from .ring import Ring, Slot

_SMALLEST_TILE = 1 << 14  # elements below which a tile is not halved any more

Result = TypeVar("Result")


class Triton:
    """The backend on one device ("cuda:N"; "cpu" under the interpreter). Functions as in `native`.

    Of a resident tile, `out`, scores, edits and candidates are tensors on the device; work is launched on the
    calling thread's current stream. Functions raise BackendError where the device fails.
    """

    NAME = triton.NAME

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._ring = Ring(self.device)

    def verify(self) -> tuple[bool, str]:
        """(ok, reason): whether this backend can run here."""
        return triton.verify("auto" if triton.interpreted() else str(self.device))

    def release(self) -> None:
        """Give up the memory that is kept for the next tiles."""
        self._ring.release()

    def merge(self, tile: TensorInputs, terms: Terms, out: Array) -> MergeStats:
        """Merge one tile into `out` (uint8, the tile's elements in its out_dtype): in halves where the device
        has no room for it at once."""
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
        if tile.numel < 2 * _SMALLEST_TILE:
            megabytes = sum(b.data.nbytes for b in tile.buffers) / 1e6
            raise BackendError(
                f"triton on {self.device}: no room for a tile of {megabytes:.1f} MB, alone in flight: "
                f"free some memory there ({reason})"
            )
        return merge_in_halves(self.merge, tile, terms, out)

    def _merge_in(self, slot: Slot, tile: TensorInputs, terms: Terms, out: np.ndarray) -> MergeStats:
        merged = torch.empty(tile.numel, dtype=_type_of(tile), device=self.device)
        launched = merging.merge(device_tile(tile, slot.load), terms, merged)
        slot.store([(merged, out)])
        return self._stats(tile, launched, slot.fetch)

    def _merge_resident(self, tile: TensorInputs, terms: Terms, out: torch.Tensor) -> MergeStats:
        with self._current():
            inputs = device_tile(tile, in_place(self.device))
            launched = merging.merge(inputs, terms, out.view(_type_of(tile)))
            return self._stats(tile, launched, left_there)

    def _stats(self, tile: TensorInputs, launched: merging.Merged, fetch: Fetch) -> MergeStats:
        stats = launched.stats()
        undecided = launched.undecided() if launched.columns else None
        wanted = [e.census for e in launched.terms.experts]
        sums = launched.censuses.cpu().numpy() if any(wanted) else wanted
        return replace(
            stats,
            candidates=None if undecided is None else candidates(tile, undecided, fetch),
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
                    return work(in_place(self.device), left_there)
            return self._ring.run(lambda slot: work(slot.load, slot.fetch))

    def scores(self, tile: TensorInputs, t: int, terms: ExpertTerms) -> tuple[Array, tuple[NonFinite, ...]]:
        """The scores s_t of expert t, float32[n], 0 where an input is not usable."""
        return self._values(survey_kernels.scores, tile, t, terms)

    def edits(self, tile: TensorInputs, t: int, terms: ExpertTerms) -> tuple[Array, tuple[NonFinite, ...]]:
        """The masked edits m_t d_t of expert t, float32[n]."""
        return self._values(survey_kernels.edits, tile, t, terms)

    def _values(
        self, of_expert: Callable, tile: TensorInputs, t: int, terms: ExpertTerms
    ) -> tuple[Array, tuple[NonFinite, ...]]:
        one = _expert(tile, t)

        def work(load: Load, fetch: Fetch) -> tuple[Array, tuple[NonFinite, ...]]:
            inputs = device_tile(one, load)
            found, suspect = of_expert(inputs, terms)
            (values,) = fetch([found])
            return values.view(library(values).float32), _nonfinite(inputs, t, suspect)

        return self._run(tile.is_resident, work)

    def histogram(
        self,
        tile: TensorInputs,
        t: int,
        terms: ExpertTerms,
        of_edits: bool,
        prefix: int,
        counts: np.ndarray,
        lows: np.ndarray,
    ) -> tuple[NonFinite, ...]:
        """Add the counts of expert t's scores by their float32 bits to counts and lows, on the host."""
        one = _expert(tile, t)

        def work(load: Load, _: Fetch) -> tuple[np.ndarray, tuple[NonFinite, ...]]:
            inputs = device_tile(one, load)
            new = torch.zeros(2, len(counts), dtype=torch.int64, device=self.device)
            suspect = survey_kernels.histogram(inputs, terms, of_edits, prefix, new[0], new[1])
            return new.cpu().numpy(), _nonfinite(inputs, t, suspect)

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
            return survey_kernels.power_sum(h, power), tiles.nonfinite_curvature(h, t)

        return self._run(tile.is_resident, work)

    def row_column_sums(self, matrix: Full | Log8, row_sums: np.ndarray, column_sums: np.ndarray) -> None:
        """Add the sums of whole rows of curvature: see `native.row_column_sums`."""
        shape = len(row_sums), len(column_sums)

        def work(load: Load, _: Fetch) -> list[np.ndarray]:
            c = device_curvature(matrix, shape[0] * shape[1], load)
            h = tiles.written_out(c, shape[0] * shape[1], self.device)
            return [x.cpu().numpy() for x in survey_kernels.row_column_sums(h.view(shape))]

        row_sums[:], more = self._run(is_resident(matrix.buffers[0].data), work)
        column_sums += more


def _type_of(tile: TensorInputs) -> torch.dtype:
    return getattr(torch, tile.out_dtype.name)


def _expert(tile: TensorInputs, t: int) -> TensorInputs:
    return replace(tile, experts=tile.experts[t : t + 1], curvatures=tile.curvatures[t : t + 1])


def _nonfinite(of_one: tiles.DeviceTile, t: int, suspect: bool) -> tuple[NonFinite, ...]:
    found = tiles.nonfinite(of_one) if suspect else ()
    return tuple(bad if bad.role == "base" else replace(bad, expert=t) for bad in found)
