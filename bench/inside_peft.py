"""PEFT's weighted adapters with and without this package in their place.

    python -m bench.inside_peft [--width 1024] [--layers 4] [--rank 64] [--runs 5]

Both make the same adapter of three in turn; the first call of each is not counted. Extra `peft`.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model

from ota_kernels.integrations.peft import accelerated

from .output import print_table

_NAMES = ("one", "two", "three")
_CASES = {
    "linear": {},
    "magnitude_prune": {"density": 0.3},
    "ties": {"density": 0.3},
    "dare_linear": {"density": 0.3},
    "dare_ties": {"density": 0.3},
    "svd": {},
    "ties_svd": {"density": 0.3},
    "dare_ties_svd": {"density": 0.3},
}


def adapted(width: int, layers: int, rank: int) -> torch.nn.Module:
    """A stack of linear layers with three adapters of random numbers."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(layers)))
    config = LoraConfig(r=rank, target_modules=[str(i) for i in range(layers)])
    model = get_peft_model(net, config, adapter_name=_NAMES[0])
    for name in _NAMES[1:]:
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.02)
    return model


def milliseconds(model: torch.nn.Module, kind: str, options: dict) -> float:
    started = time.perf_counter()
    model.add_weighted_adapter(list(_NAMES), [0.7, 0.4, 1.2], "merged", combination_type=kind, **options)
    taken = time.perf_counter() - started
    model.delete_adapter("merged")
    return 1e3 * taken


def main() -> None:
    parser = argparse.ArgumentParser(description="Time weighted adapters of PEFT and of this package.")
    for name, default in (("width", 1024), ("layers", 4), ("rank", 64), ("runs", 5)):
        parser.add_argument(f"--{name}", type=int, default=default, help="[%(default)s]")
    given = parser.parse_args()
    model, rows = adapted(given.width, given.layers, given.rank), []
    for kind, options in _CASES.items():
        theirs, ours = [], []
        for _ in range(given.runs + 1):
            theirs.append(milliseconds(model, kind, options))
            with accelerated():
                ours.append(milliseconds(model, kind, options))
        a, b = statistics.median(theirs[1:]), statistics.median(ours[1:])
        rows.append([kind, f"{a:.0f}", f"{b:.0f}", f"{a / b:.1f}"])
    print_table(("three adapters", "PEFT ms", "here ms", "times faster"), rows)


if __name__ == "__main__":
    main()
