"""Rows against the oracle on drawn inputs: shapes, types, experts that changed nothing, equal scores, weights
of any sign. What the oracle refuses, the package refuses too."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import assert_close

import ota_kernels
from ota_kernels import InputError, RecipeError
from ota_kernels.recipe import methods

SHAPES = ((), (1,), (0,), (7,), (1, 9), (9, 1), (0, 4), (5, 6), (2, 3, 4), (40, 30))
INPUTS = ("bfloat16", "float16", "float32", "float8_e4m3fn")
OUTPUTS = ("bfloat16", "float16", "float32", "float64")

WEIGHT = st.sampled_from([1.0, 0.5, 0.0, -0.75])  # exact: sums that cancel are 0
DENSITY = st.sampled_from([0.0, 0.2, 0.5, 0.83, 1.0])
SHARED = {
    "normalize": st.booleans(),
    "lambda": st.sampled_from([1.0, 0.6, -0.5, 0.0]),
    "rescale": st.booleans(),
    "consensus": st.sampled_from(["sum", "count"]),
    "select_topk": st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    "zero_sign": st.sampled_from(["positive", "majority"]),
}
# method -> (fewest, most experts, keys of each, shared keys, what is always given)
ROWS: dict[str, tuple[int, int, dict, tuple[str, ...], dict]] = {
    "linear": (1, 5, {"weight": WEIGHT}, ("normalize",), {}),
    "task_arithmetic": (1, 5, {"weight": WEIGHT}, ("normalize", "lambda"), {}),
    "ties": (
        1, 5, {"weight": WEIGHT, "density": DENSITY},
        ("normalize", "lambda", "rescale", "consensus", "zero_sign"), {},
    ),
    "breadcrumbs": (1, 4, {"weight": WEIGHT, "density": DENSITY}, ("normalize", "rescale"), {"gamma": 0.15}),
    "dare_ties": (1, 4, {"weight": WEIGHT, "density": DENSITY}, ("normalize", "rescale", "lambda"), {}),
    "della": (
        1, 4, {"weight": WEIGHT, "density": st.sampled_from([0.0, 0.4, 1.0])}, ("normalize", "rescale"),
        {"epsilon": 0.3},
    ),
    "sce": (1, 5, {}, ("select_topk", "lambda"), {}),
    "ram": (1, 5, {}, ("lambda",), {"epsilon": 0.01}),
    "ramplus_tl": (1, 4, {}, ("lambda",), {"epsilon": 0.01}),
    "consensus": (1, 5, {}, ("lambda",), {"q": 0.3}),
    "magmax": (1, 5, {}, ("lambda",), {}),
    "nearswap": (1, 1, {}, (), {"t": 0.02}),
    "localize_stitch": (1, 4, {"density": st.sampled_from([0.0, 0.3, 1.0])}, ("lambda",), {}),
    "checkpoints": (1, 8, {}, (), {}),
    "slerp": (1, 1, {}, (), {"t": 0.3}),
    "karcher": (1, 4, {}, (), {}),
    "model_stock": (2, 4, {}, (), {}),
}  # fmt: skip


@st.composite
def merges(draw, method: str) -> dict:
    least, most, own, shared, fixed = ROWS[method]
    n_experts = draw(st.integers(least, most))
    parameters = {key: [draw(values) for _ in range(n_experts)] for key, values in own.items()}
    parameters |= {key: draw(SHARED[key]) for key in shared} | fixed
    kinds = [draw(st.sampled_from(["same", "coarse", "fine", "sparse"])) for _ in range(n_experts)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype, shapes = draw(st.sampled_from(INPUTS)), [draw(st.sampled_from(SHAPES)) for _ in range(2)]
    models: list[dict[str, torch.Tensor]] = [{} for _ in range(n_experts + 1)]
    for i, shape in enumerate(shapes):
        base = np.asarray(rng.normal(0, 0.5, shape))
        for model, kind in zip(models, ["base", *kinds], strict=True):
            edit = {
                "base": 0 * base,
                "same": 0 * base,
                "coarse": np.round(rng.normal(0, 2, shape)) / 64,
                "fine": rng.normal(0, 0.05, shape),
                "sparse": rng.normal(0, 0.1, shape) * (rng.random(shape) < 0.2),
            }[kind]
            model[f"w{i}"] = torch.from_numpy(np.asarray(base + edit)).to(getattr(torch, dtype))
    return {"models": models, "parameters": parameters, "out": draw(st.sampled_from(OUTPUTS))}


@pytest.mark.parametrize("method", ROWS)
def test_drawn(method):
    with_base = methods.get(method).base != "ignored"

    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(merges(method))
    def check(drawn):
        base, *experts = drawn["models"]
        exact = {
            name: oracle.Tensor(
                w.double().numpy() if with_base else None,
                tuple(e[name].double().numpy() for e in experts),
                role="matrix" if w.ndim == 2 else "vector",
            )
            for name, w in base.items()
        }
        given = {key.replace("lambda", "lambda_"): value for key, value in drawn["parameters"].items()}

        def merged():
            return ota_kernels.merge_state_dicts(
                base if with_base else None, experts, method=method, out_dtype=drawn["out"], **given
            )

        try:
            truth = oracle.evaluate(exact, method, **drawn["parameters"])
        except ValueError:
            with pytest.raises((RecipeError, InputError)):
                merged()
            return
        found = merged()
        for name, want in truth.items():
            assert_close(drawn["out"], found[name].double().numpy(), want.out, want.operand, len(experts))

    check()
