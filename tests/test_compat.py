"""mergekit's flags on `ota-merge run`."""

from __future__ import annotations

import json

import pytest
from checkpoints import make_set, shard_files


@pytest.fixture
def recipe(tmp_path):
    models = make_set(tmp_path / "inputs", experts=2)
    for folder in models.expert_folders:
        (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
        (folder / "config.json").write_text("{}")
    data = models.recipe("linear")
    del data["base_model"]
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(data))
    return path


def run(ota_merge, recipe, *flags):
    out = recipe.parent / "out"
    return out, *ota_merge("run", recipe, out, "--backend", "reference", "-q", *flags)


@pytest.mark.parametrize(
    "flag",
    [
        ["--lazy-unpickle"],
        ["--clone-tensors"],
        ["--low-cpu-memory"],
        ["--read-to-gpu"],
        ["--async-write"],
        ["--multi-gpu"],
        ["--gpu-rich"],
        ["--write-threads", "3"],
        ["--lora-merge-cache", "x"],
    ],
    ids=lambda flag: flag[0],
)
def test_flags_without_effect_say_so_once(ota_merge, recipe, flag):
    out, code, printed, errors = run(ota_merge, recipe, *flag)
    assert (code, printed) == (0, "")
    assert len(errors.splitlines()) == 1
    assert errors.startswith(f"{flag[0]} has no effect here: ")
    assert out.is_dir()


def test_names_of_our_options(ota_merge, recipe):
    out, code, _, errors = run(ota_merge, recipe, "--out-shard-size", "3K", "-j", "1", "--random-seed", "7")
    assert (code, errors) == (0, "")
    assert len(shard_files(out)) > 1
    assert all(path.stat().st_size < 6000 for path in shard_files(out))
    assert json.loads((out / "merge_report.json").read_text())["threads"] == 1


def test_files_that_are_not_wanted(ota_merge, recipe):
    out, code, _, _ = run(ota_merge, recipe, "--no-copy-tokenizer", "--no-write-model-card")
    assert code == 0
    assert not (out / "tokenizer.json").exists()
    assert not (out / "README.md").exists()
    assert (out / "config.json").exists()
    out, code, _, _ = run(ota_merge, recipe, "--copy-tokenizer", "--write-model-card", "--overwrite")
    assert code == 0
    assert (out / "tokenizer.json").exists()
    assert (out / "README.md").exists()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--no-safe-serialization"], "pickled models are not written"),
        (["--out-shard-size", "5X"], "write it like 5B"),
        (["--out-shard-size", "0"], "write it like 5B"),
    ],
)
def test_refused(ota_merge, recipe, flags, text):
    out, code, _, errors = run(ota_merge, recipe, *flags)
    assert code == 2
    assert text in errors
    assert not out.exists()


def test_cuda_is_a_device(ota_merge, recipe):
    _, code, _, errors = run(ota_merge, recipe, "--cuda")
    assert code != 0
    assert "reference" in errors or "cuda" in errors.lower()
