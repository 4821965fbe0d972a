"""The command line: what it prints where, what it passes on, and its exit codes."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import digests, load_merged, make_set, model_digests, shard_files, write_recipe

from ota_kernels import __version__, merge
from ota_kernels.planning import plan as planning

SHAPES = {"embed_tokens.weight": (50, 16), "layer.weight": (33, 17), "norm.weight": (17,), "scale": ()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("models"), SHAPES, config={"torch_dtype": "bfloat16"})


@pytest.fixture
def recipe(models, tmp_path):
    return write_recipe(tmp_path / "recipe.yaml", models.recipe(density=0.3))


class TestHelp:
    def test_of_the_program(self, ota_merge):
        code, printed, errors = ota_merge("--help")
        assert (code, errors) == (0, "")
        for command in ("run", "plan", "demo"):
            assert re.search(rf"^  {command}  +\S", printed, re.MULTILINE)
        assert ota_merge("-h") == (0, printed, "")

    def test_without_arguments(self, ota_merge):
        assert ota_merge() == ota_merge("--help")

    @pytest.mark.parametrize(
        ("command", "words"),
        [
            (
                "run",
                "RECIPE OUT --backend [auto|triton|native|reference] --device --memory-limit --threads "
                "--shard-size --seed --overwrite --resume --dry-run -q --quiet -v --verbose 1GiB 5GB",
            ),
            ("plan", "RECIPE --json --backend --memory-limit --threads --shard-size -v"),
            ("demo", "DIR --seeds"),
        ],
    )
    def test_of_a_command(self, ota_merge, command, words):
        code, printed, errors = ota_merge(command, "--help")
        assert (code, errors) == (0, "")
        assert [word for word in words.split() if word not in printed] == []

    def test_version(self, ota_merge):
        code, printed, _ = ota_merge("--version")
        assert code == 0
        assert f"version {__version__}\n" in printed
        assert __version__ == importlib.metadata.version("ota-kernels")  # pyproject.toml's


class TestPlan:
    ELEMENTS = 50 * 16 + 33 * 17 + 17 + 1
    ONE_PASS = ELEMENTS * (2 + 3 * (2 + 4))  # a bfloat16 base; three experts and their float32 curvature

    def planned(self, ota_merge, *arguments):
        code, printed, errors = ota_merge("plan", *arguments, "--json")
        assert (code, errors) == (0, "")
        return json.loads(printed)

    def test_json_holds_what_can_be_computed_by_hand(self, ota_merge, recipe):
        plan = self.planned(ota_merge, recipe, "--threads", "2")
        assert plan["experts"] == 3
        assert plan["tensors"] == 4
        assert plan["parameters"] == self.ELEMENTS
        assert plan["tiles"] == 4
        assert plan["passes"] == 1  # a density over the model is found in the merge's own pass
        assert plan["bytes_in"] == self.ONE_PASS
        assert 0 < plan["candidate_bytes"] < 3 * self.ONE_PASS
        assert (plan["backend"], plan["threads"]) == ("native", 2)
        assert 0 < plan["peak_memory"] <= 1 << 30
        assert plan["seconds"] > 0

    def test_one_pass_for_absolute_thresholds(self, ota_merge, models, tmp_path):
        path = write_recipe(tmp_path / "recipe.yaml", models.recipe(precond_threshold=1e-16))
        plan = self.planned(ota_merge, path)
        assert (plan["passes"], plan["bytes_in"]) == (1, self.ONE_PASS)

    def test_model_means_take_a_pass_of_their_own(self, ota_merge, models, tmp_path):
        path = write_recipe(tmp_path / "recipe.yaml", models.recipe(density=0.3, normalise="model"))
        plan = self.planned(ota_merge, path)
        assert (plan["passes"], plan["bytes_in"]) == (2, 2 * self.ONE_PASS)

    def test_linear_reads_neither_base_nor_curvature(self, ota_merge, models, tmp_path):
        path = write_recipe(tmp_path / "recipe.yaml", models.recipe("linear"))
        assert self.planned(ota_merge, path)["bytes_in"] == self.ELEMENTS * 3 * 2

    @pytest.mark.parametrize("shard_size", ["5GB", "1500"])
    def test_bytes_out_are_those_of_the_merge(self, ota_merge, recipe, tmp_path, shard_size):
        plan = self.planned(ota_merge, recipe, "--shard-size", shard_size)
        merge(recipe, tmp_path / "out", shard_size=shard_size)
        sizes = {p.name: p.stat().st_size for p in shard_files(tmp_path / "out")}
        assert {shard["name"]: shard["bytes"] for shard in plan["shards"]} == sizes
        assert plan["bytes_out"] == sum(sizes.values())

    def test_tiles_follow_the_memory_limit(self, ota_merge, tmp_path):
        models = make_set(tmp_path, {"weight": (1100, 1000)}, experts=2)
        path = models.recipe_file(precond_threshold=1e-16)
        tiles = {}
        for limit in (150, 120, 112):
            plan = self.planned(ota_merge, path, "--threads", "2", "--memory-limit", f"{limit}MB")
            assert plan["peak_memory"] <= limit * 10**6
            assert plan["tiles"] == math.ceil(1_100_000 / plan["tile_elements"])
            tiles[limit] = plan["tiles"]
        assert 1 < tiles[150] < tiles[120] < tiles[112]

    def test_fewer_threads_where_memory_is_short(self, ota_merge, recipe, monkeypatch):
        """Many processors keep to the default limit; as many threads, asked for, are an error."""
        monkeypatch.setattr(planning, "default_threads", lambda: 256)
        plan = self.planned(ota_merge, recipe)
        assert 8 <= plan["threads"] < 256
        assert plan["peak_memory"] <= 1 << 30
        code, _, errors = ota_merge("plan", recipe, "--threads", "256")
        assert code == 2
        assert "256 threads" in errors
        assert "lower --threads" in errors

    def test_table(self, ota_merge, recipe):
        code, printed, errors = ota_merge("plan", recipe, "--threads", "2")
        assert (code, errors) == (0, "")
        rows = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in printed.splitlines())
        assert rows["experts"] == "3"
        assert rows["tensors"] == "4"
        assert rows["parameters"] == "1.4 K"
        assert rows["passes over the inputs"] == "1"
        assert rows["bytes in"] == f"{self.ONE_PASS / 1000:.1f} kB"
        assert rows["candidates"].startswith("about ")
        assert rows["bytes out"].endswith("in 1 file(s)")
        assert rows["tiles"].startswith("4 of ")
        assert rows["backend"] == "native, 2 thread(s)"
        assert rows["peak memory"].endswith("MB")
        assert "estimated time" in rows

    def test_writes_nothing(self, ota_merge, recipe, tmp_path, models):
        before = digests(tmp_path), digests(models.root)
        self.planned(ota_merge, recipe)
        assert (digests(tmp_path), digests(models.root)) == before


class TestRun:
    def test_prints_the_result_on_stdout_and_plain_progress_on_stderr(self, ota_merge, recipe, tmp_path):
        out = tmp_path / "out"
        code, printed, errors = ota_merge("run", recipe, out)
        assert code == 0
        assert [line.split(":")[0] for line in errors.splitlines()] == ["survey", "merge", "sync"]
        assert "\x1b" not in printed + errors  # no terminal codes
        assert str(out) in printed
        total = sum(math.prod(shape) for shape in SHAPES.values())
        assert printed.count(f" {total * 3 // 10 / total:.1%} of its edits") == 3
        assert load_merged(out).keys() == SHAPES.keys()

    def test_quiet_prints_nothing(self, ota_merge, recipe, tmp_path):
        assert ota_merge("run", recipe, tmp_path / "out", "-q") == (0, "", "")
        assert ota_merge("run", recipe, tmp_path / "dry", "-q", "--dry-run") == (0, "", "")

    def test_verbose_names_the_backend(self, ota_merge, recipe, tmp_path, caplog):
        code, _, _ = ota_merge("run", recipe, tmp_path / "out", "-v")
        assert code == 0
        assert "backend: native" in caplog.text

    def test_options_reach_the_merge(self, ota_merge, recipe, tmp_path):
        options = "--backend reference --device cpu --threads 1 --shard-size 2kB --memory-limit 2GB --seed 3"
        code, _, _ = ota_merge("run", recipe, tmp_path / "out", "-q", *options.split())
        assert code == 0
        report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
        assert (report["backend"], report["threads"]) == ("reference", 1)
        assert len(shard_files(tmp_path / "out")) == 2

    def test_a_dry_run_prints_the_plan_and_writes_nothing(self, ota_merge, recipe, tmp_path, models):
        before = digests(tmp_path), digests(models.root)
        code, printed, errors = ota_merge("run", recipe, tmp_path / "out", "--dry-run", "--threads", "2")
        assert (code, errors) == (0, "")
        assert printed == ota_merge("plan", recipe, "--threads", "2")[1]
        assert (digests(tmp_path), digests(models.root)) == before
        assert os.listdir(tmp_path) == ["recipe.yaml"]

    def test_resume_and_overwrite(self, ota_merge, recipe, tmp_path):
        out = tmp_path / "out"
        assert ota_merge("run", recipe, out, "-q")[0] == 0
        first = digests(out)
        assert ota_merge("run", recipe, out, "-q")[0] == 2
        assert ota_merge("run", recipe, out, "-q", "--resume")[0] == 0
        assert digests(out) == first
        assert ota_merge("run", recipe, out, "-q", "--overwrite", "--shard-size", "1kB")[0] == 0
        assert len(shard_files(out)) > 1
        assert not (out / "model.safetensors").exists()

    def test_paths_may_be_relative_to_the_recipe(self, ota_merge, models, tmp_path, monkeypatch):
        recipe = models.recipe()
        for model in recipe["models"]:
            model["model"] = os.path.relpath(model["model"], models.root)
        recipe["base_model"] = "base"
        path = write_recipe(models.root / "relative.yaml", recipe)
        monkeypatch.chdir(tmp_path)
        assert ota_merge("run", path, "relative", "-q")[0] == 0
        merge(models.recipe(), tmp_path / "absolute")
        assert model_digests(tmp_path / "relative") == model_digests(tmp_path / "absolute")


class TestFailure:
    def test_of_an_input_comes_after_the_progress(self, ota_merge, tmp_path):
        models = make_set(tmp_path / "models", SHAPES)
        models.experts[0]["layer.weight"][0, 0] = float("nan")
        models.save()
        code, printed, errors = ota_merge("run", models.recipe_file(), tmp_path / "out")
        assert (code, printed) == (2, "")
        *progress, last = errors.splitlines()
        assert last.startswith("error: ")
        assert not any("error" in line for line in progress)

    def test_while_running_exits_1_and_says_how_to_go_on(self, ota_merge, recipe, tmp_path, monkeypatch):
        def full(descriptor, data, offset):
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr(os, "pwrite", full)
        code, _, errors = ota_merge("run", recipe, tmp_path / "out", "-q")
        assert code == 1
        (line,) = errors.splitlines()
        assert line.startswith("error: ")
        assert os.strerror(28) in line
        assert "--resume" in line
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("error", "fact"),
        [(MemoryError(), "memory"), (OSError(5, "Input/output error", "some/file"), "some/file")],
        ids=["memory", "input/output"],
    )
    def test_of_the_machine_exits_1(self, ota_merge, recipe, tmp_path, monkeypatch, error, fact):
        def fail(*arguments, **options):
            raise error

        monkeypatch.setattr("ota_kernels.run.job.merge", fail)
        code, _, errors = ota_merge("run", recipe, tmp_path / "out", "-q")
        assert code == 1
        (line,) = errors.splitlines()
        assert line.startswith("error: ")
        assert fact in line

    def test_an_interrupt_exits_130(self, ota_merge, recipe, tmp_path, monkeypatch):
        def interrupt(*arguments, **options):
            raise KeyboardInterrupt

        monkeypatch.setattr("ota_kernels.run.job.merge", interrupt)
        code, _, errors = ota_merge("run", recipe, tmp_path / "out", "-q")
        assert code == 130
        (line,) = errors.splitlines()
        assert "--resume" in line
        monkeypatch.setattr("ota_kernels.run.job.plan", interrupt)
        code, printed, errors = ota_merge("plan", recipe)
        assert (code, printed, errors.strip()) == (130, "", "interrupted")

    def test_verbose_shows_a_traceback_before_the_line(self, ota_merge, tmp_path):
        path = tmp_path / "nothing.yaml"
        _, _, quiet = ota_merge("run", path, tmp_path / "out")
        code, _, errors = ota_merge("run", path, tmp_path / "out", "-v")
        assert code == 2
        assert errors.startswith("Traceback")
        assert errors.endswith(quiet)
        assert len(quiet.splitlines()) == 1


SLOW_RUN = """
import sys, time
from ota_kernels import cli
from ota_kernels.backends import native

