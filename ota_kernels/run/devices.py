"""Several GPUs of one machine: a process each, by torchrun, as several processes of any other kind."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ..backends import triton
from .ranks import of_torchrun


def own_device(device: str) -> str:
    """The device of this process, where torchrun has started several: one of those that `device` names
    ("cuda": all, "cuda:0,2": these), by its number on this machine."""
    several = of_torchrun()
    names = devices_of(device, any_gpu=several)
    return names[int(os.environ.get("LOCAL_RANK", 0)) % len(names)] if several else device


def devices_of(device: str, any_gpu: bool = False) -> list[str]:
    """The devices that are named, one by one. any_gpu: "auto" stands for all GPUs, too, if there are any."""
    kind, _, numbers = device.partition(":")
    if numbers:
        return [f"{kind}:{number}" for number in numbers.split(",")]
    if kind == "cuda" or (kind == "auto" and any_gpu and triton.gpu_in_sight()[0]):
        return [f"cuda:{number}" for number in range(_count())] or [device]
    return [device]


def _count() -> int:
    """GPUs that are visible."""
    import torch

    return torch.cuda.device_count()


def command(device: str, arguments: Sequence[str]) -> list[str] | None:
    """What runs `ota-merge ARGUMENTS` with a process for each GPU that `device` names; None where this
    process is enough."""
    count = 1 if of_torchrun() else len(devices_of(device))
    if count < 2:
        return None
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return [*launcher, "-m", "ota_kernels", *arguments]
