"""Sweeps: each folder is the merge of its own, whatever is shared, wherever it was stopped."""

from __future__ import annotations

import json
import threading

import pytest
import yaml
from checkpoints import make_set, model_digests
from jobs import Interrupt

import ota_kernels
from ota_kernels import InputError, OutputError, RecipeError
from ota_kernels.backends import native
from ota_kernels.run import sweep as module
from ota_kernels.run.rules import Rules

SHAPES = {
    "embed.weight": (40, 16),
    "layers.0.weight": (220, 160),
    "layers.0.norm": (33,),
    "layers.1.weight": (90, 50),
    "scale": (),
    "empty": (0, 3),
}
TILE = 4096


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("models"), SHAPES)


def expected(models, out, chosen: dict, method: str = "ota", **parameters) -> dict[str, str]:
    ota_kernels.merge(models.recipe(method, **{**parameters, **chosen}), out)
    return model_digests(out)


CASES = {
    "model": ("ota", {}, {"lambda": [0.6, 1.0, 1.4], "density": [0.1, 0.3]}),
    "tensor": ("ota", {"density_scope": "tensor"}, {"density": [0.1, 0.3], "power": [0.5, 1.0]}),
    "mass": ("ota", {"normalise": "model"}, {"saliency_mass": [0.5, 0.9]}),
    "automatic": ("ota", {"density": 0.3}, {"lambda": ["auto", 0.7], "times": [1.0, 0.5], "power": [0.5, 1]}),
    "match": ("task_arithmetic", {"match_norm": "mean"}, {"lambda": [1.0, -0.5], "weight": [1.0, 0.5]}),
    "ties": ("ties", {"weight": 1.0}, {"lambda": [0.5, 1.0], "density": [0.2, 1.0]}),
    "linear": ("linear", {}, {"weight": [1.0, 0.5], "normalize": [True, False]}),
    "ramplus": ("ramplus", {}, {"r": [0.1, 0.2]}),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_each_folder_is_its_merge(models, tmp_path, case, threads):
    method, parameters, values = CASES[case]
    recipe = models.recipe(method, **parameters)
    options = {"tile_elements": TILE, "threads": threads}
    reports = ota_kernels.sweep(recipe, tmp_path / "out", values, **options)
    combinations = module.combinations(values)
    assert list(reports) == list(combinations)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(combinations)
    for name, chosen in combinations.items():
        folder = tmp_path / "out" / name
        assert model_digests(folder) == expected(models, tmp_path / name, chosen, method, **parameters), name
        report = json.loads((folder / "merge_report.json").read_text())
        alone = json.loads((tmp_path / name / "merge_report.json").read_text())
        assert report["experts"] == alone["experts"]
        assert report["lambda"] == alone["lambda"]
        assert yaml.safe_load((folder / "merge_recipe.yaml").read_text()) == yaml.safe_load(
            (tmp_path / name / "merge_recipe.yaml").read_text()
        )


def test_a_unit_is_merged_by_all_before_its_pages_go(models, tmp_path, monkeypatch):
    """Of three merges on one thread: each tile three times in a row, then let go once."""
    seen: list[tuple] = []
    merge = native.merge

    def merging(tile, terms, out):
        seen.append((tile.name, tile.start, "merge"))
        return merge(tile, terms, out)

    monkeypatch.setattr(native, "merge", merging)
    monkeypatch.setattr(
        "ota_kernels.run.gang.release", lambda tile: seen.append((tile.name, tile.start, "release"))
    )
    recipe = models.recipe("linear")
    ota_kernels.sweep(recipe, tmp_path / "out", {"weight": [1.0, 2.0, 3.0]}, tile_elements=TILE, threads=1)
    large = [(start, step) for name, start, step in seen if name == "layers.0.weight"]
    steps = ["merge"] * 3 + ["release"]
    assert large == [(start, step) for start in range(0, 220 * 160, TILE) for step in steps]


def test_what_is_found_is_found_once(models, tmp_path, monkeypatch):
    taken = []
    sample = ota_kernels.run.decide.sample
    monkeypatch.setattr(
        ota_kernels.run.decide, "sample", lambda *a, **b: (taken.append(1), sample(*a, **b))[1]
    )
    values = {"lambda": [0.5, 1.0], "density": [0.1, 0.2, 0.3]}
    ota_kernels.sweep(models.recipe(), tmp_path / "out", values, tile_elements=TILE)
    assert len(taken) == 1


def test_merges_that_differ_in_length_only_are_measured_once(models, tmp_path, monkeypatch):
    measured = []
    edits = native.edits
    monkeypatch.setattr(native, "edits", lambda *a: (measured.append(1), edits(*a))[1])
    ota_kernels.merge(models.recipe(density=0.1), tmp_path / "one")
    once = len(measured)
    values = {"lambda": ["auto", 0.5, 1.0], "density": [0.1, 0.2]}
    ota_kernels.sweep(models.recipe(), tmp_path / "out", values, tile_elements=TILE)
    assert len(measured) == (1 + 2) * once > 0  # the merge alone, then each density


class TestResume:
    VALUES = {"lambda": [0.5, 1.0], "density": [0.1, 0.3]}  # noqa: RUF012

    @pytest.mark.parametrize("call", [1, 9, 25, 40])
    def test_as_one_job(self, models, tmp_path, monkeypatch, call):
        stop = Interrupt("tile", call)
        monkeypatch.setattr(module, "RULES", Rules(before=stop), raising=False)
        options = {"tile_elements": TILE, "threads": 2}
        with pytest.raises(KeyboardInterrupt):
            ota_kernels.sweep(models.recipe(), tmp_path / "out", self.VALUES, **options)
        monkeypatch.undo()
        assert threading.active_count() < 6
        ota_kernels.sweep(models.recipe(), tmp_path / "out", self.VALUES, resume=True, **options)
        for name, chosen in module.combinations(self.VALUES).items():
            assert model_digests(tmp_path / "out" / name) == expected(models, tmp_path / name, chosen)
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
            module.combinations(self.VALUES)
        )

    def test_what_is_complete_stays(self, models, tmp_path):
        out = tmp_path / "out"
        first = ota_kernels.sweep(models.recipe(), out, {"density": [0.1, 0.3]})
        with pytest.raises(OutputError, match="is not empty"):
            ota_kernels.sweep(models.recipe(), out, {"density": [0.1, 0.3, 0.5]})
        before = {path: path.stat().st_mtime_ns for path in out.glob("*/*")}
        again = ota_kernels.sweep(models.recipe(), out, {"density": [0.1, 0.3, 0.5]}, resume=True)
        assert {name: again[name] for name in first} == first
        assert {path: path.stat().st_mtime_ns for path in before} == before
        digests = expected(models, tmp_path / "alone", {"density": 0.5})
        assert model_digests(out / "density=0.5") == digests


