"""The float64 oracle itself: identities that the formulas must have, small merges by hand, edge cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import METHODS, Tensor, evaluate
from oracle.elementwise import checkpoint_coefficients, row_divergence, spread
from oracle.philox import name_hash, philox4x32, uniforms
from oracle.task_vectors import kept_between_outliers, kept_magnitudes, rank_probabilities

ELECTING = ["ties", "dare_ties", "breadcrumbs_ties", "della"]
LINEAR_ROWS = ["task_arithmetic", "dare_linear", "breadcrumbs", "della_linear"]
SHAPES = [(12, 17), (1, 40), (40, 1), (203,), (3, 5, 7), (), (0, 4)]


def tensor(shape=(12, 17), n_experts=3, seed=0, *, has_base=True, step=0.005, **more) -> Tensor:
    """float32 weights near 0.05; edits of one tenth of that, one in eight 0."""
    rng = np.random.default_rng(seed)

    def stored(x):
        return np.asarray(np.float32(x), np.float64)

    base = stored(rng.normal(0, 0.05, shape))
    experts = tuple(
        stored(base + rng.normal(0, step, shape) * (rng.random(shape) > 1 / 8)) for _ in range(n_experts)
    )
    return Tensor(base if has_base else None, experts, **more)


def vectors(base, *experts, **more) -> Tensor:
    """A tensor from lists."""
    arrays = [None if x is None else np.array(x, np.float64) for x in (base, *experts)]
    return Tensor(arrays[0], tuple(arrays[1:]), **more)


def merge(x: Tensor, method: str, **parameters):
    return evaluate({"w": x}, method, **parameters)["w"]


def close(actual, expected, atol=1e-15):
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=atol)


# Copies of one expert, single experts, density 1


@pytest.mark.parametrize("n_experts", [2, 3, 5])
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {"weight": 0.7}),
        ("task_arithmetic", {"weight": 2.0, "normalize": True}),
        ("ties", {"weight": 0.3}),
        ("dare_ties", {"weight": 0.3, "normalize": True}),
        ("della", {"weight": 0.3}),
        ("sce", {}),
        ("ram", {"epsilon": 0}),
        ("ramplus_tl", {"epsilon": 0}),
        ("ramplus", {"epsilon": 0}),
        ("magmax", {"lambda": 1}),
        ("localize_stitch", {"density": 1}),
        ("karcher", {}),
        ("multislerp", {"weight": 2.0}),
        ("ota", {}),
        ("fisher", {}),
        ("checkpoints", {}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_copies_of_one_expert_merge_to_it(method, parameters, n_experts):
    one = tensor(n_experts=1)
    curvature = np.float32(np.random.default_rng(1).random(one.shape))
    copies = Tensor(one.base, one.experts * n_experts, (curvature,) * n_experts)
    close(merge(copies, method, **parameters).out, one.experts[0])


def test_copies_of_one_expert_add_up_in_consensus():
    one = tensor(n_experts=1)
    copies = Tensor(one.base, one.experts * 3)
    # |d| > q 2 |d| for q < 1/2, wherever there is an edit
    close(merge(copies, "consensus", q=0.4).out, one.base + 3 * one.edit(0))
    np.testing.assert_array_equal(merge(copies, "consensus", q=0.6).out, one.base)


@pytest.mark.parametrize("method", [*ELECTING, *LINEAR_ROWS])
@pytest.mark.parametrize("density", [1, 1.5])
def test_density_1_is_the_dense_method(method, density):
    x = tensor()
    common = {"weight": [0.3, -1.0, 0.7], "lambda": 0.8, "normalize": True}
    more = {} if method == "task_arithmetic" else {"density": density, "rescale": True}
    found = merge(x, method, **common, **more)
    dense = merge(x, "ties" if method in ELECTING else "task_arithmetic", **common)
    np.testing.assert_array_equal(found.out, dense.out)
    assert found.masks.all()


def test_task_arithmetic_by_hand():
    x = vectors([1.0, 2.0], [2.0, 2.0], [1.0, 5.0])
    np.testing.assert_array_equal(merge(x, "task_arithmetic", weight=[0.5, 2]).out, [1.5, 8])
    found = merge(x, "task_arithmetic", weight=[0.5, 2], normalize=True, **{"lambda": 5}).out
    np.testing.assert_array_equal(found, [2, 14])


def test_task_arithmetic_ignores_its_density():
    x = tensor()
    one, other = (merge(x, "task_arithmetic", weight=1, density=d).out for d in (0.1, 1))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("normalize", [True, False])
def test_ties_of_one_expert_is_its_largest_edits(normalize):
    x = tensor((101,), 1)
    found = merge(x, "ties", weight=0.5, density=0.3, normalize=normalize)
    edit = x.edit(0)
    kept = np.argsort(-np.abs(edit))[:30]
    expected = x.base.copy()
    expected[kept] += edit[kept] * (1 if normalize else 0.5)
    close(found.out, expected)
    assert found.masks.sum() == 30


def test_ties_by_hand():
    """Weighted votes: 1 + 1 - 1.5 * 2 < 0; only the third agrees. The fourth element's sum is 0: positive."""
    x = vectors([0.0] * 5, [1, 1, 0, 1, 0], [1, -1, 3, -1, 0], [-2, 1, 0, 0, 0])
    found = merge(x, "ties", weight=[1, 1, 1.5])
    np.testing.assert_array_equal(found.agreed, [[0, 1, 0, 1, 0], [0, 0, 1, 0, 0], [1, 1, 0, 0, 0]])
    np.testing.assert_allclose(found.out, [-2, (1 + 1.5) / 2.5, 3, 1, 0])
    assert found.masks.all()


def test_a_negative_weight_turns_the_vote():
    x = vectors([0.0], [1.0], [-3.0])
    # y = 1, 3: both positive; den = 1 - 1 = 0, which counts as 1
    found = merge(x, "ties", weight=[1, -1])
    assert found.agreed.all()
    assert found.out == [4]
    # weights that cancel in float32 as in decimals
    assert merge(vectors([0.0], [1.0], [1.0], [-1.0]), "ties", weight=[0.5, 0.25, -0.75]).out == [1.5]


@pytest.mark.parametrize("method", LINEAR_ROWS)
def test_weights_that_cancel_are_not_divided_by(method):
    x = vectors([1.0], [2.0], [5.0])
    assert merge(x, method, weight=[1, -1], normalize=True).out == [1 + 1 - 4]
    found = merge(x, method, weight=[1, -1 + 5e-9], normalize=True).out
    np.testing.assert_allclose(found, 1 + 1 - 4 + 4 * 5e-9)


