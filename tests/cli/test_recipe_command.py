"""`ota-merge recipe`: what it prints is the advised recipe, and runs."""

from __future__ import annotations

import pytest
import yaml
from checkpoints import CURVATURE, make_set
from click.testing import CliRunner

import ota_kernels
from ota_kernels.cli import cli
from ota_kernels.errors import RecipeError


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("models"), {"layers.0.weight": (20, 30), "norm": (20,)})


def run(*arguments: object):
    return CliRunner().invoke(cli, ["recipe", *map(str, arguments)])


def test_it_prints_a_recipe_that_runs_with_the_moments_beside_the_experts(models, tmp_path):
    base, experts = models.base_folder, models.expert_folders
    result = run(base, *experts)
    assert result.exit_code == 0
    recipe = yaml.safe_load(result.stdout)
    assert recipe["parameters"] == {
        "saliency_mass": 0.99,
        "power": 1.0,
        "normalise": "model",
        "lambda": "auto",
    }
    assert [m["parameters"]["preconditioner_path"] for m in recipe["models"]] == [
        f"{e}/{CURVATURE}" for e in experts
    ]
    report = ota_kernels.merge(recipe, tmp_path / "out")
    assert report["lambda"]["used"] == report["lambda"]["auto"]
    assert 0.01 < report["experts"][0]["density"] < 0.99


def test_moments_are_named_or_all_are_missing(models, tmp_path):
    base, experts = models.base_folder, models.expert_folders
    named = [f"{e}/{CURVATURE}" for e in experts]
    given = run(base, *experts, *(part for path in reversed(named) for part in ("--moments", path)))
    paths = [m["parameters"]["preconditioner_path"] for m in yaml.safe_load(given.stdout)["models"]]
    assert paths == list(reversed(named))
    plain = run(base, tmp_path, tmp_path / "other")
    assert yaml.safe_load(plain.stdout)["parameters"]["missing_curvature"] == "uniform"
    assert "masks go by magnitude" in plain.stderr


def test_wrong_calls_are_one_line(models):
    base, experts = models.base_folder, models.expert_folders
    for arguments, says in (
        ((base, experts[0]), "one expert is no merge"),
        ((base, *experts, "--moments", "a"), f"given 1 times for {len(experts)}"),
        ((base, experts[0], base), "but in others"),
    ):
        error = run(*arguments).exception
        assert isinstance(error, RecipeError)
        assert says in str(error)
        assert "\n" not in str(error)
