"""Every benchmark runs, at sizes at which its figures mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
TINY = ["--parameters", "1", "--runs", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Where all benchmarks keep their one set."""
    return tmp_path_factory.mktemp("sets")


@pytest.fixture
def bench():
    """Runs `python -m bench.NAME` in a process; returns what it prints."""

    def run(name, *arguments, **environment):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", f"bench.{name}", *map(str, arguments)],
            cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def kernels(monkeypatch):
    """The module bench.kernels, whose bandwidths are made up: measuring them takes seconds."""
    monkeypatch.syspath_prepend(ROOT)
    from bench import bandwidth, kernels

    monkeypatch.setattr(bandwidth, "measure", lambda threads: bandwidth.Bandwidth(2e9, 1e9))
    return kernels


def small(case):
    """The case with as few elements as a workload checks at both of its ends."""
    return replace(case, budget=case.bytes_per_element << 17)


def test_every_kind_of_kernel_case(kernels):
    from ota_kernels.run.pool import Pool

    kinds = {(case.method, case.weights, case.curvature): case for case in kernels.CASES if case.experts == 5}
    assert len(kinds) == 2 * 3 + 3  # OTA: weights x curvatures; linear: weights
    with Pool(2) as pool:
        for case in kinds.values():
            workload = kernels.Workload(small(case), pool)
            for name in ("native", "copy"):
                workload.runner(name)()


def test_kernels(kernels, monkeypatch, tmp_path, capsys):
    case = small(kernels.CASES[0])
    monkeypatch.setattr(kernels, "CASES", (case,))
    monkeypatch.setattr(sys, "argv", ["kernels", "--repeats", "2", "--json", str(tmp_path / "a.json")])
    kernels.main()
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["runner"] for row in rows] == list(kernels.RUNNERS)
    assert all(len(row["seconds"]) == 2 for row in rows), rows
    printed = capsys.readouterr().out
    for name in kernels.RUNNERS:
        assert f"{case} {name}" in printed


def test_a_wrong_kernel_is_a_failed_row(kernels, monkeypatch, tmp_path, capsys):
    from ota_kernels.backends import native

    merge = native.merge

    def wrong(tile, terms, out):
        stats = merge(tile, terms, out)
        out[-2:] = 0
        return stats

    monkeypatch.setattr(native, "merge", wrong)
    monkeypatch.setattr(kernels, "CASES", (small(kernels.CASES[0]),))
    monkeypatch.setattr(sys, "argv", ["kernels", "--repeats", "1"])
    kernels.main()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "failed" in line)
    assert "native" in line
    assert "AssertionError" in line


