"""A small stratified sample of scores, from which a threshold is bracketed.

Tensors are laid end to end on one line, the line is cut into equal strata, and each stratum gives one run of
neighbouring elements at a random place: rows and columns of a matrix are alike in their curvature, so that many
short runs say more than few long ones. What is sampled decides how much work a selection is, never its result.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from .factors import CHUNK, Map
from .tensors import TensorInputs

RUN = 16  # elements of a run: one cache line of float32

# (tensor, first elements of runs: int64[m]) -> scores float32[m, RUN], per expert
Scores = Callable[[TensorInputs, np.ndarray], Sequence[np.ndarray]]


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

    release: called with each piece of a tensor that has been read.
    """
    index, first = runs([t.numel for t in tensors], count)
    changes = (np.diff(index) != 0) | (np.diff(first // CHUNK) != 0)
    bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), len(index)]

    def of_piece(part: tuple[int, int]) -> Sequence[np.ndarray]:
        begin, end = part
        tensor, starts = tensors[index[begin]], first[begin:end]
        found = scores(tensor, starts)
        release(tensor.slice(int(starts[0]), min(int(starts[-1]) + RUN, tensor.numel)))
        return found

    found = list(run(of_piece, itertools.pairwise(bounds)))
    return [np.concatenate(of_expert) for of_expert in zip(*found, strict=True)]
