"""Several merges in one file."""

from __future__ import annotations

import functools
import json

import pytest
import torch
import yaml
from checkpoints import load_merged, save_model

from ota_kernels import merge
from ota_kernels.errors import OutputError, RecipeError
from ota_kernels.run.stages import load_stages, run_stages


@pytest.fixture
def models(tmp_path):
    for number, name in enumerate("abc", 1):
        save_model(
            tmp_path / name, {"w": torch.full((4,), float(number)), "norm": torch.full((2,), 10.0 * number)}
        )
    return tmp_path


def linear(*models, **top):
    return {"merge_method": "linear", "models": [{"model": m} for m in models], **top}


def write(path, *documents):
    path.write_text("---\n".join(yaml.safe_dump(d, sort_keys=False) for d in documents))
    return path


def test_results_are_models_of_others_whatever_the_order(models, ota_merge):
    path = write(
        models / "multi.yaml",
        linear("first", "second"),
        linear("first", "c", name="second"),
        linear("a", "b", name="first"),
    )
    out = models / "out"
    code, _, errors = ota_merge("run", path, out, "--backend", "reference", "-q")
    assert (code, errors) == (0, "")
    assert torch.all(load_merged(models / "out.stages" / "first")["w"] == 1.5)
    assert torch.all(load_merged(models / "out.stages" / "second")["w"] == (1.5 + 3) / 2)
    assert torch.all(load_merged(out)["w"] == (1.5 + 2.25) / 2)
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert ota_merge("run", path, out, "--backend", "reference", "-q")[0] == 2
    code, _, errors = ota_merge("run", path, out, "--backend", "reference", "-q", "--resume")
    assert (code, errors) == (0, "")
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    (models / "out.stages" / "second" / "model.safetensors").unlink()
    assert json.loads((out / "merge_report.json").read_text())["method"] == "linear"


def test_going_on_between_stages(models):
    """What is complete is not done again; what has changed since is not taken for it."""
    path = write(
        models / "multi.yaml",
        linear(str(models / "a"), str(models / "b"), name="first", dtype="float32"),
        linear("first", str(models / "c"), dtype="float32"),
    )
    done = []

    def stopping(recipe, out):
        done.append(out.name)
        if len(done) == 2:
            raise KeyboardInterrupt
        return merge(recipe, out, backend="reference")

    places = models / "out", models / "parts"
    with pytest.raises(KeyboardInterrupt):
        list(run_stages(path, *places, stopping))
    assert done == ["first", "out"]
    before = (models / "parts" / "first" / "model.safetensors").stat().st_mtime_ns
    go_on = functools.partial(merge, backend="reference", resume=True)
    assert [place.name for place, _ in run_stages(path, *places, go_on)] == ["first", "out"]
    assert (models / "parts" / "first" / "model.safetensors").stat().st_mtime_ns == before
    assert torch.all(load_merged(models / "out")["w"] == (1.5 + 3) / 2)
    save_model(models / "a", {"w": torch.zeros(4), "norm": torch.zeros(2)})
    with pytest.raises(OutputError, match=r"first holds something else than this merge"):
        list(run_stages(path, *places, go_on))


def test_named_results_only_go_where_they_are_asked(models, ota_merge):
    path = write(models / "multi.yaml", linear("a", "b", name="x"), linear("x", "c", name="y"))
    code, _, errors = ota_merge(
        "run", path, models / "out", "-I", models / "parts", "--backend", "reference", "-q"
    )
    assert (code, errors) == (0, "")
    assert torch.all(load_merged(models / "parts" / "y")["w"] == (1.5 + 3) / 2)
    assert not (models / "out").exists()


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        ((linear("y", "a", name="x"), linear("x", "b", name="y")), ["'x', 'y'", "circle"]),
        ((linear("x", "a", name="x"), linear("a", "b")), ["'x'", "circle"]),
        ((linear("a", "b", name="x"), linear("a", "c", name="x")), ["two documents have the name 'x'"]),
        ((linear("a", "b"), linear("a", "c")), ["two documents have no name"]),
        ((linear("a", "b", name="x/y"), linear("a", "c")), ["`name` in document 1 is 'x/y'"]),
        ((linear("a", "b", name="x"), 3), ["document 2 is 3", "mapping"]),
    ],
)
def test_wrong(tmp_path, documents, words):
    path = write(tmp_path / "multi.yaml", *documents)
    with pytest.raises(RecipeError) as caught:
        load_stages(path)
    for word in (str(path), *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_names_its_merge(models, ota_merge):
    path = write(
        models / "multi.yaml", linear("a", "b", name="x"), linear("x", "c", parameters={"wieght": 1})
    )
    code, _, errors = ota_merge("run", path, models / "out", "--backend", "reference", "-q")
    assert code == 2
    assert "the last merge: unknown key 'wieght'" in errors
    code, _, errors = ota_merge("run", path, models / "out", "--dry-run")
    assert code == 2
    assert "--dry-run plans one merge" in errors
