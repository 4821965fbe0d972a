"""Every word of tensors/terms.py in the Triton kernels, against the reference: equal decisions and counts,
values within the tolerance. As in test_triton.py, kernels run on a GPU, or under the interpreter in a process
of their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from alone import passes_interpreted
from test_triton import check, terms_of, with_thresholds
from tiles import Experts, buffer, decode, merge_tile, random_experts

from ota_kernels.backends import reference, triton
from ota_kernels.tensors import random
from ota_kernels.tensors.curvature import Rank1
from ota_kernels.tensors.terms import ExpertTerms, Terms, Words, score_scale
from ota_kernels.tensors.tile import TensorInputs

RUNS_HERE = triton.verify()[0]
backend = triton.on() if RUNS_HERE else None

ROWS, COLUMNS = 3, 420
PLAIN = Words(score="none", select="all", weigh="constant", divide="weights")
VOTING = Words(score="magnitude", weigh="constant", divide="kept weights")
NAME = random.name_hash("model.layers.0.weight")


@pytest.mark.skipif(RUNS_HERE, reason="the tests below run in this process")
def test_under_the_interpreter():
    passes_interpreted(__file__)


def per_expert(rows: int, columns: int) -> dict:
    """Numbers of ExpertTerms, as functions of the expert's number."""
    rng = np.random.default_rng(3)
    by_row, by_column = rng.uniform(0.2, 1, (5, rows)), rng.uniform(0.2, 1, (5, columns))
    scores = np.float32(rng.uniform(0.1, 3, (5, rows)))
    return {
        "edit_scale": lambda t: 1 + t / 8,
        "vote": lambda t: (1.0, 0.25, 1.5)[t % 3],
        "trim": lambda t: (0.0, 2e-3, 4e-3)[t % 3],
        "alone": lambda t: 1 - t / 5,
        "probability": lambda t: 0.4 + t / 10,
        "spread": lambda t: 0.1 + t / 20,
        "position": lambda t: 3 * t + 1,
        "upper": lambda t: 0.06,
        "by row": lambda t: by_row[t],
        "by column": lambda t: by_column[t],
        "row_scores": lambda t: scores[t],
    }


# Words, numbers of the merge, and which numbers of per_expert there are.
CASES = {
    "all": (PLAIN, {}, ()),
    "clipped": (replace(PLAIN, edit="clipped"), {"clip": 2e-3}, ("edit_scale",)),
    "curvature": (Words(score="curvature", weigh="constant"), {}, ()),
    "magnitude": (Words(score="magnitude"), {}, ()),
    "row magnitude": (
        replace(PLAIN, score="row magnitude", select="above", divide="number"),
        {"denominator": 6.0},
        ("row_scores",),
    ),
    "spread": (replace(VOTING, score="spread", elect="count"), {"zero": "one"}, ()),
    "between": (replace(VOTING, select="between"), {}, ("upper",)),
    "above": (replace(VOTING, select="above", divide="kept count"), {"fallback": "mean"}, ()),
    "random": (
        replace(PLAIN, select="random", divide="number"),
        {"denominator": 6.0},
        ("probability", "position"),
    ),
    "random by rank": (
        replace(VOTING, score="none", select="random by rank", elect="sum"),
        {"least": 2.0},
        ("probability", "spread", "position"),
    ),
    "by chance": (
        replace(VOTING, edit="by chance", score="none", select="random by rank", elect="sum"),
        {"zero": "one"},
        ("probability", "spread", "position", "vote"),
    ),
    "sum": (replace(VOTING, elect="sum"), {}, ("vote", "trim", "edit_scale")),
    "sum, tie 1": (replace(VOTING, elect="sum"), {"tie": 1.0, "zero": "one"}, ("vote",)),
    "count": (replace(VOTING, elect="count", divide="kept count"), {"repair": True}, ()),
    "largest": (replace(VOTING, elect="largest"), {}, ("vote", "trim")),
    "agreement": (replace(VOTING, elect="agreement"), {"agreement": 0.3, "needed": 2}, ("vote", "trim")),
    "alone": (
        Words(score="magnitude", select="above", weigh="alone", divide="kept count"),
        {},
        ("alone", "trim"),
    ),
    "alone of a count": (replace(VOTING, elect="count", weigh="alone"), {}, ("alone",)),
    "alone of the largest": (replace(VOTING, elect="largest", weigh="alone"), {}, ("alone",)),
    "by row": (Words(score="magnitude", weigh="by row", divide="weights"), {}, ("by row",)),
    "by column": (replace(PLAIN, weigh="by column"), {"fallback": "mean"}, ("by column",)),
    "trimmed weights": (Words(score="magnitude", divide="weights"), {"least": 2.0**50}, ("trim",)),
    "kept weights, at least": (Words(score="magnitude"), {"least": 2.0**28}, ("trim",)),
}  # fmt: skip
HASHED = {"seed": 98_765_432_101, "name_hash": NAME}


