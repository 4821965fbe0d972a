"""A method that is new is one row of words and one function of the oracle: here is one, on every way through.

loudest: w_0 + lambda weight_t d_t, t the last expert of the largest |weight_t d_t| among those whose
|d_t| is one of the density_t largest of the model
"""

from __future__ import annotations

import os

import numpy as np
import oracle
import pytest
import torch
from alone import passes_interpreted
from checkpoints import load_merged, make_set, model_digests
from jobs import Interrupt, merge
from tolerances import assert_close

import ota_kernels
from ota_kernels import RecipeError
from ota_kernels.recipe import methods
from ota_kernels.recipe.methods import Method, Need
from ota_kernels.recipe.parameters import FINITE, SHARE, Parameter
from ota_kernels.run.rules import Rules
from ota_kernels.tensors.found import selection_of
from ota_kernels.tensors.terms import ExpertTerms, Terms, Words

IN_INTERPRETER = bool(os.environ.get("TRITON_INTERPRET"))
# One tensor of several tiles and small ones; without the interpreter, which is slow, so many elements that a
# sample brackets the thresholds.
WIDE, TILE = ((30, 40), 300) if IN_INTERPRETER else ((180, 200), 5000)
SHAPES = {"wide.weight": WIDE, "norm.weight": (60,), "scale": (), "empty": (0, 3)}
PARAMETERS = {"density": [0.3, 0.1, 1.0], "weight": [1.0, -2.5, 0.4], "lambda": 0.8}


# The row.


def _needs(settings) -> list[Need]:
    surveyed = any(selection_of(e).surveyed for e in settings.experts)
    return [Need("thresholds", "model")] if surveyed else []


def _terms(settings, found) -> Terms:
    experts = tuple(
        ExpertTerms(
            threshold=bracket.threshold,
            span=bracket.span,
            census=bracket.census,
            weight_scale=weight,
            vote=weight,
            position=position,
        )
        for bracket, weight, position in zip(
            found.brackets, settings.each("weight"), found.positions, strict=True
        )
    )
    words = Words("difference", "magnitude", "at least", "largest", "constant", "number")
    return Terms(words, experts, lambda_=settings["lambda"])


ROW = Method(
    name="loudest",
    formula="w_0 + lambda weight_t d_t of the largest |weight_t d_t| kept",
    base="required",
    parameters=(
        Parameter("lambda", FINITE, 1.0, "the factor of the merged edit"),
        Parameter("density", SHARE, 1.0, "the share of the largest edits that are kept", "expert"),
        Parameter("weight", FINITE, 1.0, "the model's weight", "expert"),
    ),
    needs=_needs,
    terms=_terms,
)


# The oracle.


def loudest(model: dict[str, oracle.Tensor], settings: dict) -> dict[str, oracle.Merged]:
    n_experts = len(next(iter(model.values())).experts)
    masks = {name: np.zeros((n_experts, *tensor.shape), bool) for name, tensor in model.items()}
    for t in range(n_experts):
        scores = {name: np.abs(tensor.edits32()[t]) for name, tensor in model.items()}
        density = next(iter(settings.values())).own[t]["density"]
        kept = oracle.kept_by_density(np.concatenate([s.ravel() for s in scores.values()]), density)
        ends = np.cumsum([s.size for s in scores.values()])[:-1]
        for name, part in zip(model, np.split(kept, ends), strict=True):
            masks[name][t] = part.reshape(model[name].shape)
    found = {}
    for name, tensor in model.items():
        weights = np.array(settings[name].each("weight")).reshape(-1, *[1] * len(tensor.shape))
        votes = np.where(masks[name], np.abs(np.float32(weights) * tensor.edits32()), np.float32(-1))
        last = n_experts - 1 - np.argmax(votes[::-1], axis=0)
        chosen = masks[name] & (np.arange(n_experts).reshape(weights.shape) == last)
        edits = settings[name]["lambda"] * weights * tensor.edits()
        out = tensor.base + np.where(chosen, edits, 0.0).sum(axis=0)
        operand = np.max([np.abs(tensor.base), *np.abs(tensor.experts), *np.abs(edits)], axis=0)
        found[name] = oracle.Merged(out, masks[name], ~masks[name].any(axis=0), operand)
    return found


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    row = oracle.Method(loudest, {"lambda": 1.0}, {"density": 1.0, "weight": 1.0})
    monkeypatch.setitem(oracle.METHODS, "loudest", row)
    with methods.registered(ROW):
        yield


# What is merged, and what it must be.


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("models"), SHAPES)


@pytest.fixture
def truth(models) -> dict[str, oracle.Merged]:
    exact = {
        name: oracle.Tensor(base.double().numpy(), tuple(e[name].double().numpy() for e in models.experts))
        for name, base in models.base.items()
    }
    return oracle.evaluate(exact, "loudest", **PARAMETERS)


def check(found: dict[str, torch.Tensor], truth: dict[str, oracle.Merged]) -> None:
    assert found.keys() == truth.keys()
    for name, merged in truth.items():
        assert_close("bfloat16", found[name].double().numpy(), merged.out, merged.operand, 3)


@pytest.mark.parametrize("backend", ["triton"] if IN_INTERPRETER else ["native", "reference"])
class TestEveryWay:
    def test_files(self, models, truth, tmp_path, backend):
        recipe = models.recipe("loudest", **PARAMETERS)
        report = merge(recipe, tmp_path / "out", backend=backend, tile_elements=TILE)
        check(load_merged(tmp_path / "out"), truth)
        assert (report["passes"], report["repeats"]) == (1, 0)
        kept = [sum(int(merged.masks[t].sum()) for merged in truth.values()) for t in range(3)]
        assert [expert["kept"] for expert in report["experts"]] == kept

    def test_arrays(self, models, truth, backend):
        parameters = {key.replace("lambda", "lambda_"): value for key, value in PARAMETERS.items()}
        merged = ota_kernels.merge_state_dicts(
            models.base, models.experts, method="loudest", backend=backend, **parameters
        )
        check(merged, truth)

    @pytest.mark.parametrize("step", ["tile"] if IN_INTERPRETER else ["tile", "patch"])
    def test_a_resume(self, models, tmp_path, backend, step):
        recipe = models.recipe("loudest", **PARAMETERS)
        options = {"backend": backend, "tile_elements": TILE, "threads": 1, "candidates_memory": 0}
        merge(recipe, tmp_path / "expected", **options)
        with pytest.raises(KeyboardInterrupt):
            merge(recipe, tmp_path / "out", Rules(before=Interrupt(step, 5)), **options)
        report = merge(recipe, tmp_path / "out", resume=True, **options)
        assert report["resumed"]
        assert model_digests(tmp_path / "out") == model_digests(tmp_path / "expected")


def test_its_keys_are_checked(models, tmp_path):
    with pytest.raises(RecipeError, match=r"densty.*did you mean `density`"):
        merge(models.recipe("loudest", densty=0.3), tmp_path / "out")


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="registered twice"), methods.registered(ROW):
        pass


@pytest.mark.skipif(IN_INTERPRETER, reason="the tests above run under it")
def test_under_the_interpreter():
    passes_interpreted(__file__, "TestEveryWay")
