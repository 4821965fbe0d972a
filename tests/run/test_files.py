"""`ota-merge files`: single files into one file, by names alone."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from checkpoints import edited, random_tensors
from jobs import Interrupt
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ota_kernels import InputError, OutputError, RecipeError, merge_files
from ota_kernels.run.files import FilesJob
from ota_kernels.run.job import as_recipe
from ota_kernels.run.options import Options, Silent
from ota_kernels.run.rules import Rules

# Names as a ComfyUI checkpoint has them, two that look like layers and an output matrix among them.
SHAPES = {
    "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
    "model.layers.0.w": (6, 5),
    "model.layers.1.w": (6, 5),
    "first_stage_model.encoder.conv_in.bias": (8,),
    "embed_tokens.weight": (9, 5),
    "lm_head.weight": (9, 5),
}
BASE = random_tensors(SHAPES, 0) | {"steps": torch.tensor([1, 2])}
A, B = edited(BASE, 1), edited(BASE, 2)


@pytest.fixture
def files(tmp_path):
    save_file(BASE, tmp_path / "base.safetensors")
    save_file(A, tmp_path / "a.safetensors")
    torch.save({"state_dict": B, "global_step": 3}, tmp_path / "b.ckpt")
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true, "model_type": "of another model"}')
    return tmp_path


def recipe(files, method="linear", models=("a.safetensors", "b.ckpt"), **top):
    return {
        "merge_method": method,
        "models": [
            {"model": str(files / m), "parameters": {"weight": 0.25 + i}} for i, m in enumerate(models)
        ],
        **top,
    }


def merged(data, out, *names, **options):
    merge_files(data, out, *names, backend="reference", **options)
    return load_file(out)


def mean(name):
    return (0.25 * A[name].double() + 1.25 * B[name].double()) / 1.5


def test_values_and_nothing_else(files):
    """All tensors, without layers, ties or configuration; one file appears."""
    before = {p.name for p in files.iterdir()}
    out = merged(recipe(files), files / "out.safetensors")
    assert out.keys() == BASE.keys()
    for name in SHAPES:
        torch.testing.assert_close(out[name].double(), mean(name), rtol=2e-7, atol=1e-9)
    assert torch.equal(out["steps"], BASE["steps"])
    assert {p.name for p in files.iterdir()} - before == {"out.safetensors"}
    with safe_open(files / "out.safetensors", "pt") as file:
        said = json.loads(file.metadata()["merge_recipe"])
    assert said["models"][1] == {"model": str(files / "b.ckpt"), "parameters": {"weight": 1.25}}


def test_a_base_gradients_and_filters(files):
    """A gradient has its first value everywhere; a filter is a part of a name; model, then global."""
    data = recipe(files, "task_arithmetic", base_model=str(files / "base.safetensors"))
    data["models"][0]["parameters"] = {
        "weight": [{"filter": "layers.1", "value": [2, 5]}, {"filter": "zero", "value": 9}]
    }
    data["parameters"] = {"weight": [0.5, 7], "lambda": [{"filter": "conv_in", "value": 0}, {"value": 1}]}
    data["models"][1]["parameters"] = {}
    out = merged(data, files / "out.safetensors")
    for name in SHAPES:
        w, a, b = (x[name].double() for x in (BASE, A, B))
        weight = 2 if "layers.1" in name else 0.5
        scale = 0 if "conv_in" in name else 1
        expected = w + scale * (weight * (a - w) + 0.5 * (b - w))
        torch.testing.assert_close(out[name].double(), expected, rtol=2e-7, atol=1e-9)


@pytest.fixture
def unlike(files):
    """a lacks one tensor, b another, and only a has a third."""
    mine = {n: t for n, t in A.items() if n != "lm_head.weight"} | {
        "only.a": torch.ones(3),
        "model_ema.w": torch.ones(2),
    }
    save_file(mine, files / "a.safetensors")
    torch.save({n: t for n, t in B.items() if n != "model.layers.1.w"}, files / "b.ckpt")
    return files


def test_names_must_agree(unlike):
    with pytest.raises(InputError, match=r"has no tensor .*-i leaves such tensors out, -u merges each"):
        merge_files(recipe(unlike), unlike / "out.safetensors")
    assert not (unlike / "out.safetensors").exists()


def test_intersection(unlike):
    out = merged(recipe(unlike), unlike / "out.safetensors", "intersection")
    assert out.keys() == BASE.keys() - {"lm_head.weight", "model.layers.1.w"}
    torch.testing.assert_close(
        out["model.layers.0.w"].double(), mean("model.layers.0.w"), rtol=2e-7, atol=1e-9
    )


def test_union(unlike):
    """Each over the files that have it: a mean of one file is that file's."""
    out = merged(recipe(unlike), unlike / "out.safetensors", "union")
    assert out.keys() == BASE.keys() | {"only.a", "model_ema.w"}
    assert torch.equal(out["lm_head.weight"], B["lm_head.weight"])
    assert torch.equal(out["model.layers.1.w"], A["model.layers.1.w"])
    assert torch.equal(out["model_ema.w"], torch.ones(2))
    torch.testing.assert_close(
        out["embed_tokens.weight"].double(), mean("embed_tokens.weight"), rtol=2e-7, atol=1e-9
    )


