"""Bad input through the command line: exit code 2, one line that names what is wrong, nothing written, and
nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import (
    INDEX,
    WEIGHTS,
    ModelSet,
    edited,
    make_set,
    mounted_tiny_disk,
    random_tensors,
    save_model,
    second_moments,
    write_recipe,
)
from safetensors.torch import save_file

SHAPES = {"embed_tokens.weight": (10, 4), "layer.weight": (6, 5), "layer.bias": (5,)}


@pytest.fixture
def models(tmp_path):
    return make_set(tmp_path / "inputs", SHAPES, experts=2, dtype=torch.float32)


@pytest.fixture
def refused(refused_command, tmp_path):
    """Runs `ota-merge run` and asserts that it is refused as it should be; returns the line on stderr."""

    def refused(recipe, *options, out: Path = tmp_path / "out", facts=(), code=2):
        if isinstance(recipe, dict):
            recipe = write_recipe(tmp_path / "recipe.yaml", recipe)
        return refused_command("run", recipe, out, "-q", *options, facts=facts, code=code)

    return refused


def rewrite(path: Path, change: Callable[[dict], None]) -> Path:
    """Change a safetensors file's header as JSON; the data stays."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return path


def weights(models: ModelSet) -> Path:
    return models.expert_folders[1] / WEIGHTS


# Files that are missing or malformed: a change on the disk, and what the error must name.


def remove_folder(models):
    shutil.rmtree(models.expert_folders[1])
    return [models.expert_folders[1]]


def remove_weights(models):
    weights(models).unlink()
    models.curvature_files[1].rename(models.root / "moments.safetensors")
    return [models.expert_folders[1], ".safetensors"]


def remove_curvature(models):
    models.curvature_files[1].unlink()
    return [models.curvature_files[1]]


def emptied(folder):
    """The folder without anything in it."""
    shutil.rmtree(folder)
    return folder


def remove_shard(models):
    save_model(emptied(models.base_folder), models.base, shards=3)
    (models.base_folder / "model-00002-of-00003.safetensors").unlink()
    return [models.base_folder / INDEX, "model-00002-of-00003.safetensors", "missing"]


def escape_folder(models):
    save_model(emptied(models.base_folder), models.base, shards=2)
    index = models.base_folder / INDEX
    content = json.loads(index.read_text())
    content["weight_map"]["layer.bias"] = "../expert0/model.safetensors"
    index.write_text(json.dumps(content))
    return [index, "../expert0/model.safetensors", "leaves the folder"]


def truncate(models):
    path = weights(models)
    path.write_bytes(path.read_bytes()[:-7])
    return [path, "truncated", "7 bytes"]


def truncate_header(models):
    path = weights(models)
    path.write_bytes(path.read_bytes()[:40])
    return [path, "longer than the file"]


def empty_file(models):
    weights(models).write_bytes(b"")
    return [weights(models), "too few"]


def overlap(models):
    def change(header):
        begin, end = header["layer.weight"]["data_offsets"]
        header["layer.weight"]["data_offsets"] = [begin - 4, end - 4]

    return [rewrite(weights(models), change), "overlaps"]


def gap(models):
    def change(header):
        header["layer.bias"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}

    return [rewrite(weights(models), change), "gap"]


