"""The Triton backend: the same formulas as `reference`, in one fused pass on a GPU.

    backend.py   the backend's functions, over tiles on the host or on the device
    devices.py   several devices, for models whose tensors lie on more than one
    ring.py      what tiles from the host pass through: pinned memory, streams, device memory
    filling.py   how pinned memory is filled from mapped files
    bus.py       how fast the bus is, which processors are near
    halves.py    a tile that finds no room is merged in two
    device.py    whether kernels run on a device, and what goes wrong there, in one line
    tiles.py     tiles in device memory
    table.py     what a launch takes of them: one type and form, blocks, a table of words and numbers
    loads.py     how kernels read that
    stages.py    one function for each word of tensors/terms.py
    merge.py     the merge kernel
    batch.py     its launches, for any number of tiles at once
    density.py   thresholds of densities, found on the device while tiles merge
    ranks.py     scores by their rank
    variant.py   what it is compiled for
    outcome.py   what it counts and leaves undecided
    survey.py    statistics of tiles

TRITON_INTERPRET=1 (set before Triton is imported) runs the kernels on the CPU, element by element: for tests.
Importing this module imports neither torch nor triton.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .backend import Triton

NAME = "triton"

# Tiles in flight: three keep both directions of the bus and the kernels busy at a time; more wait for the
# threads that fill them, of which 16 copy faster than any bus carries.
LEAST_SLOTS, MOST_SLOTS = 3, 16

# Device files of NVIDIA (the last one under WSL) and AMD drivers, and what hides their GPUs from a process.
_SIGNS = {
    "/dev/nvidiactl": ("CUDA_VISIBLE_DEVICES",),
    "/dev/nvidia0": ("CUDA_VISIBLE_DEVICES",),
    "/dev/dxg": ("CUDA_VISIBLE_DEVICES",),
    "/dev/kfd": ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def gpu_in_sight() -> tuple[bool, str]:
    """(ok, reason): whether importing torch to look for a GPU is worth its seconds."""
    if interpreted():
        return False, "its interpreter runs only where it is asked for"
    hidden_by = {name for name in sum(_SIGNS.values(), ()) if os.environ.get(name) in ("", "-1")}
    reason = "no GPU"
    for sign, variables in _SIGNS.items():
        if Path(sign).exists():
            hiding = hidden_by.intersection(variables)
            if not hiding:
                return True, sign
            reason = f"{min(hiding)} hides every GPU"
    return False, reason


def verify(device: str = "auto") -> tuple[bool, str]:
    """(ok, reason): whether this backend can run on `device` ("auto", "cpu", "cuda" or "cuda:N")."""
    try:
        import torch
        import triton
    except ImportError as error:
        return False, f"{error}; install triton"
    if interpreted():
        if device.startswith("cuda"):
            return False, "TRITON_INTERPRET=1 interprets kernels on the CPU; unset it"
        return True, f"triton {triton.__version__}, interpreted on the CPU"
    if device == "cpu":
        return False, "it needs a GPU"
    if not torch.cuda.is_available():
        return False, "no CUDA or ROCm device is available"
    count, index = torch.cuda.device_count(), _index(device)
    if index >= count:
        last = f" to cuda:{count - 1}" if count > 1 else ""
        return False, f"there is no {device}: this machine has {count} GPU{'s' * (count > 1)}, cuda:0{last}"
    from .device import failure

    if reason := failure(f"cuda:{index}"):
        return False, f"{torch.cuda.get_device_name(index)}: {reason}"
    return True, f"triton {triton.__version__} on {torch.cuda.get_device_name(index)}"


def on(device: str | torch.device = "auto") -> Triton:
    """The backend on that device, the same object each time. "auto" and "cuda": torch's current one; the CPU
    under the interpreter."""
    return _on("cpu" if interpreted() else f"cuda:{_index(str(device))}")


@functools.cache
def _on(device: str) -> Triton:
    from .backend import Triton

    return Triton(device)


def _index(device: str) -> int:
    import torch

    _, _, number = device.partition(":")
    return int(number) if number else torch.cuda.current_device()
