"""Machine instructions of the variants that were timed, from the compiler: with the clock they say whether a
kernel is bound by what it executes or by memory."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

_SCHEDULERS, _LANES = 4, 32  # of a multiprocessor, each of which issues one instruction of a warp per cycle


def add_instructions(rows: list[dict], device: torch.device) -> None:
    """Add `instructions`, per element, and `issue`, the share of the cycles in which one was issued, to rows
    of a variant that was timed. Does nothing for GPUs that tools/compile_kernels.py does not know."""
    timed = [row for row in rows if row.get("variant") and row.get("megahertz")]
    if device.type != "cuda" or not timed:
        return
    compiler = _compiler()
    target = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    if target not in compiler.TARGETS:
        return
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    for row in timed:
        variant = replace(compiler.PLAIN, **compiler.CHANGES[row["variant"]])
        kernel = compiler.merge_kernel(row["variant"], variant, _LANES)
        code = compiler.compile_kernel(kernel, compiler.TARGETS[target])
        row["instructions"] = compiler.instructions(kernel, code, target)
        slots = multiprocessors * _SCHEDULERS * _LANES * row["megahertz"] * 1e6 * sorted(row["seconds"])[0]
        row["issue"] = row["instructions"] * row["elements"] / slots


def _compiler() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "compile_kernels.py"
    spec = importlib.util.spec_from_file_location("compile_kernels", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclasses look there
    spec.loader.exec_module(module)
    return module