@pytest.mark.parametrize("method", [*ELECTING, *LINEAR_ROWS, "sce", "ram", "ramplus", "magmax", "consensus"])
def test_no_expert_is_the_base(method):
    x = tensor(n_experts=0)
    own = {"weight": 1.0} if "weight" in METHODS[method].own else {}
    found = merge(x, method, **own)
    np.testing.assert_array_equal(found.out, x.base)
    assert found.masks.shape == (0, *x.shape)
    assert found.unkept.all()


def test_counting_signs():
    x = vectors([0.0], [5.0], [-1.0], [-1.0])
    assert merge(x, "ties", weight=1).out == [5]
    assert merge(x, "ties", weight=1, consensus="count").out == [-1]


def test_zero_sums_take_the_majority_of_the_model():
    model = {"a": vectors([0.0], [1.0], [-1.0]), "b": vectors([0.0, 0.0], [-1.0, -2.0], [-1.0, 0.0])}
    assert evaluate(model, "ties", weight=1)["a"].out == [1]
    assert evaluate(model, "ties", weight=1, zero_sign="majority")["a"].out == [-1]
    assert evaluate({"a": model["a"]}, "ties", weight=1, zero_sign="majority")["a"].out == [1]


# Selection


@given(
    scores=st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=1, max_size=40),
    density=st.sampled_from([0.01, 0.1, 0.29, 0.5, 0.999]),
)
def test_exactly_k_by_score_and_index(scores, density):
    kept = kept_magnitudes(np.float32(scores), density)
    k = max(1, math.floor(round(density * 1000) * len(scores) / 1000))
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert sorted(order[:k]) == np.flatnonzero(kept).tolist()


@pytest.mark.parametrize(
    ("n", "density", "k"), [(100, 0.29, 29), (10, 0.05, 1), (3, 1e-9, 1), (7, 0, 0), (7, -1, 0), (5, 1, 5)]
)
def test_how_many_ties_keeps(n, density, k):
    x = vectors([0.0] * n, [1.0] * n)
    kept = merge(x, "ties", weight=1, density=density).masks[0]
    np.testing.assert_array_equal(kept, np.arange(n) < k)  # the first of equals


def test_density_over_the_model_counts_on_from_tensor_to_tensor():
    model = {"a": vectors([0.0] * 3, [1.0, 5.0, 1.0]), "b": vectors([0.0] * 3, [1.0, 1.0, 7.0])}
    found = evaluate(model, "ties", weight=1, density=0.5, density_scope="model")
    np.testing.assert_array_equal(found["a"].masks[0], [True, True, False])
    np.testing.assert_array_equal(found["b"].masks[0], [False, False, True])


def test_an_empty_tensor_beside_others_keeps_a_density_over_the_model():
    model = {"a": tensor((0, 4), 1), "b": vectors([0.0] * 4, [1.0, 2.0, 3.0, 4.0])}
    found = evaluate(model, "ties", weight=1, density=0.5, density_scope="model")
    np.testing.assert_array_equal(found["b"].masks[0], [False, False, True, True])


@pytest.mark.parametrize(
    ("density", "gamma", "kept"),
    [
        (0.5, 0.1, range(4, 9)),  # 1 outlier, then the 5 below it
        (0.5, 0, range(5, 10)),
        (0.5, 0.5, range(5)),
        (0.5, 0.9, range(5)),  # fewer than K below the outliers: the smallest K all the same
        (0.5, 1, range(5)),
        (0.05, 0.1, range(0)),  # K = 0
        (0, 0.1, range(0)),
        (1, 0.9, range(10)),  # gamma is ignored
        (0.99, 0.01, range(1, 10)),  # floor(gamma n) = 0: no outlier
    ],
)
def test_breadcrumbs_ranks(density, gamma, kept):
    scores = np.float32([3, 7, 0, 9, 1, 8, 2, 6, 4, 5])
    found = kept_between_outliers(scores, density, gamma)
    assert sorted(scores[found]) == list(kept)
    x = vectors(np.zeros(10), -scores)
    for method in ("breadcrumbs", "breadcrumbs_ties"):
        np.testing.assert_array_equal(
            merge(x, method, weight=1, density=density, gamma=gamma).masks[0], found
        )


def test_breadcrumbs_among_equals_drops_by_index():
    kept = kept_between_outliers(np.ones(10, np.float32), 0.5, 0.2)
    np.testing.assert_array_equal(np.flatnonzero(kept), [3, 4, 5, 6, 7])


@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
def test_rescale_restores_the_l1_norm(method):
    x = tensor((203,), 2)
    found = merge(x, method, weight=[1, 0], density=0.4, rescale=True, normalize=False)
    close(np.abs(found.out - x.base).sum(), np.abs(x.edit(0)).sum())
    # A norm below 1e-7 is not divided by.
    tiny = vectors(np.zeros(4), [1e-8, 2e-8, 3e-8, 2e-8])
    np.testing.assert_allclose(merge(tiny, "ties", weight=1, density=0.5, rescale=True).out[2], 3e-8)


# Random draws


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_words(counter, key, words):
    assert philox4x32(np.array(counter, np.uint32), key).tolist() == words


