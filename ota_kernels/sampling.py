"""A small stratified sample of scores, from which a threshold is bracketed.

Tensors are laid end to end on one line and the line is cut into equal strata. Each stratum gives a cluster of
short runs of neighbouring elements. Rows and columns of a matrix are alike in their curvature, so that many
short runs say more than few long ones, and those far apart more than those of one row: from memory, and from
files that the page cache holds, a cluster is one run. A disk would read a page for each run: there a cluster
is many runs, spread over a window that is read at once. What is sampled decides how much work a selection
is, never its result.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from . import resident
from .backends import native
from .errors import InputError
from .factors import CHUNK, Map
from .formula import ExpertTerms
from .resident import Array
from .tensors import Buffer, TensorInputs, concatenated

if TYPE_CHECKING:
    from .backends import Backend

RUN = 16  # elements of a run: one cache line of float32
RUNS = 16  # of a window
CLUSTER = RUN * RUNS  # elements of a window's runs
_BATCH = 1 << 17  # elements that are gathered and scored by one task
# Elements between runs up to which mapping all pages and letting them go is faster than a read of each run.
_NEAR = 4096
_PROBES = 64  # pages that tell whether files are cached
_STEP = 512  # elements between runs: a window spans 8192

# A tensor or a tile -> the experts (number, terms) whose scores are sampled.
Experts = Callable[[TensorInputs], Sequence[tuple[int, ExpertTerms]]]


def clusters(sizes: Sequence[int], count: int, runs: int = RUNS) -> tuple[np.ndarray, np.ndarray]:
    """(tensor number, int64[count']; flat indices at which runs begin, int64[count', runs]) of one cluster in
    each of `count` strata, in order. sizes: elements of each tensor; runs of small ones overlap."""
    sizes = np.asarray(sizes, np.int64)
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    count = min(count, total)
    if count == 0:
        return np.zeros(0, np.int64), np.zeros((0, runs), np.int64)
    random = np.random.default_rng(count)
    place = ((np.arange(count) + random.random(count)) * (total / count)).astype(np.int64)
    index = np.searchsorted(ends, np.minimum(place, total - 1), side="right")
    numel = sizes[index]
    step = np.clip(numel // runs, 1, _STEP if runs > 1 else RUN)
    window = place - (ends - sizes)[index]
    window = np.maximum(np.minimum(window, numel - runs * step), 0)
    offsets = random.random((count, runs)) * np.maximum(step - RUN, 1)[:, None]
    starts = window[:, None] + np.arange(runs) * step[:, None] + offsets.astype(np.int64)
    return index, np.maximum(np.minimum(starts, (numel - RUN)[:, None]), 0)


# Tensors of one shape are many, and on a device it would take as long as merging them.
_clusters_again = functools.lru_cache(maxsize=16)(clusters)


def in_pairs(tensors: Sequence[TensorInputs], count: int) -> int:
    """About `count` runs: of a single matrix, where two or more come from a row, so many that each pair of
    neighbouring strata is of one row. Their differences then leave out what the row makes alike."""
    if len(tensors) != 1 or not tensors[0].shape:
        return count
    columns = tensors[0].shape[-1]
    rows = tensors[0].numel // max(columns, 1)
    pairs = round(count / max(2 * rows, 1))
    return 2 * rows * pairs if 0 < 2 * RUN * pairs <= columns else count


def sample(
    tensors: Sequence[TensorInputs],
    count: int,
    experts: Experts,
    backend: Backend,
    run: Map,
    release: Callable[[TensorInputs], None] | None = None,
    spread: bool = True,
) -> list[Array]:
    """Scores of about `count` * RUNS runs over all tensors, float32[clusters, elements] per expert. backend:
    for tensors on a device; the CPU scores others.

    release: given where mapped pages may not stay. Runs that are far apart are then read from the files;
    others, and what is no file, are mapped and released piece by piece. spread: one run in a cluster; else
    RUNS runs in a window.
    """
    if tensors and tensors[0].is_resident:
        return _sample_resident(tensors, in_pairs(tensors, count * RUNS), experts, backend)
    runs = 1 if spread else RUNS
    count = in_pairs(tensors, count * RUNS) if spread else count
    index, starts = _clusters_again(tuple(t.numel for t in tensors), count, runs)
    far_apart = sum(t.numel for t in tensors) > _NEAR * starts.size
    reads = release is not None and (far_apart or not spread)
    goes = [release is not None and not (reads and all(b.offset >= 0 for b in t.buffers)) for t in tensors]

    def mapped(tensor: TensorInputs, places: np.ndarray) -> Sequence[np.ndarray]:
        if tensor.numel < RUN:
            return _scored([gather_runs(tensor, places)], experts, native)
        return native.run_scores(tensor, experts(tensor), places, RUN)

    def of_batch(pieces: Sequence[tuple[int, int]]) -> Sequence[np.ndarray]:
        parts: list = []
        with Files(runs) if reads else contextlib.nullcontext() as files:
            if reads and not spread:
                for begin, end in pieces:
                    files.ask_for(tensors[index[begin]], starts[begin:end].reshape(-1))
            for begin, end in pieces:
                tensor, places = tensors[index[begin]], starts[begin:end].reshape(-1)
                parts.append(gather_runs(tensor, places, files) if reads else mapped(tensor, places))
                if goes[index[begin]]:
                    release(tensor.slice(int(places.min()), min(int(places.max()) + RUN, tensor.numel)))
        return _scored(parts, experts, native) if reads else _joined(parts)

    # A piece is of one tensor, and of one chunk of it where mapped pages must go.
    cuts = np.diff(index) != 0
    cuts |= np.array(goes, bool)[index[1:]] & (np.diff(starts[:, 0] // CHUNK) != 0)
    begins = [0, *(np.flatnonzero(cuts) + 1).tolist(), len(index)]
    found = list(run(of_batch, _batches(begins, max(1, _BATCH // (runs * RUN)))))
    return [of_expert.reshape(-1, runs * RUN) for of_expert in _joined(found)]


def _batches(begins: Sequence[int], most: int) -> Iterator[list[tuple[int, int]]]:
    """Pieces that are scored together, of `most` clusters at most; longer ones are cut."""
    batch: list[tuple[int, int]] = []
    for piece, next_piece in itertools.pairwise(begins):
        for begin in range(piece, next_piece, most):
            end = min(begin + most, next_piece)
            if batch and end - batch[0][0] > most:
                yield batch
                batch = []
            batch.append((begin, end))
    if batch:
        yield batch


def _sample_resident(
    tensors: Sequence[TensorInputs], count: int, experts: Experts, backend: Backend
) -> list[Array]:
    """Scores of `count` runs over tensors on a device, in one batch: a few launches for any number."""
    index, starts = _clusters_again(tuple(t.numel for t in tensors), count, 1)
    on_device = resident.beside(starts, tensors[0].experts[0].data)
    bounds = [0, *(np.flatnonzero(np.diff(index)) + 1).tolist(), len(index)]
    gathered = [
        gather_runs(tensors[index[begin]], on_device[begin:end, 0])
        for begin, end in itertools.pairwise(bounds)
    ]
    return [of_expert.reshape(-1, RUN) for of_expert in _scored(gathered, experts, backend)]


def _scored(gathered: Sequence[TensorInputs], experts: Experts, backend: Backend) -> Sequence[Array]:
    """Scores per expert; neighbouring tiles of a form are scored together."""
    tiles = [concatenated(list(alike)) for _, alike in itertools.groupby(gathered, _form)]
    return _joined([[backend.scores(tile, t, e)[0] for t, e in experts(tile)] for tile in tiles])


def _joined(parts: Sequence[Sequence[Array]]) -> Sequence[Array]:
    """Scores per expert, of parts one after the other; not copied where it is one."""
    return (
        parts[0]
        if len(parts) == 1
        else [resident.joined(of_expert) for of_expert in zip(*parts, strict=True)]
    )


def _form(tile: TensorInputs) -> tuple:
    """What tiles that are scored together have in common."""
    curvatures = [(type(c), c.bias_correction) for c in tile.curvatures]
    return tile.base is None, [b.dtype for b in tile.buffers], curvatures


def are_cached(buffers: Sequence[Buffer]) -> bool:
    """Whether the page cache holds what buffers of files show, as far as a few of their pages tell. Looks for
    no more once one is missing: Linux may read a page that is looked for."""
    of_files = [b for b in buffers if b.offset >= 0 and b.data.size]
    step = max(1, len(of_files) // _PROBES)
    return all(_is_cached(b, b.data.size // (2 + i % 7)) for i, b in enumerate(of_files[::step]))


def _is_cached(buffer: Buffer, position: int) -> bool:
    try:
        with open(buffer.origin, "rb", buffering=0) as file:
            return os.preadv(file.fileno(), [bytearray(1)], buffer.offset + position, os.RWF_NOWAIT) == 1
    except (OSError, AttributeError):  # it would wait; or the file system, or the platform, cannot tell
        return False


class Files:
    """The files that one task reads runs from, each opened once; `together` so many runs with one read.
    Raises InputError where one cannot be read or was cut."""

    def __init__(self, together: int) -> None:
        self._together = together
        self._open: dict[str, int] = {}

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._open.values():
            os.close(fd)

    def _file(self, buffer: Buffer) -> int:
        if buffer.origin not in self._open:
            self._open[buffer.origin] = os.open(buffer.origin, os.O_RDONLY)
        return self._open[buffer.origin]

    def ask_for(self, tensor: TensorInputs, starts: np.ndarray) -> None:
        """Have a tensor's runs come from the disk before they are waited for: it works on many at a time."""
        with contextlib.suppress(OSError):  # `runs` will say so
            for buffer in tensor.buffers:
                if buffer.offset >= 0:
                    native.ask_for_runs(buffer, starts, RUN, self._file(buffer), self._together)

    def runs(self, buffer: Buffer, starts: np.ndarray) -> Buffer:
        """As native.gather_runs, without mapping the buffer's pages."""
        try:
            found = native.read_runs(buffer, starts, RUN, self._file(buffer), self._together)
        except OSError as error:
            raise InputError(f"{buffer.origin}: cannot be read: {error.strerror}") from error
        if found is None:
            raise InputError(f"{buffer.origin}: changed while in use: it is shorter than before")
        return found


def gather_runs(tensor: TensorInputs, starts: Array, files: Files | None = None) -> TensorInputs:
    """The runs that begin at `starts` (int64[m]) as a tile of m * RUN elements; from mapped pages without
    `files`. A tensor shorter than a run is repeated."""

    def places() -> Array:
        return (starts[:, None] + resident.arange(RUN, starts)).reshape(-1) % tensor.numel

    if tensor.numel < RUN or tensor.is_resident:
        return tensor.gather(places())

    def gathered(buffer: Buffer) -> Buffer:
        if files is not None and buffer.offset >= 0:
            return files.runs(buffer, starts)
        return native.gather_runs(buffer, starts, RUN)

    return tensor.pick(gathered, places)


def runs_of(buffer: Buffer, starts: np.ndarray) -> Buffer:
    """The runs that begin at `starts` (int64[m]) in a buffer of at least a run."""
    if not resident.is_resident(buffer.data):
        return native.gather_runs(buffer, starts, RUN)
    starts = resident.beside(starts, buffer.data)
    return buffer.gather((starts[:, None] + resident.arange(RUN, starts)).reshape(-1))