def terms_for(tile: TensorInputs, case: str, quantile: float = 0.6) -> Terms:
    words, numbers, names = CASES[case]
    found, rows = per_expert(*tile.shape), {"by row": "weights", "by column": "weights"}
    experts = []
    for t in range(len(tile.experts)):
        scale = 2.0**40 if words.weigh == "curvature" else 1.0
        of_t = {rows.get(name, name): found[name](t) for name in names}
        k = score_scale(words.score == "saliency")
        experts.append(ExpertTerms(score_scale=k, weight_scale=scale * (t + 1), **of_t))
    ranked = (tile.shape[-1], 1)
    terms = Terms(words, tuple(experts), epsilon=1e-26 * 2.0**40, ranked=ranked, **numbers, **HASHED)
    return terms if words.score == "none" else with_thresholds(tile, terms, quantile)


def cut(tile: TensorInputs, case: str, start: int, stop: int) -> TensorInputs:
    """That part, or whole rows."""
    return tile if CASES[case][0].select == "random by rank" else tile.slice(start, stop)


class TestMerge:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize(("base", "out_dtype"), [("bfloat16", "float32"), (None, "bfloat16")], ids=str)
    @pytest.mark.parametrize("case", CASES)
    def test_words(self, case, base, out_dtype):
        """A full block and a tail, which begin within a row."""
        experts = random_experts(1, (ROWS, COLUMNS), dtypes=("bfloat16", "float16"), base_dtype=base)
        tile = cut(experts.inputs(out_dtype), case, 100, 1200)
        terms = terms_for(tile, case)
        check(tile, terms)
        for t in range(len(tile.experts)):
            for survey in ("scores", "edits"):
                found, bad = getattr(backend, survey)(tile, t, terms)
                expected, truth = getattr(reference, survey)(tile, t, terms)
                np.testing.assert_array_equal(found, expected, err_msg=survey)
                assert bad == truth == ()

    @pytest.mark.parametrize("case", ["spread", "between", "random by rank"])
    def test_histograms(self, case):
        tile = cut(random_experts(2, (ROWS, COLUMNS)).inputs("bfloat16"), case, 100, 1200)
        terms = terms_for(tile, case)
        for of_edits in (False, True):
            found, expected = (np.zeros((2, 1 << 16), np.int64) for _ in range(2))
            backend.histogram(tile, 1, terms, of_edits, -1, *found)
            reference.histogram(tile, 1, terms, of_edits, -1, *expected)
            np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize("n_experts", [1, 2, 9, 17])
    @pytest.mark.parametrize("case", ["random", "agreement", "alone of a count", "spread"])
    def test_numbers_of_experts(self, case, n_experts):
        tile = random_experts(3, (2, 100), n_experts).inputs("float32")
        words, numbers, _ = CASES[case]
        experts = [ExpertTerms(probability=0.3, position=t, alone=0.5) for t in range(n_experts)]
        terms = Terms(words, tuple(experts), **numbers, **HASHED)
        check(tile, with_thresholds(tile, terms, 0.8))

    @pytest.mark.parametrize("case", ["by row", "by column", "row magnitude"])
    @pytest.mark.parametrize("shape", [(3, 1024), (2, 1500), (40, 33), (1500,)], ids=str)
    def test_places_in_rows(self, case, shape):
        """Whole rows in blocks, blocks that cross the end of a row, many rows in a block."""
        shape = (1, *shape) if len(shape) == 1 else shape
        whole = random_experts(4, shape, 2).inputs("float32")
        for start in (0, 700):
            tile = whole.slice(start, whole.numel)
            check(tile, terms_for(tile, case))

    def test_rows_of_curvature_are_those_of_the_tensor(self):
        """And where they are not, as after a reshape, curvature is written out."""
        whole = random_experts(5, (2, 1100), 2).inputs("float32")
        for rows, columns in ((2, 1100), (4, 550)):
            rank1 = Rank1(np.float32(np.arange(rows) + 1), np.float32(np.linspace(0.1, 1, columns)))
            tile = replace(whole, curvatures=(rank1,) * 2).slice(90, 2150)
            terms = terms_for(tile, "row magnitude")
            words = replace(terms.words, weigh="curvature", divide="kept weights")
            check(tile, replace(terms, words=words))

    def test_rows_of_more_elements_than_32_bits_count(self):
        tile = random_experts(6, (1, 1200), 2).inputs("float32")
        terms = terms_for(replace(tile, shape=(2, 1200)), "by row")
        check(replace(tile, shape=(2, 1 << 31), start=(1 << 31) - 500), terms)

    @pytest.mark.parametrize("case", ["random", "by row", "by column", "row magnitude", "sum"])
    def test_gathered_elements(self, case):
        whole = random_experts(7, (ROWS, COLUMNS)).inputs("float32")
        terms = terms_for(whole, case)
        positions = np.random.default_rng(7).permutation(whole.numel)[:1100]
        check(whole.slice(8, whole.numel).gather(np.sort(positions % 1200)), terms)

    def test_random_numbers_far_into_a_tensor(self):
        """Flat indices above 2^32, at each place in a group of four."""
        tile = random_experts(8, (1100,), 2).inputs("float32")
        for start in ((1 << 34) - 400, (1 << 33) - 33):
            placed = replace(tile, start=start)
            terms = terms_for(replace(placed, shape=(1, 1100)), "random")
            check(placed, terms)
            u = random.uniform(terms.seed, NAME, 1, start + np.arange(1100))
            kept = merge_tile(placed, terms, backend)[1].kept[0]
            assert kept == int((u < np.float32(0.4)).sum())

    @pytest.mark.parametrize("select", ["at least", "between"])
    def test_ties_by_index(self, select):
        """Scores of four values; those that equal a threshold are kept up to an index, or from one on."""
        rng = np.random.default_rng(9)
        experts = tuple(torch.as_tensor(rng.integers(-1, 3, 1100), dtype=torch.float32) for _ in range(2))
        tile = Experts(torch.zeros(1100), experts, None).inputs("float32")
        bounds = ExpertTerms(
            threshold=1.0, first=5_000_000_300, last=5_000_000_900, upper=2.0, upto=5_000_000_500
        )
        others = replace(bounds, first=0, last=5_000_000_099)
        terms = Terms(replace(VOTING, select=select), (bounds, others))
        tile = replace(tile, start=5_000_000_000)
        check(tile, terms)
        kept = merge_tile(tile, terms, backend)[1].kept
        assert len({kept[0], kept[1], int((experts[0].abs() >= 1).sum())}) == 3
        found, _ = backend.edits(tile, 0, terms)
        np.testing.assert_array_equal(found, reference.edits(tile, 0, terms)[0])

    @pytest.mark.parametrize("base", ["bfloat16", None], ids=str)
    @pytest.mark.parametrize("case", ["precond", "sum", "spread", "alone of a count", "agreement"])
    def test_edits_from_other_origins(self, case, base):
        """Some experts have one of their own."""
        experts = random_experts(10, (2, 600), base_dtype=base)
        origins = random_experts(11, (2, 600), 2, dtypes=("float16", "bfloat16")).experts
        tile = experts.inputs("float32")
        tile = replace(tile, origins=(buffer(origins[0]), None, buffer(origins[1]))).slice(40, 1150)
        check(tile, terms_of(tile, "precond") if case == "precond" else terms_for(tile, case))

    def test_an_origin_that_is_not_finite(self):
        experts = random_experts(12, (1200,), 2)
        other = experts.base.clone()
        other[[3, 1100]] = torch.inf
        tile = replace(experts.inputs("float32"), origins=(None, buffer(other)))
        terms = terms_of(tile)
        truth = merge_tile(tile, terms, reference)[1].nonfinite
        assert merge_tile(tile, terms, backend)[1].nonfinite == truth != ()
        assert backend.scores(tile, 1, terms)[1] == truth
        check(tile, replace(terms, repair=True))

    @pytest.mark.parametrize("case", ["curvature", "magnitude", "spread", "by row"])
    def test_values_that_are_not_finite(self, case):
        experts = random_experts(13, (2, 600), dtypes=("float32",), base_dtype="float32")
        experts.experts[1].view(-1)[[5, 1150]] = torch.nan
        experts.curvatures[0].view(-1)[[7, 1199]] = -1.0
        tile = experts.inputs("float32")
        terms = terms_for(tile, case)
        truth = merge_tile(tile, terms, reference)[1].nonfinite
        assert merge_tile(tile, terms, backend)[1].nonfinite == truth
        read = [("curvature", 2)] if terms.words.curvature else []
        assert [(bad.role, bad.count) for bad in truth] == [*read, ("weights", 2)]
        check(tile, replace(terms, repair=True))
        for t in range(3):
            found, bad = backend.scores(tile, t, terms)
            expected, known = reference.scores(tile, t, terms)
            np.testing.assert_array_equal(found, expected)
            assert bad == known

    @pytest.mark.parametrize("case", ["magnitude", "row magnitude", "spread"])
    def test_brackets(self, case):
        tile = random_experts(14, (2, 700)).inputs("bfloat16").slice(50, 1330)
        terms = terms_for(tile, case)
        experts = tuple(replace(e, span=1 << 22, census=True) for e in terms.experts)
        terms = replace(terms, words=replace(terms.words, select="at least"), experts=experts)
        assert 0 < len(merge_tile(tile, terms, reference)[1].candidates.positions) < tile.numel
        check(tile, terms)

    def test_candidates_keep_their_origins_and_indices(self):
        whole = random_experts(17, (2, 700)).inputs("bfloat16")
        origins = random_experts(18, (2, 700), 1, dtypes=("float16",)).experts
        tile = replace(whole, origins=(None, buffer(origins[0]), None)).slice(50, 1330)
        terms = terms_for(tile, "magnitude")
        terms = replace(terms, experts=tuple(replace(e, span=1 << 20) for e in terms.experts))
        for part in (tile, tile.gather(np.arange(0, 1280, 2))):
            check(part, terms)
            found = merge_tile(part, terms, backend)[1].candidates
            expected = merge_tile(part, terms, reference)[1].candidates
            np.testing.assert_array_equal(found.operands.index, expected.operands.index)

    def test_roots_that_overflow_are_taken_again(self):
        """Of the score's own product h k, where h is above 2^96: finite, and to be merged."""
        experts = random_experts(15, (1200,), 2)
        experts.curvatures[0][::5] = 2.0**100
        experts.curvatures[1][::10] = 2.0**100
        tile = experts.inputs("bfloat16")
        terms = terms_of(tile)
        check(tile, terms)
        merged, stats = merge_tile(tile, terms, backend)
        assert np.isfinite(decode(merged, "bfloat16", (1200,))).all()
        assert stats.nonfinite == ()

    def test_programs_take_blocks_in_turn(self):
        """More blocks than programs, counts of all of them."""
        tile = random_experts(16, (1024 * 7 + 9,), 2).inputs("bfloat16")
        terms = terms_of(tile)
        check(tile, replace(terms, experts=tuple(replace(e, span=1 << 20) for e in terms.experts)))


