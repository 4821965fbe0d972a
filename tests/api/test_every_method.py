"""Every method of the table by the functional API: numpy, torch, its operator, and, with
OTA_EVERY_METHOD set, Triton's interpreter."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from alone import passes_interpreted
from checkpoints import assert_same_tensors, edited, random_tensors, second_moments

from ota_kernels import merge_state_dicts
from ota_kernels.integrations import torch_ops
from ota_kernels.recipe import methods
from ota_kernels.recipe.parameters import REQUIRED

IN_INTERPRETER = bool(os.environ.get("TRITON_INTERPRET"))
SHAPES = {"w": (6, 9), "norm": (7,), "scale": ()}
GIVEN = {"density": 0.4, "select_topk": 0.6, "epsilon": 0.001}


def call(name: str) -> dict:
    """The arguments of merge_state_dicts for a method."""
    row = methods.get(name)
    count = row.most or 3
    base = random_tensors(SHAPES, 0)
    keys = [
        p for p in (*row.shared, *row.own) if p.default is REQUIRED or p.key in ("density", "select_topk")
    ]
    return {
        "base": None if row.base == "ignored" else base,
        "experts": [edited(base, 100 + t) for t in range(count)],
        "curvatures": [second_moments(base, 200 + t) for t in range(count)] if row.curvature else None,
        "method": name,
        **{p.key: GIVEN.get(p.key, 0.5) for p in keys},
    }


def as_numpy(value):
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, dict):
        return {key: as_numpy(item) for key, item in value.items()}
    return [as_numpy(item) for item in value] if isinstance(value, list) else value


@pytest.mark.skipif(IN_INTERPRETER, reason="of the CPU")
@pytest.mark.parametrize("name", methods.names())
class TestOnTheCpu:
    def test_numpy_and_torch(self, name):
        arguments = call(name)
        found = merge_state_dicts(**as_numpy(arguments))
        assert all(isinstance(w, np.ndarray) for w in found.values())
        found = {key: torch.from_numpy(np.asarray(w)) for key, w in found.items()}
        assert_same_tensors(found, merge_state_dicts(**arguments))

    def test_the_operator(self, name):
        """With the type that it promises while torch traces, too."""
        arguments = call(name) | {"out_dtype": "bfloat16"}
        expected = merge_state_dicts(**arguments)
        assert_same_tensors(torch_ops.merge_state_dicts(**arguments), expected)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            traced = torch_ops.merge_state_dicts(**arguments)
        assert {key: w.dtype for key, w in traced.items()} == {key: w.dtype for key, w in expected.items()}


@pytest.mark.skipif(not IN_INTERPRETER, reason="test_under_the_interpreter runs it")
@pytest.mark.parametrize("name", methods.names())
def test_triton(name):
    """What is kept is the same; values may differ in their last places."""
    arguments = call(name)
    found = merge_state_dicts(**arguments, backend="triton")
    for key, expected in merge_state_dicts(**arguments, backend="reference").items():
        torch.testing.assert_close(found[key], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.skipif(IN_INTERPRETER, reason="the test above runs under it")
@pytest.mark.skipif(
    "OTA_EVERY_METHOD" not in os.environ, reason="half a minute; test_triton_words has all words"
)
def test_under_the_interpreter():
    passes_interpreted(__file__, "test_triton")
