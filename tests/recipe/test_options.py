"""Options of rows that have edits or weights: `origin`, `layers`, `weights_path`. Values by the oracle."""

from __future__ import annotations

import json
import re

import numpy as np
import oracle
import pytest
import torch
from checkpoints import load_merged, make_set, random_tensors, save_model, write_recipe
from jobs import merge
from safetensors.torch import save_file
from tolerances import assert_close

import ota_kernels
from ota_kernels import InputError, RecipeError
from ota_kernels.recipe import methods
from ota_kernels.recipe.schema import parse_recipe

SHAPES = (
    {"embed_tokens.weight": (12, 8)} | {f"layers.{i}.w": (9, 14) for i in range(3)} | {"norm.weight": (7,)}
)
W = {"weight": [0.5, -0.3, 1.0]}
# A row of each kind: method -> parameters, of three experts unless it takes fewer.
EDITS: dict[str, dict] = {
    "task_arithmetic": W,
    "ties": W | {"density": 0.4},
    "dare_ties": W | {"density": 0.5},
    "della_linear": W | {"density": 0.5, "epsilon": 0.2},
    "breadcrumbs": W | {"density": 0.6, "gamma": 0.1},
    "combine": W | {"density": 0.4, "consensus": "count"},
    "sce": {"select_topk": 0.5},
    "ram": {"epsilon": 0.001},
    "ramplus": {"epsilon": 0.001},
    "consensus": {},
    "magmax": {},
    "localize_stitch": {"density": 0.3},
    "ota": {"density": 0.4},
    "ffg": {"density": 0.4},
    "nearswap": {"t": 0.001},
    "nuslerp": {"weight": [0.3, 0.9]},
    "multislerp": {"weight": [0.3, 0.9, 0.5]},
    "model_stock": {},
}
COUNTS = {"ffg": 1, "nearswap": 1, "nuslerp": 2}


