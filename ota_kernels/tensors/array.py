"""Array operations that host and device memory share, and the only place that tells the two apart.

An Array is a numpy array, or a torch tensor that its backend uses where it lies ("resident": on a GPU; on the
CPU under Triton's interpreter). What has one name and one meaning in numpy and torch is called through
`library`. Work on tensors goes to the caller's current stream; only what returns host values waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import BackendError

Array = Any  # np.ndarray | torch.Tensor

# Elements of a tile. A launch and what waits for it take a fifth of a millisecond, such a tile one and a half
# (34 bytes per element at 3 TB/s). Room for its candidates takes as much memory as its inputs: hence a bound.
TILE = 1 << 27

BINS = 1 << 16  # of a histogram by 16 bits of a score
_INTEGERS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}


def is_resident(data: Array) -> bool:
    """Whether it is a torch tensor, not numpy's."""
    return not isinstance(data, (np.ndarray, np.generic))


def is_captured(data: Array) -> bool:
    """Whether work on it is recorded for a CUDA graph now, which runs it later, without the host."""
    return is_resident(data) and data.is_cuda and library(data).cuda.is_current_stream_capturing()


def needs_the_host(data: Array) -> None:
    """Raises BackendError where work on data is captured: values are to be read, or copied there."""
    if is_captured(data):
        raise BackendError(
            "while a CUDA graph is captured the host can decide nothing: merge with known thresholds "
            "(precond_threshold, or a Merger that has merged so before) and on_nonfinite='base', or outside "
            "of the graph"
        )


def library(data: Array) -> ModuleType:
    """numpy or torch, for functions that both have."""
    if not is_resident(data):
        return np
    import torch

    return torch


def elements(data: Array, size: int) -> Array:
    """Bytes as integers of `size` bytes."""
    if not is_resident(data):
        return data.view(f"u{size}")
    return data.view(getattr(library(data), _INTEGERS[size]))


def raw(data: Array) -> Array:
    """Elements as bytes, uint8."""
    return data.view(library(data).uint8)


def empty(nbytes: int, like: Array) -> Array:
    """uint8[nbytes] where `like` is."""
    if not is_resident(like):
        return np.empty(nbytes, np.uint8)
    return like.new_empty(nbytes, dtype=library(like).uint8)


def beside(array: np.ndarray, like: Array) -> Array:
    """The array, or a copy of it on the device of `like`."""
    if not is_resident(like):
        return array
    needs_the_host(like)
    return library(like).from_numpy(array).to(like.device)


def arange(n: int, like: Array) -> Array:
    """int64[n] where `like` is."""
    return library(like).arange(n) if not is_resident(like) else library(like).arange(n, device=like.device)


def on_cpu(array: np.ndarray) -> Array:
    """The array as a tensor of the CPU, for Triton's interpreter."""
    import torch

    return torch.from_numpy(array)


def place(data: Array) -> str:
    """The device of a resident array."""
    return str(data.device)


def joined(parts: Sequence[Array]) -> Array:
    """One array of all; of several devices, on the first one's."""
    return library(parts[0]).concatenate(_together(parts))


def _together(parts: Sequence[Array]) -> tuple[Array, ...]:
    return tuple(p.to(parts[0].device) for p in parts) if is_resident(parts[0]) else tuple(parts)


def float64(values: Array) -> Array:
    return values.double() if is_resident(values) else values.astype(np.float64, copy=False)


def squares(values: Array) -> Array:
    """Of float32 values, in float64."""
    return values.double().square_() if is_resident(values) else np.square(values, dtype=np.float64)


def int64(values: Array) -> Array:
    return values.long() if is_resident(values) else values.astype(np.int64, copy=False)


def take(data: Array, positions: Array, size: int) -> Array:
    """A copy of the elements of `size` bytes at `positions` (integers[m]), as bytes."""
    if not is_resident(data):
        return data.view(f"u{size}")[positions].view(np.uint8)
    return raw(elements(data, size).index_select(0, positions))


def scatter(data: Array, positions: Array, merged: Array, size: int) -> None:
    """data[positions] = merged, elements of `size` bytes. positions: integers of 32 bits, each once."""
    if not is_resident(data):
        from .. import _native

        _native.scatter(data, positions, merged, size)
        return
    elements(data, size)[positions.long()] = elements(merged, size)


