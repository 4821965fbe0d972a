"""Densities found while merging from disk: interrupts, spilled candidates, what is left, what is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import CURVATURE, WEIGHTS, make_set, model_digests
from jobs import Interrupt, merge
from models import random_experts, undecided

from ota_kernels import RunError
from ota_kernels.backends import native, reference
from ota_kernels.io import journal
from ota_kernels.run.found import scores_of
from ota_kernels.run.rules import Rules
from ota_kernels.select.bracket import Bracket, bracket_of
from ota_kernels.select.pending import Pending, Store
from ota_kernels.select.thresholds import SMALLEST
from ota_kernels.tensors.buffer import Buffer
from ota_kernels.tensors.curvature import Log8, LowRank, Rank1
from ota_kernels.tensors.dtypes import BY_NAME
from ota_kernels.tensors.result import Counts
from ota_kernels.tensors.segment import Segment
from ota_kernels.tensors.terms import ExpertTerms, Terms, Words, score_bits, score_of_bits
from ota_kernels.tensors.tile import TensorInputs

# Two tensors whose own thresholds are bracketed, and small ones.
SHAPES = {
    "wide": (180, 200),
    **{f"layers.{i}.weight": (30, 40) for i in range(5)},
    **{f"layers.{i}.bias": (40,) for i in range(5)},
    "long": (40_000,),
    "scale": (),
    "empty": (0, 3),
}
MIXED = [{"density": 0.3}, {"precond_threshold": 2e-16}, {"saliency_mass": 0.8}]
SCOPES = ("model", "tensor")
TILE = 4096


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("models"), SHAPES)


def recipe_of(models, scope: str) -> dict:
    recipe = models.recipe(density_scope=scope)
    for model, own in zip(recipe["models"], MIXED, strict=True):
        model["parameters"] |= own
    return recipe


@pytest.fixture(scope="module")
def expected(models, tmp_path_factory):
    """The digests and the report of a merge in one go, by scope."""
    folder, found = tmp_path_factory.mktemp("expected"), {}
    for scope in SCOPES:
        report = merge(recipe_of(models, scope), folder / scope, threads=1, tile_elements=1 << 20)
        found[scope] = model_digests(folder / scope), report
    return found


def assert_as_expected(out: Path, report: dict, expected: tuple[dict, dict]) -> None:
    """The same bytes and counts, and nothing left behind."""
    digests, one_go = expected
    assert model_digests(out) == digests
    assert (report["tensors"], report["experts"]) == (one_go["tensors"], one_go["experts"])
    assert not list(out.rglob("candidates*"))
    assert os.listdir(out.parent) == [out.name]


def records(out: Path) -> list[dict]:
    return journal.read(out.parent / f".{out.name}.ota-merge")[0]


OPTIONS = [
    {"threads": 1, "tile_elements": 1000, "candidates_memory": 0},
    {"threads": 2, "tile_elements": 1000},
    {"threads": 3, "tile_elements": 4096, "candidates_memory": 10_000},
    {"threads": 1, "tile_elements": 4096},
    {"threads": 2, "tile_elements": 100_000, "candidates_memory": 0},
    {"threads": 3, "tile_elements": 100_000},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_threads_tiles_and_memory_change_nothing(models, tmp_path, expected, scope, options):
    report = merge(recipe_of(models, scope), tmp_path / "out", **options)
    assert_as_expected(tmp_path / "out", report, expected[scope])
    assert report["repeats"] == 0


def test_both_backends_keep_the_same(models, tmp_path, expected):
    report = merge(recipe_of(models, "model"), tmp_path / "out", backend="reference", tile_elements=20_000)
    assert report["tensors"] == expected["model"][1]["tensors"]


def test_model_scope_is_the_merge_with_these_thresholds(models, tmp_path, expected):
    digests, report = expected["model"]
    known = models.recipe(precond_threshold=[e["threshold"] for e in report["experts"]])
    again = merge(known, tmp_path / "out")
    assert model_digests(tmp_path / "out") == digests
    assert again["tensors"] == report["tensors"]


@pytest.mark.parametrize("options", [{}, {"candidates_memory": 0}], ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_brackets_of_more_scores_than_memory_holds(models, tmp_path, expected, scope, options):
    report = merge(recipe_of(models, scope), tmp_path / "out", Rules(few=0, batch=1000), **options)
    assert_as_expected(tmp_path / "out", report, expected[scope])


def misplaced(selection, scores) -> Bracket:
    """A bracket of the right width above the threshold."""
    right = bracket_of(selection, scores)
    bits = score_bits(right.lowest) + right.span + (1 << 23)  # twice the score, and more
    return Bracket(score_of_bits(bits), right.span)


MISPLACED = Rules(bracket=misplaced)


class Progress:
    """Counts what it is told."""

    def __init__(self):
        self.done = self.total = 0

    def stage(self, name, total_bytes):
        self.total += total_bytes

    def advance(self, nbytes):
        self.done += nbytes


@pytest.mark.parametrize("options", OPTIONS[1:5:2] + OPTIONS[4:], ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_brackets_that_miss(models, tmp_path, expected, scope, options):
    progress = Progress()
    report = merge(recipe_of(models, scope), tmp_path / "out", MISPLACED, progress, **options)
    assert report["repeats"] == (1 if scope == "model" else 2)
    assert progress.done == progress.total > 0
    assert_as_expected(tmp_path / "out", report, expected[scope])


MEMORY = {"in memory": {}, "spilled": {"candidates_memory": 0}, "both": {"candidates_memory": 30_000}}


@pytest.mark.parametrize("options", MEMORY.values(), ids=MEMORY)
@pytest.mark.parametrize("scope", SCOPES)
def test_interrupted_while_merging(models, tmp_path, expected, scope, options):
    """Again and again, a few tiles further each time."""
    recipe, out = recipe_of(models, scope), tmp_path / "out"
    # One thread: all units before the interrupt are recorded. The first holds the twelve small tensors.
    options = {"tile_elements": TILE, "threads": 1, "resume": True} | options
    for call in (3, 14, 2, 4):
        with pytest.raises(KeyboardInterrupt):
            merge(recipe, out, Rules(before=Interrupt("tile", call)), **options)
    found = records(out)
    assert any("pending" in record or "unit" in record for record in found)
    assert not any("decided" in record for record in found) or scope == "tensor"
    report = merge(recipe, out, **options)
    assert report["resumed"]
    assert_as_expected(out, report, expected[scope])


@pytest.mark.parametrize("cached", [True, False], ids=["then not", "then cached"])
@pytest.mark.parametrize("scope", SCOPES)
def test_the_page_cache_changes_before_a_resume(models, tmp_path, expected, scope, cached):
    """A tensor that is half merged is sampled again: its bracket must be the one of its candidates."""
    recipe, out = recipe_of(models, scope), tmp_path / "out"
    options = {"tile_elements": TILE, "threads": 1, "candidates_memory": 0}
    rules = Rules(mapped=0, cached=lambda buffers: cached)
    with pytest.raises(KeyboardInterrupt):
        merge(recipe, out, replace(rules, before=Interrupt("tile", 17)), **options)
    assert any("pending" in record for record in records(out))
    rules = replace(rules, cached=lambda buffers: not cached)
    report = merge(recipe, out, rules, resume=True, **options)
    assert report["resumed"]
    assert_as_expected(out, report, expected[scope])


@pytest.mark.parametrize("options", MEMORY.values(), ids=MEMORY)
@pytest.mark.parametrize("scope", SCOPES)
def test_interrupted_while_settling(models, tmp_path, expected, scope, options):
    recipe, out = recipe_of(models, scope), tmp_path / "out"
    options = {"tile_elements": TILE, "threads": 2} | options
    with pytest.raises(KeyboardInterrupt):
        merge(recipe, out, Rules(before=Interrupt("patch", 4)), **options)
    assert any("decided" in record for record in records(out))
    if options.get("candidates_memory") == 0:  # those that are left are in the file, and settled first
        with pytest.raises(KeyboardInterrupt):
            merge(recipe, out, Rules(before=Interrupt("patch", 2)), resume=True, **options)
    report = merge(recipe, out, resume=True, **options)
    assert_as_expected(out, report, expected[scope])


@pytest.mark.parametrize("scope", SCOPES)
def test_checkpoints_lose_nothing(models, tmp_path, expected, scope):
    """Candidates that were held in memory, and go to the file after every tile."""
    recipe, out = recipe_of(models, scope), tmp_path / "out"
    rules = Rules(checkpoint_seconds=-1.0, before=Interrupt("tile", 17))
    with pytest.raises(KeyboardInterrupt):
        merge(recipe, out, rules, tile_elements=TILE, threads=1)
    assert any("pending" in record for record in records(out))
    report = merge(recipe, out, resume=True, tile_elements=1000)
    assert_as_expected(out, report, expected[scope])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("later", [1, 4])
def test_interrupted_while_a_missed_bracket_is_merged_again(models, tmp_path, expected, scope, later):
    """What was decided is not forgotten, nor that it took a repeat."""
    recipe, out = recipe_of(models, scope), tmp_path / "out"
    options = {"tile_elements": TILE, "threads": 1, "candidates_memory": 0}
    with pytest.raises(KeyboardInterrupt):
        merge(recipe, out, replace(MISPLACED, before=Interrupt("tile", later, after="missed")), **options)
    assert any(record.get("decided", [None] * 3)[2] for record in records(out))  # as a repeat
    report = merge(recipe, out, MISPLACED, resume=True, **options)
    assert report["repeats"] == (1 if scope == "model" else 2)
    assert_as_expected(out, report, expected[scope])


@pytest.mark.parametrize("scope", SCOPES)
def test_a_missed_bracket_after_a_resume_that_lacked_first_tiles(models, tmp_path, expected, scope):
    """A kill loses the candidates in memory: those of a tensor's first tile, while its last one's are in the
    file."""
    recipe, out = recipe_of(models, scope), tmp_path / "out"
    options = {"tile_elements": TILE, "threads": 1, "candidates_memory": 0}
    with pytest.raises(KeyboardInterrupt):
        merge(recipe, out, replace(MISPLACED, before=Interrupt("missed", 1)), **options)
    found = records(out)
    left = [r for r in found if r.get("pending", [0, 1])[1] > 0]
    assert len(left) < len(found)
    path = tmp_path / ".out.ota-merge" / "journal.jsonl"
    path.write_bytes(b"".join(map(journal.line_of, left)))
    report = merge(recipe, out, MISPLACED, resume=True, **options)
    assert report["resumed"]
    assert report["repeats"] == (1 if scope == "model" else 2)
    assert_as_expected(out, report, expected[scope])


def test_a_file_of_candidates_that_was_cut(models, tmp_path):
    recipe, out = recipe_of(models, "model"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        merge(recipe, out, Rules(before=Interrupt("patch", 1)), tile_elements=TILE, candidates_memory=0)
    path = tmp_path / ".out.ota-merge" / "candidates.bin"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(RunError, match=r"candidates\.bin was cut.*--overwrite"):
        merge(recipe, out, resume=True)


READS = """
import json, os, sys
from ota_kernels import merge
recipe, out, files = json.load(sys.stdin)

