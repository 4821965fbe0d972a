"""Where the engine's graft of one expert goes when it is packed: the elements that are kept, tile by tile."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..io.pack import hash_of
from ..io.pack_codec import TILE
from ..io.pack_writing import Spool
from ..io.pages import release
from ..planning.buffers import as_float64
from ..tensors.segment import Segment
from ..tensors.tile import TensorInputs
from .readahead import ReadAhead
from .sinks import InRooms

Place = tuple[int, int]


class Kept:
    """Elements of a tile that are kept. positions: ascending uint16[m], in the tile; base, expert: their
    elements, as they are stored, uint8[m, bytes]."""

    __slots__ = ("base", "expert", "positions")

    def __init__(self, positions: np.ndarray, base: np.ndarray, expert: np.ndarray) -> None:
        self.positions, self.base, self.expert = positions, base, expert

    @classmethod
    def of(cls, tile: TensorInputs, positions: np.ndarray) -> Kept:
        """positions: in the tile's view."""
        base, expert = (
            b.gather(positions).data.reshape(-1, b.dtype.itemsize) for b in (tile.base, tile.experts[0])
        )
        return cls(positions.astype(np.uint16), base, expert)

    def data(self) -> bytes:
        return self.positions.tobytes() + self.base.tobytes() + self.expert.tobytes()

    @classmethod
    def from_data(cls, data: np.ndarray, sizes: tuple[int, int]) -> Kept:
        m = len(data) // (2 + sum(sizes))
        first, second = 2 * m, (2 + sizes[0]) * m
        return cls(
            data[:first].view("<u2"),
            data[first:second].reshape(m, sizes[0]),
            data[second:].reshape(m, sizes[1]),
        )


class PackSink(InRooms):
    """A Sink (run/engine.py) that keeps, of each tile, what a merge of one expert changes: where it says
    so, those are the edits that are kept. moments: whether the sums of d and of d^2 over all elements are
    wanted.

    base_hashes: of each tile of the base, by tensor; sums: float64[2], by the segments' tensors and starts.
    """

    def __init__(
        self, tensors: Mapping[int, TensorInputs], spool: Spool, read_ahead: ReadAhead, moments: bool
    ) -> None:
        super().__init__()
        self._tensors, self._spool, self._read_ahead, self._moments = tensors, spool, read_ahead, moments
        self.base_hashes = {i: np.zeros(-(-t.numel // TILE), np.uint32) for i, t in tensors.items()}
        self.sums: dict[tuple[int, int], np.ndarray] = {}
        self._places: dict[tuple[int, int], Place] = {}

    def write(self, segment: Segment, merged: np.ndarray, final: bool) -> None:
        tensor = self._tensors[segment.index]
        tile = tensor.slice(segment.start, segment.stop)
        size = tensor.out_dtype.itemsize
        changed = tile.base.data.view(f"u{size}") != merged.view(f"u{size}")
        for start in range(0, tile.numel, TILE):
            part = tile.slice(start, min(start + TILE, tile.numel))
            j = (segment.start + start) // TILE
            self.base_hashes[segment.index][j] = hash_of(part.base.data)
            self._put((segment.index, j), Kept.of(part, np.flatnonzero(changed[start : start + part.numel])))
        if self._moments:
            base, expert = (as_float64(b.data, b.dtype) for b in (tile.base, tile.experts[0]))
            d = expert - base
            self.sums[segment.index, segment.start] = np.array([d.sum(), np.square(d).sum()])

    def patch(self, segment: Segment, positions: np.ndarray, merged: np.ndarray) -> None:
        tensor = self._tensors[segment.index]
        size = tensor.out_dtype.itemsize
        order = np.argsort(positions, kind="stable")
        positions, merged = positions[order].astype(np.int64), merged.reshape(-1, size)[order]
        cuts = np.flatnonzero(np.diff(positions // TILE)) + 1
        for chosen in np.split(np.arange(len(positions)), cuts) if len(positions) else ():
            j = int(segment.start + positions[chosen[0]]) // TILE
            places = positions[chosen] + segment.start - j * TILE
            self._patch(segment.index, j, tensor, places, merged[chosen])

    def _patch(
        self, index: int, j: int, tensor: TensorInputs, places: np.ndarray, merged: np.ndarray
    ) -> None:
        kept = self.kept(index, j)
        at = np.searchsorted(kept.positions, places)
        known = np.zeros(len(places), bool)
        inside = at < len(kept.positions)
        known[inside] = kept.positions[at[inside]] == places[inside]
        # An element that is kept differs from the base: w_0 + (w_t - w_0) is w_0 only if w_t is.
        stays = np.ones(len(kept.positions), bool)
        stays[at[known]] = (kept.base[at[known]] != merged[known]).any(axis=1)
        found = Kept(kept.positions[stays], kept.base[stays], kept.expert[stays])
        if not known.all():
            # Of few elements the kernel does not say what they would be if they were kept.
            tile = tensor.slice(j * TILE, min((j + 1) * TILE, tensor.numel))
            new = places[~known]
            added = Kept.of(tile, new)
            differs = (added.base != merged[~known]).any(axis=1)
            positions = np.concatenate([found.positions, added.positions[differs]])
            order = np.argsort(positions, kind="stable")
            both = ((found.base, added.base), (found.expert, added.expert))
            found = Kept(positions[order], *(np.concatenate([a, b[differs]])[order] for a, b in both))
        if len(found.positions) != len(kept.positions) or not known.all():
            self._put((index, j), found)

    def _put(self, key: tuple[int, int], kept: Kept) -> None:
        data, place = kept.data(), self._places.get(key)
        if place is not None and len(data) <= place[1]:
            self._spool.replace(place[0], data)
            self._places[key] = (place[0], len(data))
        else:
            self._places[key] = self._spool.put(data)

    def kept(self, index: int, j: int) -> Kept:
        """Of tile j of a tensor."""
        tensor = self._tensors[index]
        return Kept.from_data(
            self._spool.get(self._places[index, j]),
            (tensor.base.dtype.itemsize, tensor.experts[0].dtype.itemsize),
        )

    def wants(self, tensor: TensorInputs, segment: Segment) -> None:
        if not self._read_ahead.is_idle:
            self._read_ahead(tensor.reads(segment.start, segment.stop))

    def done_with(self, tile: TensorInputs) -> None:
        release(tile)
