"""A small stratified sample of scores, from which a threshold is bracketed.

Tensors are laid end to end on one line, the line is cut into equal strata, and each stratum gives one run of
neighbouring elements at a random place: rows and columns of a matrix are alike in their curvature, so that many
short runs say more than few long ones. What is sampled decides how much work a selection is, never its result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .factors import CHUNK, Map
from .tensors import TensorInputs

RUN = 16  # elements of a run: one cache line of float32

Scores = Callable[[TensorInputs], Sequence[np.ndarray]]  # a gathered tile -> float32[n] per expert


def runs(sizes: Sequence[int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """(tensor number, flat index of the first element), int64[count'], of one run in each of `count` strata,
    in order. sizes: elements of each tensor; a run that would leave its tensor begins earlier."""
    ends = np.cumsum(np.asarray(sizes, np.int64))
    total = int(ends[-1]) if len(ends) else 0
    count = min(count, total)
    if count == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    place = (np.arange(count) + np.random.default_rng(count).random(count)) * (total / count)
    place = np.minimum(place.astype(np.int64), total - 1)
    index = np.searchsorted(ends, place, side="right")
    first = place - (ends - sizes)[index]
    return index, np.maximum(np.minimum(first, np.asarray(sizes)[index] - RUN), 0)


def sample(
    tensors: Sequence[TensorInputs],
    count: int,
    scores: Scores,
    run: Map,
    release: Callable[[TensorInputs], None] = lambda tile: None,
) -> list[np.ndarray]:
    """Scores of `count` runs over all tensors, float32[count', RUN] per expert.

    scores: of a gathered tile, per expert; release: called with each piece of a tensor that has been read.
    """
    index, first = runs([t.numel for t in tensors], count)
    pieces = np.stack([index, first // CHUNK])
    cuts = np.flatnonzero((np.diff(pieces, axis=1) != 0).any(axis=0)) + 1

    def of_piece(part: slice) -> Sequence[np.ndarray]:
        tensor = tensors[index[part.start]]
        places = (first[part, None] + np.arange(RUN)).reshape(-1) % tensor.numel
        found = scores(tensor.gather(places))
        release(tensor.slice(int(places.min()), int(places.max()) + 1))
        return found

    bounds = [0, *cuts.tolist(), len(index)]
    parts = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if a < b]
    found = list(run(of_piece, parts))
    return [np.concatenate(of_expert).reshape(-1, RUN) for of_expert in zip(*found, strict=True)]