def drawn(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """A base, then models that differ from it by a tenth; two layers that nobody numbers."""
    base, *others = (random_tensors(SHAPES, seed + t) for t in range(count))
    return [base, *({n: w + 0.1 * other[n] for n, w in base.items()} for other in others)]


def truth(method: str, base, experts, origins=None, **parameters) -> dict[str, oracle.Merged]:
    def exact(model, name):
        return None if model is None else model[name].double().numpy()

    tensors = {
        name: oracle.Tensor(
            exact(base, name),
            tuple(exact(e, name) for e in experts),
            role="embedding" if "embed" in name else "matrix" if w.ndim == 2 else "vector",
            origins=None if origins is None else tuple(exact(o, name) for o in origins),
            layer=int(name.split(".")[1]) if name.startswith("layers") else None,
        )
        for name, w in experts[0].items()
    }
    return oracle.evaluate(tensors, method, **parameters)


def check(found, expected, dtype="float32") -> None:
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        assert_close(dtype, found[name].double().numpy(), want.out, want.operand, 3)


def test_every_row_with_edits_is_tried():
    rows = {name for name in methods.names() if methods.get(name).edits}
    like_others = {"breadcrumbs_ties", "dare_linear", "della", "ramplus_tl", "opcm"}
    assert rows == set(EDITS) | like_others | set(OF_MATRICES)


OF_MATRICES = ("covariance", "iso_c", "iso_cts", "tsv")


@pytest.mark.parametrize("method", OF_MATRICES)
def test_rows_of_matrices(method):
    """The edit of a tensor grows with `layers`; edits from an origin are those of a base moved there."""
    base, one, two, shift = drawn(4)
    whole = ota_kernels.merge_state_dicts(base, [one, two], method=method, out_dtype="float64")
    half = ota_kernels.merge_state_dicts(base, [one, two], method=method, layers=0.5, out_dtype="float64")
    moved = [{name: w.double() + shift[name] for name, w in e.items()} for e in (one, two)]
    origin = {name: w.double() + shift[name] for name, w in base.items()}
    same = ota_kernels.merge_state_dicts(
        base, moved, method=method, origins=[origin] * 2, out_dtype="float64"
    )
    for name, w in base.items():
        torch.testing.assert_close(half[name], w + (whole[name] - w) / 2, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(same[name], whole[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("method", EDITS)
def test_origin(method, backend):
    """An edit from any checkpoint to any other; one of the experts' is the base's."""
    count = COUNTS.get(method, 3)
    base, *others = drawn(1 + 2 * count)
    experts, origins = others[:count], [*others[count : 2 * count - 1], None] if count > 1 else others[count:]
    found = ota_kernels.merge_state_dicts(
        base, experts, method=method, origins=origins, backend=backend, **EDITS[method]
    )
    check(found, truth(method, base, experts, origins, **EDITS[method]))


@pytest.mark.parametrize("method", EDITS)
def test_layers(method):
    count = COUNTS.get(method, 3)
    base, *experts = drawn(1 + count)
    found = ota_kernels.merge_state_dicts(base, experts, method=method, layers=[0.4, 1.6], **EDITS[method])
    check(found, truth(method, base, experts, layers=[0.4, 1.6], **EDITS[method]))


TABLE = {name: [0.13 * i, 1.0 - 0.21 * i, -0.35] for i, name in enumerate(SHAPES)}


@pytest.mark.parametrize("form", ["json", "safetensors"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "linear", "multislerp", "fisher"])
def test_a_table_of_weights(method, form, tmp_path):
    path = tmp_path / f"table.{form}"
    if form == "json":
        path.write_text(json.dumps(TABLE))
    else:
        save_file({name: torch.tensor(row, dtype=torch.float64) for name, row in TABLE.items()}, path)
    base, *experts = drawn(4)
    base = base if methods.get(method).base != "ignored" else None
    found = ota_kernels.merge_state_dicts(base, experts, method=method, weights_path=str(path))
    if method == "fisher":  # without curvature it is the mean by the weights
        method = "linear"
    check(found, truth(method, base, experts, weights_path=TABLE))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm.weight": None}, "no row for norm.weight"),
        ({"norm.wieght": [1, 1, 1]}, "did you mean `norm.weight`"),
        ({"norm.weight": [1, 1]}, "has 2 weights, and the recipe 3 models"),
        ({"norm.weight": [1, 1, "x"]}, "no list of finite numbers"),
        ({"norm.weight": [1, 1, float("nan")]}, "no list of finite numbers"),
    ],
)
def test_a_table_that_does_not_fit(change, words, tmp_path):
    table = {name: row for name, row in (TABLE | change).items() if row is not None}
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))
    base, *experts = drawn(4)
    with pytest.raises((RecipeError, InputError), match=words):
        ota_kernels.merge_state_dicts(base, experts, method="ties", weights_path=str(path))


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_a_table_that_is_none(content, tmp_path):
    path = tmp_path / "table.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=r"table\.json: "):
        ota_kernels.merge_state_dicts(*_one_expert(), method="ties", weights_path=str(path))


def _one_expert():
    base, expert = drawn(2)
    return base, [expert]


def test_a_weight_beside_a_table():
    data = {
        "merge_method": "ties",
        "base_model": "b",
        "models": [{"model": "a", "parameters": {"weight": 1}}],
        "parameters": {"weights_path": "t.json"},
    }
    with pytest.raises(
        RecipeError, match=r"`weight` in `models\[0\]\.parameters` and `weights_path` exclude"
    ):
        parse_recipe(data)


# Files


@pytest.fixture
def models(tmp_path):
    return make_set(tmp_path, SHAPES, experts=2, dtype=torch.float32)


def _recipe(models, entry: dict, base=None, method: str = "task_arithmetic", **parameters) -> dict:
    return {
        "merge_method": method,
        "base_model": str(base or models.base_folder),
        "models": [entry],
        "parameters": parameters,
    }


def test_expo_goes_on_beyond_a_model(models, tmp_path):
    """w_1 + 0.4 (w_1 - w_0): the base is listed, and its origin makes it an expert."""
    one = models.expert_folders[0]
    entry = {"model": str(one), "origin": str(models.base_folder), "parameters": {"weight": 0.4}}
    merge(_recipe(models, entry, one), tmp_path / "out")
    check(
        load_merged(tmp_path / "out"),
        truth("task_arithmetic", models.experts[0], [models.experts[0]], [models.base], weight=0.4),
    )


