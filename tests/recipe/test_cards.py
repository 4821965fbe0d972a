"""Recipes in the style of model cards, made by the hundred from the schema: each parses, plans and runs with
the values of a float64 evaluation, or is refused with one line.

OTA_RECIPES=1000 tries so many of each kind; the suite a few.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil

import pytest
import torch
from checkpoints import load_merged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llamas import LETTERS, llama, tokenizer
from oracle import METHODS
from oracle.recipes import merge_recipe
from tolerances import assert_close

from ota_kernels import merge, plan
from ota_kernels.errors import OtaError

LAYERS = 4
TRIES = settings(
    max_examples=int(os.environ.get("OTA_RECIPES", 16)),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
FILTERS = ["self_attn", "mlp", "layers.1", "norm", "embed_tokens", "lm_head", "down_proj.weight"]
# Values of each parameter with which every method that has it can run, whatever lies between two of them.
VALUES = {
    "weight": [0.2, 0.5, 1.0, "5e-1", 3],
    "density": [0.4, 0.5, 0.6],
    "gamma": [0.01, 0.1, 0.3],
    "epsilon": [0.05, 0.1, 0.2],
    "lambda": [0.5, 1.0, 1.5],
    "t": [0, 0.3, 0.5, 1],
    "select_topk": [0.1, 0.5, 1.0],
    "r": [0.1, 0.3],
    "alpha": [0.2, 0.5],
    "scale": [0.5, 1.0, -1],
    "normalize": [True, False],
    "rescale": [True, False],
    "int8_mask": [True, False],
    "nuslerp_flatten": [True, False],
    "nuslerp_row_wise": [True, False],
    "normalize_weights": [True, False],
    "filter_wise": [True, False],
}
# What recipes carry though their method does not read it.
UNUSED = {"normalize": True, "int8_mask": True, "embed_slerp": True, "t": 0.5}
NAMES = [
    *("linear", "passthrough", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "slerp"),
    *("breadcrumbs_ties", "della", "della_linear", "sce", "ram", "ramplus_tl", "nuslerp", "multislerp"),
    *("karcher", "model_stock", "nearswap", "arcee_fusion"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder and its models as float64: a base and three of its kind, and one with more tokens."""
    root = tmp_path_factory.mktemp("cards")
    found = {}
    for seed, name in enumerate(("base", "x", "y", "z")):
        rows = tokenizer(root / name)
        like = found.get(str(root / "base"))
        found[str(root / name)] = llama(root / name, seed, LAYERS, rows=rows, like=like)
    rows = tokenizer(
        root / "chat", ("<|im_start|>", "<|im_end|>"), "{% for m in messages %}{{ m }}{% endfor %}"
    )
    found[str(root / "chat")] = llama(root / "chat", 9, LAYERS, rows=rows, like=found[str(root / "base")])
    return root, found


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    return (folder / str(i) for i in itertools.count())


def value(draw, key, complete):
    """A plain value, a gradient or conditions; complete: it says something about every tensor."""
    plain = st.sampled_from(VALUES[key])
    gradient = st.lists(plain, min_size=2, max_size=5)
    one = st.one_of(plain, gradient)
    conditions = st.lists(
        st.fixed_dictionaries({"filter": st.sampled_from(FILTERS), "value": one}), min_size=1, max_size=2
    )
    found = draw(st.one_of(plain, gradient, conditions))
    if isinstance(found, list) and isinstance(found[0], dict) and (complete or draw(st.booleans())):
        found = [*found, {"value": draw(one)}]
    return numeric(found) if isinstance(found, list) and not isinstance(found[0], dict) else found


def numeric(values):
    """YAML 1.1 reads 1e-5 as text; in a gradient the evaluation wants numbers."""
    return [float(v) if isinstance(v, str) else v for v in values]


