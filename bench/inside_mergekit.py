"""mergekit's methods with and without this package in their place, one tensor in memory.

    .venv-mergekit/bin/python -m bench.inside_mergekit [--rows 2048] [--runs 5]

`tools/test_mergekit.sh` makes that environment, and runs this after the tests that compare the results.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from mergekit.merge_methods import merge_tensors

from ota_kernels.integrations.mergekit import register

from .output import print_table

_CASES = {
    "linear": ({"weight": [1.0, 2.0, 3.0, 1.0]}, None),
    "task_arithmetic": ({"weight": [0.5, 0.5, 0.5]}, 0),
    "ties": ({"weight": [1.0, 1.0, 1.0], "density": 0.3}, 0),
    "breadcrumbs": ({"weight": [1.0, 1.0, 1.0], "density": 0.3, "gamma": 0.01}, 0),
    "dare_ties": ({"weight": [1.0, 1.0, 1.0], "density": 0.3}, 0),
    "della": ({"weight": [1.0, 1.0, 1.0], "density": 0.3}, 0),
    "sce": ({"select_topk": 0.3}, 0),
    "multislerp": ({"weight": [1.0, 1.0, 1.0, 1.0]}, None),
    "karcher": ({}, None),
    "model_stock": ({}, 0),
    "ram": ({}, 0),
}


def seconds(tensors: list[torch.Tensor], runs: int) -> dict[str, list[float]]:
    found = {}
    for name, (parameters, base) in _CASES.items():
        times = []
        for _ in range(runs + 1):
            started = time.perf_counter()
            merge_tensors(tensors, name, parameters=parameters, base_index=base, name="w")
            times.append(time.perf_counter() - started)
        found[name] = times[1:]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Time mergekit's methods with and without this package.")
    parser.add_argument("--rows", type=int, default=2048, help="of a matrix of 2048 columns [%(default)s]")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    base = torch.randn(arguments.rows, 2048)
    tensors = [base.bfloat16(), *((base + 0.02 * torch.randn_like(base)).bfloat16() for _ in range(3))]
    theirs = seconds(tensors, arguments.runs)
    register(replace=True)
    ours = seconds(tensors, arguments.runs)
    rows = []
    for name in _CASES:
        a, b = statistics.median(theirs[name]), statistics.median(ours[name])
        rows.append([name, f"{1e3 * a:.0f}", f"{1e3 * b:.0f}", f"{a / b:.1f}"])
    print_table(("bfloat16, three experts", "mergekit ms", "here ms", "times faster"), rows)


if __name__ == "__main__":
    main()
