"""The bus to a GPU and the processors beside it, as Linux tells: neither torch nor a driver is asked."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

PCI = Path("/sys/bus/pci/devices")
_MAKERS = ("0x10de", "0x1002")  # NVIDIA, AMD
_KINDS = ("0x03", "0x12")  # displays and 3D controllers, accelerators
_ASSUMED = 25e9  # bytes per second: PCI Express 4.0 with 16 lanes
_CARRIED = 0.85  # of what a link signals: the rest frames the packets


def bandwidth() -> tuple[float, str]:
    """(bytes per second to the GPU with the fastest link, where that is known from)."""
    found = [rate for device in _gpus() if (rate := _rate(device))]
    return (max(found), "its PCI Express link") if found else (_ASSUMED, "assumed: its link is not known")


def near_processors(address: str) -> set[int]:
    """The processors of the memory node that the device at a PCI address ("0000:17:00.0") belongs to; empty
    where the system does not tell."""
    found: set[int] = set()
    for part in _text(PCI / address / "local_cpulist").split(","):
        first, _, last = part.partition("-")
        with suppress(ValueError):
            found |= set(range(int(first), int(last or first) + 1))
    return found


def _gpus() -> list[Path]:
    devices = sorted(PCI.iterdir()) if PCI.is_dir() else []
    return [d for d in devices if _text(d / "vendor") in _MAKERS and _text(d / "class").startswith(_KINDS)]


def _rate(device: Path) -> float:
    """Bytes per second in one direction; 0: not known. An idle link is slower than it can be."""
    speed = re.match(r"([\d.]+) GT/s", _text(device / "max_link_speed"))
    lanes = _text(device / "max_link_width")
    if speed is None or not lanes.isdecimal() or not 0 < int(lanes) <= 32:
        return 0.0
    return float(speed[1]) * 1e9 / 8 * int(lanes) * _CARRIED


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