def parameters(draw, keys, required=()):
    """Some of the keys, those that are required among them."""
    found = {key: value(draw, key, True) for key in required}
    for key in keys:
        if key not in found and draw(st.integers(0, 3)) == 0:
            found[key] = value(draw, key, False)
    for condition in (c for v in found.values() if isinstance(v, list) for c in v if isinstance(c, dict)):
        if isinstance(condition["value"], list):
            condition["value"] = numeric(condition["value"])
    return found


def with_parameters(entry, found):
    return entry | ({"parameters": found} if found else {})


@st.composite
def cards(draw, root, vocabulary=False):
    """A recipe that runs. vocabulary: over models of unlike tokens."""
    name = draw(st.sampled_from(NAMES))
    method = METHODS[name]
    own = [key for key in method.own if key in VALUES]
    shared = [
        key for key in ("lambda", *method.shared) if key in VALUES and (method.edits or key != "lambda")
    ]
    required = {"linear": ["weight"], "slerp": ["t"], "nearswap": ["t"]}.get(
        name, ["weight"] if "weight" in own else []
    )
    experts = draw(st.permutations(["x", "y", "chat"] if vocabulary else ["x", "y", "z"]))
    experts = experts[: draw(st.integers(max(1, method.least), min(3, method.most or 3)))]
    base = name not in ("linear", "passthrough", "karcher") and (
        method.base == "required" or draw(st.booleans())
    )
    names = [str(root / n) for n in (["base", *experts] if base else experts)]
    recipe = {"merge_method": name}
    if base:
        recipe["base_model"] = names[0]
    top = parameters(draw, [*own, *shared], required)
    if draw(st.booleans()):
        top |= {key: v for key, v in UNUSED.items() if key not in (*own, *method.shared)}
    recipe["parameters"] = top
    form = "models" if vocabulary else draw(st.sampled_from(["models", "slices", "modules"]))

    def entry(model, **more):
        is_base = base and model == names[0]
        return with_parameters({"model": model, **more}, {} if is_base else parameters(draw, own))

    if form == "models":
        listed = names if not base or draw(st.booleans()) else names[1:]
        recipe["models"] = [entry(model) for model in listed]
    else:
        slices = []
        for _ in range(draw(st.integers(1, 3))):
            size = draw(st.integers(1, LAYERS))
            starts = [draw(st.integers(0, LAYERS - size)) for _ in names]
            sources = [entry(m, layer_range=[a, a + size]) for m, a in zip(names, starts, strict=True)]
            slices.append(with_parameters({"sources": sources}, parameters(draw, [*own, *shared])))
        if form == "slices":
            recipe["slices"] = slices
        else:
            part = with_parameters({"slices": slices}, parameters(draw, [*own, *shared]))
            recipe["modules"] = {"default": part}
    if draw(st.booleans()):
        recipe["dtype"] = draw(st.sampled_from(["float32", "bfloat16", "torch.float16", "float64"]))
    if draw(st.booleans()):
        recipe["out_dtype"] = draw(st.sampled_from(["float32", "bfloat16"]))
    return recipe


def run(recipe, out):
    """The merged tensors; what plan says of them is what comes out."""
    planned = plan(recipe, backend="native")
    merge(recipe, out, backend="native", threads=1)
    found = load_merged(out)
    shutil.rmtree(out)
    assert {e.name: e.shape for e in planned.outputs} == {n: tuple(t.shape) for n, t in found.items()}
    return found


@TRIES
@given(st.data())
def test_values(models, numbered, data):
    root, tensors = models
    recipe = data.draw(cards(root))
    expected = merge_recipe(recipe, tensors)
    found = run(recipe, next(numbered))
    dtype = recipe.get("out_dtype", recipe.get("dtype", "float32")).removeprefix("torch.")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert str(tensor.dtype) == f"torch.{dtype}"
        assert_close(dtype, tensor.double().numpy(), expected[name].out, expected[name].operand, 3)


