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
        "driver": _driver(),
        "runtime": runtime,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cache_mib": round(properties.L2_cache_size / 2**20, 1),
        "multiprocessors": properties.multi_processor_count,
    }


def _driver() -> str | None:
    """The version of NVIDIA's driver; None where its tool is missing or knows no version."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return found[0] if found else None
