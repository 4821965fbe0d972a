"""A backend's tile as the kernels take it, and undecided elements as the engine takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from ...tensors.array import Array, is_resident
from ...tensors.buffer import Buffer
from ...tensors.curvature import Curvature, Full, Log8, LowRank, Rank1, Uniform
from ...tensors.result import Candidates
from ...tensors.tile import TensorInputs
from . import tiles
from .merge import Undecided

# Puts arrays on the device: a flat uint8 tensor for each, aligned like a tensor of its own.
Load = Callable[[Sequence[Array]], list[torch.Tensor]]
# Bytes of tensors on the device, where the engine wants them.
Fetch = Callable[[Sequence[torch.Tensor]], list[Array]]


def in_place(device: torch.device) -> Load:
    """A Load for resident tiles: elements are used where they are; only factors, which are rows and columns,
    are copied."""

    def load(arrays: Sequence[Array]) -> list[torch.Tensor]:
        return [a if is_resident(a) else _copied(a, device) for a in arrays]

    return load


def left_there(tensors: Sequence[torch.Tensor]) -> list[Array]:
    """A Fetch for resident tiles."""
    return [x.view(torch.uint8) for x in tensors]


def _copied(array: np.ndarray, device: torch.device) -> torch.Tensor:
    data = torch.from_numpy(array.reshape(-1).view(np.uint8))
    return torch.empty(len(data), dtype=torch.uint8, device=device).copy_(data)


def device_tile(tile: TensorInputs, load: Load) -> tiles.DeviceTile:
    """The inputs of a tile."""
    weights = [b for b in (tile.base, *tile.experts) if b is not None]
    curvatures = [_touched(c, tile.numel) for c in tile.curvatures]
    loaded = iter(load([*(b.data for b in weights), *(a for c in curvatures for a in _arrays(c))]))
    typed = [_typed(next(loaded), b) for b in weights]
    base, *experts = typed if tile.base is not None else (None, *typed)
    on_device = tuple(_curvature(c, tile.numel, loaded) for c in curvatures)
    return tiles.DeviceTile(base, tuple(experts), on_device)


def device_curvature(curvature: Curvature, n: int, load: Load) -> tiles.Curvature:
    """The curvature of a tile of n elements alone."""
    touched = _touched(curvature, n)
    return _curvature(touched, n, iter(load(_arrays(touched))))


def _typed(data: torch.Tensor, buffer: Buffer) -> torch.Tensor:
    return data.view(getattr(torch, buffer.dtype.name))


def _arrays(c: Curvature) -> list[Array]:
    return [*(b.data for b in c.buffers), *c.factors]


def _touched(c: Curvature, n: int) -> Curvature:
    """The curvature of a tile of n elements without the rows of its matrix that have none of them."""
    if isinstance(c, Log8):
        rows, start = _rows(c.start, n, c.columns)
        return replace(c, scales=c.scales[rows], start=start)
    if isinstance(c, Rank1):
        rows, start = _rows(c.start, n, c.columns.size)
        return replace(c, rows=c.rows[rows], start=start)
    if isinstance(c, LowRank):
        rows, start = _rows(c.start, n, c.right.shape[1])
        return replace(c, left=c.left[rows], start=start)
    return c


def _rows(start: int, n: int, columns: int) -> tuple[slice, int]:
    """The rows that elements [start, start + n) lie in, and their start within those rows."""
    if n == 0:
        return slice(0, 0), 0
    first = start // columns
    return slice(first, (start + n - 1) // columns + 1), start - first * columns


def _curvature(c: Curvature, n: int, loaded: Iterator[torch.Tensor]) -> tiles.Curvature:
    """A curvature whose arrays come from `loaded`, in the order of `_arrays`."""
    if isinstance(c, Full):
        return _typed(next(loaded), c.values)
    if isinstance(c, Uniform):
        return None
    if isinstance(c, Log8):
        codes = next(loaded)
        return tiles.Log8(codes, next(loaded).view(torch.float32), c.columns, c.start)
    one, other = (next(loaded).view(torch.float32).view(factor.shape) for factor in c.factors)
    if isinstance(c, Rank1):
        return tiles.Rank1(one, other, c.start)
    return tiles.low_rank(one, other, c.start, n)


def candidates(tile: TensorInputs, undecided: Undecided, fetch: Fetch) -> Candidates:
    """The undecided elements of `tile`, where `fetch` puts them."""
    operands = undecided.operands
    columns = [undecided.positions, operands.base, *operands.experts, *operands.curvatures]
    fetched = iter(fetch([x for x in (*columns, *undecided.steps) if x is not None]))
    found = [None if x is None else next(fetched) for x in columns]
    return Candidates.of(tile, found, list(fetched))
