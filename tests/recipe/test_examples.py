"""Recipes in the style of mergekit's examples and of model cards run unmodified, with the values of a float64
evaluation of the recipe language and of the formulas (tests/oracle)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from checkpoints import load_merged
from llamas import llama, tokenizer
from oracle.recipes import merge_recipe
from tolerances import assert_close

from ota_kernels import merge

# Layers and models of each example; `$` stands for the folder.
LINEAR = """
models:
  - model: $/orca
    parameters: {weight: 1.0}
  - model: $/platypus
    parameters: {weight: 0.3}
  - model: $/wizard
    parameters: {weight: 0.5}
merge_method: linear
dtype: float16
"""
TIES = """
models:
  - model: $/orca
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: $/platypus
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: $/wizard
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: $/llama
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""
BIO = """
models:
  - model: $/llama
  - model: $/orca
    parameters: {density: 0.53, weight: 0.4}
  - model: $/wizard
    parameters: {density: 0.53, weight: 0.3}
merge_method: ties
base_model: $/llama
parameters: {normalize: false, int8_mask: true}
dtype: float16
"""
SLERP = """
slices:
  - sources:
      - {model: $/orca, layer_range: [0, 8]}
      - {model: $/platypus, layer_range: [0, 8]}
merge_method: slerp
base_model: $/orca
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float16
"""
STACK = """
slices:
  - sources:
      - {model: $/orca, layer_range: [0, 5]}
  - sources:
      - {model: $/platypus, layer_range: [4, 8]}
merge_method: passthrough
dtype: float16
"""
ARCEE = """
models:
  - model: $/llama
  - model: $/orca
merge_method: arcee_fusion
base_model: $/llama
dtype: float32
"""
CARDS = """
slices:
  - sources:
      - {model: $/llama, layer_range: [0, 4]}
      - {model: $/orca, layer_range: [0, 4], parameters: {density: [0.4, 0.9], weight: 0.6}}
      - {model: $/wizard, layer_range: [2, 6], parameters: {weight: [{filter: layers.3, value: 2}]}}
    parameters: {normalize: [true, false], weight: [0.1, 0.4, 0.2]}
  - sources:
      - {model: $/llama, layer_range: [3, 6]}
      - {model: $/platypus, layer_range: [5, 8], parameters: {weight: -0.5, t: 3}}
    parameters: {lambda: [{filter: lm_head, value: 0.5}, {filter: o_proj, value: [1, 2]}]}
merge_method: breadcrumbs_ties
base_model: $/llama
parameters: {density: 0.8, gamma: '2e-1', rescale: [{filter: mlp, value: true}], weight: 0.3}
dtype: bfloat16
"""
SINGLE = """
modules:
  default:
    slices:
      - sources:
          - {model: $/orca, layer_range: [2, 3], parameters: {weight: [1, 2, 7]}}
          - {model: $/wizard, layer_range: [1, 2]}
      - sources:
          - {model: $/wizard, layer_range: [0, 3]}
    parameters: {normalize: false}
merge_method: linear
parameters: {weight: [0.5, 0.25], normalize: true}
dtype: float32
"""
EXAMPLES = {
    "linear": LINEAR,
    "ties": TIES,
    "bio": BIO,
    "gradient slerp": SLERP,
    "stack": STACK,
    "arcee fusion": ARCEE,
    "levels": CARDS,
    "single layers": SINGLE,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder, and the float64 tensors of its models, each of eight layers."""
    root = tmp_path_factory.mktemp("examples")
    base = llama(root / "llama", 0, 8, dtype=torch.float16)
    found = {str(root / "llama"): base}
    for seed, name in enumerate(("orca", "platypus", "wizard"), 1):
        found[str(root / name)] = llama(root / name, seed, 8, like=base, dtype=torch.float16)
    return root, found


def check(out, recipe, expected, n_experts=3):
    for name, tensor in load_merged(out).items():
        assert str(tensor.dtype) == f"torch.{recipe['dtype']}"
        found = expected[name]
        assert_close(recipe["dtype"], tensor.double().numpy(), found.out, found.operand, n_experts)
    assert load_merged(out).keys() == expected.keys()


@pytest.mark.parametrize("example", EXAMPLES)
def test_values(models, tmp_path, ota_merge, example):
    root, tensors = models
    text = EXAMPLES[example].replace("$", str(root))
    (tmp_path / "recipe.yml").write_text(text)
    code, _, errors = ota_merge("run", tmp_path / "recipe.yml", tmp_path / "out", "-q")
    assert code == 0, errors
    recipe = yaml.safe_load(text)
    check(tmp_path / "out", recipe, merge_recipe(recipe, tensors))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    layers = {"stack": 9, "levels": 7, "single layers": 4}.get(example, 8)
    assert (config["num_hidden_layers"], config["torch_dtype"]) == (layers, recipe["dtype"])


STAGES = """
name: first
merge_method: linear
models:
  - model: $/orca
  - model: $/platypus
parameters: {weight: 0.5}
dtype: float32
---
merge_method: dare_ties
base_model: second
models:
  - {model: first, parameters: {weight: 0.75, density: 1.0}}
  - {model: $/wizard, parameters: {weight: 0.25, density: 1.0}}
dtype: float32
---
name: second
merge_method: slerp
base_model: $/llama
models:
  - model: first
parameters: {t: 0.25}
dtype: float32
"""


def test_stages(models, tmp_path, ota_merge):
    """Three documents, the base of one from another; each is what the formula makes of the one before."""
    root, tensors = models
    text = STAGES.replace("$", str(root))
    (tmp_path / "multi.yml").write_text(text)
    code, _, errors = ota_merge(
        "run", tmp_path / "multi.yml", tmp_path / "out", "-I", tmp_path / "stages", "-q"
    )
    assert code == 0, errors
    places = {"first": tmp_path / "stages" / "first", "second": tmp_path / "stages" / "second"}
    known = dict(tensors)
    for recipe in sorted(
        yaml.safe_load_all(text), key=lambda r: ["first", "second", None].index(r.get("name"))
    ):
        out = places.get(recipe.get("name"), tmp_path / "out")
        check(out, recipe, merge_recipe(recipe, known))
        known[recipe.get("name")] = {n: t.double().numpy() for n, t in load_merged(out).items()}


TOKENS = """
merge_method: linear
base_model: $/base
models:
  - {model: $/base, parameters: {weight: 0.25}}
  - {model: $/chat, parameters: {weight: 0.5}}
  - {model: $/tool, parameters: {weight: 0.25}}
tokenizer:
  source: union
  tokens:
    <|im_start|>: {source: $/chat} # in all models
    <|im_end|>: {source: $/chat, force: true}
    <tool>: {source: {kind: model_token, model: $/chat, token: <s>}}
    <none>: {source: {kind: zero}}
    <s>: {source: $/tool, force: true}
  pad_to_multiple_of: 8
chat_template: auto
dtype: float32
"""


def test_tokens(tmp_path):
    """Rows of the union by the rules of the recipe; the tokenizer that is written gives their ids."""
    transformers = pytest.importorskip("transformers")
    added = {"base": (), "chat": ("<|im_start|>", "<|im_end|>"), "tool": ("<tool>", "<|im_start|>")}
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    vocabularies, weights = {}, {}
    for seed, (name, tokens) in enumerate(added.items()):
        rows = tokenizer(tmp_path / name, tokens, None if name == "base" else template)
        weights[name] = llama(tmp_path / name, seed, 2, rows=rows)["model.embed_tokens.weight"]
        vocabulary = json.loads((tmp_path / name / "tokenizer.json").read_text())
        vocabularies[name] = dict(vocabulary["model"]["vocab"])
        vocabularies[name] |= {t["content"]: t["id"] for t in vocabulary["added_tokens"]}
    merge(yaml.safe_load(TOKENS.replace("$", str(tmp_path))), tmp_path / "out")
    made = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    rows = load_merged(tmp_path / "out")["model.embed_tokens.weight"].double().numpy()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (len(made), config["vocab_size"], len(rows)) == (19, 24, 24)

    def row(model, token):
        return weights[model][vocabularies[model][token]]

    def mean(base, chat, tool):
        return 0.25 * base + 0.5 * chat + 0.25 * tool

    start, end, s = row("chat", "<|im_start|>"), row("chat", "<|im_end|>"), row("tool", "<s>")
    expected = {token: mean(*(row(m, token) for m in added)) for token in vocabularies["base"]}
    expected |= {"<|im_start|>": mean(start, start, row("tool", "<|im_start|>")), "<|im_end|>": end, "<s>": s}
    tool = row("chat", "<s>")
    expected |= {"<tool>": mean(tool, tool, row("tool", "<tool>")), "<none>": np.zeros(4)}
    ids = made.get_vocab()
    assert ids.keys() == expected.keys()
    for token, values in expected.items():
        np.testing.assert_allclose(rows[ids[token]], values, rtol=1e-6, atol=1e-8, err_msg=token)
    for text in ("<s>abcd", "ab<|im_start|>dc<tool>l"):
        assert made.decode(made.encode(text, add_special_tokens=False)) == text
    chat = made.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert chat == "<|im_start|>ab<|im_end|>"


def test_the_recipe_of_the_readme(tmp_path, ota_merge):
    """It runs as it stands there, in a folder that has models of these names."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (text,) = (
        b for b in re.findall(r"^```yaml\n(.*?)^```", readme, re.M | re.S) if "merge_method: slerp" in b
    )
    weights = {}
    for seed, (name, tokens) in enumerate((("chat", ("<|im_end|>",)), ("math", ("<tool>",)))):
        rows = tokenizer(
            tmp_path / "models" / name, tokens, "{% for m in messages %}{{ m.content }}{% endfor %}"
        )
        like = weights.get("models/chat")
        weights[f"models/{name}"] = llama(tmp_path / "models" / name, seed, 32, rows=rows, like=like)
    (tmp_path / "recipe.yaml").write_text(text)
    code, _, errors = ota_merge("run", tmp_path / "recipe.yaml", tmp_path / "out", "-q")
    assert code == 0, errors
    out = load_merged(tmp_path / "out")
    expected = merge_recipe(yaml.safe_load(text), weights)
    for name in expected.keys() - {"model.embed_tokens.weight", "lm_head.weight"}:
        assert_close("bfloat16", out[name].double().numpy(), expected[name].out, expected[name].operand, 2)
    rows = out["model.embed_tokens.weight"].double().numpy()
    assert rows.shape == (24, 4)
    ids = {
        t["content"]: t["id"]
        for t in json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]
    }
    chat = weights["models/chat"]["model.embed_tokens.weight"]
    np.testing.assert_allclose(rows[ids["<|im_end|>"]], chat[15], rtol=2**-8)  # forced: the same in both
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 24
