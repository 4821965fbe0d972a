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
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        place = f"{request.node.path}::{request.node.name}"
        env = {**os.environ, "OTA_ALONE": "1"}
        done = subprocess.run([*command, place], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:]

    del run.__wrapped__  # pytest asks for the fixtures of `run`
    return run
