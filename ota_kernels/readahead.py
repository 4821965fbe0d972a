"""Asks for the pages of tiles that are next."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from .io.pages import advise
from .sampling import are_cached
from .tensors import TensorInputs


class ReadAhead:
    """Keeps a disk at work: a fault asks for one piece at a time, and waits for it. Does nothing where the
    page cache holds the inputs of `tensors` already."""

    def __init__(self, tensors: Sequence[TensorInputs]) -> None:
        self._tensors = tensors

    @functools.cached_property
    def _is_idle(self) -> bool:
        return are_cached([buffer for tensor in self._tensors for buffer in tensor.buffers])

    def __call__(self, tensor: TensorInputs, start: int, stop: int) -> None:
        """Elements [start, stop) will be read soon. Does not wait for them."""
        if self._is_idle:
            return
        for buffer in tensor.slice(start, stop).buffers:
            advise(buffer.data, "willneed")
