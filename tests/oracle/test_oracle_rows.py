"""The float64 oracle: selections and draws, and element-wise rows by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oracle import evaluate
from oracle.elementwise import checkpoint_coefficients, row_divergence, spread
from oracle.examples import close, merge, tensor, vectors
from oracle.philox import name_hash, philox4x32, uniforms
from oracle.task_vectors import kept_between_outliers, kept_magnitudes, rank_probabilities


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
