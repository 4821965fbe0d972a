"""From a recipe and models to output tensors: sources, settings, stacked layers; files and dictionaries
alike."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import torch
from checkpoints import load_merged, make_set, save_model, write_recipe

from ota_kernels import merge, merge_state_dicts, plan
from ota_kernels.errors import InputError, RecipeError
from ota_kernels.planning.inputs import Inputs
from ota_kernels.planning.layers import comes_before, position, stacks
from ota_kernels.recipe.schema import parse_recipe
from ota_kernels.run import job


def names_of(layers: int, prefix: str = "model.layers.") -> dict[str, tuple[int, ...]]:
    shapes = {"model.embed_tokens.weight": (6, 3)}
    for n in range(layers):
        shapes |= {f"{prefix}{n}.self_attn.q_proj.weight": (3, 3), f"{prefix}{n}.mlp.up_proj.weight": (4, 3)}
    return shapes | {"model.norm.weight": (3,), "lm_head.weight": (6, 3)}


def numbered(layers: int, tag: float) -> dict[str, torch.Tensor]:
    """A model whose tensors all hold one number: tag + the layer's number / 100, by role."""
    found = {}
    for name, shape in names_of(layers).items():
        number = next((int(x) for x in name.split(".") if x.isdigit()), 0)
        found[name] = torch.full(shape, tag + number / 128, dtype=torch.float32)
    return found


@pytest.fixture
def models(tmp_path):
    """a, b, c: four layers each, of numbers 1, 2, 3 and up."""
    for tag, name in enumerate("abc", 1):
        save_model(tmp_path / name, numbered(4, float(tag)), config={"num_hidden_layers": 4})
    return tmp_path


def settings_of(recipe):
    with Inputs(parse_recipe(recipe)) as inputs:
        return {entry.name: entry.settings for entry in inputs.entries}


def merged(recipe, out):
    merge(recipe, out, backend="reference")
    return load_merged(out)


def linear(models, **top):
    return {"merge_method": "linear", "models": [{"model": str(models / x)} for x in "ab"], **top}


# Settings


def test_gradient_over_the_layers(models):
    found = settings_of(linear(models, parameters={"weight": [1, 4]}))
    for n in range(4):
        assert found[f"model.layers.{n}.mlp.up_proj.weight"].each("weight") == [1.0 + n] * 2
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert found[name].each("weight") == [1.0, 1.0]


def test_values_of_every_level_and_kind_reach_the_output(models, tmp_path):
    """Against the formula: sum of weights times numbers over sum of weights."""
    recipe = linear(models, parameters={"weight": 2})
    recipe["models"][0]["parameters"] = {
        "weight": [{"filter": "mlp", "value": [1, 4]}, {"filter": "norm", "value": 6}]
    }
    out = merged(recipe, tmp_path / "out")
    for n in range(4):
        a, b = 1 + n / 128, 2 + n / 128
        w = 1 + n
        mlp, attention = (
            out[f"model.layers.{n}.mlp.up_proj.weight"],
            out[f"model.layers.{n}.self_attn.q_proj.weight"],
        )
        assert torch.allclose(mlp, torch.tensor((w * a + 2 * b) / (w + 2)), rtol=1e-6)
        assert torch.allclose(attention, torch.tensor((a + b) / 2), rtol=1e-6)
    assert torch.allclose(out["model.norm.weight"], torch.tensor((6 * 1 + 2 * 2) / 8), rtol=1e-6)


def test_a_gradient_is_planned_once(models, monkeypatch):
    """Settings that differ from layer to layer do not make planning quadratic."""
    made = []

    class Counted(job.Decider):
        def __init__(self, *args, **kwargs):
            made.append(1)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(job, "Decider", Counted)
    plan(linear(models), backend="reference")
    plain = len(made)
    plan(linear(models, parameters={"weight": [1, 2, 5, 9]}), backend="reference")
    assert len(made) == 2 * plain


def test_equal_settings_are_one_object(models):
    found = settings_of(linear(models, parameters={"weight": [{"filter": "mlp", "value": 2}, {"value": 1}]}))
    assert len({id(s) for s in found.values()}) == 2
    assert len({id(s) for s in settings_of(linear(models)).values()}) == 1


def test_weights_that_sum_to_zero_in_one_layer(models):
    recipe = linear(models)
    recipe["models"][0]["parameters"] = {"weight": [1, 1, -1, -1]}
    with pytest.raises(
        RecipeError,
        match=r"^model\.layers\.2\.(mlp\.up|self_attn\.q)_proj\.weight: the weights \[-1\.0, 1\.0\] sum to 0",
    ):
        settings_of(recipe)