def out_of_range(models):
    def change(header):
        last = max((v for k, v in header.items() if k != "__metadata__"), key=lambda v: v["data_offsets"][1])
        last["data_offsets"][1] += 4
        last["shape"] = [(last["data_offsets"][1] - last["data_offsets"][0]) // 4]

    return [rewrite(weights(models), change), "beyond the end"]


def wrong_byte_count(models):
    def change(header):
        header["layer.weight"]["shape"] = [6, 6]

    return [rewrite(weights(models), change), "layer.weight", "144 bytes", "120"]


def duplicate_tensor(models):
    save_file({"layer.bias": models.base["layer.bias"]}, models.expert_folders[1] / "extra.safetensors")
    weights(models).rename(models.expert_folders[1] / "part.safetensors")
    models.curvature_files[1].rename(models.root / "moments.safetensors")
    return [models.expert_folders[1], "layer.bias", "two files"]


def duplicate_key(models):
    path = weights(models)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = data[8 : 8 + length].replace(b'"layer.bias"', b'"layer.weight"')
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return [path, "duplicate", "layer.weight"]


def not_json(models):
    path = weights(models)
    path.write_bytes(struct.pack("<Q", 16) + b"not a header at ")
    return [path, "JSON"]


def broken_config(models):
    (models.base_folder / "config.json").write_text("{")
    return [models.base_folder / "config.json", "JSON"]


def pickled_weights(models):
    weights(models).unlink()
    models.curvature_files[1].rename(models.root / "moments.safetensors")
    (models.expert_folders[1] / "pytorch_model.bin").write_bytes(b"PK")
    return ["pytorch_model.bin", "not a complete, uncompressed torch file"]


FILES = [
    remove_folder,
    remove_weights,
    remove_curvature,
    remove_shard,
    escape_folder,
    truncate,
    truncate_header,
    empty_file,
    overlap,
    gap,
    out_of_range,
    wrong_byte_count,
    duplicate_tensor,
    duplicate_key,
    not_json,
    broken_config,
    pickled_weights,
]


@pytest.mark.parametrize("damage", FILES, ids=lambda damage: damage.__name__)
def test_files(models, refused, damage):
    facts = damage(models)
    refused(models.recipe(), facts=facts)


# Models that do not fit together: tensors that replace or join one expert's, and what the error must name.


def replaced(models, t, **tensors):
    """Save expert t with other tensors; None removes one."""
    names = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    whole = {n: v for n, v in (models.experts[t] | names).items() if v is not None}
    save_model(models.expert_folders[t], whole)
    return models


@pytest.mark.parametrize(
    ("tensors", "facts"),
    [
        pytest.param(
            {"layer__weight": torch.ones(5, 6)}, ["layer.weight", "[6, 5]", "[5, 6]", "expert1"], id="shape"
        ),
        pytest.param(
            {"embed_tokens__weight": torch.ones(12, 4)},
            ["embed_tokens.weight", "[10, 4]", "[12, 4]", "vocabularies"],
            id="vocabulary",
        ),
        pytest.param(
            {"embed_tokens__weight": torch.ones(10, 8)},
            ["embed_tokens.weight", "other sizes", "hidden sizes 4 and 8"],
            id="width",
        ),
        pytest.param({"layer__bias": None}, ["layer.bias", "expert1"], id="tensor missing"),
        pytest.param({"extra": torch.ones(3)}, ["extra", "base", "expert0"], id="tensor too many"),
        pytest.param(
            {"layer__bias": torch.ones(5, dtype=torch.int64)},
            ["layer.bias", "float32", "int64", "expert1"],
            id="integers among floats",
        ),
    ],
)
def test_models_that_do_not_fit(models, refused, tensors, facts):
    replaced(models, 1, **tensors)
    refused(models.recipe(), facts=facts)


@pytest.mark.parametrize(
    ("buffers", "facts"),
    [
        pytest.param(
            [torch.arange(4), torch.arange(4), torch.tensor([0, 1, 2, 4])],
            ["ids", "int64", "expert1", "differs"],
            id="integers that differ",
        ),
        pytest.param(
            [torch.tensor([True]), torch.tensor([True]), torch.tensor([False])],
            ["ids", "bool", "expert1", "differs"],
            id="booleans that differ",
        ),
        pytest.param(
            [torch.arange(4), torch.arange(4), torch.arange(4, dtype=torch.int32)],
            ["ids", "int64", "int32", "expert1"],
            id="integers of two types",
        ),
    ],
)
def test_buffers(tmp_path, refused, buffers, facts):
    base = random_tensors(SHAPES, 0)
    tensors = [
        m | {"ids": ids} for m, ids in zip([base, edited(base, 1), edited(base, 2)], buffers, strict=True)
    ]
    moments = [second_moments(base, 3), second_moments(base, 4)]
    models = ModelSet(tmp_path / "inputs", tensors[0], tensors[1:], moments).save()
    refused(models.recipe(), facts=facts)


def test_a_type_that_cannot_be_written(tmp_path, refused):
    base = {"weight": torch.ones(4).to(torch.float8_e4m3fn)}
    moments = [{"weight": torch.ones(4)}] * 2
    models = ModelSet(tmp_path / "inputs", base, [base, base], moments).save()
    refused(models.recipe(), facts=["weight", "float8_e4m3fn", "dtype: bfloat16"])


# Values that no merge can use, found while merging: what was written by then is removed again.


def spoiled(models, where, value, indices):
    """Put `value` at flat `indices` of layer.weight; returns the file."""
    folder, tensors = {
        "base": (models.base_folder, models.base),
        "expert": (models.expert_folders[1], models.experts[1]),
        "curvature": (models.curvature_files[1], models.curvatures[1]),
    }[where]
    tensor = tensors["layer.weight"].clone()
    tensor.view(-1)[list(indices)] = value
    if where == "curvature":
        save_file(tensors | {"layer.weight": tensor}, folder)
        return folder
    return save_model(folder, tensors | {"layer.weight": tensor}) / WEIGHTS


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"density": 0.5},
        {"density": 0.5, "density_scope": "tensor"},
        {"normalise": "model"},
        {"normalise": "global"},
        {"saliency_mass": 0.5, "masked_task_vector_merge_method": "linear", "rescale": True},
        {"masked_task_vector_merge_method": "ties", "ties_density": 0.5},
        {"rank1_approx": True},
        {"rank": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("base", float("nan")),
        ("expert", float("nan")),
        ("expert", float("-inf")),
        ("curvature", float("nan")),
        ("curvature", float("inf")),
        ("curvature", -1e-9),
    ],
    ids=str,
)
def test_values_that_are_not_finite_or_negative(models, refused, where, value, parameters):
    path = spoiled(models, where, value, (7, 11, 29))
    kind = "curvature" if where == "curvature" else "weight"
    facts = [path, "layer.weight", "3 of 30", kind, "flat index 7", "on_nonfinite: base"]
    refused(models.recipe(**parameters), facts=facts)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_values_are_counted_over_the_whole_tensor(tmp_path, refused, backend):
    """Although each tile reports its own."""
    models = make_set(tmp_path / "inputs", {"weight": (1100, 1000)}, experts=1, dtype=torch.float32)
    tensor = models.experts[0]["weight"]
    tensor.view(-1)[[500_000, 1_090_000]] = float("nan")
    path = save_model(models.expert_folders[0], models.experts[0]) / WEIGHTS
    facts = [path, "weight", "2 of 1100000", "flat index 500000"]
    refused(models.recipe(), "--backend", backend, facts=facts)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_linear_merges_check_values_too(models, refused, value):
    path = spoiled(models, "expert", value, [3])
    refused(models.recipe("linear"), facts=[path, "layer.weight", "1 of 30", "flat index 3"])


