"""`ota-merge methods`: README has its table, and the recipe that it shows of each method runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import make_set
from click.testing import CliRunner
from jobs import merge
from safetensors.torch import save_file

from ota_kernels.cli.methods import methods as command
from ota_kernels.recipe import methods

README = Path(__file__).parents[2] / "README.md"


def said(*arguments: str) -> str:
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_readme_has_the_table():
    assert said("--markdown") in README.read_text()


def test_the_list_has_every_method():
    assert [line.split()[0] for line in said().splitlines()] == list(methods.names())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folders that recipes name: models/base, models/expert1, .. with their second moments."""
    root = tmp_path_factory.mktemp("shown")
    found = make_set(root / "models", {"w": (6, 8), "norm": (5,)}, dtype=torch.bfloat16)
    for t, folder in enumerate(found.expert_folders):
        folder.rename(root / "models" / f"named{t}")
    for t, curvature in enumerate(found.curvatures):
        folder = (root / "models" / f"named{t}").rename(root / "models" / f"expert{t + 1}")
        save_file(curvature, folder / "exp_avg_sq.safetensors")
    return root


@pytest.mark.parametrize("name", methods.names())
def test_the_recipe_that_is_shown_runs(name, models, tmp_path, monkeypatch):
    text = said(name)
    recipe = yaml.safe_load(text[text.rindex("\nmerge_method:") :])
    assert recipe["merge_method"] == name
    monkeypatch.chdir(models)
    report = merge(recipe, tmp_path / "out")
    assert report["method"] == name


@pytest.mark.parametrize("name", methods.names())
def test_what_is_said_of_a_method(name):
    text, row = said(name), methods.get(name)
    assert text.startswith(f"{name} ({row.source}): {row.formula}\n")
    for key in row.keys:
        assert re.search(rf"^  {key}: .*\(.+; .+; default: .+\)$", text, re.MULTILINE), key


def test_an_unknown_method():
    done = CliRunner().invoke(command, ["slrep"])
    assert done.exit_code != 0
    assert "did you mean `slerp`?" in str(done.exception)
