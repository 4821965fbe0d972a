"""What names a model in a recipe."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ota_kernels.errors import RecipeError
from ota_kernels.recipe.reference import Reference, parse_reference
from ota_kernels.recipe.schema import parse_recipe


def parse(value, folder=None):
    return parse_reference(value, "`model`", folder)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("org/a", Reference("org/a")),
        ("org/a@main", Reference("org/a", "main")),
        ("org/a+org/b", Reference("org/a", None, "org/b")),
        ("org/a@v1+org/b@v2", Reference("org/a", "v1", "org/b", "v2")),
        ({"model": "org/a"}, Reference("org/a")),
        ({"model": "org/a@v1", "lora": "org/b@v2"}, Reference("org/a", "v1", "org/b", "v2")),
        ({"model": {"path": "o+a@b", "revision": "r"}}, Reference("o+a@b", "r")),
        (
            {
                "model": {"path": "org/a"},
                "lora": {"path": "b+c"},
                "override_architecture": "LlamaForCausalLM",
            },
            Reference("org/a", adapter="b+c", architecture="LlamaForCausalLM"),
        ),
    ],
    ids=str,
)
def test_forms(given, expected):
    found = parse(given)
    assert found == expected
    assert parse(found.as_yaml()) == found


def test_label():
    assert parse("org/a@v1+org/b@v2").label == "org/a@v1+org/b@v2"
    assert parse("org/a@v1+org/b@v2").model == Reference("org/a", "v1")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("a+b+c", ["'a+b+c'", "one adapter"]),
        ("a@b@c", ["path[@revision]"]),
        ("a@", ["path[@revision]"]),
        ("a+", ["path[@revision]"]),
        ("+a", ["path[@revision]"]),
        (3, ["`model` is 3", "path or name"]),
        ({"modle": "a"}, ["unknown key 'modle'", "did you mean `model`?"]),
        ({"lora": "a"}, ["`model` is missing"]),
        ({"model": {"revision": "a"}}, ["`path` is missing"]),
        ({"model": "a", "override_architecture": 3}, ["`override_architecture`", "3"]),
        ({"model": {"path": "a", "revision": 1}}, ["`revision`", "1"]),
    ],
    ids=str,
)
def test_wrong(value, words):
    with pytest.raises(RecipeError) as caught:
        parse(value)
    for word in words:
        assert word in str(caught.value)


def test_a_path_that_exists_is_local_whatever_signs_it_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a+b@c").mkdir()
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "x@y").mkdir()
    assert parse("a+b@c") == Reference("a+b@c")
    assert parse("x@y", tmp_path / "beside").path == str(tmp_path / "beside" / "x@y")
    assert parse("org/m+a+b@c") == Reference("org/m", adapter="a+b@c")
    found = parse("a+b@c")
    assert found.as_yaml() == {"model": {"path": "a+b@c"}}
    assert parse(found.as_yaml()) == found


_TEXT = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
_PART = st.fixed_dictionaries({"path": _TEXT}, optional={"revision": _TEXT})


@given(st.fixed_dictionaries({"model": _PART}, optional={"lora": _PART, "override_architecture": _TEXT}))
def test_the_shortest_form_means_the_same(data):
    found = parse(data)
    assert parse(found.as_yaml()) == found


def test_identity_is_the_whole_reference():
    """One model at two revisions, and with an adapter, are three models."""
    sources = [{"model": m, "layer_range": [0, 1]} for m in ("org/a", "org/a@v1", "org/a+org/b")]
    recipe = parse_recipe({"merge_method": "linear", "slices": [{"sources": sources}]})
    assert [entry.number for entry in recipe.models] == [0, 1, 2]
    assert parse_recipe(recipe.as_dict()) == recipe
