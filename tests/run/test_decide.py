"""What is decided before a merge: thresholds of tensors and models, missing curvature, low-rank forms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from models import (
    Experts,
    buffer,
    decider_of,
    make_recipe,
    masks_of,
    merge_model,
    merge_one,
    random_experts,
    terms_of,
)
from tolerances import assert_close

from ota_kernels.backends import native
from ota_kernels.errors import InputError
from ota_kernels.recipe.schema import MAX_MODELS
from ota_kernels.run.found import scores_of
from ota_kernels.run.low_rank import low_rank, rank1
from ota_kernels.select import thresholds as decide
from ota_kernels.tensors.curvature import Full, LowRank, Uniform
from ota_kernels.tensors.found import selection_of
from ota_kernels.tensors.segment import CHUNK
from ota_kernels.tensors.terms import is_open


def graft(saliencies: np.ndarray) -> Experts:
    """One expert on a base of 0 whose saliencies are these float32 numbers: d is 1, h the saliency."""
    n = len(saliencies)
    return Experts(torch.zeros(n), (torch.ones(n),), (torch.from_numpy(np.float32(saliencies)),))


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize(
    ("density", "kept"),
    [
        (0.0, []),
        (0.2, [5]),
        (0.3, [5]),
        (0.4, [5, 3, 3, 3]),
        (0.8, [5, 3, 3, 3]),
        (0.99, [5, 3, 3, 3]),
        (1.0, None),
    ],
)
def test_ties_are_kept_and_zeros_are_not(backend, density, kept, scope):
    """k = floor(density 5); a k inside the tie of three keeps all three; zeros only at density 1."""
    values = np.float32([3, 0, 5, 3, 3])
    outcome = merge_one(
        make_recipe(1, density=density, density_scope=scope), graft(values), backend, "float32"
    )
    expected = values if kept is None else np.sort(kept)
    np.testing.assert_array_equal(np.sort(values[outcome.masks[0]]), np.sort(expected))
    np.testing.assert_array_equal(outcome.out, outcome.masks[0])
    assert outcome.stats.unkept == 5 - len(expected)


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize(
    ("mass", "kept"),
    [(0.0, 0), (0.3, 1), (0.5, 1), (0.500001, 2), (0.75, 2), (0.8, 3), (0.875, 3), (0.99, 4), (1.0, 4)],
)
def test_saliency_mass_keeps_the_fewest(backend, mass, kept, scope):
    """Shares of 1/2, 1/4, 1/8 and 1/8, but for the last: 2^-20 less, so that it is not tied."""
    values = np.float32([4, 0, 8, 2, 2 - 2.0**-20, 0])
    outcome = merge_one(
        make_recipe(1, saliency_mass=mass, density_scope=scope), graft(values), backend, "float32"
    )
    expected = np.zeros(6, bool)
    expected[np.argsort(-values, kind="stable")[:kept]] = True
    np.testing.assert_array_equal(outcome.masks[0], expected)


def test_constant_curvature_and_edits_keep_all_or_nothing(backend):
    ties = graft(np.full(100, 0.25))
    for parameters, kept in (
        ({"density": 0.01}, 100),
        ({"density": 0.009}, 0),
        ({"saliency_mass": 1e-6}, 100),
        ({"precond_threshold": 0.25}, 100),
        ({"precond_threshold": 0.25000003}, 0),
    ):
        assert merge_one(make_recipe(1, **parameters), ties, backend, "float32").stats.kept == (kept,), (
            parameters
        )


def test_scopes_differ(backend):
    """Over the model the quiet tensor loses what the loud one gains; over each tensor both keep half."""
    loud, quiet = graft(np.arange(1, 101) + 1000.0), graft(np.arange(1, 101))
    tensors = [loud.inputs("float32", "loud"), quiet.inputs("float32", "quiet")]
    kept = {
        scope: {
            name: outcomes[0].stats.kept[0]
            for name, outcomes in merge_model(
                make_recipe(1, density=0.5, density_scope=scope), tensors, backend
            ).items()
        }
        for scope in ("model", "tensor")
    }
    assert kept == {"model": {"loud": 100, "quiet": 0}, "tensor": {"loud": 50, "quiet": 50}}


SELECTIONS = [
    {"density": 0.2},
    {"density": 0.8},
    {"saliency_mass": 0.5},
    {"saliency_mass": 0.999},
    {"masked_task_vector_merge_method": "ties", "density": 0.5, "ties_density": 0.3},
]


@pytest.fixture(scope="module")
def large() -> Experts:
    """One element more than the largest tensor that is decided from its scores directly."""
    return random_experts(1, (CHUNK + 1,), 1, curvature_dtypes=("bfloat16",))


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("parameters", SELECTIONS, ids=str)
def test_histograms_candidates_and_direct_selection_agree(backend, large, parameters, scope):
    """A tensor above one chunk is decided by candidates or histograms: as by sorting all of its scores."""
    recipe = make_recipe(1, density_scope=scope, **parameters)
    tensor = large.inputs("bfloat16")
    decider = decider_of(recipe, [tensor], backend)
    terms = decider.terms(tensor, decider.decide_model())
    merged = merge_one(recipe, large, backend, "bfloat16").terms
    expert = merged.experts[0]
    if "ties_density" not in parameters:
        whole = None if scope == "model" else tensor
        assert is_open(terms.experts[0])
        assert expert.threshold == decider.exact_thresholds(whole, [0])[0]
    scores, _ = backend.scores(tensor, 0, merged)
    selection = selection_of(decider.settings(tensor).experts[0])
    assert expert.threshold == decide.threshold_of_scores(selection, scores)
    if "saliency_mass" in parameters:
        share = parameters["saliency_mass"]
        ordered = np.sort(scores.astype(np.float64))[::-1]
        held = np.cumsum(ordered)
        truth = ordered[np.searchsorted(held, share * held[-1])]
    else:
        truth = np.sort(scores)[::-1][int(parameters["density"] * scores.size) - 1]
    assert expert.threshold == truth
    if "ties_density" in parameters:
        edits = np.abs(oracle.task_vector(large.experts[0].double().numpy(), large.base.double().numpy()))
        edits[scores < expert.threshold] = 0
        assert expert.trim == np.sort(edits)[::-1][int(0.3 * edits.size) - 1] > 0


def test_a_large_tensor_merges_as_in_float64(backend, large):
    """Above one chunk, over the model, with the mean weight of several chunks."""
    parameters = {"density": 0.3, "normalise": "global"}
    outcome = merge_one(make_recipe(1, **parameters), large, backend, "bfloat16")
    truth = oracle.evaluate({"weight": large.exact()}, **parameters)["weight"]
    np.testing.assert_array_equal(outcome.masks, truth.masks)
    assert_close("bfloat16", outcome.out, truth.out, truth.operand, 1)


@pytest.mark.parametrize("places", [[CHUNK], [CHUNK - 1, CHUNK]], ids=["second-chunk", "both-chunks"])
def test_bad_values_are_counted_over_the_whole_tensor(backend, large, places):
    w = large.experts[0].clone()
    w[places] = float("nan")
    tensor = replace(large, experts=(w,)).inputs("bfloat16")
    for parameters in ({"density": 0.5}, {"normalise": "global"}):
        with pytest.raises(InputError, match=f"{len(places)} of {CHUNK + 1} .* flat index {places[0]};"):
            merge_model(make_recipe(1, **parameters), [tensor], backend)


def test_density_in_the_order_of_true_saliencies(backend):
    """Saliencies 1e-45 to 1e-40, all different, a range in which float32 products have 0 to 15 bits left."""
    n, k = 3000, 700
    rng = np.random.default_rng(2)
    exponents = rng.permutation(n) / n * 5 - 45
    d = np.float32(1e-8)
    h = np.float32(10.0**exponents / float(d) ** 2)
    experts = Experts(torch.zeros(n), (torch.full((n,), float(d)),), (torch.from_numpy(h),))
    exact = h.astype(np.float64) * float(d) ** 2
    assert exact.max() < 2e-40
    top = np.zeros(n, bool)
    top[np.argsort(exact)[n - k :]] = True
    for scope in ("model", "tensor"):
        outcome = merge_one(make_recipe(1, density=k / n, density_scope=scope), experts, backend, "float32")
        np.testing.assert_array_equal(outcome.masks[0], top)
    half = exact >= np.median(exact)
    held = np.cumsum(np.sort(exact)[::-1])
    mass = (held[k - 1] + held[k - 2]) / 2 / held[-1]  # between the sums of k - 1 and of k elements
    outcome = merge_one(make_recipe(1, saliency_mass=float(mass)), experts, backend, "float32")
    np.testing.assert_array_equal(outcome.masks[0], top)
    outcome = merge_one(
        make_recipe(1, precond_threshold=float(np.median(exact))), experts, backend, "float32"
    )
    np.testing.assert_array_equal(outcome.masks[0], half)


@pytest.mark.parametrize(
    "parameters", [{"density": 0.4}, {"saliency_mass": 0.8}, {"precond_threshold": 1e-4}], ids=str
)
def test_tensors_without_curvature_stay_out_of_model_thresholds(backend, parameters):
    """Their curvature is 1, which no second moment compares with: they keep everything."""
    with_moments, without = random_experts(3, (400,)), random_experts(4, (300,), curvature_dtypes=None)
    model = {"a.weight": with_moments, "b.weight": without}
    recipe = make_recipe(3, missing_curvature="uniform", **parameters)
    outcomes = merge_model(recipe, [e.inputs("float32", name) for name, e in model.items()], backend)
    truth = oracle.evaluate({name: e.exact(name) for name, e in model.items()}, **parameters)
    for name, merged in truth.items():
        np.testing.assert_array_equal(outcomes[name][0].masks, merged.masks)
        assert_close("float32", outcomes[name][0].out, merged.out, merged.operand, 3)
    assert outcomes["b.weight"][0].masks.all()
    alone = merge_one(recipe, with_moments, backend, "float32")
    np.testing.assert_array_equal(outcomes["a.weight"][0].masks, alone.masks)


@pytest.mark.parametrize(
    "parameters", [{"density": 0.4}, {"saliency_mass": 0.8, "density_scope": "tensor"}], ids=str
)
def test_without_any_curvature_thresholds_are_magnitudes(backend, parameters):
    experts = random_experts(5, (700,), curvature_dtypes=None)
    outcome = merge_one(
        make_recipe(3, missing_curvature="uniform", **parameters), experts, backend, "float32"
    )
    truth = oracle.evaluate({"weight": experts.exact()}, **parameters)["weight"]
    np.testing.assert_array_equal(outcome.masks, truth.masks)
    assert_close("float32", outcome.out, truth.out, truth.operand, 3)
    if "density" in parameters:
        d = (experts.experts[0].float() - experts.base.float()).abs().numpy()
        np.testing.assert_array_equal(outcome.masks[0], d >= np.sort(d)[::-1][279])


@pytest.mark.parametrize("shape", [(1, 1), (40, 3), (3, 40), (600, 1), (1, 600), (33, 70)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rank1_factors(dtype, shape):
    """R_i C_j / sum(R), the sums in float64, then float32 as a file holds them."""
    v = torch.as_tensor(np.random.default_rng(6).random(shape)).to(getattr(torch, dtype))
    found = rank1(Full(buffer(v), 0.5), shape, map)
    exact = v.double().numpy()
    rows, columns = exact.sum(axis=1), exact.sum(axis=0) / exact.sum()
    np.testing.assert_allclose(found.rows, rows, rtol=2.0**-23)
    np.testing.assert_allclose(found.columns, columns, rtol=3 * 2.0**-24)  # C, sum(R) and their quotient
    assert found.bias_correction == 0.5


def test_rank1_of_zero_is_zero():
    found = rank1(Full(buffer(torch.zeros(4, 5))), (4, 5), map)
    assert not found.rows.any()
    assert not found.columns.any()


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (25, 25), (1, 9), (9, 1)], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 30])
def test_low_rank_factors(rank, shape):
    """The truncated SVD, as numpy has it; a rank above the matrix's own gives the matrix."""
    v = torch.as_tensor(np.random.default_rng(7).random(shape) ** 4, dtype=torch.float32)
    found = low_rank(Full(buffer(v), 0.25), shape, rank, map)
    exact = v.double().numpy()
    u, s, vt = np.linalg.svd(exact, full_matrices=False)
    truncated = (u[:, :rank] * s[:rank]) @ vt[:rank]
    product = found.left.astype(np.float64) @ found.right.astype(np.float64)
    np.testing.assert_allclose(product, truncated, atol=4e-6 * s[0])
    assert found.left.shape[1] == found.right.shape[0] == min(rank, *shape)
    assert found.bias_correction == 0.25
    if rank == 30:
        np.testing.assert_allclose(product, exact, atol=4e-6 * s[0])


