"""What may go wrong around a merge: inputs that change or cannot be read, lost outputs, signals, pipes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jobs
import pytest
import torch
from checkpoints import make_set, model_digests, write_recipe
from jobs import Interrupt, merge

from ota_kernels import InputError, OutputError, RunError
from ota_kernels.io import workfolder
from ota_kernels.run.rules import Rules

TILE = 1500
SHAPES = {f"layers.{i}.weight": (50, 60) for i in range(12)}


@pytest.fixture
def models(tmp_path):
    return make_set(tmp_path / "models", SHAPES, experts=2)


def work_folder(out: Path) -> Path:
    return out.parent / f".{out.name}.ota-merge"


def interrupted(models, out):
    with pytest.raises(KeyboardInterrupt):
        merge(models.recipe(density=0.3), out, Rules(before=Interrupt("tile", 6)), tile_elements=TILE)


class TestInputs:
    @pytest.mark.parametrize("change", ["replaced", "truncated", "modified", "gone"])
    @pytest.mark.parametrize("file", ["expert1/model.safetensors", "expert0/exp_avg_sq.safetensors"])
    def test_that_change_before_a_resume_are_named(self, models, tmp_path, change, file):
        out, path = tmp_path / "out", models.root / file
        interrupted(models, out)
        if change == "replaced":
            other = "base/model.safetensors" if "model" in file else "expert1/exp_avg_sq.safetensors"
            shutil.copy(models.root / other, path)
        elif change == "truncated":
            os.truncate(path, path.stat().st_size - 7)
        elif change == "modified":
            with path.open("rb+") as stream:
                stream.seek(-1, os.SEEK_END)
                stream.write(b"\x01")
            os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
        else:
            path.unlink()
        with pytest.raises((OutputError, InputError), match=re.escape(str(path))):
            merge(models.recipe(density=0.3), out, resume=True)
        assert work_folder(out).exists()

    @pytest.mark.parametrize("parameters", [{"density": 0.3}, {"precond_threshold": 1e-16}], ids=str)
    def test_a_file_that_is_truncated_while_it_is_mapped(self, tmp_path, parameters):
        """In a process of its own, which a signal would end."""
        models = make_set(tmp_path / "models", {f"w{i}": (300, 400) for i in range(8)}, experts=2)
        recipe = write_recipe(tmp_path / "recipe.yaml", models.recipe(**parameters))
        file = models.expert_folders[1] / "model.safetensors"
        code = f"""
import os
import jobs
from ota_kernels import InputError
from ota_kernels.run.rules import Rules

def cut(step, segment):
    if segment is not None and segment.index == 2:
        os.truncate({str(file)!r}, 300_000)

try:
    jobs.merge({str(recipe)!r}, {str(tmp_path / "out")!r}, Rules(before=cut), threads=2, tile_elements=4096)
except InputError as error:
    print(error)
