"""Which backend runs where, and why another does not; the machines are made up."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from ota_kernels import BackendError, RecipeError, backends
from ota_kernels.backends import native, triton


@pytest.fixture(autouse=True)
def without_interpreter(monkeypatch):
    for name in (
        "TRITON_INTERPRET",
        "CUDA_VISIBLE_DEVICES",
        "HIP_VISIBLE_DEVICES",
        "ROCR_VISIBLE_DEVICES",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(triton, "_SIGNS", {})


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """Two GPUs; a dictionary whose `failure` says why kernels do not run there."""
    from ota_kernels.backends.triton import device as probe

    state = {"failure": ""}
    (tmp_path / "nvidiactl").touch()
    signs = {str(tmp_path / "nvidiactl"): ("CUDA_VISIBLE_DEVICES",)}
    monkeypatch.setattr(triton, "_SIGNS", signs)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(probe, "failure", lambda device: state["failure"])
    triton._on.cache_clear()
    yield state
    triton._on.cache_clear()


def test_auto_without_a_gpu(no_gpu, caplog):
    with caplog.at_level(logging.INFO, "ota_kernels"):
        assert backends.select() is native
    (line,) = caplog.messages
    assert line.startswith("backend: native (")
    assert "not triton: no GPU" in line


def test_auto_with_a_gpu(gpus, caplog):
    with caplog.at_level(logging.INFO, "ota_kernels"):
        found = backends.select()
    assert (found.NAME, str(found.device)) == ("triton", "cuda:1")
    assert "GPU 1" in caplog.text


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("auto", "cuda", "cuda:1"),
        ("auto", "cuda:0", "cuda:0"),
        ("triton", "auto", "cuda:1"),
        ("triton", "cuda:0", "cuda:0"),
    ],
)
def test_a_device(gpus, name, device, expected):
    found = backends.select(name, device)
    assert (found.NAME, str(found.device)) == ("triton", expected)
    assert backends.select("triton", expected) is found
    assert backends.select("auto", "cpu") is native


def test_auto_goes_on_without_a_gpu_whose_kernels_do_not_run(gpus, caplog):
    gpus["failure"] = "Failed to find C compiler."
    with caplog.at_level(logging.INFO, "ota_kernels"):
        assert backends.select() is native
    assert "not triton: GPU 1: Failed to find C compiler." in caplog.text
    with pytest.raises(BackendError, match="GPU 0: Failed to find C compiler"):
        backends.select("auto", "cuda:0")


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_auto_does_not_look_at_hidden_gpus(gpus, monkeypatch, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert triton.gpu_in_sight() == (False, "CUDA_VISIBLE_DEVICES hides every GPU")
    assert backends.select() is native
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert triton.gpu_in_sight()[0]


def test_auto_never_takes_the_interpreter(gpus, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.select() is native


@pytest.mark.parametrize(
    ("name", "device", "words"),
    [
        ("auto", "cuda:7", ["no cuda:7", "2 GPUs", "cuda:0 to cuda:1"]),
        ("triton", "cpu", ["'triton'", "--device cpu", "native"]),
        ("native", "cuda", ["'native'", "CPU", "cuda"]),
        ("reference", "cuda:1", ["'reference'", "cuda:1"]),
        ("cuda", "auto", ["'cuda'", "triton", "native", "reference"]),
    ],
)
def test_what_cannot_be(gpus, name, device, words):
    with pytest.raises(BackendError) as caught:
        backends.select(name, device)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("device", ["tpu", "cuda:", "cuda:x", "cpu:0", ""])
def test_what_is_no_device(device):
    with pytest.raises(RecipeError, match=r"unknown device.*auto, cpu, cuda, cuda:N or cuda:N,M"):
        backends.select("auto", device)


@pytest.mark.parametrize("arguments", [("triton", "auto"), ("auto", "cuda")])
def test_without_a_gpu_the_reason_is_told(no_gpu, arguments):
    with pytest.raises(BackendError, match=r"no CUDA or ROCm device.*`native` runs on the CPU"):
        backends.select(*arguments)


def test_the_interpreter_needs_no_device_of_its_own(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton.verify("cpu")[0]
    with pytest.raises(BackendError, match=r"TRITON_INTERPRET=1.*unset it"):
        backends.select("auto", "cuda")


def test_auto_on_a_machine_without_a_gpu_imports_neither_torch_nor_triton():
    code = (
        "import sys\n"
        "from ota_kernels import backends\n"
        "backends.triton._SIGNS = {}\n"
        "assert backends.select().NAME == 'native'\n"
        "print([name for name in ('torch', 'triton') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def link(gpus, monkeypatch, tmp_path):
    """Writes what Linux tells of the GPU's link."""
    from ota_kernels.backends.triton import bus

    monkeypatch.setattr(bus, "PCI", tmp_path / "pci")

    def written(**facts: str) -> None:
        for place, kind in (("0000:17:00.0", "0x030200"), ("0000:18:00.0", "0x020000")):
            folder = tmp_path / "pci" / place
            folder.mkdir(parents=True, exist_ok=True)
            facts_of_all = {"vendor": "0x10de", "class": kind, **facts}
            for name, text in facts_of_all.items():
                (folder / name).write_text(f"{text}\n")

    return written


FASTEST = {"max_link_speed": "32.0 GT/s PCIe", "max_link_width": "16"}


@pytest.mark.parametrize(
    ("facts", "nbytes", "threads", "expected"),
    [
        (FASTEST, 10**12, 16, "native"),  # 144 GB/s against 54
        (FASTEST, 10**12, 4, "triton"),  # 36 GB/s against 48 that they fill in
        (FASTEST, 10**10, 4, "native"),  # over before a GPU has started
        (FASTEST, 10**12, 6, "native"),
        ({"max_link_speed": "Unknown", "max_link_width": "255"}, 10**12, 3, "native"),  # 27 GB/s, 25 assumed
    ],
)
def test_files_go_to_a_gpu_only_where_that_is_faster(link, caplog, facts, nbytes, threads, expected):
    link(**facts)
    with caplog.at_level(logging.INFO, "ota_kernels"):
        found = backends.for_files(nbytes=nbytes, threads=threads).NAME
    assert found == expected
    assert "on a GPU, by a bus of" in caplog.text
    assert backends.for_files("auto", "cuda", nbytes=nbytes, threads=threads).NAME == "triton"
    assert backends.for_files("native", nbytes=nbytes, threads=threads) is native
    assert backends.select().NAME == "triton"  # tensors that lie there stay there