def test_factors_of_many_rows_are_summed_over_chunks():
    """More than one chunk of rows."""
    shape = (CHUNK // 128 + 5, 128)
    v = torch.rand(shape, generator=torch.Generator().manual_seed(8))
    found = rank1(Full(buffer(v)), shape, map)
    np.testing.assert_allclose(found.rows, v.double().sum(1).numpy(), rtol=2.0**-23)
    exact = (v.double().sum(0) / v.double().sum()).numpy()
    np.testing.assert_allclose(found.columns, exact, rtol=3 * 2.0**-24)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_buffers_as_float32(dtype):
    v = torch.as_tensor(np.random.default_rng(9).random(100)).to(getattr(torch, dtype))
    np.testing.assert_array_equal(buffer(v).float32(), v.float().numpy())


def test_rank_spares_vectors_embeddings_and_outputs():
    """rank: matrices but embeddings and outputs; rank1_approx: every matrix."""
    shapes = {
        "norm.weight": (30,),
        "model.embed_tokens.weight": (6, 5),
        "mlp.weight": (6, 5),
        "lm_head.weight": (6, 5),
    }
    tensors = [random_experts(10, shape, 2).inputs("float32", name) for name, shape in shapes.items()]

    def forms(**parameters) -> list[str]:
        decider = decider_of(make_recipe(2, **parameters), tensors, native)
        return [type(decider.prepare(t).curvatures[0]).__name__ for t in tensors]

    assert forms() == ["Full"] * 4
    assert forms(rank=2) == ["Full", "Full", "LowRank", "Full"]
    assert forms(rank1_approx=True) == ["Full", "Rank1", "Rank1", "Rank1"]
    assert forms(rank1_approx=False) == ["Full"] * 4


def test_rank_of_a_matrix_of_that_rank_is_the_matrix(backend):
    """Rank 3, and distinct saliencies far enough apart that the SVD's rounding cannot reorder them."""
    rng = np.random.default_rng(11)
    h = np.float32(rng.random((20, 3)) @ rng.random((3, 15)))
    experts = random_experts(11, (20, 15), 2)
    experts = replace(experts, curvatures=(torch.from_numpy(h),) * 2)
    full = merge_one(make_recipe(2, density=0.5), experts, backend, "float32")
    low = merge_one(make_recipe(2, density=0.5, rank=3), experts, backend, "float32")
    assert isinstance(low.tile.curvatures[0], LowRank)
    assert (full.masks == low.masks).mean() > 0.99
    same = (full.masks == low.masks).all(axis=0)
    np.testing.assert_allclose(low.out[same], full.out[same], rtol=1e-4, atol=1e-7)


def test_approximate_norms_rescale_almost_alike(backend):
    """Edits that one direction leads, where power iteration is exact to float32."""
    rng = np.random.default_rng(12)
    shape = (48, 32)
    edits = [np.outer(rng.normal(size=48), rng.normal(size=32)) * 2.0**-10 for _ in range(3)]
    base = rng.normal(0, 0.05, shape)
    experts = replace(
        random_experts(12, shape, base_dtype="float32"),
        base=torch.as_tensor(base, dtype=torch.float32),
        experts=tuple(torch.as_tensor(base + e, dtype=torch.float32) for e in edits),
    )
    shared = {"rescale": True, "precond_threshold": 1e-17}
    exact = merge_one(make_recipe(3, **shared), experts, backend, "float32")
    near = merge_one(make_recipe(3, approximate_norm=True, **shared), experts, backend, "float32")
    for one, other in zip(exact.terms.experts, near.terms.experts, strict=True):
        assert one.edit_scale > 1.02
        assert other.edit_scale == pytest.approx(one.edit_scale, rel=1e-4)
    np.testing.assert_array_equal(exact.masks, near.masks)
    largest = np.abs(exact.out - base).max()
    np.testing.assert_allclose(near.out, exact.out, rtol=0, atol=2e-4 * largest)
    scales = ([e.edit_scale for e in found.terms.experts] for found in (near, exact))
    assert next(scales) != next(scales)  # another way to the same number


def test_sixty_four_experts_are_the_most():
    assert MAX_MODELS == 64
    experts = random_experts(13, (40,), 64)
    outcome = merge_one(make_recipe(64, density=0.5), experts, native, "float32")
    assert outcome.stats.kept == tuple(int(m.sum()) for m in outcome.masks)


def test_scores_are_the_definition_bit_for_bit(backend):
    """Over the whole range of float32: overflow to infinity and underflow to zero included."""
    rng = np.random.default_rng(14)
    n = 20_000
    base, w = (rng.integers(0, 1 << 32, n, dtype=np.uint32).view(np.float32) for _ in range(2))
    base, w = (np.where(np.isfinite(x), x, np.float32(0)) for x in (base, w))
    base[: n // 2] *= rng.choice([0, 1], n // 2)
    h = (rng.integers(0, 0x6F80_0000, n, dtype=np.uint32)).view(np.float32)  # below 2^96, h 2^32 is finite
    experts = Experts(torch.from_numpy(base), (torch.from_numpy(w),), (torch.from_numpy(h),))
    with np.errstate(over="ignore", invalid="ignore"):
        d = oracle.task_vector(w.astype(np.float64), base.astype(np.float64))
        truth = oracle.score(h, d)
    usable = ~np.isnan(truth)
    tensor = experts.inputs("float32")
    scores, _ = backend.scores(tensor, 0, scores_of(1, tensor))
    np.testing.assert_array_equal(scores[usable].view(np.int32), truth[usable].view(np.int32))
    without = replace(experts, base=None).inputs("float32")
    scores, _ = backend.scores(without, 0, scores_of(1, without))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(scores.view(np.int32), oracle.score(h, None).view(np.int32))


def test_terms_of_uniform_curvature_have_no_bias(backend):
    """Curvature 1 has no second moments to correct."""
    experts = random_experts(15, (50,), curvature_dtypes=None)
    tensor = experts.inputs("float32")
    assert tensor.curvatures == (Uniform(),) * 3
    recipe = make_recipe(3, missing_curvature="uniform", bias_correction=True, density=0.5)
    terms = terms_of(recipe, tensor, backend)
    assert {e.score_scale for e in terms.experts} == {2.0**32}
    assert masks_of(tensor, terms, backend).sum(axis=1).min() >= 25