"""
        paths = {"PYTHONPATH": str(Path(jobs.__file__).parent)}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | paths
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"{file}: changed while in use: it is shorter than before\n"
        assert sorted(os.listdir(tmp_path)) == ["models", "recipe.yaml"]

    def test_a_read_that_fails_leaves_what_was_done(self, models, tmp_path, monkeypatch):
        """Whose disk gave an error: its size is what it was."""
        from ota_kernels import _native
        from ota_kernels.io import pages

        out = tmp_path / "out"
        failing = list(pages._guarded)

        def lose(step, segment):
            if segment is not None and segment.index == 6:
                number = next(n for n in pages._guarded if n not in failing)
                monkeypatch.setattr(_native, "lost", lambda: [number])

        with pytest.raises(RunError, match=r"safetensors: a read from its disk failed; --resume"):
            merge(
                models.recipe(precond_threshold=1e-16), out, Rules(before=lose), tile_elements=TILE, threads=1
            )
        monkeypatch.undo()
        merge(models.recipe(precond_threshold=1e-16), out, resume=True)
        merge(models.recipe(precond_threshold=1e-16), tmp_path / "expected")
        assert model_digests(out) == model_digests(tmp_path / "expected")


class TestOutput:
    def test_a_work_folder_that_vanishes(self, models, tmp_path):
        out = tmp_path / "out"

        def remove(step, segment):
            if segment is not None and segment.index == 3:
                shutil.rmtree(work_folder(out), ignore_errors=True)

        with pytest.raises(RunError, match=r"cannot|taken away"):
            merge(models.recipe(), out, Rules(before=remove), tile_elements=TILE)
        assert not out.exists()

    def test_a_folder_that_is_read_only(self, models, tmp_path, monkeypatch):
        def refused(path, *mode):
            raise OSError(30, os.strerror(30))

        monkeypatch.setattr(os, "mkdir", refused)
        with pytest.raises(OutputError, match=f"cannot write to .*{os.strerror(30)}"):
            merge(models.recipe(), tmp_path / "out")
        monkeypatch.undo()
        assert os.listdir(tmp_path) == ["models"]

    def test_a_journal_without_room_for_a_record(self, models, tmp_path, monkeypatch):
        out, write, full = tmp_path / "out", os.write, []

        def half(descriptor, data):
            if full:
                raise OSError(28, os.strerror(28))
            if b'"unit"' in bytes(data):
                full.append(True)
                return write(descriptor, data[:40])
            return write(descriptor, data)

        monkeypatch.setattr(os, "write", half)
        with pytest.raises(RunError, match=f"{os.strerror(28)}.*--resume"):
            merge(models.recipe(), out, tile_elements=TILE)
        monkeypatch.undo()
        merge(models.recipe(), out, resume=True)
        merge(models.recipe(), tmp_path / "expected")
        assert model_digests(out) == model_digests(tmp_path / "expected")


class TestOtherHosts:
    """Where a network file system has no locks that other hosts see."""

    @pytest.fixture(autouse=True)
    def without_locks(self, monkeypatch):
        def refused(fd, how):
            raise OSError(95, os.strerror(95))

        monkeypatch.setattr(workfolder.fcntl, "flock", refused)

    def held(self, out, seconds):
        lock = work_folder(out) / "lock"
        lock.write_text(json.dumps({"host": "node7", "process": 123}))
        os.utime(lock, (time.time() - seconds,) * 2)

    def test_a_merge_that_runs_there_is_named(self, models, tmp_path):
        out = tmp_path / "out"
        interrupted(models, out)
        self.held(out, 20)
        with pytest.raises(OutputError, match=r"another merge.*process 123 on node7.*in (39|40) seconds"):
            merge(models.recipe(density=0.3), out, resume=True)

    def test_one_that_is_gone_holds_nothing(self, models, tmp_path):
        out = tmp_path / "out"
        interrupted(models, out)
        self.held(out, 61)
        assert merge(models.recipe(density=0.3), out, resume=True)["resumed"]

    def test_one_that_has_ended_holds_nothing(self, models, tmp_path, monkeypatch):
        out = tmp_path / "out"
        monkeypatch.setattr(workfolder, "host", lambda: "node7")
        interrupted(models, out)
        monkeypatch.setattr(workfolder, "host", lambda: "node8")
        assert merge(models.recipe(density=0.3), out, resume=True)["resumed"]

    def test_a_merge_gives_signs_of_life(self, models, tmp_path, monkeypatch):
        out, seen = tmp_path / "out", []
        monkeypatch.setattr(workfolder, "TOUCH", 0.01)

        def look(step, segment):
            time.sleep(0.05)
            seen.append((work_folder(out) / "lock").stat().st_mtime_ns)

        merge(models.recipe(), out, Rules(before=look))
        assert len(set(seen)) > 1


class TestProcess:
    @pytest.mark.parametrize(
        ("number", "word"), [(signal.SIGTERM, "terminated"), (signal.SIGHUP, "hung up")], ids=str
    )
    def test_signals_end_it_as_an_interrupt_does(self, models, tmp_path, start, number, word):
        out = tmp_path / "out"
        recipe = write_recipe(tmp_path / "recipe.yaml", models.recipe(density=0.3))
        process = start(recipe, out, "-q", "--threads", "1", pause=0.03)
        process.stdout.read(1)
        process.send_signal(number)
        _, errors = process.communicate()
        assert process.returncode == 128 + number
        assert errors.decode() == f"{word}; the same command with --resume goes on\n"
        assert merge(recipe, out, resume=True)["resumed"]
        merge(recipe, tmp_path / "expected")
        assert model_digests(out) == model_digests(tmp_path / "expected")

    @pytest.mark.parametrize("closed", ["closed", "read to no end"])
    def test_standard_output_that_is_closed(self, models, tmp_path, start, closed):
        out, untold = tmp_path / "out", {"TOLD": ""}
        recipe = write_recipe(tmp_path / "recipe.yaml", models.recipe())
        if closed == "closed":
            process = start(recipe, out, env=untold, preexec_fn=lambda: (os.close(1), os.close(2)))
        else:
            reads, writes = os.pipe()
            process = start(recipe, out, env=untold, stdout=writes, stderr=writes)
            os.close(writes)
            os.close(reads)
        assert process.wait(60) == 0
        merge(recipe, tmp_path / "expected")
        assert model_digests(out) == model_digests(tmp_path / "expected")


# `ota-merge`, under which a file becomes shorter as soon as it is mapped.
CUT = """
import os, sys
from pathlib import Path
from ota_kernels import cli
from ota_kernels.io import reader, torchfile

