"""Densities found while merging: exact thresholds, exact counts, and the bytes of a merge that knew them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch
from models import Experts, decider_of, random_experts
from streams import BIG, closed_recipe, inputs_of, recipe_of, stream

from ota_kernels import merge_state_dicts, merger
from ota_kernels.backends import native, reference
from ota_kernels.run.decide import Decider
from ota_kernels.run.rules import Rules
from ota_kernels.select.bracket import Bracket, bracket_of
from ota_kernels.tensors.terms import is_open

TINY = (1, 2, 15, 17, 40)
SCOPES = ("model", "tensor")


def grafts(edits: Sequence[np.ndarray], curvatures: Sequence[np.ndarray]) -> Experts:
    """Experts on a base of 0, so that their edits are these float32 numbers."""

    def tensors(arrays):
        return tuple(torch.from_numpy(np.float32(a)) for a in arrays)

    return Experts(torch.zeros(edits[0].shape), tensors(edits), tensors(curvatures))


def _normal(rng, shape):
    return rng.normal(size=shape), rng.random(shape)


def _few_values(rng, shape):
    return rng.integers(-2, 3, shape) / 1024, np.full(shape, 2.0**-20)


def _no_edits(rng, shape):
    return np.zeros(shape), rng.random(shape)


def _outlier(rng, shape):
    edits, curvature = _normal(rng, shape)
    edits.flat[-1] = 1e6
    return edits, curvature


def _rows(rng, shape):
    """Rows and columns of very different curvature, as second moments have."""
    edits, curvature = _normal(rng, shape)
    of_rows = 10.0 ** rng.uniform(-4, 4, (*shape[:1], *[1] * (len(shape) - 1)))
    return edits, curvature * of_rows * 10.0 ** rng.uniform(-1, 1, shape[-1:])


def _tie(rng, shape):
    """One in fifty scores is one value, the 30 % quantile."""
    edits, curvature = _normal(rng, shape)
    ones = np.where(rng.random(shape) < 0.5, 1.0, -1.0)
    tied = rng.random(shape) < 0.02
    return np.where(tied, ones, edits), np.where(tied, 0.25, curvature)


def _overflowing(rng, shape):
    """One in twenty scores is infinite."""
    edits, curvature = _normal(rng, shape)
    huge = rng.random(shape) < 0.05
    return np.where(huge, 1e10, edits), np.where(huge, 1e38, curvature)


def _negative_zeros(rng, shape):
    """A curvature of -0 is 0."""
    edits, curvature = _few_values(rng, shape)
    curvature.flat[::13] = -0.0
    return edits, curvature


KINDS = {
    "normal": _normal,
    "few values": _few_values,
    "no edits": _no_edits,
    "outlier": _outlier,
    "rows": _rows,
    "tie": _tie,
    "overflowing": _overflowing,
    "negative zeros": _negative_zeros,
}


@functools.cache
def scenario(kind: str) -> tuple[Experts, ...]:
    """Three experts of a tensor that is bracketed, and of many that are too small for that."""
    rng = np.random.default_rng(len(kind))

    def one(shape):
        parts = [KINDS[kind](rng, shape) for _ in range(3)]
        return grafts(*zip(*parts, strict=True))

    return (one(BIG), *(one((n,)) for n in TINY))


@functools.cache
def scores_of(kind: str, t: int) -> tuple[np.ndarray, ...]:
    """Expert t's float32 scores in each tensor, by the definition."""
    found = []
    for experts in scenario(kind):
        d = oracle.task_vector(experts.experts[t].numpy(), experts.base.numpy())
        with np.errstate(over="ignore"):
            found.append(np.abs(oracle.score(experts.curvatures[t].numpy(), d)).ravel())
    return tuple(found)


def integers(scores: np.ndarray) -> list[int]:
    """Scores in units of 2^-149, in which they are integers; infinity counts as 2^128."""
    bits = scores.view(np.uint32).astype(np.int64)
    exponents = np.maximum(bits >> 23, 1) - 1
    significands = (bits & 0x7FFFFF) + np.where(bits >> 23 > 0, 1 << 23, 0)
    return [m << e for m, e in zip(significands.tolist(), exponents.tolist(), strict=True)]


