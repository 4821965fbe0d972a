"""Whether Triton's kernels run on a device: it also takes a C compiler, a driver and a cache folder."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .faults import FAULTS, line_of


@triton.jit
def _probe_kernel(out):
    tl.store(out, 1)


@functools.cache
def failure(device: str) -> str:
    """Why a kernel of one store does not run on `device` ("cuda:N"); empty where it does."""
    try:
        with torch.cuda.device(device):
            out = torch.zeros(1, dtype=torch.int32, device=device)
            _probe_kernel[(1,)](out)
            return "" if int(out) == 1 else "its kernels do not write"
    except FAULTS as error:
        return line_of(error)
