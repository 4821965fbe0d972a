"""Exact densities through the functional API on tensors in device memory, beside absolute thresholds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from ota_kernels import merge_state_dicts, merge_tensors

from .inputs import DENSITY, Inputs, draw
from .merges import HEADLINE
from .timing import COLUMNS, Bench, Call, Case

# Rows of a layer's tensors, over and over; one row is a vector.
_ROWS = (1, 1024, 256, 256, 1024, 1, 2816, 2816, 2816)
_SIZES = 4  # times the bytes of other calls: a density waits for the device
_LAYERS = 32  # of nine tensors, three more: what an 8 B model has

Way = Callable[..., torch.Tensor]  # of inputs and parameters: all that is merged, flat
Cut = Callable[[int], list[int]]  # rows of a matrix -> of each tensor that it becomes


def cases(bench: Bench) -> Iterator[Case]:
    """One tensor; as many elements in many tensors, which share their thresholds; a thousand small tensors;
    and tensors of one row each, which show what a call costs the host: bytes over bandwidth go to 0."""
    rows = bench.larger(_SIZES).rows(HEADLINE.bytes_per_element)
    ways: dict[str, tuple[Way, int]] = {
        "tensor": (_one_tensor, rows),
        "model": (partial(_many_tensors, _as_layers), rows),
        "model291": (partial(_many_tensors, partial(_in_parts, 9 * _LAYERS + 3)), rows),
        "small1000": (partial(_many_tensors, partial(_in_parts, 1000)), min(rows, 64_000)),
        **{
            f"host{n}": (partial(_many_tensors, partial(_in_parts, n)), min(rows, n))
            for n in (1, 27, 291, 1000)
        },
    }
    for scope, (way, count) in ways.items():
        for kind in ("thresholds", "density"):
            prepare = partial(_prepare, f"{scope}-{kind}", count, bench, way)
            nbytes = HEADLINE.bytes_per_element * count * COLUMNS
            yield Case(f"{scope}-{kind}", nbytes, prepare, count * COLUMNS)


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


def _many_tensors(cut: Cut, inputs: Inputs, **parameters: object) -> torch.Tensor:
    base, experts, curvatures = inputs.matrices()

    def model(matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = matrix.split(cut(len(matrix)))
        return {f"tensors.{i}": part[0] if len(part) == 1 else part for i, part in enumerate(parts)}

    models = model(base), [model(w) for w in experts], [model(h) for h in curvatures]
    merged = merge_state_dicts(*models, backend="triton", **parameters)
    return torch.cat([tensor.reshape(-1) for tensor in merged.values()])


def _as_layers(rows: int) -> list[int]:
    """The rows as the tensors of layers, the last of which may be cut."""
    found: list[int] = []
    for size in itertools.cycle(_ROWS):
        if rows <= 0:
            return found
        found.append(min(size, rows))
        rows -= size
    return found


def _in_parts(count: int, rows: int) -> list[int]:
    """The rows as so many tensors, if there are as many."""
    count = min(count, rows)
    return [rows // count + (i < rows % count) for i in range(count)]