def test_values_replace_those_of_models_and_their_rivals(models, tmp_path):
    recipe = models.recipe(saliency_mass=0.5, density=[0.3, 0.3, 0.3], **{"lambda": 0.2})
    ota_kernels.sweep(recipe, tmp_path / "out", {"density": [0.1]})
    alone = expected(models, tmp_path / "alone", {"density": 0.1, "lambda": 0.2})
    assert model_digests(tmp_path / "out" / "density=0.1") == alone


def test_an_error_of_one_is_the_error_of_all(tmp_path):
    models = make_set(tmp_path / "models", {"w": (30, 20)})
    bad = dict(models.experts[0])
    bad["w"] = bad["w"].clone()
    bad["w"][3, 4] = float("nan")
    from safetensors.torch import save_file

    save_file(bad, models.expert_folders[0] / "model.safetensors")
    with pytest.raises(InputError, match="not finite"):
        ota_kernels.sweep(models.recipe(), tmp_path / "out", {"density": [0.1, 0.3, 0.5]})
    assert threading.active_count() < 6


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "nothing to sweep over"),
        ({"densty": [0.1]}, "`densty` is no parameter of `ota`; did you mean `density`?"),
        ({"density": []}, "the values of `density` are"),
        ({"density": [0.1, 0.1]}, "give the folder 'density=0.1' twice"),
        ({"density": [0.1, 7]}, "`density` in `parameters` is 7"),
        ({"density": [i / 100 for i in range(65)]}, "65 merges at once: at most 64"),
        ({"preconditioner_path": ["x"]}, "`preconditioner_path` is no parameter"),
    ],
    ids=str,
)
def test_refused(models, tmp_path, values, text):
    with pytest.raises(RecipeError, match=text.replace("(", r"\(")):
        ota_kernels.sweep(models.recipe(), tmp_path / "out", values)
    assert not (tmp_path / "out").exists()


def test_the_command(models, tmp_path, ota_merge):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(models.recipe()))
    out = tmp_path / "out"
    command = ("sweep", path, out, "--set", "lambda=0.6,1", "--set", "density=0.1,0.3", "-q")
    assert ota_merge(*command) == (0, "", "")
    assert len(list(out.iterdir())) == 4
    assert ota_merge(*command)[0] == 2
    assert ota_merge(*command, "--resume") == (0, "", "")
    code, _, errors = ota_merge("sweep", path, tmp_path / "other", "--set", "density")
    assert (code, errors) == (2, "error: --set density: give it as KEY=VALUE,VALUE,...\n")
    code, printed, _ = ota_merge("sweep", path, tmp_path / "other", "--set", "density=0.2")
    assert code == 0
    assert "density=0.2" in printed
