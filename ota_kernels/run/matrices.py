"""Merges matrices whole: by the formula of a row of whole matrices, or calibrated after any other row.

    kernel over the row's terms: what is kept, what is not finite, the merged edit where it is calibrated
    edits, one expert's at a time --> formula --> calibration --> base + M, a tile as any other

One worker does one matrix, without further threads, so that results do not depend on their number. float64
throughout, on the device of the tensors, or of the backend that was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..backends import Backend
from ..planning.roles import matrix_of
from ..recipe.methods import Method
from ..recipe.settings import Settings
from ..spectral import formulas
from ..spectral.algebra import one_thread
from ..tensors import array as resident
from ..tensors.buffer import Buffer
from ..tensors.curvature import Uniform
from ..tensors.dtypes import BY_NAME
from ..tensors.result import Counts, NonFinite
from ..tensors.segment import CHUNK
from ..tensors.terms import ExpertTerms, Terms, Words
from ..tensors.tile import TensorInputs

if TYPE_CHECKING:
    from torch import Tensor

_FLOAT64 = BY_NAME["float64"]
_ADDED = Terms(
    Words(score="none", select="all", weigh="constant", divide="number"), (ExpertTerms(), ExpertTerms())
)  # w_0 + M
_CALIBRATION = formulas.Formula(lambda edits: edits[0])  # holds what a row's formula may


@dataclass(frozen=True)
class Matrix:
    """One matrix of a tensor: elements from `start`. stored: the tensor; seen: as its kernels see it;
    release: lets go of a tile's mapped pages."""

    stored: TensorInputs
    seen: TensorInputs
    terms: Terms
    shape: tuple[int, int]
    start: int
    release: Callable[[TensorInputs], None]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def tiles(self, of: TensorInputs) -> Iterator[tuple[int, int, TensorInputs]]:
        """(start, stop, tile) within the matrix, of whole rows and of what the terms want whole. Of several
        tiles, the pages of each go when the next is asked for."""
        whole = math.lcm(self.terms.whole, self.shape[1], of.columns)
        step = max((resident.TILE if of.is_resident else CHUNK) // whole, 1) * whole
        for a in range(0, self.numel, step):
            b = min(a + step, self.numel)
            tile = of.slice(self.start + a, self.start + b)
            yield a, b, tile
            if step < self.numel:
                self.release(tile)


@dataclass(frozen=True)
class _Edits:
    """The experts' edits of a matrix (spectral/formulas.py); masked: of what thresholds keep."""

    matrix: Matrix
    backend: Backend
    masked: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape

    def __len__(self) -> int:
        return len(self.matrix.stored.experts)

    def __getitem__(self, t: int) -> Tensor:
        import torch

        of = self.matrix.seen if self.masked else self.matrix.stored
        alone = replace(
            of,
            experts=of.experts[t : t + 1],
            curvatures=of.curvatures[t : t + 1],
            origins=of.origins[t : t + 1],
        )
        terms = self.matrix.terms
        terms = replace(terms, experts=terms.experts[t : t + 1]) if self.masked else terms
        found = torch.empty(self.matrix.numel, dtype=torch.float64, device=_device(of, self.backend))
        for a, b, tile in self.matrix.tiles(alone):
            origin = (tile.origins[0] if tile.origins else None) or tile.base
            d = _float64(tile.experts[0]) - _float64(origin)
            if self.masked:
                kept, _ = self.backend.edits(tile, 0, terms)
                d[_tensor(kept) == 0] = 0.0
            if terms.repair:
                d.nan_to_num_(0.0, 0.0, 0.0)
            found[a:b] = d
        return found.view(self.shape)


@dataclass(frozen=True)
class Matrices:
    """The matrices of a merge. settings: of a tensor; check: raises for inputs that are not finite;
    release: lets go of a tile's mapped pages."""

    method: Method
    settings: Callable[[TensorInputs], Settings]
    backend: Backend
    check: Callable[[TensorInputs, Iterable[NonFinite]], None]
    release: Callable[[TensorInputs], None]

    def shape(self, tensor: TensorInputs) -> tuple[int, int] | None:
        """(rows, columns) of a tensor's matrices, None where elements are merged one by one."""
        return matrix_of(tensor.name, tensor.shape) if self.method.whole(self.settings(tensor)) else None

    def by_formula(self, tensor: TensorInputs) -> bool:
        """Whether a row's formula merges the tensor's matrices, and not only calibrates them."""
        return self.shape(tensor) is not None and self.method.matrix(self.settings(tensor)) is not None

    def of(
        self, stored: TensorInputs, seen: TensorInputs, terms: Terms, start: int, stop: int
    ) -> Iterator[Matrix]:
        """Those of a tensor's elements from start to stop."""
        shape = self.shape(stored)
        for first in range(start, stop, math.prod(shape)):
            yield Matrix(stored, seen, terms, shape, first, self.release)

    def bytes(self, tensors: Iterable[TensorInputs]) -> int:
        """What one worker holds while it merges the largest."""
        shapes = ((self.shape(t), self.method.matrix(self.settings(t))) for t in tensors)
        return max(((formula or _CALIBRATION).bytes(shape) for shape, formula in shapes if shape), default=0)

    def merge(self, matrix: Matrix, thresholds: list[float | None]) -> tuple[TensorInputs, Terms, Counts]:
        """Base and merged edit of a matrix as inputs of one more merge, its terms, and what was kept."""
        tensor = matrix.stored
        settings = self.settings(tensor)
        formula = self.method.matrix(settings)
        merged, counts = self._by_elements(matrix, thresholds, formula is None)
        base = tensor.base.slice(matrix.start, matrix.start + matrix.numel)
        edits = _Edits(matrix, self.backend, matrix.terms.words.select != "all")
        with one_thread():
            if formula is None:
                found = merged.sub_(_float64(base).to(merged.device)).view(matrix.shape)
            else:
                found = formula.merged(edits).mul_(matrix.terms.lambda_)
            if settings["calibrate"] != "none":
                alpha = 1.0 if settings["calibrate"] == "shrink" else 1 / len(edits)
                found = formulas.svc(found, replace(edits, masked=False), alpha)
        edit = Buffer(_data(found, tensor.is_resident), _FLOAT64, f"the merged edit of {tensor.name}")
        inputs = replace(tensor, base=None, experts=(base, edit), curvatures=(Uniform(),) * 2, origins=())
        return inputs, _ADDED, counts

    def sums(self, matrix: Matrix) -> tuple[float, float, float, list[float]]:
        """Of the merged edit e at lambda 1 and what is kept of the edits, k_t: sum_t ||k_t||^2, ||e||^2,
        sum_t <e, k_t>, and each ||d_t||^2."""
        kept = _Edits(matrix, self.backend, matrix.terms.words.select != "all")
        whole = replace(kept, masked=False)
        with one_thread():
            merged = self.method.matrix(self.settings(matrix.stored)).merged(kept)
            of_kept, products, of_whole = [], [], []
            for t in range(len(kept)):
                k = kept[t]
                of_kept.append(float(k.norm()) ** 2)
                products.append(float(k.mul_(merged).sum()))
                of_whole.append(float(whole[t].norm()) ** 2 if kept.masked else of_kept[-1])
            return math.fsum(of_kept), float(merged.norm()) ** 2, math.fsum(products), of_whole

    def _by_elements(
        self, matrix: Matrix, thresholds: list[float | None], wanted: bool
    ) -> tuple[Tensor | None, Counts]:
        """The matrix as the row's terms merge it, float64[n], where that is wanted; what the terms keep."""
        import torch

        of, counts = matrix.seen, Counts([0] * len(matrix.terms.experts))
        like = of.experts[0].data if of.is_resident else np.empty(0, np.uint8)
        device = _device(of, self.backend)
        found = torch.empty(matrix.numel, dtype=torch.float64, device=device) if wanted else None
        for a, b, tile in matrix.tiles(of):
            room = resident.empty((b - a) * _FLOAT64.itemsize, like)
            stats = self.backend.merge(replace(tile, out_dtype=_FLOAT64), matrix.terms, room)
            self.check(tile, stats.nonfinite)
            counts.add(Counts.of(stats, thresholds))
            if found is not None:
                found[a:b] = _tensor(room).view(torch.float64)
        return found, counts


def _device(tensor: TensorInputs, backend: Backend):
    """Where matrices of a tensor are computed."""
    return tensor.experts[0].data.device if tensor.is_resident else getattr(backend, "device", "cpu")


def _float64(buffer: Buffer) -> Tensor:
    from ..backends import torch_words

    if not resident.is_resident(buffer.data):
        return torch_words.decode(buffer, torch_words.torch.float64)
    return buffer.data.view(getattr(resident.library(buffer.data), buffer.dtype.name)).double()


def _tensor(data: resident.Array) -> Tensor:
    return data if resident.is_resident(data) else resident.on_cpu(data)


def _data(found: Tensor, is_resident: bool) -> resident.Array:
    """Its bytes, uint8, where the tensor's inputs are."""
    flat = found.contiguous().view(-1)
    return resident.raw(flat) if is_resident else resident.raw(flat.cpu().numpy())
