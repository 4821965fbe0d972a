"""Blocks that the native kernel merges in registers (csrc/streamed.hpp): the same bytes, counts and
candidates as from its portable loops, which the other tests hold against the formulas."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from models import random_experts, undecided

from ota_kernels.backends import native, reference
from ota_kernels.run.found import scores_of
from ota_kernels.select.pending import Pending
from ota_kernels.tensors import log8
from ota_kernels.tensors.buffer import Buffer
from ota_kernels.tensors.curvature import Log8, Rank1
from ota_kernels.tensors.dtypes import BY_NAME
from ota_kernels.tensors.result import Counts, MergeStats
from ota_kernels.tensors.segment import Segment
from ota_kernels.tensors.terms import ExpertTerms, Terms, Words, score_bits, score_of_bits, score_scale
from ota_kernels.tensors.tile import TensorInputs

WIDER = [isa for isa in native.instruction_sets() if isa != "base"]
pytestmark = pytest.mark.skipif(not WIDER, reason="this processor runs the portable loops only")

ROWS, COLUMNS = 19, 192  # 3 blocks of 1024 and a part of one; rows end inside of blocks
ELEMENTS = ROWS * COLUMNS
CURVATURES = ("float32", "bfloat16", "float16", "rank1", "log8")
BRACKET = 1 << 20  # float32 numbers: about an eighth of a power of two


def tile(weights: str, curvature: str, out: str, n_experts: int = 3, seed: int = 0) -> TensorInputs:
    stored = curvature if curvature in BY_NAME else "float32"
    made = random_experts(
        seed, (ROWS, COLUMNS), n_experts, dtypes=(weights,), base_dtype=weights, curvature_dtypes=(stored,)
    ).inputs(out)
    if curvature == "rank1":
        compressed = [rank1(c.float32().reshape(ROWS, COLUMNS)) for c in made.curvatures]
    elif curvature == "log8":
        compressed = [log8_of(c.float32().reshape(ROWS, COLUMNS)) for c in made.curvatures]
    else:
        return made
    return replace(made, curvatures=tuple(compressed))


def rank1(h: np.ndarray) -> Rank1:
    return Rank1.of_sums(h.sum(axis=1), h.sum(axis=0))


def log8_of(h: np.ndarray) -> Log8:
    codes, scales = log8.encode(h)
    return Log8(Buffer(codes.reshape(-1), BY_NAME["uint8"]), scales, h.shape[1])


def terms_of(inputs: TensorInputs, open_: bool = False, masked: bool = True, **numbers) -> Terms:
    """Thresholds at the median of the scores; open_: brackets that begin there."""
    experts = []
    for t in range(len(inputs.experts)):
        median = 0.0
        if masked:
            scores, _ = reference.scores(inputs, t, scores_of(len(inputs.experts), inputs))
            median = float(np.float32(np.median(scores)))
        e = ExpertTerms(score_scale=score_scale(True), weight_scale=2.0**40 * (t + 1))
        experts.append(replace(e, threshold=median, span=BRACKET if open_ else 0))
    words = Words() if masked else Words(score="none", select="all")
    return Terms(words, tuple(experts), epsilon=1e-26 * 2.0**40, **numbers)


def merge(monkeypatch, isa: str, inputs: TensorInputs, terms: Terms) -> tuple[bytes, MergeStats]:
    monkeypatch.setattr(native, "instruction_set", lambda: isa)
    out = np.zeros(inputs.numel * inputs.out_dtype.itemsize, np.uint8)
    stats = native.merge(inputs, terms, out)
    if stats.candidates is not None:
        pending = Pending.of(Segment(0, 0, inputs.numel), inputs, stats, Counts.of(stats, []))
        stats = replace(stats, candidates=pending.owned().memory)
    return out.tobytes(), stats


def assert_alike(monkeypatch, inputs: TensorInputs, terms: Terms) -> MergeStats:
    expected, counted = merge(monkeypatch, "base", inputs, terms)
    for isa in WIDER:
        data, stats = merge(monkeypatch, isa, inputs, terms)
        assert data == expected, isa
        assert replace(stats, candidates=None) == replace(counted, candidates=None), isa
        assert (stats.candidates is None) == (counted.candidates is None)
        if stats.candidates is not None:
            for found, wanted in zip(arrays(stats.candidates), arrays(counted.candidates), strict=True):
                np.testing.assert_array_equal(found, wanted)
    return counted


def arrays(candidates) -> Iterator[np.ndarray]:
    return itertools.chain(
        [candidates.positions],
        (b.data for b in candidates.operands.buffers),
        candidates.steps,
        *candidates.alternatives,
    )


@pytest.mark.parametrize("out", ["bfloat16", "float16"])
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("weights", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("masks", ["none", "closed", "open"])
def test_every_combination(monkeypatch, masks, power, weights, curvature, out):
    inputs = tile(weights, curvature, out)
    terms = terms_of(inputs, masks == "open", masks != "none", power=power, lambda_=1.25)
    stats = assert_alike(monkeypatch, inputs, terms)
    assert (stats.candidates is not None) == (masks == "open")
    if masks == "open":
        assert 0 < len(undecided(stats.candidates)) < ELEMENTS
    elif masks == "closed":
        assert all(0 < kept < ELEMENTS for kept in stats.kept)
        assert stats.unkept > 0


@pytest.mark.parametrize("n_experts", [1, 2, 5, 8, 17, 64])
def test_any_number_of_experts(monkeypatch, n_experts):
    inputs = tile("bfloat16", "float32", "bfloat16", n_experts)
    assert_alike(monkeypatch, inputs, terms_of(inputs))


@pytest.mark.parametrize("start", [0, 64, 192, 1024, 1088, 37])
@pytest.mark.parametrize("curvature", ["float32", "rank1", "log8"])
def test_slices(monkeypatch, curvature, start):
    inputs = tile("bfloat16", curvature, "bfloat16")
    terms = terms_of(inputs, open_=True)
    assert_alike(monkeypatch, inputs.slice(start, ELEMENTS - 5), terms)


@pytest.mark.parametrize("columns", [64, 40, 1024, 1216])
@pytest.mark.parametrize("curvature", ["rank1", "log8"])
def test_rows_of_any_length(monkeypatch, curvature, columns):
    rng = np.random.default_rng(columns)
    inputs = tile("bfloat16", "float32", "bfloat16").slice(0, ELEMENTS // columns * columns)
    made = {"rank1": rank1, "log8": log8_of}[curvature]
    h = [np.exp(rng.normal(-20, 2, (inputs.numel // columns, columns))).astype(np.float32) for _ in range(3)]
    inputs = replace(inputs, curvatures=tuple(map(made, h)))
    assert_alike(monkeypatch, inputs, terms_of(inputs))


def test_curvature_of_several_kinds(monkeypatch):
    kinds = ("float32", "rank1", "log8")
    several = tuple(tile("bfloat16", kind, "bfloat16").curvatures[t] for t, kind in enumerate(kinds))
    inputs = replace(tile("bfloat16", "float32", "bfloat16"), curvatures=several)
    assert_alike(monkeypatch, inputs, terms_of(inputs))


def test_bias_correction(monkeypatch):
    inputs = tile("bfloat16", "float32", "bfloat16")
    terms = terms_of(inputs)
    scaled = [replace(e, score_scale=score_scale(True, 0.37)) for e in terms.experts]
    assert_alike(monkeypatch, inputs, replace(terms, experts=tuple(scaled)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("role", ["base", "expert", "curvature"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, -0.0])
def test_one_value_in_one_block(monkeypatch, value, role, repair, masked):
    """In the second of three blocks; -1 and -0 are not usable as curvature, or not wrong at all."""
    made = random_experts(1, (ROWS, COLUMNS))
    hit = {"base": made.base, "expert": made.experts[1], "curvature": made.curvatures[1]}[role]
    hit.reshape(-1)[1500] = value
    inputs = made.inputs("bfloat16")
    terms = terms_of(tile("bfloat16", "float32", "bfloat16"), masked=masked, repair=repair)
    stats = assert_alike(monkeypatch, inputs, terms)
    usable = np.isfinite(value) and not (role == "curvature" and value < 0)
    assert [(bad.role, bad.count, bad.first) for bad in stats.nonfinite] == (
        [] if usable else [({"expert": "weights"}.get(role, role), 1, 1500)]
    )


@pytest.mark.parametrize("out", ["bfloat16", "float16"])
def test_a_result_beyond_the_type(monkeypatch, out):
    made = random_experts(2, (ROWS, COLUMNS), dtypes=("float32",), base_dtype="float32")
    limit = float(np.finfo(np.float16).max) if out == "float16" else 3.39e38
    for model in (made.base, *made.experts):
        model.reshape(-1)[2000] = limit
    made.experts[1].reshape(-1)[2000] = 1.003 * limit
    inputs = made.inputs(out)
    terms = terms_of(inputs, masked=False, lambda_=3.0)
    assert assert_alike(monkeypatch, inputs, terms).overflow == 1


def test_nobody_keeps_anything(monkeypatch):
    inputs = tile("bfloat16", "float32", "bfloat16")
    for fallback in ("base", "mean"):
        terms = terms_of(inputs, fallback=fallback)
        never = tuple(replace(e, threshold=float("nan")) for e in terms.experts)
        assert assert_alike(monkeypatch, inputs, replace(terms, experts=never)).unkept == ELEMENTS


def test_scores_at_the_threshold_are_kept(monkeypatch):
    """The threshold is a score of the tile; one float32 number higher it is not kept."""
    inputs = tile("bfloat16", "float32", "bfloat16", 1)
    terms = terms_of(inputs)
    (e,) = terms.experts
    scores, _ = reference.scores(inputs, 0, terms)
    exact = float(np.sort(scores)[len(scores) // 3])
    above = score_of_bits(score_bits(exact) + 1)
    for threshold in (exact, above):
        stats = assert_alike(monkeypatch, inputs, replace(terms, experts=(replace(e, threshold=threshold),)))
        assert stats.kept == (int((scores >= threshold).sum()),)


def test_matrices_of_several_widths(monkeypatch):
    """Of rank-1 curvature whose rows are not the same for all experts."""
    inputs = tile("bfloat16", "float32", "bfloat16", 2).slice(0, 2048)
    curvatures = (Rank1(*random_factors(4, 512)), Rank1(*random_factors(8, 256)))
    inputs = replace(inputs, curvatures=curvatures)
    assert_alike(monkeypatch, inputs, terms_of(inputs, masked=False))
    moved = (Rank1(*random_factors(8, 512)), Rank1(*random_factors(8, 512), start=512))
    inputs = replace(inputs, curvatures=moved)
    assert_alike(monkeypatch, inputs, terms_of(inputs, masked=False))


def random_factors(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rows)
    return rng.random(rows, np.float32), rng.random(columns, np.float32)


def test_no_candidates_beyond_the_tile(monkeypatch):
    """A bracket up to the NaNs, with which a block is filled up to what a loop takes at once."""
    inputs = tile("bfloat16", "float32", "bfloat16").slice(0, 33)
    terms = terms_of(inputs)
    widest = tuple(replace(e, threshold=3.4e38, span=1 << 24) for e in terms.experts)
    stats = assert_alike(monkeypatch, inputs, replace(terms, experts=widest))
    assert len(undecided(stats.candidates)) == 0