SOURCES = ["union", "base", "x", "chat"]


@TRIES
@given(st.data())
def test_vocabularies(models, numbered, data):
    """Over models of unlike tokens: every token that is written has its row, and layers do not care."""
    root, tensors = models
    recipe = data.draw(cards(root, vocabulary=True))
    source = data.draw(st.sampled_from(SOURCES))
    source = source if source in ("union", "base") else str(root / source)
    if data.draw(st.booleans()):
        recipe["tokenizer_source"] = source
    else:
        recipe["tokenizer"] = {"source": source, "pad_to_multiple_of": data.draw(st.sampled_from([1, 8]))}
        if data.draw(st.booleans()):
            recipe["tokenizer"]["tokens"] = {"<s>": {"source": {"kind": "zero"}, "force": True}}
    recipe["chat_template"] = data.draw(st.sampled_from(["auto", "chatml", "llama3"]))
    out = next(numbered)
    planned = plan(recipe, backend="native")
    merge(recipe, out, backend="native", threads=1)
    found, written = load_merged(out), json.loads((out / "tokenizer.json").read_text())
    config = json.loads((out / "config.json").read_text())
    ids = written["model"]["vocab"] | {t["content"]: t["id"] for t in written["added_tokens"]}
    rows = len(found["model.embed_tokens.weight"])
    assert rows == config["vocab_size"] == len(found["lm_head.weight"])
    assert set(LETTERS) < ids.keys()
    assert sorted(ids.values()) == list(range(len(ids)))
    assert len(ids) <= rows < len(ids) + 8
    listed = [*filter(None, [recipe.get("base_model")]), *(entry["model"] for entry in recipe["models"])]
    asked = {"union": listed, "base": listed[:1]}.get(source, [source])
    assert ("<|im_end|>" in ids) == (str(root / "chat") in asked)
    assert {e.name for e in planned.outputs} == found.keys()
    shutil.rmtree(out)
    plain = {key: v for key, v in recipe.items() if not key.startswith(("tokenizer", "chat"))}
    same = {
        m: {n: w for n, w in x.items() if "embed" not in n and "lm_head" not in n} for m, x in tensors.items()
    }
    dtype = recipe.get("out_dtype", recipe.get("dtype", "float32")).removeprefix("torch.")
    for name, merged in merge_recipe(plain, same).items():
        assert_close(dtype, found[name].double().numpy(), merged.out, merged.operand, 3)


JUNK = [None, -1, 2.5, "x", "union", "$(rm)", True, float("nan"), 10**400]
JUNK += [[], {}, [1, "a"], {"value": 1}, [{"filter": "q"}], [[0]], [0, 99], [3, 1], [{"value": [1, None]}]]


def broken(draw, recipe, root):
    """The recipe with something else in one place."""
    paths = [str(root / "x"), str(root / "none")]
    junk = st.sampled_from([*paths, *JUNK])
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(recipe)
    node, key = places[draw(st.integers(0, len(places) - 1))]
    how = draw(st.sampled_from(["replace", "delete", "add"]))
    if how == "delete":
        del node[key]
    elif how == "add" and isinstance(node, dict):
        node[
            draw(st.sampled_from(["layer_range", "weigth", "tokenizer", "name", "slices", "parameters"]))
        ] = draw(junk)
    else:
        node[key] = draw(junk)
    return recipe


@TRIES
@given(st.data())
def test_whatever_is_wrong_is_one_line(models, numbered, data):
    """Refused with one line, or understood: then it runs, and gives numbers."""
    root, _ = models
    recipe = json.loads(json.dumps(data.draw(cards(root))))
    recipe = broken(data.draw, recipe, root)
    try:
        found = run(recipe, next(numbered))
    except OtaError as error:
        said = str(error)
    else:
        assert all(torch.isfinite(t).all() for t in found.values() if t.is_floating_point())
        return
    assert said.strip()
    assert "\n" not in said
