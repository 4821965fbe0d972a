"""`checkpoints`: FIELD's coefficients, and a run's folders by a pattern, `every` and `last`."""

from __future__ import annotations

import pytest
import torch
from checkpoints import load_merged, save_model, write_recipe
from jobs import merge

import ota_kernels
from ota_kernels import RecipeError
from ota_kernels.recipe.rows.linear import checkpoint_weights
from ota_kernels.recipe.schema import load_recipe, parse_recipe

STEPS = (100, 200, 300, 900, 1000)


@pytest.fixture
def run(tmp_path):
    """Checkpoints of a run, each with its number of steps in every element and in a counter."""
    for step in STEPS:
        tensors = {"w": torch.full((3, 4), float(step)), "steps": torch.tensor([step])}
        save_model(tmp_path / "run" / f"checkpoint-{step}", tensors)
    return tmp_path / "run"


def recipe(models, **parameters) -> dict:
    return {"merge_method": "checkpoints", "models": models, "parameters": parameters}


def steps_of(parsed) -> list[int]:
    return [int(entry.model.rsplit("-", 1)[1]) for entry in parsed.models]


def test_the_coefficients_of_wsm():
    """As Megatron-LM's tools/checkpoint/weighted_merge.py has them for four checkpoints."""
    found = checkpoint_weights(4, "minus_sqrt", 0.9, None)
    assert found == pytest.approx([0.5, 0.2071, 0.1589, 0.1340], abs=5e-5)
    assert checkpoint_weights(1, "minus_sqrt", 0.9, None) == [1.0]
    assert checkpoint_weights(4, "linear", 0.9, None) == pytest.approx([0.25] * 4)
    assert checkpoint_weights(3, "ema", 0.8, None) == pytest.approx([0.64, 0.16, 0.2])
    assert checkpoint_weights(4, "lawa", 0.9, 3) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])
    cosine = [1, 0.8535534, 0.5, 0.1464466]
    expected = [1 - cosine[1], cosine[1] - cosine[2], cosine[2] - cosine[3], cosine[3]]
    assert checkpoint_weights(4, "cosine", 0.9, None) == pytest.approx(expected)


def test_a_pattern_is_sorted_by_number(run):
    assert steps_of(parse_recipe(recipe(f"{run}/checkpoint-*"))) == list(STEPS)


def test_a_pattern_starts_at_the_recipes_folder(run, monkeypatch):
    monkeypatch.chdir("/")
    path = write_recipe(run / "recipe.yaml", recipe("checkpoint-*"))
    assert steps_of(load_recipe(path)) == list(STEPS)


def test_the_number_is_that_of_what_the_pattern_leaves_open(tmp_path):
    for step in (20, 3):
        save_model(tmp_path / "run-7b" / f"step{step}" / "hf", {"w": torch.ones(1)})
    found = parse_recipe(recipe(f"{tmp_path}/run-7b/*/hf")).models
    assert [entry.model.split("/")[-2] for entry in found] == ["step3", "step20"]


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({"last": 2}, [900, 1000]),
        ({"last": 9}, list(STEPS)),
        ({"every": 300}, [300, 900]),
        ({"every": 100, "last": 3}, [300, 900, 1000]),
        ({"every": 300, "last": 1}, [900]),
    ],
)
@pytest.mark.parametrize("form", ["pattern", "list"])
def test_every_and_last(run, keys, steps, form):
    listed = [{"model": str(run / f"checkpoint-{step}")} for step in STEPS]
    parsed = parse_recipe(recipe(f"{run}/checkpoint-*" if form == "pattern" else listed, **keys))
    assert steps_of(parsed) == steps
    assert parse_recipe(parsed.as_dict()) == parsed


def test_a_merge_of_the_last_four(run, tmp_path):
    """What is not floating point comes from the newest."""
    merge(recipe(f"{run}/checkpoint-*", last=4), tmp_path / "out")
    found = load_merged(tmp_path / "out")
    c = checkpoint_weights(4, "minus_sqrt", 0.9, None)
    expected = sum(a * step for a, step in zip(c, STEPS[1:], strict=True))
    torch.testing.assert_close(found["w"], torch.full((3, 4), expected))
    assert found["steps"].tolist() == [1000]


@pytest.mark.parametrize(
    ("make", "models", "keys", "words"),
    [
        ((), "nothing-*", {}, "which no folder matches"),
        (("checkpoint-best",), "checkpoint-*", {}, "has no number to sort by"),
        (("x-100",), "*-100", {}, "have one number"),
        ((), "checkpoint-*", {"every": 7}, "no checkpoint of `models` has a multiple of it"),
        ((), [{"model": "a"}, {"model": "b"}], {"every": 1}, "and a has none"),
        ((), ["checkpoint-100"], {"last": 1}, "must be `- model: FOLDER`"),
        ((), "checkpoint-*", {"last": 0}, "must be an integer >= 1"),
        ((), "checkpoint-*", {"decay": "lawa", "k": 9}, "there are 5 checkpoints"),
    ],
)
def test_what_does_not_match(run, make, models, keys, words):
    for name in make:
        (run / name).mkdir()
    path = write_recipe(run / "recipe.yaml", recipe(models, **keys))
    with pytest.raises(RecipeError, match=words):
        load_recipe(path)


def test_the_command_refuses_a_pattern_without_match(run, refused_command):
    path = write_recipe(run / "recipe.yaml", recipe("nothing-*"))
    assert "which no folder matches" in refused_command("run", path, run / "out", "-q")


def test_a_pattern_is_for_checkpoints_only():
    with pytest.raises(RecipeError, match="must be a list"):
        parse_recipe({"merge_method": "linear", "models": "run/*"})


def test_in_memory_nothing_is_chosen():
    with pytest.raises(RecipeError, match="choose among folders"):
        ota_kernels.merge_tensors(None, [torch.ones(2)] * 3, method="checkpoints", last=2)
