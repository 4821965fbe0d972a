"""Kills, interrupts and full disks: what they leave, and that --resume ends where nothing had happened."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jobs
import psutil
import pytest
import torch
from checkpoints import (
    digests,
    load_merged,
    make_set,
    model_digests,
    mounted_tiny_disk,
    shard_files,
    write_recipe,
)
from driver import SHAPES, TILE
from jobs import merge

from ota_kernels import OutputError, RunError
from ota_kernels.backends import native
from ota_kernels.io.journal import Journal, read
from ota_kernels.run.rules import Rules

TILES = sum(max(-(-math.prod(shape) // TILE), 1) for shape in SHAPES.values())

VARIANTS = {
    "threshold": {"precond_threshold": 2e-16},
    "density": {"density": 0.3, "normalise": "model"},
    "per tensor": {"saliency_mass": 0.8, "density_scope": "tensor", "rank1_approx": True},
}


def work_folder(out: Path) -> Path:
    return out.parent / f".{out.name}.ota-merge"


def journal(out: Path) -> list[dict]:
    """The whole records of an unfinished merge."""
    return [record for records in read(work_folder(out)).values() for record in records]


def finished_elements(out: Path) -> int:
    """Elements that an unfinished merge need not do again."""
    records = journal(out)
    merged = {(index, start, stop) for record in records for index, start, stop, _ in record.get("unit", ())}
    merged |= {tuple(record["pending"][:3]) for record in records if "pending" in record}
    return sum(stop - start for _, start, stop in merged)


def total_elements(models) -> int:
    return sum(tensor.numel() for tensor in models.base.values())


@pytest.fixture
def merged():
    return jobs.Merged()


class Stop:
    """A Progress that interrupts once `units` units are done, as Ctrl-C does."""

    def __init__(self, units):
        self._left = units

    def stage(self, name, total_bytes):
        pass

    def advance(self, nbytes):
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt


def interrupted(models, out, units, **parameters):
    """Leave an unfinished merge, about `units` units of it done."""
    options = parameters.pop("options", {})
    with pytest.raises(KeyboardInterrupt):
        merge(models.recipe(**parameters), out, progress=Stop(units), **{"tile_elements": TILE} | options)
    assert work_folder(out).exists()


def test_records_wait_for_the_data_that_they_speak_of(tmp_path):
    def recorded() -> int:
        return (tmp_path / "journal.jsonl").read_bytes().count(b"\n")

    synced: list[int] = []
    log = Journal(tmp_path, lambda: synced.append(recorded()))
    log.append({"decided": 1}, of_data=False)
    while recorded() < 1:
        time.sleep(0.001)
    assert synced == []
    log.append({"unit": 2})
    while recorded() < 2:
        time.sleep(0.001)
    assert synced == [1]
    log.close()
    assert read(tmp_path) == {0: [{"decided": 1}, {"unit": 2}]}


class TestKill:
    # 27 kills in all, at tiles and moments that fixed seeds draw.
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_resumed_until_done_gives_the_same_bytes(self, models, tmp_path, start, variant):
        out, shards = tmp_path / "out", "20kB"
        recipe = write_recipe(tmp_path / "recipe.yaml", models.recipe(**VARIANTS[variant]))
        merge(recipe, tmp_path / "expected", shard_size=shards)
        command = (recipe, out, "--resume", "-q", "--shard-size", shards, "--threads", "2")
        command += ("--candidates-memory", "0")  # elements that wait in memory are lost with the process
        dice = random.Random(variant)
        for last in [False] * 6 + [True]:
            process = start(*command, pause=0.05)
            assert process.stdout.read(dice.randint(1, 3))
            time.sleep(dice.uniform(0, 0.05))
            while last and not finished_elements(out):  # a busy machine may not have recorded any tile yet
                assert process.poll() is None
                time.sleep(0.01)
            process.kill()
            process.communicate()
            assert process.returncode == -signal.SIGKILL
            assert not out.exists()
        assert 0 < finished_elements(out) < total_elements(models)
        process = start(*command)
        tiles, errors = process.communicate()
        assert (process.returncode, errors) == (0, b"")
        assert 0 < tiles.count(b".") < TILES  # it did not begin again
        assert model_digests(out) == model_digests(tmp_path / "expected")
        assert len(shard_files(out)) > 1
        assert sorted(os.listdir(tmp_path)) == ["expected", "out", "recipe.yaml"]
        report = json.loads((out / "merge_report.json").read_text())
        expected = json.loads((tmp_path / "expected" / "merge_report.json").read_text())
        assert report["tensors"] == expected["tensors"]
        assert report["experts"] == expected["experts"]
        assert report["resumed"] is True

    def test_while_it_finishes_and_publishes(self, models, tmp_path, start):
        out = tmp_path / "out"
        recipe = write_recipe(tmp_path / "recipe.yaml", models.recipe(density=0.3))
        merge(recipe, tmp_path / "expected")
        dice = random.Random(0)
        for _ in range(6):
            process = start(recipe, out, "--resume", "-q")
            # The last tile has begun, or there is none left to do: now it syncs, writes and renames.
            process.stdout.read(TILES)
            time.sleep(dice.uniform(0, 0.03))
            process.kill()
            process.communicate()
            if out.exists():  # never half a model
                assert model_digests(out) == model_digests(tmp_path / "expected")
        process = start(recipe, out, "--resume", "-q")
        _, errors = process.communicate()
        assert (process.returncode, errors) == (0, b"")
        assert model_digests(out) == model_digests(tmp_path / "expected")
        assert sorted(os.listdir(tmp_path)) == ["expected", "out", "recipe.yaml"]


class TestInterrupt:
    def test_exits_130_with_one_line_and_a_state_that_resumes(self, models, tmp_path, start):
        out = tmp_path / "out"
        recipe = write_recipe(tmp_path / "recipe.yaml", models.recipe(density=0.3))
        process = start(recipe, out, "-q", "--threads", "1", pause=0.02)
        process.stdout.read(4)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        assert process.returncode == 130
        (line,) = errors.decode().splitlines()
        assert "--resume" in line
        assert not out.exists()
        assert 0 < finished_elements(out) < total_elements(models)
        merge(recipe, out, resume=True)
        merge(recipe, tmp_path / "expected")
        assert model_digests(out) == model_digests(tmp_path / "expected")

    def test_everything_that_was_done_is_in_the_journal(self, models, tmp_path):
        interrupted(models, tmp_path / "out", 5, density=0.3)
        assert sum("pending" in r or "unit" in r for r in journal(tmp_path / "out")) >= 5


class TestResume:
    @pytest.mark.parametrize("units", [0, 1, 6, TILES - 1])
    def test_only_what_is_missing_is_merged(self, models, tmp_path, merged, units):
        out = tmp_path / "out"
        interrupted(models, out, units + 1, density=0.3)  # the first call tells what was done before
        done = finished_elements(out)
        assert done >= min(units, 1)
        merge(models.recipe(density=0.3), out, merged.rules, resume=True, tile_elements=TILE)
        assert merged.elements == total_elements(models) - done
        merge(models.recipe(density=0.3), tmp_path / "expected")
        assert model_digests(out) == model_digests(tmp_path / "expected")

    def test_the_model_wide_survey_is_not_repeated(self, models, tmp_path, monkeypatch):
        interrupted(models, tmp_path / "out", 3, density=0.3, normalise="model")
        monkeypatch.setattr(native, "power_sum", None)  # a call would fail
        rules = Rules(bracket=None)
        report = merge(models.recipe(density=0.3, normalise="model"), tmp_path / "out", rules, resume=True)
        monkeypatch.undo()
        expected = merge(models.recipe(density=0.3, normalise="model"), tmp_path / "expected")
        assert report["experts"] == expected["experts"]
        assert model_digests(tmp_path / "out") == model_digests(tmp_path / "expected")

    def test_sums_over_the_model_survive_the_journal(self, models, tmp_path):
        options = {"options": {"threads": 1}, "method": "ramplus"}
        interrupted(models, tmp_path / "out", 3, **options)
        merge(models.recipe("ramplus"), tmp_path / "out", resume=True)
        merge(models.recipe("ramplus"), tmp_path / "expected")
        assert model_digests(tmp_path / "out") == model_digests(tmp_path / "expected")

    @pytest.mark.parametrize(
        "options",
        [{"threads": 1}, {"threads": 4, "tile_elements": 333}, {"tile_elements": 1 << 20}],
        ids=str,
    )
    def test_other_threads_and_tiles_are_fine(self, models, tmp_path, options):
        parameters = VARIANTS["per tensor"]
        interrupted(models, tmp_path / "out", 7, **parameters)
        merge(models.recipe(**parameters), tmp_path / "out", resume=True, **options)
        merge(models.recipe(**parameters), tmp_path / "expected")
        assert model_digests(tmp_path / "out") == model_digests(tmp_path / "expected")

    def test_density_zero_survives_the_journal(self, models, tmp_path):
        """It keeps nothing: its threshold is NaN."""
        interrupted(models, tmp_path / "out", 3, density=[0.0, 0.2, 0.0])
        report = merge(models.recipe(density=[0.0, 0.2, 0.0]), tmp_path / "out", resume=True)
        assert [e["kept"] for e in report["experts"]] == [0, total_elements(models) * 2 // 10, 0]

    def test_copied_buffers_are_not_copied_again(self, tmp_path, monkeypatch):
        models = make_set(tmp_path / "models", {"a": (50, 60)}, experts=2)
        ids = torch.arange(100)
        for tensors in (models.base, *models.experts):
            tensors["ids"] = ids
        models.save()
        interrupted(models, tmp_path / "out", 2, precond_threshold=1e-16)
        # With other values here: had it copied again, they would show.
        file = work_folder(tmp_path / "out") / "files" / "model.safetensors"
        content = file.read_bytes()
        marked = content.replace(ids.numpy().tobytes(), (ids + 1).numpy().tobytes())
        assert marked != content
        file.write_bytes(marked)
        merge(models.recipe(precond_threshold=1e-16), tmp_path / "out", resume=True)
        assert torch.equal(load_merged(tmp_path / "out")["ids"], ids + 1)

    def test_a_last_line_that_was_cut_is_ignored(self, models, tmp_path, merged):
        out = tmp_path / "out"
        interrupted(models, out, 6, density=0.3)
        path = work_folder(out) / "journal.jsonl"
        path.write_bytes(path.read_bytes()[:-20])
        assert not path.read_bytes().endswith(b"\n")
        done = finished_elements(out)
        merge(models.recipe(density=0.3), out, merged.rules, resume=True, tile_elements=TILE)
        assert merged.elements == total_elements(models) - done
        merge(models.recipe(density=0.3), tmp_path / "expected")
        assert model_digests(out) == model_digests(tmp_path / "expected")

    @pytest.mark.parametrize("kept", [0, 10], ids=["nothing", "half of its first line"])
    def test_a_journal_of_which_only_the_start_is_left_begins_again(self, models, tmp_path, kept):
        """With files of another layout, which must not be published."""
        out = tmp_path / "out"
        interrupted(models, out, 3, options={"shard_size": 10_000})
        path = work_folder(out) / "journal.jsonl"
        path.write_bytes(path.read_bytes()[:kept])
        report = merge(models.recipe(), out, resume=True)
        assert report["resumed"] is False
        assert [p.name for p in shard_files(out)] == ["model.safetensors"]

    def test_files_that_are_gone_begin_again(self, models, tmp_path):
        out = tmp_path / "out"
        interrupted(models, out, 3)
        shutil.rmtree(work_folder(out) / "files")
        merge(models.recipe(), out, resume=True)
        merge(models.recipe(), tmp_path / "expected")
        assert model_digests(out) == model_digests(tmp_path / "expected")

    @pytest.mark.parametrize("variant", ["density", "per tensor"])
    @pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.95])
    def test_what_follows_damage_in_a_journal_is_merged_again(
        self, models, tmp_path, merged, caplog, variant, place
    ):
        out, parameters = tmp_path / "out", VARIANTS[variant]
        interrupted(models, out, 12, **parameters, options={"candidates_memory": 0})
        path = work_folder(out) / "journal.jsonl"
        content = bytearray(path.read_bytes())
        content[int(place * len(content))] ^= 4
        path.write_bytes(content)
        done = finished_elements(out)
        with caplog.at_level("WARNING"):
            merge(models.recipe(**parameters), out, merged.rules, resume=True, tile_elements=TILE)
        assert "damaged after" in caplog.text or place == 0.95
        assert merged.elements == total_elements(models) - done
        merge(models.recipe(**parameters), tmp_path / "expected")
        assert model_digests(out) == model_digests(tmp_path / "expected")

    @pytest.mark.parametrize("change", ["recipe", "shard_size", "input", "seed"])
    def test_of_another_merge_is_an_error_that_says_what_to_do(self, tmp_path, change):
        models = make_set(tmp_path / "models", {"a": (50, 60), "b": (50, 60)})
        out = tmp_path / "out"
        interrupted(models, out, 2)
        left = digests(work_folder(out))
        recipe, options = models.recipe(), {}
        if change == "recipe":
            recipe = models.recipe(power=1.0)
        elif change == "input":
            os.utime(models.base_folder / "model.safetensors")
        else:
            options = {change: {"shard_size": 1000, "seed": 1}[change]}
        with pytest.raises(OutputError, match="--overwrite") as caught:
            merge(recipe, out, resume=True, **options)
        assert str(work_folder(out)) in str(caught.value)
        assert digests(work_folder(out)) == left
        merge(recipe, out, overwrite=True, **options)
        assert not work_folder(out).exists()

    def test_without_a_word_an_unfinished_merge_is_an_error(self, models, tmp_path):
        interrupted(models, tmp_path / "out", 3)
        left = digests(work_folder(tmp_path / "out"))
        with pytest.raises(OutputError, match=r"--resume.*--overwrite"):
            merge(models.recipe(), tmp_path / "out")
        assert digests(work_folder(tmp_path / "out")) == left

    def test_overwrite_starts_again(self, models, tmp_path, merged):
        interrupted(models, tmp_path / "out", 6)
        merge(models.recipe(), tmp_path / "out", merged.rules, overwrite=True)
        assert merged.elements == total_elements(models)

    def test_with_nothing_to_go_on_with_begins(self, models, tmp_path):
        report = merge(models.recipe(), tmp_path / "out", resume=True)
        assert report["resumed"] is False

    def test_of_a_complete_output_does_nothing(self, models, tmp_path, merged):
        out = tmp_path / "out"
        first = merge(models.recipe(), out)
        before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
        assert merge(models.recipe(), out, merged.rules, resume=True) == first
        assert merged.elements == 0
        assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before

    def test_of_an_output_that_is_something_else_is_an_error(self, models, tmp_path):
        merge(models.recipe(), tmp_path / "out")
        before = digests(tmp_path)
        with pytest.raises(OutputError, match="--overwrite"):
            merge(models.recipe(power=1.0), tmp_path / "out", resume=True)
        assert digests(tmp_path) == before


class TestReplacing:
    """--overwrite keeps what was there until the new model is whole."""

    def test_an_interrupt_leaves_the_former_output(self, models, tmp_path):
        out = tmp_path / "out"
        merge(models.recipe(), out)
        before = digests(out)
        interrupted(models, out, 4, power=1.0, options={"overwrite": True})
        assert digests(out) == before

    def test_goes_on_with_resume_and_overwrite_together(self, models, tmp_path, merged):
        out = tmp_path / "out"
        merge(models.recipe(), out)
        interrupted(models, out, 4, power=1.0, options={"overwrite": True})
        done = finished_elements(out)
        with pytest.raises(OutputError, match="--overwrite"):
            merge(models.recipe(power=1.0), out, resume=True)
        merge(models.recipe(power=1.0), out, merged.rules, resume=True, overwrite=True, tile_elements=TILE)
        assert merged.elements == total_elements(models) - done
        merge(models.recipe(power=1.0), tmp_path / "expected")
        assert model_digests(out) == model_digests(tmp_path / "expected")

    @pytest.fixture
    def killed_between_renames(self, models, tmp_path, monkeypatch):
        """A merge with power 1, stopped when it had moved the former output away, whose digests this is."""
        out, rename = tmp_path / "out", os.rename
        merge(models.recipe(), out)
        former = digests(out)

        def stop_after_first(source, target):
            rename(source, target)
            if Path(source) == out:
                raise KeyboardInterrupt

        monkeypatch.setattr(os, "rename", stop_after_first)
        with pytest.raises(KeyboardInterrupt):
            merge(models.recipe(power=1.0), out, overwrite=True)
        monkeypatch.undo()
        assert not out.exists()
        return former

    @pytest.fixture
    def killed_after_renames(self, models, tmp_path, monkeypatch):
        """A merge with power 1 stopped when the output was in place, before the work folder was removed."""

        def stop(folder, **options):
            raise KeyboardInterrupt

        monkeypatch.setattr(shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            merge(models.recipe(power=1.0), tmp_path / "out")
        monkeypatch.undo()
        assert work_folder(tmp_path / "out").exists()

    @pytest.mark.usefixtures("killed_between_renames")
    def test_resume_recovers_from_a_kill_between_the_renames(self, models, tmp_path, merged):
        out = tmp_path / "out"
        merge(models.recipe(power=1.0), out, merged.rules, resume=True)
        assert merged.elements == 0
        merge(models.recipe(power=1.0), tmp_path / "expected")
        assert model_digests(out) == model_digests(tmp_path / "expected")
        assert sorted(os.listdir(tmp_path)) == ["expected", "out"]

    def test_starting_again_after_such_a_kill_does_not_lose_the_former_output(
        self, models, tmp_path, killed_between_renames
    ):
        interrupted(models, tmp_path / "out", 2, power=2.0, options={"overwrite": True})
        assert digests(tmp_path / "out") == killed_between_renames

    @pytest.mark.usefixtures("killed_after_renames")
    def test_resume_clears_what_a_kill_after_the_renames_left(self, models, tmp_path):
        before = digests(tmp_path / "out")
        merge(models.recipe(power=1.0), tmp_path / "out", resume=True)
        assert digests(tmp_path / "out") == before
        assert os.listdir(tmp_path) == ["out"]

    @pytest.mark.usefixtures("killed_after_renames")
    def test_an_output_that_was_moved_away_after_such_a_kill_is_made_again(self, models, tmp_path):
        os.rename(tmp_path / "out", tmp_path / "elsewhere")
        merge(models.recipe(power=1.0), tmp_path / "out", resume=True)
        assert model_digests(tmp_path / "out") == model_digests(tmp_path / "elsewhere")


class TestTwoAtOnce:
    @pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}], ids=str)
    def test_the_second_is_an_error_and_the_first_goes_on(self, models, tmp_path, start, options):
        out = tmp_path / "out"
        recipe = write_recipe(tmp_path / "recipe.yaml", models.recipe())
        process = start(recipe, out, "-q", "--threads", "1", pause=0.03)
        process.stdout.read(3)
        descriptors = psutil.Process().num_fds()
        with pytest.raises(OutputError, match=re.escape(str(out))):
            merge(recipe, out, **options)
        assert psutil.Process().num_fds() == descriptors
        assert process.poll() is None
        _, errors = process.communicate()
        assert (process.returncode, errors) == (0, b"")
        merge(recipe, tmp_path / "expected")
        assert model_digests(out) == model_digests(tmp_path / "expected")


class TestFullDisk:
    @pytest.fixture
    def tiny_disk(self, tmp_path):
        with mounted_tiny_disk(tmp_path / "disk") as path:
            yield path

    def test_is_found_before_the_first_byte(self, models, tiny_disk):
        with pytest.raises(OutputError, match="free") as caught:
            merge(models.recipe(), tiny_disk / "out")
        assert str(tiny_disk) in str(caught.value)
        assert os.listdir(tiny_disk) == []

    def test_that_fills_up_later_leaves_a_state_that_resumes(self, tmp_path, tiny_disk, monkeypatch):
        models = make_set(tmp_path / "models", {"a": (500, 600), "b": (500, 600)}, experts=2)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 40}))
        with pytest.raises(RunError, match="--resume") as caught:
            merge(models.recipe(), tiny_disk / "out", shard_size=700_000)
        assert os.strerror(28) in str(caught.value)
        assert caught.value.exit_code == 1
        assert not (tiny_disk / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=4m", str(tiny_disk)], check=True)
        merge(models.recipe(), tiny_disk / "out", resume=True, shard_size=700_000)
        merge(models.recipe(), tmp_path / "expected", shard_size=700_000)
        assert model_digests(tiny_disk / "out") == model_digests(tmp_path / "expected")

    def test_a_write_that_fails_is_told_and_resumed(self, models, tmp_path, monkeypatch):
        out, pwrite, left = tmp_path / "out", os.pwrite, [12]

        def failing(descriptor, data, offset):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, os.strerror(28))
            return pwrite(descriptor, data, offset)

        monkeypatch.setattr(os, "pwrite", failing)
        with pytest.raises(RunError, match=r"model\.safetensors.*--resume"):
            merge(models.recipe(), out, tile_elements=TILE)
        monkeypatch.undo()
        assert finished_elements(out) > 0
        merge(models.recipe(), out, resume=True)
        merge(models.recipe(), tmp_path / "expected")
        assert model_digests(out) == model_digests(tmp_path / "expected")

    def test_a_journal_that_cannot_be_written_fails_the_merge(self, models, tmp_path, monkeypatch):
        out, fdatasync = tmp_path / "out", os.fdatasync

        def failing(descriptor):
            if os.path.samestat(os.fstat(descriptor), (work_folder(out) / "journal.jsonl").stat()):
                raise OSError(5, os.strerror(5))
            fdatasync(descriptor)

        monkeypatch.setattr(os, "fdatasync", failing)
        with pytest.raises(RunError, match=f"{os.strerror(5)}.*--resume") as caught:
            merge(models.recipe(), out, tile_elements=TILE)
        assert str(work_folder(out)) in str(caught.value)
        assert not out.exists()


def test_the_reference_backend_resumes_too(models, tmp_path, merged):
    interrupted(models, tmp_path / "out", 5, density=0.3, options={"backend": "reference"})
    done = finished_elements(tmp_path / "out")
    merge(models.recipe(density=0.3), tmp_path / "out", merged.rules, resume=True, backend="reference")
    assert merged.elements == total_elements(models) - done
    merge(models.recipe(density=0.3), tmp_path / "expected", backend="reference")
    assert model_digests(tmp_path / "out") == model_digests(tmp_path / "expected")


def test_another_backend_goes_on(models, tmp_path, merged):
    """Masks are the same on all of them, and so is what waits for exact thresholds."""
    recipe, out = models.recipe(density=0.3), tmp_path / "out"
    interrupted(models, out, 5, density=0.3)
    done = finished_elements(out)
    assert done
    found = merge(recipe, out, merged.rules, resume=True, backend="reference")
    assert merged.elements == total_elements(models) - done
    assert (found["backend"], found["backends"]) == ("reference", ["native", "reference"])
    truth = merge(recipe, tmp_path / "truth")
    assert (found["tensors"], found["experts"]) == (truth["tensors"], truth["experts"])
    assert merge(recipe, out, resume=True) == found  # complete already, whatever would have merged it
