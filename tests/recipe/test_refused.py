"""What methods refuse, in one line that says what to do; the command exits with 2 (cli/test_bad_input.py)."""

from __future__ import annotations

import re

import pytest
import torch

import ota_kernels
from ota_kernels import InputError, OtaError, RecipeError
from ota_kernels.recipe import methods
from ota_kernels.recipe.schema import parse_recipe

W = {"weight": 1.0}


def recipe(method: str, experts: int = 2, base: bool = True, own: dict | None = None, **shared) -> dict:
    models = [{"model": f"m{t}", "parameters": dict(own or {})} for t in range(experts)]
    found = {"merge_method": method, "models": models, "parameters": shared}
    return found | ({"base_model": "b"} if base else {})


REQUIRED = [name for name in methods.names() if methods.get(name).base == "required"]


@pytest.mark.parametrize("method", REQUIRED)
def test_a_missing_base(method):
    row = methods.get(method)
    own = {p.key: 0.5 for p in row.own if repr(p.default) == "required"}
    shared = {p.key: 0.5 for p in row.shared if repr(p.default) == "required"}
    with pytest.raises(RecipeError, match="needs a `base_model`: add one"):
        parse_recipe(recipe(method, row.most or max(row.least, 1), False, own, **shared))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        # missing
        (recipe("slerp", 1), "`t` is missing for `models`: it must be a finite float32 number"),
        (recipe("nearswap", 1), "`t` is missing"),
        (recipe("ties"), "`weight` is missing for 'm0'"),
        (recipe("nuslerp"), "`weight` is missing for 'm0'"),
        # unknown
        (recipe("slerp", 1, t=0.5, densty=1), "known: "),
        (recipe("karcher", base=False, max_itr=3), "did you mean `max_iter`?"),
        # range and type
        (recipe("ties", own=W | {"density": -1}), "`density` in `models[0].parameters` is -1: it must be"),
        (recipe("breadcrumbs", own=W | {"gamma": 1.5}), "it must be a number in [0, 1]"),
        (recipe("della", own=W | {"epsilon": -0.1}), "it must be a number in [0, 1]"),
        (recipe("karcher", base=False, max_iter=2.5), "it must be an integer >= 1"),
        (recipe("karcher", base=False, tol=-1), "it must be a number >= 0"),
        (recipe("multislerp", own=W, eps=0), "it must be a number > 0"),
        (recipe("model_stock", filter_wise=1), "it must be true or false"),
        (recipe("sce", select_topk="much"), "it must be a number >= 0"),
        (recipe("ties", own={"weight": float("nan")}), "it must be a finite float32 number"),
        (recipe("ties", own=W, consensus="vote"), "it must be sum or count"),
        (recipe("ties", own=W, density_scope="layer"), "it must be tensor or model"),
        (recipe("checkpoints", base=False, decay="steps"), "it must be linear, minus_sqrt, cosine"),
        (recipe("checkpoints", base=False, beta=1.2, decay="ema"), "it must be a number in [0, 1]"),
        (recipe("consensus", k=0), "it must be an integer >= 1"),
        (recipe("localize_stitch", own={"density": 2}), "it must be a number in [0, 1]"),
        # numbers of models
        (recipe("slerp", 2, t=0.5), "`slerp` merges exactly 1 model beside the base, but `models` lists 2"),
        (recipe("nuslerp", 3, own=W), "exactly 2 models beside the base"),
        (recipe("model_stock", 1), "2 or more models beside the base, but `models` lists 1"),
        (recipe("arcee_fusion", 2), "exactly 1 model beside the base"),
        (recipe("nearswap", 3, t=1), "exactly 1 model beside the base"),
        (recipe("ffg", 2, missing_curvature="uniform"), "exactly 1 model beside the base"),
        (recipe("passthrough", 2, base=False), "`passthrough` merges exactly 1 model, but `models` lists 2"),
        # a base where it is one model more
        (recipe("passthrough", 1), "exactly 1 model, but `models` lists 2"),
        # sums
        (recipe("linear", base=False, own={"weight": 0.0}), "sum to 0: change them, or set `normalize:"),
        (recipe("multislerp", own={"weight": 0.0}), "sum to 0: change them, or set"),
        # DELLA
        (recipe("della", own=W | {"density": 0.1}), "density 0.1 and epsilon 0.15: density"),
        (recipe("della_linear", own=W | {"density": 0.9, "epsilon": 0.2}), "give a smaller `epsilon`"),
        # what does not go together
        (
            recipe("della", own=W | {"density": 0.5}, zero_sign="majority", rescale_by="density"),
            "leave out one of them",
        ),
        (recipe("checkpoints", base=False, decay="lawa", k=3), "`k` is 3, and there are 2 checkpoints"),
    ],
)  # fmt: skip
def test_refused(given, words):
    with pytest.raises(RecipeError, match=re.escape(words)) as caught:
        parse_recipe(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_opposite_vectors_in_multislerp(backend):
    """Three whose directions cancel have no mean on a sphere; two are averaged."""
    w = torch.tensor([1.0, 2.0])
    x = [w, -w, torch.zeros(2)]
    with pytest.raises(InputError, match="weighted directions cancel") as caught:
        ota_kernels.merge_tensors(None, x, method="multislerp", weight=1.0, backend=backend)
    assert "\n" not in str(caught.value)
    found = ota_kernels.merge_tensors(None, x[:2], method="multislerp", weight=0.5, backend=backend)
    torch.testing.assert_close(found, torch.zeros(2))


def test_della_of_a_gradient_is_refused_where_it_leaves_its_range():
    tensors = {f"layers.{i}.w": torch.ones(2, 2) for i in range(3)}
    moved = {name: w + 1 for name, w in tensors.items()}
    data = {"weight": [1.0], "density": [[0.5, 0.1]], "epsilon": 0.2}
    with pytest.raises(OtaError, match=r"layers\.\d\.w: density 0\.\d+ and epsilon 0\.2"):
        ota_kernels.merge_state_dicts(tensors, [moved], method="della", **data)
