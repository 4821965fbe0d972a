"""Model, curvature and hub inputs: zero-copy, nothing leaked, and every bad input one clear InputError."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import types
import zipfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import resident_kib
from safetensors.torch import save_file

from ota_kernels.errors import InputError
from ota_kernels.io import hub
from ota_kernels.io.curvature import CurvatureFile
from ota_kernels.io.header import read_header
from ota_kernels.io.pages import advise
from ota_kernels.io.reader import Checkpoint, MappedFile
from ota_kernels.tensors.dtypes import BY_NAME, BY_TAG

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def write_index(folder: Path, weight_map: object) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def make_sharded(folder: Path) -> Path:
    save_file({"a": torch.arange(4.0), "b": torch.ones(2, 2)}, folder / "model-1.safetensors")
    save_file({"c": torch.arange(3, dtype=torch.bfloat16)}, folder / "model-2.safetensors")
    return write_index(
        folder, {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    )


def one_line(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


def descriptors_and_maps() -> tuple[int, int]:
    """Open descriptors, and maps of safetensors or torch files, of this process; garbage does not count."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().splitlines()
    return len(os.listdir("/proc/self/fd")), sum(line.endswith((".safetensors", ".pt")) for line in maps)


def mapped_range(path: Path) -> tuple[int, int]:
    """The addresses at which this process maps `path`."""
    (line,) = [m for m in Path("/proc/self/maps").read_text().splitlines() if m.endswith(str(path))]
    start, stop = line.split()[0].split("-")
    return int(start, 16), int(stop, 16)


