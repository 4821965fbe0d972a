"""`ota-merge`, as a user calls it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def ota_merge(*arguments: str | os.PathLike) -> None:
    """Run the command beside this interpreter. CalledProcessError where it fails; its own line says why."""
    command = Path(sys.executable).with_name("ota-merge")
    subprocess.run((command, *arguments), check=True, capture_output=True, text=True)
