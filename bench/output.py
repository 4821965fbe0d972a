"""Whether a result is right, and what the benchmarks print and store."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil

from ota_kernels.tensors.dtypes import BY_NAME

RESULTS = Path(__file__).parent / "results"


def check_close(actual: np.ndarray, expected: np.ndarray, dtype: str, what: str) -> None:
    """Raise AssertionError unless two arrays of bytes, of `dtype`, agree within 1 unit in the last place."""
    wrong = np.flatnonzero(np.abs(_ordered(actual, dtype) - _ordered(expected, dtype)) > 1)
    if wrong.size:
        raise AssertionError(f"{what}: {wrong.size} values are not the reference's, the first at {wrong[0]}")


def _ordered(data: np.ndarray, dtype: str) -> np.ndarray:
    """int64 that counts representable values: neighbours differ by 1, NaNs lie beyond infinity."""
    size = BY_NAME[dtype].itemsize
    bits = data.view(f"u{size}").astype(np.int64)
    sign = 1 << (8 * size - 1)
    return np.where(bits & sign, -(bits & ~sign), bits)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns; a shorter row, of something that failed, ends in its reason."""
    whole = [header, *(row for row in rows if len(row) == len(header))]
    first, *others = (max(map(len, column)) for column in zip(*whole, strict=True))
    for label, *cells in (header, *rows):
        padded = [cell.rjust(width) for cell, width in zip(cells, others, strict=False)]
        print("  ".join([label.ljust(first), *padded]))


def save_json(path: Path, figures: dict) -> None:
    """Store figures with the hardware and versions that they belong to."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    packages = ("ota_kernels", "numpy", "torch", "safetensors")
    machine = {
        "processor": names[0] if names else platform.machine(),
        "processors": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, **figures}, indent=2) + "\n")