def test_torch_is_not_imported_before_a_torch_file_is_opened():
    script = (
        "import sys, ota_kernels.io.curvature, ota_kernels.io.hub\n"
        "assert not {'torch', 'triton', 'huggingface_hub'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


class TestMappedFile:
    @pytest.mark.parametrize("dtype", BY_TAG.values(), ids=lambda dtype: dtype.name)
    def test_buffers_are_the_bytes_that_were_saved(self, tmp_path, dtype):
        path = tmp_path / "model.safetensors"
        saved = torch.arange(6).reshape(2, 3).to(getattr(torch, dtype.name))
        save_file({"w": saved, "pad": torch.ones(1, dtype=torch.uint8)}, path)
        with MappedFile(path) as mapped:
            buffer = mapped.buffer("w")
            assert buffer.dtype == dtype
            assert len(buffer) == 6
            assert buffer.origin == str(path)
            assert buffer.data.tobytes() == saved.view(torch.uint8).numpy().tobytes()

    def test_buffers_are_read_only(self, tmp_path):
        save_file({"w": torch.ones(4)}, tmp_path / "model.safetensors")
        with MappedFile(tmp_path / "model.safetensors") as mapped:
            assert not mapped.buffer("w").data.flags.writeable

    @linux_only
    def test_a_buffer_lies_in_the_map(self, tmp_path):
        path = tmp_path / "model.safetensors"
        save_file({"w": torch.ones(5000), "v": torch.ones(3)}, path)
        with MappedFile(path) as mapped:
            start, stop = mapped_range(path)
            for info in mapped.header.tensors.values():
                data = mapped.buffer(info.name).data
                assert data.ctypes.data == start + info.begin
                assert data.ctypes.data + data.nbytes <= stop

    def test_empty_tensors_and_empty_files_have_empty_buffers(self, tmp_path):
        save_file({"e": torch.ones(0, 3)}, tmp_path / "one.safetensors")
        with MappedFile(tmp_path / "one.safetensors") as mapped:
            assert len(mapped.buffer("e")) == 0
        save_file({}, tmp_path / "none.safetensors")
        with MappedFile(tmp_path / "none.safetensors") as mapped, pytest.raises(KeyError):
            mapped.buffer("e")

    def test_a_buffer_outlives_the_file_object(self, tmp_path):
        save_file({"w": torch.arange(4.0)}, tmp_path / "model.safetensors")
        mapped = MappedFile(tmp_path / "model.safetensors")
        buffer = mapped.buffer("w")
        mapped.close()
        del mapped
        gc.collect()
        np.testing.assert_array_equal(buffer.data.view(np.float32), [0, 1, 2, 3])

    def test_a_closed_file_gives_no_buffers(self, tmp_path):
        save_file({"w": torch.ones(4)}, tmp_path / "model.safetensors")
        mapped = MappedFile(tmp_path / "model.safetensors")
        mapped.close()
        with pytest.raises(ValueError, match="is closed"):
            mapped.buffer("w")

    @pytest.mark.parametrize("size", [0, 40])
    def test_a_file_cut_after_its_header_was_read_is_refused(self, tmp_path, size):
        path = tmp_path / "model.safetensors"
        save_file({"w": torch.ones(4)}, path)
        header = read_header(path)
        os.truncate(path, size)
        with pytest.raises(InputError, match=f"changed while in use: {size} bytes now, {header.file_size}"):
            MappedFile(path, header)

    def test_a_file_that_vanished_after_its_header_was_read_is_refused(self, tmp_path):
        path = tmp_path / "model.safetensors"
        save_file({"w": torch.ones(4)}, path)
        header = read_header(path)
        path.unlink()
        with pytest.raises(InputError, match="cannot be mapped: No such file"):
            MappedFile(path, header)

    @linux_only
    def test_nothing_is_leaked(self, tmp_path):
        path = tmp_path / "model.safetensors"
        save_file({"w": torch.ones(4)}, path)
        before = descriptors_and_maps()
        for _ in range(5):
            with MappedFile(path) as mapped:
                assert mapped.buffer("w").data.sum() > 0
                assert descriptors_and_maps()[1] == before[1] + 1
        assert descriptors_and_maps() == before


class TestCheckpoint:
    def test_a_folder_with_one_file(self, tmp_path):
        save_file({"w": torch.arange(4.0), "v": torch.ones(3)}, tmp_path / "model.safetensors")
        checkpoint = Checkpoint.open(tmp_path, "models[0]")
        assert checkpoint.files == [tmp_path / "model.safetensors"]
        assert checkpoint.tensors.keys() == {"w", "v"}
        assert checkpoint.total_bytes == (4 + 3) * 4
        np.testing.assert_array_equal(checkpoint.buffer("w").data.view(np.float32), [0, 1, 2, 3])
        checkpoint.close()

    @pytest.mark.parametrize("entry", ["folder", "index"])
    def test_a_sharded_model(self, tmp_path, entry):
        index = make_sharded(tmp_path)
        save_file({"stray": torch.ones(1)}, tmp_path / "adapter.safetensors")
        checkpoint = Checkpoint.open(tmp_path if entry == "folder" else index, "models[0]")
        assert [file.name for file in checkpoint.files] == ["model-1.safetensors", "model-2.safetensors"]
        assert checkpoint.tensors.keys() == {"a", "b", "c"}
        assert checkpoint.path_of("c") == tmp_path / "model-2.safetensors"
        assert checkpoint.total_bytes == (4 + 4) * 4 + 3 * 2
        assert checkpoint.tensors["c"].dtype == BY_NAME["bfloat16"]
        np.testing.assert_array_equal(checkpoint.buffer("b").data.view(np.float32), np.ones(4))
        checkpoint.close()

    def test_a_path_to_a_file(self, tmp_path):
        save_file({"w": torch.ones(4)}, tmp_path / "x.safetensors")
        save_file({"v": torch.ones(4)}, tmp_path / "model.safetensors")
        assert Checkpoint.open(tmp_path / "x.safetensors", "models[0]").tensors.keys() == {"w"}

    def test_model_safetensors_wins_over_other_files(self, tmp_path):
        save_file({"w": torch.zeros(4), "v": torch.ones(1)}, tmp_path / "consolidated.safetensors")
        save_file({"w": torch.zeros(4)}, tmp_path / "model.fp16.safetensors")
        save_file({"w": torch.ones(4)}, tmp_path / "model.safetensors")
        assert Checkpoint.open(tmp_path, "base_model").tensors.keys() == {"w"}

    def test_the_model_index_wins_over_other_indexes(self, tmp_path):
        make_sharded(tmp_path)
        (tmp_path / "model.fp16.safetensors.index.json").write_text("not read")
        assert Checkpoint.open(tmp_path, "base_model").tensors.keys() == {"a", "b", "c"}

    def test_one_file_of_any_name_is_taken(self, tmp_path):
        save_file({"w": torch.ones(4)}, tmp_path / "weights.safetensors")
        (tmp_path / "._weights.safetensors").write_bytes(b"left by a file manager")
        assert Checkpoint.open(tmp_path, "base_model").tensors.keys() == {"w"}

    def test_files_without_an_index_are_taken_together(self, tmp_path):
        make_sharded(tmp_path).unlink()
        assert Checkpoint.open(tmp_path, "base_model").tensors.keys() == {"a", "b", "c"}

    def test_a_tensor_that_the_index_omits_is_still_read(self, tmp_path):
        make_sharded(tmp_path)
        write_index(tmp_path, {"a": "model-1.safetensors", "c": "model-2.safetensors"})
        assert Checkpoint.open(tmp_path, "base_model").tensors.keys() == {"a", "b", "c"}

    def test_links_may_leave_the_folder_as_in_the_cache_of_the_hub(self, tmp_path):
        blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
        blobs.mkdir()
        snapshot.mkdir(parents=True)
        save_file({"w": torch.ones(4)}, blobs / "0123")
        (snapshot / "model-1.safetensors").symlink_to("../../blobs/0123")
        write_index(snapshot, {"w": "model-1.safetensors"})
        assert len(Checkpoint.open(snapshot, "base_model").buffer("w")) == 4

    def test_shards_may_lie_in_a_subfolder(self, tmp_path):
        (tmp_path / "shards").mkdir()
        save_file({"w": torch.ones(4)}, tmp_path / "shards" / "one.safetensors")
        write_index(tmp_path, {"w": "shards/one.safetensors"})
        checkpoint = Checkpoint.open(tmp_path, "base_model")
        status = (tmp_path / "shards" / "one.safetensors").stat()
        assert checkpoint.fingerprint() == [["shards/one.safetensors", status.st_size, status.st_mtime_ns]]

    def test_the_fingerprint_sees_a_file_that_was_touched(self, tmp_path):
        make_sharded(tmp_path)
        checkpoint = Checkpoint.open(tmp_path, "base_model")
        before = checkpoint.fingerprint()
        os.utime(tmp_path / "model-2.safetensors", ns=(1, 1))
        after = checkpoint.fingerprint()
        assert after[0] == before[0]
        assert after[1] == [*before[1][:2], 1]
        (tmp_path / "model-2.safetensors").unlink()
        with pytest.raises(InputError, match=r"model-2\.safetensors: cannot be read"):
            checkpoint.fingerprint()

    @linux_only
    def test_opening_maps_nothing_and_closing_leaves_nothing(self, tmp_path):
        make_sharded(tmp_path)
        before = descriptors_and_maps()
        checkpoint = Checkpoint.open(tmp_path, "base_model")
        assert descriptors_and_maps() == before
        assert len(checkpoint.buffer("a")) == 4
        assert descriptors_and_maps()[1] == before[1] + 1
        assert len(checkpoint.buffer("c")) == 3
        assert descriptors_and_maps()[1] == before[1] + 2
        checkpoint.close()
        assert descriptors_and_maps() == before

    def test_a_closed_checkpoint_maps_again(self, tmp_path):
        make_sharded(tmp_path)
        checkpoint = Checkpoint.open(tmp_path, "base_model")
        checkpoint.buffer("a")
        checkpoint.close()
        np.testing.assert_array_equal(checkpoint.buffer("a").data.view(np.float32), [0, 1, 2, 3])
        checkpoint.close()

    @linux_only
    def test_threads_share_one_map(self, tmp_path):
        make_sharded(tmp_path)
        before = descriptors_and_maps()[1]
        checkpoint = Checkpoint.open(tmp_path, "base_model")
        with ThreadPoolExecutor(8) as pool:
            buffers = list(pool.map(checkpoint.buffer, ["a", "b"] * 50))
        assert len({buffer.data.ctypes.data for buffer in buffers}) == 2
        assert descriptors_and_maps()[1] == before + 1
        checkpoint.close()

    @linux_only
    def test_more_shards_than_the_usual_descriptor_limit(self, tmp_path):
        """Python before 3.13 keeps one descriptor per map; in a process of its own, as limits are global."""
        count = 40
        for i in range(count):
            save_file({f"w{i}": torch.ones(1)}, tmp_path / f"{i}.safetensors")
        script = (
            "import resource, sys, pathlib\n"
            "from ota_kernels.io.reader import Checkpoint\n"
            "_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (20, hard))\n"
            "checkpoint = Checkpoint.open(pathlib.Path(sys.argv[1]), 'base_model')\n"
            "assert len([checkpoint.buffer(name) for name in checkpoint.tensors]) == int(sys.argv[2])\n"
        )
        subprocess.run([sys.executable, "-c", script, str(tmp_path), str(count)], check=True)


class TestConfig:
    @pytest.mark.parametrize(
        ("config", "head", "tied"),
        [
            pytest.param({"tie_word_embeddings": True}, True, True, id="says yes"),
            pytest.param({"tie_word_embeddings": False}, False, False, id="says no"),
            pytest.param(
                {"text_config": {"tie_word_embeddings": False}}, False, False, id="text_config says no"
            ),
            pytest.param({}, False, True, id="silent, no head stored"),
            pytest.param({}, True, False, id="silent, head stored"),
            pytest.param(None, False, False, id="no config"),
        ],
    )
    def test_tied_embeddings(self, tmp_path, config, head, tied):
        tensors = {"model.embed_tokens.weight": torch.ones(2, 2)}
        if head:
            tensors["lm_head.weight"] = torch.ones(2, 2)
        save_file(tensors, tmp_path / "model.safetensors")
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
        checkpoint = Checkpoint.open(tmp_path, "base_model")
        assert checkpoint.config == config
        assert checkpoint.tied_embeddings is tied

    @pytest.mark.parametrize("text", ["{", "[]", '"\ud800"'], ids=["not JSON", "a list", "not UTF-8"])
    def test_a_broken_config_is_refused(self, tmp_path, text):
        save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        checkpoint = Checkpoint.open(tmp_path, "base_model")
        with pytest.raises(InputError, match=r"config\.json is not"):
            checkpoint.config  # noqa: B018 - reading the property is the test


def bare_folder(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def pytorch_folder(folder: Path) -> None:
    (folder / "consolidated.00.pth").write_bytes(b"")


def colliding_files(folder: Path) -> None:
    save_file({"w": torch.ones(1)}, folder / "a.safetensors")
    save_file({"w": torch.ones(1)}, folder / "b.safetensors")


def tensor_in_two_shards(folder: Path) -> None:
    make_sharded(folder)
    save_file({"c": torch.ones(1), "a": torch.ones(1)}, folder / "model-2.safetensors")


def several_indexes(folder: Path) -> None:
    (folder / "x.safetensors.index.json").write_text("{}")
    (folder / "y.safetensors.index.json").write_text("{}")


def missing_shard(folder: Path) -> None:
    make_sharded(folder)
    (folder / "model-2.safetensors").unlink()


def truncated_shard(folder: Path) -> None:
    make_sharded(folder)
    os.truncate(folder / "model-2.safetensors", (folder / "model-2.safetensors").stat().st_size - 1)


def index_of(weight_map: object):
    def make(folder: Path) -> None:
        make_sharded(folder)
        write_index(folder, weight_map)

    return make


def index_text(text: bytes):
    def make(folder: Path) -> None:
        make_sharded(folder).write_bytes(text)

    return make


BAD_FOLDERS = {
    "no weights": (bare_folder, r"models\[1\]: .*: holds no \.safetensors file$"),
    "pytorch weights": (pytorch_folder, "only consolidated.00.pth: convert it to safetensors"),
    "duplicate tensor over files": (
        colliding_files,
        r"models\[1\]: tensor 'w' is in two files, .*a\.saf.*b\.saf",
    ),
    "duplicate tensor over shards": (tensor_in_two_shards, r"tensor 'a' is in two files"),
    "several indexes": (several_indexes, r"several indexes \(x\.safetensors\.index\.json, y\.saf"),
    "missing shard": (missing_shard, r"names shard 'model-2\.safetensors', which is missing"),
    "truncated shard": (truncated_shard, r"model-2\.safetensors: .*\(1 bytes are missing\)"),
    "index is no JSON": (index_text(b"{"), r"index\.json is not valid JSON"),
    "index is no UTF-8": (index_text(b'{"\xff"'), r"index\.json is not UTF-8"),
    "index is a list": (index_text(b"[]"), r"index\.json is not a JSON object"),
    "index names a tensor twice": (
        index_text(b'{"weight_map": {"a": "model-1.safetensors", "a": "model-2.safetensors"}}'),
        "duplicate key 'a'",
    ),
    "no weight_map": (index_text(b"{}"), "has no weight_map"),
    "weight_map is a list": (index_of(["model-1.safetensors"]), "has no weight_map"),
    "weight_map is empty": (index_of({}), "has no weight_map"),
    "shard is a number": (index_of({"a": 1}), r"weight_map\['a'\] is not a file name: 1"),
    "shard is absolute": (index_of({"a": "/etc/passwd"}), "'/etc/passwd' leaves the folder"),
    "shard climbs out": (index_of({"a": "../model.safetensors"}), "leaves the folder"),
    "shard climbs out midway": (index_of({"a": "x/../../model.safetensors"}), "leaves the folder"),
    "shard with backslashes": (index_of({"a": "..\\model.safetensors"}), "leaves the folder"),
    "shard without a name": (index_of({"a": ""}), "leaves the folder"),
    "shard is the folder": (index_of({"a": "."}), "leaves the folder"),
    "shard with a zero byte": (index_of({"a": "a\0b"}), "which is missing"),
    "shard of half a surrogate pair": (index_of({"a": "\ud800"}), "which is missing"),
    "shard of 5000 characters": (index_of({"a": "x" * 5000}), "which is missing"),
    "index names a tensor that the shard lacks": (
        index_of({"a": "model-1.safetensors", "z": "model-2.safetensors"}),
        r"model-2\.safetensors holds tensor 'z', but it does not",
    ),
}


@pytest.mark.parametrize(("make", "fact"), BAD_FOLDERS.values(), ids=BAD_FOLDERS.keys())
def test_a_bad_folder_is_refused_in_one_line(tmp_path, make, fact):
    make(tmp_path)
    with pytest.raises(InputError, match=fact) as caught:
        Checkpoint.open(tmp_path, "models[1]")
    assert str(tmp_path) in one_line(caught)


@pytest.mark.parametrize("name", ["none", "none.safetensors", "x" * 5000, "a\0b"])
def test_a_missing_model_is_named(tmp_path, name):
    with pytest.raises(InputError, match=r"models\[1\]: .*: no such file or folder"):
        Checkpoint.open(tmp_path / name, "models[1]")


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.pkl").write_bytes(b"")
    with pytest.raises(InputError, match=r"model\.pkl: not a \.safetensors file; convert it"):
        Checkpoint.open(tmp_path / "model.pkl", "models[1]")


MOMENTS = torch.arange(6, dtype=torch.float32).reshape(2, 3)


def save_moments(path: Path, key: str, moments: torch.Tensor, **metadata: str) -> Path:
    """A curvature file of one tensor, in the format that the suffix of `path` says."""
    if path.suffix == ".safetensors":
        save_file({key: moments}, path, metadata=metadata or None)
    else:
        torch.save({"state": {key: {"exp_avg": torch.zeros_like(moments), "exp_avg_sq": moments}}}, path)
    return path


class TestCurvature:
    @pytest.mark.parametrize("file", ["v.safetensors", "v.pt", "v.pth", "v.bin"])
    @pytest.mark.parametrize("key", ["fc.weight", "fc.weight.exp_avg_sq"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_moments_are_found_and_read(self, tmp_path, file, key, dtype):
        moments = MOMENTS.to(getattr(torch, dtype))
        curvature = CurvatureFile.open(save_moments(tmp_path / file, key, moments), "models[0]")
        assert curvature.find("fc.weight") == key
        assert curvature.find("fc") is None
        assert curvature.shape("fc.weight") == (2, 3)
        assert curvature.bytes_per_element("fc.weight") == BY_NAME[dtype].itemsize
        assert curvature.total_bytes == moments.nbytes
        buffer = curvature.curvature("fc.weight").values
        assert len(buffer) == 6
        assert buffer.dtype == BY_NAME[dtype]
        assert buffer.origin == str(tmp_path / file)
        assert not buffer.data.flags.writeable
        assert buffer.data.tobytes() == moments.view(torch.uint8).numpy().tobytes()
        curvature.close()

    def test_the_moment_wins_over_a_tensor_of_the_bare_name(self, tmp_path):
        save_file({"w": torch.ones(2), "w.exp_avg_sq": torch.ones(3)}, tmp_path / "v.safetensors")
        assert CurvatureFile.open(tmp_path / "v.safetensors", "models[0]").shape("w") == (3,)

    @pytest.mark.parametrize("entry", ["folder", "index"])
    def test_moments_may_be_sharded(self, tmp_path, entry):
        index = make_sharded(tmp_path)
        curvature = CurvatureFile.open(tmp_path if entry == "folder" else index, "models[0]")
        assert curvature.shape("b") == (2, 2)
        assert len(curvature.curvature("c").values) == 3
        assert [name for name, _, _ in curvature.fingerprint()] == [
            "model-1.safetensors",
            "model-2.safetensors",
        ]

    @linux_only
    @pytest.mark.parametrize("file", ["v.safetensors", "v.pt"])
    def test_moments_lie_in_the_map_and_nothing_is_leaked(self, tmp_path, file):
        path = save_moments(tmp_path / file, "w", torch.ones(50_000))
        before = descriptors_and_maps()
        curvature = CurvatureFile.open(path, "models[0]")
        buffer = curvature.curvature("w").values
        start, stop = mapped_range(path)
        assert start <= buffer.data.ctypes.data
        assert buffer.data.ctypes.data + buffer.data.nbytes <= stop
        assert buffer.data.any()
        assert resident_kib(path) >= buffer.data.nbytes // 1024
        advise(buffer.data, "dontneed")
        assert resident_kib(path) < buffer.data.nbytes // 1024
        np.testing.assert_array_equal(buffer.data.view(np.float32), np.ones(50_000))
        curvature.close()
        del buffer
        assert descriptors_and_maps() == before

    def test_a_torch_buffer_outlives_its_file(self, tmp_path):
        curvature = CurvatureFile.open(save_moments(tmp_path / "v.pt", "w", MOMENTS), "models[0]")
        data = curvature.curvature("w").values.data
        curvature.close()
        del curvature
        gc.collect()
        np.testing.assert_array_equal(data.view(np.float32), np.arange(6))

    def test_scalars_and_empty_moments(self, tmp_path):
        state = {"s": {"exp_avg_sq": torch.tensor(2.0)}, "e": {"exp_avg_sq": torch.ones(0, 3)}}
        torch.save({"state": state}, tmp_path / "v.pt")
        curvature = CurvatureFile.open(tmp_path / "v.pt", "models[0]")
        assert (curvature.shape("s"), len(curvature.curvature("s").values)) == ((), 1)
        assert (curvature.shape("e"), len(curvature.curvature("e").values)) == ((0, 3), 0)

    def test_states_without_moments_are_passed_over(self, tmp_path):
        state = {"w": {"exp_avg_sq": torch.ones(2)}, "frozen": {}}
        torch.save({"state": state}, tmp_path / "v.pt")
        curvature = CurvatureFile.open(tmp_path / "v.pt", "models[0]")
        assert curvature.find("frozen") is None

    @pytest.mark.parametrize("file", ["v.safetensors", "v.pt"])
    @pytest.mark.parametrize("dtype", ["float64", "int32", "float8_e4m3fn"])
    def test_other_dtypes_are_refused_by_name(self, tmp_path, file, dtype):
        path = save_moments(tmp_path / file, "w", torch.ones(2).to(getattr(torch, dtype)))
        curvature = CurvatureFile.open(path, "models[0]")
        with pytest.raises(
            InputError, match=f"models.*{file}: tensor 'w' is {dtype}; curvature must be float32"
        ):
            curvature.curvature("w")

    @pytest.mark.parametrize("file", ["v.safetensors", "v.pt"])
    def test_a_name_without_moments_is_an_error(self, tmp_path, file):
        curvature = CurvatureFile.open(save_moments(tmp_path / file, "w", MOMENTS), "models[0]")
        with pytest.raises(InputError, match="no curvature for tensor 'v'"):
            curvature.curvature("v")

    @pytest.mark.parametrize("file", ["v.safetensors", "v.pt"])
    def test_the_fingerprint_is_name_size_and_time(self, tmp_path, file):
        path = save_moments(tmp_path / file, "w", MOMENTS)
        os.utime(path, ns=(5, 5))
        assert CurvatureFile.open(path, "models[0]").fingerprint() == [[file, path.stat().st_size, 5]]


class TestBiasCorrection:
    def test_safetensors_metadata(self, tmp_path):
        path = save_moments(tmp_path / "v.safetensors", "w", MOMENTS, step="10", beta2="0.95")
        assert CurvatureFile.open(path, "models[0]").bias_correction("w") == 1 - 0.95**10

    @pytest.mark.parametrize("step", [10, torch.tensor(10.0)], ids=["int", "tensor"])
    def test_a_real_optimizer_state(self, tmp_path, step):
        state = {"w": {"exp_avg_sq": MOMENTS, "step": step}}
        groups = [{"betas": (0.9, 0.95), "params": ["w"]}, {"betas": (0.8, 0.95), "params": []}]
        torch.save({"state": state, "param_groups": groups}, tmp_path / "v.pt")
        assert CurvatureFile.open(tmp_path / "v.pt", "models[0]").bias_correction("w") == 1 - 0.95**10

    @pytest.mark.parametrize(
        ("metadata", "fact"),
        [
            pytest.param({}, 'metadata "step" is missing', id="nothing"),
            pytest.param({"step": "10"}, 'metadata "beta2" is missing', id="no beta2"),
            pytest.param({"step": "ten", "beta2": "0.9"}, "is not a number: 'ten'", id="step is a word"),
            pytest.param(
                {"step": "0", "beta2": "0.9"}, "step > 0 and 0 < beta2 < 1, not step 0", id="step 0"
            ),
            pytest.param({"step": "nan", "beta2": "0.9"}, "not step nan", id="step nan"),
            pytest.param({"step": "10", "beta2": "1"}, "beta2 1.0", id="beta2 is 1"),
        ],
    )
    def test_bad_metadata(self, tmp_path, metadata, fact):
        path = save_moments(tmp_path / "v.safetensors", "w", MOMENTS, **metadata)
        with pytest.raises(InputError, match=re.escape(fact)):
            CurvatureFile.open(path, "models[0]").bias_correction("w")

    @pytest.mark.parametrize(
        ("step", "groups", "fact"),
        [
            pytest.param(None, [{"betas": (0.9, 0.99)}], "step of 'w' is missing", id="no step"),
            pytest.param(
                torch.ones(2, 2), [{"betas": (0.9, 0.99)}], "is not a number", id="step is a matrix"
            ),
            pytest.param(3, None, "betas[1] of param_groups is missing", id="no groups"),
            pytest.param(3, [], "betas[1] of param_groups is missing", id="empty groups"),
            pytest.param(3, [{"lr": 1}], "betas[1] of param_groups is missing", id="no betas"),
            pytest.param(
                3, [{"betas": (0.9, 0.99)}, {"betas": (0.9, 0.95)}], "differ in beta2", id="two beta2"
            ),
        ],
    )
    def test_bad_optimizer_states(self, tmp_path, step, groups, fact):
        state = {"w": {"exp_avg_sq": MOMENTS} | ({} if step is None else {"step": step})}
        torch.save({"state": state} | ({} if groups is None else {"param_groups": groups}), tmp_path / "v.pt")
        with pytest.raises(InputError, match=re.escape(fact)) as caught:
            CurvatureFile.open(tmp_path / "v.pt", "models[0]").bias_correction("w")
        one_line(caught)


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("made-by-the-pickle",)


def state_of(moments: object) -> dict:
    return {"state": {"w": {"exp_avg_sq": moments}}}


BAD_TORCH_FILES = {
    "needs code": ({"state": RunsCode()}, r"would run code to load \(\w+\.mkdir\)"),
    "needs a class": ({"state": defaultdict(dict)}, r"would run code to load \(collections\.defaultdict\)"),
    "a list": ([1], "not an optimizer file"),
    "no state": ({"model": {}}, "not an optimizer file"),
    "state is a tensor": ({"state": torch.ones(1)}, "not an optimizer file"),
    "integer keys": (
        {"state": {0: {"exp_avg_sq": MOMENTS}}},
        "keyed by 0, .*moments extract",
    ),
    "entry is a tensor": ({"state": {"w": MOMENTS}}, r"state\['w'\] is not a dict"),
    "no moments": ({"state": {"w": {"exp_avg": MOMENTS}}}, "holds no exp_avg_sq"),
    "moment is a number": (state_of(1.0), "'w' is not a plain contiguous tensor"),
    "moment is transposed": (state_of(MOMENTS.T), "'w' is not a plain contiguous tensor"),
    "moment is expanded": (state_of(torch.ones(1).expand(9)), "'w' is not a plain contiguous tensor"),
    "moment is sparse": (state_of(MOMENTS.to_sparse()), "'w' is not a plain contiguous tensor"),
    "moment is meta": (state_of(torch.ones(3, device="meta")), "'w' is not a plain contiguous tensor"),
}


@pytest.mark.parametrize(("content", "fact"), BAD_TORCH_FILES.values(), ids=BAD_TORCH_FILES.keys())
def test_a_bad_torch_file_is_refused_in_one_line(tmp_path, monkeypatch, content, fact):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "v.pt")
    with pytest.raises(InputError, match=fact) as caught:
        CurvatureFile.open(tmp_path / "v.pt", "models[0]")
    assert one_line(caught).startswith(f"models[0]: {tmp_path / 'v.pt'}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["v.pt"]


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.99])
def test_a_truncated_torch_file_is_refused(tmp_path, keep):
    path = save_moments(tmp_path / "v.pt", "w", torch.ones(1000))
    os.truncate(path, keep if isinstance(keep, int) else int(path.stat().st_size * keep))
    with pytest.raises(InputError, match=r"v\.pt: not a complete, uncompressed torch file") as caught:
        CurvatureFile.open(path, "models[0]")
    one_line(caught)


def test_a_torch_file_of_the_old_format_is_refused(tmp_path):
    torch.save(state_of(MOMENTS), tmp_path / "v.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"not a complete, uncompressed torch file: torch\.save it again"):
        CurvatureFile.open(tmp_path / "v.pt", "models[0]")


def test_a_compressed_torch_file_is_refused(tmp_path):
    torch.save({"state": {name: {"exp_avg_sq": torch.rand(999)} for name in "vw"}}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "v.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    with pytest.raises(InputError, match="not a complete, uncompressed torch file"):
        CurvatureFile.open(tmp_path / "v.pt", "models[0]")


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("none.pt", "no such file"),
        ("none.safetensors", "no such file or folder"),
        ("none", "not a folder, and not one of"),
        (
            "v.npz",
            r"not a folder, and not one of \.safetensors, \.safetensors\.index\.json, \.pt, \.pth, \.bin",
        ),
    ],
)
def test_a_curvature_path_that_cannot_be_read_is_named(tmp_path, name, fact):
    with pytest.raises(InputError, match=rf"models\[0\]: .*{name}: {fact}"):
        CurvatureFile.open(tmp_path / name, "models[0]")


class FakeHub(types.ModuleType):
    """Stands in for huggingface_hub: records what is asked for, and answers with `answer`."""

    def __init__(self, answer: Path | Exception):
        super().__init__("huggingface_hub")
        self.answer = answer
        self.calls: list[tuple] = []

    def snapshot_download(self, repo_id, *, revision, allow_patterns, ignore_patterns):
        self.calls.append((repo_id, revision))
        self.patterns = (allow_patterns, ignore_patterns)
        return self._answer()

    def hf_hub_download(self, repo_id, filename, *, revision):
        self.calls.append((repo_id, revision, filename))
        return self._answer()

    def _answer(self) -> str:
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


class TestHub:
    @pytest.fixture
    def fake(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        fake = FakeHub(tmp_path / "snapshot")
        monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
        return fake

    @pytest.mark.parametrize("resolve", [hub.resolve_model, hub.resolve_file])
    def test_a_local_path_is_never_looked_up(self, fake, tmp_path, resolve):
        (tmp_path / "org" / "name").mkdir(parents=True)
        assert resolve("org/name") == Path("org/name")
        assert resolve(str(tmp_path)) == tmp_path
        assert fake.calls == []

    def test_the_home_folder_is_expanded(self, fake, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "model").mkdir()
        assert hub.resolve_model("~/model") == tmp_path / "model"

    @pytest.mark.parametrize(
        ("text", "call"),
        [
            ("org/name", ("org/name", None)),
            ("meta-llama/Llama-3.2-1B", ("meta-llama/Llama-3.2-1B", None)),
            ("org/name@v1.0", ("org/name", "v1.0")),
            ("org/name@refs/pr/1", ("org/name", "refs/pr/1")),
        ],
    )
    @pytest.mark.parametrize("resolve", [hub.resolve_model, hub.resolve_file])
    def test_a_model_is_fetched(self, fake, tmp_path, resolve, text, call):
        assert resolve(text) == tmp_path / "snapshot"
        assert fake.calls == [call]

    def test_of_a_stack_the_weights_of_its_modules_are_fetched_too(self, fake, tmp_path):
        folder = tmp_path / "snapshot"
        folder.mkdir()
        (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}]))
        assert hub.resolve_model("org/name") == folder
        assert fake.calls == [("org/name", None)] * 2
        allowed, ignored = fake.patterns
        assert allowed == ["2_Dense/*.safetensors"]
        assert not any(fnmatch("2_Dense/model.safetensors", pattern) for pattern in ignored)

    def test_of_a_model_without_safetensors_the_torch_files_are_fetched(self, fake, tmp_path):
        folder = tmp_path / "snapshot"
        folder.mkdir()
        assert hub.resolve_model("org/name@v1") == folder
        assert fake.calls == [("org/name", "v1")] * 2
        allowed, _ = fake.patterns
        assert any(fnmatch("pytorch_model-00001-of-00002.bin", pattern) for pattern in allowed)
        (folder / "pytorch_model.bin").touch()
        hub.resolve_model("org/name@v1")
        assert len(fake.calls) == 3

    @pytest.mark.parametrize("text", ["gpt2", "bert-base-uncased", "gpt2@main"])
    def test_a_model_without_an_organisation_is_fetched(self, fake, tmp_path, text):
        assert hub.resolve_model(text) == tmp_path / "snapshot"
        name, _, revision = text.partition("@")
        assert fake.calls == [(name, revision or None)]

    @pytest.mark.parametrize(
        ("file", "fetched"),
        [
            ("model-00001-of-00002.safetensors", True),
            ("model.safetensors.index.json", True),
            ("tokenizer.model", True),
            ("merges.txt", True),
            ("chat_template.jinja", True),
            ("qwen.tiktoken", True),
            ("modeling_x.py", True),
            ("LICENSE", True),
            ("pytorch_model.bin", False),
            ("original/consolidated.00.pth", False),
            ("original/model.safetensors", False),
            ("consolidated.safetensors", False),
        ],
    )
    def test_only_what_a_merge_reads_is_fetched(self, fake, file, fetched):
        hub.resolve_model("org/name")
        allowed, ignored = fake.patterns
        assert (
            any(fnmatch(file, p) for p in allowed) and not any(fnmatch(file, p) for p in ignored)
        ) is fetched

    @pytest.mark.parametrize(
        ("text", "call"),
        [
            ("org/name/v.safetensors", ("org/name", None, "v.safetensors")),
            ("org/name/deep/er/v.pt", ("org/name", None, "deep/er/v.pt")),
            ("org/name:deep/v.pt", ("org/name", None, "deep/v.pt")),
            ("org/name@v1/deep/v.pt", ("org/name", "v1", "deep/v.pt")),
            ("org/name@v1:v.pt", ("org/name", "v1", "v.pt")),
            ("org/name@refs/pr/1:deep/v.pt", ("org/name", "refs/pr/1", "deep/v.pt")),
        ],
    )
    def test_a_file_is_fetched(self, fake, tmp_path, text, call):
        assert hub.resolve_file(text) == tmp_path / "snapshot"
        assert fake.calls == [call]

    @pytest.mark.parametrize(
        "text",
        ["", "x.safetensors", "./a", "../a/b", "/a/b", "a/b/c", "a//b", "a\0/b", "~nobody/x", "a/b@x/../y"],
    )
    def test_what_is_no_hub_model_is_refused_without_asking(self, fake, text):
        with pytest.raises(InputError, match="not a local folder, and not a hub id") as caught:
            hub.resolve_model(text)
        one_line(caught)
        assert fake.calls == []

    @pytest.mark.parametrize(
        "text", ["", "v.pt", "./v.pt", "/a/b/v.pt", "org/name/../../v.pt", "org/name:../v.pt"]
    )
    def test_what_is_no_hub_file_is_refused_without_asking(self, fake, text):
        with pytest.raises(InputError, match="not a local file, and not a hub file"):
            hub.resolve_file(text)
        assert fake.calls == []

    @pytest.mark.parametrize(
        ("resolve", "text"), [(hub.resolve_model, "org/name"), (hub.resolve_file, "org/name/v.safetensors")]
    )
    def test_without_the_extra_it_says_how_to_get_it(self, fake, monkeypatch, resolve, text):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(InputError, match=r"pip install 'ota-kernels\[hub\]'"):
            resolve(text)

    @pytest.mark.parametrize(
        ("resolve", "text"), [(hub.resolve_model, "org/name"), (hub.resolve_file, "org/name/v.safetensors")]
    )
    def test_a_failure_of_the_hub_is_one_line(self, fake, resolve, text):
        fake.answer = OSError("404 Client Error.\n\nRepository Not Found for url: x")
        with pytest.raises(InputError, match=r"404 Client Error\. Repository Not Found") as caught:
            resolve(text)
        assert repr(text) in one_line(caught)
