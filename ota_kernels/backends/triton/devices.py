"""Several GPUs, for a model whose tensors lie on more than one: each tile is computed where it lies."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ...tensors.array import place
from ...tensors.result import MergeStats
from ...tensors.terms import Words
from ...tensors.tile import TensorInputs
from .. import triton
from . import density
from .backend import Tile, Triton


class Devices:
    """Backends by the places of resident arrays (`tensors.array.place`). Its functions are theirs; sums and
    counts come to the host as from one device, and add up to the same."""

    NAME = triton.NAME

    def __init__(self, backends: Mapping[str, Triton]) -> None:
        self._backends = backends

    def verify(self) -> tuple[bool, str]:
        """(ok, reason): whether all can run here."""
        found = [backend.verify() for backend in self._backends.values()]
        return next((each for each in found if not each[0]), found[0])

    def release(self) -> None:
        """Give up memory that is kept for the next tiles."""
        for backend in self._backends.values():
            backend.release()

    def finds(self, words: Words, together: bool = False) -> bool:
        """As `Triton.finds`; tensors of several devices have no threshold together."""
        return density.finds(words) and not together

    def merge_all(self, given: Sequence[Tile]) -> list[MergeStats]:
        """As `Triton.merge_all`: a thread waits for each device."""
        where = [place(tile.buffers[0].data) for tile, _, _ in given]
        shares = {p: [each for each, own in zip(given, where, strict=True) if own == p] for p in set(where)}
        with ThreadPoolExecutor(max(len(shares), 1), "ota-device") as pool:
            waiting = {p: pool.submit(self._of_device(p), share) for p, share in shares.items()}
            found = {p: iter(future.result()) for p, future in waiting.items()}
        return [next(found[p]) for p in where]

    def _of_device(self, where: str) -> Callable[[Sequence[Tile]], list[MergeStats]]:
        """One device's part, on the stream that is the caller's current one there."""
        backend = self._backends[where]
        stream: contextlib.AbstractContextManager = contextlib.nullcontext()
        if backend.device.type == "cuda":
            stream = torch.cuda.stream(torch.cuda.current_stream(backend.device))

        def merge(share: Sequence[Tile]) -> list[MergeStats]:
            with stream:
                return backend.merge_all(share)

        return merge

    def __getattr__(self, name: str) -> Callable:
        """A function over one tile, or one curvature, which comes first."""

        def call(of: TensorInputs, *arguments: Any) -> Any:
            return getattr(self._backends[place(of.buffers[0].data)], name)(of, *arguments)

        return call
