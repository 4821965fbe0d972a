"""`opcm` goes on from its file and two numbers of its report."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import load_merged, make_set

from ota_kernels import InputError, merge
from ota_kernels.run.sums import add, remove

SHAPES = {
    "embed_tokens.weight": (50, 16),
    "layers.0.mlp.weight": (60, 40),
    "layers.1.mlp.weight": (40, 60),
    "layers.0.norm.weight": (17,),
}


def recipe_of(models, experts, **parameters):
    return {
        "merge_method": "opcm",
        "base_model": str(models.base_folder),
        "models": [{"model": str(models.expert_folders[t])} for t in experts],
        "parameters": parameters,
    }


def report_of(folder):
    return json.loads((folder / "merge_report.json").read_text())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("parameters", [{}, {"alpha": 0.8, "lambda": 0.7}], ids=str)
def test_as_if_it_had_been_there_from_the_start(tmp_path, dtype, parameters):
    """Within four roundings of half a unit each (of two files that it goes on from, and of both results),
    and the six digits of factors."""
    models = make_set(tmp_path / "m", SHAPES, experts=4, dtype=dtype)
    merge(recipe_of(models, [0, 1], **parameters), tmp_path / "two")
    add(tmp_path / "two", models.expert_folders[2], tmp_path / "three")
    add(tmp_path / "three", models.expert_folders[3], tmp_path / "four")
    merge(recipe_of(models, [0, 1, 2, 3], **parameters), tmp_path / "all")
    unit = torch.finfo(dtype).eps
    one, other = load_merged(tmp_path / "four"), load_merged(tmp_path / "all")
    for name, tensor in other.items():
        base, wanted = models.base[name].double(), tensor.double()
        largest = torch.maximum(wanted.abs(), base.abs())
        bound = 2 * unit * largest.max() + 1e-5 * (wanted - base).abs().max()
        error = (one[name].double() - wanted).abs()
        assert error.max() <= bound, name
        assert error.mean() <= 2 * unit * largest.mean() + 1e-5 * (wanted - base).abs().mean(), name
    one, other = report_of(tmp_path / "four"), report_of(tmp_path / "all")
    assert len(one["experts"]) == 4
    for key in ("method", "experts", "tensors"):
        assert one[key] == other[key], key
    assert one["lambda"]["norms"] == pytest.approx(other["lambda"]["norms"], rel=1e-5)
    assert one["lambda"]["used"] == pytest.approx(other["lambda"]["used"], rel=1e-5 + unit)
    for name in ("merge_recipe.yaml", "config.json"):
        if (tmp_path / "all" / name).exists():
            assert (tmp_path / "four" / name).read_text() == (tmp_path / "all" / name).read_text()


def test_what_it_reads(tmp_path):
    """The merge, the base and one expert: the others may be gone."""
    models = make_set(tmp_path / "m", SHAPES, experts=3)
    merge(recipe_of(models, [0, 1]), tmp_path / "two")
    for t in (0, 1):
        models.expert_folders[t].rename(tmp_path / f"gone{t}")
    add(tmp_path / "two", models.expert_folders[2], tmp_path / "three")
    assert [e["model"] for e in report_of(tmp_path / "three")["experts"]][2:] == [
        str(models.expert_folders[2])
    ]


class TestRefused:
    @pytest.fixture
    def models(self, tmp_path):
        return make_set(tmp_path / "m", SHAPES, experts=3)

    @pytest.mark.parametrize(
        "parameters",
        [{"density": 0.3}, {"elsewhere": "ota"}, {"calibrate": "svc"}, {"layers": [0.5, 1.0]}],
        ids=str,
    )
    def test_what_does_not_go_on(self, models, tmp_path, parameters):
        recipe = recipe_of(models, [0, 1], **parameters)
        if "density" in parameters or "elsewhere" in parameters:  # by curvature
            recipe = models.recipe("opcm", **parameters)
            recipe["models"] = recipe["models"][:2]
        merge(recipe, tmp_path / "two")
        with pytest.raises(InputError, match="from the start"):
            add(tmp_path / "two", models.expert_folders[2], tmp_path / "three")
        assert not (tmp_path / "three").exists()

    def test_a_report_that_says_less(self, models, tmp_path):
        merge(recipe_of(models, [0, 1]), tmp_path / "two")
        report = report_of(tmp_path / "two")
        del report["lambda"]["norms"]
        (tmp_path / "two" / "merge_report.json").write_text(json.dumps(report))
        with pytest.raises(InputError, match="from the start"):
            add(tmp_path / "two", models.expert_folders[2], tmp_path / "three")

    def test_removed(self, models, tmp_path):
        merge(recipe_of(models, [0, 1]), tmp_path / "two")
        with pytest.raises(InputError, match="from the start"):
            remove(tmp_path / "two", models.expert_folders[0], tmp_path / "one")

    def test_the_command_line(self, models, tmp_path, ota_merge):
        merge(recipe_of(models, [0, 1]), tmp_path / "two")
        code, _, errors = ota_merge("add", tmp_path / "two", models.expert_folders[2], tmp_path / "three")
        assert code == 0, errors
        assert (tmp_path / "three" / "merge_report.json").is_file()
