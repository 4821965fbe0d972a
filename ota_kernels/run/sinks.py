"""Where the engine's results go: to shards; of tensors in memory in place, and on a device by one thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..io.pages import release
from ..io.writer import ShardWriter
from ..tensors import array as resident
from ..tensors.array import Array
from ..tensors.buffer import Buffer
from ..tensors.segment import Segment
from ..tensors.tile import TensorInputs
from .pool import InPlace
from .readahead import ReadAhead

if TYPE_CHECKING:
    import torch


class InRooms:
    """A sink whose tiles are merged into memory of their thread, which its next tile uses again."""

    def __init__(self) -> None:
        self._local = threading.local()

    def room(self, segment: Segment, nbytes: int) -> np.ndarray:
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or buffer.size < nbytes:
            buffer = self._local.buffer = np.empty(nbytes, np.uint8)
        return buffer[:nbytes]


class FileSink(InRooms):
    """Merged tiles go to the shards; each thread merges into one buffer of its own."""

    def __init__(
        self,
        writer: ShardWriter,
        tensors: list,
        read_ahead: ReadAhead,
        release: Callable[[TensorInputs], None] = release,
    ) -> None:
        super().__init__()
        self._writer, self._tensors, self._read_ahead = writer, tensors, read_ahead
        self._release = release

    def write(self, segment: Segment, merged: np.ndarray, final: bool) -> None:
        self._writer.write(self._tensors[segment.index], segment.start, merged, final)

    def patch(self, segment: Segment, positions: np.ndarray, merged: np.ndarray) -> None:
        tensor = self._tensors[segment.index]
        self._writer.patch(tensor, segment.start, segment.stop, positions, merged)

    def wants(self, tensor: TensorInputs, segment: Segment) -> None:
        if not self._read_ahead.is_idle:
            self._read_ahead(tensor.reads(segment.start, segment.stop))

    def done_with(self, tile: TensorInputs) -> None:
        self._release(tile)


class MemorySink:
    """A Sink that holds the results of tensors where they are. outputs: uint8 per tensor, which may be given
    as `rooms` (None: memory of its own)."""

    def __init__(self, tensors: Sequence[TensorInputs], rooms: Sequence[Array | None] = ()) -> None:
        self._sizes = [t.out_dtype.itemsize for t in tensors]
        self.outputs = [
            _room(t) if room is None else room
            for t, room in zip(tensors, rooms or [None] * len(tensors), strict=True)
        ]

    def room(self, segment: Segment, nbytes: int) -> Array:
        begin = segment.start * self._sizes[segment.index]
        return self.outputs[segment.index][begin : begin + nbytes]

    def write(self, segment: Segment, merged: Array, final: bool) -> None:
        pass

    def patch(self, segment: Segment, positions: Array, merged: Array) -> None:
        size = self._sizes[segment.index]
        room = self.room(segment, (segment.stop - segment.start) * size)
        resident.scatter(room, positions, merged, size)

    def wants(self, tensor: TensorInputs, segment: Segment) -> None:
        pass

    def done_with(self, tile: TensorInputs) -> None:
        pass


def _room(tensor: TensorInputs) -> Array:
    """Where the tensor's inputs are; of what is computed, on the host."""
    nbytes = tensor.numel * tensor.out_dtype.itemsize
    return resident.empty(nbytes, tensor.experts[0].data if tensor.is_resident else np.empty(0, np.uint8))


class GraftSink(MemorySink):
    """Kept edits of the one expert become its own bits: w_0 + (w_t - w_0) is rounded."""

    def __init__(self, tensors: Sequence[TensorInputs], rooms: Sequence[Array | None] = ()) -> None:
        super().__init__(tensors, rooms)
        self._tensors = tensors

    def write(self, segment: Segment, merged: Array, final: bool) -> None:
        _restore_bits(*self._weights(segment), merged)

    def patch(self, segment: Segment, positions: Array, merged: Array) -> None:
        base, expert = self._weights(segment)
        _restore_bits(base.gather(positions), expert.gather(positions), merged)
        super().patch(segment, positions, merged)

    def _weights(self, segment: Segment) -> tuple[Buffer, Buffer]:
        tile = self._tensors[segment.index].slice(segment.start, segment.stop)
        return tile.base, tile.experts[0]


def _restore_bits(base: Buffer, expert: Buffer, merged: Array) -> None:
    """Put the expert's elements where merged (uint8, in the base's type) is not the base.

    That is where an edit is kept: w_0 + (w_t - w_0) is w_0 only if w_t is.
    """
    if expert.dtype == base.dtype:
        resident.replace_changed(merged, base.data, expert.data, base.dtype.itemsize)


class Inline(InPlace):
    """A Pool for work on a device: one task after the other on the caller's thread, so that kernels are
    launched on its current stream. What goes wrong on the device is a BackendError; the caller's autocast
    does not reach the work, whose results it would change."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._entered = contextlib.ExitStack()

    def __enter__(self) -> Inline:
        import torch

        from ..backends.triton.device import reported

        self._entered.enter_context(reported(self._device))
        self._entered.enter_context(torch.autocast(self._device.type, enabled=False))
        if self._device.type == "cuda":
            self._entered.enter_context(torch.cuda.device(self._device))
        return self

    def __exit__(self, *error: object) -> bool | None:
        return self._entered.__exit__(*error)
