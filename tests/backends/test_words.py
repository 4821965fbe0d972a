"""Every word of tensors/terms.py on every backend, against its formula in plain numpy (word_cases.py)."""

from __future__ import annotations

from dataclasses import replace

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from tolerances import assert_close
from word_cases import (
    Inputs,
    closed_in_the_middle,
    decoded,
    encoded,
    evaluate,
    masks,
    scores,
    terms_of,
    tile,
    with_brackets,
)

from ota_kernels.select.thresholds import mass, total_mass
from ota_kernels.tensors.array import BINS
from ota_kernels.tensors.curvature import Uniform
from ota_kernels.tensors.result import COUNTED, SUMS
from ota_kernels.tensors.terms import WORDS, Words, score_bits

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

OTA = Words()
TIES = Words(elect="sum", weigh="constant", divide="number")
LINEAR = Words(score="none", select="all", weigh="constant", divide="number")

# One method of each kind, and every word in some of them.
NAMED = {
    "ota": OTA,
    "ota mask_weights false": Words(divide="weights"),
    "fisher": Words(score="none", select="all"),
    "linear": LINEAR,
    "ties": TIES,
    "ties magnitude": Words(score="magnitude", elect="sum", weigh="constant"),
    "breadcrumbs": Words(score="magnitude", select="between", weigh="constant", divide="number"),
    "nearswap": Words(edit="clipped", score="none", select="all", weigh="constant", divide="number"),
    "arcee_fusion": Words(score="row magnitude", weigh="constant", divide="number"),
    "sce": Words(score="spread", elect="sum", weigh="constant"),
    "sce count": Words(score="spread", elect="count", weigh="constant"),
    "ram": Words(score="magnitude", select="above", weigh="constant", divide="kept count"),
    "ramplus": Words(score="magnitude", select="above", weigh="alone", divide="kept count"),
    "dare": Words(score="none", select="random", weigh="constant", divide="number"),
    "della": Words(score="none", select="random by rank", elect="sum", weigh="constant"),
    "della by chance": Words("by chance", "none", "random by rank", "sum", "constant", "kept weights"),
    "della_linear by chance": Words("by chance", "none", "random by rank", "none", "constant", "number"),
    "magmax": Words(score="none", select="all", elect="largest", weigh="constant", divide="number"),
    "consensus": Words(score="none", select="all", elect="agreement", weigh="constant", divide="number"),
    "nuslerp by row": Words(score="none", select="all", weigh="by row", divide="number"),
    "nuslerp by column": Words(score="none", select="all", weigh="by column", divide="weights"),
    "curvature alone": Words(score="curvature", weigh="curvature"),
}
WHOLE_ROWS = {"start": 100, "n": 700, "columns": 50}


def test_named_cases_use_every_word():
    for step, words in WORDS.items():
        assert {getattr(case, step) for case in NAMED.values()} == set(words), step


def merged(backend, given, terms):
    out = np.full(given.numel * given.out_dtype.itemsize, 0xFF, np.uint8)  # NaN in every type
    return out, backend.merge(given, terms, out)


def check(backend, given, terms):
    """A merge without brackets: values, and every count."""
    expected, x = evaluate(given, terms), Inputs.of(given, terms.words)
    out, stats = merged(backend, given, terms)
    dtype, usable = given.out_dtype.name, x.usable
    wanted = np.ones(given.numel, bool) if terms.repair else usable.all(0)
    values = decoded(out, dtype)
    assert_close(dtype, values[wanted], expected.out[wanted], expected.operand[wanted], len(given.experts))
    counted = expected.masks & usable if terms.repair else expected.masks
    assert stats.kept == stats.reached == tuple(int(m.sum()) for m in counted)
    assert stats.unkept == int((~expected.masks.any(0)).sum())
    assert stats.overflow == int((~np.isfinite(values)).sum())
    assert stats.repaired == (int((~usable.all(0)).sum()) if terms.repair else 0)
    assert stats.candidates is None
    return stats


