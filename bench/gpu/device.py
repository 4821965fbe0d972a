"""Which GPU, with which driver and libraries."""

from __future__ import annotations

import shutil
import subprocess

import torch
import triton


def describe(device: torch.device) -> dict:
    """name, driver, runtime ("CUDA 12.8", "ROCm 6.4"), memory_gib, cache_mib, multiprocessors; Triton's
    version."""
    found = {"name": "Triton's interpreter", "triton": triton.__version__}
    if device.type != "cuda":
        return found
    properties = torch.cuda.get_device_properties(device)
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return found | {
        "name": properties.name,
        "driver": _asked("driver_version"),
        "runtime": runtime,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cache_mib": round(properties.L2_cache_size / 2**20, 1),
        "multiprocessors": properties.multi_processor_count,
    }


def clock(device: torch.device) -> int | None:
    """Megahertz of the multiprocessors now; None where NVIDIA's tool does not tell."""
    return int(found) if device.type == "cuda" and (found := _asked("clocks.sm", device.index or 0)) else None


def _asked(what: str, index: int = 0) -> str | None:
    """What NVIDIA's tool says of a device; None where it is missing or does not know."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, f"--id={index}", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return found[0] if found and found[0][0].isdigit() else None
