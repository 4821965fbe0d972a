"""mergekit's flags on `ota-merge run`."""

from __future__ import annotations

import json
import os
import sys
import types

import pytest
from checkpoints import make_set, shard_files

# METHODS section 13.
FLAGS = """
--no-allow-crimes --no-unsafe-truncate-embeddings --no-trust-remote-code --no-quiet --no-cuda
--no-low-cpu-memory --no-lazy-unpickle --no-read-to-gpu --no-multi-gpu --no-async-write --no-clone-tensors
--allow-crimes --unsafe-truncate-embeddings --copy-tokenizer --no-copy-tokenizer --write-model-card
--no-write-model-card --out-shard-size --random-seed --lora-merge-dtype --lora-merge-cache
--transformers-cache --trust-remote-code --lazy-unpickle --clone-tensors --low-cpu-memory --read-to-gpu
--async-write --write-threads --cuda --device --multi-gpu --gpu-rich --num-threads -j -v --quiet
--safe-serialization --no-safe-serialization
"""


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


def test_flags_that_say_no(ota_merge, recipe):
    """Each takes back what is said before it, and nothing is said of what is not done."""
    said_no = [f for f in FLAGS.split() if f.startswith("--no-") and f != "--no-safe-serialization"]
    out, code, printed, errors = run(
        ota_merge, recipe, "--cuda", "--clone-tensors", "--allow-crimes", *said_no
    )
    assert (code, "no effect" in errors) == (0, False)
    assert "merged into" in printed  # not quiet
    options = json.loads((out / "merge_report.json").read_text())["options"]
    assert not options["allow_crimes"]
    assert not (out / "README.md").exists()


@pytest.mark.parametrize("flag", ["--cuda", "--multi-gpu", "--gpu-rich"])
def test_what_wants_a_gpu_is_a_device(ota_merge, recipe, flag):
    _, code, _, errors = run(ota_merge, recipe, flag)
    assert code == 2
    assert "cuda" in errors.lower()
    out, code, _, errors = run(ota_merge, recipe, flag, "--device", "cpu")
    assert (code, errors) == (0, "")
    assert out.is_dir()


def test_the_seed_is_that_of_random_methods(ota_merge, recipe):
    data = json.loads(recipe.read_text())
    data |= {"merge_method": "dare_linear", "base_model": data["models"].pop(0)["model"]}
    data["parameters"] = {"weight": 1, "density": 0.5}
    recipe.write_text(json.dumps(data))
    found = []
    for seed in (5, 5, 6):
        out, code, _, _ = run(ota_merge, recipe, "--random-seed", seed, "--overwrite")
        assert code == 0
        assert json.loads((out / "merge_report.json").read_text())["options"]["seed"] == seed
        found.append((out / "model.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


def test_the_hubs_cache(ota_merge, recipe, monkeypatch):
    """`--transformers-cache` is where models of the hub lie or are put."""
    asked = []
    hub = types.ModuleType("huggingface_hub")

    def snapshot_download(repo, **_):
        asked.append((repo, os.environ["HF_HUB_CACHE"]))
        return json.loads(recipe.read_text())["models"][0]["model"]

    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setenv("HF_HUB_CACHE", "elsewhere")
    data = json.loads(recipe.read_text())
    (recipe.parent / "hub.yaml").write_text(
        json.dumps(data | {"models": [{"model": "org/name"}, data["models"][1]]})
    )
    _, code, _, errors = run(ota_merge, recipe.parent / "hub.yaml", "--transformers-cache", "cache")
    assert (code, errors) == (0, "")
    assert asked[0] == ("org/name", "cache")


def test_every_flag_of_mergekit_is_known(ota_merge):
    """By its name, for folders and for single files."""
    from ota_kernels.cli.files import files
    from ota_kernels.cli.run import run as run_command

    for command in (run_command, files):
        known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
        assert set(FLAGS.split()) <= known
