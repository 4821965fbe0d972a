"""Every variant of every method, on every backend, against float64: equal masks, values within an ulp."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import (
    INPUT_DTYPES,
    OUTPUT_DTYPES,
    Experts,
    Outcome,
    make_recipe,
    merge_model,
    merge_one,
    merge_tile,
    random_experts,
)
from tolerances import assert_close

from ota_kernels.run.found import scores_of
from ota_kernels.tensors.buffer import Buffer
from ota_kernels.tensors.curvature import Log8, LowRank, Rank1, Uniform
from ota_kernels.tensors.dtypes import BY_NAME
from ota_kernels.tensors.terms import ExpertTerms, Terms, Words, score_scale

# A saliency in the middle of those that random_experts makes: h near 1e-10, d near 5e-3.
MIDDLE = 2e-15

VARIANTS = {
    "plain": {},
    "threshold": {"precond_threshold": MIDDLE},
    "threshold-per-model": {"precond_threshold": [MIDDLE, 0.0, 100 * MIDDLE]},
    "threshold-keeps-nothing": {"precond_threshold": 1e30},
    "density-model": {"density": 0.3},
    "density-tensor": {"density": 0.3, "density_scope": "tensor"},
    "density-per-model": {"density": [0.05, 1, 0.5]},
    "density-0": {"density": 0},
    "density-1": {"density": 1},
    "mass-model": {"saliency_mass": 0.9},
    "mass-tensor": {"saliency_mass": 0.9, "density_scope": "tensor"},
    "mass-0": {"saliency_mass": 0},
    "mass-1": {"saliency_mass": 1},
    "power-1": {"power": 1, "density": 0.5},
    "power-0.3": {"power": 0.3, "density": 0.5},
    "power-2": {"power": 2, "density": 0.5},
    "epsilon": {"epsilon": 1e-6, "density": 0.5},
    "epsilon-0": {"epsilon": 0, "density": 0.5},
    "epsilon-0-unmasked": {"epsilon": 0},
    "lambda": {"lambda": 1.3, "density": 0.5},
    "lambda-negative": {"lambda": -0.7, "precond_threshold": MIDDLE},
    "scaling": {"scaling_factor": [1.0, 0.25, 7.5], "density": 0.5},
    "normalise-global": {"normalise": "global", "density": 0.5},
    "normalise-model": {"normalise": "model", "scaling_factor": [1.0, 2.0, 0.5]},
    # So much epsilon that the mean itself shows, not only the ratio of the experts' means.
    "normalise-global-epsilon": {"normalise": "global", "epsilon": 1e-5},
    "normalise-model-epsilon": {"normalise": "model", "epsilon": 1e-5},
    "fallback-mean": {"fallback_to_base": False, "density": 0.2},
    "weights-unmasked": {"mask_weights": False, "density": 0.3},
    "weights-unmasked-mean": {"mask_weights": False, "density": 0.3, "fallback_to_base": False},
    "linear": {"masked_task_vector_merge_method": "linear"},
    "linear-density": {"masked_task_vector_merge_method": "linear", "density": 0.3, "lambda": 0.5},
    "linear-mean": {"masked_task_vector_merge_method": "linear", "density": 0.2, "fallback_to_base": False},
    "ties": {"masked_task_vector_merge_method": "ties"},
    "ties-trim": {"masked_task_vector_merge_method": "ties", "ties_density": 0.4},
    "ties-trim-masked": {"masked_task_vector_merge_method": "ties", "ties_density": 0.2, "density": 0.5},
    "ties-density-0": {"masked_task_vector_merge_method": "ties", "ties_density": 0},
    "ties-mean": {"masked_task_vector_merge_method": "ties", "density": 0.2, "fallback_to_base": False},
    "rescale": {"rescale": True, "density": 0.3},
    "rescale-linear": {"rescale": True, "density": 0.3, "masked_task_vector_merge_method": "linear"},
    "rescale-ties": {
        "rescale": True,
        "precond_threshold": MIDDLE,
        "masked_task_vector_merge_method": "ties",
        "ties_density": 0.5,
    },
    # Densities so far apart that the masked norms fall on both sides of the relative threshold.
    "rescale-relative": {
        "rescale": True,
        "density": [0.02, 0.5, 0.9],
        "density_scope": "tensor",
        "rescale_relative_threshold": 0.6,
    },
}
# What a rescaled value may differ by is the error of a spectral norm, which float64 results would show.
VARIANT_DTYPES = {
    v: [d for d in OUTPUT_DTYPES if not (p.get("rescale") and d == "float64")] for v, p in VARIANTS.items()
}
NEEDS_BASE = [v for v, p in VARIANTS.items() if p.get("rescale")]
SHAPES = {
    "layers.0.mlp.weight": (24, 41),
    "model.embed_tokens.weight": (33, 16),
    "lm_head.weight": (17, 30),
    "layers.0.norm.weight": (513,),
    "conv.weight": (3, 5, 7),
    "scale": (),
    "nothing": (0, 4),
}
LINEAR = {
    "mean": {},
    "weights": {"weight": [0.2, 1.0, 0.5]},
    "negative": {"weight": [2.0, -0.5, 0.1]},
    "not-normalised": {"weight": [0.2, -1.0, 0.5], "normalize": False},
}


# Without a base a saliency is h alone.
WITHOUT_BASE = {
    "threshold": {"precond_threshold": 1e-10},
    "threshold-per-model": {"precond_threshold": [1e-10, 0.0, 1e-8]},
}


def parameters_of(method: str, variant: str, has_base: bool) -> dict:
    if method == "linear":
        return LINEAR[variant]
    return VARIANTS[variant] if has_base else WITHOUT_BASE.get(variant, VARIANTS[variant])


@functools.cache
def model(has_base: bool) -> dict[str, Experts]:
    """One tensor of each role and of awkward sizes; three experts of three types."""
    return {
        name: random_experts(
            seed,
            shape,
            dtypes=("bfloat16", "float32", "float16"),
            base_dtype="bfloat16" if has_base else None,
            curvature_dtypes=("float32", "bfloat16", "float32"),
        )
        for seed, (name, shape) in enumerate(SHAPES.items())
    }


@functools.cache
def expected(method: str, variant: str, has_base: bool) -> dict[str, oracle.Merged]:
    exact = {name: experts.exact(name) for name, experts in model(has_base).items()}
    return oracle.evaluate(exact, method, **parameters_of(method, variant, has_base))


def check(outcome: Outcome, truth: oracle.Merged) -> None:
    """Masks and counts exactly, values within tolerance."""
    np.testing.assert_array_equal(outcome.masks, truth.masks)
    assert outcome.stats.kept == tuple(int(m.sum()) for m in truth.masks)
    assert outcome.stats.unkept == int(truth.unkept.sum())
    assert outcome.stats.overflow == 0
    assert outcome.stats.nonfinite == ()
    dtype = outcome.tile.out_dtype.name
    assert_close(dtype, outcome.out, truth.out, truth.operand, len(truth.masks))


def check_model(backend, method: str, variant: str, has_base: bool, dtypes=OUTPUT_DTYPES) -> None:
    recipe = make_recipe(3, has_base, method, **parameters_of(method, variant, has_base))
    tensors = [experts.inputs("float32", name) for name, experts in model(has_base).items()]
    outcomes = merge_model(recipe, tensors, backend, dtypes)
    for name, truth in expected(method, variant, has_base).items():
        for outcome in outcomes[name]:
            check(outcome, truth)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ota_with_a_base(backend, variant):
    check_model(backend, "ota", variant, True, VARIANT_DTYPES[variant])


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in NEEDS_BASE])
def test_ota_without_a_base(backend, variant):
    check_model(backend, "ota", variant, False)


@pytest.mark.parametrize("variant", LINEAR)
def test_linear(backend, variant):
    check_model(backend, "linear", variant, False)


def test_the_variants_differ_from_each_other():
    """A parameter that changed nothing here would be tested by nothing."""
    outputs = {v: b"".join(m.out.tobytes() for m in expected("ota", v, True).values()) for v in VARIANTS}
    same = {v: [o for o in outputs if o != v and outputs[o] == outputs[v]] for v in outputs}
    assert {v: o for v, o in same.items() if o} == {
        "plain": ["density-1"],
        "density-1": ["plain"],
        "threshold-keeps-nothing": ["density-0", "mass-0", "ties-density-0"],
        "density-0": ["threshold-keeps-nothing", "mass-0", "ties-density-0"],
        "mass-0": ["threshold-keeps-nothing", "density-0", "ties-density-0"],
        "ties-density-0": ["threshold-keeps-nothing", "density-0", "mass-0"],
    }


@pytest.mark.parametrize("base_dtype", INPUT_DTYPES)
@pytest.mark.parametrize("variant", ["density-model", "ties-trim", "plain"])
def test_inputs_of_different_types(backend, base_dtype, variant):
    """Six experts of six types on a base of another, curvature of three types."""
    experts = random_experts(
        1,
        (19, 31),
        6,
        dtypes=INPUT_DTYPES,
        base_dtype=base_dtype,
        curvature_dtypes=("float32", "bfloat16", "float16"),
    )
    truth = oracle.evaluate({"weight": experts.exact()}, **VARIANTS[variant])["weight"]
    recipe = make_recipe(6, **VARIANTS[variant])
    for outcome in merge_model(recipe, [experts.inputs("float32")], backend, OUTPUT_DTYPES)["weight"]:
        check(outcome, truth)


EDGE_SHAPES = [(), (0,), (1,), (2,), (1, 1), (511,), (512,), (513,), (1025,), (3, 0, 2), (1, 513), (513, 1)]
FOR_ANY_T = [v for v, p in VARIANTS.items() if not any(isinstance(x, list) for x in p.values())]
SHAPE = st.sampled_from(EDGE_SHAPES) | st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple)


@given(
    shape=SHAPE,
    n_experts=st.sampled_from([1, 2, 3, 5, 7, 64]),
    variant=st.sampled_from(FOR_ANY_T),
    has_base=st.booleans(),
    dtypes=st.lists(st.sampled_from(INPUT_DTYPES), min_size=1, max_size=3),
    out_dtype=st.sampled_from(OUTPUT_DTYPES[:3]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_number_of_experts(
    backend, shape, n_experts, variant, has_base, dtypes, out_dtype, seed
):
    has_base = has_base or n_experts == 1 or variant in NEEDS_BASE
    parameters = parameters_of("ota", variant, has_base)
    base_dtype = "bfloat16" if has_base else None
    experts = random_experts(seed, shape, n_experts, dtypes=dtypes, base_dtype=base_dtype)
    truth = oracle.evaluate({"weight": experts.exact()}, **parameters)["weight"]
    check(merge_one(make_recipe(n_experts, has_base, **parameters), experts, backend, out_dtype), truth)


def test_masks_read_off_the_outputs(backend):
    """An expert merged alone onto the base changes the elements it keeps, and those only."""
    experts = random_experts(2, (2053,), dtypes=("float32", "bfloat16", "float64"))
    density = {"density": 0.37}
    truth = oracle.evaluate({"weight": experts.exact()}, **density)["weight"]
    base = experts.base.double().numpy()
    for t in range(3):
        alone = Experts(experts.base, experts.experts[t : t + 1], experts.curvatures[t : t + 1])
        outcome = merge_one(make_recipe(1, **density), alone, backend, "float64")
        np.testing.assert_array_equal(outcome.out != base, truth.masks[t])


@pytest.mark.parametrize("correction", [(0.05, 1.0, 0.7), (0.5, 0.25, 0.125)], ids=str)
@pytest.mark.parametrize(
    "parameters",
    [{"density": 0.4}, {"precond_threshold": MIDDLE}, {"normalise": "model", "rank1_approx": True}],
    ids=["density", "threshold", "rank1-normalise"],
)
def test_bias_correction_divides_the_curvature(backend, correction, parameters):
    experts = random_experts(3, (20, 26), curvature_dtypes=("bfloat16",))
    exact = experts.exact(bias_corrections=correction)
    truth = oracle.evaluate({"weight": exact}, **parameters)["weight"]
    recipe = make_recipe(3, bias_correction=True, **parameters)
    tensor = experts.inputs("float32", bias_corrections=correction)
    check(merge_model(recipe, [tensor], backend)["weight"][0], truth)


def low_rank_by_definition(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """max(0, sum_r U_ir V_rj) in float32, r in order."""
    h = np.zeros((left.shape[0], right.shape[1]), np.float32)
    for r in range(left.shape[1]):
        h = h + np.outer(left[:, r], right[r])
    return np.where(h > 0, h, np.float32(0))


@pytest.mark.parametrize("shape", [(7, 90), (90, 7), (1, 1200), (1200, 1)], ids=str)
def test_low_rank_curvature(backend, shape):
    """Rows shorter and longer than a block; left and right of both signs, so that some h is clipped at 0."""
    rng = np.random.default_rng(4)
    experts = random_experts(4, shape, 3)
    left = [np.float32(rng.normal(0.3, 1, (shape[0], r)) * 1e-6) for r in (1, 2, 5)]
    right = [np.float32(rng.normal(0.3, 1, (r, shape[1])) * 1e-4) for r in (1, 2, 5)]
    h = [low_rank_by_definition(a, b) for a, b in zip(left, right, strict=True)]
    assert all(0 < np.count_nonzero(x) < x.size for x in h)
    tensor = replace(experts.inputs("float32"), curvatures=tuple(map(LowRank, left, right)))
    truth = oracle.evaluate({"weight": replace(experts.exact(), curvatures=h)}, density=0.3)["weight"]
    check(merge_model(make_recipe(3, density=0.3), [tensor], backend)["weight"][0], truth)


# Rows of 5 elements put tile borders into rows of the low-rank forms.
@pytest.mark.parametrize("size", [7, 512, 1000])
@pytest.mark.parametrize("curvature", ["full", "log8", "rank1", "low-rank", "uniform"])
def test_tiles_give_the_same_bytes(backend, curvature, size):
    shape = (301, 5)
    experts = random_experts(5, shape, 2, dtypes=("bfloat16", "float64"))
    tensor = experts.inputs("bfloat16")
    rng = np.random.default_rng(5)
    rows, columns = np.float32(rng.random(shape[0])), np.float32(rng.random(shape[1]))
    codes = Buffer(rng.integers(0, 256, tensor.numel, np.uint8), BY_NAME["uint8"])
    forms = {
        "full": tensor.curvatures,
        "log8": (Log8(codes, rows, shape[1]),) * 2,
        "rank1": (Rank1(rows, columns),) * 2,
        "low-rank": (LowRank(rows.reshape(-1, 1), columns.reshape(1, -1)),) * 2,
        "uniform": (Uniform(),) * 2,
    }
    tensor = replace(tensor, curvatures=forms[curvature])
    threshold = float(np.median(backend.scores(tensor, 0, scores_of(2, tensor))[0]))
    terms = Terms(Words(), (ExpertTerms(threshold, score_scale=score_scale(True)),) * 2, epsilon=1e-26)
    whole, stats = merge_tile(tensor, terms, backend)
    assert 0 < stats.kept[0] < tensor.numel
    parts = [
        merge_tile(
            tensor.slice(start, tensor.numel).slice(0, min(size, tensor.numel - start)), terms, backend
        )
        for start in range(0, tensor.numel, size)
    ]
    np.testing.assert_array_equal(np.concatenate([data for data, _ in parts]), whole)
    assert tuple(np.sum([s.kept for _, s in parts], axis=0)) == stats.kept
    assert sum(s.unkept for _, s in parts) == stats.unkept


@pytest.mark.parametrize("out_dtype", OUTPUT_DTYPES)
@pytest.mark.parametrize("n_experts", [2, 3, 5, 64])
def test_copies_of_one_expert_merge_to_it(backend, n_experts, out_dtype):
    """Whatever the curvatures: the weights of an average sum to 1."""
    one = random_experts(6, (700,), n_experts, dtypes=(out_dtype,), base_dtype=out_dtype)
    same = replace(one, experts=one.experts[:1] * n_experts)
    outcome = merge_one(make_recipe(n_experts), same, backend, out_dtype)
    exact = one.experts[0].double().numpy()
    operand = np.maximum(np.abs(exact), np.abs(one.base.double().numpy()))
    assert_close(out_dtype, outcome.out, exact, operand, n_experts)


@pytest.mark.parametrize("n_experts", [1, 2, 3, 7, 64])
def test_copies_merge_exactly_where_nothing_rounds(backend, n_experts):
    """Base, edits and square roots of the curvature are small integers over a power of two."""
    rng = np.random.default_rng(7)
    base, edit, root = (torch.as_tensor(rng.integers(-8, 9, 600) * 2.0**-6) for _ in range(3))
    experts = Experts(
        base.bfloat16(),
        ((base + edit).bfloat16(),) * n_experts,
        tuple((((root * 64).abs() + t % 3 + 1) ** 2).float() for t in range(n_experts)),
    )
    for out_dtype in OUTPUT_DTYPES:
        outcome = merge_one(make_recipe(n_experts, epsilon=0), experts, backend, out_dtype)
        np.testing.assert_array_equal(outcome.out, (base + edit).numpy())


@pytest.mark.parametrize("variant", ["precond", "linear", "ties"])
def test_threshold_zero_is_no_threshold(backend, variant):
    experts = random_experts(8, (1300,))

    def merged(**threshold):
        recipe = make_recipe(3, masked_task_vector_merge_method=variant, **threshold)
        return merge_one(recipe, experts, backend, "bfloat16")

    without, zero = merged(), merged(precond_threshold=0)
    assert without.data.tobytes() == zero.data.tobytes()
    # One expert's real threshold makes the kernel mask; the zero thresholds still keep everything.
    beside = merged(precond_threshold=[0, 0, 1e-16])
    assert beside.stats.kept[:2] == without.stats.kept[:2] == (1300, 1300)
    assert 0 < beside.stats.kept[2] < 1300


@pytest.mark.parametrize("key", [{"rank1_approx": True}, {"rank": 1}], ids=["rank1_approx", "rank"])
def test_rank_one_of_a_rank_one_matrix_is_the_matrix(backend, key):
    """Powers of two that sum to powers of two: row and column sums give every bit back. An SVD rounds."""
    rows = 2.0 ** np.array([-30, *range(-30, 1)])
    columns = 2.0 ** np.array([-20, *range(-20, -5)])
    h = torch.as_tensor(np.outer(rows, columns), dtype=torch.float32)
    experts = replace(random_experts(9, (32, 16)), curvatures=(h,) * 3)
    full = merge_one(make_recipe(3, density=0.25), experts, backend, "float32")
    low = merge_one(make_recipe(3, density=0.25, **key), experts, backend, "float32")
    if "rank" in key:
        np.testing.assert_allclose(low.out, full.out, rtol=1e-5)
    else:
        assert full.data.tobytes() == low.data.tobytes()


@pytest.mark.parametrize(
    "variant", ["plain", "density-model", "weights-unmasked", "ties-trim", "linear-density"]
)
def test_order_of_experts_changes_rounding_only(backend, variant):
    experts = random_experts(10, (900,), 5, dtypes=("bfloat16", "float32"))
    turned = Experts(experts.base, experts.experts[::-1], experts.curvatures[::-1])
    recipe = make_recipe(5, **VARIANTS[variant])
    one, other = (merge_one(recipe, e, backend, "float32") for e in (experts, turned))
    truth = oracle.evaluate({"weight": experts.exact()}, **VARIANTS[variant])["weight"]
    np.testing.assert_array_equal(other.masks[::-1], one.masks)
    assert other.stats.kept[::-1] == one.stats.kept
    assert_close("float32", other.out, one.out, truth.operand, 5)


@pytest.mark.parametrize("factor", [2.0**-30, 4.0, 3.7])
def test_a_common_scaling_factor_cancels(backend, factor):
    """With epsilon 0 the weights are scaled alike. Powers of two scale without rounding: the same bytes."""
    experts = random_experts(11, (900,), dtypes=("bfloat16",))
    shared = {"density": 0.4, "epsilon": 0}
    one = merge_one(make_recipe(3, **shared), experts, backend, "bfloat16")
    other = merge_one(make_recipe(3, scaling_factor=factor, **shared), experts, backend, "bfloat16")
    truth = oracle.evaluate({"weight": experts.exact()}, **shared)["weight"]
    np.testing.assert_array_equal(other.masks, one.masks)
    if factor == 3.7:
        check(other, truth)
    else:
        assert other.data.tobytes() == one.data.tobytes()


@pytest.mark.parametrize(
    "variant", ["plain", "density-model", "epsilon-0-unmasked", "ties", "normalise-global"]
)
@pytest.mark.parametrize(
    "h", [0.0, -0.0, 1e-45, 1e-40, 1.0], ids=["zero", "minus-zero", "least", "subnormal", "one"]
)
def test_constant_curvature(backend, h, variant):
    """Zero, minus zero and subnormal curvature are curvature like any other; epsilon 0 makes P_t 0 there."""
    experts = random_experts(12, (600,))
    experts = replace(experts, curvatures=(torch.full((600,), h),) * 3)
    truth = oracle.evaluate({"weight": experts.exact()}, **VARIANTS[variant])["weight"]
    recipe = make_recipe(3, **VARIANTS[variant])
    for outcome in merge_model(recipe, [experts.inputs("float32")], backend, OUTPUT_DTYPES)["weight"]:
        check(outcome, truth)


@pytest.mark.parametrize(
    "variant", ["plain", "density-model", "mass-model", "ties-trim", "rescale", "fallback-mean"]
)
def test_experts_equal_to_the_base(backend, variant):
    """All task vectors zero: no saliency, nothing to keep below density 1, and the base comes out."""
    experts = random_experts(13, (30, 20))
    same = replace(experts, experts=(experts.base,) * 3)
    truth = oracle.evaluate({"weight": same.exact()}, **VARIANTS[variant])["weight"]
    recipe = make_recipe(3, **VARIANTS[variant])
    for outcome in merge_model(recipe, [same.inputs("float32")], backend, OUTPUT_DTYPES)["weight"]:
        check(outcome, truth)
        np.testing.assert_array_equal(outcome.out, experts.base.double().numpy())


def test_tiny_edits_that_only_epsilon_weighs(backend):
    """epsilon 1e-26 times an edit of 1e-18 is no float32, the mean of such edits is."""
    experts = random_experts(15, (300,), 3, dtypes=("float32",), base_dtype="float32")
    experts = Experts(
        torch.zeros(300),
        tuple(w * 1e-17 for w in experts.experts),
        (torch.zeros(300),) * 3,
    )
    truth = oracle.evaluate({"weight": experts.exact()})["weight"]
    outcomes = merge_model(make_recipe(3), [experts.inputs("float32")], backend, ("bfloat16", "float32"))
    for outcome in outcomes["weight"]:
        check(outcome, truth)


def test_saliencies_below_float32_are_ordered(backend):
    """Saliencies from 1e-43 to 1e-41, where a float32 product would be subnormal or 0: the exact top k."""
    n, k = 4000, 1234
    rng = np.random.default_rng(14)
    d = rng.choice([-1, 1], n) * np.float32(2.0**-13)
    h = np.float32(10.0 ** rng.uniform(-43, -41, n) * 2.0**26)
    experts = Experts(torch.zeros(n), (torch.as_tensor(d, dtype=torch.float32),), (torch.as_tensor(h),))
    exact = h.astype(np.float64) * d.astype(np.float64) ** 2
    assert exact.max() < 2.0**-133
    top = exact >= np.sort(exact)[::-1][k - 1]
    assert top.sum() == k
    outcome = merge_one(make_recipe(1, density=k / n), experts, backend, "float32")
    np.testing.assert_array_equal(outcome.masks[0], top)
    np.testing.assert_array_equal(outcome.out != 0, top)
    threshold = float(np.sort(exact)[::-1][k - 1])
    by_number = merge_one(make_recipe(1, precond_threshold=threshold), experts, backend, "float32")
    np.testing.assert_array_equal(by_number.masks[0], top)
