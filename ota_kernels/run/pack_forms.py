"""What packs keep of an expert and store of it, form by form: masks that no merge method has, and the
encoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from ..io.pack import hash_of
from ..io.pack_codec import TILE, encode_mask, encode_signs
from ..io.pack_writing import Encoded
from ..planning.buffers import as_float64, average
from ..planning.roles import MATRIX, role_of
from ..select import thresholds as decide
from ..tensors.dtypes import BY_NAME, DType
from ..tensors.found import Selection
from ..tensors.tile import TensorInputs
from .pack_sink import Kept

Run = Callable  # as Pool.run
SEGMENT = 4 * TILE  # elements of a task


def segments(numel: int) -> list[tuple[int, int]]:
    """A tensor in whole tiles."""
    return [(start, min(start + SEGMENT, numel)) for start in range(0, numel, SEGMENT)]


def exact(
    positions: np.ndarray, n: int, expert: np.ndarray, stored: DType, dtype: DType, base_hash: int
) -> Encoded:
    """A tile of the expert's elements (uint8[m, bytes], of type `stored`) at `positions`, in the base's
    type."""
    values = np.ascontiguousarray(expert).reshape(-1)
    if stored is not dtype:
        values = average([(values, stored)], dtype) if values.size else values
    return Encoded(encode_mask(positions, n) + values.tobytes(), len(positions), base_hash)


def signs(positions: np.ndarray, n: int, d: np.ndarray, base_hash: int) -> Encoded:
    """A tile of the signs of edits d (float64[m]; 0 counts as positive) at `positions`."""
    sums = float(np.abs(d).sum()), float(np.square(d).sum())
    return Encoded(encode_mask(positions, n) + encode_signs(d >= 0), len(positions), base_hash, sums)


def of_kept(kept: Kept, n: int, tensor: TensorInputs, values: str, base_hash: int) -> Encoded:
    """What the engine's graft keeps of a tile of n elements."""
    stored, dtype = tensor.experts[0].dtype, tensor.base.dtype
    if values == "exact":
        return exact(kept.positions, n, kept.expert, stored, dtype, base_hash)
    pairs = ((kept.expert, stored), (kept.base, dtype))
    expert, base = (as_float64(np.ascontiguousarray(data).reshape(-1), of) for data, of in pairs)
    return signs(kept.positions, n, expert - base, base_hash)


@dataclass(frozen=True)
class Part:
    """A tile of a tensor. base: its hash; n: elements; d: the experts' edits, float64[T, n]; tile: its
    inputs."""

    base: int
    n: int
    d: np.ndarray
    tile: TensorInputs


def parts(tensor: TensorInputs, start: int, stop: int) -> list[Part]:
    """The tiles of elements [start, stop). InputError where an edit is not finite."""
    found = []
    for at in range(start, stop, TILE):
        tile = tensor.slice(at, min(at + TILE, stop))
        base = as_float64(tile.base.data, tile.base.dtype)
        d = np.stack([as_float64(e.data, e.dtype) for e in tile.experts]) - base
        if not np.isfinite(d).all():
            raise InputError(
                f"{tile.experts[0].origin}: {tensor.name}: some weights of it or of the base are not finite, "
                f"in the {TILE} elements from flat index {at}"
            )
        found.append(Part(hash_of(tile.base.data), tile.numel, d, tile))
    return found


# T-Switch


def sides(tensor: TensorInputs, density: float, run: Run) -> tuple[float, float]:
    """The least kept magnitudes of positive and of negative edits of a tensor: the floor(density n)
    largest of its n positive ones are kept, and so of the negative ones; NaN where none is."""
    selection = Selection("density", density)

    def histograms(prefixes: Sequence[int]) -> np.ndarray:
        """int64[2, 2, 65536]: as backends.histogram, of each side."""
        total = np.zeros((2, 2, 1 << 16), np.int64)

        def of_segment(pair: tuple[int, int]) -> np.ndarray:
            counts = np.zeros_like(total)
            for part in parts(tensor, *pair):
                d = part.d[0].astype(np.float32)
                for side, chosen in enumerate((d[d > 0], -d[d < 0])):
                    bits = chosen.view(np.uint32)
                    high, low, prefix = bits >> 16, bits & 0xFFFF, prefixes[side]
                    if prefix < 0:
                        counts[side, 0] += np.bincount(high, minlength=1 << 16)
                        counts[side, 1] += np.bincount(high, weights=low, minlength=1 << 16).astype(np.int64)
                    else:
                        counts[side, 0] += np.bincount(low[high == prefix], minlength=1 << 16)
            return counts

        for counts in run(of_segment, segments(tensor.numel)):
            total += counts
        return total

    first = [decide.first_digit(selection, *counts) for counts in histograms((-1, -1))]
    prefixes = [x.prefix if isinstance(x, decide.Digit) else -1 for x in first]
    if any(isinstance(x, decide.Digit) for x in first):
        second = histograms([max(p, 0) for p in prefixes])
        for side, x in enumerate(first):
            if isinstance(x, decide.Digit):
                first[side] = decide.second_digit(selection, x, second[side, 0])
    return first[0], first[1]


def tswitch(part: Part, positive: float, negative: float) -> Encoded:
    """The largest edits of each sign: their signs."""
    d = part.d[0]
    single = d.astype(np.float32)
    kept = np.flatnonzero((single >= np.float32(positive)) | (-single >= np.float32(negative)))
    return signs(kept, part.n, d[kept], part.base)


# BitDelta


def bitdelta(part: Part) -> Encoded:
    """Signs of all edits of a matrix; what changed of other tensors, as it is."""
    tile = part.tile
    if role_of(tile.name, tile.shape) == MATRIX:
        return signs(np.arange(part.n), part.n, part.d[0], part.base)
    kept = np.flatnonzero(part.d[0] != 0)
    expert = tile.experts[0].gather(kept).data
    return exact(kept, part.n, expert, tile.experts[0].dtype, tile.base.dtype, part.base)


# EMR


def unified(part: Part, dtype: DType) -> tuple[np.ndarray, np.ndarray]:
    """The edit that experts share, and which of them agree with it: (uint8, in 16 bits; bool[T, n]).

    g = 1 where sum_t d_t > 0, else -1; m_t = d_t g > 0; e = g max over m_t of |d_t|
    """
    g = np.where(part.d.sum(axis=0) > 0, 1.0, -1.0)
    agree = part.d * g > 0
    e = g * np.where(agree, np.abs(part.d), 0.0).max(axis=0)
    return average([(e.view(np.uint8), BY_NAME["float64"])], dtype), agree


def emr(part: Part, shared: np.ndarray, dtype: DType, agree: np.ndarray) -> list[tuple[Encoded, float]]:
    """Per expert: which elements take the shared edit; with the sum of its magnitudes there. The sums of
    |d_t| are over all elements."""
    size = np.abs(as_float64(shared, dtype))
    found = []
    for d, mask in zip(part.d, agree, strict=True):
        kept = np.flatnonzero(mask)
        sums = float(np.abs(d).sum()), math.nan
        found.append(
            (Encoded(encode_mask(kept, part.n), len(kept), part.base, sums), float(size[kept].sum()))
        )
    return found
