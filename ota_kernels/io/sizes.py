"""How large a file of settings may be: what is longer is no such file, and would only fill the memory."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import InputError

MAX_JSON_BYTES = 1 << 28  # an index of half a million tensors; the largest vocabularies have a tenth of it


def read_settings(path: Path) -> bytes:
    """The bytes of a JSON file. Raises OSError, InputError where it is too large to be one."""
    size = os.stat(path).st_size
    if size > MAX_JSON_BYTES:
        raise InputError(f"{path}: {size} bytes are more than the {MAX_JSON_BYTES} of any such file")
    return path.read_bytes()