def exact_threshold(scores: np.ndarray, own: dict) -> float | None:
    """The least score that is kept, by sorting all of them; None where nothing is kept."""
    descending = np.sort(scores)[::-1]
    if "precond_threshold" in own:
        return own["precond_threshold"] * 2.0**64
    if "density" in own:
        k = int(Fraction(repr(own["density"])) * len(scores))
        if k == 0:
            return None
        assert torch.topk(torch.from_numpy(scores), k).values[-1] == descending[k - 1]
        return max(float(descending[k - 1]), 2.0**-149)
    worth = integers(descending)
    target, held = Fraction(repr(own["saliency_mass"])) * sum(worth), 0
    if target == 0:
        return None
    for score, mass in zip(descending.tolist(), worth, strict=True):
        held += mass
        if held >= target:
            return score
    raise AssertionError


def kept(scores: np.ndarray, threshold: float | None) -> int:
    return 0 if threshold is None else int((scores >= np.float32(threshold)).sum())


ELEMENTS = {"model": BIG[0] * BIG[1] + sum(TINY), "tensor": BIG[0] * BIG[1]}
MIXED = ({"density": 0.3}, {"precond_threshold": 2.0**-30}, {"saliency_mass": 0.8})


def selections(scope: str) -> list[tuple[dict, ...]]:
    n = ELEMENTS[scope]
    # All but one; one; none. The halves keep a decimal clear of the integers.
    edges = ({"density": (n - 0.5) / n}, {"density": 1.5 / n}, {"density": 0.0})
    masses = ({"saliency_mass": 0.9}, {"saliency_mass": 1e-9}, {"saliency_mass": 1.0})
    return [MIXED, masses, ({"density": 0.3}, {"density": 0.02}, {"density": 0.7}), edges]


@functools.cache
def expected_thresholds(kind: str, scope: str, number: int) -> list[list[float | None]]:
    """Per expert, in each tensor; number: of the selections."""
    found = []
    for t, one in enumerate(selections(scope)[number]):
        scores = scores_of(kind, t)
        if scope == "model":
            found.append([exact_threshold(np.concatenate(scores), one)] * len(scores))
        else:
            found.append([exact_threshold(s, one) for s in scores])
    return found


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_and_counts_are_those_of_a_sort(backend, kind, scope):
    """The k-th largest score, or the largest that completes the mass, and what reaches it."""
    tensors = inputs_of(scenario(kind))
    every = kind in ("normal", "few values", "tie")
    for number, own in enumerate(selections(scope)[: None if every else 2]):
        found = stream(recipe_of(own, density_scope=scope), tensors, backend)
        expected = expected_thresholds(kind, scope, number)
        for t in range(3):
            finite = [x if x is None else min(x, float(np.finfo(np.float32).max)) for x in expected[t]]
            assert found.scores(t) == finite, (own[t], t)
            counted = [kept(s, x) for s, x in zip(scores_of(kind, t), expected[t], strict=True)]
            assert [counts.kept[t] for counts in found.counts] == counted, (own[t], t)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("density", [0.05, 0.3, 0.6])
def test_exactly_k_are_kept_where_no_scores_are_equal(backend, density, scope):
    """Of scores that are a permutation of distinct numbers."""
    n = BIG[0] * BIG[1]
    curvature = np.random.default_rng(1).permutation(n).reshape(BIG) + 1.0
    big = grafts([np.ones(BIG)], [curvature]).inputs("float32")
    found = stream(recipe_of([{"density": density}], density_scope=scope), [big], backend)
    assert found.counts[0].kept == [int(Fraction(repr(density)) * n)]
    assert found.counts[0].unkept == n - found.counts[0].kept[0]
    assert (found.repeats, bool(found.waiting)) == (0, True)


# What the sample can bracket: a mass of 1, and all but one of them, are found by histograms.
BRACKETED = ({"density": 0.3}, {"density": 0.02}, {"saliency_mass": 0.5})


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", KINDS)
def test_brackets_are_used(kind, scope):
    """The tests here would prove nothing of brackets if all went by histograms."""
    tensors = inputs_of(scenario(kind))
    decider = decider_of(recipe_of(BRACKETED, density_scope=scope), tensors, native)
    model = decider.decide_model()
    bracketed = [[is_open(e) for e in decider.terms(tensor, model).experts] for tensor in tensors]
    assert any(bracketed[0])
    assert all(one == (bracketed[0] if scope == "model" else [False] * 3) for one in bracketed[1:])
    if kind in ("normal", "tie"):
        assert all(bracketed[0])
    if kind == "few values":
        spans = [e.span for e in decider.terms(tensors[0], model).experts]
        assert 0 in spans  # kept or dropped together


