"""Checksums of what was written, and `ota-merge verify`: what is wrong in a folder is found and named."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from checkpoints import make_set, shard_files
from click.testing import CliRunner
from jobs import merge
from safetensors import safe_open
from xxhash import xxh3_64_intdigest

from ota_kernels import InputError, OutputError
from ota_kernels.cli import cli
from ota_kernels.io.checksums import LEAF
from ota_kernels.io.header import read_header
from ota_kernels.run.rules import Rules
from ota_kernels.run.verify import ULPS, _ordered, verify
from ota_kernels.select.bracket import Bracket

SHAPES = {"embed": (300, 400), "a": (50, 60), "b": (50, 60), "norm": (60,), "scale": (), "empty": (0, 3)}
VARIANTS = {
    "threshold": ("ota", {"precond_threshold": 2e-16}),
    "model density": ("ota", {"density": 0.3, "normalise": "model"}),
    "tensor mass": ("ota", {"saliency_mass": 0.8, "density_scope": "tensor"}),
    "nothing kept": ("ota", {"density": [0.0, 0.4]}),
    "ties": ("ties", {"density": 0.3, "weight": 1.0}),
    "slerp-like": ("multislerp", {"weight": [0.4, 0.6]}),
    "by chance": ("della", {"density": 0.5, "weight": 1.0}),
    "ramplus": ("ramplus", {}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("models"), SHAPES, experts=2, shards=2)


@pytest.fixture
def out(models, tmp_path):
    merge(models.recipe(density=0.3), tmp_path / "out", shard_size=100_000)
    return tmp_path / "out"


def flip(path, offset):
    with path.open("rb+") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def by_definition(path) -> tuple[dict, str]:
    """Checksums of a shard's tensors and of itself, from the words in io/checksums.py."""
    data, header = path.read_bytes(), read_header(path)
    tensors = {}
    for name, info in header.tensors.items():
        own = data[info.begin : info.end]
        leaves = [xxh3_64_intdigest(own[i : i + LEAF]) for i in range(0, len(own), LEAF)]
        tensors[name] = xxh3_64_intdigest(np.array(leaves, "<u8").tobytes())
    whole = data[: header.data_start] + np.array(list(tensors.values()), "<u8").tobytes()
    return {name: f"{x:016x}" for name, x in tensors.items()}, f"{xxh3_64_intdigest(whole):016x}"


@pytest.mark.parametrize(
    "parameters", [{"precond_threshold": 2e-16}, {"density": 0.3}], ids=["written", "patched"]
)
@pytest.mark.parametrize("tile", [None, 1500, LEAF // 2])
def test_checksums_are_those_of_the_files_for_any_tiles(tmp_path, parameters, tile):
    models = make_set(tmp_path / "models", {"w": (700, 1000), "v": (3, 5)}, experts=2)
    sums = merge(models.recipe(**parameters), tmp_path / "out", tile_elements=tile)["checksums"]
    (path,) = shard_files(tmp_path / "out")
    assert (sums["tensors"], sums["shards"][path.name]) == by_definition(path)


def test_checksums_after_a_resume_and_a_missed_bracket(models, tmp_path):
    expected = merge(models.recipe(density=0.3), tmp_path / "expected")
    missed = Rules(bracket=lambda selection, scores: Bracket(1e30, 5))
    found = merge(models.recipe(density=0.3), tmp_path / "out", missed, tile_elements=1500)
    assert found["repeats"]
    assert found["checksums"] == expected["checksums"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("how", [{"share": 0.3}, {"full": True}], ids=["sample", "full"])
def test_what_was_merged_is_right(models, tmp_path, variant, how):
    method, parameters = VARIANTS[variant]
    merge(models.recipe(method, **parameters), tmp_path / "out", shard_size=100_000)
    found = verify(tmp_path / "out", **how)
    assert found.wrong == {}
    assert "merged again by the reference backend" in found.done[-1]


def test_of_one_flipped_byte_the_tensor_is_named(out):
    for path in shard_files(out):
        for name, info in read_header(path).tensors.items():
            if info.nbytes:
                flip(path, info.end - 1)
                assert name in verify(out).wrong
                assert list(verify(out, full=True).wrong) == [name]
                flip(path, info.end - 1)
    assert verify(out).wrong == {}


def test_without_inputs_checksums_alone_find_it(models, tmp_path):
    own = make_set(tmp_path / "models", SHAPES, experts=2)
    merge(own.recipe(precond_threshold=1e-16), tmp_path / "out")
    shutil.rmtree(own.root)
    found = verify(tmp_path / "out")
    assert found.wrong == {}
    assert "cannot be read" in found.done[-1]
    (path,) = shard_files(tmp_path / "out")
    flip(path, read_header(path).tensors["a"].begin)
    assert list(verify(tmp_path / "out").wrong) == ["a"]


def test_inputs_that_were_moved_are_found_in_a_folder(models, tmp_path):
    own = make_set(tmp_path / "models", SHAPES, experts=2)
    merge(own.recipe(precond_threshold=1e-16), tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(own.root, tmp_path / "elsewhere" / "models")
    assert "merged again" in verify(tmp_path / "out", inputs=tmp_path / "elsewhere").done[-1]
    with pytest.raises(InputError, match="holds nothing"):
        verify(tmp_path / "out", inputs=tmp_path / "out")


def test_values_that_the_recipe_does_not_give_are_found_where_checksums_agree(models, tmp_path):
    """As a merge by a broken backend would have written them."""
    merge(models.recipe(precond_threshold=2e-16), tmp_path / "out")
    (path,) = shard_files(tmp_path / "out")
    flip(path, read_header(path).tensors["a"].begin + 1)  # an exponent's last bit
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    report["checksums"]["tensors"], report["checksums"]["shards"][path.name] = by_definition(path)
    (tmp_path / "out" / "merge_report.json").write_text(json.dumps(report))
    assert verify(tmp_path / "out", full=True).wrong == {
        "a": "1 elements are not what the recipe gives, the first at flat index 0"
    }


@pytest.mark.parametrize("change", ["header", "size", "gone", "index", "another"])
def test_damaged_files_are_named(out, change):
    first = shard_files(out)[0]
    index = out / "model.safetensors.index.json"
    if change == "header":
        flip(first, first.read_bytes().index(b"BF16"))
    elif change == "size":
        with first.open("ab") as file:
            file.write(b"x")
    elif change == "gone":
        first.unlink()
    elif change == "index":
        index.write_text(index.read_text().replace("00002-of", "00001-of"))
    else:
        shutil.copy(first, out / "other.safetensors")
    wrong = verify(out).wrong
    assert {"index": index.name, "another": "other.safetensors"}.get(change, first.name) in wrong


def test_the_command_names_what_is_wrong_and_exits_1(out):
    done = CliRunner().invoke(cli, ["verify", str(out), "--sample", "100%"])
    assert (done.exit_code, "100.00% of the elements merged again" in done.output) == (0, True)
    path = shard_files(out)[0]
    with safe_open(path, "np") as file:
        name = next(iter(file.keys()))
    flip(path, read_header(path).tensors[name].begin)
    done = CliRunner().invoke(cli, ["verify", str(out)])
    assert done.exit_code == 1
    assert f"wrong: {name}: is not what was written" in done.output


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(OutputError, match="not a complete merge"):
        verify(tmp_path)


def test_neighbours_are_one_apart():
    values = np.float32([-1e-45, -0.0, 0.0, 1e-45, 3e-45])
    assert np.diff(_ordered(values.view(np.uint8), 4)).tolist() == [1, 0, 1, 1]
    assert ULPS < 3
