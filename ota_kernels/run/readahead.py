"""Asks for the pages of tiles that are next."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

from ..io.pages import advise
from ..select.sample import are_cached
from ..tensors.buffer import Buffer
from ..tensors.tile import TensorInputs


class ReadAhead:
    """Keeps a disk at work: a fault asks for one piece at a time, and waits for it. Does nothing where the
    page cache holds the inputs of `tensors` already."""

    def __init__(self, tensors: Sequence[TensorInputs]) -> None:
        self._tensors = tensors

    @functools.cached_property
    def is_idle(self) -> bool:
        return are_cached([buffer for tensor in self._tensors for buffer in tensor.buffers])

    def __call__(self, buffers: Iterable[Buffer]) -> None:
        """These will be read soon. Waits for room in the disk's queue, not for their pages."""
        if not self.is_idle:
            for buffer in buffers:
                advise(buffer.data, "willneed")
