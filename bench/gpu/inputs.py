"""Models and second moments in device memory, like those of bench.data, and whether they are merged right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from ota_kernels.backends import reference
from ota_kernels.backends.triton.tiles import DeviceTile, Log8, Rank1
from ota_kernels.select.thresholds import count_of_density
from ota_kernels.tensors import curvature as curvature_forms
from ota_kernels.tensors.buffer import Buffer
from ota_kernels.tensors.curvature import Full
from ota_kernels.tensors.dtypes import BY_NAME
from ota_kernels.tensors.terms import ExpertTerms, Terms, Words, scale_weights, score_scale
from ota_kernels.tensors.tile import TensorInputs

from .. import data
from ..output import check_close
from .timing import COLUMNS, Bench

DENSITY = 0.3  # of the edits that masks keep
_EPSILON = 1e-26  # a recipe's default
_SPAN = 1 << 20  # float32 numbers of a bracket: an eighth of a power of two
_SAMPLE = 1 << 16  # elements that are compared with the reference, at the beginning and at the end


@dataclass(frozen=True)
class Problem:
    """What is merged. weights, curvature: types; curvature may be "rank1": row and column sums, or "log8";
    open: "" for thresholds that are known; "brackets", from the threshold to 1.1 times that, about one edit
    in thirty; "mass": and the scores in there are summed."""

    experts: int
    weights: str
    curvature: str
    open: str = ""

    def __str__(self) -> str:
        return f"T{self.experts}-{self.weights}+{self.curvature}{'-' * bool(self.open)}{self.open}"

    @property
    def bytes_per_element(self) -> int:
        """Base, experts, curvature and the result, which has the type of the weights."""
        compressed = {"rank1": 0, "log8": 1}
        known = self.curvature in compressed
        moments = compressed[self.curvature] if known else BY_NAME[self.curvature].itemsize
        return (self.experts + 2) * BY_NAME[self.weights].itemsize + self.experts * moments


@dataclass(frozen=True)
class Inputs:
    """One set of inputs, of `rows` x COLUMNS elements, and the numbers that merge it: thresholds are exact
    for DENSITY over all of it."""

    tile: DeviceTile
    terms: Terms

    @property
    def saliencies(self) -> list[float]:
        """The thresholds as a recipe has them."""
        return [e.threshold * 2.0**-64 for e in self.terms.experts]

    def matrices(self) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Base, experts and full curvatures, each [rows, COLUMNS]."""
        weights = [w.view(-1, COLUMNS) for w in (self.tile.base, *self.tile.experts)]
        return weights[0], weights[1:], [h.view(-1, COLUMNS) for h in self.tile.curvatures]

    def check(self, merged: torch.Tensor, what: str) -> None:
        """Raise AssertionError unless `merged` is finite, and the reference's within 1 unit in the last place
        where it is compared."""
        merged, n = merged.reshape(-1), self.tile.numel
        if bad := int((~torch.isfinite(merged)).sum()):
            raise AssertionError(f"{what}: {bad} of {n} values are not finite")
        for start in {0, max(0, n - _SAMPLE)}:
            part = host(self.tile, start, min(start + _SAMPLE, n))
            expected = np.empty(part.numel * part.out_dtype.itemsize, np.uint8)
            reference.merge(part, self.terms, expected)
            actual = _buffer(merged[start : start + part.numel]).data
            check_close(actual, expected, part.out_dtype.name, f"{what}, from {start}")


def draw(problem: Problem, rows: int, bench: Bench) -> Iterator[Inputs]:
    """As many sets of `rows` x COLUMNS elements as the cache asks for, each with other values."""
    nbytes = problem.bytes_per_element * rows * COLUMNS
    for seed in range(bench.sets(nbytes)):
        yield _draw(problem, rows, torch.Generator(bench.device).manual_seed(seed))


def _draw(problem: Problem, rows: int, generator: torch.Generator) -> Inputs:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    dtype = getattr(torch, problem.weights)
    w_0 = (normal(rows * COLUMNS) * data.BASE_DEVIATION).to(dtype)
    experts, curvatures = [], []
    for _ in range(problem.experts):
        experts.append((w_0 + normal(rows * COLUMNS) * data.EDIT_DEVIATION).to(dtype))
        # As data.draw_curvature: log-normal around 1e-12, times factors of rows and columns.
        of_row, of_column = 1e-12 * normal(rows).exp(), normal(COLUMNS).exp()
        if problem.curvature == "rank1":
            curvatures.append(Rank1(of_row, of_column))
            continue
        if problem.curvature == "log8":
            codes = (160 + 24 * normal(rows * COLUMNS)).clamp(0, 255).to(torch.uint8)
            curvatures.append(Log8(codes, of_row, COLUMNS))
            continue
        z = normal(rows, COLUMNS)
        h = (1.5 * z).exp() * (of_row[:, None] * of_column)
        curvatures.append(torch.where(z < -1.96, 0.0, h).reshape(-1).to(getattr(torch, problem.curvature)))
    tile = DeviceTile(w_0, tuple(experts), tuple(curvatures))
    weights, epsilon = scale_weights([1.0] * problem.experts, _EPSILON)
    terms = [
        ExpertTerms(_threshold(tile, t), score_scale=score_scale(has_base=True), weight_scale=weight)
        for t, weight in enumerate(weights)
    ]
    if problem.open:
        opened = {"span": _SPAN, "census": problem.open == "mass"}
        terms = [replace(e, **opened) for e in terms]
    return Inputs(tile, Terms(Words(), tuple(terms), epsilon=epsilon))


def scores(tile: DeviceTile, t: int) -> torch.Tensor:
    """Expert t's scores in plain torch, float32[n]."""
    c = tile.curvatures[t]
    h = c.full(tile.numel) if isinstance(c, Rank1 | Log8) else c.float()
    d = (tile.experts[t].float() - tile.base.float()) * 2.0**16
    return h * score_scale(has_base=True) * (d * d)


def _threshold(tile: DeviceTile, t: int) -> float:
    """The k-th largest score."""
    n = tile.numel
    return float(torch.kthvalue(scores(tile, t), n - count_of_density(DENSITY, n) + 1).values)


def host(tile: DeviceTile, start: int, stop: int) -> TensorInputs:
    """The elements [start, stop) as the reference takes them."""

    def curvature(c: torch.Tensor | Rank1 | Log8) -> curvature_forms.Curvature:
        if isinstance(c, Log8):
            return curvature_forms.Log8(
                _buffer(c.codes[start:stop]), c.scales.cpu().numpy(), c.n_columns, start
            )
        if isinstance(c, Rank1):
            return curvature_forms.Rank1(c.rows.cpu().numpy(), c.columns.cpu().numpy(), start)
        return Full(_buffer(c[start:stop]))

    base, *experts = (_buffer(w[start:stop]) for w in (tile.base, *tile.experts))
    curvatures = tuple(map(curvature, tile.curvatures))
    shape = (tile.numel // COLUMNS, COLUMNS)
    return TensorInputs("weight", shape, base.dtype, base, tuple(experts), curvatures)


def _buffer(x: torch.Tensor) -> Buffer:
    elements = x.contiguous().cpu().view(torch.uint8).numpy()
    return Buffer(elements, BY_NAME[str(x.dtype).removeprefix("torch.")])