def test_a_filter_that_matches_nothing_is_named(models, caplog):
    conditions = [{"filter": "mpl", "value": 1}, {"filter": "mlp", "value": 2}, {"value": 3}]
    with caplog.at_level(logging.WARNING):
        settings_of(linear(models, parameters={"weight": conditions}))
    assert caplog.messages == ["the filter 'mpl' of `weight` matches no tensor"]


def test_thresholds_may_follow_the_layers(tmp_path):
    models = make_set(tmp_path, names_of(3), experts=2, dtype=torch.float32)
    recipe = models.recipe(scaling_factor=[{"filter": "mlp", "value": 2}, 3.0])
    recipe["models"][0]["parameters"]["precond_threshold"] = [0, 2e-9]
    recipe["parameters"] = {"lambda": [0.5, 1], "power": {"filter": "q_proj", "value": 1}}
    found = settings_of(recipe)
    last = found["model.layers.2.mlp.up_proj.weight"]
    assert [e["precond_threshold"] for e in last.experts] == [2e-9, None]
    assert last.each("scaling_factor") == [2.0, 3.0]
    assert (last["lambda"], last["power"]) == (1.0, 0.5)
    middle = found["model.layers.1.self_attn.q_proj.weight"]
    assert [e["precond_threshold"] for e in middle.experts] == [1e-9, None]
    assert middle.each("scaling_factor") == [1.0, 3.0]
    assert (middle["lambda"], middle["power"]) == (0.75, 1.0)


# Layers


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.layers.0.a", "model.layers.11.a", "lm_head.weight"], {"model.layers.": 12}),
        (["h.0.attn.c_attn.weight", "h.1.x", "wte.weight"], {"h.": 2}),
        (
            ["encoder.block.0.layer.1.x", "decoder.block.2.layer.0.x"],
            {"encoder.block.": 1, "decoder.block.": 3},
        ),
        (["layers.0.mlp.experts.7.w1", "head.0.weight"], {"layers.": 1}),
        (["stages.0.a", "stages.1.a", "head.0.weight"], {"stages.": 2}),
        (["a", "b.weight"], {}),
    ],
)
def test_stacks(names, expected):
    assert stacks(names) == expected


def test_position_in_a_stack():
    layers = {"h.": 5, "one.layers.": 1}
    assert [position(f"h.{n}.w", layers) for n in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert position("one.layers.0.w", layers) == 1
    assert position("wte.weight", layers) == position("head.3.w", layers) == 0


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("model.embed_tokens.weight", True),
        ("transformer.wpe.weight", True),
        ("embeddings.LayerNorm.weight", True),
        ("transformer.word_embeddings_layernorm.bias", True),
        ("visual.patch_embed.proj.weight", True),
        ("shared.weight", True),
        ("model.norm.weight", False),
        ("lm_head.weight", False),
        ("embed_out.weight", False),
        ("pooler.dense.weight", False),
    ],
)
def test_what_comes_before_the_layers(name, before):
    assert comes_before(name) is before


# Slices


def stack(models, *parts, method="linear", **top):
    """parts: per slice a list of (model, first, end)."""
    slices = [
        {"sources": [{"model": str(models / m), "layer_range": [first, end]} for m, first, end in part]}
        for part in parts
    ]
    return {"merge_method": method, "slices": slices, **top}


def test_layers_are_stacked_and_repeated(models, tmp_path):
    out = merged(stack(models, [("a", 0, 3)], [("b", 1, 3)], [("a", 2, 3)]), tmp_path / "out")
    assert out.keys() == names_of(6).keys()
    numbers = [1, 1 + 1 / 128, 1 + 2 / 128, 2 + 1 / 128, 2 + 2 / 128, 1 + 2 / 128]
    for n, number in enumerate(numbers):
        for rest in ("self_attn.q_proj.weight", "mlp.up_proj.weight"):
            assert torch.equal(
                out[f"model.layers.{n}.{rest}"], torch.full(out[f"model.layers.{n}.{rest}"].shape, number)
            )
    assert torch.all(out["model.embed_tokens.weight"] == 1)
    assert torch.all(out["model.norm.weight"] == 1)


