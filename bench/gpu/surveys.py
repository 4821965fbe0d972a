"""The kernels that reduce tiles to statistics, of one expert, and of five for the Gram matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ota_kernels.backends import reference
from ota_kernels.backends.triton import survey
from ota_kernels.backends.triton.tiles import DeviceTile
from ota_kernels.tensors.terms import score_bits
from ota_kernels.tensors.tile import TensorInputs

from .inputs import Inputs, Problem, draw, host
from .timing import COLUMNS, Bench, Call, Case

_BINS = 1 << 16
_CHECKED_ROWS = 64
_RELATIVE_ERROR = 1e-12  # of float64 sums in another order
_EXPERT, _EXPERTS = Problem(1, "bfloat16", "float32"), Problem(5, "bfloat16", "bfloat16")


@dataclass(frozen=True)
class Survey:
    """read: bytes of an element; run: the kernel over a set of inputs; truth: what it must give."""

    name: str
    read: int
    problem: Problem
    run: Callable[[Inputs], Sequence[torch.Tensor]]
    truth: Callable[[Inputs], Sequence[np.ndarray]]


def cases(bench: Bench) -> Iterator[Case]:
    """One for each kernel; what they write is too little to count."""
    for one in _surveys():
        rows = bench.rows(one.read)
        yield Case(one.name, one.read * rows * COLUMNS, partial(_prepare, one, rows, bench))


def _surveys() -> Iterator[Survey]:
    for name, digit in (("histogram-high", _all_scores), ("histogram-low", _scores_near_the_threshold)):
        yield Survey(name, 8, _EXPERT, partial(_histogram, digit), partial(_true_histogram, digit))
    yield Survey("power-sum", 4, _EXPERT, _power_sum, _true_power_sum)
    yield Survey("row-column-sums", 4, _EXPERT, _row_column_sums, _true_row_column_sums)
    yield Survey("gram-T5", 10, _EXPERTS, _gram, _true_gram)


def _prepare(one: Survey, rows: int, bench: Bench) -> Sequence[Call]:
    calls = []
    for inputs in draw(one.problem, rows, bench):
        part = _first_rows(inputs)
        for found, expected in zip(one.run(part), one.truth(part), strict=True):
            np.testing.assert_allclose(
                found.cpu().numpy(), expected, rtol=_RELATIVE_ERROR, err_msg=one.name, strict=True
            )
        calls.append(partial(one.run, inputs))
    return calls


def _first_rows(inputs: Inputs) -> Inputs:
    """The part whose result is compared."""
    n, tile = _CHECKED_ROWS * COLUMNS, inputs.tile
    experts, curvatures = (tuple(x[:n] for x in parts) for parts in (tile.experts, tile.curvatures))
    return Inputs(DeviceTile(tile.base[:n], experts, curvatures), inputs.terms)


def _all_scores(inputs: Inputs) -> int:
    """The prefix that has a histogram count high halves."""
    return -1


def _scores_near_the_threshold(inputs: Inputs) -> int:
    """The high half of the threshold: a histogram of its low halves makes it exact."""
    return score_bits(inputs.terms.experts[0].threshold) >> 16


def _histogram(digit: Callable[[Inputs], int], inputs: Inputs) -> Sequence[torch.Tensor]:
    counts, lows = torch.zeros(2, _BINS, dtype=torch.int64, device=inputs.tile.device)
    survey.histogram(inputs.tile, 0, inputs.terms, False, digit(inputs), counts, lows)
    return counts, lows


def _true_histogram(digit: Callable[[Inputs], int], inputs: Inputs) -> Sequence[np.ndarray]:
    counts, lows = np.zeros((2, _BINS), np.int64)
    reference.histogram(_on_host(inputs), 0, inputs.terms, False, digit(inputs), counts, lows)
    return counts, lows


def _power_sum(inputs: Inputs) -> Sequence[torch.Tensor]:
    return [torch.tensor(survey.power_sum(inputs.tile.curvatures[0], 0.5), dtype=torch.float64)]


def _true_power_sum(inputs: Inputs) -> Sequence[np.ndarray]:
    return [np.array(reference.power_sum(_on_host(inputs), 0, 0.5)[0])]


def _row_column_sums(inputs: Inputs) -> Sequence[torch.Tensor]:
    return survey.row_column_sums(inputs.tile.curvatures[0].view(-1, COLUMNS))


def _true_row_column_sums(inputs: Inputs) -> Sequence[np.ndarray]:
    values = inputs.tile.curvatures[0].cpu().double().view(-1, COLUMNS).numpy()
    return values.sum(1), values.sum(0)


def _gram(inputs: Inputs) -> Sequence[torch.Tensor]:
    return [survey.gram(DeviceTile(None, inputs.tile.experts, ()), "tensor")]


def _true_gram(inputs: Inputs) -> Sequence[np.ndarray]:
    stacked = torch.stack(inputs.tile.experts).cpu().double().numpy()
    return [stacked @ stacked.T]


def _on_host(inputs: Inputs) -> TensorInputs:
    return host(inputs.tile, 0, inputs.tile.numel)
