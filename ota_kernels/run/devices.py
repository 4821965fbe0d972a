"""Several GPUs of one machine: a process each, by torchrun, as several processes of any other kind."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ..backends import triton
from ..backends.triton import bus
from ..processors import stay_on
from .ranks import of_torchrun


def take_device(device: str) -> str:
    """The device of this process, where torchrun has started several: one of those that `device` names
    ("cuda": all, "cuda:0,2": these), by its number on this machine. From then on the process runs on the
    processors of that GPU's memory node, where its pinned memory arises, too."""
    if not of_torchrun():
        return device
    names = devices_of(device, any_gpu=True)
    own = names[int(os.environ.get("LOCAL_RANK", 0)) % len(names)]
    if own.startswith("cuda"):
        stay_on(bus.near_processors(_address(own)))
    return own


def devices_of(device: str, any_gpu: bool = False) -> list[str]:
    """The devices that are named, one by one. any_gpu: "auto" stands for all GPUs, too, if there are any."""
    kind, _, numbers = device.partition(":")
    if numbers:
        return [f"{kind}:{number}" for number in numbers.split(",")]
    if kind == "cuda" or (kind == "auto" and any_gpu and triton.gpu_in_sight()[0]):
        return [f"cuda:{number}" for number in range(_count())] or [device]
    return [device]


def _address(device: str) -> str:
    """Of a GPU, as Linux writes it; empty where torch does not tell."""
    import torch

    try:
        found = torch.cuda.get_device_properties(device)
        return f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
    except (AssertionError, AttributeError, RuntimeError):  # no driver, an older torch: who computes says so
        return ""


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