def test_without_a_base_there_is_no_base_value_to_offer(models, refused):
    path = spoiled(models, "expert", float("nan"), [3])
    recipe = models.recipe()
    del recipe["base_model"]
    line = refused(recipe, facts=[path, "layer.weight", "flat index 3"])
    assert "on_nonfinite" not in line


# Curvature files.


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_an_optimizer_file_that_would_run_code(models, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = models.root / "optimizer.pt"
    torch.save({"state": {"layer.bias": {"exp_avg_sq": Evil()}}}, path)
    recipe = models.recipe()
    recipe["models"][1]["parameters"]["preconditioner_path"] = str(path)
    refused(recipe, facts=[path, "run code"])
    assert not (tmp_path / "hacked").exists()


def test_parameters_without_curvature_are_all_listed(models, refused):
    save_file({"layer.bias": models.curvatures[1]["layer.bias"]}, models.curvature_files[1])
    refused(
        models.recipe(),
        facts=["expert1", "embed_tokens.weight", "layer.weight", "missing_curvature: uniform"],
    )


@pytest.mark.parametrize(
    ("tensor", "facts"),
    [
        pytest.param(torch.ones(5, 6), ["layer.weight", "[5, 6]", "[6, 5]"], id="shape"),
        pytest.param(
            torch.ones(6, 5, dtype=torch.float64), ["layer.weight", "float64", "float32"], id="type"
        ),
        pytest.param(torch.ones(6, 5, dtype=torch.int32), ["layer.weight", "int32"], id="integers"),
    ],
)
def test_curvature_that_does_not_fit(models, refused, tensor, facts):
    save_file(models.curvatures[1] | {"layer.weight": tensor}, models.curvature_files[1])
    refused(models.recipe(), facts=[models.curvature_files[1], *facts])


def test_bias_correction_without_step(models, refused):
    refused(models.recipe(bias_correction=True), facts=[models.curvature_files[0], "step"])


def test_a_folder_of_weights_is_not_taken_for_curvature(models, refused):
    """Its values are negative."""
    recipe = models.recipe()
    recipe["models"][0]["parameters"]["preconditioner_path"] = str(models.base_folder)
    refused(recipe, facts=[models.base_folder, "negative"])


# Recipes.


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        pytest.param({"models": []}, ["models", "empty"], id="no models"),
        pytest.param({"models": None}, ["models"], id="models missing"),
        pytest.param({"merge_method": "otta"}, ["otta", "ota"], id="unknown method"),
        pytest.param({"merge_method": None}, ["merge_method", "missing"], id="no method"),
        pytest.param({"parameters": {"density": 1.5}}, ["density", "1.5", "[0, 1]"], id="density above 1"),
        pytest.param({"parameters": {"density": -0.1}}, ["density", "-0.1", "[0, 1]"], id="density below 0"),
        pytest.param({"parameters": {"density": "half"}}, ["density", "half", "[0, 1]"], id="density a word"),
        pytest.param({"parameters": {"densty": 0.5}}, ["densty", "0.5", "density"], id="unknown parameter"),
        pytest.param({"parametres": {}}, ["parametres", "parameters"], id="unknown key"),
        pytest.param({"dtype": "int8"}, ["dtype", "int8", "bfloat16"], id="dtype"),
        pytest.param({"slices": []}, ["slices", "models", "exclude each other"], id="slices and models"),
    ],
)
def test_recipes(models, refused, tmp_path, change, facts):
    recipe = {k: v for k, v in (models.recipe() | change).items() if v is not None}
    refused(recipe, facts=[tmp_path / "recipe.yaml", *facts])


