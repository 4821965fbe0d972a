"""Tensors that are copied: whether several are equal, and one in another type."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..backends import Backend
from ..errors import InputError
from ..io.pages import advise, check_reads
from ..planning.buffers import average
from ..planning.outputs import AVERAGE, OutputTensor
from ..tensors.buffer import Buffer
from ..tensors.curvature import Uniform
from ..tensors.dtypes import DType
from ..tensors.terms import ExpertTerms, Terms, Words
from ..tensors.tile import TensorInputs


def copied(backend: Backend, entry: OutputTensor, nbytes: int) -> Iterator[tuple[int, Buffer]]:
    """(first element, elements) of a tensor that no backend computes, about `nbytes` at a time: of the only
    source, of several that must be equal, or their mean."""
    step = nbytes // entry.dtype.itemsize
    sources = [part.source for part in entry.sources]
    for start in range(0, entry.numel, step):
        pieces = [b.slice(start, min(start + step, entry.numel)) for b in sources]
        if entry.action == AVERAGE:
            mean = average([(piece.data, piece.dtype) for piece in pieces], entry.dtype)
            yield start, Buffer(mean, entry.dtype)
        else:
            check_equal(entry.name, pieces)
            yield start, in_type(backend, entry.name, pieces[0], entry.dtype)
        check_reads()
        for piece in pieces:
            advise(piece.data, "dontneed")


def in_type(backend: Backend, name: str, piece: Buffer, dtype: DType) -> Buffer:
    """The elements in this type, rounded once; as they are where it is their own."""
    if piece.dtype == dtype:
        return piece
    words = Words(score="none", select="all", weigh="constant", divide="number")
    out = np.empty(len(piece) * dtype.itemsize, np.uint8)
    tile = TensorInputs(name, (len(piece),), dtype, None, (piece,), (Uniform(),))
    backend.merge(tile, Terms(words, (ExpertTerms(),)), out)
    return Buffer(out, dtype)


def check_equal(name: str, pieces: list[Buffer]) -> None:
    """InputError unless all models have the same values."""
    first, *others = pieces
    for other in others:
        if not np.array_equal(first.data, other.data):
            raise InputError(
                f"{other.origin}: {name} ({other.dtype.name}) differs from {first.origin}; "
                "only floating-point tensors are merged"
            )
