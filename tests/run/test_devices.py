"""Several GPUs of one machine: which process has which, and how the processes come about."""

from __future__ import annotations

import os
import sys
import types

import pytest
import torch
from checkpoints import make_set
from click.testing import CliRunner

from ota_kernels import BackendError, RecipeError, backends, processors
from ota_kernels.cli import cli
from ota_kernels.processors import default_threads
from ota_kernels.run import devices


@pytest.fixture(autouse=True)
def gpus(monkeypatch):
    """Three, to look at."""
    monkeypatch.setattr(devices, "_count", lambda: 3)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def torchrun(monkeypatch):
    def started(local_rank):
        names = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
        for name, value in (names | {"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": "4"}).items():
            monkeypatch.setenv(name, value)

    return started


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cuda", ["cuda:0", "cuda:1", "cuda:2"]),
        ("cuda:0,2", ["cuda:0", "cuda:2"]),
        ("cuda:1", ["cuda:1"]),
        ("cpu", ["cpu"]),
        ("auto", ["auto"]),
    ],
)
def test_which_are_named(device, expected):
    assert devices.devices_of(device) == expected
    assert devices.take_device(device) == device  # of a process alone: its backend says what it means


def test_each_process_has_its_own(torchrun):
    found = []
    for rank in range(4):
        torchrun(rank)
        found.append([devices.take_device(device) for device in ("cuda", "cuda:0,2", "cpu")])
    assert [f[0] for f in found] == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    assert [f[1] for f in found] == ["cuda:0", "cuda:2"] * 2
    assert {f[2] for f in found} == {"cpu"}
    assert devices.command("cuda", ["run"]) is None  # there are processes already


def test_auto_is_a_gpu_for_each_where_there_are_some(torchrun, monkeypatch):
    torchrun(1)
    monkeypatch.setattr("ota_kernels.backends.triton.gpu_in_sight", lambda: (True, ""))
    assert devices.take_device("auto") == "cuda:1"
    monkeypatch.setattr("ota_kernels.backends.triton.gpu_in_sight", lambda: (False, ""))
    assert devices.take_device("auto") == "auto"


def test_a_process_stays_near_its_gpu(torchrun, monkeypatch, tmp_path):
    """On the processors of the GPU's memory node, as many threads as before; anywhere, where none is told."""
    for number, near in enumerate(("0-1,4", "2-3", "")):
        folder = tmp_path / f"0000:{0x17 + number:02x}:00.0"
        folder.mkdir()
        (folder / "local_cpulist").write_text(f"{near}\n")
    monkeypatch.setattr(devices.bus, "PCI", tmp_path)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: types.SimpleNamespace(
            pci_domain_id=0, pci_bus_id=0x17 + int(device[-1]), pci_device_id=0
        ),
    )
    monkeypatch.setattr(processors, "_all", None)
    allowed = [set(range(4))]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed[-1])
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, near: allowed.append(set(near)))
    found = []
    for rank in range(3):
        torchrun(rank)
        del allowed[1:]
        threads = default_threads()
        assert devices.take_device("cuda") == f"cuda:{rank}"
        assert default_threads() == threads == 1
        found.append(allowed[-1])
    assert found == [{0, 1}, {2, 3}, {0, 1, 2, 3}]


def test_processors_are_shared(torchrun, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(10), raising=False)
    assert default_threads() == 10
    torchrun(0)
    assert default_threads() == 2


@pytest.mark.parametrize(("device", "count"), [("cuda", 3), ("cuda:0,2", 2), ("cuda:1", 0), ("cpu", 0)])
def test_run_starts_a_process_for_each(tmp_path, monkeypatch, device, count):
    started = []

    def execv(path, command):
        started.append(command)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", execv)
    recipe = make_set(tmp_path / "models", {"a": (5, 6)}, experts=2).recipe_file()
    arguments = ["run", str(recipe), str(tmp_path / "out"), "--device", device]
    monkeypatch.setattr(sys, "argv", ["ota-merge", *arguments])
    CliRunner().invoke(cli, arguments)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    assert started == ([[*launcher, "-m", "ota_kernels", *arguments]] if count else [])


def test_wrong_lists():
    for device in ("cuda:0,", "cuda:,1", "cuda:0,a"):
        with pytest.raises(RecipeError, match="unknown device"):
            backends.check_device(device)
    with pytest.raises(RecipeError, match="twice"):
        backends.check_device("cuda:1,1")
    with pytest.raises(BackendError, match="a process for each"):
        backends.select("auto", "cuda:0,1")
