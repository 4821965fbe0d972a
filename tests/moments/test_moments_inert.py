"""Checkpoints with a run's own objects, and hostile ones: what is needed is read, nothing is run."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import enum
import io
import os
import pathlib
import pickle
import random
import sys
import zipfile
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from optimizers import STEPS, adam_state, assert_extracted

from ota_kernels import InputError
from ota_kernels.io.inert import Inert, InertUnpickler, load_inert
from ota_kernels.moments import extract


@dataclasses.dataclass
class Settings:
    lr: float
    path: pathlib.Path


class Stage(enum.IntEnum):
    two = 2


class Words(list):
    """A list of a class of its own, as configurations are."""


def run_objects():
    """What training scripts save beside an optimizer."""
    return {
        "args": argparse.Namespace(lr=1e-3, out=pathlib.Path("/tmp/x")),
        "best": np.float64(1.5),
        "numpy_rng": np.random.get_state(),
        "generator": np.random.default_rng(0),
        "python_rng": random.getstate(),
        "settings": Settings(1e-3, pathlib.PurePosixPath("a")),
        "stage": Stage.two,
        "counts": Counter("aab"),
        "nested": defaultdict(list, {"x": [1]}),
        "words": Words(["a", "b"]),
        "device": torch.device("cpu"),
        "scheduler": torch.optim.lr_scheduler.LambdaLR,
        "size": torch.Size([2, 3]),
        "set": {1, 2},
        "sparse": torch.eye(3).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
    }


def content(**more):
    return {
        "state": {"w": adam_state()},
        "param_groups": [{"params": ["w"], "betas": (0.9, np.float64(0.99)), "lr": np.float32(1e-3)}],
    } | more


@pytest.mark.parametrize("beside", ["top", "state's holder"])
def test_objects_of_a_run(tmp_path, beside):
    one = content()
    file = run_objects() | ({"optimizer": one} if beside == "state's holder" else one)
    torch.save(file, tmp_path / "a.pt")
    summary = extract(tmp_path / "a.pt", tmp_path / "v.safetensors")
    assert_extracted(tmp_path / "v.safetensors", {"w": one["state"]["w"]["exp_avg_sq"]})
    assert (summary.step, summary.beta2) == (STEPS, 0.99)


@pytest.mark.parametrize(
    "step", [np.int64(9), np.float32(9), 9, torch.tensor(9)], ids=lambda s: type(s).__name__
)
def test_numbers_that_numpy_saved(tmp_path, step):
    file = content()
    file["state"]["w"]["step"] = step
    torch.save(file, tmp_path / "a.pt")
    assert extract(tmp_path / "a.pt", tmp_path / "v.safetensors").step == 9


def test_what_is_read_is_what_torch_reads(tmp_path):
    """Every kind of tensor and container, against torch.load itself."""
    base = torch.arange(24.0).reshape(2, 3, 4)
    saved = {
        "view": base[1, :, 1:3],
        "transposed": base.permute(2, 0, 1),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "bf16": torch.randn(5).bfloat16(),
        "fp8": torch.randn(5).to(torch.float8_e4m3fn),
        "uint16": torch.tensor([1, 2, 3], dtype=torch.uint16),
        "bool": torch.tensor([True, False]),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "list": [1, 2.5, "x", None, (True,), {"y": {1, 2}}],
        "ordered": OrderedDict(a=torch.ones(2)),
        "dtype": torch.float16,
        "complex": 1 + 2j,
        "bytes": b"abc",
    }
    torch.save(saved, tmp_path / "a.pt")
    found, expected = load_inert(tmp_path / "a.pt"), torch.load(tmp_path / "a.pt")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype
            assert found[name].stride() == value.stride()
            assert torch.equal(found[name].float(), value.detach().float()), name
        elif name != "ordered":
            assert found[name] == value
    assert torch.equal(found["ordered"]["a"], torch.ones(2))


def test_an_object_keeps_what_it_was_given(tmp_path):
    torch.save(run_objects(), tmp_path / "a.pt")
    found = load_inert(tmp_path / "a.pt")
    assert isinstance(found["args"], Inert)
    assert found["args"].path == "argparse.Namespace"
    assert found["args"].attributes["lr"] == 1e-3
    assert found["settings"].attributes["lr"] == 1e-3
    assert found["words"].items == ["a", "b"]
    assert (found["best"], found["size"], found["set"]) == (1.5, (2, 3), {1, 2})


class Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


def hostile(folder):
    """Ways to run code that a pickle has: each would make a file in `folder`."""
    there = str(folder / "boom")
    return {
        "call": Calls(os.mkdir, there),
        "eval": Calls(eval, f"__import__('os').mkdir({there!r})"),
        "getattr": Calls(getattr, Calls(__import__, "os"), "mkdir"),
        "import": Calls(__import__, "this"),
        "nested call": Calls(map, os.mkdir, [there]),
        "type": Calls(type, "X", (object,), {}),
        "torch": Calls(torch.load, there),
        "open": Calls(open, there, "w"),
    }


@pytest.mark.parametrize("way", hostile(pathlib.Path("x")))
@pytest.mark.parametrize("place", ["beside", "in the state", "as the state", "in the groups"])
def test_nothing_of_a_hostile_file_is_imported_or_called(tmp_path, monkeypatch, way, place):
    bomb = hostile(tmp_path)[way]
    file = content()
    if place == "beside":
        file["bomb"] = bomb
    elif place == "in the state":
        file["state"]["w"]["step"] = bomb
    elif place == "as the state":
        file["state"]["w"] = bomb
    else:
        file["param_groups"][0]["betas"] = (0.9, bomb)
    torch.save(file, tmp_path / "a.pt")
    seen = []
    sys.modules.pop("this", None)
    monkeypatch.setattr("builtins.__import__", watching(seen, __import__))
    with contextlib.nullcontext() if place == "beside" else pytest.raises(InputError, match=r"^[^\n]*$"):
        extract(tmp_path / "a.pt", tmp_path / "v.safetensors")
    assert not (tmp_path / "boom").exists()
    assert "this" not in sys.modules
    assert "this" not in seen


def watching(seen, real):
    def watched(name, *args, **more):
        seen.append(name)
        return real(name, *args, **more)

    return watched


def pickled(*steps: bytes) -> InertUnpickler:
    return InertUnpickler(io.BytesIO(b"\x80\x02" + b"".join(steps) + b"."))


def test_what_a_file_names_is_never_the_real_thing():
    for module, name in (("os", "system"), ("builtins", "exec"), ("builtins", "getattr"), ("torch", "load")):
        found = pickled(f"c{module}\n{name}\n".encode()).load()
        assert isinstance(found, type)
        assert issubclass(found, Inert)
        assert found.path == f"{module}.{name}"


def test_a_file_cannot_change_what_builds_the_next(tmp_path):
    """BUILD sets attributes of what lies on the stack: it may not reach functions or classes of ours."""
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n"
    attributes = pickle.dumps((None, {"__defaults__": (1,), "__code__": 1, "path": "x"}), 2)[2:-1]
    for target in (tensor, b"ccollections\nOrderedDict\n", b"cos\nsystem\n"):
        with contextlib.suppress(AttributeError, TypeError):
            pickled(target, attributes, b"b").load()
    assert Inert.path == "unknown"
    torch.save({"x": torch.ones(2)}, tmp_path / "a.pt")
    assert torch.equal(load_inert(tmp_path / "a.pt")["x"], torch.ones(2))


def test_tensors_beyond_their_storage(tmp_path):
    torch.save({"x": torch.ones(4)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    (name,) = (name for name in entries if name.endswith("data.pkl"))
    assert b"K\x04\x85" in entries[name]
    entries[name] = entries[name].replace(b"K\x04\x85", b"K\x63\x85")
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        for entry, data in entries.items():
            archive.writestr(entry, data)
    with pytest.raises(InputError, match=r"b\.pt: cannot be read, it is damaged"):
        extract(tmp_path / "b.pt", tmp_path / "v.safetensors")


def test_compressed_and_foreign_archives(tmp_path):
    torch.save(content(), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, data in entries.items():
            archive.writestr(entry, data)
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as archive:
        archive.writestr("x", b"y")
    for name in ("b.pt", "c.pt"):
        with pytest.raises(InputError, match="not a complete, uncompressed torch file"):
            extract(tmp_path / name, tmp_path / "v.safetensors")
