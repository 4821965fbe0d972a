"""The Triton kernels against the reference: equal decisions and counts, values within the tolerance.

They run on a GPU where there is one, else under Triton's interpreter, which must be chosen before Triton is
imported: then one test runs this file's classes in a process of their own.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from alone import passes_interpreted
from scores import masses
from tiles import OUTPUT_DTYPES, Experts, buffer, decode, merge_tile, random_experts
from tolerances import assert_close

from ota_kernels.backends import reference, triton
from ota_kernels.tensors import log8
from ota_kernels.tensors.buffer import Buffer
from ota_kernels.tensors.curvature import Full, Log8, LowRank, Rank1, Uniform
from ota_kernels.tensors.dtypes import BY_NAME
from ota_kernels.tensors.terms import ExpertTerms, Terms, Words, score_bits, score_scale
from ota_kernels.tensors.tile import TensorInputs

RUNS_HERE = triton.verify()[0]
backend = triton.on() if RUNS_HERE else None


@pytest.mark.skipif(RUNS_HERE, reason="the tests below run in this process")
def test_under_the_interpreter():
    passes_interpreted(__file__)


OTA = Words()
LINEAR = Words(weigh="constant", divide="number")

# Words, and numbers of the merge.
FORMULAS = {
    "precond": (OTA, {}),
    "unmasked": (replace(OTA, score="none", select="all"), {}),
    "power-1": (OTA, {"power": 1.0}),
    "power-0.3": (OTA, {"power": 0.3}),
    "lambda": (OTA, {"lambda_": -0.7}),
    "weights-unmasked": (replace(OTA, divide="weights"), {}),
    "mean": (OTA, {"fallback": "mean"}),
    "linear": (LINEAR, {"denominator": 3.0}),
    "linear-mean": (LINEAR, {"denominator": 3.0, "fallback": "mean"}),
    "ties": (replace(LINEAR, elect="sum"), {"denominator": 3.0}),
    "repair": (OTA, {"repair": True}),
}


def terms_of(
    tile: TensorInputs, formula: str | Words = "precond", quantile: float = 0.6, **of_expert
) -> Terms:
    """Terms whose thresholds keep about 1 - quantile of each expert's edits. Without a base, scores that are
    saliencies are of the curvature alone."""
    words, numbers = (formula, {}) if isinstance(formula, Words) else FORMULAS[formula]
    if tile.base is None and words.score == "saliency":
        words = replace(words, score="curvature")
    scale = 2.0**40 if words.weigh == "curvature" else 1.0
    of_expert.setdefault("score_scale", score_scale(tile.base is not None))
    experts = [ExpertTerms(weight_scale=scale * (t + 1), **of_expert) for t in range(len(tile.experts))]
    terms = Terms(words, tuple(experts), epsilon=1e-26 * 2.0**40, **numbers)
    return with_thresholds(tile, terms, quantile)


def with_thresholds(tile: TensorInputs, terms: Terms, quantile: float) -> Terms:
    """Thresholds at that quantile of each expert's scores."""
    experts = []
    for t, e in enumerate(terms.experts):
        scores, _ = reference.scores(tile, t, terms)
        kept = float(np.quantile(scores, quantile)) if len(scores) else 0.0
        experts.append(replace(e, threshold=float(np.float32(kept))))
    return replace(terms, experts=tuple(experts))


def log8_of(h: np.ndarray) -> Log8:
    """A float32 matrix in 8 bits."""
    codes, scales = log8.encode(h)
    return Log8(Buffer(codes.reshape(-1), BY_NAME["uint8"]), scales, h.shape[1])


def operand_of(tile: TensorInputs, terms: Terms) -> np.ndarray:
    """The largest magnitude that is added up, as `tolerances` wants it."""

    def values(b) -> np.ndarray:
        return decode(b.data, b.dtype.name, (tile.numel,))

    base = np.zeros(tile.numel) if tile.base is None else values(tile.base)
    factor = abs(terms.lambda_) * max(e.edit_scale for e in terms.experts)
    found = [np.abs(base)]
    origins = tile.origins or (None,) * len(tile.experts)
    for w, o in zip(tile.experts, origins, strict=True):
        found += [np.abs(values(w)), factor * np.abs(values(w) - (base if o is None else values(o)))]
    return np.max(found, axis=0)


