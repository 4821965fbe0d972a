"""Fixtures that several test files share."""

from __future__ import annotations

import logging
import os
import sys
import types

import numpy as np
import pytest
import torch
from checkpoints import digests
from hypothesis import settings
from optimizers import Net

from ota_kernels.backends import native, reference
from ota_kernels.cli import main

# Two cores run everything: no deadline per example, and the same examples every time.
settings.register_profile("ota", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("ota")

# The tensors here are small: handing them to torch's threads takes longer than the work.
torch.set_num_threads(1)

if os.environ.get("TRITON_INTERPRET"):
    # At every call of a kernel, and of a function inside of one, the interpreter replaces all functions of
    # its language, and puts them back after the kernel. That takes longer than the work: here they stay.
    from triton.runtime import interpreter

    def _replaced_once(kernel, replace=interpreter._patch_lang, modules={}):  # noqa: B006
        if kernel.__module__ not in modules:
            modules[kernel.__module__] = replace(kernel)
        return types.SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = _replaced_once


@pytest.fixture(params=["reference", *(f"native-{isa}" for isa in native.instruction_sets())], scope="module")
def backend(request):
    """Each backend, the native one once for each instruction set that this machine runs."""
    if request.param == "reference":
        yield reference
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTA_KERNELS_ISA", request.param.removeprefix("native-"))
        native.instruction_set.cache_clear()
        yield native
    native.instruction_set.cache_clear()


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def poisoned_outputs():
    """Memory that np.empty hands out holds NaN in every float type: what a kernel leaves unwritten shows."""
    empty = np.empty

    def poisoned(*args, **kwargs):
        array = empty(*args, **kwargs)
        if array.dtype != object:
            array.reshape(-1).view(np.uint8)[:] = 0xFF
        return array

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "empty", poisoned)
        yield


@pytest.fixture
def ota_merge(monkeypatch, capsys):
    """Runs the command in this process; returns (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ota-merge", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        output = capsys.readouterr()
        return code, output.out, output.err

    level = logging.getLogger("ota_kernels").level
    yield run
    logging.getLogger("ota_kernels").setLevel(level)  # what -v has set


@pytest.fixture
def refused_command(ota_merge, tmp_path):
    """Runs `ota-merge` and asserts that it is refused as it should be: exit code, one line on stderr with all
    facts, nothing printed, nothing changed in tmp_path. Returns the line."""

    def refused(*command, facts=(), code=2):
        before, entries = digests(tmp_path), sorted(os.listdir(tmp_path))
        found, printed, errors = ota_merge(*command)
        assert found == code, errors
        (line,) = errors.splitlines()
        assert line.startswith("error: ")
        for fact in facts:
            assert str(fact) in line, line
        assert printed == ""
        assert digests(tmp_path) == before
        assert sorted(os.listdir(tmp_path)) == entries  # no output, no work folder, not even empty ones
        return line

    return refused


@pytest.fixture
def failing_launches(monkeypatch):
    """Of Triton's merge kernel: a list of functions of (number of the batch, its elements) that raise."""
    from ota_kernels.backends import triton
    from ota_kernels.backends.triton import batch

    faults, count, launch = [], [0], batch.merge_all

    def failing(requests):
        count[0] += 1
        for fault in faults:
            fault(count[0], sum(request.tile.numel for request in requests))
        return launch(requests)

    monkeypatch.setattr(batch, "merge_all", failing)
    triton._on.cache_clear()  # rings that faults shrink are no other test's
    yield faults
    triton._on.cache_clear()