def test_uniforms_are_what_they_say():
    name, seed, position, start = "model.layers.0.mlp.up_proj.weight", 0x1_0000_0007, 3, 2**35 + 2
    h = name_hash(name)
    u = uniforms(seed, name, position, start, start + 5)
    for i, found in zip(range(start, start + 5), u, strict=True):
        counter = np.array([i // 4 % 2**32, i // 4 >> 32, position, h >> 32], np.uint32)
        word = int(philox4x32(counter, (7, h % 2**32))[i % 4])
        assert found == (word >> 8) / 2**24
    assert u.dtype == np.float32


def test_the_hash_of_a_name_is_pinned():
    assert name_hash("lm_head.weight") == 0x7192019439B6CB46  # b2sum -l 64, its bytes turned


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_its_share(method, density):
    n = 200_000
    x = vectors(np.zeros(n), np.ones(n), np.ones(n))
    masks = merge(x, method, weight=1, density=[density, 1 - density], seed=5).masks
    spread_of_share = math.sqrt(density * (1 - density) / n)
    for mask, p in zip(masks, (density, 1 - density), strict=True):
        assert abs(mask.mean() - p) < 5 * spread_of_share
    both = density * (1 - density)  # experts draw for themselves
    assert abs((masks[0] & masks[1]).mean() - both) < 5 * math.sqrt(both / n)
    again = evaluate({"v": x}, method, weight=1, density=[density, 1 - density], seed=5)["v"].masks
    assert 0.4 < (again != masks).mean() / (2 * both) < 1.6  # another name, other draws


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_dividing_by_the_density_is_unbiased(method):
    n = 400_000
    rng = np.random.default_rng(2)
    x = vectors(np.zeros(n), np.float32(rng.uniform(0.5, 1.5, n)))
    found = merge(x, method, weight=1, density=0.4, rescale_by="density").out
    assert abs(found.mean() - 1) < 0.01


@pytest.mark.parametrize("density", [0, 0.3, 0.7])
def test_dare_rescales_by_its_norm(density):
    x = tensor((301,), 1)
    found = merge(x, "dare_linear", weight=1, density=density)
    kept = found.masks[0]
    r = np.abs(x.edit(0)).sum() / np.abs(x.edit(0)[kept]).sum() if density else 1
    close(found.out, x.base + r * np.where(kept, x.edit(0), 0))
    assert kept.any() == (density > 0)


def test_della_probabilities_grow_with_the_rank():
    d = np.float32([[3, 1, 2, 1], [0, 0, 0, 0]])
    p = rank_probabilities(d, 0.5, 0.3)
    np.testing.assert_array_equal(p, np.float32([[0.8, 0.2, 0.6, 0.4], [0.2, 0.4, 0.6, 0.8]]))
    deep = np.stack([d, d + 1], axis=-1)  # rows lie along axis 1, the last axis is another one
    np.testing.assert_array_equal(rank_probabilities(deep, 0.5, 0.3)[..., 0], p)
    np.testing.assert_array_equal(rank_probabilities(d[0], 0.5, 0.3), p[0])


@pytest.mark.parametrize("shape", [(), (1,), (5, 1)])
def test_della_rows_of_one_element_have_the_density(shape):
    np.testing.assert_array_equal(rank_probabilities(np.ones(shape, np.float32), 0.3, 0.1), np.float32(0.3))


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della_keeps_its_shares(method):
    n = 200_000
    x = vectors(np.zeros((1, n)), np.float32(np.random.default_rng(3).permutation(n) + 1)[None])
    kept = merge(x, method, weight=1, density=0.4, epsilon=0.2).masks[0]
    assert abs(kept.mean() - 0.4) < 0.006
    upper = x.experts[0] > n / 2
    assert abs(kept[upper].mean() - 0.5) < 0.008
    assert abs(kept[~upper].mean() - 0.3) < 0.008


@pytest.mark.parametrize("density", [0, -1])
def test_della_of_no_density_keeps_nothing(density):
    x = tensor()
    found = merge(x, "della", weight=1, density=density)
    np.testing.assert_array_equal(found.out, x.base)
    assert found.unkept.all()


# sce, ram, consensus, magmax, checkpoints


def test_spread_is_the_variance():
    d = tensor((500,), 5).edits32()
    np.testing.assert_allclose(spread(d), d.astype(np.float64).var(axis=0) * 5 * 2.0**32, rtol=1e-5)


@pytest.mark.parametrize("n_experts", [1, 3, 5, 7])
def test_equal_edits_have_no_spread(n_experts):
    d = np.repeat(tensor((500,), 1).edits32(), n_experts, axis=0)
    assert not spread(d).any()


def test_sce_by_hand():
    """Variances 4, 1, 0, 1/4: of the three that are not 0, floor(3 * 0.7) = 2 are kept."""
    x = vectors([0.0] * 4, [2.0, 2.0, 5.0, 0.0], [-2.0, 4.0, 5.0, 1.0])
    found = merge(x, "sce", select_topk=0.7)
    np.testing.assert_array_equal(found.masks, [[True, True, False, False]] * 2)
    # q = (8, 20) / 28; the first element's sum is 0, hence positive: the first expert alone
    np.testing.assert_allclose(found.out, [2, (8 * 2 + 20 * 4) / 28, 0, 0])


def test_sce_of_small_edits_weighs_alike():
    x = vectors([0.0, 0.0], [1e-4, 2e-4], [3e-4, 2e-4])
    np.testing.assert_allclose(merge(x, "sce").out, [2e-4, 2e-4])


@pytest.mark.parametrize("top", [0.99, 0.1, 0, -1])
def test_sce_of_one_expert_is_the_base_unless_all_is_kept(top):
    x = tensor(n_experts=1)
    np.testing.assert_array_equal(merge(x, "sce", select_topk=top).out, x.base)
    close(merge(x, "sce").out, x.experts[0])


def test_ram_by_hand():
    x = vectors([0.0] * 4, [1.0, 0.5, 4.0, 0.4], [3.0, 0.0, 0.0, 0.5])
    found = merge(x, "ram", epsilon=0.5)  # strictly above
    np.testing.assert_array_equal(found.out, [2, 0, 4, 0])
    np.testing.assert_array_equal(found.unkept, [False, True, False, True])
    # shared 1, unique 1 of the first: 1 + 0.1 * clip(1, 0, 0.2)
    np.testing.assert_allclose(merge(x, "ramplus_tl", epsilon=0.5).out, [2, 0, 4 * 1.02, 0])
    np.testing.assert_allclose(merge(x, "ramplus", epsilon=0.5).out, [2, 0, 4 * 1.2, 0])


def test_ramplus_counts_over_the_model():
    model = {
        "a": vectors([0.0] * 2, [1.0, 1.0], [1.0, 0.0]),  # of the first expert: shared 1, unique 1
        "b": vectors([0.0] * 3, [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]),  # unique 3
    }
    found = evaluate(model, "ramplus")
    np.testing.assert_allclose(found["b"].out, [1 + 0.2 / 4] * 3)
    np.testing.assert_allclose(evaluate(model, "ramplus_tl")["b"].out, [1.0] * 3)


def test_consensus_by_hand():
    x = vectors([0.0] * 3, [4.0, 4.0, 1.0], [2.0, 1.0, 0.0], [0.0, 0.0, 0.0])
    # M: 4 > q 2, 2 > q 4; 4 > q 1, 1 > q 4; 1 > 0, 0 > q 1
    np.testing.assert_array_equal(merge(x, "consensus", q=0.4).out, [6, 0, 0])
    np.testing.assert_array_equal(merge(x, "consensus", q=0.2, **{"lambda": 0.5}).out, [3, 2.5, 0])
    np.testing.assert_array_equal(merge(x, "consensus", q=0.4, k=1).out, [6, 5, 1])


def test_magmax_takes_the_last_of_the_largest():
    x = vectors([1.0, 1.0], [3.0, 0.5], [-1.0, 0.0], [1.0, 0.5])
    np.testing.assert_array_equal(merge(x, "magmax").out, [0, 0.5])
    np.testing.assert_array_equal(merge(x, "magmax").masks, [[False, False], [True, True], [False, False]])


def test_checkpoint_coefficients():
    found = checkpoint_coefficients(4, "minus_sqrt", 0, None)
    np.testing.assert_allclose(found, [0.5, 0.2071, 0.1589, 0.1340], atol=5e-5)
    np.testing.assert_allclose(checkpoint_coefficients(5, "linear", 0, None), [0.2] * 5)
    np.testing.assert_allclose(checkpoint_coefficients(2, "cosine", 0, None), [0.5, 0.5])
    np.testing.assert_allclose(checkpoint_coefficients(3, "ema", 0.8, None), [0.64, 0.16, 0.2])
    assert checkpoint_coefficients(4, "lawa", 0, 2) == [0, 0, 0.5, 0.5]


@pytest.mark.parametrize("n", [1, 2, 7, 40])
@pytest.mark.parametrize("decay", ["linear", "minus_sqrt", "cosine", "ema"])
def test_checkpoint_coefficients_are_a_mean(decay, n):
    found = checkpoint_coefficients(n, decay, 0.9, None)
    assert math.isclose(sum(found), 1)
    assert min(found) >= 0
    x = tensor(n_experts=n)
    close(merge(x, "checkpoints", decay=decay).out, np.tensordot(found, np.stack(x.experts), 1))


def test_localize_stitch_by_hand():
    model = {
        "layers.0": vectors([0.0] * 3, [3.0, 1.0, 2.0], [5.0, 0.0, 0.0]),
        "embed": vectors([0.0], [9.0], [9.0], role="embedding"),
    }
    found = evaluate(model, "localize_stitch", density=0.67)  # 2 of 3; of the second expert one is not 0
    np.testing.assert_array_equal(found["layers.0"].out, [4, 0, 2])
    assert found["embed"].out == [0]
    assert found["embed"].unkept.all()
    whole = evaluate(model, "localize_stitch", density=0.5, embeddings="merge")  # 2 of 4
    np.testing.assert_array_equal(whole["layers.0"].out, [4, 0, 0])
    assert whole["embed"].out == [9]


@pytest.mark.parametrize("density", [0.1, 0.5, 1])
def test_localize_stitch_is_ota_without_curvature(density):
    model = {"a": tensor(seed=1), "b": tensor((301,), seed=2)}
    one, other = evaluate(model, "localize_stitch", density=density), evaluate(model, "ota", density=density)
    for name in model:
        if density < 1:  # where nothing is masked, zeros are
            np.testing.assert_array_equal(one[name].masks, other[name].masks)
        close(one[name].out, other[name].out)


def test_ffg_is_a_graft():
    x = tensor((301,), 1, curvatures=(np.float32(np.random.default_rng(4).random(301)),))
    found = merge(x, "ffg", density=0.1)
    saliency = x.curvatures[0] * x.edit(0) ** 2
    kept = saliency >= np.sort(saliency)[-30]
    np.testing.assert_array_equal(found.masks[0], kept)
    close(found.out, np.where(kept, x.experts[0], x.base))


def test_fisher_by_hand():
    f = (np.float32([1, 0, 4]), np.float32([1, 0, 0]))
    x = vectors(None, [1.0, 1.0, 1.0], [3.0, 3.0, 3.0], curvatures=f)
    found = merge(x, "fisher", normalise="none", weight=[1, 2]).out
    np.testing.assert_allclose(found, [7 / 3, 7 / 3, (4 + 6e-6) / (4 + 2e-6)])
    # Means over the model are 5/3 and 1/3.
    found = merge(x, "fisher", fisher_floor=0).out
    np.testing.assert_allclose(found, [(0.6 + 9) / 3.6, 2, 1])
    assert (
        merge(vectors(None, [1.0], [2.0], curvatures=(np.float32([1]),) * 2), "fisher", weight=[1, -1]).out
        == 1.5
    )


# Pairs


def test_nearswap_by_hand():
    x = vectors([0.0] * 4, [0.1, -2.0, 0.0, 5e-7])
    np.testing.assert_allclose(merge(x, "nearswap", t=0.5).out, [0.1, -0.5, 0, 5e-7])
    np.testing.assert_allclose(merge(x, "nearswap", t=5e-7).out[3], 2.5e-7)  # the floor of 1e-6
    np.testing.assert_array_equal(merge(x, "nearswap", t=-1).out, x.base)


def test_divergence_of_rows():
    rng = np.random.default_rng(5)
    one, other = rng.normal(0, 1, (4, 30)), rng.normal(0, 1, (4, 30))

    def softmax(w):
        return np.exp(w) / np.exp(w).sum(axis=-1, keepdims=True) + 1e-8

    p, q = softmax(one), softmax(other)
    np.testing.assert_allclose(row_divergence(one, other)[:, 0], (p * np.log(p / q)).sum(axis=-1), rtol=1e-12)
    assert not row_divergence(one, one).any()
    # Second order in small edits: where p log(p/q) itself has lost all digits.
    step = 1e-9 * other
    centred = step - (p * step).sum(axis=-1, keepdims=True)
    expected = 0.5 * (p * centred**2).sum(axis=-1)
    np.testing.assert_allclose(row_divergence(one, one + step)[:, 0], expected, rtol=1e-4)


def test_arcee_fusion_takes_what_lies_far_out():
    x = tensor((20, 50), 1)
    found = merge(x, "arcee_fusion")
    p, q = (np.exp(w) / np.exp(w).sum(axis=1, keepdims=True) + 1e-8 for w in (x.experts[0], x.base))
    z = np.abs(x.edit(0)) * (p * np.log(p / q)).sum(axis=1, keepdims=True)
    first, median, third = (np.sort(z, axis=None)[i] for i in (249, 499, 749))
    np.testing.assert_array_equal(found.masks[0], z >= median + 1.5 * (third - first))
    assert 0 < found.masks.sum() < 100
    np.testing.assert_array_equal(found.out, np.where(found.masks[0], x.experts[0], x.base))


@pytest.mark.parametrize("shape", [(), (1,), (5, 1)])
def test_arcee_fusion_without_a_spread_takes_the_expert(shape):
    x = tensor(shape, 1)  # one element: no divergence, theta = 0
    np.testing.assert_array_equal(merge(x, "arcee_fusion").out, x.experts[0])


def test_linear_and_passthrough_by_hand():
    x = vectors(None, [1.0, 2.0], [3.0, 5.0])
    np.testing.assert_allclose(merge(x, "linear", weight=[1, 3]).out, [2.5, 4.25])
    np.testing.assert_array_equal(merge(x, "linear", weight=[1, -1], normalize=False).out, [-2, -3])
    one = vectors(None, [1.0, 2.0])
    np.testing.assert_array_equal(merge(one, "passthrough").out, [1, 2])
    np.testing.assert_array_equal(merge(one, "passthrough", scale=-0.5).out, [-0.5, -1])


# The Gram family


@pytest.mark.parametrize("shape", SHAPES[:-1])
def test_slerp_ends(shape):
    x = tensor(shape, 1, step=0.05)
    close(merge(x, "slerp", t=0).out, x.base)
    close(merge(x, "slerp", t=1).out, x.experts[0])


def test_slerp_of_a_quarter_circle():
    x = vectors([2.0, 0.0], [0.0, 2.0])
    half = math.sqrt(2)
    np.testing.assert_allclose(merge(x, "slerp", t=0.5).out, [half, half])
    np.testing.assert_allclose(merge(x, "slerp", t=1 / 3).out, [2 * math.cos(math.pi / 6), 1])
    np.testing.assert_allclose(merge(x, "slerp", t=-1 / 3).out, [2 * math.cos(math.pi / 6), -1])  # beyond


@pytest.mark.parametrize("other", [[1.0, 0.02], [-1.0, 0.02], [1.0, 0.0], [-1.0, 0.0]], ids=str)
def test_slerp_of_parallel_and_opposite_vectors_is_linear(other):
    x = vectors([1.0, 0.0], other)
    np.testing.assert_allclose(merge(x, "slerp", t=0.25).out, [0.75 + 0.25 * other[0], 0.25 * other[1]])


def test_slerp_of_a_zero_vector_turns_by_a_right_angle():
    x = vectors([0.0, 0.0], [1.0, 2.0])
    np.testing.assert_allclose(merge(x, "slerp", t=1 / 3).out, [0.5, 1])


@pytest.mark.parametrize("shape", [(6, 9), (54,), (5, 3, 9)])
@pytest.mark.parametrize("has_base", [True, False])
def test_nuslerp_groups(shape, has_base):
    x = tensor(shape, 2, has_base=has_base)

    def each(axis):
        one, two = (np.moveaxis(d, axis, -1) for d in x.edits())
        cosine = (one * two).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(two, axis=-1)
        theta = np.arccos(cosine)[..., None]
        found = (np.sin(0.25 * theta) * one + np.sin(0.75 * theta) * two) / np.sin(theta)
        return np.moveaxis(found, -1, axis) + (x.base if has_base else 0)

    rows = merge(x, "nuslerp", weight=[1, 3], nuslerp_flatten=False).out
    columns = merge(x, "nuslerp", weight=[1, 3], nuslerp_flatten=False, nuslerp_row_wise=True).out
    flat = merge(x, "nuslerp", weight=[1, 3]).out
    close(rows, each(-1), 1e-13)
    close(columns, each(0), 1e-13)
    if len(shape) == 1:
        np.testing.assert_array_equal(rows, flat)
        np.testing.assert_array_equal(columns, flat)
    else:
        assert np.abs(rows - flat).max() > 1e-6


def test_nuslerp_edges():
    x = vectors(None, [2.0, 0.0], [0.0, 2.0])
    close(merge(x, "nuslerp", weight=[1, -1]).out, merge(x, "nuslerp", weight=[1, 1]).out)  # sum 0: t = 1/2
    close(merge(x, "nuslerp", weight=[0, 1]).out, [0, 2])
    opposite = vectors(None, [1.0, 0.0], [-3.0, 0.0])
    np.testing.assert_array_equal(merge(opposite, "nuslerp", weight=[1, 1]).out, [-1, 0])
    zero = vectors(None, [0.0, 0.0], [3.0, 0.0])
    np.testing.assert_allclose(merge(zero, "nuslerp", weight=[2, 1]).out, [1.5, 0])
    # one group opposite, the other not: each takes its own way
    mixed = vectors(None, [[1.0, 0.0], [1.0, 0.0]], [[-3.0, 0.0], [0.0, 1.0]])
    found = merge(mixed, "nuslerp", weight=[1, 1], nuslerp_flatten=False).out
    np.testing.assert_allclose(found, [[-1, 0], [math.sqrt(0.5)] * 2])


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.2, 1.0, 2.0], [1.5, -0.4, 0.5]], ids=str)
def test_multislerp_is_what_its_tangent_space_gives(has_base, weights):
    """The published way, written out: project at the mean direction, average, map back."""
    x = tensor(n_experts=3, has_base=has_base)
    d = x.edits().reshape(3, -1)
    omega = np.array(weights) / sum(weights)
    norms = np.linalg.norm(d, axis=1)
    u = d / (norms + 1e-8)[:, None]
    mean = omega @ u
    mean = mean / np.linalg.norm(mean)
    average = omega @ (u - (u @ mean)[:, None] * mean)
    angle = np.linalg.norm(average)
    assert angle < 1e-15  # identically zero
    expected = (omega @ norms * mean).reshape(x.shape) + (x.base if has_base else 0)
    close(merge(x, "multislerp", weight=weights).out, expected, 1e-12)