@pytest.mark.parametrize("key", ["base_model", "tokenizer_source"])
def test_folders_that_are_nowhere(models, refused, key):
    refused(models.recipe() | {key: "/no/such/place"}, facts=["/no/such/place"])


def test_one_model(models, refused):
    """Of ota; a linear merge of one is that model."""
    recipe = models.recipe()
    del recipe["base_model"], recipe["models"][1]
    refused(recipe, facts=["two models"])


def test_a_base_where_the_parameters_need_one(models, refused):
    recipe = models.recipe(rescale=True)
    del recipe["base_model"]
    refused(recipe, facts=["rescale", "base_model"])


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        pytest.param(b"models: [", ["YAML", "line 1"], id="unclosed"),
        pytest.param(b"a: b: c", ["YAML"], id="two colons"),
        pytest.param(b"merge_method: \xff\xfe\xfa", ["YAML"], id="not UTF-8"),
        pytest.param(b"", ["empty"], id="empty"),
        pytest.param(b"- ota", ["mapping"], id="a list"),
        pytest.param(b"merge_method: ota\nmerge_method: linear", ["merge_method", "twice"], id="key twice"),
    ],
)
def test_recipe_files(refused, tmp_path, content, facts):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    refused(path, facts=[path, *facts])


def test_a_recipe_that_is_a_folder(models, refused):
    refused(models.base_folder, facts=[models.base_folder, "directory"])


