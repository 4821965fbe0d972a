"""Shapes and places of very large models: sparse files of terabytes, links, network file systems."""

from __future__ import annotations

import os
import shutil
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from checkpoints import make_set, model_digests
from jobs import Interrupt, merge

from bench import large
from ota_kernels.io import filesystems
from ota_kernels.run.engine import Engine
from ota_kernels.run.job import Job, Options, as_recipe
from ota_kernels.run.pool import IN_PLACE
from ota_kernels.run.readahead import ReadAhead
from ota_kernels.run.rules import Rules
from ota_kernels.select.pending import Store


def sparse_model(folder: Path, shapes: dict[str, tuple[int, ...]], shards: int) -> Path:
    try:
        return large.sparse_model(folder, shapes, shards)
    except OSError:
        pytest.skip("this file system has no files of so many bytes")


def recipe_of(folders, method="linear", **parameters):
    models = [{"model": str(folder), "parameters": parameters} for folder in folders]
    return {"merge_method": method, "models": models}


def test_a_merge_of_terabytes_begins_within_seconds(tmp_path, monkeypatch):
    """2.4 TB of 405 B parameters, 1 138 tensors in 400 shards each; stopped at its 60th tile."""
    shapes = large.dense() | {"model.scale": ()}
    folders = [sparse_model(tmp_path / name, shapes, 400) for name in "abc"]
    monkeypatch.setattr(os, "posix_fallocate", lambda fd, offset, size: None)  # of 0.8 TB that are not there
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 50}))
    begun, seen, advanced = time.process_time(), [], []

    def before(step, segment):
        seen.append(time.process_time() - begun)
        stop(step, segment)

    class Told:
        def stage(self, name, total_bytes):
            pass

        def advance(self, nbytes):
            advanced.append(nbytes)

    stop = Interrupt("tile", 60)
    with pytest.raises(KeyboardInterrupt):
        merge(
            recipe_of(folders, weight=1.0),
            tmp_path / "out",
            Rules(before=before),
            progress=Told(),
            memory_limit="300MB",
        )
    assert seen[0] < 10  # seconds of processors until the first tile
    assert len([nbytes for nbytes in advanced if nbytes]) > 30


@dataclass
class Seen:
    """A Sink that keeps what is merged."""

    data: dict = field(default_factory=dict)

    def room(self, segment, nbytes):
        return np.empty(nbytes, np.uint8)

    def write(self, segment, merged, final):
        self.data[segment] = merged.copy()

    def wants(self, tensor, segment):
        pass

    def done_with(self, tile):
        pass


def test_elements_beyond_2_to_the_31(tmp_path):
    shape = (152_064, 16_384)  # 2.5e9
    last = shape[0] * shape[1] - 1
    folders = [sparse_model(tmp_path / name, {"embed": shape}, 1) for name in "ab"]
    for folder, value in zip(folders, (2.0, 3.0), strict=True):
        (file,) = folder.glob("*.safetensors")
        with file.open("rb+") as stream:
            stream.seek(-2, os.SEEK_END)
            stream.write(struct.pack("<f", value)[2:])
    with Job(as_recipe(recipe_of(folders, weight=1.0)), Options.of()) as job:
        (index,) = job.tensors
        decider, sink = job.decider(IN_PLACE), Seen()
        engine = Engine(
            job.tensors,
            sink,
            decider=decider,
            found=decider.decide_model(),
            tile_elements=1 << 12,
            store=Store(1 << 20),
        )
        for _ in engine.run([(index, last - 5_000, last + 1)]):
            pass
    merged = np.concatenate([sink.data[segment] for segment in sorted(sink.data)]).view(np.uint16)
    assert merged[-1] == 0x4020  # 2.5
    assert not merged[:-1].any()


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_files_of_one_inode(tmp_path, link):
    """As snapshots of the hub are: links to blobs, which models may share."""
    models = make_set(tmp_path / "models", {"w": (30, 40), "v": (5, 2, 3)}, experts=2)
    shutil.copy(models.expert_folders[0] / "model.safetensors", models.expert_folders[1])
    merge(models.recipe(density=0.3), tmp_path / "expected")
    blob = tmp_path / "blob"
    shutil.move(models.expert_folders[0] / "model.safetensors", blob)
    for folder in models.expert_folders:
        (folder / "model.safetensors").unlink(missing_ok=True)
        link(blob, folder / "model.safetensors")
    merge(models.recipe(density=0.3), tmp_path / "out")
    assert model_digests(tmp_path / "out") == model_digests(tmp_path / "expected")


class TestNetworkFiles:
    @pytest.fixture(autouse=True)
    def not_cached(self, monkeypatch):
        monkeypatch.setattr(ReadAhead, "is_idle", False)

    def test_are_read_ahead_and_it_is_said(self, tmp_path, monkeypatch, caplog):
        models = make_set(tmp_path / "models", {f"w{i}": (300, 40) for i in range(6)}, experts=2)
        merge(models.recipe(precond_threshold=1e-16), tmp_path / "expected")
        reads, preadv = [], os.preadv

        def counted(descriptor, rooms, offset, *flags):
            reads.append((os.fstat(descriptor).st_ino, offset, sum(map(len, rooms))))
            return preadv(descriptor, rooms, offset, *flags)

        monkeypatch.setattr(filesystems, "type_of", lambda path: 0x6969)
        monkeypatch.setattr(os, "preadv", counted)
        descriptors = len(os.listdir("/proc/self/fd"))
        with caplog.at_level("INFO", "ota_kernels"):
            merge(models.recipe(precond_threshold=1e-16), tmp_path / "out")
        assert len(os.listdir("/proc/self/fd")) == descriptors
        monkeypatch.undo()
        assert model_digests(tmp_path / "out") == model_digests(tmp_path / "expected")
        weights = (models.base_folder / "model.safetensors").stat().st_ino
        assert sum(size for inode, _, size in reads if inode == weights) >= 6 * 300 * 40 * 2
        (line,) = {m for m in caplog.messages if str(models.base_folder) in m and "read ahead" in m}
        assert line == f"{models.base_folder} is on NFS: files are read ahead, 16 at a time"

    def test_of_this_machine_are_known(self, tmp_path):
        assert filesystems.type_of(str(tmp_path)) > 0
        assert filesystems.type_of("/proc") == 0x9FA0
        assert filesystems.slow_maps("/proc") is None
        assert filesystems.slow_maps(str(tmp_path / "missing")) is None
