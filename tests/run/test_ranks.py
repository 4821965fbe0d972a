"""Several processes: the same bytes as one, whoever ends on the way, with any number of them after a resume.

Ranks are threads here, each with its own job, store and gloo group; `test_ranks_killed.py` has processes.
"""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import digests, make_set, model_digests
from jobs import Interrupt, Merged, merge
from torch.distributed import HashStore

from ota_kernels import InputError, OutputError, RunError
from ota_kernels.errors import StoppedError
from ota_kernels.run import ranks as processes
from ota_kernels.run import shares
from ota_kernels.run.job import Job, Options, Silent, as_recipe
from ota_kernels.run.ranks import ALONE, Several, _parts
from ota_kernels.run.rules import RULES, Rules
from ota_kernels.select.bracket import Bracket

TILE = 1500
SHAPES = {
    "embed": (300, 40),
    **{f"layers.{i}.weight": (50, 60) for i in range(9)},
    **{f"layers.{i}.bias": (60,) for i in range(9)},
    "scale": (),
    "empty": (0, 3),
}
# Every way in which thresholds and coefficients come about.
VARIANTS = {
    "threshold": ("ota", {"precond_threshold": 2e-16}),
    "density": ("ota", {"density": 0.3, "normalise": "model"}),
    "mass": ("ota", {"saliency_mass": 0.8, "rank1_approx": True}),
    "density of tensors": ("ota", {"density": 0.3, "density_scope": "tensor"}),
    "mass of tensors": ("ota", {"saliency_mass": 0.8, "density_scope": "tensor", "normalise": "global"}),
    "rescaled": ("ota", {"density": 0.3, "rescale": True}),
    "linear": ("linear", {"weight": [0.5, 0.2, 0.3]}),
    "ties": ("ties", {"density": 0.3, "weight": 1.0}),
    "dare": ("dare_ties", {"density": 0.4, "weight": 1.0, "rescale": True}),
    "della": ("della", {"density": 0.5, "weight": 1.0}),
    "sce": ("sce", {"select_topk": 0.2}),
    "breadcrumbs": ("breadcrumbs", {"density": 0.6, "gamma": 0.1, "weight": 1.0}),
    "model stock": ("model_stock", {}),
    "karcher": ("karcher", {}),
    "ramplus": ("ramplus", {}),
    "stitch": ("localize_stitch", {"density": 0.2}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("models"), SHAPES)


@pytest.fixture(autouse=True)
def small_lots(monkeypatch):
    monkeypatch.setattr(shares, "LEAST_LOT", 1)


def in_threads(one, size):
    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def stopping(step, call):
    """For `Rules.before`: an interrupt at a call on whichever rank; tiles take long enough to notice it."""
    interrupt = Interrupt(step, call)

    def before(step, segment):
        interrupt(step, segment)
        if step == "tile":
            time.sleep(0.01)

    return before


def together(size, recipe, out, rules=RULES, *, lost=30.0, **options) -> list:
    """What each of `size` ranks returns or raises. rules: for all, or by rank."""
    store, found = HashStore(), [None] * size

    def one(rank):
        own = rules[rank] if isinstance(rules, list) else rules
        try:
            with (
                Several(store, rank, size, beat=0.01, lost=lost) as ranks,
                Job(as_recipe(recipe), Options.of(threads=1, **options), own, ranks) as job,
            ):
                found[rank] = job.run(Path(out), Silent())
        except BaseException as error:
            found[rank] = error

    in_threads(one, size)
    return found


def merged_together(size, recipe, out, rules=RULES, **options) -> dict:
    found = together(size, recipe, out, rules, **options)
    for report in found:
        if isinstance(report, BaseException):
            raise report
    assert all(report == found[0] for report in found)
    return found[0]


def alike(report: dict) -> dict:
    """What a report says of the result, not of how it came about."""
    names = ("tensors", "experts", "unkept", "overflow", "repaired", "found", "checksums")
    return json.loads(json.dumps({name: report[name] for name in names}))


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    """variant -> (digests, report) of one process."""
    known = {}

    def of(variant):
        if variant not in known:
            out = tmp_path_factory.mktemp("alone") / "out"
            method, parameters = VARIANTS[variant]
            report = merge(models.recipe(method, **parameters), out, shard_size=20_000)
            known[variant] = model_digests(out), alike(report)
        return known[variant]

    return of


def recipe_of(models, variant):
    method, parameters = VARIANTS[variant]
    return models.recipe(method, **parameters)


@pytest.mark.parametrize("variant", VARIANTS)
def test_three_ranks_write_what_one_does(models, tmp_path, alone, variant):
    merged = Merged()
    report = merged_together(
        3, recipe_of(models, variant), tmp_path / "out", merged.rules, tile_elements=TILE, shard_size=20_000
    )
    assert (model_digests(tmp_path / "out"), alike(report)) == alone(variant)
    assert report["processes"] == 3
    assert merged.elements == sum(map(math.prod, SHAPES.values()))  # each once
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("variant", ["density", "mass of tensors", "dare", "threshold"])
@pytest.mark.parametrize("sizes", [(3, 1), (1, 3), (2, 4, 3)], ids=str)
def test_a_resume_with_another_number_of_ranks(models, tmp_path, alone, variant, sizes):
    recipe, out = recipe_of(models, variant), tmp_path / "out"
    options = {"tile_elements": TILE, "shard_size": 20_000, "candidates_memory": 0}
    for round_, size in enumerate(sizes[:-1]):
        stop = Rules(before=stopping("tile", 6))  # on whichever rank the sixth tile is
        found = together(size, recipe, out, stop, resume=round_ > 0, **options)
        assert sum(isinstance(x, KeyboardInterrupt) for x in found) == 1
        assert sum(isinstance(x, StoppedError) for x in found) == size - 1
        assert not out.exists()
    report = merged_together(sizes[-1], recipe, out, resume=True, **options)
    assert (model_digests(out), alike(report)) == alone(variant)
    assert report["resumed"]


@pytest.mark.parametrize("step", ["patch", "missed"])
@pytest.mark.parametrize("variant", ["density", "mass of tensors"])
def test_stopped_while_thresholds_are_settled(models, tmp_path, alone, variant, step):
    misplaced = Rules(bracket=lambda selection, scores: Bracket(1e30, 5)) if step == "missed" else Rules()
    recipe, out = recipe_of(models, variant), tmp_path / "out"
    options = {"tile_elements": TILE, "shard_size": 20_000, "candidates_memory": 0}
    if variant == "mass of tensors":
        misplaced = replace(misplaced, direct=100)
    stop = replace(misplaced, before=stopping(step, 1))
    found = together(3, recipe, out, stop, **options)
    assert sum(isinstance(x, KeyboardInterrupt) for x in found) == 1
    report = merged_together(2, recipe, out, misplaced, resume=True, **options)
    assert (model_digests(out), alike(report)) == alone(variant)
    if step == "missed" and variant == "density":
        assert report["repeats"] == 1


def test_buffers_are_copied_once(tmp_path):
    import torch

    own = make_set(tmp_path / "models", {"a": (50, 60)}, experts=2)
    for tensors in (own.base, *own.experts):
        tensors |= {f"ids{i}": torch.arange(10 * i, dtype=torch.int64) for i in range(6)}
    own.save()
    merge(own.recipe(precond_threshold=1e-16), tmp_path / "expected")
    merged_together(3, own.recipe(precond_threshold=1e-16), tmp_path / "out")
    assert model_digests(tmp_path / "out") == model_digests(tmp_path / "expected")


def test_a_slow_rank_holds_nobody_up(models, tmp_path):
    """Work is taken: while one rank is at its first tile, the other does all the rest."""
    others, free = [], threading.Event()
    tiles = sum(max(-(-math.prod(shape) // TILE), 1) for shape in SHAPES.values())

    def slow(step, segment):
        if step == "tile":
            assert free.wait(30)

    def quick(step, segment):
        if step == "tile":
            others.append(segment)
            if len(others) > tiles // 2:
                free.set()

    rules = [Rules(before=slow), Rules(before=quick)]
    merged_together(2, models.recipe("linear", weight=1.0), tmp_path / "out", rules, tile_elements=TILE)
    assert len(others) > tiles // 2


class TestEnds:
    def test_an_error_on_one_rank_ends_all_and_one_says_why(self, models, tmp_path):
        stop = stopping("tile", 3)

        def failing(step, segment):
            try:
                stop(step, segment)
            except KeyboardInterrupt:
                raise RunError("the disk is full") from None

        found = together(3, models.recipe(), tmp_path / "out", Rules(before=failing))
        (said,) = (x for x in found if type(x) is RunError)
        assert str(said) == "the disk is full"
        assert sorted(type(x).__name__ for x in found) == ["RunError", "StoppedError", "StoppedError"]

    def test_a_rank_that_is_not_heard_of_ends_all(self, models, tmp_path):
        """As one that was killed, or whose host is gone."""
        begun, store, found = time.monotonic(), HashStore(), {}
        Several(store, 2, 3)._say_alive(1)

        def one(rank):
            try:
                with (
                    Several(store, rank, 3, beat=0.01, lost=0.5) as ranks,
                    Job(as_recipe(models.recipe()), Options.of(threads=1), RULES, ranks) as job,
                ):
                    job.run(tmp_path / "out", Silent())
            except BaseException as error:
                found[rank] = error

        in_threads(one, 2)
        assert sorted(type(x).__name__ for x in found.values()) == ["RunError", "StoppedError"]
        (said,) = (str(x) for x in found.values() if type(x) is RunError)
        assert "rank 2 of 3 on" in said
        assert "--resume goes on" in said
        assert time.monotonic() - begun < 30
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("met_before", [False, True])
    def test_a_rank_that_ends_between_being_there_and_the_sum(self, monkeypatch, met_before):
        """gloo waits for it, the merge no longer than for any rank that is not heard of."""
        monkeypatch.setattr(processes, "TOGETHER", 600.0)
        store, found = HashStore(), {}

        def one(rank):
            try:
                with Several(store, rank, 2, beat=0.01, lost=0.5) as ranks:
                    if met_before:
                        ranks.total(np.ones(1))
                    if rank == 1:
                        ranks.wait()
                        ranks._ended.set()
                        while 0 not in found:
                            time.sleep(0.01)
                    else:
                        ranks.total(np.ones(1))
            except BaseException as error:
                found[rank] = error

        begun = time.monotonic()
        in_threads(one, 2)
        assert type(found[0]) is RunError
        assert "--resume goes on" in str(found[0])
        assert time.monotonic() - begun < 20

    def test_values_that_are_not_finite_leave_nothing_to_resume(self, tmp_path):
        own = make_set(tmp_path / "models", {f"w{i}": (50, 60) for i in range(4)}, experts=2)
        own.experts[1]["w2"][3, 3] = math.inf
        own.save()
        found = together(2, own.recipe(), tmp_path / "out")
        assert sorted(type(x).__name__ for x in found) == ["InputError", "StoppedError"]
        assert [p.name for p in tmp_path.iterdir()] == ["models"]

    def test_an_output_that_is_in_the_way(self, models, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").touch()
        found = together(2, models.recipe(), tmp_path / "out")
        assert [type(x) for x in found] == [OutputError, StoppedError]

    def test_of_a_complete_output_all_return_the_report(self, models, tmp_path):
        first = merged_together(2, models.recipe(), tmp_path / "out")
        before = digests(tmp_path / "out")
        assert merged_together(3, models.recipe(), tmp_path / "out", resume=True) == first
        assert digests(tmp_path / "out") == before

    def test_ranks_that_see_other_inputs(self, models, tmp_path, monkeypatch):
        seen, numbers = Job.sources_seen.func, itertools.count()

        def elsewhere(self):
            found = seen(self)
            return found | {next(iter(found)): [1, next(numbers)]} if self.ranks.rank == 1 else found

        monkeypatch.setattr(Job, "sources_seen", property(elsewhere))
        found = together(2, models.recipe(), tmp_path / "out")
        assert "rank 1 has another" in str(found[1])

    def test_without_a_shared_file_system(self, models, tmp_path, monkeypatch):
        """What rank 1 calls the work folder is another folder than rank 0's."""
        from ota_kernels.io.workfolder import WorkFolder

        meet = WorkFolder.meet

        def elsewhere(self, tell, wait, is_first):
            if not is_first:
                self.path = tmp_path / "elsewhere"
                self.files = self.path / "files"
            meet(self, tell, wait, is_first)

        monkeypatch.setattr(WorkFolder, "meet", elsewhere)
        found = together(2, models.recipe(), tmp_path / "out")
        assert type(found[1]) is RunError
        assert "all hosts share" in str(found[1])
        assert type(found[0]) is StoppedError


class TestWords:
    def test_a_sum_over_all_of_each_type(self):
        store, found = HashStore(), {}

        def one(rank):
            with Several(store, rank, 3, beat=0.01) as ranks:
                told = ranks.tell(lambda: {"rank": rank})
                arrays = [np.full((2, 3), rank + 1, dtype) for dtype in (np.int64, np.float64, np.float32)]
                large = np.array([(1 << 63) + 5 if rank == 1 else 0], np.uint64)
                found[rank] = told, [ranks.total(x).tolist() for x in (*arrays, large)]

        in_threads(one, 3)
        expected = {"rank": 0}, [[[6, 6, 6]] * 2] * 3 + [[(1 << 63) + 5]]
        assert found == dict.fromkeys(range(3), expected)

    def test_rank_0_hears_how_much_all_have_done(self):
        store, found = HashStore(), {}

        def one(rank):
            with Several(store, rank, 3, beat=0.01) as ranks:
                found[rank] = ranks.done(100 + rank)
                ranks.wait()
                until = time.monotonic() + 30
                while rank == 0 and found[0] < 303 and time.monotonic() < until:
                    found[0] += ranks.done(0)
                    time.sleep(0.01)
                ranks.wait()

        in_threads(one, 3)
        assert found == {0: 303, 1: 101, 2: 102}

    def test_every_piece_is_taken_once_neighbours_by_one(self):
        store, found = HashStore(), {}
        pieces = [f"piece {i}" for i in range(40)]

        def one(rank):
            with Several(store, rank, 4, beat=0.01) as ranks:
                found[rank] = list(ranks.take(pieces, [1] * 40))
                ranks.wait()

        in_threads(one, 4)
        assert sorted(piece for own in found.values() for piece in own) == sorted(pieces)

    @pytest.mark.parametrize("sizes", [[], [5], [1] * 10, [100, 1, 1, 1], [1, 1, 1, 100], [0, 0, 0]])
    def test_parts_are_all_pieces_in_order(self, sizes):
        parts = _parts(sizes, 3)
        assert parts[0] == 0
        assert parts[-1] == len(sizes)
        assert parts == sorted(parts)
        if sizes == [1] * 10:
            assert [b - a for a, b in itertools.pairwise(parts)] in ([3, 4, 3], [4, 3, 3], [3, 3, 4])

    def test_one_process_asks_nobody(self, monkeypatch):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        assert processes.of_environment() is ALONE
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "1")
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", "1")
        assert processes.of_environment() is ALONE


def test_an_input_that_changes_while_it_is_merged(tmp_path):
    import os

    own = make_set(tmp_path / "models", {"a": (50, 60)}, experts=2)

    def touched(step, segment):
        os.utime(own.base_folder / "model.safetensors", ns=(1, 1))

    with pytest.raises(InputError, match=r"base/model\.safetensors: has changed while"):
        merge(own.recipe(), tmp_path / "out", Rules(before=touched))
    assert [p.name for p in tmp_path.iterdir()] == ["models"]