def bytes_read():
    with open("/proc/self/io") as file:
        return int(dict(line.split(": ") for line in file)["read_bytes"])

merge(recipe["small"], out + "-small")  # loads everything that a merge needs
for path in files:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
before = bytes_read()
merge(recipe["large"], out)
print(bytes_read() - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/io", os.R_OK), reason="/proc/self/io tells what is read")
@pytest.mark.parametrize("elements", [1_500_000, 4_500_000], ids=["sampled from pages", "from files"])
def test_every_byte_is_read_from_the_disk_once(tmp_path, elements):
    """Sampling, merging and settling together read 1.05 times the inputs at most."""
    shapes = {"a": (elements // 1500, 1000), "b": (elements // 3,)}
    large = make_set(tmp_path / "large", shapes, experts=1)
    small = make_set(tmp_path / "small", {"a": (100, 400)}, experts=1)
    files = [f / WEIGHTS for f in (large.base_folder, *large.expert_folders)]
    files += [folder / CURVATURE for folder in large.expert_folders]
    recipes = {"large": large.recipe(density=0.3), "small": small.recipe(density=0.3)}
    given = json.dumps([recipes, str(tmp_path / "out"), [str(f) for f in files]])
    done = subprocess.run(
        [sys.executable, "-c", READS], input=given, capture_output=True, text=True, check=True
    )
    size, read = sum(f.stat().st_size for f in files), int(done.stdout)
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert (report["passes"], report["repeats"]) == (1, 0)
    if read < size / 2:
        pytest.skip(f"the page cache kept the files: {read} of {size} bytes came from the disk")
    assert read <= 1.05 * size


SHAPE = (37, 11)


def tile_of(kind: str, dtypes=("float32",), base: str | None = "float32") -> TensorInputs:
    """A tensor with this form of curvature."""
    rng = np.random.default_rng(4)
    curvature_dtypes = (kind,) if kind in ("float32", "bfloat16", "float16") else ("float32",)
    without = kind == "uniform"
    experts = random_experts(
        4,
        SHAPE,
        2,
        dtypes=dtypes,
        base_dtype=base,
        curvature_dtypes=None if without else curvature_dtypes,
    )
    tensor = experts.inputs("float32", bias_corrections=(1.0, 0.5))
    rows, columns = (rng.random((n, 3)).astype(np.float32) for n in SHAPE)
    codes = Buffer(rng.integers(0, 256, tensor.numel, np.uint8), BY_NAME["uint8"])
    factors = {
        "log8": Log8(codes, rows[:, 1].copy(), SHAPE[1], bias_correction=0.25),
        "rank 1": Rank1(rows[:, 0].copy(), columns[:, 0].copy(), bias_correction=0.5),
        "rank 3": LowRank(rows, np.ascontiguousarray(columns.T)),
    }
    return replace(tensor, curvatures=(factors[kind],) * 2) if kind in factors else tensor


def pending_of(tile: TensorInputs, backend, share: float = 0.5) -> Pending:
    """Of a bracket from the middle score of each expert on."""
    experts, known = [], scores_of(len(tile.experts), tile)
    for t, e in enumerate(known.experts):
        scores = np.sort(backend.scores(tile, t, known)[0])
        lowest = max(float(scores[int(len(scores) * share)]), SMALLEST)
        experts.append(replace(e, threshold=lowest, span=score_bits(np.inf) - score_bits(lowest) + 1))
    out = np.empty(tile.numel * tile.out_dtype.itemsize, np.uint8)
    stats = backend.merge(tile, Terms(known.words, tuple(experts), epsilon=1e-26), out)
    return Pending.of(Segment(0, 0, tile.numel), tile, stats, Counts.of(stats, [])).owned()


def raw(candidates) -> list[bytes]:
    arrays = [candidates.positions, *(b.data for b in candidates.operands.buffers), *candidates.steps]
    arrays += [column for alternatives in candidates.alternatives for column in alternatives]
    return [a.tobytes() for a in arrays]


def steps_of(candidates, t: int) -> bytes:
    alternatives = b"".join(a.steps.tobytes() for a in candidates.alternatives[t : t + 1])
    return candidates.steps[t].tobytes() + alternatives


KINDS = ("uniform", "float32", "bfloat16", "float16", "log8", "rank 1", "rank 3")
DTYPES = (
    ("float32",),
    ("bfloat16",),
    ("float16",),
    ("float64",),
    ("float8_e4m3fn", "bfloat16"),
    ("float8_e5m2",),
)


@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_runs_are_those_of_their_elements(monkeypatch, isa, kind, dtypes):
    monkeypatch.setattr(native, "instruction_set", lambda: isa)
    tile = tile_of(kind, dtypes, None if dtypes == ("float16",) else dtypes[0])
    terms, experts = scores_of(2, tile), (1, 0)
    for length, count in ((16, 100), (5, 3), (tile.numel, 1), (16, 0)):
        starts = np.random.default_rng(5).integers(0, tile.numel - length + 1, count)
        found = [np.empty(count * length, np.float32) for _ in experts]
        assert native.run_scores(tile, terms, experts, starts, length, found) is None
        for scores, t in zip(found, experts, strict=True):
            whole = native.scores(tile, t, terms)[0]
            np.testing.assert_array_equal(
                scores.reshape(count, length), whole[starts[:, None] + np.arange(length)]
            )


TERMS = Terms(Words(), (ExpertTerms(),) * 2)


@pytest.mark.parametrize("start", [-1, 37 * 11 - 15])
def test_a_run_outside_is_refused(start):
    room = [np.empty(32, np.float32)]
    with pytest.raises(ValueError, match="a run outside"):
        native.run_scores(tile_of("float32"), TERMS, [0], np.array([0, start]), 16, room)


@pytest.mark.parametrize(
    "out", [np.empty(32, np.float64), np.empty(64, np.float32)[::2]], ids=["type", "gaps"]
)
def test_scores_are_not_written_to_a_copy(out):
    with pytest.raises(ValueError, match="scores"):
        native.run_scores(tile_of("float32"), TERMS, [0], np.array([0, 16]), 16, [out])


class TestStore:
    @pytest.mark.parametrize("backend", [native, reference], ids=lambda b: b.NAME)
    @pytest.mark.parametrize("dtypes", DTYPES, ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    def test_round_trips(self, tmp_path, backend, kind, dtypes):
        base = None if dtypes == ("float16",) and kind != "uniform" else dtypes[0]
        tile = tile_of(kind, dtypes, base)
        pending = pending_of(tile, backend)
        candidates, count = pending.memory, len(pending.memory.positions)
        assert 0 < count <= len(undecided(candidates)) < tile.numel
        assert bool(candidates.alternatives) == (backend is native)
        chosen = tile.gather(candidates.positions.astype(np.int64))
        for found, of_tile in zip(candidates.operands.experts, chosen.experts, strict=True):
            assert found.data.tobytes() == of_tile.data.tobytes()
        store, memory = Store(0, tmp_path / "file"), Store(1 << 20)
        store.put(pending_of(tile, backend, 0.9))  # lies before it
        written, held = store.put(pending), memory.put(pending)
        spilled = memory.spill(held)
        assert (written.memory, spilled.memory, held.memory) == (None, None, candidates)
        after = Store(0, tmp_path / "file")
        after.restore(written, tile)
        assert after.put(pending_of(tile, backend, 0.8)).offset == written.offset + pending.nbytes(tile)
        for source, one in [(store, written), (memory, held), (memory, spilled), (after, written)]:
            found = source.get(one, tile)
            assert raw(found) == raw(candidates)
            for t in range(len(tile.experts)):
                listed = source.steps(one, tile, t)
                assert b"".join(x.tobytes() for x in listed) == steps_of(candidates, t)
                assert sum(map(len, listed)) == one.listed(t)
            corrections = [c.bias_correction for c in found.operands.curvatures]
            assert corrections == [c.bias_correction for c in tile.curvatures]
        for one in (store, memory, after):
            one.close()

    def test_keeps_what_the_budget_allows(self, tmp_path):
        tile = tile_of("float32")
        pending = pending_of(tile, native)
        candidates, size = pending.memory, pending.nbytes(tile)
        alternatives = sum(len(a.positions) for a in candidates.alternatives)
        of_candidates = len(candidates.positions) * (4 + 3 * 4 + 2 * 4) + 4 * sum(map(len, candidates.steps))
        assert size == of_candidates + alternatives * (4 + 4 + 4)
        store = Store(2 * size, tmp_path / "file")
        first, second, third = (store.put(pending) for _ in range(3))
        assert [held.memory is None for held in (first, second, third)] == [False, False, True]
        assert (tmp_path / "file").stat().st_size == size
        store.drop(third)  # was not in memory: frees none
        assert store.put(pending).memory is None
        store.drop(first)
        assert store.put(pending).memory is not None
        assert store.put(pending).memory is None
        assert store.spill(second).memory is None
        assert store.put(pending).memory is not None
        store.sync()
        store.close()

    def test_a_file_that_was_cut_is_an_error(self, tmp_path):
        tile = tile_of("bfloat16")
        store = Store(0, tmp_path / "file")
        held = store.put(pending_of(tile, native))
        os.truncate(tmp_path / "file", held.nbytes(tile) - 1)
        with pytest.raises(RunError, match=r"file was cut: start again with --overwrite"):
            store.get(held, tile)
        os.truncate(tmp_path / "file", 1)
        with pytest.raises(RunError, match=r"file was cut: start again with --overwrite"):
            store.steps(held, tile, 1)
        store.close()

    def test_a_disk_that_cannot_be_read_is_an_error(self, tmp_path, monkeypatch):
        def broken(*arguments):
            raise OSError(5, os.strerror(5))

        tile = tile_of("float32")
        store = Store(0, tmp_path / "file")
        held = store.put(pending_of(tile, native))
        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(RunError, match=r"cannot read .*file: Input/output error"):
            store.get(held, tile)
        store.close()

    def test_a_disk_that_is_full_is_an_error(self, tmp_path, monkeypatch):
        def full(*arguments):
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(RunError, match=r"cannot write .*file.*--resume"):
            Store(0, tmp_path / "file").put(pending_of(tile_of("float32"), native))

    def test_leaves_no_unnamed_file_open(self):
        before = len(os.listdir("/proc/self/fd"))
        store = Store(0)
        held = store.put(pending_of(tile_of("float32"), native))
        assert raw(store.get(held, tile_of("float32")))
        store.close()
        assert len(os.listdir("/proc/self/fd")) == before
