"""The merge kernel by number of experts and form of curvature, beside eager torch and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from ota_kernels.backends.triton.batch import merge

from .. import plain_torch
from .inputs import Inputs, Problem, draw
from .timing import COLUMNS, Bench, Call, Case

HEADLINE = Problem(5, "bfloat16", "float32")
# What tools/compile_kernels.py calls their variants; "": none of its own. The most telling first.
PROBLEMS = {
    HEADLINE: "ota",
    Problem(5, "bfloat16", "rank1"): "ota, rank-1",
    Problem(5, "bfloat16", "bfloat16"): "ota, bfloat16 curvature",
    Problem(5, "bfloat16", "float32", "brackets"): "ota, brackets",
    Problem(2, "bfloat16", "float32"): "ota, T=2",
    Problem(8, "bfloat16", "float32"): "ota, T=8",
    Problem(16, "bfloat16", "float32"): "ota, T=16",
    Problem(5, "bfloat16", "float32", "mass"): "ota, census",
    Problem(5, "bfloat16", "log8"): "ota, log8",
    Problem(5, "float32", "float32"): "ota, float32",
    Problem(5, "float16", "float32"): "ota, float16",
    **{Problem(t, "bfloat16", c): "" for t in (2, 8, 16, 32) for c in ("bfloat16", "rank1")},
    Problem(32, "bfloat16", "float32"): "",
}

Merge = Callable[[], torch.Tensor]


def cases(bench: Bench) -> Iterator[Case]:
    """The kernel for every problem, the rivals for the headline."""
    first, *others = PROBLEMS
    yield _case("merge", first, bench, _kernel)
    yield _case("eager", HEADLINE, bench, partial(_formulas, plain_torch.ota))
    yield _case("compile", HEADLINE, bench, partial(_formulas, _compiled(bench.device)))
    for problem in others:
        yield _case("merge", problem, bench, _kernel)


def _case(name: str, problem: Problem, bench: Bench, way: Callable[[Inputs], Merge]) -> Case:
    rows = bench.rows(problem.bytes_per_element)
    nbytes = problem.bytes_per_element * rows * COLUMNS
    prepare = partial(_prepare, name, problem, rows, bench, way)
    variant = PROBLEMS[problem] if name == "merge" else ""
    return Case(f"{name}-{problem}", nbytes, prepare, rows * COLUMNS, variant)


def _prepare(
    name: str, problem: Problem, rows: int, bench: Bench, way: Callable[[Inputs], Merge]
) -> Sequence[Call]:
    calls = []
    for inputs in draw(problem, rows, bench):
        call = way(inputs)
        inputs.check(call(), name)
        calls.append(call)
    return calls


def _kernel(inputs: Inputs) -> Merge:
    out = torch.full_like(inputs.tile.base, torch.nan)

    def run() -> torch.Tensor:
        merge(inputs.tile, inputs.terms, out)
        return out

    return run


def _formulas(ota: Callable[..., torch.Tensor], inputs: Inputs) -> Merge:
    # Tensors of one element: numbers would have torch.compile compile again for each set.
    thresholds = list(torch.tensor(inputs.saliencies, device=inputs.tile.device))
    return partial(ota, *inputs.matrices(), thresholds)


def _compiled(device: torch.device) -> Callable[..., torch.Tensor]:
    # Without a GPU only that it can be traced: compiling for a CPU takes longer than all other cases.
    return torch.compile(plain_torch.ota, backend="inductor" if device.type == "cuda" else "eager")