def test_multislerp_edges():
    base = [1.0, 2.0]
    assert merge(vectors(base, [3.0, 4.0]), "multislerp", weight=5).out.tolist() == [3, 4]
    assert merge(vectors(base, base, base, base), "multislerp", weight=1).out.tolist() == base
    opposite = vectors(base, [2.0, 2.0], [0.0, 2.0])
    np.testing.assert_allclose(merge(opposite, "multislerp", weight=[1, 1]).out, base)
    np.testing.assert_allclose(
        merge(opposite, "multislerp", weight=[1, 1.0], normalize_weights=False).out, base
    )
    with pytest.raises(ValueError, match=r"w: .*opposite"):
        merge(vectors([0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]), "multislerp", weight=[1, 1, 1])
    with pytest.raises(ValueError, match="sum to 0"):
        merge(opposite, "multislerp", weight=[1, -1])


@pytest.mark.parametrize("shape", [(12, 17), (203,), (3, 5, 7)])
def test_karcher_of_two_is_slerp_at_one_half(shape):
    x = tensor(shape, 2, has_base=False, step=0.05)
    one, two = x.experts
    two = two * (np.linalg.norm(one) / np.linalg.norm(two))
    midway = merge(Tensor(one, (two,)), "slerp", t=0.5).out
    close(merge(Tensor(None, (one, two)), "karcher", tol=1e-12, max_iter=50).out, midway, 1e-12)


