"""`combine`: every selection with every consensus and weights, by keys; values by the oracle."""

from __future__ import annotations

import itertools

import numpy as np
import oracle
import pytest
import torch
from checkpoints import second_moments
from test_methods import drawn
from tolerances import assert_close

import ota_kernels
from ota_kernels import RecipeError
from ota_kernels.recipe.schema import parse_recipe

SHAPES = {"w": (13, 21), "long": (97,), "cube": (3, 4, 5), "one": (1,), "s": ()}
SELECTIONS = {
    "none": {},
    "magnitude": {"density": [0.3, 1.0, 0.6]},
    "saliency": {"density": [0.3, 0.0, 0.6]},
    "outliers": {"density": 0.5, "gamma": 0.1},
    "random": {"density": 0.5},
    "rank": {"density": 0.5, "epsilon": 0.2},
}
ALL = list(itertools.product(SELECTIONS, ("none", "sum", "count"), ("fixed", "curvature")))


def _models(seed: int = 0):
    tensors = {
        name: drawn(shape, 3, seed + i, torch.float32) for i, (name, shape) in enumerate(SHAPES.items())
    }
    models = [{name: x[t] for name, x in tensors.items()} for t in range(4)]
    return models[0], models[1:], [second_moments(models[0], 50 + t) for t in range(3)]


def check(backend: str, out: str = "float32", curvature: bool = True, **parameters) -> None:
    base, experts, moments = _models()
    exact = {
        name: oracle.Tensor(
            w.double().numpy(),
            tuple(e[name].double().numpy() for e in experts),
            tuple(m[name].numpy() for m in moments) if curvature else None,
        )
        for name, w in base.items()
    }
    truth = oracle.evaluate(exact, "combine", **{k.rstrip("_"): v for k, v in parameters.items()})
    found = ota_kernels.merge_state_dicts(
        base, experts, moments if curvature else None, method="combine", backend=backend, out_dtype=out,
        **parameters,
    )  # fmt: skip
    for name, want in truth.items():
        assert_close(out, found[name].double().numpy(), want.out, want.operand, 3)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("select", "consensus", "weigh"), ALL)
def test_values(select, consensus, weigh, backend):
    keys = {"select": select, "consensus": consensus, "weigh": weigh, **SELECTIONS[select]}
    check(backend, **keys, weight=[0.5, 1.0, 0.8])


@pytest.mark.parametrize(
    "parameters",
    [
        {"select": "random", "density": 0.4, "rescale": True, "rescale_by": "density"},
        {"select": "rank", "density": 0.4, "rescale": True, "rescale_by": "density", "consensus": "sum"},
        {"select": "saliency", "density": 0.4, "rescale": True, "weigh": "curvature", "power": 1.0},
        {"select": "magnitude", "density": 0.4, "density_scope": "model", "lambda_": 0.7},
        {"consensus": "sum", "zero_sign": "majority", "weight": [1.0, -1.0, 0.0], "normalize": False},
        {"weight": [1.0, -0.4, 0.0], "consensus": "count"},
    ],
)
def test_options(parameters):
    for out in ("float64", "bfloat16"):
        check("native", out, **parameters)


def test_curvature_on_top_of_a_dare_mask():
    """OTA's mean of what a draw kept: P_t = m_t h_t^(1/2)."""
    base, experts, moments = (torch.ones(2, 2), [torch.full((2, 2), x) for x in (2.0, 5.0)], None)
    moments = [torch.full((2, 2), h) for h in (4.0, 1.0)]
    found = ota_kernels.merge_tensors(
        base, experts, moments, method="combine", select="random", weigh="curvature"
    )
    np.testing.assert_allclose(found, 1 + (2 * 1 + 1 * 4) / 3, rtol=1e-6)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"weigh": "curvature", "normalize": False, "missing_curvature": "uniform"},
            "needs `normalize: true`",
        ),
        (
            {"select": "random", "density_scope": "model"},
            "`density_scope: model` is not for `select: random`",
        ),
        ({"rescale": True, "rescale_by": "density"}, "is for random selections"),
        ({"select": "saliency"}, "no `preconditioner_path` for 'a', 'c'"),
        ({"weigh": "curvature"}, "no `preconditioner_path` for 'a', 'c'"),
        ({"select": "loudest"}, "it must be none, magnitude, saliency, outliers, random or rank"),
        ({"select": "rank", "density": 0.1}, "density - epsilon and density"),
    ],
)
def test_what_does_not_go_together(keys, words):
    models = [{"model": "a"}, {"model": "c"}]
    with pytest.raises(RecipeError, match=words):
        parse_recipe({"merge_method": "combine", "base_model": "b", "models": models, "parameters": keys})