def test_a_recipe_that_is_missing(refused, tmp_path):
    refused(tmp_path / "nothing.yaml", facts=[tmp_path / "nothing.yaml", "No such file"])


def test_a_recipe_that_is_a_checkpoint(models, refused):
    refused(weights(models), facts=[weights(models), "YAML"])


def test_vocabularies_that_differ_under_union(models, refused):
    for t, folder in enumerate(models.expert_folders):
        vocabulary = {"model": {"type": "WordLevel", "vocab": {"hello": 0, "world": 1 + t}}}
        (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    recipe = models.recipe() | {"tokenizer_source": "union"}
    refused(recipe, facts=["tokenizer_source: union", "expert0", "expert1", "world"])


# Options.


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        pytest.param(["--threads", "0"], ["--threads", "0"], id="threads 0"),
        pytest.param(["--threads", "many"], ["--threads", "many"], id="threads a word"),
        pytest.param(["--shard-size", "huge"], ["--shard-size", "huge", "5GB"], id="shard size a word"),
        pytest.param(["--shard-size", "0"], ["--shard-size", "0"], id="shard size 0"),
        pytest.param(["--shard-size", "-5GB"], ["--shard-size", "-5GB"], id="shard size negative"),
        pytest.param(["--memory-limit", "10MB"], ["10.0 MB", "--memory-limit"], id="memory limit too small"),
        pytest.param(["--backend", "cuda"], ["--backend", "cuda", "native"], id="backend"),
        pytest.param(["--device", "cuda"], ["--device", "cuda"], id="device"),
        pytest.param(["--seed", "x"], ["--seed", "x"], id="seed"),
        pytest.param(["--ovrewrite"], ["--ovrewrite"], id="unknown option"),
        pytest.param(["another"], ["another"], id="too many arguments"),
    ],
)
def test_options(models, refused, options, facts):
    refused(models.recipe(), *options, facts=facts)


def test_an_unknown_command(ota_merge):
    code, printed, errors = ota_merge("frobnicate")
    assert (code, printed) == (2, "")
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    assert "frobnicate" in line


def test_a_missing_argument(ota_merge, models):
    code, printed, errors = ota_merge("run", models.recipe_file())
    assert (code, printed) == (2, "")
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    assert "OUT" in line


# Where the output would go.


def test_output_that_is_an_input_folder(models, refused):
    for folder in (models.base_folder, *models.expert_folders):
        for options in ([], ["--overwrite"], ["--resume"], ["--overwrite", "--resume"]):
            refused(models.recipe(), *options, out=folder, facts=[folder])


def test_output_inside_an_input_folder(models, refused):
    refused(models.recipe(), out=models.base_folder / "merged", facts=[models.base_folder / "merged"])


@pytest.mark.parametrize("options", [[], ["--overwrite"]], ids=str)
def test_output_that_holds_an_input_folder(models, refused, options):
    refused(models.recipe(), *options, out=models.root, facts=[models.root, models.base_folder])


def test_output_that_reaches_an_input_through_a_link(models, refused, tmp_path):
    (tmp_path / "link").symlink_to(models.base_folder)
    refused(models.recipe(), "--overwrite", out=tmp_path / "link", facts=[models.base_folder])


