"""The sums over experts that `keep_sums: true` writes beside a merge (sums.py): their tensors, and the
backend that computes both."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..backends import native
from ..io.pack_codec import TILE
from ..io.pages import advise
from ..io.reader import Checkpoint
from ..io.writer import OutputTensor as Place
from ..io.writer import ShardWriter
from ..planning.outputs import KEEP_BASE, OutputTensor
from ..planning.packed import probes
from ..tensors.curvature import Uniform
from ..tensors.dtypes import BY_NAME, DType
from ..tensors.result import MergeStats
from ..tensors.terms import Terms
from ..tensors.tile import TensorInputs

SUMS = "sums/"  # the folder, in front of names in a layout
PLANES = ("numerator", "denominator")


def plane_type(out: DType) -> DType:
    """Of the sums for outputs of a type: that of the kernels' accumulators."""
    return BY_NAME["float32" if out.itemsize == 2 else "float64"]


def planes(entries: Sequence[OutputTensor]) -> list[tuple[str, DType, tuple[int, ...]]]:
    """Names, types and shapes of the sums of all merged tensors, two of each, in order."""
    merged = [entry for entry in entries if entry.is_computed]
    return [(f"{SUMS}{plane}/{e.name}", plane_type(e.dtype), e.shape) for e in merged for plane in PLANES]


def uniform_tensors(entries: Iterable[OutputTensor]) -> list[str]:
    """Names of merged tensors without curvature, which all experts must lack alike."""
    return [
        entry.name
        for entry in entries
        if entry.is_computed
        and (entry.action == KEEP_BASE or any(isinstance(c, Uniform) for c in entry.curvatures))
    ]


def base_probes(tensors: Iterable[TensorInputs]) -> list[list[str | int]]:
    """CRC-32 of some tiles of the base, by which it is known again: [name, number of the tile, CRC]."""
    by_name = {tensor.name: tensor.base for tensor in tensors}
    found: list[list[str | int]] = []
    for name, j in probes({name: len(base) for name, base in by_name.items()}):
        base = by_name[name]
        tile = base.slice(j * TILE, min((j + 1) * TILE, len(base)))
        found.append([name, j, zlib.crc32(tile.data)])
    return found


@dataclass(frozen=True)
class Earlier:
    """Sums that are gone on with. experts: of the whole merge; removes: the expert is taken out of them."""

    sums: Checkpoint
    experts: int
    removes: bool = False


class Summing:
    """The backend native, which also writes the sums of each tile. places: of a tensor's two planes, by
    its name."""

    NAME = native.NAME

    def __init__(
        self, writer: ShardWriter, places: dict[str, tuple[Place, Place]], earlier: Earlier | None
    ) -> None:
        self._writer, self._places, self._earlier = writer, places, earlier
        self._local = threading.local()

    def merge(self, tile: TensorInputs, terms: Terms, out: np.ndarray) -> MergeStats:
        """As every backend's."""
        places, size = self._places[tile.name], plane_type(tile.out_dtype).itemsize
        rooms = self._rooms(tile.numel * size)
        before: list[np.ndarray | None] = [None, None]
        removes = False
        if self._earlier is not None:
            start, stop = tile.start, tile.start + tile.numel
            buffers = (self._earlier.sums.buffer(f"{plane}/{tile.name}") for plane in PLANES)
            before = [buffer.slice(start, stop).data for buffer in buffers]
            removes = self._earlier.removes
            terms = _of_all(terms, self._earlier)
        stats = native.merge(tile, terms, out, native.Sums(*rooms, *before, removes))
        for place, room in zip(places, rooms, strict=True):
            self._writer.write(place, tile.start, room)
        for data in before:
            if data is not None:
                advise(data, "dontneed")
        return stats

    def _rooms(self, nbytes: int) -> list[np.ndarray]:
        kept = getattr(self._local, "rooms", None)
        if kept is None or kept[0].size < nbytes:
            kept = self._local.rooms = [np.empty(nbytes, np.uint8) for _ in PLANES]
        return [room[:nbytes] for room in kept]


def _of_all(terms: Terms, earlier: Earlier) -> Terms:
    """One expert's terms on top of the others' sums."""
    terms = replace(terms, denominator=float(earlier.experts))
    if not earlier.removes:
        return terms
    experts = tuple(replace(e, weight_scale=-e.weight_scale) for e in terms.experts)
    return replace(terms, experts=experts, epsilon=-terms.epsilon)