kernel = native.merge

def merge(*arguments):
    time.sleep(0.05)
    return kernel(*arguments)

native.merge = merge
cli.main()
"""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_terminal_gets_a_progress_bar(recipe, tmp_path):
    terminal, inner = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_RUN, "run", str(recipe), str(tmp_path / "out"), "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=inner,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(inner)
    shown = b""
    try:
        while chunk := os.read(terminal, 4096):
            shown += chunk
    except OSError:  # Linux: the other side is closed
        pass
    os.close(terminal)
    printed, _ = process.communicate()
    assert process.returncode == 0
    assert b"merge" in shown
    assert b"GB/s" in shown
    assert b"\x1b[" in shown
    assert b"Traceback" not in shown
    assert str(tmp_path / "out").encode() in printed


def test_the_installed_script_runs(recipe, tmp_path):
    script = Path(sys.executable).with_name("ota-merge")
    if not script.exists():
        pytest.skip("not installed beside this Python")
    done = subprocess.run([script, "run", recipe, tmp_path / "out", "-q"], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    merge(recipe, tmp_path / "expected")
    assert model_digests(tmp_path / "out") == model_digests(tmp_path / "expected")


def test_remarks_about_inputs_wait_for_an_error_about_them(tmp_path):
    """An error is one line, whatever was remarked before it; without one, remarks are printed."""
    models = make_set(tmp_path, {"w": (4, 4)}, experts=2)
    listed = [{"model": str(folder)} for folder in models.expert_folders]
    recipe = write_recipe(
        tmp_path / "linear.yaml",
        {"merge_method": "linear", "parameters": {"weight": 1, "int8_mask": True}, "models": listed},
    )
    config = models.expert_folders[0] / "config.json"
    config.write_text(json.dumps({"model_type": "llama", "hidden_act": "silu"}))
    run = [sys.executable, "-c", "from ota_kernels.cli import main; main()", "plan", str(recipe)]
    fine = subprocess.run(run, capture_output=True, text=True)
    assert fine.returncode == 0, fine.stderr
    assert "int8_mask" in fine.stderr
    other = models.expert_folders[1] / "config.json"
    other.write_text(json.dumps({"model_type": "llama", "hidden_act": "gelu"}))
    refused = subprocess.run(run, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "hidden_act" in refused.stderr