@pytest.mark.parametrize("kind", ["normal", "few values", "no edits", "rows", "tie"])
def test_merged_bytes_are_those_of_known_thresholds(backend, kind):
    tensors = inputs_of(scenario(kind), "bfloat16")
    for number, own in enumerate(selections("model")):
        found = stream(recipe_of(own), tensors, backend)
        thresholds = [one[0] for one in expected_thresholds(kind, "model", number)]
        known = stream(closed_recipe(thresholds), tensors, backend, tile=1 << 20)
        assert not known.waiting
        assert found.outputs == known.outputs
        assert found.numbers() == known.numbers()


def test_tensor_scope_is_each_tensor_by_itself(backend):
    tensors = inputs_of(scenario("rows"), "bfloat16")
    found = stream(recipe_of(MIXED, density_scope="tensor"), tensors, backend)
    expected = expected_thresholds("rows", "tensor", 0)
    for i, tensor in enumerate(tensors):
        known = stream(closed_recipe([one[i] for one in expected]), [tensor], backend)
        assert (found.outputs[i], found.numbers()[i]) == (known.outputs[0], known.numbers()[0])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["rows", "few values"])
def test_tiles_threads_and_memory_change_nothing(kind, scope):
    tensors = inputs_of(scenario(kind), "float16")
    recipe = recipe_of(MIXED, density_scope=scope)
    expected = stream(recipe, tensors, native, tile=1 << 20, threads=1)
    for tile, threads, budget in [(1000, 3, 0), (4096, 2, 10_000), (100_000, 1, 0), (333, 1, 1 << 30)]:
        found = stream(recipe, tensors, native, tile, threads, budget)
        assert (found.outputs, found.counts) == (expected.outputs, expected.counts), (tile, threads, budget)


@pytest.mark.parametrize("mass", [0.4, 0.9])
def test_mass_within_a_tie_beside_candidates_of_another_expert(backend, mass):
    """Half of the scores are 2, half 1, and what the other expert leaves undecided has mass too."""
    rng = np.random.default_rng(5)
    edits, curvature = _normal(rng, BIG)
    levels = rng.integers(1, 3, BIG)
    tensor = grafts([np.ones(BIG), edits], [levels, curvature]).inputs("float32")
    found = stream(recipe_of([{"saliency_mass": mass}, {"density": 0.3}]), [tensor], backend)
    assert found.repeats == 0
    assert sum(count for _, count in found.waiting) > 100
    expected = 2 if mass == 0.4 else 1  # the twos hold 2 / 3
    assert found.scores(0) == [expected * 2.0**64]
    assert found.counts[0].kept[0] == int((levels >= expected).sum())


def _too_high(selection, scores) -> Bracket:
    return Bracket(float(scores.max()) * 2, 1 << 16)


def _too_low(selection, scores) -> Bracket:
    return Bracket(2.0**-149, 1)


