"""The float64 oracle: identities that every method must have, options, absent tensors, what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from oracle import METHODS, Tensor, evaluate, spectral
from oracle.examples import ELECTING, LINEAR_ROWS, SHAPES, close, merge, tensor, vectors


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
    "combine": {"weight": [1, -0.5, 0.7], "density": 0.5},
    **{name: {} for name in spectral.METHODS},
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
    assert (found.agreed is not None) == (method in (*ELECTING, "sce", "combine"))
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