def test_a_skill_goes_to_another_model_and_a_weight_below_zero_unlearns(models, tmp_path):
    """w_0 - (w_1 - w_2), in slices too."""
    one, two = map(str, models.expert_folders)
    entry = {"model": one, "origin": two, "parameters": {"weight": -1}}
    merge(_recipe(models, entry), tmp_path / "whole")
    ranged = [{"model": str(models.base_folder)}, {"model": one, "origin": two}]
    sliced = {
        "merge_method": "task_arithmetic",
        "base_model": str(models.base_folder),
        "slices": [{"sources": [{**source, "layer_range": [0, 3]} for source in ranged]}],
        "parameters": {"weight": -1},
    }
    merge(sliced, tmp_path / "slices")
    expected = truth("task_arithmetic", models.base, [models.experts[0]], [models.experts[1]], weight=-1)
    for out in ("whole", "slices"):
        check(load_merged(tmp_path / out), expected)


def test_an_origin_that_is_the_base_is_none():
    entry = {"model": "a", "origin": "b", "parameters": {"weight": 1}}
    recipe = parse_recipe({"merge_method": "ties", "base_model": "b", "models": [entry]})
    assert recipe.models[0].origin is None


def test_a_recipe_with_origins_is_written_as_it_is_read(models):
    entry = {"model": "a", "origin": {"model": "c", "lora": "d"}, "parameters": {"weight": 1}}
    recipe = parse_recipe(_recipe(models, entry))
    assert parse_recipe(recipe.as_dict()) == recipe
    assert recipe.models[0].origin.label == "c+d"


def test_what_an_origin_alone_has_is_not_merged(models, tmp_path):
    more = save_model(tmp_path / "more", models.experts[1] | {"extra.weight": torch.ones(3)})
    entry = {"model": str(models.expert_folders[0]), "origin": str(more), "parameters": {"weight": 1}}
    merge(_recipe(models, entry), tmp_path / "out")
    assert load_merged(tmp_path / "out").keys() == models.base.keys()


@pytest.fixture
def refused(refused_command, tmp_path):
    """Runs a recipe, which must be refused: the line that is said."""

    def run(recipe: dict) -> str:
        return refused_command("run", write_recipe(tmp_path / "recipe.yaml", recipe), tmp_path / "out", "-q")

    return run


def test_an_origin_of_other_shapes(models, refused, tmp_path):
    other = save_model(tmp_path / "other", models.base | {"layers.1.w": torch.zeros(9, 15)})
    entry = {"model": str(models.expert_folders[0]), "origin": str(other), "parameters": {"weight": 1}}
    assert "layers.1.w has shape [9, 15]" in refused(_recipe(models, entry))


def test_an_origin_without_a_tensor(models, refused, tmp_path):
    other = save_model(tmp_path / "other", {n: w for n, w in models.base.items() if n != "layers.1.w"})
    entry = {"model": str(models.expert_folders[0]), "origin": str(other), "parameters": {"weight": 1}}
    assert "has no tensor layers.1.w" in refused(_recipe(models, entry))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"merge_method": "linear"}, "is merged by `linear`: remove `origin`"),
        ({"merge_method": "ota", "base_model": None}, "has no `base_model`: add one"),
        ({"models": [{"model": "a", "origin": "a", "parameters": {"weight": 1}}]}, "the model itself"),
        ({"models": [{"model": "a", "origin": 3, "parameters": {"weight": 1}}]}, "`origin` in `models[0]`"),
    ],
)
def test_a_wrong_origin(change, words):
    recipe = {
        "merge_method": "ties",
        "base_model": "b",
        "models": [{"model": "a", "origin": "c", "parameters": {"weight": 1}}],
    } | change
    with pytest.raises(RecipeError, match=re.escape(words)):
        parse_recipe({k: v for k, v in recipe.items() if v is not None})


def test_layers_without_a_base():
    with pytest.raises(RecipeError, match="`layers` scales what is added to a `base_model`"):
        parse_recipe(
            {
                "merge_method": "multislerp",
                "models": [{"model": m, "parameters": {"weight": 1}} for m in "ab"],
                "parameters": {"layers": [0.5, 1]},
            }
        )


def test_a_wrong_number_of_origins():
    base, *experts = drawn(4)
    with pytest.raises(InputError, match="3 experts but 1 origins"):
        ota_kernels.merge_state_dicts(base, experts, method="ties", weight=1.0, origins=[base])


def test_numpy_origins():
    rng = np.random.default_rng(0)
    base, expert, origin = (rng.normal(size=(3, 4)).astype(np.float32) for _ in range(3))
    found = ota_kernels.merge_tensors(base, [expert], method="ties", weight=[2.0], origins=[origin])
    np.testing.assert_allclose(found, base + (expert - origin), rtol=1e-5)
