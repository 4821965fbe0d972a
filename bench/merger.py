"""`Merger`, the inner loop of a search: its second call against its first, and against a plain torch loop.

    python -m bench.merger [--parameters 33554432] [--experts 5] [--runs 5] [--json]

Models in memory, bfloat16 weights and float32 curvature. The first call places the inputs and finds what the
method must know; the second differs in `lambda` only, and writes into the first one's tensors. The loop in
plain torch does the same from nothing, one tensor after the other. Results are compared before anything is
timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ota_kernels import Merger, merge_state_dicts

from .output import RESULTS, print_table, save_json
from .plain_torch import ota

_ROWS = 4096
Tensors = dict[str, torch.Tensor]


def models(parameters: int, experts: int) -> tuple[Tensors, list[Tensors], list[Tensors]]:
    """(base, experts, curvatures) of matrices of 4 Mi elements."""
    names = [f"layers.{i}.weight" for i in range(max(1, parameters // (_ROWS * 1024)))]
    random = torch.Generator().manual_seed(0)

    def normal() -> torch.Tensor:
        return torch.randn(_ROWS, 1024, generator=random)

    base = {name: normal().bfloat16() for name in names}
    edited = [{name: base[name] + (0.02 * normal()).bfloat16() for name in names} for _ in range(experts)]
    curvatures = [{name: 1e-12 * torch.exp(4 * normal()) for name in names} for _ in range(experts)]
    return base, edited, curvatures


def plain_ota(base: Tensors, experts: list[Tensors], curvatures: list[Tensors], lambda_: float) -> Tensors:
    """Exact thresholds over the model by `kthvalue` of all saliencies, then tensor by tensor."""
    thresholds = []
    for expert, curvature in zip(experts, curvatures, strict=True):
        scores = torch.cat(
            [
                (
                    curvature[n] * 2.0**32 * (2.0**16 * (expert[n].float() - base[n].float())).square()
                ).flatten()
                for n in base
            ]
        )
        k = len(scores) * 3 // 10
        thresholds.append(float(torch.kthvalue(scores, len(scores) - k + 1).values) * 2.0**-64)
    merged = {}
    for n in base:
        whole = ota(base[n], [e[n] for e in experts], [c[n] for c in curvatures], thresholds)
        edit = whole.float() - base[n].float()
        merged[n] = (base[n].float() + lambda_ * edit).bfloat16()
    return merged


def plain_ties(base: Tensors, experts: list[Tensors], curvatures: list[Tensors], lambda_: float) -> Tensors:
    """The fifth of largest magnitude of each tensor, elected signs, disjoint mean."""
    merged = {}
    for n, w in base.items():
        edits = torch.stack([e[n].float() - w.float() for e in experts])
        for edit in edits:
            kept = edit.abs().flatten().topk(edit.numel() // 5).indices
            mask = torch.zeros(edit.numel())
            mask[kept] = 1
            edit *= mask.view_as(edit)
        sign = torch.where(edits.sum(0) >= 0, 1.0, -1.0)
        agree = (edits.sign() == sign) & (edits != 0)
        mean = (edits * agree).sum(0) / agree.sum(0).clamp(min=1)
        merged[n] = (w.float() + lambda_ * mean).bfloat16()
    return merged


def plain_slerp(base: Tensors, experts: list[Tensors], curvatures: list[Tensors], t: float) -> Tensors:
    """Of the base and the first expert."""
    merged = {}
    for n in base:
        one, other = base[n].float(), experts[0][n].float()
        cosine = (one.flatten() @ other.flatten() / (one.norm() * other.norm())).clamp(-1, 1)
        if cosine.abs() > 0.9995:
            merged[n] = ((1 - t) * one + t * other).bfloat16()
            continue
        theta = torch.arccos(cosine)
        first, second = torch.sin((1 - t) * theta), torch.sin(t * theta)
        merged[n] = ((first * one + second * other) / torch.sin(theta)).bfloat16()
    return merged


# Per method: parameters, the key that changes, its values, the loop, experts that it takes.
CASES: dict[str, tuple[dict, str, tuple[float, float], Callable[..., Tensors], int | None]] = {
    "ota": ({"density": 0.3}, "lambda_", (1.0, 0.7), plain_ota, None),
    "ties": ({"density": 0.2, "weight": 1.0}, "lambda_", (1.0, 0.7), plain_ties, None),
    "slerp": ({}, "t", (0.3, 0.6), plain_slerp, 1),
}
# Shares of elements that plain torch decides otherwise: `topk` takes any of many edits of one magnitude, and
# float32 products in another order move a few elements across a threshold.
_MAY_DIFFER = {"ota": 1e-3, "ties": 0.02, "slerp": 0.0}


def turn(
    method: str, given: tuple[Tensors, list[Tensors], list[Tensors]]
) -> tuple[dict[str, float], Tensors, Tensors]:
    """(seconds of each way, results of the second call and of plain torch)."""
    base, experts, curvatures = given
    parameters, key, (first, second), plain, takes = CASES[method]
    merger = Merger(base, experts[:takes], curvatures if method == "ota" else None)
    seconds, started = {}, time.perf_counter()

    def lap(way: str) -> None:
        nonlocal started
        seconds[way] = time.perf_counter() - started
        started = time.perf_counter()

    out = merger(method=method, **parameters, **{key: first})
    lap("first call")
    merger(method=method, **parameters, **{key: second}, out=out)
    lap("second call")
    whole = plain(base, experts[:takes], curvatures, second)
    lap("plain torch")
    return seconds, out, whole


def race(
    method: str, given: tuple[Tensors, list[Tensors], list[Tensors]], runs: int
) -> dict[str, list[float]]:
    """Seconds of each way, the ways taking turns. AssertionError where the results differ."""
    turns = [turn(method, given) for _ in range(runs)]
    _check(method, given, *turns[0][1:])
    return {way: [seconds[way] for seconds, *_ in turns] for way in turns[0][0]}


def _check(method: str, given, out: Tensors, plain: Tensors) -> None:
    base, experts, curvatures = given
    parameters, key, (_, second), _, takes = CASES[method]
    expected = merge_state_dicts(
        base,
        experts[:takes],
        curvatures if method == "ota" else None,
        method=method,
        **parameters,
        **{key: second},
    )
    for name, tensor in expected.items():
        assert torch.equal(out[name], tensor), f"{method}: {name} is not what merge_state_dicts gives"
        off = (out[name].float() - plain[name].float()).abs() > 2**-7 * tensor.float().abs() + 1e-6
        share = float(off.float().mean())
        assert share <= _MAY_DIFFER[method], f"{method}: {share:.1%} of {name} is not what plain torch gives"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a Merger's calls against a plain torch loop.")
    parser.add_argument("--parameters", type=int, default=1 << 25, help="of each model [%(default)s]")
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, nargs="?", const=RESULTS / "merger.json", help="also write JSON")
    arguments = parser.parse_args()
    given = models(arguments.parameters, arguments.experts)
    results = {method: race(method, given, arguments.runs) for method in CASES}
    rows = []
    for method, found in results.items():
        median = {way: statistics.median(times) for way, times in found.items()}
        for way, times in found.items():
            ratio = statistics.median(a / b for a, b in zip(times, found["first call"], strict=True))
            spread = f"{1e3 * min(times):.0f}-{1e3 * max(times):.0f}"
            rows.append([f"{method} {way}", f"{1e3 * median[way]:.0f}", spread, f"{ratio:.2f}"])
    print_table(("", "median ms", "min-max", "over first"), rows)
    if arguments.json:
        save_json(arguments.json, {"arguments": vars(arguments) | {"json": None}, "seconds": results})


if __name__ == "__main__":
    main()
