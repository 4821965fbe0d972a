"""Values of a recipe: gradients, conditions, levels, and what they are for one tensor."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ota_kernels.errors import RecipeError
from ota_kernels.recipe.parameters import (
    FINITE,
    POSITIVE_INTEGER,
    SHARE,
    SWITCH,
    Conditions,
    Gradient,
    Parameter,
    choice,
    dump_value,
    followed_by,
    parse_value,
    value_at,
)
from ota_kernels.recipe.schema import parse_recipe


def at(value, kind=FINITE, name="model.layers.0.mlp.weight", position=0.0):
    """The plain value of what a recipe gives."""
    return value_at(Parameter("x", kind, None, ""), parse_value(value, "`x`", kind), name, position)


@pytest.mark.parametrize(
    ("values", "position", "expected"),
    [
        ([0, 1], 0.25, 0.25),
        ([0, 1], 1, 1.0),
        ([1, "3", 2], 0.25, 2.0),
        ([1, 3, 2], 0.5, 3.0),
        ([1, 3, 2], 0.75, 2.5),
        ([1, 3, 2], 1.0, 2.0),
        ([0.3], 0.7, 0.3),
        ([-1, 1], 0.5, 0.0),
    ],
)
def test_gradient_is_linear_between_its_values(values, position, expected):
    assert at(values, position=position) == expected


@pytest.mark.parametrize(
    ("values", "kind"),
    [([True, False, True], SWITCH), (["a", "b", "a"], choice("a", "b"))],
    ids=["switch", "word"],
)
@pytest.mark.parametrize(("position", "place"), [(0, 0), (0.49, 0), (0.5, 1), (0.99, 1), (1, 2)])
def test_gradient_of_what_is_no_number_goes_in_steps(values, kind, position, place):
    assert at(values, kind, position=position) == values[place]


def test_gradient_of_an_integer_must_be_whole_everywhere():
    assert [at([1, 5], POSITIVE_INTEGER, position=j / 4) for j in range(5)] == [1, 2, 3, 4, 5]
    assert [at([1, 8], POSITIVE_INTEGER, position=j / 7) for j in range(8)] == list(range(1, 9))
    with pytest.raises(
        RecipeError, match=r"`x` is 2\.33333 at model\.layers\.0\.mlp\.weight: it must be a whole number"
    ):
        at([1, 5], POSITIVE_INTEGER, position=1 / 3)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.floats(0, 1))
def test_gradient_stays_between_its_values(values, position):
    assert min(values) <= at(values, SHARE, position=position) <= max(values)


@pytest.mark.parametrize(
    ("value", "name", "expected"),
    [
        ({"value": 1}, "a", 1.0),
        ({"value": 1, "filter": "*"}, "a", 1.0),
        ({"value": 1, "filter": "mlp"}, "layers.1.mlp.w", 1.0),
        ({"value": 1, "filter": "mlp"}, "layers.1.attn.w", None),
        ({"value": 1, "filter": "MLP"}, "layers.1.mlp.w", None),
        ([{"filter": "layers.1", "value": 1}, {"value": 2}], "layers.10.mlp.w", 1.0),
        ([{"filter": "layers.1.", "value": 1}, {"value": 2}], "layers.10.mlp.w", 2.0),
        (
            [{"filter": "mlp", "value": 1}, {"filter": "layers", "value": 2}, {"value": 3}],
            "layers.1.mlp.w",
            1.0,
        ),
        (
            [{"filter": "mlp", "value": 1}, {"filter": "layers", "value": 2}, {"value": 3}],
            "layers.1.q.w",
            2.0,
        ),
        ([{"filter": "mlp", "value": 1}, {"filter": "layers", "value": 2}, {"value": 3}], "norm", 3.0),
        ([{"filter": "mlp", "value": [0, 4]}, {"value": 3}], "layers.1.mlp.w", 1.0),
        ([], "a", None),
    ],
    ids=str,
)
def test_the_first_condition_that_holds_counts(value, name, expected):
    assert at(value, name=name, position=0.25) == expected


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([0.5, 2], ["`x`[1] is 2", "[0, 1]"]),
        ([0.5, {"value": 1}], ["`x`[0] is 0.5", "a list holds either"]),
        ([{"value": 0.5}, 1], ["`x`[1] is 1", "a list holds either"]),
        ({"valu": 1}, ["unknown key 'valu'", "did you mean `value`?"]),
        ({"filter": "mlp"}, ["`value` is missing in `x`"]),
        ([{"filter": "mlp", "value": 1}, {"filter": 3, "value": 1}], ["`filter` in `x`[1] is 3", "text"]),
        ({"value": {"value": 1}}, ["`value` in `x` is {'value': 1}"]),
        ({"value": []}, ["`value` in `x` is []"]),
        ({"value": [1, 7]}, ["`value` in `x`[1] is 7"]),
        ([[0.5]], ["`x`[0] is [0.5]", "a number in [0, 1]"]),
    ],
    ids=str,
)
def test_wrong_value(value, words):
    with pytest.raises(RecipeError) as caught:
        parse_value(value, "`x`", SHARE)
    for word in words:
        assert word in str(caught.value)


def test_numeric_text_is_a_number_everywhere():
    assert parse_value(["1e-5", {"value": 2}][:1], "`x`", FINITE) == 1e-5
    assert at([{"filter": "a", "value": ["1e-5", "3e-5"]}], name="a", position=0.5) == 2e-5


_PLAIN = st.floats(0, 1)
_VALUES = st.one_of(
    _PLAIN,
    st.lists(_PLAIN, min_size=1, max_size=3),
    st.lists(
        st.fixed_dictionaries(
            {"value": _PLAIN | st.lists(_PLAIN, min_size=1, max_size=3)},
            optional={"filter": st.sampled_from(["a", "b", "*"])},
        ),
        max_size=3,
    ),
)


@given(_VALUES, _VALUES, st.sampled_from(["a", "b", "ab", "c"]), st.floats(0, 1))
def test_levels_in_a_row_are_one_value(inner, outer, name, position):
    """Joined, they say what the look-up one after the other says; written out, the same."""
    first, second = (parse_value(value, "`x`", SHARE) for value in (inner, outer))
    both = followed_by(first, second)
    parameter = Parameter("x", SHARE, None, "")
    found = value_at(parameter, first, name, position)
    expected = value_at(parameter, second, name, position) if found is None else found
    assert value_at(parameter, both, name, position) == expected
    assert parse_value(dump_value(both), "`x`", SHARE) == both


# Levels of a recipe


def recipe(**top):
    return {"merge_method": "linear", "models": [{"model": "org/a"}, {"model": "org/b"}], **top}


def weights(data):
    return [e.parameters["weight"] for e in parse_recipe(data).models]


def test_the_inner_level_comes_first():
    data = recipe(parameters={"weight": 0.25})
    data["models"][0]["parameters"] = {"weight": [{"filter": "mlp", "value": 2}]}
    mixed = parse_value([{"filter": "mlp", "value": 2}, {"value": 0.25}], "`x`", FINITE)
    assert weights(data) == [mixed, 0.25]
    data["modules"] = {"default": {"models": data.pop("models"), "parameters": {"weight": 5}}}
    found = [e.parameters["weight"] for e in parse_recipe(data).models]
    assert found == [parse_value([{"filter": "mlp", "value": 2}, {"value": 5}], "`x`", FINITE), 5.0]
    sources = [
        {"model": "org/a", "layer_range": [0, 2], "parameters": {"weight": [0, 1]}},
        {"model": "org/b", "layer_range": [2, 4]},
    ]
    part = {"sources": sources, "parameters": {"weight": {"value": 7, "filter": "q_proj"}}}
    data["modules"]["default"] = {"slices": [part], "parameters": {"weight": 5}}
    found = [e.parameters["weight"] for e in parse_recipe(data).models]
    assert found == [
        Gradient((0.0, 1.0)),
        parse_value([{"filter": "q_proj", "value": 7}, {"value": 5}], "`x`", FINITE),
    ]


def test_the_default_ends_the_look_up():
    data = recipe(parameters={"weight": [{"filter": "mlp", "value": 2}], "normalize": []})
    assert weights(data) == [parse_value([{"filter": "mlp", "value": 2}, {"value": 1.0}], "`x`", FINITE)] * 2
    assert parse_recipe(data).parameters["normalize"] is True


def ota(own, outer, **parameters):
    models = [{"model": name, "parameters": {"preconditioner_path": "v.pt"}} for name in ("a", "b")]
    models[0]["parameters"] |= own
    return {"merge_method": "ota", "base_model": "w", "models": models, "parameters": outer | parameters}


def test_a_choice_for_some_tensors_is_no_choice_for_the_rest():
    some = {"density": [{"filter": "mlp", "value": 0.5}]}
    found = parse_recipe(ota(some, {"density_scope": "tensor"})).models[0].parameters["density"]
    assert found == parse_value(some["density"], "`x`", SHARE)
    assert isinstance(found, Conditions)
    with pytest.raises(
        RecipeError, match="`density` of 'a' is for some tensors only, and `precond_threshold`"
    ):
        parse_recipe(ota(some, {"precond_threshold": 1e-9}, density_scope="tensor"))
    whole = {"density": [*some["density"], {"value": 0.1}]}
    entry = parse_recipe(ota(whole, {"precond_threshold": 1e-9}, density_scope="tensor")).models[0]
    assert "precond_threshold" not in entry.parameters
    joined = parse_recipe(ota(some, {"density": 0.1}, density_scope="tensor")).models[0].parameters["density"]
    assert joined == entry.parameters["density"]


def test_a_threshold_may_differ_between_tensors_in_any_scope():
    found = parse_recipe(ota({"precond_threshold": [1e-9, "2e-9"]}, {})).models[0]
    assert found.parameters["precond_threshold"] == Gradient((1e-9, 2e-9))
