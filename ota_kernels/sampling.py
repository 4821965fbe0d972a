"""A small stratified sample of scores, from which a threshold is bracketed.

Tensors are laid end to end on one line and the line is cut into equal strata. Each stratum gives a cluster:
short runs of neighbouring elements, spread over a window at a random place. Rows and columns of a matrix are
alike in their curvature, so that many short runs say more than few long ones; a window is read at once, so
that many runs in it cost little more than one. What is sampled decides how much work a selection is, never
its result.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from .backends import native
from .factors import CHUNK, Map
from .tensors import Buffer, TensorInputs

RUN = 16  # elements of a run: one cache line of float32
RUNS = 16  # of a cluster
CLUSTER = RUN * RUNS  # elements of a cluster
_STEP = 512  # elements between runs: a window spans 8192

Scores = Callable[[TensorInputs], Sequence[np.ndarray]]  # a gathered tile -> float32[n] per expert


def clusters(sizes: Sequence[int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """(tensor number, int64[count']; flat indices at which runs begin, int64[count', RUNS]) of one cluster in
    each of `count` strata, in order. sizes: elements of each tensor; runs of small ones overlap."""
    sizes = np.asarray(sizes, np.int64)
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    count = min(count, total)
    if count == 0:
        return np.zeros(0, np.int64), np.zeros((0, RUNS), np.int64)
    random = np.random.default_rng(count)
    place = ((np.arange(count) + random.random(count)) * (total / count)).astype(np.int64)
    index = np.searchsorted(ends, np.minimum(place, total - 1), side="right")
    numel = sizes[index]
    step = np.clip(numel // RUNS, 1, _STEP)
    window = place - (ends - sizes)[index]
    window = np.maximum(np.minimum(window, numel - RUNS * step), 0)
    offsets = random.random((count, RUNS)) * np.maximum(step - RUN, 1)[:, None]
    starts = window[:, None] + np.arange(RUNS) * step[:, None] + offsets.astype(np.int64)
    return index, np.maximum(np.minimum(starts, (numel - RUN)[:, None]), 0)


def sample(
    tensors: Sequence[TensorInputs],
    count: int,
    scores: Scores,
    run: Map,
    release: Callable[[TensorInputs], None] | None = None,
) -> list[np.ndarray]:
    """Scores of `count` clusters over all tensors, float32[count', CLUSTER] per expert.

    release: given where mapped pages may not stay. Windows are then read from the files, and only what is no
    file is mapped, and released piece by piece.
    """
    index, starts = clusters([t.numel for t in tensors], count)
    changes = (np.diff(index) != 0) | (np.diff(starts[:, 0] // CHUNK) != 0)
    bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), len(index)]

    def of_piece(part: tuple[int, int]) -> Sequence[np.ndarray]:
        begin, end = part
        tensor, of_part = tensors[index[begin]], starts[begin:end].reshape(-1)
        gathered = gather_runs(tensor, of_part, from_files=release is not None)
        if release is not None and any(b.offset < 0 for b in tensor.buffers):
            release(tensor.slice(int(of_part.min()), min(int(of_part.max()) + RUN, tensor.numel)))
        return scores(gathered)

    found = list(run(of_piece, itertools.pairwise(bounds)))
    return [np.concatenate(of_expert).reshape(-1, CLUSTER) for of_expert in zip(*found, strict=True)]


def gather_runs(tensor: TensorInputs, starts: np.ndarray, from_files: bool) -> TensorInputs:
    """The runs that begin at `starts` (int64[m]) as a tile of m * RUN elements. A tensor shorter than a run
    is repeated."""

    def places() -> np.ndarray:
        return (starts[:, None] + np.arange(RUN)).reshape(-1) % tensor.numel

    if tensor.numel < RUN:
        return tensor.gather(places())

    def gathered(buffer: Buffer) -> Buffer:
        if from_files and buffer.offset >= 0:
            return native.read_runs(buffer, starts, RUN, RUNS)
        return native.gather_runs(buffer, starts, RUN)

    return tensor.pick(gathered, places)
