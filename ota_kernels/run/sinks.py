"""What the engine uses for tensors in memory: results are merged in place, and on a device by one thread."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..tensors import array as resident
from ..tensors.array import Array
from ..tensors.buffer import Buffer
from ..tensors.segment import Segment
from ..tensors.tile import TensorInputs
from .pool import InPlace

if TYPE_CHECKING:
    import torch


class MemorySink:
    """A Sink that holds the results of tensors where they are. outputs: uint8 per tensor."""

    def __init__(self, tensors: Sequence[TensorInputs]) -> None:
        self._sizes = [t.out_dtype.itemsize for t in tensors]
        self.outputs = [resident.empty(t.numel * t.out_dtype.itemsize, t.experts[0].data) for t in tensors]

    def room(self, segment: Segment, nbytes: int) -> Array:
        begin = segment.start * self._sizes[segment.index]
        return self.outputs[segment.index][begin : begin + nbytes]

    def write(self, segment: Segment, merged: Array) -> None:
        pass

    def patch(self, segment: Segment, positions: Array, merged: Array) -> None:
        size = self._sizes[segment.index]
        room = self.room(segment, (segment.stop - segment.start) * size)
        resident.scatter(room, positions, merged, size)

    def wants(self, tensor: TensorInputs, segment: Segment) -> None:
        pass

    def done_with(self, tile: TensorInputs) -> None:
        pass


class GraftSink(MemorySink):
    """Kept edits of the one expert become its own bits: w_0 + (w_t - w_0) is rounded."""

    def __init__(self, tensors: Sequence[TensorInputs]) -> None:
        super().__init__(tensors)
        self._tensors = tensors

    def write(self, segment: Segment, merged: Array) -> None:
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
    launched on its current stream. What goes wrong on the device is a BackendError."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._entered = contextlib.ExitStack()

    def __enter__(self) -> Inline:
        import torch

        from ..backends.triton.device import reported

        self._entered.enter_context(reported(self._device))
        if self._device.type == "cuda":
            self._entered.enter_context(torch.cuda.device(self._device))
        return self

    def __exit__(self, *error: object) -> bool | None:
        return self._entered.__exit__(*error)
