"""Tests in a process of their own: how many threads a library uses, and what it holds, is the process's."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest


def alone(test):
    """The test runs in a process that has run no other."""

    @functools.wraps(test)
    def run(request: pytest.FixtureRequest) -> None:
        if os.environ.get("OTA_ALONE"):
            test()
            return
        _passes(f"{request.node.path}::{request.node.name}", OTA_ALONE="1")

    del run.__wrapped__  # pytest asks for the fixtures of `run`
    return run


def passes_interpreted(path: str, only: str = "") -> None:
    """The tests of a file, those that `only` selects (-k), pass under Triton's interpreter, which must be
    chosen before Triton is imported."""
    _passes(path, *(["-k", only] if only else []), TRITON_INTERPRET="1")


def _passes(*arguments: str, **environment: str) -> None:
    """Some tests are run by a process of their own, and pass."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    env = os.environ | environment
    done = subprocess.run([*command, *arguments], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