def test_the_command(files, ota_merge):
    (files / "r.yaml").write_text(yaml.safe_dump(recipe(files, dtype="float16")))
    out = files / "out.safetensors"
    code, printed, errors = ota_merge("files", files / "r.yaml", out, "--write-model-card")
    assert code == 0, errors
    code, printed, errors = ota_merge("files", files / "r.yaml", out, "-q")
    assert (code, "is there already: choose another name, or add --overwrite" in errors) == (2, True)
    code, printed, _ = ota_merge("files", files / "r.yaml", out, "--resume")
    assert (code, printed) == (0, f"{out} is complete already\n")
    code, _, errors = ota_merge("files", files / "r.yaml", out, "--resume", "--seed", "1")
    assert (code, "holds something else than this merge" in errors) == (2, True)
    code, _, _ = ota_merge("files", files / "r.yaml", out, "--overwrite", "-q", "--tensor-union")
    assert code == 0
    assert load_file(out)["embed_tokens.weight"].dtype == torch.float16
    code, _, errors = ota_merge("files", files / "r.yaml", out, "-i", "-u")
    assert (code, "-i and -u exclude each other" in errors) == (2, True)


@pytest.mark.parametrize("call", [2, 6])
def test_an_interrupt_goes_on(files, call):
    data = recipe(files, "ties", base_model=str(files / "base.safetensors"))
    data["parameters"] = {"density": 0.3}
    whole = merged(data, files / "whole.safetensors", tile_elements=50)
    out = files / "out.safetensors"
    options = {"backend": "reference", "tile_elements": 50}
    rules = Rules(before=Interrupt("tile", call))
    job = FilesJob(as_recipe(data), Options.of(**options), "same", rules)
    with job, pytest.raises(KeyboardInterrupt):
        job.run(out, Silent())
    assert not out.exists()
    with pytest.raises(OutputError, match="an unfinished merge into"):
        merge_files(data, out, **options)
    found = merged(data, out, tile_elements=50, resume=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    assert not [p for p in files.iterdir() if p.name.startswith(".")]


SLICES = [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]
WRONG = {
    "slices": ({"slices": SLICES, "models": None}, RecipeError, "`slices` has no meaning"),
    "tokenizer": ({"tokenizer_source": "union"}, RecipeError, "`tokenizer` has no meaning for single files"),
    "template": ({"chat_template": "chatml"}, RecipeError, "`chat_template` has no meaning"),
    "modules": (
        {"modules": {"default": {"models": [{"model": "a"}]}}, "models": None},
        RecipeError,
        "`modules` has no meaning",
    ),
    "folder": ({"models": [{"model": "."}]}, RecipeError, r"\. is a folder: name the file in it"),
    "nowhere": ({"models": [{"model": "no.pt"}]}, InputError, "'no.pt' is not a local file"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_refused(files, monkeypatch, wrong):
    change, error, text = WRONG[wrong]
    monkeypatch.chdir(files)
    data = {k: v for k, v in (recipe(files, parameters={"weight": 1}) | change).items() if v is not None}
    with pytest.raises(error, match=text) as caught:
        merge_files(data, files / "out.safetensors")
    assert "\n" not in str(caught.value)


def test_refused_outputs(files):
    with pytest.raises(OutputError, match=r"let its name end in \.safetensors"):
        merge_files(recipe(files), files / "out.pt")
    with pytest.raises(OutputError, match="is the input"):
        merge_files(recipe(files), files / "a.safetensors", overwrite=True)
    (files / "folder.safetensors").mkdir()
    with pytest.raises(OutputError, match="is a folder: name a file"):
        merge_files(recipe(files), files / "folder.safetensors")
    with pytest.raises(RecipeError, match="must be one of same, intersection, union"):
        merge_files(recipe(files), files / "out.safetensors", "all")