file = Path(os.environ["FILE"])

def cutting(maps):
    def mapped(path, *more):
        found = maps(path, *more)
        if Path(path) == file:
            os.truncate(file, 100)
        return found
    return mapped

reader._map, torchfile.load = cutting(reader._map), cutting(torchfile.load)
cli.main()
"""


class TestCommandsOnFilesThatAreCut:
    """They end with one line, and leave nothing that looks whole."""

    @pytest.fixture
    def ends(self, tmp_path):
        """Asserts it of a command."""

        def ends(
            file, *arguments, code=1, fact="is lost: it has become shorter, or its disk is full or has failed"
        ):
            before = visible(tmp_path)
            command = [sys.executable, "-c", CUT, *map(str, arguments)]
            env = os.environ | {"FILE": str(file)}
            done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
            assert (done.returncode, done.stdout) == (code, ""), done.stderr
            assert done.stderr.splitlines()[-1] == f"error: {file}: {fact}"
            assert done.stderr.count("error") == 1
            assert visible(tmp_path) == before

        def visible(folder):
            return sorted(name for name in os.listdir(folder) if not name.startswith("."))

        return ends

    def test_moments(self, models, tmp_path, ends):
        one, other = models.curvature_files
        ends(one, "moments", "show", one)
        ends(other, "moments", "compress", other, tmp_path / "new.safetensors", "--format", "log8")

    def test_moments_of_a_torch_file(self, tmp_path, ends):
        moments = {f"w{i}": {"exp_avg_sq": torch.full((300, 400), 1e-9)} for i in range(4)}
        file = tmp_path / "optimizer.pt"
        torch.save({"state": moments}, file)
        ends(file, "moments", "compress", file, tmp_path / "new.safetensors", "--format", "bf16")

    def test_packs(self, models, tmp_path, ends, ota_merge):
        base = ("--base", models.base_folder, "--form", "tswitch", "-q")
        code, _, errors = ota_merge("pack", models.expert_folders[0], tmp_path / "e.pack", *base)
        assert (code, errors) == (0, "")
        expert, kept = (
            models.expert_folders[0] / "model.safetensors",
            models.base_folder / "model.safetensors",
        )
        ends(expert, "pack", models.expert_folders[0], tmp_path / "f.pack", *base)
        ends(kept, "unpack", tmp_path / "e.pack", tmp_path / "whole", "-q")

    @pytest.mark.parametrize("command", ["report", "verify --sample 100%"])
    def test_what_reads_a_merge(self, models, tmp_path, ends, command):
        recipe = write_recipe(tmp_path / "recipe.yaml", models.recipe(density=0.3))
        merge(recipe, tmp_path / "out")
        ends(models.base_folder / "model.safetensors", *command.split(), tmp_path / "out")
