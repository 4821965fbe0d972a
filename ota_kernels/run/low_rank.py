"""Low-rank forms of a curvature matrix: row and column sums (rank 1), truncated SVD (rank r).

Computed once per tensor and shared by every backend, so that masks agree; float64 sums in an order that
depends on the shape alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..backends import Backend, native
from ..planning.roles import MATRIX, role_of
from ..recipe.settings import Settings
from ..tensors import array as resident
from ..tensors.array import Array
from ..tensors.curvature import Curvature, Full, Log8, LowRank, Rank1
from ..tensors.segment import CHUNK, Map
from ..tensors.tile import TensorInputs
from .pool import Pool

_CACHE_BYTES = 64 << 20


Sums = Callable[[Curvature, np.ndarray, np.ndarray], None]  # as native.row_column_sums
Check = Callable[[TensorInputs, int], None]  # raises for curvature of expert t that is not usable


class LowRankForms:
    """Low-rank curvature in place of what a tensor has, where its settings ask for it. Sums of small
    matrices are kept: a tensor is asked for once a read."""

    def __init__(self, backend: Backend, pool: Pool) -> None:
        self._backend, self._pool = backend, pool
        self._kept: dict[tuple[str, int], Curvature] = {}
        self._bytes = 0

    def of(self, tensor: TensorInputs, settings: Settings, check: Check) -> TensorInputs:
        """The tensor with the curvature that its kernels read."""
        wanted = [t for t in range(len(tensor.curvatures)) if is_factored(tensor, settings, t)]
        if not wanted:
            return tensor
        found = list(tensor.curvatures)
        for t in wanted:
            found[t] = self._of_expert(tensor, settings, t, check)
        return replace(tensor, curvatures=tuple(found))

    def _of_expert(self, tensor: TensorInputs, settings: Settings, t: int, check: Check) -> Curvature:
        key = (tensor.name, t)
        if key in self._kept:
            return self._kept[key]
        check(tensor, t)
        curvature, run = tensor.curvatures[t], self._pool.run
        if settings.experts[t]["rank1_approx"]:
            sums = self._backend.row_column_sums if tensor.is_resident else native.row_column_sums
            form = rank1(curvature, tensor.shape, run, sums)
        else:
            form = low_rank(curvature, tensor.shape, settings.experts[t]["rank"], run)
        size = sum(array.nbytes for array in form.factors)
        if self._bytes + size <= _CACHE_BYTES:
            self._kept[key] = form
            self._bytes += size
        return form


def is_factored(tensor: TensorInputs, settings: Settings, t: int) -> bool:
    """Whether the settings ask for a low-rank form of expert t's curvature, which is none yet. Matrices only;
    rank r leaves embeddings and output matrices at full curvature, as the published OTA recipes do."""
    curvature, own = tensor.curvatures[t], settings.experts[t]
    if len(tensor.shape) != 2 or tensor.numel == 0 or not isinstance(curvature, Full | Log8):
        return False
    by_rank = own.get("rank") is not None and role_of(tensor.name, tensor.shape) == MATRIX
    return bool(own.get("rank1_approx")) or by_rank


def row_chunks(shape: tuple[int, ...], elements: int = CHUNK) -> list[tuple[int, int]]:
    """[start, stop) row ranges of about so many elements."""
    rows, columns = shape
    step = max(1, elements // max(1, columns))
    return [(row, min(row + step, rows)) for row in range(0, rows, step)]


def rank1(
    curvature: Full | Log8, shape: tuple[int, ...], run: Map, sums: Sums = native.row_column_sums
) -> Rank1:
    """R_i C_j / sum(R) of a curvature matrix of `shape`. sums: of its backend, where it is on a device."""
    rows, columns = row_column_sums(curvature, shape, run, sums=sums)
    with np.errstate(over="ignore"):  # infinity, which the kernels report
        return Rank1.of_sums(rows.astype(np.float32), columns.astype(np.float32), curvature.bias_correction)


def row_column_sums(
    curvature: Full | Log8,
    shape: tuple[int, ...],
    run: Map,
    release: Callable[[Curvature], None] = lambda part: None,
    sums: Sums = native.row_column_sums,
) -> tuple[np.ndarray, np.ndarray]:
    """(R float64[m], C float64[n]) of a curvature matrix of `shape`. release: called with each part that was
    read."""
    columns = shape[1]

    def of_chunk(chunk: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        start, stop = chunk
        of_rows, of_columns = np.zeros(stop - start), np.zeros(columns)
        part = curvature.slice(start * columns, stop * columns)
        sums(part, of_rows, of_columns)
        release(part)
        return of_rows, of_columns

    row_sums, column_sums = [], np.zeros(columns)
    for of_rows, of_columns in run(of_chunk, row_chunks(shape, _elements(curvature))):
        row_sums.append(of_rows)
        column_sums += of_columns
    return np.concatenate(row_sums), column_sums


def _elements(curvature: Full | Log8) -> int:
    """Elements of one piece of work."""
    return resident.TILE if resident.is_resident(curvature.buffers[0].data) else CHUNK


def low_rank(curvature: Full | Log8, shape: tuple[int, ...], rank: int, run: Map) -> LowRank:
    """The rank-r truncated SVD of a curvature matrix, as left float32[m, r] @ right float32[r, n].

    Found from the eigenvectors of the float64 Gram matrix of the smaller side: streams over the rows, and
    holds min(m, n)^2 float64.
    """
    rows, columns = shape

    def matrix(chunk: tuple[int, int]) -> Array:
        start, stop = chunk
        part = resident.float64(curvature.slice(start * columns, stop * columns).float32())
        return part.reshape(stop - start, columns)

    if columns <= rows:
        gram = 0.0
        for part in run(lambda chunk: (lambda a: a.T @ a)(matrix(chunk)), row_chunks(shape)):
            gram += part
        right = _leading_eigenvectors(gram, rank).T
        left = resident.joined(list(run(lambda chunk: matrix(chunk) @ right.T, row_chunks(shape))))
    else:
        whole = resident.joined(list(map(matrix, row_chunks(shape))))
        left = _leading_eigenvectors(whole @ whole.T, rank)
        right = left.T @ whole
    return LowRank(
        np.ascontiguousarray(resident.host(left), np.float32),
        np.ascontiguousarray(resident.host(right), np.float32),
        bias_correction=curvature.bias_correction,
    )


def _leading_eigenvectors(gram: Array, rank: int) -> Array:
    lib = resident.library(gram)
    return lib.flip(lib.linalg.eigh(gram)[1], (1,))[:, :rank]
