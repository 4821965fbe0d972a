"""Work cut into pieces that can be taken one by one: by a process of several, or for a sample."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ..tensors.segment import CHUNK
from ..tensors.tile import TensorInputs
from .decide import Decider
from .engine import Range

_LOTS = 32  # of each rank, about
LEAST_LOT, _LARGEST_LOT = 1 << 22, 1 << 31  # bytes


def ranges_of(
    decider: Decider, index: int, tensor: TensorInputs, gaps: Iterable[tuple[int, int]], elements: int
) -> list[Range]:
    """The gaps of tensor number `index` in ranges of about so many elements; in one piece, where something is
    found of the whole tensor before or after it merges."""
    gaps = list(gaps)
    local = decider.brackets and not decider.model_scope
    if decider.needs.of_tensor or local or tensor.numel <= elements:
        return [(index, start, stop) for start, stop in gaps]
    matrix = decider.matrices.shape(tensor)
    whole = math.prod(matrix) if matrix else math.lcm(decider.score_terms(tensor).whole, tensor.columns)
    # Whole chunks, where one fits: the leaves of checksums are then written at once.
    even = math.lcm(whole, CHUNK)
    step = elements // even * even or elements // whole * whole or whole
    return [
        (index, begin, min(begin + step, stop)) for start, stop in gaps for begin in range(start, stop, step)
    ]


def lot_bytes(total: int, count: int) -> int:
    """Bytes of a lot, where `count` ranks take lots of so many bytes in all: many times as many as ranks, so
    that those which are slow hold nobody up for long, and large enough to be read in one go."""
    return min(max(total // (count * _LOTS), LEAST_LOT), _LARGEST_LOT)


def lots_of(
    pieces: Sequence[Range], weights: Sequence[int], nbytes: int
) -> tuple[list[list[Range]], list[int]]:
    """Neighbouring pieces together in lots of at least so many bytes, and the bytes of each. weights: bytes
    of an element, by tensor."""
    lots: list[list[Range]] = []
    sizes: list[int] = []
    for piece in pieces:
        index, start, stop = piece
        if not lots or sizes[-1] >= nbytes:
            lots.append([])
            sizes.append(0)
        lots[-1].append(piece)
        sizes[-1] += (stop - start) * weights[index]
    return lots, sizes
