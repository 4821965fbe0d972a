"""README's Python runs, from top to bottom, as a reader would type it."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch

from ota_kernels.recipe import methods

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def test_snippets_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    # What inductor generates is torch's business, and takes a compiler.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    methods.names()
    monkeypatch.setattr(methods, "_REGISTRY", dict(methods._REGISTRY))  # what it adds goes with it
    names: dict = {"__name__": "readme"}
    for i, block in enumerate(BLOCKS):
        try:
            exec(compile(block, f"README.md, snippet {i + 1}", "exec"), names)
        except Exception as error:
            pytest.fail(f"{error!r} in\n{block}")
    assert names["merged"].shape == (512, 512)


def test_there_are_snippets():
    assert len(BLOCKS) >= 5