def check(tile: TensorInputs, terms: Terms) -> None:
    """Both backends agree on everything that they report, exactly, and on the values within tolerance."""
    expected, truth = merge_tile(tile, terms, reference)
    merged, stats = merge_tile(tile, terms, backend)
    for name in ("kept", "reached", "unkept", "overflow", "repaired", "nonfinite"):
        assert getattr(stats, name) == getattr(truth, name), name
    assert [masses(c) for c in stats.censuses] == [masses(c) for c in truth.censuses]
    assert (stats.candidates is None) == (truth.candidates is None)
    final = np.ones(tile.numel, bool)
    if truth.candidates is not None:
        np.testing.assert_array_equal(stats.candidates.positions, truth.candidates.positions)
        for one, other in zip(stats.candidates.steps, truth.candidates.steps, strict=True):
            np.testing.assert_array_equal(one, other)
        for one, other in zip(
            stats.candidates.operands.buffers, truth.candidates.operands.buffers, strict=True
        ):
            assert one.data.tobytes() == other.data.tobytes()
        final[truth.candidates.positions] = False
    dtype = tile.out_dtype.name
    one, other = (decode(x, dtype, (tile.numel,))[final] for x in (merged, expected))
    assert_close(dtype, one, other, operand_of(tile, terms)[final], len(tile.experts))