def replace_changed(out: Array, base: Array, expert: Array, size: int) -> None:
    """Put the expert's elements of `size` bytes where out is not the base; all as bytes."""
    out, base, expert = (elements(x, size) for x in (out, base, expert))
    if not is_resident(out):
        np.copyto(out, expert, where=out != base)
        return
    torch = library(out)
    torch.where(out != base, expert, out, out=out)


def is_equal(one: Array, other: Array) -> bool:
    """Whether two arrays of one type hold the same."""
    needs_the_host(one)
    return one.shape == other.shape and bool((one == other).all())


def ascending(values: Array) -> Array:
    """All values in ascending order, flat."""
    if not is_resident(values):
        return np.sort(values, axis=None)
    return library(values).sort(values.reshape(-1)).values


def from_top(ascending: Array, place: Array) -> Array:
    """The value at `place` from the top (an integral number, shape ()) of n in ascending order; the largest
    where `place` is below 0, 0 where it is not below n."""
    n = len(ascending)
    if not is_resident(ascending):
        return ascending[n - 1 - max(int(place), 0)] if place < n else ascending.dtype.type(0)
    found = ascending.index_select(0, (n - 1 - place.long().clamp(0, n - 1)).reshape(1))[0]
    return library(found).where(place < n, found, found.new_zeros(()))


def squared_differences(values: Array) -> Array:
    """Sum of (values[0] - values[1])^2, (values[2] - values[3])^2, ..., float64 of shape (). An odd last one
    is left out."""
    pairs = float64(values)[: len(values) // 2 * 2].reshape(-1, 2)
    return ((pairs[:, 0] - pairs[:, 1]) ** 2).sum()


def sorted_at(values: Array, positions: Sequence[int]) -> Array:
    """values[n] in an order whose elements at `positions` are those of the ascending order."""
    return ascending(values) if is_resident(values) else np.partition(values, positions)


def kth_largest(values: Array, k: int) -> Array:
    """The k-th largest of values[n], shape (); may change their order."""
    n = len(values)
    if not is_resident(values):
        values.partition(n - k)
        return values[n - k]
    # Selected by digits, without sorting; what is on the shorter side of it takes memory.
    if k <= n // 2:
        return values.topk(k, sorted=False).values.min()
    return values.topk(n - k + 1, largest=False, sorted=False).values.max()


def histogram(bits: Array, prefix: int) -> tuple[np.ndarray, np.ndarray]:
    """(counts, lows) on the host, int64[65536]: what a backend's `histogram` adds for scores of these bits
    (int64[n]); with a prefix, lows are 0."""
    high, low = bits >> 16, bits & (BINS - 1)
    if is_resident(bits):
        found = bits.new_zeros(2, BINS)
        if prefix < 0:
            found[0].index_add_(0, high, library(bits).ones_like(high))
            found[1].index_add_(0, high, low)
        else:
            found[0].index_add_(0, low, int64(high == prefix))
        counts, lows = found.cpu().numpy()
        return counts, lows
    if prefix < 0:
        counts = np.bincount(high, minlength=BINS)
        return counts, np.bincount(high, weights=low, minlength=BINS).astype(np.int64)
    return np.bincount(low[high == prefix], minlength=BINS), np.zeros(BINS, np.int64)


def scalar(value: float, like: Array, dtype: str) -> Array:
    """The number as an array of shape () where `like` is."""
    if not is_resident(like):
        return np.dtype(dtype).type(value)
    return like.new_full((), value, dtype=getattr(library(like), dtype))


def numbers(*scalars: Array) -> list[float]:
    """Arrays of shape () as numbers, with one wait for the device."""
    if not is_resident(scalars[0]):
        return [float(x) for x in scalars]
    needs_the_host(scalars[0])
    return library(scalars[0]).stack([x.double() for x in _together(scalars)]).tolist()


def host(values: Array) -> np.ndarray:
    """The array, or a copy of it on the host."""
    needs_the_host(values)
    return values.cpu().numpy() if is_resident(values) else values
