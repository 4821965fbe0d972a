"""A device: whether Triton's kernels run on it, and what goes wrong there: out of memory, which is survived,
and all else, which ends in one line."""

from __future__ import annotations

import contextlib
import functools
import subprocess
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from triton.compiler.errors import CompilationError
from triton.errors import TritonError

from ...errors import BackendError

# torch (AcceleratorError too) and Triton's launcher raise RuntimeError with the driver's text. A kernel that
# does not compile is a TritonError; without ptxas or a C compiler, or with no room for Triton's cache, it is
# one of the others.
FAULTS = (RuntimeError, TritonError, OSError, subprocess.SubprocessError)


class DeviceMemoryError(Exception):
    """A tile finds no room in device or pinned memory, with no other in flight. Its text is the driver's."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less in flight would help. torch's pool has an exception of its own; for pinned memory, and
    where a kernel is loaded, there is only the driver's text."""
    if isinstance(error, (DeviceMemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "out of memory" in str(error)


def line_of(error: BaseException) -> str:
    """One line that says what went wrong: the drivers' messages go on with advice, Triton's compiler begins
    with source code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return f"a kernel does not compile: {lines[-1]}" if isinstance(error, CompilationError) else lines[0]


@contextlib.contextmanager
def reported(device: object) -> Iterator[None]:
    """Faults become BackendError."""
    try:
        yield
    except (DeviceMemoryError, *FAULTS) as error:
        raise BackendError(f"triton on {device}: {line_of(error)}") from error


@triton.jit
def _probe_kernel(out):
    tl.store(out, 1)


@functools.cache
def failure(device: str) -> str:
    """Why a kernel of one store (it also takes a C compiler, a driver and a cache folder) does not run on
    `device` ("cuda:N"); empty where it does."""
    try:
        with torch.cuda.device(device):
            out = torch.zeros(1, dtype=torch.int32, device=device)
            _probe_kernel[(1,)](out)
            return "" if int(out) == 1 else "its kernels do not write"
    except FAULTS as error:
        return line_of(error)
