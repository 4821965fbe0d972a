"""Recipes: what parses, to which values, and which one-line error everything else gets."""

import math
import textwrap
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ota_kernels.errors import RecipeError
from ota_kernels.recipe import methods
from ota_kernels.recipe.methods import Method
from ota_kernels.recipe.parameters import is_constant
from ota_kernels.recipe.schema import MAX_MODELS, load_recipe, parse_recipe


def ota(parameters=None, own=None, **top):
    """A valid two-model ota recipe; own: parameters added to its first model; top: None removes a key."""
    first, second = ({"model": f"org/{name}", "parameters": {}} for name in "ab")
    for model in (first, second):
        model["parameters"]["preconditioner_path"] = f"{model['model']}/v.safetensors"
    first["parameters"].update(own or {})
    recipe = {
        "merge_method": "ota",
        "base_model": "org/base",
        "models": [first, second],
        "parameters": parameters or {},
        **top,
    }
    return {key: value for key, value in recipe.items() if value is not None}


def linear(*weights, **top):
    models = [
        {"model": f"org/{index}", "parameters": {"weight": weight}} for index, weight in enumerate(weights)
    ]
    return {"merge_method": "linear", "models": models, **top}


def shared(method="ota", **values):
    """All shared parameters of a method, its defaults and these; `lambda_` stands for `lambda`."""
    defaults = {p.key: p.default for p in methods.get(method).shared if p.default is not None}
    return defaults | {key.rstrip("_"): value for key, value in values.items()}


def of_model(method="ota", **values):
    """All parameters of one model."""
    return {p.key: p.default for p in methods.get(method).own if p.default is not None} | values


