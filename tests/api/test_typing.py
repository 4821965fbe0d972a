"""Type hints as a user's checker sees them, and what is public."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ota_kernels


def test_a_users_script_is_typed(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed: the test extra has it")
    config = tmp_path / "mypy.ini"
    # What torch and numpy declare would take minutes to read; the hints here are what is checked.
    skipped = "".join(
        f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in ("torch", "numpy", "peft", "mergekit")
    )
    config.write_text(f"[mypy]\nstrict = True\nfollow_imports = silent\n{skipped}")
    script = Path(__file__).parent / "user_script.py"
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(config),
        "--cache-dir",
        str(tmp_path),
        str(script),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_py_typed_is_there():
    assert (Path(ota_kernels.__file__).parent / "py.typed").exists()


def test_everything_public_is_documented():
    for name in ota_kernels.__all__:
        value = getattr(ota_kernels, name)
        assert value.__doc__, name
        assert value.__doc__.count("\n") == 0 or name in value.__doc__ or len(value.__doc__) > 80, name
    public = set(ota_kernels._LAZY) | {
        "BackendError",
        "InputError",
        "OtaError",
        "OutputError",
        "RecipeError",
        "RunError",
    }
    assert set(ota_kernels.__all__) == public