class TestMerge:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize("out_dtype", OUTPUT_DTYPES)
    @pytest.mark.parametrize("formula", FORMULAS)
    def test_formulas(self, formula, out_dtype):
        tile = random_experts(1, (900,)).inputs(out_dtype)
        check(tile, terms_of(tile, formula))

    @pytest.mark.parametrize("formula", ["precond", "unmasked", "mean", "linear", "ties"])
    def test_without_a_base(self, formula):
        tile = random_experts(2, (1030,), base_dtype=None).inputs("bfloat16")
        check(tile, terms_of(tile, formula))

    @pytest.mark.parametrize("n", [1, 15, 1024, 1025, 2048 + 7])
    @pytest.mark.parametrize("formula", ["precond", "ties"])
    def test_sizes(self, formula, n):
        tile = random_experts(3, (n,)).inputs("float32")
        check(tile, terms_of(tile, formula))

    @pytest.mark.parametrize(
        ("n_experts", "formula"),
        [
            *itertools.product([1, 2, 5], ["precond", "mean", "ties", "repair"]),
            *itertools.product([16, 17], ["mean", "ties"]),
            (64, "precond"),
        ],
    )
    def test_numbers_of_experts(self, n_experts, formula):
        tile = random_experts(4, (200,), n_experts).inputs("bfloat16")
        check(tile, terms_of(tile, formula, 0.9))

    @pytest.mark.parametrize(
        "dtypes",
        [("float32",), ("float16",), ("float64",), ("float8_e4m3fn", "bfloat16"), ("float16", "float32")],
        ids="-".join,
    )
    def test_types(self, dtypes):
        experts = random_experts(
            5, (300,), dtypes=dtypes, base_dtype="float16", curvature_dtypes=("bfloat16", "float16")
        )
        tile = experts.inputs("float32")
        check(tile, terms_of(tile))

    @pytest.mark.parametrize("shape", [(3, 1024), (2, 1500), (3, 1301), (40, 33)], ids=str)
    @pytest.mark.parametrize("form", ["rank1", "log8", "low-rank", "uniform", "mixed", "mixed rows"])
    def test_forms_of_curvature(self, form, shape):
        """Whole matrices and tiles of them that begin and end within rows."""
        rng = np.random.default_rng(6)
        rows, columns = (np.float32(rng.random(k) * 1e-6) for k in shape)
        rank1 = Rank1(rows, columns)
        eight_bits = log8_of(np.float32(rng.random(shape) ** 8 * 1e-6))
        factors = (np.float32(rng.normal(size=size)) for size in ((shape[0], 2), (2, shape[1])))
        forms = {
            "rank1": (rank1,) * 3,
            "log8": (eight_bits,) * 3,
            "low-rank": (LowRank(*factors),) * 3,
            "uniform": (Uniform(),) * 3,
            "mixed": (rank1, Uniform(), Full(buffer(torch.rand(shape)))),
            "mixed rows": (rank1, eight_bits, rank1),
        }  # fmt: skip
        whole = replace(random_experts(6, shape).inputs("bfloat16"), curvatures=forms[form])
        for start, stop in ((0, whole.numel), (700, whole.numel - 5)):
            tile = whole.slice(start, stop)
            check(tile, terms_of(tile))

    def test_heavy_ties(self):
        """Scores of four values: those that equal the threshold are kept."""
        rng = np.random.default_rng(7)
        base = torch.zeros(900)
        experts = tuple(torch.as_tensor(rng.integers(-1, 3, 900), dtype=torch.float32) for _ in range(3))
        tile = Experts(base, experts, (torch.ones(900),) * 3).inputs("float32")
        for threshold in (0.0, 1.0, 4.0):
            e = ExpertTerms(threshold * 2.0**64, score_scale=score_scale(True))
            check(tile, Terms(OTA, (e,) * 3, epsilon=1e-26))

    def test_thresholds_that_keep_all_and_nothing(self):
        tile = random_experts(8, (600,)).inputs("bfloat16")
        terms = terms_of(tile)
        for threshold in (0.0, np.nan, np.inf):
            check(tile, replace(terms, experts=tuple(replace(e, threshold=threshold) for e in terms.experts)))

    @pytest.mark.parametrize("trim", [0.0, 0.004])
    def test_trim_and_rescaled_edits(self, trim):
        tile = random_experts(9, (600,)).inputs("float32")
        check(tile, terms_of(tile, "ties", 0.3, trim=trim, edit_scale=1.7))
        check(tile, terms_of(tile, "precond", 0.3, edit_scale=0.0))

    def test_subnormal_scores(self):
        """Saliencies whose scores are float32 subnormals are ordered too."""
        n = 500
        h = torch.full((n,), 1e-44)
        d = torch.linspace(1e-10, 4e-9, n)
        tile = Experts(torch.zeros(n), (d,), (h,)).inputs("float32")
        terms = Terms(OTA, (ExpertTerms(score_scale=score_scale(True)),))
        scores, _ = backend.scores(tile, 0, terms)
        assert 0 < np.median(scores) < np.finfo(np.float32).tiny
        np.testing.assert_array_equal(scores, reference.scores(tile, 0, terms)[0])
        check(tile, terms_of(tile))

    @pytest.mark.parametrize("repair", [False, True])
    @pytest.mark.parametrize("formula", ["precond", "unmasked", "ties"])
    @pytest.mark.parametrize(
        "bad",
        [("base", np.nan), ("experts", np.inf), ("curvatures", np.nan), ("curvatures", -1e-30)],
        ids=str,
    )
    def test_values_that_are_not_finite(self, bad, formula, repair):
        role, value = bad
        experts = random_experts(10, (900,), dtypes=("float32",), base_dtype="float32")
        target = experts.base if role == "base" else getattr(experts, role)[1]
        target[[3, 600, 890]] = value
        tile = experts.inputs("float32")
        terms = replace(terms_of(tile, formula), repair=repair)
        truth = merge_tile(tile, terms, reference)[1]
        assert [(x.count, x.first) for x in truth.nonfinite] == [(3, 3)]
        stats = merge_tile(tile, terms, backend)[1]
        assert stats.nonfinite == truth.nonfinite
        if repair:
            check(tile, terms)

    @pytest.mark.parametrize("census", [False, True])
    @pytest.mark.parametrize("form", ["full", "rank1", "log8", "uniform"])
    def test_brackets(self, form, census):
        """What lies inside is reported with its operands, the rest is counted."""
        tile = random_experts(11, (2, 1300), dtypes=("bfloat16",)).inputs("bfloat16")
        factors = np.float32([1e-9, 3e-9]), np.float32(np.linspace(0.1, 1, 1300))
        forms = {"rank1": Rank1(*factors), "log8": log8_of(np.outer(*factors)), "uniform": Uniform()}
        if form != "full":
            tile = replace(tile, curvatures=(forms[form],) * 3)
        tile = tile.slice(800, 2500)
        terms = terms_of(tile, census=census)
        experts = []
        for t, e in enumerate(terms.experts):  # the lowest score of a bracket, and the first above it, occur
            scores = np.sort(reference.scores(tile, t, terms)[0])
            lowest, above = (float(scores[int(q * len(scores))]) for q in (0.6, 0.8))
            span = 0 if t == 1 else score_bits(above) - score_bits(lowest)
            experts.append(replace(e, threshold=lowest, span=span))
        terms = replace(terms, experts=tuple(experts))
        assert 0 < len(merge_tile(tile, terms, reference)[1].candidates.positions) < tile.numel
        check(tile, terms)

    def test_a_census_of_scores_of_all_exponents(self):
        """It is exact, and no sum is larger than of significands: those of many tiles are added up."""
        rng = np.random.default_rng(14)
        experts = random_experts(14, (3000,), 2, curvature_dtypes=("float32",))
        for h in experts.curvatures:
            h[:] = torch.from_numpy(np.float32(10.0 ** rng.uniform(-45, 30, 3000)))
        tile = experts.inputs("bfloat16")
        terms = terms_of(tile, census=True)
        experts = [
            replace(e, threshold=threshold) for e, threshold in zip(terms.experts, (0.0, 1e-20), strict=True)
        ]
        terms = replace(terms, experts=tuple(experts))
        check(tile, terms)
        for census in merge_tile(tile, terms, backend)[1].censuses:
            assert (census[1:] != 0).sum() > 40
            assert census.max() < 3000 << 24

    def test_candidates_keep_the_types_of_their_tensors(self):
        """Kernels run on one type for all weights."""
        dtypes = ("float8_e4m3fn", "bfloat16", "float32")
        experts = random_experts(15, (900,), dtypes=dtypes, base_dtype="float8_e5m2")
        tile = experts.inputs("bfloat16")
        terms = terms_of(tile)
        check(tile, replace(terms, experts=tuple(replace(e, span=1 << 22) for e in terms.experts)))

    def test_overflow_is_counted(self):
        experts = random_experts(12, (1100,), 1, dtypes=("float32",), base_dtype="float32")
        tile = Experts(experts.base, (experts.experts[0] * 1e6,), experts.curvatures).inputs("float16")
        terms = terms_of(tile)
        assert merge_tile(tile, terms, reference)[1].overflow > 0
        check(tile, terms)

    def test_unaligned_slices_give_the_same_bytes(self):
        from ota_kernels.backends.triton.batch import Variant, merge
        from ota_kernels.backends.triton.tiles import DeviceTile

        experts = random_experts(13, (1101,))
        tile = experts.inputs("bfloat16")
        terms = terms_of(tile)
        to = backend.device
        whole = DeviceTile(experts.base.to(to), tuple(w.to(to) for w in experts.experts),
                           tuple(h.to(to) for h in experts.curvatures))  # fmt: skip
        out = torch.full((1101,), torch.nan, dtype=torch.bfloat16, device=to)
        merge(whole, terms, out)
        part = DeviceTile(
            whole.base[1:], tuple(w[1:] for w in whole.experts), tuple(h[1:] for h in whole.curvatures)
        )
        moved = torch.full_like(out, torch.nan)[1:]
        assert Variant.of(whole, terms, out).aligned
        assert not Variant.of(part, terms, moved).aligned
        merge(part, terms, moved)
        assert torch.equal(moved, out[1:])

    def test_nothing(self):
        tile = random_experts(14, (5,)).inputs("bfloat16")
        check(tile.slice(2, 2), terms_of(tile))


