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

from ..backends import native
from ..errors import InputError
from ..tensors import array as resident
from ..tensors.array import Array
from ..tensors.buffer import Buffer
from ..tensors.segment import CHUNK, RUN, Map
from ..tensors.terms import Terms
from ..tensors.tile import TensorInputs, concatenated

if TYPE_CHECKING:
    from ..backends import Backend

RUNS = 16  # of a window
CLUSTER = RUN * RUNS  # elements of a window's runs
_BATCH = 1 << 17  # elements that are scored by one task
_PART = 1 << 14  # of a large sample, which all workers share
# Elements between runs up to which mapping all pages and letting them go is faster than a read of each run.
NEAR = 4096
_PROBES = 64  # pages that tell whether files are cached
_STEP = 512  # elements between runs: a window spans 8192

TermsOf = Callable[[TensorInputs], Terms]  # by which a tensor's scores are computed


def clusters(
    sizes: Sequence[int], count: int, runs: int = RUNS, aligned: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(tensor number, int64[count']; flat indices at which runs begin, int64[count', runs]) of one cluster in
    each of `count` strata, in order. sizes: elements of each tensor; runs of small ones overlap. aligned:
    runs begin at multiples of RUN."""
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
    if aligned:
        starts -= starts % RUN
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


def _fills_lines(tensors: Sequence[TensorInputs]) -> bool:
    """Whether rows are whole numbers of runs: a run then is one cache line of a tensor that begins with one,
    and as anywhere else no two rows share it."""
    return len(tensors) == 1 and bool(tensors[0].shape) and tensors[0].shape[-1] % RUN == 0


def runs_of_tensor(tensor: TensorInputs, count: int) -> np.ndarray:
    """Where about `count` * RUNS runs of a tensor of at least a run begin, int32[an even number]."""
    count = in_pairs([tensor], count * RUNS)
    _, starts = _clusters_again((tensor.numel,), count, 1, _fills_lines([tensor]))
    return starts[: len(starts) // 2 * 2, 0].astype(np.int32)


def sample(
    tensors: Sequence[TensorInputs],
    count: int,
    experts: Sequence[int],
    terms_of: TermsOf,
    backend: Backend,
    run: Map,
    release: Callable[[TensorInputs], None] | None = None,
    spread: bool = True,
    near: int = NEAR,
    part: tuple[int, int] = (0, 1),
) -> list[Array]:
    """Scores of about `count` * RUNS runs over all tensors, float32[clusters, elements] for each of `experts`
    (numbers). backend: for tensors on a device; the CPU scores others.

    release: given where mapped pages may not stay. Runs that are far apart are then read from the files;
    others, and what is no file, are mapped and released piece by piece. spread: one run in a cluster; else
    RUNS runs in a window. near: elements between runs up to which pages are mapped rather than read. part:
    (i, n): only the i-th of n parts is scored, the rest is 0.
    """
    if tensors and tensors[0].is_resident:
        return _sample_resident(tensors, in_pairs(tensors, count * RUNS), experts, terms_of, backend)
    runs = 1 if spread else RUNS
    count = in_pairs(tensors, count * RUNS) if spread else count
    index, starts = _clusters_again(tuple(t.numel for t in tensors), count, runs, _fills_lines(tensors))
    far_apart = sum(t.numel for t in tensors) > near * starts.size
    reads = release is not None and (far_apart or not spread)
    goes = [release is not None and not (reads and all(b.offset >= 0 for b in t.buffers)) for t in tensors]
    scores = [np.zeros((*starts.shape, RUN), np.float32) for _ in experts]

    def of_batch(pieces: Sequence[tuple[int, int]]) -> None:
        with Files() if reads else contextlib.nullcontext() as files:
            if reads and not spread:
                for begin, end in pieces:
                    files.ask_for(tensors[index[begin]], starts[begin:end].reshape(-1), runs)
            for begin, end in pieces:
                tensor, places = tensors[index[begin]], starts[begin:end].reshape(-1)
                rooms = [s[begin:end] for s in scores]
                _score_runs(tensor, experts, terms_of(tensor), places, rooms, files, runs)
                if goes[index[begin]]:
                    release(
                        tensor.stored.slice(int(places.min()), min(int(places.max()) + RUN, tensor.numel))
                    )

    # A piece is of one tensor, and of one chunk of it where mapped pages must go.
    cuts = np.diff(index) != 0
    cuts |= np.array(goes, bool)[index[1:]] & (np.diff(starts[:, 0] // CHUNK) != 0)
    begins = [0, *(np.flatnonzero(cuts) + 1).tolist(), len(index)]
    most = (_BATCH if release is None else _PART) // (runs * RUN)
    batches = list(_batches(begins, most))
    first, end = (len(batches) * i // part[1] for i in (part[0], part[0] + 1))
    for _ in run(of_batch, batches[first:end]):
        pass
    return [of_expert.reshape(-1, runs * RUN) for of_expert in scores]


def _score_runs(
    tensor: TensorInputs,
    experts: Sequence[int],
    terms: Terms,
    starts: np.ndarray,
    scores: Sequence[np.ndarray],
    files: Files | None,
    together: int,
) -> None:
    """Fill scores (per expert, float32 of starts.size * RUN elements): read from `files`, from mapped pages
    without. A tensor shorter than a run is repeated."""
    outs = [s.reshape(-1) for s in scores]
    if tensor.numel < RUN or tensor.is_computed:
        tile = _gathered(tensor, starts)
        for out, t in zip(outs, experts, strict=True):
            out[:] = native.scores(tile, t, terms)[0]
        return
    descriptor = None if files is None else files.descriptor
    failed = native.run_scores(tensor, terms, experts, starts, RUN, outs, descriptor, together)
    if failed is not None:
        raise files.failure(failed)


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
    tensors: Sequence[TensorInputs],
    count: int,
    experts: Sequence[int],
    terms_of: TermsOf,
    backend: Backend,
) -> list[Array]:
    """Scores of `count` runs over tensors on a device, in one batch: a few launches for any number."""
    index, starts = _clusters_again(tuple(t.numel for t in tensors), count, 1, _fills_lines(tensors))
    beside = {resident.place(t.experts[0].data): t.experts[0].data for t in tensors}
    on_device = {where: resident.beside(starts, like) for where, like in beside.items()}
    bounds = [0, *(np.flatnonzero(np.diff(index)) + 1).tolist(), len(index)]
    gathered = [
        _gathered(tensors[i], on_device[resident.place(tensors[i].experts[0].data)][begin:end, 0])
        for i, (begin, end) in ((index[bound[0]], bound) for bound in itertools.pairwise(bounds))
    ]
    # Neighbouring tiles of a form are scored together.
    tiles = [concatenated(list(alike)) for _, alike in itertools.groupby(gathered, _form)]
    parts = [[backend.scores(tile, t, terms_of(tile))[0] for t in experts] for tile in tiles]
    return [resident.joined(of_expert).reshape(-1, RUN) for of_expert in zip(*parts, strict=True)]


def _gathered(tensor: TensorInputs, starts: Array) -> TensorInputs:
    """The runs that begin at `starts` (int64[m]) as a tile of m * RUN elements. A tensor shorter than a run
    is repeated."""
    positions = (starts[:, None] + resident.arange(RUN, starts)).reshape(-1)
    return tensor.gather(positions % tensor.numel)


def _form(tile: TensorInputs) -> tuple:
    """What tiles that are scored together have in common."""
    curvatures = [(type(c), c.bias_correction) for c in tile.curvatures]
    where = resident.place(tile.experts[0].data)
    return where, tile.base is None, [b.dtype for b in tile.buffers], curvatures


def are_cached(buffers: Sequence[Buffer]) -> bool:
    """Whether the page cache holds what buffers of files show, as far as a few of their pages tell. Looks for
    no more once one is missing: Linux may read a page that is looked for."""
    of_files = [b for b in buffers if b.offset >= 0 and b.data.size]
    step = max(1, len(of_files) // _PROBES)
    return all(_is_cached(b, b.data.size // (2 + i % 7)) for i, b in enumerate(of_files[::step]))


def _is_cached(buffer: Buffer, position: int) -> bool:
    try:
        with open(buffer.origin, "rb", buffering=0) as file:
            if native.is_in_memory(file.fileno()):  # which would not tell
                return True
            return os.preadv(file.fileno(), [bytearray(1)], buffer.offset + position, os.RWF_NOWAIT) == 1
    except (OSError, AttributeError):  # it would wait; or the file system, or the platform, cannot tell
        return False


class Files:
    """The files that one task reads runs from, each opened once. Raises InputError where one cannot be."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._open.values():
            os.close(fd)

    def descriptor(self, buffer: Buffer) -> int:
        """Of the buffer's open file; -1 where it is in memory."""
        if buffer.offset < 0:
            return -1
        if buffer.origin not in self._open:
            try:
                self._open[buffer.origin] = os.open(buffer.origin, os.O_RDONLY)
            except OSError as error:
                raise InputError(f"{buffer.origin}: cannot be read: {error.strerror}") from error
        return self._open[buffer.origin]

    def failure(self, buffer: Buffer) -> InputError:
        """Why a read of the buffer's elements gave less than all."""
        size = os.fstat(self.descriptor(buffer)).st_size
        if size < buffer.offset + buffer.data.size:
            return InputError(f"{buffer.origin}: changed while in use: it is shorter than before")
        return InputError(f"{buffer.origin}: a read from its disk failed")

    def ask_for(self, tensor: TensorInputs, starts: np.ndarray, together: int) -> None:
        """Have a tensor's runs come from the disk before they are waited for: it works on many at a time."""
        for buffer in tensor.buffers:
            if buffer.offset >= 0:  # else it is in memory, or computed
                native.ask_for_runs(buffer, starts, RUN, self.descriptor(buffer), together)


def runs_of(buffer: Buffer, starts: np.ndarray) -> Buffer:
    """The runs that begin at `starts` (int64[m]) in a buffer of at least a run."""
    if not resident.is_resident(buffer.data):
        return native.gather_runs(buffer, starts, RUN)
    starts = resident.beside(starts, buffer.data)
    return buffer.gather((starts[:, None] + resident.arange(RUN, starts)).reshape(-1))
