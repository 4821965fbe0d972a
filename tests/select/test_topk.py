"""topk_threshold against sorting; graft against masks from the formulas, bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from models import Experts, random_experts
from scores import CASES, DTYPES, LARGE, assert_grafted, ranks, sorted_answers, tensor_of

from ota_kernels import graft, merge_state_dicts, topk_threshold
from ota_kernels.errors import BackendError, InputError, RecipeError
from ota_kernels.tensors.convert import buffer_of
from ota_kernels.topk import Bracket, at_positions, brackets_of, sorted_at

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def refuse(scores, positions) -> dict[int, float]:
    """In place of `sorted_at`: a bracket that misses fails the test."""
    assert not positions, f"brackets missed: {positions}"
    return {}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_threshold_is_the_sorted_score(case, dtype):
    scores = tensor_of(case, dtype)
    for largest in (True, False):
        wanted = ranks(scores.numel())
        found = topk_threshold(scores, wanted, largest=largest)
        assert found == sorted_answers(scores, wanted, largest)
        assert all(type(x) is float for x in found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threshold_is_that_of_torch(dtype):
    scores = tensor_of("normal", dtype)
    for k in (1, 777, LARGE // 3):
        for largest in (True, False):
            expected = float(torch.topk(scores, k, largest=largest).values[-1])
            assert topk_threshold(scores, k, largest=largest) == expected


@pytest.mark.parametrize("n", [1, 2, 3, 16, 255, 4096, (1 << 15) - 1, 1 << 15, (1 << 15) + 1, (1 << 16) + 7])
def test_any_size(n):
    scores = np.random.default_rng(n).normal(size=n).astype(np.float32)
    ascending = np.sort(scores)
    for k in ranks(n)[1:]:
        assert topk_threshold(scores, k) == ascending[n - k]
        assert np.count_nonzero(scores >= topk_threshold(scores, k)) == k
        assert topk_threshold(scores, k, largest=False) == ascending[k - 1]


def test_several_chunks():
    """More than one worker's part, and a last one that is not whole."""
    scores = np.random.default_rng(2).permutation((2 << 20) + 12_345).astype(np.float32) - 1e6
    n = scores.size
    wanted = [1, n // 7, n // 2, n]
    assert topk_threshold(scores, wanted) == [n - k - 1e6 for k in wanted]


@pytest.mark.parametrize("case", ["normal", "five-values", "mostly-zero", "all-equal", "ascending"])
def test_brackets_hold_and_are_narrow(case):
    """The sample is good for something: a fraction of the array is collected, ties never."""
    scores = tensor_of(case, "float32")
    wanted = LARGE // 100 if case == "mostly-zero" else LARGE // 5
    given, position = buffer_of(scores, "score"), LARGE - wanted
    found = at_positions(given, [position], sorted_at=refuse)
    assert list(found.values()) == sorted_answers(scores, [wanted], True)
    (bracket,) = brackets_of(given, [position])
    assert ((scores > bracket.lowest) & (scores < bracket.highest)).sum() < LARGE / 10


@pytest.mark.parametrize("shift", [-1e3, -0.7, 0.7, 1e3])
def test_a_sample_that_misleads_changes_nothing(shift):
    """Brackets beside the rank, above and below: the counts tell."""
    scores, missed = tensor_of("normal", "float64"), []

    def moved(scores, positions):
        sampled = brackets_of(scores, positions)
        return [replace(b, lowest=b.lowest + shift, highest=b.highest + shift) for b in sampled]

    def noted(scores, positions):
        missed.extend(positions)
        return sorted_at(scores, positions)

    wanted = [LARGE // 5, LARGE // 2, LARGE - LARGE // 5]
    positions = [LARGE - k for k in wanted]
    found = at_positions(buffer_of(scores, "score"), positions, moved, noted)
    assert [found[position] for position in positions] == sorted_answers(scores, wanted, True)
    assert len(missed) == 3


@pytest.mark.parametrize(("lowest", "highest"), [(2.0, 4.0), (3.0, 3.0)], ids=["wide", "one-value"])
def test_ends_of_a_bracket(lowest, highest):
    """A rank right at, inside, and just beyond the ties of either end."""
    scores = buffer_of(np.repeat([1.0, 2.0, 3.0, 4.0, 5.0], 10_000), "score")
    missed = []

    def noted(scores, positions):
        missed.extend(positions)
        return dict.fromkeys(positions, math.nan)

    def fixed(scores, positions):
        return [Bracket(position, lowest, highest) for position in positions]

    inside = {
        int(k): v for v in (2.0, 3.0, 4.0) if lowest <= v <= highest for k in (v * 1e4 - 10_000, v * 1e4 - 1)
    }
    assert at_positions(scores, list(inside), fixed, noted) == inside
    assert missed == []
    first, last = min(inside), max(inside)
    found = at_positions(scores, [first - 1, last + 1], fixed, noted)
    assert all(map(math.isnan, found.values()))
    assert missed == [first - 1, last + 1]


def test_both_ends_in_one_pass():
    """Breadcrumbs: what neither of the k smallest nor the k largest holds."""
    scores, passes = tensor_of("normal", "float32"), []
    k = LARGE // 10
    high, low = topk_threshold(scores, [k, LARGE + 1 - k])
    assert int(((scores < high) & (scores > low)).sum()) == LARGE - 2 * k

    def noted(scores, positions):
        passes.append(positions)
        return brackets_of(scores, positions)

    at_positions(buffer_of(scores, "score"), [k - 1, LARGE - k], noted)
    assert passes == [[k - 1, LARGE - k]]


def test_many_ranks_any_order_and_twice():
    scores = tensor_of("normal", "float32")
    wanted = [*range(LARGE, 0, -7_000), 5, 5, 0]
    assert topk_threshold(scores, wanted) == sorted_answers(scores, wanted, True)
    assert topk_threshold(scores, np.array([9, 3, 9])) == sorted_answers(scores, [9, 3, 9], True)
    assert topk_threshold(scores, range(2)) == sorted_answers(scores, [0, 1], True)
    assert topk_threshold(scores, []) == []
    assert topk_threshold(scores, np.int64(3)) == sorted_answers(scores, [3], True)[0]


def test_nothing_of_nothing():
    for empty in (np.zeros(0, np.float32), np.zeros((0, 5)), torch.zeros(0), torch.zeros(3, 0).bfloat16()):
        assert topk_threshold(empty, 0) == math.inf
        assert topk_threshold(empty, [0], largest=False) == [-math.inf]
    assert topk_threshold(torch.tensor(2.5), 1) == 2.5


@pytest.mark.parametrize("n", [1000, LARGE])
def test_arrays_of_any_layout(n):
    scores = np.random.default_rng(3).normal(size=(n // 10, 10)).astype(np.float32)
    expected = sorted_answers(torch.from_numpy(scores), [n // 3], True)
    room = np.zeros(scores.nbytes + 1, np.uint8)
    unaligned = room[1:].view(np.float32).reshape(scores.shape)
    unaligned[:] = scores
    read_only = scores.copy()
    read_only.flags.writeable = False
    for view in (
        scores,
        scores.T,
        scores[::-1, ::-1],
        np.repeat(scores, 2, axis=1)[:, ::2],
        scores.astype(">f4"),
        unaligned,
        read_only,
        torch.from_numpy(scores).t(),
        torch.from_numpy(scores).requires_grad_(),
    ):
        before = view.tolist()
        assert topk_threshold(view, [n // 3]) == expected
        assert view.tolist() == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1000, LARGE, (1 << 20) + 1])
def test_nan_is_an_error(dtype, n):
    scores = torch.zeros(n, dtype=getattr(torch, dtype))
    scores[[n // 2, n - 1]] = math.nan
    for k in (0, 5, [1, n]):
        with pytest.raises(InputError, match=rf"^score: 2 of {n} values are NaN, .* flat index {n // 2}:"):
            topk_threshold(scores, k)


@pytest.mark.parametrize(
    ("k", "text"),
    [
        (-1, "k is -1: it must be from 0 to 3,"),
        (4, "k is 4: it must be from 0 to 3,"),
        ([1, 4], "k is 4: "),
        (1.0, "k is a float: it must be an integer"),
        (True, "k is a bool: "),
        (None, "k is a NoneType: "),
        ("1", "k is a str: "),
        ([1, 2.0], "k is a float: "),
        (np.ones((2, 2), int), "k is a ndarray: "),
    ],
)
def test_wrong_k(k, text):
    with pytest.raises(RecipeError, match=f"^{text}"):
        topk_threshold(np.zeros(3), k)


@pytest.mark.parametrize(
    ("score", "error", "text"),
    [
        (np.arange(3), InputError, "score is int64; scores are float32, bfloat16, float16, float64"),
        (torch.ones(3, dtype=torch.bool), InputError, "score is bool;"),
        (torch.ones(3).to(torch.float8_e5m2), InputError, "score is float8_e5m2;"),
        (np.ones(3, complex), InputError, "complex128"),
        ([1.0, 2.0], InputError, "score is a list, not a torch tensor or numpy array"),
        (torch.ones(3, device="meta"), BackendError, "score is on meta"),
    ],
)
def test_wrong_scores(score, error, text):
    with pytest.raises(error, match=text):
        topk_threshold(score, 1)


def masks(model: dict, **parameters) -> dict[str, np.ndarray]:
    """m of each tensor of one expert, from the formulas."""
    truth = oracle.evaluate({name: e.exact(name) for name, e in model.items()}, **parameters)
    return {name: merged.masks[0] for name, merged in truth.items()}


SELECTIONS = {
    "density": {"density": 0.3},
    "mass": {"saliency_mass": 0.9},
    "threshold": {"precond_threshold": 1e-16},
    "nothing": {"density": 0},
    "all-but-zeros": {"density": 0.999},
    "everything": {"density": 1},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SELECTIONS)
def test_graft_has_the_bits_of_base_and_expert(backend, dtype, kind):
    e = random_experts(1, (300, 70), 1, dtypes=(dtype,), base_dtype=dtype)
    grafted = graft(e.base, e.experts[0], e.curvatures[0], backend=backend.NAME, **SELECTIONS[kind])
    mask = masks({"weight": e}, **SELECTIONS[kind])["weight"]
    assert mask.mean() == {"nothing": 0, "everything": 1}.get(kind, mask.mean())
    assert kind in ("nothing", "everything") or 0 < mask.mean() < 1
    assert_grafted(grafted, e.base, e.experts[0], mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_graft_where_the_edit_is_rounded(backend, dtype):
    """w_0 + (w_t - w_0) is not w_t: weights of very different size, subnormal, opposite and huge, and -0."""
    like = getattr(torch, dtype)
    tiny = torch.finfo(like).smallest_normal / 4
    huge = torch.finfo(like).max if dtype != "float64" else 3e38
    base = torch.tensor([1.0, 1e3, -huge, 3.0, -2.0, 0.0, 0.0, -0.0], dtype=torch.float64).to(like)
    expert = torch.tensor([1e-4, -1e-7, huge, tiny, -0.0, tiny, 1.0, 0.0], dtype=torch.float64).to(like)
    curvature = torch.ones(8)
    grafted = graft(base, expert, curvature, density=1, backend=backend.NAME)
    assert_grafted(grafted, base, expert, np.ones(8, bool))
    grafted = graft(base, expert, curvature, precond_threshold=0.5, backend=backend.NAME)
    with np.errstate(over="ignore"):
        kept = np.square(expert.double().numpy() - base.double().numpy()) >= 0.5
    assert 0 < kept.sum() < 8
    assert_grafted(grafted, base, expert, kept)


def test_graft_keeps_ties_of_the_threshold(backend):
    """Edits of 1, 2 and 3, ten each, and ten of 0: k = 12 falls among the twos."""
    base = torch.zeros(40)
    expert = torch.tensor([3.0, 2.0, 1.0, 0.0]).repeat(10)
    for k, kept in ((9, 10), (10, 10), (12, 20), (20, 20), (21, 30), (35, 30)):
        grafted = graft(base, expert, torch.ones(40), density=k / 40, backend=backend.NAME)
        assert int(grafted.count_nonzero()) == kept
        assert_grafted(grafted, base, expert, expert.numpy() >= 4 - kept // 10)


MODEL = {"layers.0.weight": (200, 330), "layers.0.bias": (330,), "scale": (), "empty": (0, 4)}


def random_model(dtype: str = "bfloat16") -> dict:
    return {
        name: random_experts(seed, shape, 1, dtypes=(dtype,), base_dtype=dtype)
        for seed, (name, shape) in enumerate(MODEL.items())
    }


def parts(model: dict) -> tuple[dict, dict, dict]:
    """(base, expert, curvature) dictionaries."""
    return (
        {name: e.base for name, e in model.items()},
        {name: e.experts[0] for name, e in model.items()},
        {name: e.curvatures[0] for name, e in model.items()},
    )


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("rank1", [False, True])
def test_graft_of_dictionaries(backend, scope, rank1):
    model = random_model()
    base, expert, curvature = parts(model)
    parameters = {"density": 0.2, "density_scope": scope, "rank1_approx": rank1}
    grafted = graft(base, expert, curvature, backend=backend.NAME, **parameters)
    expected = masks(model, **parameters)
    assert list(grafted) == list(MODEL)
    for name in MODEL:
        assert_grafted(grafted[name], base[name], expert[name], expected[name])
    elements = sum(e.base.numel() for e in model.values())
    if scope == "model" and not rank1:
        assert sum(int(m.sum()) for m in expected.values()) == elements // 5  # scores without ties
    else:
        assert any((expected[name] != m).any() for name, m in masks(model, density=0.2).items())


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_graft_of_many_tiles_over_threads(scope):
    """Masks that wait for other tiles are settled later, and edits are rounded: one weight is far larger."""
    rng = np.random.default_rng(4)
    base, expert = (torch.as_tensor(rng.lognormal(0, 8, (1100, 1000))).bfloat16() for _ in range(2))
    e = Experts(base, (expert,), (torch.as_tensor(rng.lognormal(-30, 9, base.shape)).float(),))
    inexact = (base.float() + (expert.float() - base.float())).bfloat16() != expert
    mask = masks({"w": e}, density=0.4)["w"]
    assert (inexact.numpy() & mask).mean() > 0.01
    for threads in (1, 3):
        grafted = graft(base, expert, e.curvatures[0], density=0.4, density_scope=scope, threads=threads)
        assert_grafted(grafted, base, expert, mask)


def test_graft_is_the_merge_of_one_expert(backend):
    """Up to the rounding of w_0 + (w_t - w_0)."""
    base, expert, curvature = parts(random_model("float32"))
    shared = {"saliency_mass": 0.8, "backend": backend.NAME}
    merged = merge_state_dicts(base, [expert], [curvature], **shared)
    grafted = graft(base, expert, curvature, **shared)
    for name in MODEL:
        torch.testing.assert_close(grafted[name], merged[name], rtol=2.0**-23, atol=0)


def test_graft_without_curvature_is_by_magnitude():
    base, expert = torch.zeros(2000), torch.arange(-1000.0, 1000)
    grafted = graft(base, expert, None, density=0.25)
    assert_grafted(grafted, base, expert, expert.abs().numpy() >= topk_threshold(expert.abs(), 500))


@pytest.mark.parametrize(("policy", "keeps"), [("uniform", True), ("base", False)])
def test_graft_where_curvature_is_missing(policy, keeps):
    model = random_model()
    base, expert, curvature = parts(model)
    del curvature["layers.0.bias"]
    with pytest.raises(InputError, match=r"curvatures\[0\] has no 'layers.0.bias'"):
        graft(base, expert, curvature, density=0.5)
    grafted = graft(base, expert, curvature, density=0.5, missing_curvature=policy)
    mask = np.full(MODEL["layers.0.bias"], keeps)
    assert_grafted(grafted["layers.0.bias"], base["layers.0.bias"], expert["layers.0.bias"], mask)


def test_graft_of_numpy_arrays_and_views():
    e = random_experts(5, (60, 50), 1, dtypes=("float32",), base_dtype="float32")
    plain = graft(e.base, e.experts[0], e.curvatures[0], density=0.3)
    arrays = [np.asfortranarray(x.numpy()) for x in (e.base, e.experts[0], e.curvatures[0])]
    before = [a.copy() for a in arrays]
    grafted = graft(*arrays, density=0.3)
    assert isinstance(grafted, np.ndarray)
    np.testing.assert_array_equal(grafted, plain.numpy())
    grafted[:] = 7
    for array, old in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, old)


def test_graft_of_another_type_is_rounded_to_the_base(backend):
    e = random_experts(6, (500,), 1, dtypes=("float32",), base_dtype="bfloat16")
    grafted = graft(e.base, e.experts[0], e.curvatures[0], density=0.4, backend=backend.NAME)
    mask = masks({"w": e}, density=0.4)["w"]
    assert_grafted(grafted, e.base, e.experts[0].bfloat16(), mask)


def test_graft_copies_what_is_not_merged():
    model = {"w": torch.zeros(3), "index": torch.arange(4)}
    grafted = graft(model, {**model, "w": torch.ones(3)}, None, density=1)
    assert torch.equal(grafted["index"], model["index"])
    assert grafted["index"].data_ptr() != model["index"].data_ptr()


ONES = torch.ones(3)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: graft(ONES, ONES, ONES), RecipeError, "exactly one of density, .* not none"),
        (
            lambda: graft(ONES, ONES, ONES, density=0.1, saliency_mass=0.5),
            RecipeError,
            "exactly one of .* not `density` and `saliency_mass`",
        ),
        (lambda: graft(ONES, ONES, ONES, density=1.5), RecipeError, "`density`.* 1.5"),
        (
            lambda: graft(ONES, ONES, ONES, density=1, density_scope="row"),
            RecipeError,
            "'row'",
        ),
        (lambda: graft(ONES, ONES, ONES, density=1, rank=0), RecipeError, "`rank`.* is 0"),
        (lambda: graft(ONES, ONES, ONES, density=1, threads=0), RecipeError, "at least 1, not 0"),
        (lambda: graft(ONES, {"w": ONES}, None, density=1), InputError, "all tensors, or all dictionaries"),
        (lambda: graft({"w": ONES}, ONES, None, density=1), InputError, "all tensors, or all dictionaries"),
        (lambda: graft({"w": ONES}, {"w": ONES}, ONES, density=1), InputError, "all tensors, or all"),
        (
            lambda: graft({"w": ONES}, {"v": ONES}, None, density=1),
            InputError,
            "has no tensor w, which other",
        ),
        (lambda: graft(ONES, torch.ones(2), None, density=1), InputError, r"has shape \[2\]"),
        (lambda: graft(ONES, ONES * math.nan, None, density=1), InputError, r"experts\[0\].* 3 of 3"),
        (lambda: graft(ONES, ONES, -ONES, density=1), InputError, r"curvatures\[0\].* negative"),
        (lambda: graft(None, ONES, ONES, density=1), InputError, "is a NoneType"),
        (lambda: graft(ONES, ONES, ONES, density=1, backend="cuda"), BackendError, "'cuda'"),
    ],
)
def test_wrong_grafts(call, error, text):
    with pytest.raises(error, match=text) as raised:
        call()
    assert "\n" not in str(raised.value)