def test_what_comes_after_the_layers_is_the_last_slices(models, tmp_path):
    out = merged(stack(models, [("a", 0, 2)], [("b", 2, 4), ("c", 0, 2)]), tmp_path / "out")
    assert torch.all(out["model.embed_tokens.weight"] == 1)
    assert torch.all(out["model.norm.weight"] == 2.5)
    assert torch.all(out["lm_head.weight"] == 2.5)
    assert torch.all(out["model.layers.3.mlp.up_proj.weight"] == (2 + 3 / 128 + 3 + 1 / 128) / 2)


def test_parameters_of_a_slice(models):
    recipe = stack(models, [("a", 0, 2), ("b", 0, 2)], [("a", 1, 4), ("c", 0, 3)], parameters={"weight": 9})
    first, second = recipe["slices"]
    first["parameters"] = {"weight": [1, 3], "normalize": False}
    second["sources"][0]["parameters"] = {"weight": [{"filter": "layers.1.", "value": 5}, {"value": [2, 4]}]}
    found = settings_of(recipe)
    of = {n: found[f"model.layers.{n}.mlp.up_proj.weight"] for n in range(5)}
    assert [of[n].each("weight") for n in range(5)] == [[1, 1], [3, 3], [5, 9], [3, 9], [4, 9]]
    assert [of[n]["normalize"] for n in range(5)] == [False, False, True, True, True]
    assert found["model.embed_tokens.weight"].each("weight") == [1, 1]
    assert found["lm_head.weight"].each("weight") == [2, 9]


def test_numbers_of_models_are_those_of_the_recipe(models):
    with Inputs(
        parse_recipe(stack(models, [("a", 0, 1), ("b", 0, 1)], [("c", 0, 1), ("b", 1, 2)]))
    ) as inputs:
        found = {entry.name: entry.positions for entry in inputs.entries}
    assert found["model.layers.0.mlp.up_proj.weight"] == (0, 1)
    assert found["model.layers.1.mlp.up_proj.weight"] == (2, 1)


def test_the_base_of_a_slice(models, tmp_path):
    recipe = stack(
        models,
        [("a", 0, 2), ("b", 1, 3)],
        [("c", 2, 4), ("b", 0, 2)],
        method="ota",
        base_model=str(models / "a"),
        parameters={"missing_curvature": "uniform", "masked_task_vector_merge_method": "linear"},
    )
    recipe["slices"][1]["base_model"] = str(models / "b")
    with Inputs(parse_recipe(recipe)) as inputs:
        found = {e.name: [p.what for p in e.sources] for e in inputs.entries}
    a, b, c = (str(models / x) for x in "abc")
    rest = "mlp.up_proj.weight"
    assert found[f"model.layers.0.{rest}"] == [f"{a}: model.layers.0.{rest}", f"{b}: model.layers.1.{rest}"]
    assert found[f"model.layers.2.{rest}"] == [f"{b}: model.layers.0.{rest}", f"{c}: model.layers.2.{rest}"]
    assert found["lm_head.weight"] == [f"{b}: lm_head.weight", f"{c}: lm_head.weight"]
    out = merged(recipe, tmp_path / "out")
    assert torch.allclose(out[f"model.layers.2.{rest}"], torch.tensor(3 + 2 / 128))


def test_curvature_follows_the_layers_of_its_model(tmp_path):
    models = make_set(tmp_path, names_of(3), experts=1, dtype=torch.float32)
    source = {
        "model": str(models.expert_folders[0]),
        "parameters": {"preconditioner_path": str(models.curvature_files[0])},
    }
    base = {"model": str(models.base_folder)}
    slices = [
        {"sources": [base | {"layer_range": [n, n + 1]}, source | {"layer_range": [n, n + 1]}]}
        for n in (2, 0)
    ]
    recipe = {"merge_method": "ota", "base_model": str(models.base_folder), "slices": slices}
    with Inputs(parse_recipe(recipe)) as inputs:
        found = {entry.name: entry.curvatures[0].values for entry in inputs.entries}
    for output, n in ((0, 2), (1, 0)):
        name = "mlp.up_proj.weight"
        expected = models.curvatures[0][f"model.layers.{n}.{name}"].reshape(-1).numpy()
        assert (found[f"model.layers.{output}.{name}"].float32() == expected).all()


def test_as_dict_of_slices_and_modules(models):
    plain = stack(
        models, [("a", 0, 2), ("b", 0, 2)], [("a", 1, 3), ("c", 0, 2)], parameters={"weight": [1, 2]}
    )
    recipe = parse_recipe(plain)
    assert parse_recipe(recipe.as_dict()) == recipe
    whole = {
        "merge_method": "linear",
        "modules": {"default": {"slices": plain["slices"], "parameters": {"weight": 3}}},
    }
    assert parse_recipe(parse_recipe(whole).as_dict()) == parse_recipe(whole)
    based = plain | {
        "merge_method": "ota",
        "base_model": str(models / "a"),
        "parameters": {"missing_curvature": "base"},
    }
    assert parse_recipe(parse_recipe(based).as_dict()) == parse_recipe(based)


