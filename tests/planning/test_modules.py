"""`modules`: parts of multi-modal and encoder-decoder models merged apart, by their own models, layers and
parameters."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import load_merged, save_model

from ota_kernels import merge, plan
from ota_kernels.errors import RecipeError
from ota_kernels.planning.modules import parts_of
from ota_kernels.planning.restack import restacked
from ota_kernels.recipe.recipe import Module
from ota_kernels.recipe.schema import parse_recipe


def layered(prefix, layers, rest="w"):
    return [f"{prefix}{i}.{rest}" for i in range(layers)]


LLAVA = [
    "language_model.model.embed_tokens.weight",
    *layered("language_model.model.layers.", 3),
    "language_model.model.norm.weight",
    "language_model.lm_head.weight",
    "vision_tower.vision_model.embeddings.patch_embedding.weight",
    *layered("vision_tower.vision_model.encoder.layers.", 2),
    "vision_tower.vision_model.post_layernorm.weight",
    "multi_modal_projector.linear_1.weight",
]
CONFIG = {
    "text_config": {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"]},
    "vision_config": {"num_hidden_layers": 2, "depth": 2},
}


@pytest.fixture
def models(tmp_path):
    """a, b: tensors of one number each, 1 and 2 and a sixteenth for each layer."""
    for tag, name in enumerate("ab", 1):
        tensors = {n: torch.full((4, 3), number(n, tag)) for n in LLAVA}
        save_model(tmp_path / name, tensors, config=CONFIG)
    return tmp_path


def number(name, tag):
    layer = next((int(x) for x in name.split(".") if x.isdigit()), 0)
    return tag + layer / 16


def entry(models, name, **more):
    return {"model": str(models / name), **more}


def merged(recipe, out):
    report = merge(recipe, out, backend="reference")
    found = {}
    for name, tensor in load_merged(out).items():
        assert len(tensor.unique()) == 1
        found[name] = tensor.unique().item()
    return found, report


def test_each_part_by_its_own_models_and_parameters(models, tmp_path):
    """Parameters of a module come before those of the recipe, and a gradient runs over its own layers."""
    both = [entry(models, "a"), entry(models, "b")]
    recipe = {
        "merge_method": "linear",
        "modules": {
            "vision_tower": {"models": [entry(models, "b")]},
            "text_decoder": {"models": both, "parameters": {"weight": [1, 3]}},
            "multi_modal_projector": {
                "models": [entry(models, "a", parameters={"weight": 3}), entry(models, "b")]
            },
        },
        "parameters": {"weight": 1, "normalize": [{"filter": "layers.1", "value": False}, {"value": True}]},
    }
    found, _ = merged(recipe, tmp_path / "out")
    assert found.keys() == set(LLAVA)
    for name, value in found.items():
        a, b = number(name, 1), number(name, 2)
        if name.startswith("vision_tower"):
            expected = b
        elif name.startswith("multi_modal_projector"):
            expected = (3 * a + b) / 4
        else:
            expected = (
                2 * (a + b) if "layers.1" in name else (a + b) / 2
            )  # weights of 2 in the middle, summed
        assert value == pytest.approx(expected, rel=1e-6), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]["num_hidden_layers"] == 3


def test_layers_of_parts_are_stacked(models, tmp_path):
    recipe = {
        "merge_method": "passthrough",
        "modules": {
            "text_decoder": {
                "slices": [
                    {"sources": [entry(models, "a", layer_range=[0, 2])]},
                    {"sources": [entry(models, "b", layer_range=[1, 3])]},
                ]
            },
            "vision_tower": {"slices": [{"sources": [entry(models, "b", layer_range=[1, 2])]}] * 3},
            "multi_modal_projector": {"models": [entry(models, "b")]},
        },
    }
    found, _ = merged(recipe, tmp_path / "out")
    text = [found[f"language_model.model.layers.{i}.w"] for i in range(4)]
    assert text == [1, 1 + 1 / 16, 2 + 1 / 16, 2 + 2 / 16]
    assert [found[f"vision_tower.vision_model.encoder.layers.{i}.w"] for i in range(3)] == [2 + 1 / 16] * 3
    assert found["language_model.model.embed_tokens.weight"] == 1  # the first slice's
    assert found["language_model.lm_head.weight"] == 2  # the last slice's
    assert found["multi_modal_projector.linear_1.weight"] == 2
    assert len(found) == len(LLAVA) + 2
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"] == {"num_hidden_layers": 4, "layer_types": ["a", "b", "b", "c"]}
    assert config["vision_config"] == {"num_hidden_layers": 3, "depth": 3}


def test_only_what_is_named_is_written(models, tmp_path):
    recipe = {"merge_method": "passthrough", "modules": {"text_decoder": {"models": [entry(models, "a")]}}}
    found, report = merged(recipe, tmp_path / "out")
    assert found.keys() == {name for name in LLAVA if name.startswith("language_model")}
    assert set(report["left_out"]) == set(LLAVA) - found.keys()
    (note,) = (line for line in report["notes"] if "no part that `modules` names" in line)
    assert "vision_tower.vision_model.post_layernorm.weight" in note


def test_a_task_vector_method_with_its_base(models, tmp_path):
    one = {"models": [entry(models, "b")]}
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(models / "a"),
        "modules": {
            "text_decoder": one | {"parameters": {"weight": 2}},
            "multi_modal_projector": one,
            "vision_tower": one | {"parameters": {"lambda": 0}},
        },
        "parameters": {"weight": 1},
    }
    found, _ = merged(recipe, tmp_path / "out")
    for name, value in found.items():
        a, b = number(name, 1), number(name, 2)
        factor = {"language_model": 2, "vision_tower": 0, "multi_modal_projector": 1}[name.split(".")[0]]
        assert value == pytest.approx(a + factor * (b - a)), name
    assert parse_recipe(parse_recipe(recipe).as_dict()) == parse_recipe(recipe)


T5 = ["shared.weight", *layered("encoder.block.", 2), "encoder.final_layer_norm.weight"]
T5 += [*layered("decoder.block.", 2), "decoder.final_layer_norm.weight", "lm_head.weight"]
QWEN = [
    "model.embed_tokens.weight",
    *layered("model.layers.", 2),
    "lm_head.weight",
    *layered("visual.blocks.", 2),
]
NEW_LLAVA = ["model.language_model.layers.0.w", "model.vision_tower.encoder.layers.0.w", "lm_head.weight"]
NEW_LLAVA += ["model.multi_modal_projector.linear_1.weight"]


@pytest.mark.parametrize(
    ("names", "modules", "expected"),
    [
        (T5, "shared encoder decoder", ["shared", *["encoder"] * 3, *["decoder"] * 4]),
        (QWEN, "text_decoder vision_tower", [*["text_decoder"] * 4, *["vision_tower"] * 2]),
        (QWEN, "text_decoder visual", [*["text_decoder"] * 4, *["visual"] * 2]),
        (NEW_LLAVA, "text_decoder vision_model", ["text_decoder", "vision_model", "text_decoder", None]),
        (QWEN[:4], "text_decoder", ["text_decoder"] * 4),
        (QWEN, "default", ["default"] * 6),
        (["a.x.w", "b.x.w", "ab.w"], "a b", ["a", "b", None]),
        (["m.left.0.w", "m.right.0.w"], "m.right", [None, "m.right"]),
    ],
)  # fmt: skip
def test_parts_by_names(names, modules, expected):
    found = parts_of([Module(name, ()) for name in modules.split()], names)
    assert [found[name] for name in names] == expected


@pytest.mark.parametrize(
    ("config", "module", "expected"),
    [
        ({"encoder_layers": 2, "decoder_layers": 5}, "encoder", {"encoder_layers": 3, "decoder_layers": 5}),
        ({"num_layers": 2, "num_decoder_layers": 5}, "decoder", {"num_layers": 2, "num_decoder_layers": 3}),
        ({"num_layers": 2, "num_decoder_layers": 5}, "encoder", {"num_layers": 3, "num_decoder_layers": 5}),
        ({"vision_config": {"depth": 9}}, "vision_tower", {"vision_config": {"depth": 3}}),
        (
            {"num_hidden_layers": 2, "vision_config": {"num_hidden_layers": 9}},
            "text_decoder",
            {"num_hidden_layers": 3, "vision_config": {"num_hidden_layers": 9}},
        ),
    ],
)
def test_where_the_count_stands(config, module, expected):
    assert restacked(config, [(config, 1), (config, 1), (config, 0)], module) == expected


def test_a_part_that_is_not_there(models):
    part = {"models": [entry(models, "a")]}
    recipe = {"merge_method": "passthrough", "modules": {"text_decoder": part, "decoder": part}}
    with pytest.raises(RecipeError) as caught:
        plan(recipe)
    assert str(caught.value) == (
        "`modules` names 'decoder', of which the models have no tensor: they have multi_modal_projector, "
        "text_decoder, vision_tower"
    )
    slices = {"slices": [{"sources": [entry(models, "a", layer_range=[0, 3])]}]}
    recipe = {"merge_method": "passthrough", "modules": {"text_decoder": part, "vision_tower": slices}}
    with pytest.raises(RecipeError, match=r"`modules\.vision_tower\.slices\[0\]`: .* has 2 layers.*\[0, 3\]"):
        plan(recipe)
