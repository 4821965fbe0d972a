"""Whole calls of the functional API on tensors in device memory: every method, statistics included; grafts,
top-k, a `Merger`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from ota_kernels import Merger, graft, merge_tensors, topk_threshold

from ..kernels import WORDS
from ..kernels import Case as Word
from ..output import check_close
from .inputs import DENSITY, Inputs, Problem, draw, scores
from .merges import HEADLINE
from .timing import COLUMNS, Bench, Call, Case

_CHECKED_ROWS = 64
_OTHERS = {"linear-all", "ties-sum", "dare_ties-random, sum", "sce-spread", "della-random by rank, sum"}


def cases(bench: Bench) -> Iterator[Case]:
    """The most telling first. Bytes are those of one read and the result, whatever a call takes."""
    yield from _topk(bench)
    yield from _experts_kept(bench)
    named = {f"{word.method}-{word.label}": word for word in WORDS if word.out is None}
    for name in sorted(named, key=lambda name: name not in _OTHERS):
        yield _method(name, named[name], bench)


def _method(name: str, word: Word, bench: Bench) -> Case:
    problem = Problem(word.experts, "bfloat16", word.curvature or "float32")
    rows = bench.rows(word.bytes_per_element)
    nbytes = word.bytes_per_element * rows * COLUMNS
    return Case(f"call-{name}", nbytes, partial(_prepare_method, word, problem, rows, bench))


def _prepare_method(word: Word, problem: Problem, rows: int, bench: Bench) -> Sequence[Call]:
    calls = []
    for inputs in draw(problem, rows, bench):
        base, experts, curvatures = inputs.matrices()
        call = partial(
            _merge, word, base if word.has_base else None, experts, curvatures if word.curvature else None
        )
        some = [None if x is None else x[:_CHECKED_ROWS] for x in (call.args[1], *experts, *curvatures)]
        of_some = some[0], some[1 : 1 + len(experts)], some[1 + len(experts) :] if word.curvature else None
        found = _merge(word, *of_some)
        on_host = [
            part
            if part is None
            else part.cpu()
            if isinstance(part, torch.Tensor)
            else [x.cpu() for x in part]
            for part in of_some
        ]
        expected = _merge(word, *on_host, backend="native")
        check_close(_bytes(found), _bytes(expected), "bfloat16", word.method)
        calls.append(call)
    return calls


def _merge(
    word: Word,
    base: torch.Tensor | None,
    experts: Sequence[torch.Tensor],
    curvatures: Sequence[torch.Tensor] | None,
    backend: str = "triton",
) -> torch.Tensor:
    each = {key: [value] * len(experts) for key, value in word.each.items()}
    parameters = {"lambda_" if key == "lambda" else key: value for key, value in word.parameters.items()}
    given = {"method": word.method, "backend": backend, **parameters, **each}
    return merge_tensors(base, experts, curvatures, **given)


def _bytes(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().cpu().view(torch.uint8).numpy().reshape(-1)


def _topk(bench: Bench) -> Iterator[Case]:
    """The exact threshold of scores beside torch's ways to it."""
    problem = replace(HEADLINE, experts=1)
    rows = max(1, bench.size // (16 * COLUMNS))  # sorting takes four times their memory
    n = rows * COLUMNS
    k = max(1, int(DENSITY * n))
    ways: Mapping[str, Callable[[torch.Tensor], object]] = {
        "threshold": lambda x: topk_threshold(x, k),
        "torch": lambda x: torch.topk(x, k, sorted=False).values.min().item(),
        "kthvalue": lambda x: torch.kthvalue(x, n - k + 1).values.item(),
        "sort": lambda x: torch.sort(x, descending=True).values[k - 1].item(),
    }

    def prepare(way: Callable[[torch.Tensor], object]) -> Sequence[Call]:
        found = []
        for inputs in draw(problem, rows, bench):
            x = scores(inputs.tile, 0)
            if way(x) != ways["kthvalue"](x):
                raise AssertionError("it is not the k-th largest score")
            found.append(partial(way, x))
        return found

    for name, way in ways.items():
        yield Case(f"topk-{name}", 4 * n, partial(prepare, way))


def _experts_kept(bench: Bench) -> Iterator[Case]:
    """A graft of one expert; the second call of a `Merger`, and the first."""
    one = replace(HEADLINE, experts=1)
    rows = bench.rows(one.bytes_per_element)
    yield Case("graft", one.bytes_per_element * rows * COLUMNS, partial(_prepare_graft, one, rows, bench))
    rows = bench.rows(HEADLINE.bytes_per_element)
    for name, way in (("first", _first), ("next", _next)):
        nbytes = HEADLINE.bytes_per_element * rows * COLUMNS
        yield Case(f"merger-{name}", nbytes, partial(_prepare_merger, way, rows, bench))


def _prepare_graft(problem: Problem, rows: int, bench: Bench) -> Sequence[Call]:
    calls = []
    for inputs in draw(problem, rows, bench):
        base, (expert,), (curvature,) = inputs.matrices()
        call = partial(graft, base, expert, curvature, density=DENSITY, backend="triton")
        kept = scores(inputs.tile, 0).view_as(base) >= inputs.terms.experts[0].threshold
        if not torch.equal(call(), torch.where(kept & (expert != base), expert, base)):
            raise AssertionError("it is not the base with the most salient edits")
        calls.append(call)
    return calls


def _prepare_merger(way: Callable[[Inputs], Call], rows: int, bench: Bench) -> Sequence[Call]:
    return [way(inputs) for inputs in draw(HEADLINE, rows, bench)]


def _first(inputs: Inputs) -> Call:
    return lambda: _merger(inputs)(density=DENSITY)


def _next(inputs: Inputs) -> Call:
    merger = _merger(inputs)
    merged = merger(density=DENSITY, lambda_=0.7)
    inputs.check(merger(density=DENSITY)["w"], "the next call of a Merger")
    if torch.equal(merged["w"], merger(density=DENSITY)["w"]):
        raise AssertionError("another lambda gave the same merge")
    return partial(merger, density=DENSITY, lambda_=0.9)


def _merger(inputs: Inputs) -> Merger:
    base, experts, curvatures = inputs.matrices()
    return Merger({"w": base}, [{"w": x} for x in experts], [{"w": h} for h in curvatures], backend="triton")
