"""Exact densities through the functional API on tensors in device memory, beside absolute thresholds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from ota_kernels import merge_state_dicts, merge_tensors

from .inputs import DENSITY, Inputs, draw
from .merges import HEADLINE
from .timing import COLUMNS, Bench, Call, Case

# Rows of a layer's tensors, over and over; one row is a vector.
_ROWS = (1, 1024, 256, 256, 1024, 1, 2816, 2816, 2816)

Way = Callable[..., torch.Tensor]  # of inputs and parameters: all that is merged, flat


def cases(bench: Bench) -> Iterator[Case]:
    """One tensor; and as many elements in many tensors, which share their thresholds."""
    rows = bench.rows(HEADLINE.bytes_per_element)
    nbytes = HEADLINE.bytes_per_element * rows * COLUMNS
    for scope, way in (("tensor", _one_tensor), ("model", _many_tensors)):
        for kind in ("thresholds", "density"):
            prepare = partial(_prepare, f"{scope}-{kind}", rows, bench, way)
            yield Case(f"{scope}-{kind}", nbytes, prepare)


def _prepare(name: str, rows: int, bench: Bench, way: Way) -> Sequence[Call]:
    calls = []
    for inputs in draw(HEADLINE, rows, bench):
        thresholds = {"precond_threshold": inputs.saliencies}
        parameters = {"density": DENSITY} if name.endswith("density") else thresholds
        call = partial(way, inputs, **parameters)
        merged = call()
        inputs.check(merged, name)
        if not torch.equal(merged, way(inputs, **thresholds)):
            raise AssertionError(f"{name} and the thresholds that it must find give different bytes")
        calls.append(call)
    return calls


def _one_tensor(inputs: Inputs, **parameters: object) -> torch.Tensor:
    return merge_tensors(*inputs.matrices(), backend="triton", **parameters).reshape(-1)


def _many_tensors(inputs: Inputs, **parameters: object) -> torch.Tensor:
    base, experts, curvatures = inputs.matrices()
    models = _cut(base), [_cut(w) for w in experts], [_cut(h) for h in curvatures]
    merged = merge_state_dicts(*models, backend="triton", **parameters)
    return torch.cat([tensor.reshape(-1) for tensor in merged.values()])


def _cut(matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views of the rows as the tensors of a model."""
    repeated = _ROWS * math.ceil(len(matrix) / sum(_ROWS))
    ends = [sum(repeated[: i + 1]) for i in range(len(repeated))]
    found = {}
    for i, (end, size) in enumerate(zip(ends, repeated, strict=True)):
        part = matrix[end - size : end]
        if len(part):
            found[f"tensors.{i}"] = part[0] if size == 1 else part
    return found