@pytest.mark.parametrize("out", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("name", NAMED)
def test_word(backend, name, out):
    rng = np.random.default_rng(len(name))
    given = tile(rng, experts=5, out=out, weights=(out,), **WHOLE_ROWS)
    check(backend, given, terms_of(rng, given, NAMED[name]))


@pytest.mark.parametrize("name", [name for name, words in NAMED.items() if words.select != "random by rank"])
def test_gathered(backend, name):
    rng = np.random.default_rng(1)
    given = tile(rng, gathered=True, n=1200)
    check(backend, given, terms_of(rng, given, NAMED[name]))


def test_rank_needs_whole_rows():
    from ota_kernels.backends import native

    rng = np.random.default_rng(1)
    for given in (tile(rng, gathered=True), tile(rng, start=7)):
        with pytest.raises(ValueError, match="whole rows"):
            merged(native, given, terms_of(rng, tile(rng), NAMED["della"]))


@pytest.mark.parametrize("name", NAMED)
def test_without_a_base(backend, name):
    rng = np.random.default_rng(2)
    given = tile(rng, base=False, **WHOLE_ROWS)
    check(backend, given, terms_of(rng, given, NAMED[name], fallback="mean"))


@pytest.mark.parametrize("name", NAMED)
def test_origins(backend, name):
    rng = np.random.default_rng(3)
    given = tile(rng, origins=True, weights=("bfloat16", "float32"), **WHOLE_ROWS)
    check(backend, given, terms_of(rng, given, NAMED[name]))


@pytest.mark.parametrize("name", ["ota", "ties", "linear", "sce", "ramplus"])
@pytest.mark.parametrize("experts", [1, 2, 4, 6, 7, 8, 11, 13, 16, 17, 64])
def test_experts(backend, name, experts):
    rng = np.random.default_rng(experts)
    given = tile(rng, experts=experts, n=300)
    check(backend, given, terms_of(rng, given, NAMED[name]))


@pytest.mark.parametrize("name", ["ota", "ties", "linear", "della", "dare", "magmax"])
@pytest.mark.parametrize("n", [0, 1, 5, 31, 255, 256, 257, 511, 1031])
def test_sizes(backend, name, n):
    rng = np.random.default_rng(n)
    given = tile(rng, n=n, columns=max(n, 1), start=0, unaligned=n % 2 == 1)
    check(backend, given, terms_of(rng, given, NAMED[name]))


@pytest.mark.parametrize("form", ["float32", "bfloat16", "float16", "log8", "rank1", "low rank", "uniform"])
@pytest.mark.parametrize("power", [0.5, 1.0, 0.3, 1.7])
def test_curvature(backend, form, power):
    rng = np.random.default_rng(4)
    given = tile(rng, form=form, n=1100, columns=64, start=64)
    # curvature is 1e-11: weights of another power are that much smaller
    terms = terms_of(rng, given, OTA, power=power, epsilon=1e-3 * 1e-11 ** (power - 0.5), least=0.0)
    check(backend, given, terms)
    check(backend, given, replace(terms, words=Words(divide="weights")))


@pytest.mark.parametrize(
    "weights",
    [
        ("float16",),
        ("float32",),
        ("float64",),
        ("float8_e4m3fn", "float8_e5m2"),
        ("bfloat16", "float64", "float32"),
    ],
    ids="+".join,
)
@pytest.mark.parametrize("out", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", ["ota", "ties", "linear", "nearswap"])
def test_types(backend, name, weights, out):
    rng = np.random.default_rng(5)
    given = tile(rng, weights=weights, out=out, n=600, unaligned=True)
    check(backend, given, terms_of(rng, given, NAMED[name]))


@pytest.mark.parametrize("tie", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("elect", ["sum", "count"])
def test_ties_of_signs(backend, elect, tie):
    rng = np.random.default_rng(6)
    given = tile(rng, experts=2)
    terms = terms_of(rng, given, Words(score="none", select="all", elect=elect, weigh="constant"), tie=tie)
    terms = replace(terms, experts=tuple(replace(e, vote=1.0, trim=0.0) for e in terms.experts))
    found = evaluate(given, terms)
    assert (np.abs(found.d32[0]) == np.abs(found.d32[1])).sum() > 20  # sums of 0 among them
    check(backend, given, terms)


@pytest.mark.parametrize("zero", ["fallback", "one"])
@pytest.mark.parametrize("fallback", ["base", "mean"])
def test_nobody_and_no_weights(backend, fallback, zero):
    rng = np.random.default_rng(7)
    given = tile(rng, experts=2)
    for words in (OTA, TIES, Words(divide="weights"), Words(weigh="constant")):
        terms = terms_of(rng, given, words, fallback=fallback, zero=zero, epsilon=0.0, least=0.0)
        terms = replace(terms, experts=(terms.experts[0], replace(terms.experts[1], weight_scale=0.0)))
        assert check(backend, given, terms).unkept > 0
    thresholds = [replace(e, threshold=float("nan")) for e in terms.experts]
    assert check(backend, given, replace(terms, experts=tuple(thresholds))).unkept == given.numel


def broken(rng, **options):
    """A tile with inputs of every kind that cannot be used."""
    given = tile(rng, n=900, weights=("float32",), **options)
    w = [decoded(b.data, "float32") for b in (given.base, *given.experts)]
    h = [c.float32().copy() for c in given.curvatures]
    w[0][[3, 400]], w[1][[3, 5, 899]], w[2][[600]] = np.nan, np.inf, -np.inf
    h[1][[7, 8, 9]], h[2][[300]], h[0][[20]] = np.nan, -1.0, np.inf
    h[0][[30]] = -0.0  # may be used
    base, *experts = (encoded(x, "float32") for x in w)
    curvatures = tuple(
        replace(c, values=encoded(x, "float32")) for c, x in zip(given.curvatures, h, strict=True)
    )
    return replace(given, base=base, experts=tuple(experts), curvatures=curvatures)


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("name", [name for name, words in NAMED.items() if words.select != "random by rank"])
def test_inputs_that_are_not_finite(backend, name, repair):
    rng = np.random.default_rng(8)
    given, words = broken(rng), NAMED[name]
    stats = check(backend, given, terms_of(rng, given, words, repair=repair))
    bad = {(f.role, f.expert): (f.count, f.first) for f in stats.nonfinite}
    curvature = {("curvature", 0): (1, 20), ("curvature", 1): (3, 7), ("curvature", 2): (1, 300)}
    weights = {("base", -1): (2, 3), ("weights", 0): (3, 3), ("weights", 1): (1, 600)}
    assert bad == (weights | curvature if words.curvature else weights)


def settled(backend, given, terms):
    """A merge with brackets, decided in their middle: (out, kept, unkept, overflow, repaired)."""
    out, stats = merged(backend, given, terms)
    closed, steps = closed_in_the_middle(terms)
    candidates, size = stats.candidates, given.out_dtype.itemsize
    rest, more = merged(backend, candidates.operands, closed)
    values = out.reshape(-1, size)
    values[candidates.positions] = rest.reshape(-1, size)
    kept = [a + b for a, b in zip(stats.kept, more.kept, strict=True)]
    unkept = stats.unkept + more.unkept
    for t, (alternatives, step) in enumerate(zip(candidates.alternatives, steps, strict=False)):
        drops, alone = alternatives.steps < step, alternatives.positions >> 31 == 1
        at = alternatives.positions & 0x7FFFFFFF
        values[at[drops]] = alternatives.merged.reshape(-1, size)[drops]
        kept[t] += int((~drops).sum())
        unkept += int((drops & alone).sum())
    return out, tuple(kept), unkept, stats.overflow + more.overflow, stats.repaired + more.repaired


def check_brackets(backend, given, terms):
    x = Inputs.of(given, terms.words)
    with np.errstate(invalid="ignore", over="ignore"):
        found = scores(x, terms)
    terms = with_brackets(terms, found, census=True)
    _, stats = merged(backend, given, terms)
    used = np.where(x.usable & (found > 0), found, np.float32(0))
    bits = used.view(np.uint32).astype(np.int64)
    for t, e in enumerate(terms.experts):
        lowest, end = score_bits(e.threshold), score_bits(e.threshold) + e.span
        inside, above = (bits[t] >= lowest) & (bits[t] < end), bits[t] >= end
        low_mass, high_mass = (total_mass(part) for part in np.split(stats.censuses[t][:-1], 2))
        assert (low_mass, high_mass) == (mass(used[t][~above & ~inside]), mass(used[t][above]))
        assert stats.censuses[t][-1] == above.sum()
        listed = [stats.candidates.steps[t], *(a.steps for a in stats.candidates.alternatives[t : t + 1])]
        assert sorted(np.concatenate(listed).tolist()) == sorted((bits[t][inside] - lowest).tolist())
    closed, _ = closed_in_the_middle(terms)
    out, kept, unkept, overflow, repaired = settled(backend, given, terms)
    wanted, alone = merged(backend, given, closed)
    assert out.tobytes() == wanted.tobytes()
    assert (kept, unkept, overflow, repaired) == (alone.kept, alone.unkept, alone.overflow, alone.repaired)
    assert (
        stats.reached
        == merged(
            backend,
            given,
            replace(terms, experts=tuple(replace(e, span=0, census=False) for e in terms.experts)),
        )[1].kept
    )


SCORED = [name for name, words in NAMED.items() if words.score != "none" and words.select == "at least"]


@pytest.mark.parametrize("out", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", SCORED)
def test_brackets(backend, name, out):
    rng = np.random.default_rng(9)
    given = tile(rng, n=1500, experts=3, out=out, weights=(out,), origins=name == "ties magnitude")
    check_brackets(backend, given, terms_of(rng, given, NAMED[name]))


@pytest.mark.parametrize("name", SCORED)
def test_brackets_of_gathered_elements(backend, name):
    rng = np.random.default_rng(10)
    given = tile(rng, n=1500, gathered=True)
    check_brackets(backend, given, terms_of(rng, given, NAMED[name]))


@pytest.mark.parametrize("name", ["ota", "ties", "curvature alone"])
def test_brackets_and_inputs_that_are_not_finite(backend, name):
    rng = np.random.default_rng(11)
    given = broken(rng)
    check_brackets(backend, given, terms_of(rng, given, NAMED[name], repair=True))


@pytest.mark.parametrize("name", ["ota", "ties", "curvature alone"])
def test_brackets_and_scores_that_overflow(backend, name):
    """An infinite score of one expert where another's lies inside of its bracket."""
    rng = np.random.default_rng(20)
    given = tile(rng, n=3000, weights=("float32",), experts=5)
    weights = [decoded(b.data, "float32").copy() for b in given.experts]
    weights[1][::7], weights[3][5::11] = 3e38, -3e38
    experts = tuple(encoded(x, "float32") for x in weights)
    terms = terms_of(rng, replace(given, experts=experts), NAMED[name])
    check_brackets(backend, replace(given, experts=experts), terms)


def test_overflow_with_brackets(backend):
    rng = np.random.default_rng(12)
    given = tile(rng, n=700, weights=("float32",), out="float16")
    terms = terms_of(rng, given, OTA, lambda_=1e7)
    assert merged(backend, given, terms)[1].overflow > 0
    check_brackets(backend, given, terms)


def word(step: str):
    return st.sampled_from(WORDS[step])


@hypothesis.given(st.data())
def test_combinations(backend, data):
    drawn = {step: data.draw(word(step), label=step) for step in WORDS}
    if drawn["edit"] == "by chance" and drawn["select"] != "random by rank":
        drawn["edit"] = "difference"
    words = Words(**drawn)
    if words.edit != "difference" and words.weigh == "curvature":
        words = replace(words, weigh="constant")
    seed, experts = data.draw(st.integers(0, 1000)), data.draw(st.integers(1, 9))
    options = {
        "out": data.draw(st.sampled_from(["bfloat16", "float16", "float32", "float64"])),
        "form": data.draw(st.sampled_from(["float32", "log8", "rank1", "uniform"])),
        "base": data.draw(st.booleans()),
        "origins": data.draw(st.booleans()),
    }
    numbers = {
        "fallback": data.draw(st.sampled_from(["base", "mean"])),
        "zero": data.draw(st.sampled_from(["fallback", "one"])),
        "power": data.draw(st.sampled_from([0.5, 1.0, 0.7])),
    }
    rng = np.random.default_rng(seed)
    given_tile = tile(rng, experts=experts, n=300, columns=50, start=50, **options)
    check(backend, given_tile, terms_of(rng, given_tile, words, **numbers))


# Surveys.


@pytest.mark.parametrize("name", NAMED)
def test_scores_edits_and_histograms(backend, name):
    rng = np.random.default_rng(13)
    given = tile(rng, experts=3, origins=True, **WHOLE_ROWS)
    terms = terms_of(rng, given, NAMED[name])
    x = Inputs.of(given, terms.words)
    s = scores(x, terms)
    kept = np.where(masks(x, terms, s), x.d32, np.float32(0))
    for t in range(3):
        assert backend.scores(given, t, terms)[0].tobytes() == (s[t] + np.float32(0)).tobytes()
        assert np.array_equal(backend.edits(given, t, terms)[0], kept[t])
        for of_edits, values in ((False, s[t]), (True, kept[t])):
            bits = np.abs(values).view(np.uint32).astype(np.int64)
            counts, lows = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
            assert backend.histogram(given, t, terms, of_edits, -1, counts, lows) == ()
            assert np.array_equal(counts, np.bincount(bits >> 16, minlength=BINS))
            assert lows.sum() == (bits & 0xFFFF).sum()
            prefix, counts = int(bits[0] >> 16), np.zeros(BINS, np.int64)
            backend.histogram(given, t, terms, of_edits, prefix, counts, lows)
            inside = bits[bits >> 16 == prefix] & 0xFFFF
            assert np.array_equal(counts, np.bincount(inside, minlength=BINS))


def check_around(backend, given, terms, s):
    """By plain comparisons: intervals of one score, of two, between scores, and of everything."""
    ordered, infinity = np.sort(s), np.inf
    at = [float(ordered[int(share * (len(ordered) - 1))]) for share in (0.2, 0.5, 0.6, 0.9)]
    for intervals in (
        [(at[1], at[1]), (at[1], at[2])],
        [(at[0], at[3]), (-infinity, at[1]), (at[3], infinity)],
        [(-infinity, infinity)],
        [],
    ):
        found, bad = backend.around(given, 0, terms, intervals)
        assert bad == backend.scores(given, 0, terms)[1]
        assert found.nonzero == np.count_nonzero(s)
        for k, (low, high) in enumerate(intervals):
            between = (s > low) & (s < high)
            assert found.inside[k].tobytes() == s[between].tobytes()
            for i, these in enumerate((s > high, s == high, between, (s == low) & (low != high))):
                counts = [np.count_nonzero(these[a : a + COUNTED]) for a in range(0, len(s), COUNTED)]
                assert found.counts[:, k, i].tolist() == counts


@pytest.mark.parametrize("weights", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", ["ties magnitude", "sce", "arcee_fusion", "curvature alone", "ota"])
def test_scores_around_places_of_their_order(backend, name, weights):
    """Whole blocks, what is left of one, few distinct scores."""
    rng = np.random.default_rng(22)
    given = tile(rng, n=2 * COUNTED + 320, columns=64, experts=3, weights=(weights,))
    terms = terms_of(rng, given, NAMED[name])
    s = scores(Inputs.of(given, terms.words), terms)[0] + np.float32(0)
    check_around(backend, given, terms, s)


@pytest.mark.parametrize("name", ["ties magnitude", "sce", "ota"])
def test_scores_around_places_of_inputs_that_are_not_finite(backend, name):
    rng = np.random.default_rng(23)
    given = broken(rng)
    terms = terms_of(rng, given, NAMED[name])
    check_around(backend, given, terms, np.asarray(backend.scores(given, 0, terms)[0]))


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("by", ["tensor", "row", "column"])
def test_gram(backend, by, base):
    rng = np.random.default_rng(14)
    given = tile(
        rng, experts=4, base=base, origins=base, weights=("float32", "bfloat16"), n=2100, columns=300, start=0
    )
    x = Inputs.of(given, LINEAR)
    d = (x.w - x.origin).reshape(4, 7, 300)
    pattern = {"tensor": "src,trc->st", "row": "src,trc->rst", "column": "src,trc->cst"}[by]
    np.testing.assert_allclose(backend.gram(given, by), np.einsum(pattern, d, d), rtol=1e-13, atol=1e-18)
    assert backend.gram(given.slice(0, 0), "tensor").tolist() == np.zeros((4, 4)).tolist()


@pytest.mark.parametrize("name", ["ota", "ties magnitude", "dare", "della", "sce", "linear"])
def test_masked_sums(backend, name):
    rng = np.random.default_rng(15)
    given = tile(rng, experts=4, **WHOLE_ROWS)
    terms = terms_of(rng, given, NAMED[name])
    x = Inputs.of(given, terms.words)
    m, d = masks(x, terms, scores(x, terms)), np.abs(x.w - x.origin)
    shared = m.sum(0) > 1
    columns = [
        m.sum(1),
        d.sum(1),
        (m * d).sum(1),
        (m * d * d).sum(1),
        (m & shared).sum(1),
        (m & ~shared).sum(1),
    ]
    found = backend.masked_sums(given, terms)
    assert SUMS == ("kept", "l1", "kept_l1", "kept_squares", "shared", "unique")
    np.testing.assert_allclose(found, np.stack(columns, axis=1), rtol=1e-13)


def test_masked_sums_of_inputs_that_are_not_finite(backend):
    rng = np.random.default_rng(16)
    given = broken(rng)
    terms = terms_of(rng, given, OTA)
    x = Inputs.of(given, OTA)
    with np.errstate(invalid="ignore", over="ignore"):
        m, d = masks(x, terms, scores(x, terms)) & x.usable, np.where(x.usable, np.abs(x.w - x.origin), 0)
    found = backend.masked_sums(given, terms)
    assert found[:, 0].tolist() == m.sum(1).tolist()
    np.testing.assert_allclose(found[:, 1], d.sum(1), rtol=1e-13)


@pytest.mark.parametrize("columns", [1, 50, 700])
def test_row_divergence(backend, columns):
    from oracle.elementwise import row_divergence

    rng = np.random.default_rng(17)
    given = tile(rng, experts=2, n=1400, columns=columns, start=0, origins=True, weights=("float32",))
    x = Inputs.of(given, LINEAR)
    for t in range(2):
        wanted = row_divergence(x.w[t].reshape(-1, columns), x.origin[t].reshape(-1, columns)).reshape(-1)
        np.testing.assert_allclose(backend.row_divergence(given, t), wanted, rtol=1e-7, atol=1e-20)


def test_runs_of_scores():
    from ota_kernels.backends import native

    rng = np.random.default_rng(18)
    for name in SCORED:
        given = tile(rng, n=3000, form="log8", origins=True)
        terms = terms_of(rng, given, NAMED[name])
        starts = np.array([0, 2900, 17, 1000], np.int64)
        outs = [np.empty(len(starts) * 100, np.float32) for _ in range(2)]
        assert native.run_scores(given, terms, [2, 0], starts, 100, outs) is None
        at = (starts[:, None] + np.arange(100)).reshape(-1)
        for t, out in zip((2, 0), outs, strict=True):
            assert np.array_equal(out, native.scores(given, t, terms)[0][at])


def test_curvature_that_no_word_reads_may_be_anything(backend):
    rng = np.random.default_rng(19)
    given = tile(rng)
    bad = tuple(replace(c, values=encoded(np.full(given.numel, np.nan), "float32")) for c in given.curvatures)
    out, stats = merged(backend, replace(given, curvatures=bad), terms_of(rng, given, LINEAR))
    assert stats.nonfinite == ()
    rng = np.random.default_rng(19)
    given = replace(tile(rng), curvatures=(Uniform(),) * 3)
    assert merged(backend, given, terms_of(rng, given, LINEAR))[0].tobytes() == out.tobytes()
