"""Sizes as users write them, and numbers as people read them."""

from __future__ import annotations

import re
from fractions import Fraction

from .errors import RecipeError

_BYTES = {"": 1, "b": 1}
_BYTES |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgtp", start=1)}
_BYTES |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgtp", start=1)}

_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([a-z]*)", re.ASCII)


def parse_size(text: str | int, least: int = 1) -> int:
    """Bytes of a size such as "5GB" (5e9, as Hugging Face counts), "512MiB" (512 * 2**20) or 1000000.

    Units are read in any case; a fraction of a byte is dropped. Raises RecipeError for anything that is
    not at least `least` bytes (0 or 1).
    """
    size = _bytes(text)
    if size is None or size < least:
        above = " above zero" if least else ""
        raise RecipeError(
            f"size {text!r} is not a number of bytes{above}: write it like 5GB, 512MiB or 1000000"
        )
    return size


def _bytes(text: str | int) -> int | None:
    if isinstance(text, bool):
        return None
    if isinstance(text, int):
        return text
    if not isinstance(text, str):
        return None
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None or match[2] not in _BYTES:
        return None
    return int(Fraction(match[1]) * _BYTES[match[2]])


def format_bytes(n: int) -> str:
    """`n` bytes in decimal units, as shard sizes are given: "999 B", "34.1 GB"."""
    return _scaled(n, ("B", "kB", "MB", "GB", "TB", "PB"))


def format_count(n: int) -> str:
    """`n` things with a decimal suffix: "999", "248.1 M", "7.2 B"."""
    return _scaled(n, ("", "K", "M", "B", "T")).rstrip()


def _scaled(n: int, units: tuple[str, ...]) -> str:
    if n < 1000:
        return f"{n} {units[0]}"
    # Compared as printed, so that 999950 is "1.0 M" and not "1000.0 K".
    fitting = (power for power in range(1, len(units)) if round(n / 1000**power, 1) < 1000)
    power = next(fitting, len(units) - 1)
    return f"{n / 1000**power:.1f} {units[power]}"


def format_seconds(seconds: float) -> str:
    """A duration at the precision that matters: "0.39 s", "12.3 s", "2 min 05 s", "1 h 02 min"."""
    # Each bound is compared as printed, so that 59.96 is "1 min 00 s" and not "60.0 s".
    if round(seconds, 2) < 10:
        return f"{seconds:.2f} s"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    if round(seconds) < 3600:
        return "{} min {:02d} s".format(*divmod(round(seconds), 60))
    return "{} h {:02d} min".format(*divmod(round(seconds / 60), 60))