class TestSums:
    """Against numpy's float64."""

    __test__ = RUNS_HERE

    @staticmethod
    def edits_of(tile: TensorInputs, experts: Experts) -> np.ndarray:
        w = torch.stack([x.double() for x in experts.experts]).reshape(len(experts.experts), -1).numpy()
        return w if experts.base is None else w - experts.base.double().reshape(-1).numpy()

    @pytest.mark.parametrize("base", ["bfloat16", None], ids=str)
    def test_gram(self, base):
        experts = random_experts(20, (7, 40), 4, base_dtype=base)
        tile = experts.inputs("bfloat16")
        x = self.edits_of(tile, experts).reshape(4, 7, 40)
        expected = {
            "tensor": np.einsum("trc,urc->tu", x, x),
            "row": np.einsum("trc,urc->rtu", x, x),
            "column": np.einsum("trc,urc->ctu", x, x),
        }
        for by, truth in expected.items():
            found = backend.gram(tile, by)
            np.testing.assert_allclose(found, truth, rtol=1e-12, atol=1e-16, strict=True)
        parts = [backend.gram(tile.slice(*ends), "row") for ends in ((0, 120), (120, 280))]
        np.testing.assert_allclose(np.concatenate(parts), expected["row"], rtol=1e-12, atol=1e-16)

    def test_masked_sums(self):
        experts = random_experts(21, (4, 300), 3)
        tile = experts.inputs("bfloat16")
        terms = terms_for(tile, "magnitude")
        d = self.edits_of(tile, experts)
        masks = np.stack(
            [reference.scores(tile, t, terms)[0] >= terms.experts[t].threshold for t in range(3)]
        )
        others = masks.sum(0) - masks
        expected = [
            masks.sum(1),
            np.abs(d).sum(1),
            np.abs(masks * d).sum(1),
            (masks * d * d).sum(1),
            (masks & (others > 0)).sum(1),
            (masks & (others == 0)).sum(1),
        ]
        found = backend.masked_sums(tile, terms)
        np.testing.assert_allclose(found, np.stack(expected, 1), rtol=1e-13, strict=True)

    def test_row_divergence(self):
        experts = random_experts(22, (5, 30), 2)
        tile = experts.inputs("bfloat16")

        def softmax(x: torch.Tensor) -> np.ndarray:
            e = np.exp(x.double().numpy())
            return e / e.sum(1, keepdims=True) + 1e-8

        other = random_experts(23, (5, 30), 1).experts[0]
        for origin in (None, other):
            of = replace(tile, origins=(None, None if origin is None else buffer(origin)))
            p, q = softmax(experts.experts[1]), softmax(experts.base if origin is None else origin)
            expected = (p * np.log(p / q)).sum(1) + (q - p).sum(1)
            found = backend.row_divergence(of, 1)
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15, strict=True)