def test_one_module_is_the_whole_model(models, tmp_path):
    recipe = linear(models)
    recipe["modules"] = {"default": {"models": recipe.pop("models"), "parameters": {"weight": [1, 2]}}}
    out = merged(recipe, tmp_path / "out")
    assert torch.all(out["lm_head.weight"] == 1.5)
    assert settings_of(recipe)["model.layers.3.mlp.up_proj.weight"].each("weight") == [2, 2]


# What is refused


def wrong(models, change):
    recipe = stack(models, [("a", 0, 2), ("b", 0, 2)], [("a", 1, 3), ("c", 0, 2)])
    change(recipe)
    return recipe


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda r: r["slices"][0]["sources"][0].update(layer_range=[0, 3]),
            ["`slices[0]`", "unlike numbers of layers"],
        ),
        (
            lambda r: r["slices"][0]["sources"][0].update(layer_range=[2, 2]),
            ["`layer_range` in `slices[0].sources[0]`", "[2, 2]"],
        ),
        (lambda r: r["slices"][0]["sources"][0].update(layer_range=[-1, 1]), ["`layer_range`", "[-1, 1]"]),
        (
            lambda r: r["slices"][0]["sources"][0].update(layer_range=["0", 1]),
            ["`layer_range`", "two integers"],
        ),
        (
            lambda r: r["slices"][0]["sources"][0].pop("layer_range"),
            ["`layer_range` is missing", "slices[0].sources[0]"],
        ),
        (
            lambda r: r["slices"][0]["sources"][1].update(r["slices"][0]["sources"][0]),
            ["`slices[0].sources`", "twice"],
        ),
        (lambda r: r["slices"][0].pop("sources"), ["`sources` is missing in `slices[0]`"]),
        (lambda r: r["slices"][0].update(source=[]), ["unknown key 'source'", "did you mean `sources`?"]),
        (lambda r: r.update(slices=[]), ["`slices` is missing or empty"]),
        (lambda r: r.update(slices={"a": 1}), ["`slices` is {'a': 1}", "list"]),
        (lambda r: r.update(modules={}), ["`slices` and `modules` exclude each other"]),
        (lambda r: r.update(merge_method="ota", base_model="org/x"), ["'org/x' is no source of `slices[0]`"]),
        (
            lambda r: [s.update(layer_range=[3, 5]) for s in r["slices"][1]["sources"]],
            ["`slices[1]`", "4 layers", "`layer_range: [3, 5]`", "beyond"],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_slices(models, change, words):
    with pytest.raises(RecipeError) as caught:
        settings_of(wrong(models, change))
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


def test_slices_of_a_model_with_two_stacks(tmp_path):
    tensors = {"encoder.layers.0.w": torch.ones(2), "decoder.layers.0.w": torch.ones(2)}
    save_model(tmp_path / "a", tensors)
    with pytest.raises(
        RecipeError, match=r"one stack of them; .* has decoder\.layers\.0 to 0, encoder\.layers\.0 to 0"
    ):
        settings_of(stack(tmp_path, [("a", 0, 1)]))


# Files and dictionaries


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda m: m.update({"model.norm.weight": torch.ones(4)}),
            ["model.norm.weight", "has shape [4]", "[3]"],
        ),
        (lambda m: m.pop("model.norm.weight"), ["has no tensor model.norm.weight, which other models have"]),
        (
            lambda m: m.update({"model.norm.weight": torch.ones(3, dtype=torch.int64)}),
            ["differs", "int64 and float32"],
        ),
    ],
    ids=["shape", "missing", "type"],
)
def test_files_and_dictionaries_fail_alike(models, tmp_path, change, words):
    tensors = numbered(4, 2.0)
    change(tensors)
    save_model(tmp_path / "odd", tensors)
    recipe = linear(models)
    recipe["models"][1]["model"] = str(tmp_path / "odd")
    with pytest.raises(InputError) as of_files:
        settings_of(recipe)
    with pytest.raises(InputError) as of_dictionaries:
        merge_state_dicts(None, [numbered(4, 1.0), tensors], method="linear")
    for word in words:
        assert word in str(of_files.value)
        assert word in str(of_dictionaries.value)
    assert str(tmp_path / "odd") in str(of_files.value)
    assert "experts[1]" in str(of_dictionaries.value)