def fails(data, *words):
    """parse_recipe(data) raises a RecipeError of one line that contains every word."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(data)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, f"{word!r} is not in {text!r}"


def case(data, *words):
    return pytest.param(data, words, id=words[0])


def load_text(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(textwrap.dedent(text))
    return load_recipe(path)


# Shapes of the published OTA configs


def test_per_model_thresholds_with_linear_masked_merge(tmp_path):
    recipe = load_text(
        tmp_path,
        """
        merge_method: ota
        base_model: lab/base-8B
        parameters:
          epsilon: 1e-24
          normalise: none
          power: 0.5
          fallback_to_base: true
          rescale: true
          approximate_norm: true
          rescale_relative_threshold: 1e-6
          masked_task_vector_merge_method: linear
        models:
          - model: lab/math
            parameters:
              preconditioner_path: lab/math/export/exp_avg_sq.safetensors
              precond_threshold: 3.6533e-20
          - model: lab/code
            parameters:
              preconditioner_path: lab/code/export/exp_avg_sq.safetensors
              precond_threshold: 7e-21
        dtype: bfloat16
        tokenizer_source: union
        """,
    )
    assert recipe.parameters == shared(
        epsilon=1e-24,
        rescale=True,
        approximate_norm=True,
        rescale_relative_threshold=1e-6,
        masked_task_vector_merge_method="linear",
    )
    assert [entry.model for entry in recipe.models] == ["lab/math", "lab/code"]
    assert [entry.parameters for entry in recipe.models] == [
        of_model(preconditioner_path="lab/math/export/exp_avg_sq.safetensors", precond_threshold=3.6533e-20),
        of_model(preconditioner_path="lab/code/export/exp_avg_sq.safetensors", precond_threshold=7e-21),
    ]
    assert (recipe.base_model, recipe.output_dtype, recipe.tokenizer_source) == (
        "lab/base-8B",
        "bfloat16",
        "union",
    )


@pytest.mark.parametrize("form", ["rank1_approx: true", "rank: 16"])
def test_global_threshold_with_low_rank_curvature(tmp_path, form):
    recipe = load_text(
        tmp_path,
        f"""
        merge_method: ota
        base_model: lab/base
        parameters: {{precond_threshold: 5e-20}}
        models:
          - {{model: lab/math, parameters: {{preconditioner_path: m.safetensors, {form}}}}}
          - {{model: lab/code, parameters: {{preconditioner_path: c.safetensors, {form}}}}}
        """,
    )
    key, value = yaml.safe_load(form).popitem()
    for entry in recipe.models:
        assert entry.parameters["precond_threshold"] == 5e-20
        assert entry.parameters[key] == value


@pytest.mark.parametrize(
    ("line", "normalise"), [("", "none"), ("normalise: global", "global")], ids=["plain", "normalised"]
)
def test_no_base_with_optimizer_files(tmp_path, line, normalise):
    recipe = load_text(
        tmp_path,
        f"""
        merge_method: ota
        models:
          - model: /runs/math/checkpoint-9
            parameters:
              weight: 1.0  # a comment
              preconditioner_path: /runs/math/optimizer_full.pt
          - model: /runs/code/checkpoint-9
            parameters:
              weight: 1.0
              preconditioner_path: /runs/code/optimizer_full.pt
        parameters:
          epsilon: 1e-10
          {line}
        dtype: bfloat16
        """,
    )
    assert recipe.base_model is None
    assert recipe.parameters == shared(epsilon=1e-10, normalise=normalise)
    assert recipe.models[1].parameters["preconditioner_path"] == "/runs/code/optimizer_full.pt"


def test_linear_weights(tmp_path):
    recipe = load_text(
        tmp_path,
        """
        merge_method: linear
        models:
          - {model: lab/math, parameters: {weight: 0.75}}
          - {model: lab/code}
        parameters:
        """,
    )
    assert [entry.parameters["weight"] for entry in recipe.models] == [0.75, 1.0]
    assert recipe.parameters["normalize"] is True


# Values


def test_defaults():
    recipe = parse_recipe(ota())
    assert recipe.parameters == shared()
    assert recipe.parameters["epsilon"] == 1e-26
    assert recipe.parameters["power"] == 0.5
    assert recipe.tokenizer_source == "base"
    assert recipe.output_dtype is None


@pytest.mark.parametrize(
    ("key", "field", "given", "value"),
    [
        ("epsilon", "epsilon", "1e-26", 1e-26),
        ("epsilon", "epsilon", 0, 0.0),
        ("epsilon", "epsilon", ".5E+1", 5.0),
        ("lambda", "lambda", "-1.5", -1.5),
        ("lambda", "lambda", 3.4e38, 3.4e38),
        ("power", "power", 2, 2.0),
        ("ties_density", "ties_density", 1, 1.0),
        ("normalise", "normalise", "model", "model"),
        ("density_scope", "density_scope", "tensor", "tensor"),
        ("mask_weights", "mask_weights", False, False),
        ("missing_curvature", "missing_curvature", "base", "base"),
    ],
)
def test_global_value(key, field, given, value):
    parsed = parse_recipe(ota({key: given})).parameters[field]
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [
        ("precond_threshold", "2e-19", 2e-19),
        ("density", 0, 0.0),
        ("density", 1.0, 1.0),
        ("saliency_mass", "0.9", 0.9),
        ("scaling_factor", 3, 3.0),
        ("rank", "16", 16),
        ("rank1_approx", True, True),
        ("weight", 1, 1.0),
        ("preconditioner_path", Path("a") / "v.pt", "a/v.pt"),
    ],
)
def test_model_value(key, given, value):
    parsed = parse_recipe(ota(own={key: given})).models[0].parameters[key]
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("epsilon", -1e-9, "a number >= 0"),
        ("epsilon", "1e-26 ", "a number >= 0"),
        ("epsilon", "tiny", "a number >= 0"),
        ("epsilon", True, "a number >= 0"),
        ("epsilon", None, "a number >= 0"),
        ("epsilon", math.nan, "a number >= 0"),
        ("epsilon", "nan", "a number >= 0"),
        ("epsilon", math.inf, "a number >= 0"),
        ("lambda", -math.inf, "a finite float32 number"),
        ("lambda", math.nan, "a finite float32 number"),
        ("lambda", 3.5e38, "a finite float32 number"),
        ("lambda", "1e999", "a finite float32 number"),
        ("lambda", 10**39, "a finite float32 number"),
        ("power", 0, "a number > 0"),
        ("power", 1j, "a number > 0"),
        ("density", 1.0000001, "a number in [0, 1]"),
        ("density", -0.1, "a number in [0, 1]"),
        ("density", True, "a number in [0, 1]"),
        ("saliency_mass", 90, "a number in [0, 1]"),
        ("ties_density", "2", "a number in [0, 1]"),
        ("precond_threshold", -1, "a number >= 0"),
        ("scaling_factor", 0, "a number > 0"),
        ("rank", 0, "an integer >= 1"),
        ("rank", 16.0, "an integer >= 1"),
        ("rank", "1.5", "an integer >= 1"),
        ("rank", True, "an integer >= 1"),
        ("rank1_approx", 1, "true or false"),
        ("rescale", "true", "true or false"),
        ("normalise", "layer", "none, global or model"),
        ("normalise", False, "none, global or model"),
        ("on_nonfinite", "uniform", "error or base"),
        ("missing_curvature", "Error", "error, uniform or base"),
        ("masked_task_vector_merge_method", "dare", "precond, linear or ties"),
        ("preconditioner_path", " ", "a path or name"),
        ("preconditioner_path", 7, "a path or name"),
    ],
)
def test_wrong_value_names_key_value_and_what_is_allowed(key, value, allowed):
    fails(ota({key: value}), f"`{key}` in `parameters` is", repr(value), f"it must be {allowed}")


def test_number_too_large_for_float64():
    fails(ota({"lambda": 10**400}), "`lambda` in `parameters` is 1000", "...", "float32")


def test_value_of_many_lines_is_shown_on_one():
    fails(ota({"lambda": np.eye(2)}), "`lambda` in `parameters` is array([[1., 0.], [0., 1.]]): it must")


def test_number_too_long_to_print():
    fails(ota({"lambda": 10**5000}), "`lambda` in `parameters` is a very large number", "float32")


@pytest.mark.parametrize(
    "value", [[0.1, 0.9], [{"filter": "mlp", "value": 0.5}, {"value": 0.1}]], ids=["gradient", "filters"]
)
@pytest.mark.parametrize("key", ["density", "saliency_mass"])
def test_a_share_of_the_whole_model_cannot_differ_between_tensors(key, value):
    fails(ota(own={key: value}), f"`{key}` of 'org/a' differs between tensors", "`density_scope: tensor`")
    recipe = parse_recipe(ota({"density_scope": "tensor"}, own={key: value}))
    assert not is_constant(recipe.models[0].parameters[key])


@pytest.mark.parametrize(
    "value", [[{"value": 0.5}], {"value": 0.5}, [0.5, 0.5], {"value": [0.5], "filter": "*"}], ids=str
)
def test_a_value_for_all_tensors_is_plain(value):
    assert parse_recipe(ota(own={"density": value})).models[0].parameters["density"] == 0.5


@pytest.mark.parametrize("key", ["normalise", "density_scope", "missing_curvature", "rank", "rank1_approx"])
def test_what_holds_for_all_tensors_takes_no_gradient(key):
    parameter = methods.get("ota").by_key[key]
    values = {"normalise": ["none", "global"], "density_scope": ["model", "tensor"], "rank": ["2", 4]}
    fails(
        ota({key: values.get(key, ["uniform", "base"] if key == "missing_curvature" else [True, False])}),
        f"`{key}` in `parameters`",
        "no gradient or filter",
        parameter.kind.allowed,
    )


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("bfloat16", "bfloat16"),
        ("bf16", "bfloat16"),
        ("fp16", "float16"),
        ("fp32", "float32"),
        ("fp64", "float64"),
        ("torch.float16", "float16"),
        ("auto", None),
        (None, None),
    ],
)
def test_dtype(given, name):
    assert parse_recipe(ota(dtype=given)).dtype == name
    assert parse_recipe(ota(out_dtype=given)).out_dtype == name


def test_out_dtype_wins_over_dtype():
    assert parse_recipe(ota(dtype="float32", out_dtype="bfloat16")).output_dtype == "bfloat16"
    assert parse_recipe(ota(dtype="float32", out_dtype="auto")).output_dtype == "float32"


@pytest.mark.parametrize("value", ["float8_e4m3fn", "int8", "torch.torch.float16", "", 16])
def test_wrong_dtype(value):
    fails(ota(dtype=value), "`dtype`", repr(value), "bfloat16, float16, float32, float64")


# Keys


@pytest.mark.parametrize(
    ("data", "words"),
    [
        case(ota(merge_methods="ota"), "'merge_methods'", "'ota'", "the recipe", "`merge_method`"),
        case(ota({"epsilom": 1e-9}), "'epsilom'", "1e-09", "`parameters`", "did you mean `epsilon`?"),
        case(
            ota(own={"densty": 0.2}), "'densty'", "0.2", "`models[0].parameters`", "did you mean `density`?"
        ),
        case(ota(own={"lambda_": 1}), "'lambda_'", "known: density, precond_threshold"),
        case(ota({"lambda_": 1}), "'lambda_'", "did you mean `lambda`?"),
        case(ota({7: 1}), "unknown key 7", "known:"),
        case(
            ota(models=[{"model": "a", "weights": 1}]),
            "'weights'",
            "`models[0]`",
            "model, origin, parameters",
        ),
        case(ota(own={"epsilon": 1}), "`epsilon` in `models[0].parameters`", "to the global `parameters`"),
    ],
)
def test_unknown_or_misplaced_key(data, words):
    fails(data, *words)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (
            linear(1, 1, parameters={"ties_density": 1}),
            "`ties_density` in `parameters` is not used by `linear`",
        ),
        (ota({"normalize": True}), "`normalize` in `parameters` is not used by `ota`"),
        (
            ota({"int8_mask": "yes"}, own={"int8_mask": 1}),
            "`int8_mask` in `parameters`, `models[0].parameters` is not used by `ota`",
        ),
        (
            ota(own={"lambda": 0.5}),
            "`lambda` in `models[0].parameters` holds for the whole merge and is not read there: move it to "
            "the global "
            "`parameters`",
        ),
        (
            linear(1, 1, parameters={"embed_slerp": True}),
            "`embed_slerp` in `parameters` is not used by `linear`",
        ),
        (ota(name="merged"), "`name` in `the recipe` is not used: the output folder names the merge"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_only_mergekit_knows_is_one_warning(data, line, caplog):
    recipe = parse_recipe(data)
    assert caplog.messages == [line]
    assert parse_recipe(recipe.as_dict()) == recipe
    assert caplog.messages == [line]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        case(None, "the recipe is None", "mapping"),
        case(["ota"], "the recipe is ['ota']", "mapping"),
        case({}, "`merge_method` is missing", "linear", "ota"),
        case(ota(merge_method="otaa"), "'otaa'", "did you mean `ota`?"),
        case(ota(merge_method="zzz"), "'zzz'", "known: arcee_fusion", "ota"),
        case(ota(merge_method=3), "`merge_method` is 3"),
        case(ota(base_model=["a"]), "`base_model` is ['a']", "path or name"),
        case(ota(tokenizer_source={"a": 1}), "unknown key 'a'", "`tokenizer_source`"),
        case(ota(parameters=[1]), "`parameters` is [1]", "mapping"),
        case(ota(models=None), "`models` is missing or empty"),
        case(ota(models=[]), "`models` is missing or empty"),
        case(ota(models={"a": 1}), "`models` is {'a': 1}", "list"),
        case(ota(models=["org/a"]), "`models[0]` is 'org/a'", "mapping"),
        case(ota(models=[{"parameters": {}}]), "`model` is missing in `models[0]`"),
        case(ota(models=[{"model": None}]), "`model` in `models[0]` is None"),
        case(ota(models=[{"model": "a", "parameters": 3}]), "`models[0].parameters` is 3", "mapping"),
    ],
)
def test_wrong_structure(data, words):
    fails(data, *words)


# Defaults and exclusion


def test_global_value_is_the_default_of_every_model():
    recipe = parse_recipe(ota({"density": 0.3, "scaling_factor": 2}, own={"scaling_factor": 5}))
    assert [entry.parameters["density"] for entry in recipe.models] == [0.3, 0.3]
    assert [entry.parameters["scaling_factor"] for entry in recipe.models] == [5.0, 2.0]


@pytest.mark.parametrize(
    ("default", "own", "kept"),
    [
        ({"precond_threshold": 1e-20}, {"density": 0.2}, {"density": 0.2}),
        ({"precond_threshold": 1e-20}, {"density": 0.0}, {"density": 0.0}),
        ({"density": 0.5}, {"saliency_mass": 0.9}, {"saliency_mass": 0.9}),
        ({"density": 0.5}, {"density": 0.1}, {"density": 0.1}),
        ({"density": 0.5}, {"rank": 4}, {"density": 0.5, "rank": 4}),
        ({"rank1_approx": True}, {"rank": 4}, {"rank": 4}),
        ({"rank": 4}, {"rank1_approx": True}, {"rank1_approx": True}),
        ({"rank": 4}, {"rank1_approx": False}, {"rank": 4}),
        ({"rank1_approx": True}, {"rank1_approx": False}, {}),
    ],
)
def test_a_models_choice_replaces_the_global_one(default, own, kept):
    first, second = parse_recipe(ota(default, own=own)).models
    assert first.parameters == of_model(preconditioner_path="org/a/v.safetensors", **kept)
    assert second.parameters == of_model(preconditioner_path="org/b/v.safetensors", **default)


@pytest.mark.parametrize(
    ("first", "second"),
    [("precond_threshold", "density"), ("precond_threshold", "saliency_mass"), ("density", "saliency_mass")],
)
@pytest.mark.parametrize("where", ["parameters", "models[0].parameters"])
def test_two_selections_exclude_each_other(first, second, where):
    values = {first: 0.5, second: 0.5}
    data = ota(values) if where == "parameters" else ota(own=values)
    fails(data, f"`{first}` and `{second}` in `{where}` exclude each other")


def test_two_forms_of_curvature_exclude_each_other():
    fails(ota(own={"rank": 2, "rank1_approx": True}), "`rank` and `rank1_approx`", "exclude each other")
    assert parse_recipe(ota(own={"rank": 2, "rank1_approx": False})).models[0].parameters["rank"] == 2


# Checks across fields


@pytest.mark.parametrize("place", ["parameters", "own"])
def test_ota_takes_no_weight(place):
    fails(ota(**{place: {"weight": 0.5}}), "`weight`", "0.5", "`ota`", "use `scaling_factor`")


@pytest.mark.parametrize("listed", ["org/base", "./org/base/"])
def test_listed_base_is_dropped_where_the_method_uses_it(listed):
    data = ota()
    data["models"].insert(0, {"model": listed})
    assert [entry.model for entry in parse_recipe(data).models] == ["org/a", "org/b"]


def test_base_of_a_method_that_uses_none_is_one_more_model(caplog):
    """As in mergekit, which wants a weight for it from the outer levels."""
    recipe = parse_recipe(linear(1, 3, base_model="org/0"))
    assert [entry.model for entry in recipe.models] == ["org/0", "org/1"]
    recipe = parse_recipe(linear(1, 3, base_model="org/base", parameters={"weight": 0.5}))
    assert [(e.model, e.parameters["weight"]) for e in recipe.models] == [
        ("org/0", 1.0),
        ("org/1", 3.0),
        ("org/base", 0.5),
    ]
    assert not caplog.messages
    recipe = parse_recipe(linear(1, 3, base_model="org/base"))
    assert [entry.model for entry in recipe.models] == ["org/0", "org/1"]
    assert "gives config and tokenizer" in caplog.messages[0]


def test_only_the_base_listed():
    fails(ota(models=[{"model": "org/base"}]), "lists only the base model 'org/base'")


def test_one_model_is_a_graft_where_a_base_is_used():
    only = ota()["models"][:1]
    assert len(parse_recipe(ota(models=only)).models) == 1
    fails(ota(models=only, base_model=None), "at least two models", "`base_model`")
    assert len(parse_recipe(linear(1)).models) == 1  # unchanged


def test_same_model_twice_is_allowed():
    models = [ota()["models"][0]] * 2
    assert [entry.model for entry in parse_recipe(ota(models=models)).models] == ["org/a", "org/a"]


def test_number_of_models():
    assert len(parse_recipe(linear(*[1] * MAX_MODELS)).models) == MAX_MODELS
    fails(linear(*[1] * (MAX_MODELS + 1)), "65 models", "at most 64")


def test_method_that_requires_a_base():
    data = {"merge_method": "needy", "models": [{"model": "a"}, {"model": "b"}]}
    with methods.registered(Method("needy", "w_0", "required", (), None)):
        fails(data, "`needy` needs a `base_model`")
        assert parse_recipe({**data, "base_model": "c"}).base_model == "c"


@pytest.mark.parametrize(
    ("key", "value"), [("on_nonfinite", "base"), ("missing_curvature", "base"), ("rescale", True)]
)
def test_value_that_needs_a_base(key, value):
    assert parse_recipe(ota({key: value})).parameters[key] == value
    fails(ota({key: value}, base_model=None), f"`{key}: {str(value).lower()}`", "needs a `base_model`")


@pytest.mark.parametrize(
    "values",
    [{"masked_task_vector_merge_method": "ties"}, {"mask_weights": False}, {"missing_curvature": "uniform"}],
    ids=str,
)
def test_value_that_needs_no_base(values):
    recipe = parse_recipe(ota(values, base_model=None))
    assert recipe.parameters == shared(**values)


def test_missing_curvature_lists_every_model():
    data = ota()
    for name in "cd":
        data["models"].append({"model": f"org/{name}"})
    fails(data, "no `preconditioner_path` for 'org/c', 'org/d':", "missing_curvature")
    for choice in ("uniform", "base"):
        data["parameters"] = {"missing_curvature": choice}
        assert parse_recipe(data).models[3].parameters.get("preconditioner_path") is None


@pytest.mark.parametrize("weights", [(0, 0), (1, -1), (0.1, 0.2, -0.3)], ids=str)
def test_linear_weights_that_sum_to_zero(weights):
    fails(linear(*weights), "sum to 0", "`normalize: false`")
    assert parse_recipe(linear(*weights, parameters={"normalize": False})).parameters["normalize"] is False


def test_negative_weight_is_allowed():
    assert parse_recipe(linear(2, -1)).models[1].parameters["weight"] == -1.0


# Files


def test_paths_start_at_the_current_folder_then_at_the_recipes(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here / "both", there / "both", there / "beside"):
        folder.mkdir(parents=True)
    (there / "beside" / "v.pt").touch()
    monkeypatch.chdir(here)
    recipe = {
        "merge_method": "ota",
        "base_model": "beside",
        "models": [
            {"model": "both", "parameters": {"preconditioner_path": "beside/v.pt"}},
            {"model": "org/hub-id", "parameters": {"preconditioner_path": "org/hub-id/v.safetensors"}},
        ],
        "tokenizer_source": "beside",
    }
    (there / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    parsed = load_recipe(there / "recipe.yaml")
    assert [entry.model for entry in parsed.models] == ["both", "org/hub-id"]
    assert parsed.base_model == str(there / "beside")
    assert parsed.tokenizer_source == str(there / "beside")
    assert parsed.models[0].parameters["preconditioner_path"] == str(there / "beside" / "v.pt")
    assert parsed.models[1].parameters["preconditioner_path"] == "org/hub-id/v.safetensors"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["the recipe is None"]),
        (b"- a", ["the recipe is ['a']"]),
        (b"models: [", ["not readable as YAML", "line 1, column 10"]),
        (b"a: b: c", ["not readable as YAML", "line 1, column 5"]),
        (b"\xff\xfe\xfa", ["not readable as YAML"]),
        (b"a: \xfa", ["not readable as YAML"]),
        (b"a: \x00", ["not readable as YAML"]),
        (b"a: !!python/object/apply:os.getcwd []", ["not readable as YAML"]),
        (b"a: 2001-99-99", ["not readable as YAML"]),
        (b"a: !!bool 3", ["not readable as YAML"]),
        (b"a: !!int ''", ["not readable as YAML"]),
        (b"a: !!timestamp x", ["not readable as YAML"]),
        (b"a: " + b"9" * 5000, ["not readable as YAML"]),
        (b"[" * 5000, ["not readable as YAML"]),
        (b"parameters: &a {density: *a}\nmerge_method: ota", ["'density'", "known: filter, value"]),
        (b"merge_method: ota\nmodels: &a [*a]", ["`models[0]`", "mapping"]),
        (b"dtype: bf16\ndtype: fp16", ["`dtype` stands there twice", "line 2, column 1"]),
        (b"a" * (2**20 + 1), ["larger than 1048576 bytes"]),
    ],
    ids=lambda value: None if isinstance(value, list) else ascii(value[:30]),
)
def test_wrong_file_is_one_line_that_names_it(tmp_path, content, words):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    for word in words:
        assert word in text


@pytest.mark.parametrize("name", ["missing.yaml", ".", "nul\0.yaml"])
def test_unreadable_file(tmp_path, name):
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load_recipe(tmp_path / name)


def test_merge_keys_may_override(tmp_path):
    recipe = load_text(
        tmp_path,
        """
        merge_method: ota
        models:
          - model: a
            parameters: &shared {preconditioner_path: a.pt, scaling_factor: 2}
          - model: b
            parameters: {<<: *shared, preconditioner_path: b.pt}
        """,
    )
    assert recipe.models[1].parameters == of_model(preconditioner_path="b.pt", scaling_factor=2.0)


# Properties

# A busy machine is no failure of a recipe.
_PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

_NUMBERS = st.floats(0, 2.0**100, width=32)
_NAMES = st.text(st.characters(exclude_characters="+@", codec="utf-8"), min_size=1).filter(str.strip)
_SELECTIONS = st.one_of(
    st.just({}),
    st.builds(lambda value: {"precond_threshold": value}, _NUMBERS),
    st.builds(lambda value: {"density": value}, st.floats(0, 1)),
    st.builds(lambda value: {"saliency_mass": value}, st.floats(0, 1)),
)
_FORMS = st.sampled_from([{}, {"rank": 3}, {"rank1_approx": True}, {"rank1_approx": False}])
_OTA_MODELS = st.builds(
    lambda model, path, selection, form: {
        "model": model,
        "parameters": {"preconditioner_path": path, **selection, **form},
    },
    _NAMES,
    _NAMES,
    _SELECTIONS,
    _FORMS,
)
_OTA_RECIPES = st.fixed_dictionaries(
    {
        "merge_method": st.just("ota"),
        "models": st.lists(_OTA_MODELS, min_size=2, max_size=4),
        "parameters": st.builds(
            lambda shared, selection, form: {**shared, **selection, **form},
            st.fixed_dictionaries(
                {},
                optional={
                    "epsilon": _NUMBERS,
                    "lambda": st.floats(-(2.0**100), 2.0**100),
                    "normalise": st.sampled_from(["none", "global", "model"]),
                    "ties_density": st.floats(0, 1),
                    "mask_weights": st.booleans(),
                    "missing_curvature": st.sampled_from(["error", "uniform"]),
                },
            ),
            _SELECTIONS,
            _FORMS,
        ),
    },
    optional={
        "dtype": st.sampled_from(["bf16", "float32", "auto"]),
        "out_dtype": st.sampled_from(["fp16", "float64"]),
        "tokenizer_source": st.sampled_from(["base", "union", "org/other"]),
    },
)
_LINEAR_RECIPES = st.builds(
    lambda weights, normalize: linear(*weights, parameters={"normalize": normalize}),
    st.lists(st.floats(0.5, 2.0**50), min_size=2, max_size=4),
    st.booleans(),
)


@_PATIENT
@given(_OTA_RECIPES | _LINEAR_RECIPES)
def test_as_dict_round_trips_through_yaml(data):
    recipe = parse_recipe(data)
    text = yaml.safe_dump(recipe.as_dict(), sort_keys=False)
    again = parse_recipe(yaml.safe_load(text))
    assert again == recipe
    assert again.as_dict() == recipe.as_dict()


def test_as_dict_writes_defaults_and_resolved_values_out():
    recipe = parse_recipe(ota({"density": 0.5, "lambda": 2}, dtype="bf16"))
    canonical = recipe.as_dict()
    shared = methods.get("ota").shared
    assert canonical["parameters"].keys() == {p.key for p in shared if p.default is not None}
    assert canonical["parameters"]["lambda"] == 2.0
    assert canonical["dtype"] == "bfloat16"
    assert canonical["models"][1] == {
        "model": "org/b",
        "parameters": {
            "preconditioner_path": "org/b/v.safetensors",
            "density": 0.5,
            "scaling_factor": 1.0,
            "rank1_approx": False,
            "weight": 1.0,
        },
    }


_TOP_KEYS = ["merge_method", "base_model", "models", "model", "parameters", "dtype", "tokenizer_source"]
_KEYS = st.sampled_from([*_TOP_KEYS, *sorted(methods.get("ota").keys | methods.get("linear").keys)])
_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=4)
    | st.dates()
    | st.sampled_from(["ota", "linear", "1e-26", "base", "auto"])
)
_JUNK = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS | _SCALARS, inner, max_size=4),
    max_leaves=12,
)


def parses_or_raises_one_line(data):
    text = ""
    try:
        parse_recipe(data)
    except RecipeError as error:
        text = str(error)
    assert "\n" not in text


@_PATIENT
@given(_JUNK)
def test_junk_raises_nothing_but_recipe_error(data):
    parses_or_raises_one_line(data)


@_PATIENT
@given(_KEYS, _JUNK, st.sampled_from(["top", "global", "model entry", "model"]))
def test_junk_in_a_good_recipe_raises_nothing_but_recipe_error(key, value, place):
    data = ota()
    first = data["models"][0]
    target = {"top": data, "global": data["parameters"], "model entry": first, "model": first["parameters"]}
    target[place][key] = value
    parses_or_raises_one_line(data)


@_PATIENT
@given(st.text(max_size=60))
def test_junk_yaml_raises_nothing_but_recipe_error(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("junk") / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(RecipeError):
        load_recipe(path)


# The registry


def test_registry_rows():
    assert {"linear", "ota", "ties", "slerp"} <= set(methods.names())
    assert (methods.get("ota").base, methods.get("ota").curvature) == ("optional", True)
    assert (methods.get("linear").base, methods.get("linear").curvature) == ("ignored", False)


def test_duplicate_method_raises():
    with pytest.raises(ValueError, match="`ota` is registered twice"):
        methods.register(methods.get("ota"))


def test_register_adds_a_row():
    before = methods.names()
    with methods.registered(Method("one", "w_1", "ignored", (), None)) as row:
        assert set(methods.names()) == {*before, "one"}
        assert methods.get("one") is row
    assert methods.names() == before


@pytest.mark.parametrize("name", methods.names())
def test_every_accepted_key_is_declared_and_described(name):
    row = methods.get(name)
    assert {p.key for p in (*row.shared, *row.own)} == row.keys
    assert all(p.help and p.kind.allowed for p in row.by_key.values())
    assert "\n" not in row.formula


def test_description_tells_default_and_range():
    described = methods.get("ota").by_key
    assert described["lambda"].default == 1.0
    assert (described["density"].default, described["density"].kind.allowed) == (None, "a number in [0, 1]")
    assert described["normalise"].kind.allowed == "none, global or model"


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"normalize": True}, "'normalize' .* in the recipe; move it under `parameters`$"),
        ({"density": 0.5}, "'density' .*; move it under `parameters`$"),
        ({"parameters": {"dtype": "float16"}}, "'dtype' .* in `parameters`; move it to the top level"),
        ({"parameters": {"tokenizer_source": "base"}}, "move it to the top level of the recipe"),
        ({"parameters": {"chat_template": "auto"}}, "move it to the top level of the recipe"),
        ({"int8_mask": True}, "has no effect on values: remove it"),
        (
            {"models": [{"model": "a", "weight": 0.3}, {"model": "b"}]},
            r"'weight' \(value 0\.3\) in `models\[0\]`; move it under `parameters` of that model$",
        ),
        ({"models": [{"model": "a", "dtype": "float16"}, {"model": "b"}]}, "move it to the top level"),
        ({"parameters": {"normalise_": 1}}, "did you mean|known"),
    ],
    ids=str,
)
def test_a_key_at_another_level_is_told_where_it_belongs(change, hint):
    recipe = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]} | change
    with pytest.raises(RecipeError, match=hint):
        parse_recipe(recipe)