def test_karcher_of_three_axes_is_their_diagonal():
    x = vectors(None, [3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 2.0])
    np.testing.assert_allclose(merge(x, "karcher").out, [2 / math.sqrt(3)] * 3)


def test_karcher_edges():
    one = [1.0, 2.0]
    np.testing.assert_array_equal(merge(vectors(None, one), "karcher").out, one)
    np.testing.assert_array_equal(merge(vectors(None, [0.0, 0.0], [1e-6, 0.0]), "karcher").out, [0, 0])
    # A zero counts in the mean of norms, not in the direction.
    np.testing.assert_allclose(merge(vectors(None, [0.0, 0.0], [0.0, 4.0]), "karcher").out, [0, 2])
    # Opposite: starts at the first, and neither gives a step.
    np.testing.assert_allclose(merge(vectors(None, [1.0, 0.0], [-3.0, 0.0]), "karcher").out, [2, 0])


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_of_equal_experts_is_the_expert(filter_wise):
    x = tensor((6, 40), 1, step=0.1)
    for n_experts in (2, 5):
        copies = Tensor(x.base, x.experts * n_experts)
        close(merge(copies, "model_stock", filter_wise=filter_wise).out, x.experts[0])


def test_model_stock_by_hand():
    base = [[1.0, 1.0], [0.0, 0.0]]
    x = vectors(base, [[2.0, 1.0], [0.0, 1.0]], [[2.0, 2.0], [1.0, 0.0]])
    # tensor: <d, d'> = 1, norms sqrt 2 and sqrt 3, c = 1/sqrt 6
    c = 1 / math.sqrt(6)
    mean = (x.experts[0] + x.experts[1]) / 2
    np.testing.assert_allclose(merge(x, "model_stock").out, x.base + 2 * c / (1 + c) * (mean - x.base))
    c = math.sqrt(0.5)  # first row; the second row's edits are at right angles: the base
    found = merge(x, "model_stock", filter_wise=True).out
    np.testing.assert_allclose(found[0], 1 + 2 * c / (1 + c) * (mean[0] - 1))
    np.testing.assert_allclose(found[1], [0, 0])


