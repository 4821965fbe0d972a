"""Gradients of merges that are linear in their weights, against those of the formula in torch."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ota_kernels import RecipeError, merge_state_dicts, merge_tensors
from ota_kernels.integrations import torch_ops
from ota_kernels.recipe import methods
from ota_kernels.recipe.parameters import REQUIRED


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 7, generator=generator).to(dtype) for _ in range(4)]


def formula(base, experts, weight, lambda_, normalize):
    w_0 = 0 if base is None else base
    total = weight.sum() if normalize else 1
    return w_0 + lambda_ * sum(w * (x - w_0) for w, x in zip(weight, experts, strict=True)) / total


CASES = [("task_arithmetic", False), ("task_arithmetic", True), ("linear", True), ("linear", False)]


@pytest.mark.parametrize(("method", "normalize"), CASES)
def test_gradients_of_the_formula(method, normalize):
    base, *experts = inputs()
    base = base if method == "task_arithmetic" else None
    leaves = [t.clone().requires_grad_() for t in experts]
    root = None if base is None else base.clone().requires_grad_()
    weight = torch.tensor([0.5, -0.25, 1.5], dtype=torch.float64, requires_grad=True)
    lambda_ = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    own = {"lambda_": lambda_} if base is not None else {}
    merged = merge_tensors(root, leaves, method=method, weight=weight, normalize=normalize, **own)
    factor = lambda_ if base is not None else torch.ones(())
    expected = formula(root, leaves, weight, factor, normalize)
    torch.testing.assert_close(merged, expected)
    wanted = [weight, *leaves, *([root, lambda_] if base is not None else [])]
    probe = torch.randn(5, 7, dtype=torch.float64)
    found = torch.autograd.grad((merged * probe).sum(), wanted)
    for one, other in zip(found, torch.autograd.grad((expected * probe).sum(), wanted), strict=True):
        torch.testing.assert_close(one, other)


def test_weights_learn():
    """AdaMerging's loop: the weights that make a target of the edits are found again."""
    base, *experts = ({"w": t} for t in inputs(torch.float32))
    target = formula(base["w"], [e["w"] for e in experts], torch.tensor([0.3, 0.9, -0.2]), 1.0, False)
    weight = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        merged = merge_state_dicts(base, experts, method="task_arithmetic", weight=weight)
        (merged["w"] - target).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.3, 0.9, -0.2]), rtol=0, atol=1e-3)


def test_16_bits_have_float32_weights():
    base, *experts = inputs(torch.bfloat16)
    weight = torch.tensor([0.5, 1.0, 2.0], requires_grad=True)
    merged = merge_tensors(base, experts, method="task_arithmetic", weight=weight)
    assert merged.dtype == torch.bfloat16
    merged.sum().backward()
    expected = torch.stack([(e.double() - base.double()).sum() for e in experts])
    torch.testing.assert_close(weight.grad, expected.float())


def test_compiled_and_exported():
    base, *experts = inputs(torch.float32)

    class Merge(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([0.5, -0.25, 1.5]))

        def forward(self, base, experts):
            return merge_tensors(base, experts, method="task_arithmetic", weight=self.weight).square().sum()

    model = Merge()
    model(base, experts).backward()
    expected, model.weight.grad = model.weight.grad, None
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(base, experts).backward()
    torch.testing.assert_close(model.weight.grad, expected)
    program = torch.export.export(model, (base, experts))
    torch.testing.assert_close(program.module()(base, experts), model(base, experts))


@pytest.mark.parametrize(
    ("method", "parameters", "text"),
    [
        (
            "ties",
            {},
            "`ties` is not linear in its weights, so it has no gradient: use linear or task_arithmetic",
        ),
        ("task_arithmetic", {"density": 0.3}, "`density` is not understood beside weights that are tensors"),
        ("task_arithmetic", {"weight": torch.ones(2)}, r"`weight` has shape \[2\]: it must be \[3\]"),
        ("linear", {"lambda_": 1.0}, "`lambda` is not used by `linear`"),
        ("linear", {"threads": 2}, "`threads` is not understood beside weights that are tensors"),
    ],
    ids=["method", "key", "shape", "lambda", "threads"],
)
def test_refused(method, parameters, text):
    base, *experts = inputs()
    with pytest.raises(RecipeError, match=text):
        merge_tensors(base, experts, method=method, **{"weight": torch.ones(3), **parameters})


@pytest.mark.parametrize("name", methods.names())
def test_a_fake_kernel_of_every_method(name):
    """What torch is told while it traces is what the operator returns."""
    row = methods.get(name)
    required = {"weight": 1.0, "t": 0.5}
    parameters = {p.key: required[p.key] for p in row.parameters if p.default is REQUIRED}
    count = min(3, row.most or 3)
    base, *experts = ({"a.weight": t, "b": t[0]} for t in inputs(torch.bfloat16)[: count + 1])
    given = {"base": base, "experts": experts, "curvatures": None, "method": name, "out_dtype": "float32"}
    tensors, numbers, call = torch_ops.packed({**given, **parameters})
    real = torch.ops.ota_kernels.merge(tensors, numbers, call)
    with FakeTensorMode() as mode:
        fake = torch.ops.ota_kernels.merge([mode.from_tensor(t) for t in tensors], numbers, call)
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in real]
    assert {t.dtype for t in real} == {torch.float32}