def test_bandwidth(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench import bandwidth

    monkeypatch.setattr(bandwidth, "BYTES", 1 << 22)
    assert min(bandwidth.measure(2)) > 0


def test_large(bench, tmp_path):
    bench("large", "--layout", "dense", "--experts", 1, "--runs", 1, "--json", tmp_path / "a.json")
    plans = json.loads((tmp_path / "a.json").read_text())["plans"]
    assert list(plans) == ["dense, ota", "dense, linear"]


def test_end_to_end(bench, data, tmp_path):
    printed = bench("end_to_end", "--data", data, *TINY, "--only", "native", "--json", tmp_path / "a.json")
    processes = json.loads((tmp_path / "a.json").read_text())["processes"]
    assert list(processes) == ["native"]
    assert len(processes["native"]["runs"]) == 1, printed


def test_packs(bench, data, tmp_path):
    printed = bench("packs", "--data", data, *TINY, "--json", tmp_path / "a.json")
    figures = json.loads((tmp_path / "a.json").read_text())
    assert list(figures["processes"]) == ["experts", "unpacked", "packs"], printed
    assert figures["bytes_read"]["packs"] < figures["bytes_read"]["experts"]


def test_density(bench, data, tmp_path):
    options = ["--hidden", 16, "--densities", "0.3", "--scores", 4096]
    bench("density", "--data", data, *TINY, *options, "--json", tmp_path / "a")
    figures = json.loads((tmp_path / "a").read_text())
    assert {scope: len(runs) for scope, runs in figures["merges"]["0.3"].items()} == {
        "thresholds": 1,
        "model": 1,
        "tensor": 1,
    }
    assert all(figures["selections"].values())


def test_rank1(bench, data, tmp_path):
    bench("rank1", "--data", data, *TINY, "--forms", "rank1", "--json", tmp_path / "a.json")
    forms = json.loads((tmp_path / "a.json").read_text())["forms"]
    assert {form: len(found["runs"]) for form, found in forms.items()} == {"float32": 1, "rank1": 1}
    assert forms["rank1"]["bytes"] < forms["float32"]["bytes"]


# One of each kind: others differ in a number or a type, and interpreted kernels take their time.
GPU_CASES = (
    "merge-T2-bfloat16+float32", "merge-T2-bfloat16+rank1", "eager", "compile", "tensor-density",
    "model-thresholds", "histogram-low", "power-sum", "row-column-sums", "gram", "run-threshold-triton",
    "merge-T5-bfloat16+log8", "host1-thresholds", "topk-threshold", "graft", "call-linear-all",
    "bus-to-device",
)  # fmt: skip


def test_gpu(bench, data):
    pytest.importorskip("triton")
    only = ",".join(GPU_CASES)
    printed = bench("gpu", "--quick", "--data", data, "--only", only, TRITON_INTERPRET="1")
    for name in ("copy-torch", "copy-triton", *GPU_CASES):
        assert f"\n{name}" in printed
    assert "run-threshold-native" not in printed
    assert "not written" in printed


def test_gpu_without_time(bench, data):
    """What does not begin within the budget is said."""
    pytest.importorskip("triton")
    printed = bench(
        "gpu", "--quick", "--budget", "1e-9", "--data", data, "--only", "merge-T2", TRITON_INTERPRET="1"
    )
    lines = [line.split(maxsplit=1) for line in printed.splitlines()]
    assert ["merge-T2-bfloat16+float32", "not run: no time was left"] in lines


def test_gpu_instructions(monkeypatch):
    """Of what the compiler makes for an H200: four schedulers of 132 multiprocessors issue for 32 lanes."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        "torch.cuda.get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132)
    )
    from bench.gpu.code import add_instructions

    row = {"variant": "ota", "elements": 10**9, "megahertz": 1980, "seconds": [0.02, 0.01]}
    rows = [row, {"variant": "", "seconds": [1.0]}, {"variant": "ota", "failed": "no room"}]
    add_instructions(rows, torch.device("cuda"))
    assert 80 < row["instructions"] < 130
    assert row["issue"] == pytest.approx(row["instructions"] * 1e9 / (132 * 4 * 32 * 1.98e9 * 0.01))
    assert "instructions" not in rows[1] | rows[2]


@pytest.fixture
def gpu(monkeypatch):
    """bench.gpu's command in this process, which sees no GPU."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    from bench.gpu import __main__ as command

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
        with pytest.raises(SystemExit) as stop:
            command.main()
        return stop.value.code

    return run


def test_gpu_without_a_gpu(gpu, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "error: there is no GPU to measure: no CUDA or ROCm device" in gpu()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "error: TRITON_INTERPRET=1 runs kernels on the CPU" in gpu()


@pytest.mark.parametrize(
    "arguments", [["--quick", "--json", "x.json"], ["--quick", "--size", "1GB"], ["--repeats", "0"]], ids=str
)
def test_gpu_options_that_contradict_each_other(gpu, arguments, capsys):
    assert gpu(*arguments) == 2
    assert arguments[0] in capsys.readouterr().err


def test_gpu_report(monkeypatch, tmp_path, capsys):
    """The yardstick is the faster copy; a failed case is a row, and part of no ratio."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(ROOT)
    from bench.gpu.report import best_rate, plot, ratios, tables

    def row(name, *milliseconds):
        return {"case": name, "bytes": 10**9, "seconds": [ms / 1e3 for ms in milliseconds]}

    copies = [row("copy-torch", 5, 1, 2), row("copy-triton", 4)]
    kernel = "T5-bfloat16+float32"
    figures = {
        "device": {"name": "a GPU"},
        "copy_bytes_per_second": best_rate(copies),
        "rows": [
            *copies,
            row(f"merge-{kernel}", 2.5) | {"megahertz": 1980, "instructions": 118.2, "issue": 0.45},
            row(f"eager-{kernel}", 25),
            {"case": f"compile-{kernel}", "bytes": 10**9, "failed": "RuntimeError: no compiler"},
            row("model-thresholds", 10),
            row("model-density", 11),
        ],
        "files": [row("read", 100), row("run-threshold-triton", 400) | {"process_seconds": [5.0]}],
    }
    assert best_rate(copies) == pytest.approx(1e9 / 2e-3)
    found = {what: ratio for what, ratio, _ in ratios(figures)}
    assert found == pytest.approx(
        {
            "merge kernel, share of the copy bandwidth": 2 / 2.5,
            "eager torch over the merge kernel": 25 / 2.5,
            "exact density of a model over thresholds": 11 / 10,
        }
    )
    tables(figures)
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["copy-torch"][1:] == ["2.000", "1.000-5.000", "500.0", "100%"]
    assert lines[f"merge-{kernel}"][-4:] == ["80%", "1980", "118", "45%"]
    assert " ".join(lines[f"compile-{kernel}"][1:]) == "failed: RuntimeError: no compiler"
    assert lines["run-threshold-triton"][-2:] == ["25%", "5.00"]
    pytest.importorskip("matplotlib")
    plot(tmp_path / "a.png", figures)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