def test_model_stock_edges():
    opposite = vectors([0.0], [1.0], [-1.0])  # 1 + c = 0
    assert merge(opposite, "model_stock").out == [0]
    small = vectors([0.0], [1e-4], [1e-4])  # the floor of the product: c = 0.01
    np.testing.assert_allclose(merge(small, "model_stock").out, [0.02 / 1.01 * 1e-4])
    three = vectors([0.0, 0.0], [1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8])
    tau_beyond = merge(three, "model_stock", filter_wise=True)
    assert np.isfinite(tau_beyond.out).all()


# Options


def test_origin_is_what_an_edit_is_counted_from():
    x = vectors([10.0, 10.0], [3.0, 5.0], origins=(np.array([1.0, 5.0]),))
    np.testing.assert_array_equal(merge(x, "task_arithmetic", weight=0.5).out, [11, 10])
    np.testing.assert_array_equal(merge(x, "ties", weight=1, density=0.5).masks, [[True, False]])
    found = merge(x, "ota", density=0.5, density_scope="tensor")
    np.testing.assert_array_equal(found.out, [12, 10])
    # ExPO: base and model are one; unlearning: a negative weight
    expo = vectors([3.0], [3.0], origins=(np.array([1.0]),))
    assert merge(expo, "task_arithmetic", weight=0.5).out == [4]
    mixed = vectors([1.0], [3.0], [5.0], origins=(None, np.array([1.0])))
    assert merge(mixed, "task_arithmetic", weight=[1, -1]).out == [-1]


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("task_arithmetic", {"weight": [1, 0.5, 2]}),
        ("ties", {"weight": 1, "density": 0.3}),
        ("sce", {}),
        ("magmax", {}),
        ("ota", {"density": 0.3}),
        ("model_stock", {}),
        ("multislerp", {"weight": 1}),
    ],
)
def test_match_norm_gives_the_mean_length_of_the_edits(method, parameters):
    model = {"a": tensor(seed=1), "b": tensor((203,), seed=2)}
    plain = evaluate(model, method, **parameters)
    found = evaluate(model, method, match_norm="mean", **parameters)

    def length(edits):
        return math.sqrt(sum(float(np.square(e).sum()) for e in edits))

    mean = np.mean([length([x.edit(t) for x in model.values()]) for t in range(3)])
    assert math.isclose(length([found[n].out - x.base for n, x in model.items()]), mean)
    factor = mean / length([plain[n].out - x.base for n, x in model.items()])
    for n, x in model.items():
        close(found[n].out, x.base + factor * (plain[n].out - x.base))
        np.testing.assert_array_equal(found[n].masks, plain[n].masks)


def test_match_norm_of_no_edit_is_the_base():
    x = vectors([1.0, 2.0], [1.0, 2.0])
    assert merge(x, "task_arithmetic", weight=1, match_norm="mean").out.tolist() == [1, 2]


def test_layers_scale_the_edits():
    model = {
        name: vectors([1.0], [3.0], layer=layer)
        for name, layer in {"embed": None, "l0": 0, "l1": 1, "l2": 2}.items()
    }
    found = evaluate(model, "task_arithmetic", weight=1, layers=[0.2, 1.0])
    np.testing.assert_allclose([found[n].out[0] for n in model], [1.4, 1.4, 2.2, 3])
    found = evaluate(model, "ties", weight=1, layers=[0.5, 1.0], **{"lambda": 3})
    np.testing.assert_allclose([found[n].out[0] for n in model], [4, 4, 5.5, 7])
    one = {n: model[n] for n in ("embed", "l0")}  # a single layer is at the end of its gradient
    found = evaluate(one, "ram", layers=[0.5, 1.0])
    np.testing.assert_allclose([found[n].out[0] for n in one], [2, 3])