def test_gradients_and_filters_in_memory():
    experts = [numbered(4, 1.0), numbered(4, 2.0)]
    found = merge_state_dicts(
        None, experts, method="linear", backend="reference", weight=[{"value": [1, 4], "filter": "mlp"}, 2.0]
    )
    for n in range(4):
        w = 1 + n
        expected = (w * (1 + n / 128) + 2 * (2 + n / 128)) / (w + 2)
        assert torch.allclose(
            found[f"model.layers.{n}.mlp.up_proj.weight"], torch.tensor(expected), rtol=1e-6
        )


def test_the_command_prints_warnings(models, tmp_path):
    recipe = linear(models, parameters={"int8_mask": True})
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    command = [
        sys.executable,
        "-c",
        "from ota_kernels.cli import main; main()",
        "plan",
        str(path),
        "--backend",
        "reference",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "`int8_mask` in `parameters` is not used by `linear`\n")


# Copies, counts, tensors that some models lack


def test_a_stack_of_one_model_each_is_a_copy(models, tmp_path):
    recipe = stack(models, [("a", 0, 2)], [("b", 1, 3)], method="passthrough", dtype="bfloat16")
    with Inputs(parse_recipe(recipe)) as inputs:
        assert {entry.action for entry in inputs.entries} == {"copy"}
    out = merged(recipe, tmp_path / "out")
    numbers = [1, 1 + 1 / 128, 2 + 1 / 128, 2 + 2 / 128]
    for n, number in enumerate(numbers):
        tensor = out[f"model.layers.{n}.mlp.up_proj.weight"]
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, torch.full((4, 3), number).bfloat16())


def test_a_scaled_stack_is_merged(models, tmp_path):
    recipe = stack(models, [("a", 0, 2)], [("b", 1, 3)], method="passthrough")
    recipe["slices"][1]["sources"][0]["parameters"] = {"scale": [{"filter": "q_proj", "value": [0, 2]}]}
    out = merged(recipe, tmp_path / "out")
    assert torch.all(out["model.layers.2.self_attn.q_proj.weight"] == 0)
    assert torch.all(out["model.layers.3.self_attn.q_proj.weight"] == 2 * (2 + 2 / 128))
    assert torch.all(out["model.layers.3.mlp.up_proj.weight"] == 2 + 2 / 128)


@pytest.mark.parametrize(
    ("method", "names", "line"),
    [
        ("slerp", "abc", "`slerp` merges exactly 1 model beside the base, but `models` lists 2"),
        ("nuslerp", "b", "`nuslerp` merges exactly 2 models beside the base, but `models` lists 1"),
        ("model_stock", "ab", "`model_stock` merges 2 or more models beside the base, but `models` lists 1"),
    ],
)
def test_numbers_of_models(models, method, names, line):
    parameters = {"slerp": {"t": 0.5}, "nuslerp": {"weight": 1}}.get(method, {})
    recipe = {
        "merge_method": method,
        "base_model": str(models / "a"),
        "models": [{"model": str(models / name)} for name in names],
        "parameters": parameters,
    }
    with pytest.raises(RecipeError) as caught:
        parse_recipe(recipe)
    assert str(caught.value) == line


def test_no_expert_is_the_base(models, tmp_path):
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(models / "a"),
        "models": [{"model": str(models / "a")}],
        "parameters": {"weight": 1},
    }
    assert parse_recipe(parse_recipe(recipe).as_dict()) == parse_recipe(recipe)
    out = merged(recipe, tmp_path / "out")
    expected = numbered(4, 1.0)
    assert all(torch.equal(out[name], tensor) for name, tensor in expected.items())


def paired(recipe, allow_crimes=True):
    with Inputs(parse_recipe(recipe), allow_crimes=allow_crimes) as inputs:
        return {entry.name: entry for entry in inputs.entries}


@pytest.fixture
def lacking(models):
    """b without its norm, c with a bias that only it has."""
    for name, change in (
        ("b", lambda m: m.pop("model.norm.weight")),
        ("c", lambda m: m.update(bias=torch.ones(2))),
    ):
        tensors = numbered(4, {"b": 2.0, "c": 3.0}[name])
        change(tensors)
        save_model(models / name, tensors)
    return models