def _one_value(selection, scores) -> Bracket:
    """A score that exists, but is not the threshold."""
    return Bracket(float(np.sort(scores, axis=None)[scores.size // 50]), 0)


def _shifted(selection, scores) -> Bracket:
    """As wide as the right one, right beneath it."""
    right = bracket_of(selection, scores)
    below = np.float32(right.lowest).view(np.uint32) - np.uint32(right.span)
    return Bracket(float(below.view(np.float32)), right.span)


BAD_BRACKETS = (_too_high, _too_low, _one_value, _shifted)


@pytest.mark.parametrize("tile", [1 << 20, 7000], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("bad", BAD_BRACKETS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", [native, reference], ids=lambda b: b.NAME)
def test_a_bracket_that_misses_costs_time_only(backend, bad, scope, tile):
    tensors = inputs_of(scenario("normal"), "bfloat16")
    recipe = recipe_of(MIXED, density_scope=scope)
    expected = stream(recipe, tensors, backend, tile)
    found = stream(recipe, tensors, backend, tile, rules=Rules(bracket=bad))
    assert (expected.repeats, found.repeats) == (0, 1)
    assert found.outputs == expected.outputs
    assert found.numbers() == expected.numbers()
    assert [found.scores(t) for t in range(3)] == [expected.scores(t) for t in range(3)]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("missed", [(0, 1, 2), (1,), (0, 2)], ids=str)
@pytest.mark.parametrize("bad", BAD_BRACKETS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_bracket_that_misses_changes_no_dictionary(monkeypatch, backend, bad, missed, scope):
    densities = [0.3, 0.1, 0.6]
    models = scenario("normal")
    base = {f"t{i}": m.base for i, m in enumerate(models)}
    experts = [{f"t{i}": m.experts[t] for i, m in enumerate(models)} for t in range(3)]
    curvatures = [{f"t{i}": m.curvatures[t] for i, m in enumerate(models)} for t in range(3)]
    decided = []

    class Watched(Decider):
        rule = staticmethod(bracket_of)

        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named, rules=Rules(bracket=self.rule))

        def exact_thresholds(self, *arguments):
            decided.append(super().exact_thresholds(*arguments))
            return decided[-1]

    monkeypatch.setattr(merger, "Decider", Watched)

    def merged():
        found = merge_state_dicts(
            base,
            experts,
            curvatures,
            density=densities,
            density_scope=scope,
            backend=backend,
            threads=2,
        )
        return {name: tensor.numpy().tobytes() for name, tensor in found.items()}

    def sometimes_bad(selection, scores):
        return (bad if densities.index(selection.value) in missed else bracket_of)(selection, scores)

    expected = merged()
    assert not decided
    Watched.rule = staticmethod(sometimes_bad)
    assert merged() == expected
    scores = [np.concatenate(scores_of("normal", t)[: None if scope == "model" else 1]) for t in range(3)]
    exact = [exact_threshold(s, {"density": x}) for s, x in zip(scores, densities, strict=True)]
    assert decided == [[x if t in missed else None for t, x in enumerate(exact)]]


def spoil(experts: Experts, seed: int) -> Experts:
    """NaN, infinite and negative values in one of forty elements of each input, at any score."""
    rng = np.random.default_rng(seed)

    def spoiled(tensor, values):
        array = tensor.float().numpy().copy()
        places = rng.random(array.shape) < 1 / 40
        array[places] = rng.choice(np.float32(values), int(places.sum()))
        return torch.from_numpy(array).to(tensor.dtype)

    odd = [np.nan, np.inf, -np.inf]
    return Experts(
        spoiled(experts.base, odd),
        tuple(spoiled(w, odd) for w in experts.experts),
        tuple(spoiled(h, [np.nan, np.inf, -1.0, -1e-30]) for h in experts.curvatures),
    )


def unusable(experts: Experts, t: int) -> np.ndarray:
    """Where expert t's inputs, or the base, cannot be used."""
    h, weights = experts.curvatures[t].float().numpy(), (experts.base, experts.experts[t])
    bad = ~np.isfinite(h) | ~(h >= 0)
    return bad | np.any([~np.isfinite(w.float().numpy()) for w in weights], axis=0)


@functools.cache
def spoiled_models() -> tuple[Experts, ...]:
    return tuple(spoil(random_experts(i, shape, 2), i) for i, shape in enumerate([BIG, (40,), (3, 5)]))


@functools.cache
def masks_of_spoiled(key: str, value: float, scope: str) -> list[np.ndarray]:
    """Of each tensor, by the definition: bool[T, *shape], without what an expert's inputs rule out."""
    models = spoiled_models()
    exact = {f"t{i}": m.exact() for i, m in enumerate(models)}
    truth = oracle.evaluate(exact, on_nonfinite="base", density_scope=scope, **{key: value})
    usable = [~np.stack([unusable(m, t) for t in range(2)]) for m in models]
    return [truth[f"t{i}"].masks & good for i, good in enumerate(usable)]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("parameter", [("density", 0.3), ("saliency_mass", 0.7)], ids=lambda p: p[0])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_inputs_that_are_not_finite(backend, parameter, scope):
    """Repaired elements are kept by no expert whose own inputs are unusable, inside brackets and outside."""
    tensors = inputs_of(spoiled_models(), "bfloat16")
    recipe = recipe_of([dict([parameter])] * 2, on_nonfinite="base", density_scope=scope)
    found = stream(recipe, tensors, backend, tile=4096)
    assert found.repeats == 0
    assert sum(count for _, count in found.waiting) > 0
    masks = masks_of_spoiled(*parameter, scope)
    for i, (tensor, model) in enumerate(zip(tensors, spoiled_models(), strict=True)):
        bad = unusable(model, 0) | unusable(model, 1)
        assert found.counts[i].kept == masks[i].reshape(2, -1).sum(axis=1).tolist()
        assert found.counts[i].repaired == int(bad.sum())
        thresholds = [found.scores(t)[i] for t in range(2)]
        known = stream(closed_recipe(thresholds, on_nonfinite="base"), [tensor], backend)
        assert (found.outputs[i], found.numbers()[i]) == (known.outputs[0], known.numbers()[0])
    assert stream(recipe, tensors, backend, tile=1 << 20).numbers() == found.numbers()


# name: (arguments of random_experts, of inputs, of the recipe)
VARIANTS = {
    "linear": ({}, {}, {"masked_task_vector_merge_method": "linear"}),
    "ties": ({}, {}, {"masked_task_vector_merge_method": "ties"}),
    "ties, trimmed": ({}, {}, {"masked_task_vector_merge_method": "ties", "ties_density": 0.3}),
    "weights unmasked": ({}, {}, {"mask_weights": False}),
    "rescale": ({}, {}, {"rescale": True}),
    "no base": ({"base_dtype": None}, {}, {}),
    "float64": ({"dtypes": ("float64",), "base_dtype": "float64"}, {"out_dtype": "float64"}, {}),
    "float16": ({"dtypes": ("float16",), "base_dtype": "float16"}, {"out_dtype": "float16"}, {}),
    "rank 1": ({}, {}, {"rank1_approx": True}),
    "rank 1, normalised": ({}, {}, {"rank1_approx": True, "normalise": "global"}),
    "bfloat16 curvature": ({"curvature_dtypes": ("bfloat16", "float16")}, {}, {"power": 0.3}),
    "bias correction": ({}, {"bias_corrections": (1.0, 0.01, 0.7)}, {}),
    "normalised over the model": ({}, {}, {"normalise": "model", "epsilon": 1e-8}),
    "curvature 1": ({"curvature_dtypes": None}, {}, {"missing_curvature": "uniform"}),
    "mean as fallback": ({}, {}, {"fallback_to_base": False, "lambda": 1.5}),
}
LATE = {"ties, trimmed", "rescale"}  # need the masks before the merge
OWN = {
    "density": ({"density": 0.3},) * 3,
    "mixed": ({"density": 0.3}, {"precond_threshold": 1e-15}, {"saliency_mass": 0.8}),
}


@functools.cache
def variant_models(variant: str) -> tuple[Experts, ...]:
    kinds = VARIANTS[variant][0]
    return tuple(random_experts(seed, shape, **kinds) for seed, shape in enumerate([BIG, (30,)]))


@functools.cache
def kept_by_definition(variant: str, own: str) -> list[list[int]]:
    """Per tensor and expert."""
    _, given, shared = VARIANTS[variant]
    biases = given.get("bias_corrections")
    exact = {f"t{i}": m.exact(f"t{i}", biases) for i, m in enumerate(variant_models(variant))}
    keys = ("density", "saliency_mass", "precond_threshold")
    each = {key: [one.get(key) for one in OWN[own]] for key in keys}
    truth = oracle.evaluate(exact, **each, **shared)
    return [merged.masks.reshape(3, -1).sum(axis=1).tolist() for merged in truth.values()]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("backend", "own"),
    [(native, "density"), (native, "mixed"), (reference, "mixed")],
    ids=["native-density", "native-mixed", "reference-mixed"],
)
def test_variants(backend, variant, own):
    """Each is the merge that knows the thresholds; which masks they make is asked of the definition."""
    _, given, shared = VARIANTS[variant]
    models = variant_models(variant)
    has_base = models[0].base is not None
    tensors = inputs_of(models, **given)
    recipe = recipe_of(OWN[own], has_base, **shared)
    assert decider_of(recipe, tensors, backend).brackets == (variant not in LATE)
    found = stream(recipe, tensors, backend, tile=15_000)
    assert (found.repeats, bool(found.waiting)) == (0, variant not in LATE)
    thresholds = [found.scores(t)[0] for t in range(3)]
    known = stream(closed_recipe(thresholds, has_base=has_base, **shared), tensors, backend)
    assert not known.waiting
    assert (found.outputs, found.numbers()) == (known.outputs, known.numbers())
    assert [counts.kept for counts in found.counts] == kept_by_definition(variant, own)