def test_weights_path_is_a_table():
    model = {"a": vectors([0.0], [1.0], [10.0]), "b": vectors([0.0], [1.0], [10.0])}
    found = evaluate(model, "task_arithmetic", weights_path={"a": [1, 2], "b": [0.5, -1]})
    assert [found["a"].out[0], found["b"].out[0]] == [21, -9.5]
    for table in ({"a": [1, 2]}, {"a": [1, 2], "b": [1, 2], "c": [1, 2]}, {"a": [1], "b": [1, 2]}):
        with pytest.raises(ValueError, match=r"table|values"):
            evaluate(model, "task_arithmetic", weights_path=table)


def test_settings_of_single_tensors():
    model = {"a": vectors([0.0], [1.0]), "b": vectors([0.0], [1.0])}
    found = evaluate(model, "task_arithmetic", {"b": {"weight": 3.0, "lambda": 2.0}}, weight=1)
    assert [found["a"].out[0], found["b"].out[0]] == [1, 6]
    with pytest.raises(ValueError, match="density counts over the whole model"):
        evaluate(model, "ota", {"b": {"density": 0.3}}, density=0.5)


# The two changes to OTA


def test_rescale_measures_embeddings_by_their_columns():
    d = np.array([[3.0, 0.0], [4.0, 1.0], [0.0, 0.0], [0.0, 2.0]])
    h = np.float32([[1, 1], [1, 0], [1, 1], [1, 1]])
    for role in ("embedding", "output"):
        x = vectors(np.zeros((4, 2)), d, curvatures=(h,), role=role)
        found = merge(x, "ota", rescale=True, precond_threshold=8.9, masked_task_vector_merge_method="linear")
        np.testing.assert_array_equal(found.masks[0], h * d**2 >= 8.9)
        np.testing.assert_allclose(found.out, np.where(found.masks[0], d, 0))  # the longest column is whole
        found = merge(x, "ota", rescale=True, precond_threshold=10, masked_task_vector_merge_method="linear")
        np.testing.assert_allclose(found.out[1, 0], 4 * 5 / 4)


@pytest.mark.parametrize(("role", "low"), [("matrix", True), ("embedding", False), ("output", False)])
def test_rank_leaves_vocabulary_matrices_at_full_curvature(role, low):
    rng = np.random.default_rng(6)
    h = np.float32(rng.random((8, 6)))
    x = tensor((8, 6), 2, role=role, curvatures=(h, h.copy()[::-1]))
    full, rank = (merge(x, "ota", rank=r, density=0.5).out for r in (None, 1))
    assert (np.abs(full - rank).max() > 1e-6) == low
    close(merge(x, "ota", rank=6).out, merge(x, "ota").out, 1e-7)


# Tensors that some models lack


def lacking(x: Tensor, *absent: int) -> Tensor:
    return Tensor(x.base, tuple(None if t in absent else w for t, w in enumerate(x.experts)))


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {}),
        ("task_arithmetic", {}),
        ("ties", {"density": 0.5}),
        ("breadcrumbs", {"density": 0.5}),
        ("multislerp", {}),
    ],
)
def test_those_that_have_a_tensor_merge_it(method, parameters):
    x = tensor()
    model = {"all": x, "some": lacking(x, 1)}
    found = evaluate(model, method, weight=[0.2, 3.0, 0.5], **parameters)
    pair = merge(Tensor(x.base, (x.experts[0], x.experts[2])), method, weight=[0.2, 0.5], **parameters)
    np.testing.assert_array_equal(found["some"].out, pair.out)
    np.testing.assert_array_equal(found["some"].masks[[0, 2]], pair.masks)
    assert not found["some"].masks[1].any()
    assert found["all"].masks[1].any()


def test_an_expert_keeps_its_draws_where_others_are_absent():
    x = tensor((500,))
    common = {"weight": 1, "density": 0.5}
    whole, part = (merge(y, "dare_ties", **common).masks for y in (x, lacking(x, 0)))
    np.testing.assert_array_equal(whole[1:], part[1:])
    assert not part[0].any()


def test_a_density_over_the_model_counts_what_an_expert_has():
    model = {
        "a": vectors([0.0] * 2, [1.0, 2.0], [1.0, 2.0]),
        "b": vectors([0.0] * 2, [3.0, 4.0], None),
    }
    for method in ("ota", "localize_stitch"):
        found = evaluate(model, method, density=0.5)
        np.testing.assert_array_equal(found["a"].masks, [[False, False], [False, True]])
        np.testing.assert_array_equal(found["b"].masks, [[True, True], [False, False]])


def test_absent_by_method():
    base, one = np.array([1.0]), np.array([2.0])
    alone = {"base": Tensor(base, (None,)), "expert": Tensor(None, (one,)), "both": Tensor(base, (one,))}
    for method, parameters in (("slerp", {"t": 0.3}), ("arcee_fusion", {})):
        found = evaluate(alone, method, **parameters)
        assert [found["base"].out, found["expert"].out] == [1, 2]
        assert [found["base"].masks.item(), found["expert"].masks.item()] == [False, True]
    found = evaluate({n: alone[n] for n in ("base", "both")}, "nearswap", t=0.5)
    assert found["base"].out == [1]
    with pytest.raises(ValueError, match="base lacks"):
        evaluate(alone, "nearswap", t=0.5)
    with pytest.raises(ValueError, match="too few to merge"):
        merge(Tensor(base, (one, None)), "nuslerp", weight=1)
    pair = {
        "base": Tensor(base, (None, None)),
        "two": Tensor(base, (one, None)),
        "experts": Tensor(None, (one, one)),
        "three": Tensor(base, (one, one)),
    }
    found = evaluate(pair, "model_stock")
    assert list(found) == ["base", "three"]
    assert found["base"].out == [1]
    for method in ("ties", "task_arithmetic"):
        with pytest.raises(ValueError, match="base lacks"):
            evaluate(pair, method, weight=1)
    assert "nowhere" not in evaluate({"nowhere": Tensor(None, (None,)), "a": Tensor(None, (one,))}, "linear")