def test_overwrite_does_not_delete_curvature(models, refused, tmp_path):
    recipe = models.recipe()
    moved = tmp_path / "moments" / "exp_avg_sq.safetensors"
    moved.parent.mkdir()
    shutil.move(models.curvature_files[0], moved)
    recipe["models"][0]["parameters"]["preconditioner_path"] = str(moved)
    refused(recipe, "--overwrite", out=moved.parent, facts=[moved])


def test_overwrite_does_not_delete_the_tokenizer(models, refused, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text('{"a": 0}')
    recipe = models.recipe() | {"tokenizer_source": str(tokenizer)}
    refused(recipe, "--overwrite", out=tokenizer, facts=[tokenizer])


def test_overwrite_does_not_delete_a_base_that_the_method_does_not_read(models, refused):
    """Its configuration and tokenizer are read."""
    refused(models.recipe("linear"), "--overwrite", out=models.base_folder, facts=[models.base_folder])


def test_output_that_is_not_empty(models, refused, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("three years of work")
    refused(models.recipe(), out=out, facts=[out, "not empty", "--overwrite"])
    refused(models.recipe(), "--resume", out=out, facts=[out, "--overwrite"])


@pytest.mark.parametrize("options", [[], ["--overwrite"], ["--resume"]], ids=str)
def test_output_that_is_a_file(models, refused, tmp_path, options):
    (tmp_path / "out").write_text("a file")
    refused(models.recipe(), *options, facts=[tmp_path / "out", "file"])


def test_output_under_a_file(models, refused, tmp_path):
    (tmp_path / "file").write_text("a file")
    refused(models.recipe(), out=tmp_path / "file" / "out", facts=[tmp_path / "file"])


def test_output_under_a_folder_that_cannot_be_written(models, refused, tmp_path):
    parent = tmp_path / "locked"
    parent.mkdir(mode=0o555)
    if os.access(parent, os.W_OK):
        pytest.skip("this user may write everywhere")
    refused(models.recipe(), out=parent / "out", facts=[parent])


def test_a_disk_that_is_full(models, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 12_000_000}))
    refused(models.recipe(), facts=[tmp_path, "12.0 MB", "free"])
    refused(models.recipe(), "--dry-run", facts=[tmp_path, "12.0 MB", "free"])


@pytest.fixture
def tiny_disk(tmp_path):
    with mounted_tiny_disk(tmp_path / "disk") as path:
        yield path


def test_a_real_disk_that_is_full(models, refused, tiny_disk):
    refused(models.recipe(), out=tiny_disk / "out", facts=[tiny_disk, "free"])


def test_a_disk_that_is_read_only(models, refused, tiny_disk):
    subprocess.run(["mount", "-o", "remount,ro,size=1g", str(tiny_disk)], check=True)
    refused(models.recipe(), out=tiny_disk / "out", facts=[tiny_disk, "Read-only"])


def test_output_that_is_a_mount_point(models, refused, tiny_disk):
    """It could not be replaced by a rename: found before the merge, not after it."""
    refused(models.recipe(), "--overwrite", out=tiny_disk, facts=[tiny_disk, "mount point"])


# The other commands refuse in the same way.


@pytest.mark.parametrize("damage", [truncate, remove_shard, wrong_byte_count], ids=lambda f: f.__name__)
def test_plan_refuses_like_run(models, ota_merge, damage):
    facts = damage(models)
    code, printed, errors = ota_merge("plan", models.recipe_file())
    assert (code, printed) == (2, "")
    (line,) = errors.splitlines()
    assert all(str(fact) in line for fact in ["error: ", *facts])


def test_a_dry_run_finds_an_output_in_the_way(models, refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("three years of work")
    refused(models.recipe(), "--dry-run", facts=["not empty"])


def test_a_dry_run_finds_an_unfinished_merge_in_the_way(models, refused, tmp_path):
    (tmp_path / ".out.ota-merge").mkdir()
    refused(models.recipe(), "--dry-run", facts=[".out.ota-merge", "--resume"])
