"""A tile in device memory, as the kernels want it, and the table of addresses and numbers they read."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton.language as tl

from ...tensors import log8
from ...tensors.result import NonFinite

ALIGNMENT = 16  # bytes of the widest load
WARPS = 4

_LAUNCHING = threading.RLock()


def launch(kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Launch a kernel, compiled if need be. Threads take turns: Triton, 3.9 too, shows a kernel to other
    threads before it is loaded (its pull request 11518), and its interpreter's state is the process's."""
    with _LAUNCHING:
        kernel[grid](*arguments, **constants)


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
_EXACT_IN_BF16 = (torch.float8_e4m3fn, torch.float8_e5m2)


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
    """Curvature in 8 bits (ota_kernels.log8). codes: uint8[n]; scales: float32, one per row of the matrix;
    n_columns: elements of a row; start: flat index of the tile's first element."""

    codes: torch.Tensor
    scales: torch.Tensor
    n_columns: int
    start: int = 0

    def full(self, n: int) -> torch.Tensor:
        """The first n elements, float32[n]."""
        row = torch.arange(self.start, self.start + n, device=self.codes.device) // self.n_columns
        levels = torch.from_numpy(log8.LEVELS.copy()).to(self.codes.device)
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


def streamed(c: Curvature) -> list[torch.Tensor]:
    """What of a curvature is read side by side with the weights: all but what belongs to rows."""
    values, by_column = _addressed(c)
    return [x for x in (values if by_column is None else None, by_column) if x is not None]


def place_of(c: Curvature) -> tuple[int, int]:
    """(flat index of the first element, elements of a row) of curvature by rows; else what nobody reads."""
    return (c.start, c.n_columns) if isinstance(c, (Rank1, Log8)) else (0, BLOCK)


@dataclass(frozen=True, slots=True)
class DeviceTile:
    """The inputs of one tile, contiguous tensors on one device.

    base: [n], None where the method has none; experts: [n] each; curvatures: one per expert.
    """

    base: torch.Tensor | None
    experts: tuple[torch.Tensor, ...]
    curvatures: tuple[Curvature, ...]

    @property
    def numel(self) -> int:
        return self.experts[0].numel()

    @property
    def device(self) -> torch.device:
        return self.experts[0].device

    def expert(self, t: int) -> DeviceTile:
        """The tile of expert t alone."""
        return DeviceTile(self.base, self.experts[t : t + 1], self.curvatures[t : t + 1])


def unified(tile: DeviceTile) -> DeviceTile:
    """The same values with one element type for all weights, one form and type for all curvature: kernels are
    compiled for those. What differs is widened without loss, in a copy; models seldom differ.

    Rows shorter than a block need a division per element: their curvature is written out.
    """
    base = None if tile.base is None else _widened(tile.base)
    experts = _one_type(tuple(map(_widened, tile.experts)))
    forms = {type(c) for c in tile.curvatures}
    narrow = any(place_of(c)[1] < BLOCK for c in tile.curvatures)
    if len(forms) == 1 and not narrow:
        curvatures = _one_type(tile.curvatures) if forms == {torch.Tensor} else tile.curvatures
        return DeviceTile(base, experts, curvatures)
    values = tuple(written_out(c, tile.numel, tile.device) for c in tile.curvatures)
    return DeviceTile(base, experts, _one_type(values))


def _widened(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16() if x.dtype in _EXACT_IN_BF16 else x


def _one_type(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    found = {x.dtype for x in tensors}
    if len(found) == 1:
        return tensors
    wide = torch.float64 if torch.float64 in found else torch.float32
    return tuple(x.to(wide) for x in tensors)


def written_out(c: Curvature, n: int, device: torch.device) -> torch.Tensor:
    """One curvature value per element of a tile: [n]."""
    if c is None:
        return torch.ones(n, dtype=torch.float32, device=device)
    return c.full(n) if isinstance(c, (Rank1, Log8)) else c


def is_aligned(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether 16-byte loads may be used on all of them."""
    return all(x.data_ptr() % ALIGNMENT == 0 for x in tensors)


def launches(n: int) -> Iterator[tuple[int, int, bool]]:
    """(first block, blocks, whether it is the tail) of the launches that cover n elements: full blocks, then
    the rest. Only the tail has a mask: it would turn all 16-byte loads into loads of single elements."""
    full = n // BLOCK
    if full:
        yield 0, full, False
    if n % BLOCK:
        yield full, 1, True


def addresses(tile: DeviceTile, columns: Sequence[torch.Tensor | None] = ()) -> list[int]:
    """The kernels' table for a unified tile: weights; curvatures, row sums or scales; column shares or codes;
    `columns`."""

    def address(x: torch.Tensor | None) -> int:
        return 0 if x is None else x.data_ptr()

    first, second = zip(*map(_addressed, tile.curvatures), strict=True)
    return [address(x) for x in (*tile.experts, *first, *second, *columns)]


def _addressed(c: Curvature) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if isinstance(c, Rank1):
        return c.rows, c.columns
    return (c.scales, c.codes) if isinstance(c, Log8) else (c, None)


def upload(table: Sequence[int], numbers: Sequence[float], device: torch.device) -> tuple:
    """The kernels' table and numbers on the device: int64, and float64, which holds every float32 exactly."""
    words = np.array(table, np.int64).tobytes() + np.array(numbers, np.float64).tobytes()
    # A tensor that leaves the cache may be in use still: only its own stream takes its memory after that use.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _upload(words, len(table), device, stream)


@functools.lru_cache(maxsize=64)  # tiles of a ring have the same addresses again and again
def _upload(data: bytes, n_addresses: int, device: torch.device, stream: int) -> tuple:
    words = torch.from_numpy(np.frombuffer(data, np.int64).copy())
    if device.type == "cuda":
        words = words.pin_memory().to(device, non_blocking=True)  # unpinned, it would wait for the stream
    return words[:n_addresses], words[n_addresses:].view(torch.float64)


def nonfinite(tile: DeviceTile) -> tuple[NonFinite, ...]:
    """The inputs that cannot be used, in plain torch: kernels only tell whether there may be any."""
    found = []
    if tile.base is not None:
        found.append(_count("base", -1, ~torch.isfinite(tile.base.float())))
    for t, (w, c) in enumerate(zip(tile.experts, tile.curvatures, strict=True)):
        found.append(_count("weights", t, ~torch.isfinite(w.float())))
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