def test_what_some_models_lack_is_merged_over_the_others(lacking):
    recipe = {"merge_method": "linear", "models": [{"model": str(lacking / x)} for x in "abc"]}
    recipe["models"][2]["parameters"] = {"weight": 3}
    with pytest.raises(InputError, match=r"b: has no tensor model\.norm\.weight.*--allow-crimes"):
        paired(recipe, allow_crimes=False)
    found = paired(recipe)
    norm = found["model.norm.weight"]
    assert norm.positions == (0, 2)
    assert norm.settings.each("weight") == [1, 3]
    assert found["bias"].positions == (2,)


def based(lacking, method, base, *experts, **parameters):
    return {
        "merge_method": method,
        "base_model": str(lacking / base),
        "models": [{"model": str(lacking / x)} for x in experts],
        "parameters": parameters,
    }


def test_by_the_rule_of_the_method(lacking, caplog):
    found = paired(based(lacking, "task_arithmetic", "a", "b", weight=1))["model.norm.weight"]
    assert (found.action, found.sources[0].what) == ("copy", f"{lacking / 'a'}: model.norm.weight")
    with pytest.raises(
        InputError, match=r"b: has no tensor .*, without which `task_arithmetic` cannot merge it"
    ):
        paired(based(lacking, "task_arithmetic", "b", "c", weight=1))
    found = paired(based(lacking, "slerp", "b", "c", t=0.5))
    assert [found[name].action for name in ("bias", "model.norm.weight", "lm_head.weight")] == [
        "copy",
        "copy",
        "merge",
    ]
    with pytest.raises(InputError, match="without which `nearswap`"):
        paired(based(lacking, "nearswap", "b", "c", t=0.1))
    found = paired(based(lacking, "model_stock", "a", "b", "c"))
    assert "bias" not in found
    assert "model.norm.weight" not in found
    assert len([line for line in caplog.messages if "is left out" in line]) == 2


def test_shares_of_a_whole_model_need_the_same_models_everywhere(models):
    recipe = stack(
        models,
        [("a", 0, 2), ("b", 0, 2)],
        [("a", 2, 3), ("c", 2, 3)],
        method="ota",
        base_model=str(models / "a"),
    )
    recipe["parameters"] = {"missing_curvature": "uniform", "density": 0.5}
    with pytest.raises(RecipeError, match="thresholds over the whole model"):
        paired(recipe)
    recipe["parameters"]["density_scope"] = "tensor"
    assert paired(recipe)["model.layers.2.mlp.up_proj.weight"].positions == (1,)


# plan --tensors


def test_plan_lists_every_tensor(models, ota_merge, tmp_path):
    recipe = based(
        models,
        "task_arithmetic",
        "a",
        "b",
        "c",
        **{"weight": [0, 1], "lambda": {"filter": "mlp", "value": 0.5}},
    )
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    code, printed, _ = ota_merge("plan", path, "--backend", "reference", "--tensors", "--json")
    assert code == 0
    listed = {each["name"]: each for each in json.loads(printed)["outputs"]}
    assert listed.keys() == names_of(4).keys()
    name = "model.layers.3.mlp.up_proj.weight"
    found = listed[name]
    assert (found["shape"], found["dtype"], found["action"]) == ([4, 3], "float32", "merge")
    assert found["base"] == {"model": str(models / "a"), "tensor": name}
    assert found["parameters"]["lambda"] == 0.5
    assert listed["model.layers.3.self_attn.q_proj.weight"]["parameters"]["lambda"] == 1.0
    assert [(s["model"], s["tensor"], s["parameters"]["weight"]) for s in found["sources"]] == [
        (str(models / "b"), name, 1.0),
        (str(models / "c"), name, 1.0),
    ]
    assert listed["lm_head.weight"]["sources"][0]["parameters"]["weight"] == 0.0
    assert "outputs" not in json.loads(ota_merge("plan", path, "--backend", "reference", "--json")[1])


def test_plan_lists_every_tensor_in_words(models, ota_merge, tmp_path):
    recipe = stack(models, [("a", 0, 1)], [("b", 3, 4)], parameters={"weight": 0.25})
    code, printed, _ = ota_merge(
        "plan", write_recipe(tmp_path / "recipe.yaml", recipe), "--backend", "reference", "--tensors"
    )
    lines = printed.splitlines()
    at = lines.index("model.layers.1.mlp.up_proj.weight: 4 x 3, float32, merge")
    assert code == 0
    assert lines[at + 1] == "  normalize true"
    assert lines[at + 2] == f"  from {models / 'b'}: model.layers.3.mlp.up_proj.weight  weight 0.25"