# Any shape; what is refused

EVERYWHERE = {
    "linear": {},
    "passthrough": {"scale": 2},
    "checkpoints": {},
    "slerp": {"t": 0.3},
    "nearswap": {"t": 0.001},
    "karcher": {},
    "model_stock": {"filter_wise": True},
    "nuslerp": {"weight": [1, 2], "nuslerp_flatten": False},
    "multislerp": {"weight": 1},
    "arcee_fusion": {},
    "sce": {"select_topk": 0.5},
    "ram": {},
    "ramplus_tl": {},
    "ramplus": {},
    "consensus": {},
    "magmax": {},
    "localize_stitch": {},
    "ota": {"density": 0.5},
    "ffg": {"density": 0.5},
    "fisher": {},
    **{
        name: {"weight": [1, -0.5, 0.7], "rescale": True}
        | ({} if name == "task_arithmetic" else {"density": 0.5})
        for name in (*ELECTING, *LINEAR_ROWS)
    },
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_every_shape(method, shape):
    row = METHODS[method]
    n_experts = min(max(3, row.least), row.most or 3)
    h = tuple(np.asarray(np.float32(np.full(shape, t + 0.5))) for t in range(n_experts))
    x = tensor(shape, n_experts, curvatures=h)
    with np.errstate(all="raise", under="ignore"):
        found = merge(x, method, **EVERYWHERE[method])
    assert found.out.shape == found.unkept.shape == found.operand.shape == shape
    assert found.out.dtype == found.operand.dtype == np.float64
    assert found.masks.shape == (n_experts, *shape)
    assert found.masks.dtype == found.unkept.dtype == bool
    assert np.isfinite(found.out).all()
    np.testing.assert_array_equal(found.unkept, ~found.masks.any(axis=0))
    assert (found.operand >= np.abs(x.experts[0])).all()
    assert (found.agreed is not None) == (method in ELECTING or method == "sce")
    if row.base == "required" and method not in ("slerp", "arcee_fusion"):
        np.testing.assert_array_equal(found.out[found.unkept], x.base[found.unkept])
        with pytest.raises(ValueError, match="base"):
            merge(tensor(shape, n_experts, has_base=False), method, **EVERYWHERE[method])


@pytest.mark.parametrize(
    "method", sorted(set(EVERYWHERE) - {"slerp", "arcee_fusion", "linear", "passthrough"})
)
def test_no_edits_change_nothing(method):
    row = METHODS[method]
    one = tensor(n_experts=0).base
    n_experts = min(max(3, row.least), row.most or 3)
    h = (np.ones(one.shape, np.float32),) * n_experts
    close(merge(Tensor(one, (one,) * n_experts, h), method, **EVERYWHERE[method]).out, one)


@pytest.mark.parametrize(
    ("method", "n_experts", "parameters", "text"),
    [
        ("tie", 2, {}, "no method 'tie'"),
        ("ties", 2, {}, "needs weight"),
        ("slerp", 1, {}, "needs t"),
        ("ties", 2, {"weight": 1, "gamma": 0.1}, "does not know gamma"),
        ("ties", 2, {"weight": [1, 2, 3]}, "3 values for 2 experts"),
        ("linear", 2, {"weight": [1, -1]}, "w: linear: the weights sum to 0"),
        ("linear", 3, {"weight": [0.1, 0.2, -0.3]}, "sum to 0"),
        ("breadcrumbs", 2, {"weight": 1, "density": -0.1}, "density is negative"),
        ("breadcrumbs", 2, {"weight": 1, "gamma": 1.1}, "gamma"),
        ("dare_ties", 2, {"weight": 1, "density": -0.1}, "density is negative"),
        ("della", 2, {"weight": 1, "density": 0.1}, "density 0.1 and epsilon 0.15"),
        ("della", 2, {"weight": 1, "density": 0.5, "epsilon": 0.5}, "density 0.5 and epsilon 0.5"),
        ("ties", 2, {"weight": 1, "rescale": True, "rescale_by": "density"}, "no paper"),
        ("ties", 2, {"weight": 1, "density_scope": "layer"}, "density_scope"),
        ("checkpoints", 2, {"decay": "steps"}, "decay is"),
        ("checkpoints", 2, {"decay": "lawa", "k": 3}, "k = 3"),
        ("fisher", 2, {}, "needs curvature"),
        ("fisher", 2, {"normalise": "l2"}, "normalise"),
        ("slerp", 2, {"t": 0.5}, "exactly 1"),
        ("nearswap", 2, {"t": 0.5}, "exactly 1"),
        ("arcee_fusion", 2, {}, "exactly 1"),
        ("nuslerp", 3, {"weight": 1}, "exactly 2"),
        ("multislerp", 0, {"weight": 1}, "at least 1"),
        ("model_stock", 1, {}, "at least 2"),
        ("karcher", 0, {}, "at least 1"),
        ("passthrough", 2, {}, "exactly 1"),
        ("ffg", 2, {}, "exactly 1"),
        ("linear", 2, {"layers": [0, 1]}, "layers has no meaning"),
        ("slerp", 1, {"t": 0.5, "match_norm": "mean"}, "match_norm has no meaning"),
        ("ram", 2, {"match_norm": "sum"}, "match_norm is mean"),
        ("ota", 2, {"match_norm": "mean", "fallback_to_base": False}, "fallback_to_base"),
        ("sce", 2, {"weights_path": {"w": [1, 1]}}, "has no weights"),
        ("localize_stitch", 2, {"embeddings": "drop"}, "embeddings"),
    ],
)
def test_refused(method, n_experts, parameters, text):
    with pytest.raises(ValueError, match=text):
        merge(tensor(n_experts=n_experts), method, **parameters)


def test_refused_inputs():
    with pytest.raises(ValueError, match="shapes"):
        merge(vectors([0.0], [1.0], [1.0, 2.0]), "task_arithmetic", weight=1)
    with pytest.raises(ValueError, match="shapes"):
        merge(vectors([0.0], [1.0], origins=(np.zeros(2),)), "task_arithmetic", weight=1)
    with pytest.raises(ValueError, match="origin has no meaning"):
        merge(vectors([0.0], [1.0], origins=(np.zeros(1),)), "slerp", t=0.5)
    with pytest.raises(ValueError, match="experts"):
        evaluate({"a": tensor(n_experts=1), "b": tensor(n_experts=2)}, "ram")
