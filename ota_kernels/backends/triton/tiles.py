"""A tile in device memory: from what a backend is given to tensors, as the kernels' launchers take them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import triton.language as tl

from ...tensors import curvature as forms
from ...tensors import log8
from ...tensors.array import Array, is_resident, needs_the_host
from ...tensors.buffer import Buffer
from ...tensors.result import NonFinite
from ...tensors.terms import Terms
from ...tensors.tile import TensorInputs

WARPS = 4

# Puts arrays on the device: a flat uint8 tensor for each, aligned like a tensor of its own.
Load = Callable[[Sequence[Array]], list[torch.Tensor]]
# Bytes of tensors on the device, where the engine wants them.
Fetch = Callable[[Sequence[torch.Tensor]], list[Array]]


def block_size(threads_of_warp: int) -> int:
    """Elements of a program's block: 8 per thread, one 16-byte load of 16-bit weights."""
    return 8 * threads_of_warp * WARPS


BLOCK = block_size(64 if torch.version.hip else 32)

TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
_FAR = 1 << 30  # elements and rows below it are counted in 32 bits


@dataclass(frozen=True, slots=True)
class Rank1:
    """Curvature rows[i] * columns[j] of a matrix. rows: float32[m]; columns: float32[k], divided by the
    total; start: flat index of the tile's first element."""

    rows: torch.Tensor
    columns: torch.Tensor
    start: int = 0

    @property
    def n_columns(self) -> int:
        return self.columns.numel()

    def full(self, n: int) -> torch.Tensor:
        """The first n elements, float32[n]."""
        index = torch.arange(self.start, self.start + n, device=self.rows.device)
        return self.rows[index // self.columns.numel()] * self.columns[index % self.columns.numel()]


@dataclass(frozen=True, slots=True)
class Log8:
    """Curvature in 8 bits (tensors/log8.py). codes: uint8[n]; scales: float32, one per row of the matrix;
    n_columns: elements of a row; start: flat index of the tile's first element."""

    codes: torch.Tensor
    scales: torch.Tensor
    n_columns: int
    start: int = 0

    def full(self, n: int) -> torch.Tensor:
        """The first n elements, float32[n]."""
        row = torch.arange(self.start, self.start + n, device=self.codes.device) // self.n_columns
        levels = on_device(log8.LEVELS, self.codes.device)
        return levels[self.codes[:n].long()] * self.scales[row]


def low_rank(left: torch.Tensor, right: torch.Tensor, start: int, n: int) -> torch.Tensor:
    """Curvature max(0, left @ right) of the elements [start, start + n) of a matrix, float32[n], summed in
    the order of the other backends. left: float32[m, r], right: float32[r, k]."""
    index = torch.arange(start, start + n, device=left.device)
    row, column = index // right.shape[1], index % right.shape[1]
    h = torch.zeros(n, dtype=torch.float32, device=left.device)
    for r in range(right.shape[0]):
        h = h + left[row, r] * right[r, column]
    return torch.where(h > 0, h, 0.0)


Curvature = torch.Tensor | Rank1 | Log8 | None  # one value per element; by rows; 1 everywhere


def kind_of(c: Curvature) -> str:
    """What kernels call this form of curvature."""
    return {Rank1: "rank1", Log8: "log8", type(None): "uniform"}.get(type(c), "full")


def addressed(c: Curvature) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The tensors of the table's "values" and "columns"."""
    if isinstance(c, Rank1):
        return c.rows, c.columns
    return (c.scales, c.codes) if isinstance(c, Log8) else (c, None)


def streamed(c: Curvature) -> list[torch.Tensor]:
    """What of a curvature is read side by side with the weights: all but what belongs to rows."""
    values, by_column = addressed(c)
    return [x for x in (values if by_column is None else None, by_column) if x is not None]


def written_out(c: Curvature, n: int, device: torch.device) -> torch.Tensor:
    """One curvature value per element of a tile: [n]."""
    if c is None:
        return torch.ones(n, dtype=torch.float32, device=device)
    return c.full(n) if isinstance(c, (Rank1, Log8)) else c


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tile lies in its tensor, as far as its rows go. first: place of its first element, counted from
    the beginning of the first row that arrays by row hold; columns: elements of a row."""

    first: int
    columns: int

    def kind(self, n: int, gathered: bool) -> str:
        """How kernels find rows and columns of n elements: see `stages.place_of`."""
        if gathered:
            return "gathered"
        if max(self.first + n, self.columns) >= _FAR:
            return "wide"
        if self.columns < BLOCK:
            return "narrow"
        return "whole" if self.columns % BLOCK == 0 and self.first % BLOCK == 0 else "long"

    @property
    def by_fours(self) -> bool:
        """Whether columns may be read by 16 bytes of float32."""
        return self.columns % 4 == 0 and self.first % 4 == 0


@dataclass(frozen=True, slots=True)
class DeviceTile:
    """The inputs of one tile, contiguous tensors on one device.

    base: [n], None where the method has none; experts: [n] each; curvatures: one per expert; origins: [n]
    each, or none; start: flat index of the first element in its tensor; place: where rows are asked for;
    index: int64[n] of gathered elements; place_weights, row_scores: of each expert or none, the arrays of
    ExpertTerms from the tile's first row on.
    """

    base: torch.Tensor | None
    experts: tuple[torch.Tensor, ...]
    curvatures: tuple[Curvature, ...]
    origins: tuple[torch.Tensor | None, ...] = ()
    start: int = 0
    place: Place = Place(0, BLOCK)
    index: torch.Tensor | None = None
    place_weights: tuple[torch.Tensor | None, ...] = ()
    row_scores: tuple[torch.Tensor | None, ...] = ()

    @property
    def numel(self) -> int:
        return self.experts[0].numel()

    @property
    def device(self) -> torch.device:
        return self.experts[0].device

    def expert(self, t: int) -> DeviceTile:
        """The tile of expert t alone."""
        parts = ("experts", "curvatures", "origins", "place_weights", "row_scores")
        return replace(self, **{name: getattr(self, name)[t : t + 1] for name in parts})

    def slice(self, start: int, stop: int) -> DeviceTile:
        """The weights of elements [start, stop), without curvature and places."""
        parts = (self.base, *self.experts, *self.origins)
        base, *others = (x if x is None else x[start:stop] for x in parts)
        n = len(self.experts)
        return DeviceTile(base, tuple(others[:n]), (), tuple(others[n:]))

    def edit(self, t: int, dtype: torch.dtype) -> torch.Tensor:
        """d_t in that type, [n]; w_t without a base."""
        origin = self.origins[t] if self.origins and self.origins[t] is not None else self.base
        w = self.experts[t].to(dtype)
        return w if origin is None else w - origin.to(dtype)


# From what a backend is given.


def in_place(device: torch.device) -> Load:
    """A Load for resident tiles: elements are used where they are; only factors, which are rows and columns,
    are copied."""

    def load(arrays: Sequence[Array]) -> list[torch.Tensor]:
        return [a if is_resident(a) else _copied(a, device) for a in arrays]

    return load


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of a host array there; unpinned, it would wait for the stream."""
    needs_the_host(torch.empty(0, device=device))
    found = torch.from_numpy(np.frombuffer(bytearray(array), array.dtype).reshape(array.shape))
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found


def left_there(tensors: Sequence[torch.Tensor]) -> list[Array]:
    """A Fetch for resident tiles."""
    return [x.view(torch.uint8) for x in tensors]


def _copied(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return on_device(array.reshape(-1).view(np.uint8), device)


def device_tile(tile: TensorInputs, load: Load, terms: Terms | None = None) -> DeviceTile:
    """The inputs of a tile, and what terms say of its rows and columns."""
    given = [tile.base, *tile.experts, *(tile.origins or ())]
    weights = [b for b in given if b is not None]
    curvatures = [_touched(c, tile.numel) for c in tile.curvatures]
    if terms is not None and not terms.words.curvature and not any(e.span or e.wanted for e in terms.experts):
        curvatures = [forms.Uniform()] * len(curvatures)  # nobody reads it; undecided elements keep it
    rows, place = _place(tile)
    by_place = _by_place(terms, rows, tile.out_dtype.itemsize >= 4) if terms is not None else {}
    index = [] if tile.index is None else [tile.index]
    arrays = [a for of_experts in by_place.values() for a in of_experts if a is not None]
    loaded = iter(
        load([*(b.data for b in weights), *(a for c in curvatures for a in _arrays(c)), *index, *arrays])
    )
    base, *others = (None if b is None else _typed(next(loaded), b) for b in given)
    experts, origins = others[: len(tile.experts)], others[len(tile.experts) :]
    on_device = tuple(_curvature(c, tile.numel, loaded) for c in curvatures)
    return DeviceTile(
        base,
        tuple(experts),
        on_device,
        tuple(origins) if any(o is not None for o in origins) else (),
        tile.start,
        place,
        next(loaded).view(torch.int64) if index else None,
        **{name: tuple(_like(a, loaded) for a in of_experts) for name, of_experts in by_place.items()},
    )


def _place(tile: TensorInputs) -> tuple[slice, Place]:
    """The rows of its tensor that a tile touches, and its place in them."""
    columns = max(tile.shape[-1] if tile.shape else 1, 1)
    if tile.index is not None:
        return slice(None), Place(0, columns)
    rows, first = _rows(tile.start, tile.numel, columns)
    return rows, Place(first, columns)


def _by_place(terms: Terms, rows: slice, in_float64: bool) -> dict[str, list[np.ndarray | None]]:
    """Arrays of a merge's terms by row (of the tile) and by column."""
    found = {}
    if terms.words.weigh in ("by row", "by column"):
        part = rows if terms.words.weigh == "by row" else slice(None)
        dtype = np.float64 if in_float64 else np.float32
        found["place_weights"] = [np.asarray(e.weights)[part].astype(dtype) for e in terms.experts]
    if terms.words.score == "row magnitude":
        found["row_scores"] = [np.asarray(e.row_scores)[rows] for e in terms.experts]
    return found


def _like(array: np.ndarray, loaded: Iterator[torch.Tensor]) -> torch.Tensor:
    return next(loaded).view(torch.float64 if array.dtype == np.float64 else torch.float32)


def device_curvature(curvature: forms.Curvature, n: int, load: Load) -> Curvature:
    """The curvature of a tile of n elements alone."""
    touched = _touched(curvature, n)
    return _curvature(touched, n, iter(load(_arrays(touched))))


def _typed(data: torch.Tensor, buffer: Buffer) -> torch.Tensor:
    return data.view(getattr(torch, buffer.dtype.name))


def _arrays(c: forms.Curvature) -> list[Array]:
    return [*(b.data for b in c.buffers), *c.factors]


def _touched(c: forms.Curvature, n: int) -> forms.Curvature:
    """The curvature of a tile of n elements without the rows of its matrix that have none of them."""
    if isinstance(c, forms.Log8):
        rows, start = _rows(c.start, n, c.columns)
        return replace(c, scales=c.scales[rows], start=start)
    if isinstance(c, forms.Rank1):
        rows, start = _rows(c.start, n, c.columns.size)
        return replace(c, rows=c.rows[rows], start=start)
    if isinstance(c, forms.LowRank):
        rows, start = _rows(c.start, n, c.right.shape[1])
        return replace(c, left=c.left[rows], start=start)
    return c


def _rows(start: int, n: int, columns: int) -> tuple[slice, int]:
    """The rows that elements [start, start + n) lie in, and their start within those rows."""
    if n == 0:
        return slice(0, 0), 0
    first = start // columns
    return slice(first, (start + n - 1) // columns + 1), start - first * columns


def _curvature(c: forms.Curvature, n: int, loaded: Iterator[torch.Tensor]) -> Curvature:
    """A curvature whose arrays come from `loaded`, in the order of `_arrays`."""
    if isinstance(c, forms.Full):
        return _typed(next(loaded), c.values)
    if isinstance(c, forms.Uniform):
        return None
    if isinstance(c, forms.Log8):
        codes = next(loaded)
        return Log8(codes, next(loaded).view(torch.float32), c.columns, c.start)
    one, other = (next(loaded).view(torch.float32).view(factor.shape) for factor in c.factors)
    if isinstance(c, forms.Rank1):
        return Rank1(one, other, c.start)
    return low_rank(one, other, c.start, n)


def nonfinite(tile: DeviceTile) -> tuple[NonFinite, ...]:
    """The inputs that cannot be used, in plain torch: kernels only tell whether there may be any."""
    found = []
    if tile.base is not None:
        found.append(_count("base", -1, ~torch.isfinite(tile.base.float())))
    for t, (w, c) in enumerate(zip(tile.experts, tile.curvatures, strict=True)):
        bad = ~torch.isfinite(w.float())
        if tile.origins and tile.origins[t] is not None:
            bad |= ~torch.isfinite(tile.origins[t].float())
        found.append(_count("weights", t, bad))
        if c is not None:
            found.append(_unusable_curvature(written_out(c, tile.numel, tile.device), t))
    return tuple(x for x in found if x.count)


def nonfinite_curvature(h: torch.Tensor, t: int) -> tuple[NonFinite, ...]:
    """The values of expert t that are no curvature."""
    found = _unusable_curvature(h, t)
    return (found,) if found.count else ()


def _unusable_curvature(h: torch.Tensor, t: int) -> NonFinite:
    return _count("curvature", t, ~(torch.isfinite(h) & (h >= 0)))


def _count(role: str, t: int, bad: torch.Tensor) -> NonFinite:
    return NonFinite(role, t, int(bad.sum()), int(bad.byte().argmax()) if bad.numel() else -1)