class TestSurvey:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize("has_base", [True, False])
    def test_scores_and_edits(self, has_base):
        experts = random_experts(20, (1100,), base_dtype="bfloat16" if has_base else None)
        experts.experts[1][[5, 1050]] = torch.nan
        tile = experts.inputs("bfloat16")
        for t in range(3):
            terms = terms_of(tile)
            for one in ("scores", "edits"):
                found, bad = getattr(backend, one)(tile, t, terms)
                expected, truth = getattr(reference, one)(tile, t, terms)
                np.testing.assert_array_equal(found, expected)
                assert bad == truth
                assert bool(bad) == (t == 1)

    @pytest.mark.parametrize("rows", [1, 2])
    @pytest.mark.parametrize("of_edits", [False, True])
    def test_histograms(self, of_edits, rows, monkeypatch):
        """Also where a tile has more elements than one row of bins counts."""
        from ota_kernels.backends.triton import survey

        if rows > 1 and triton.interpreted():
            monkeypatch.setattr(survey, "PACKED", type(survey.PACKED)(1024))
        tile = random_experts(21, (1500,)).inputs("bfloat16")
        terms = terms_of(tile)
        found, expected = (np.ones((2, 1 << 16), np.int64) for _ in range(2))
        backend.histogram(tile, 0, terms, of_edits, -1, *found)
        reference.histogram(tile, 0, terms, of_edits, -1, *expected)
        np.testing.assert_array_equal(found, expected)
        prefix = int(expected[0][1:].argmax()) + 1
        backend.histogram(tile, 0, terms, of_edits, prefix, *found)
        reference.histogram(tile, 0, terms, of_edits, prefix, *expected)
        np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize("power", [0.5, 1.0, 0.3, 2.0])
    def test_power_sum(self, power):
        experts = random_experts(22, (1100,), 1)
        experts.curvatures[0][7] = -1.0
        tile = experts.inputs("bfloat16")
        found, bad = backend.power_sum(tile, 0, power)
        expected, truth = reference.power_sum(tile, 0, power)
        assert found == pytest.approx(expected, rel=1e-14)
        assert bad == truth != ()

    def test_row_and_column_sums(self):
        v = torch.rand(130, 70)
        v[3, 5], v[100, 69] = -1.0, torch.nan
        row_sums, column_sums = np.full(130, np.nan), np.ones(70)
        backend.row_column_sums(Full(buffer(v)), row_sums, column_sums)
        usable = torch.where(v >= 0, v, 0.0).double().numpy()
        np.testing.assert_allclose(row_sums, usable.sum(1), rtol=1e-14)
        np.testing.assert_allclose(column_sums, usable.sum(0) + 1, rtol=1e-14)
