"""`lambda: auto`, `times`, `match_norm`: the formulas in float64, what a sample is off by, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from checkpoints import make_set, model_digests
from jobs import merge

import ota_kernels
from ota_kernels import RecipeError
from ota_kernels.run import scale

SHAPES = {
    "embed_tokens.weight": (70, 24),
    "layers.0.weight": (40, 30),
    "layers.1.weight": (30, 40),
    "norm": (40,),
}
RNG = np.random.default_rng(5)


def random_models(experts: int = 3, shapes=SHAPES) -> tuple[dict, list[dict], list[dict]]:
    """Base, experts, second moments; the edits of one expert are larger, and all have something in common."""
    base = {n: RNG.standard_normal(s) for n, s in shapes.items()}
    shared = {n: 0.2 * RNG.standard_normal(s) for n, s in shapes.items()}

    def expert(t: int) -> dict:
        return {n: base[n] + 0.01 * (t + 1) * (shared[n] + RNG.standard_normal(s)) for n, s in shapes.items()}

    moments = [
        {n: (RNG.random(s) ** 8 * 1e-6).astype(np.float32) for n, s in shapes.items()} for _ in range(experts)
    ]
    return base, [expert(t) for t in range(experts)], moments


BASE, EXPERTS, MOMENTS = random_models()


def flat(model: dict) -> np.ndarray:
    return np.concatenate([np.asarray(model[n], np.float64).reshape(-1) for n in SHAPES])


def edit(model: dict) -> np.ndarray:
    return flat(model) - flat(BASE)


def run(method: str = "ota", **parameters) -> np.ndarray:
    """The merged edit."""
    moments = MOMENTS if method == "ota" else None
    return edit(ota_kernels.merge_state_dicts(BASE, EXPERTS, moments, method=method, **parameters))


def rule(e: np.ndarray, kept: list[np.ndarray]) -> float:
    """The formula, in float64."""
    energy = sum(k @ k for k in kept)
    return min(math.sqrt(energy) / np.linalg.norm(e), energy / sum(e @ k for k in kept))


def grafts(**selection) -> list[np.ndarray]:
    pairs = zip(EXPERTS, MOMENTS, strict=True)
    return [edit(ota_kernels.graft(BASE, x, v, **selection)) for x, v in pairs]


def largest(share: float) -> list[np.ndarray]:
    """Edits that TIES keeps: the floor(share n) largest of each tensor."""

    def of_tensor(d: np.ndarray) -> np.ndarray:
        least = np.sort(np.abs(d).reshape(-1))[::-1][int(share * d.size) - 1]
        return np.where(np.abs(d) >= least, d, 0.0)

    return [edit({n: BASE[n] + of_tensor(x[n] - BASE[n]) for n in SHAPES}) for x in EXPERTS]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("method", "parameters", "kept"),
    [
        ("ota", {}, lambda: [edit(x) for x in EXPERTS]),
        ("ota", {"density": 0.2, "normalise": "model", "power": 1.0}, lambda: grafts(density=0.2)),
        (
            "ota",
            {"saliency_mass": 0.9, "density_scope": "tensor"},
            lambda: grafts(saliency_mass=0.9, density_scope="tensor"),
        ),
        ("task_arithmetic", {"weight": 1.0}, lambda: [edit(x) for x in EXPERTS]),
        ("task_arithmetic", {"weight": 0.3, "times": 1.5}, lambda: [edit(x) for x in EXPERTS]),
        ("ties", {"weight": 1.0, "density": 0.2}, lambda: largest(0.2)),
    ],
    ids=["all", "model", "tensor", "sum", "times", "ties"],
)
def test_the_automatic_factor_is_the_formula(backend, method, parameters, kept):
    at_one = run(method, backend=backend, **(parameters | {"times": 1.0}))
    found = run(method, backend=backend, lambda_="auto", **parameters)
    wanted = parameters.get("times", 1.0) * rule(at_one, kept())
    np.testing.assert_allclose(found, wanted * at_one, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("dare_linear", {"weight": 1.0, "density": 0.5}),
        ("della", {"weight": 1.0, "density": 0.5}),
        ("breadcrumbs", {"weight": 1.0, "density": 0.5}),
        ("sce", {"select_topk": 0.3}),
        ("ramplus", {}),
        ("ramplus_tl", {}),
        ("consensus", {}),
        ("magmax", {}),
        ("localize_stitch", {}),
        ("model_stock", {}),
        ("multislerp", {"weight": 1.0}),
        ("ota", {"rescale": True, "density": 0.3}),
        ("ota", {"rank1_approx": True, "density": 0.3}),
        ("ota", {"masked_task_vector_merge_method": "ties", "ties_density": 0.5, "density": 0.3}),
    ],
)
def test_every_row_with_edits_has_one_factor_on_every_backend(method, parameters):
    """Of the merged edit, the same for all elements, and 1 / ||e|| in its units."""
    at_one, factors = run(method, lambda_=1.0, **parameters), []
    for backend in ("native", "reference"):
        found = run(method, lambda_="auto", backend=backend, **parameters)
        factors.append(float(found @ at_one / (at_one @ at_one)))
        np.testing.assert_allclose(found, factors[-1] * at_one, rtol=1e-6, atol=1e-9)
    assert factors[0] == pytest.approx(factors[1], rel=1e-6)
    assert 0.2 < factors[0] < 50  # model_stock shrinks near-orthogonal edits to a fortieth


def test_identical_experts_one_expert_and_no_edits_have_factor_one():
    def found(experts: list[dict]) -> np.ndarray:
        return edit(ota_kernels.merge_state_dicts(BASE, experts, lambda_="auto", density=0.5))

    alone = edit(ota_kernels.merge_state_dicts(BASE, EXPERTS[:1] * 3, density=0.5))
    np.testing.assert_allclose(found(EXPERTS[:1] * 3), alone, rtol=1e-5, atol=1e-15)
    halved = {"method": "task_arithmetic", "weight": [0.5]}
    one = ota_kernels.merge_state_dicts(BASE, EXPERTS[:1], lambda_="auto", **halved)
    np.testing.assert_array_equal(edit(one), edit(ota_kernels.merge_state_dicts(BASE, EXPERTS[:1], **halved)))
    assert not found([BASE, BASE]).any()


def test_orthogonal_experts_come_out_as_their_sum():
    """Of edits that share no element: a mean of three takes a factor of 3, a mean of masked ones nothing."""
    shapes = {"layers.0.weight": (30, 40)}
    base = {n: RNG.standard_normal(s) for n, s in shapes.items()}
    places = RNG.permutation(1200).reshape(3, 400)
    experts = []
    for own in places:
        d = np.zeros(1200)
        d[own] = RNG.standard_normal(400)
        experts.append({n: base[n] + d.reshape(s) for n, s in shapes.items()})
    name = "layers.0.weight"
    total = sum(x[name] - base[name] for x in experts)
    for parameters in ({"masked_task_vector_merge_method": "linear"}, {"density": 0.34}):
        merged = ota_kernels.merge_state_dicts(base, experts, lambda_="auto", **parameters)
        np.testing.assert_allclose(merged[name] - base[name], total, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("more", [{}, {"lambda_": 0.3}, {"lambda_": [0.2, 0.9]}])
def test_match_norm_gives_the_mean_length_of_the_edits(more):
    found = run("ties", weight=1.0, density=0.3, match_norm="mean", **more)
    mean = np.mean([np.linalg.norm(edit(x)) for x in EXPERTS])
    assert np.linalg.norm(found) == pytest.approx(mean, rel=1e-5)
    plain = run("ties", weight=1.0, density=0.3, **more)
    np.testing.assert_allclose(found * np.linalg.norm(plain), plain * mean, rtol=2e-5, atol=1e-9)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    shapes = {"embed_tokens.weight": (3000, 64), "layers.0.weight": (400, 500), "layers.1.weight": (500, 600)}
    return make_set(tmp_path_factory.mktemp("large"), shapes | {"norm": (64,)})


def test_the_sample_is_near_and_the_same_whatever_tiles_and_threads(models, tmp_path, monkeypatch):
    recipe = models.recipe(saliency_mass=0.9, normalise="model", **{"lambda": "auto"})
    reports, digests = [], []
    for i, options in enumerate(
        [{"threads": 1, "tile_elements": 4096}, {"threads": 3, "candidates_memory": 0}]
    ):
        reports.append(merge(recipe, tmp_path / str(i), **options)["lambda"])
        digests.append(model_digests(tmp_path / str(i)))
    assert reports[0] == reports[1]
    assert digests[0] == digests[1]
    assert reports[0]["used"] == reports[0]["auto"]
    assert 2**17 <= reports[0]["sampled"] < 2**18
    monkeypatch.setattr(scale, "_LEAST", 1 << 30)
    monkeypatch.setattr(scale, "_MOST", 1 << 30)
    exact = merge(recipe, tmp_path / "exact")["lambda"]
    assert exact["sampled"] == 3000 * 64 + 200_000 + 300_000 + 64
    for key in ("auto", "match_norm", "length"):
        assert reports[0][key] == pytest.approx(exact[key], rel=0.03)
        assert reports[0][key] != exact[key]


def test_every_report_says_the_factor_and_a_short_edit_is_remarked_upon(models, tmp_path):
    report = merge(models.recipe(), tmp_path / "out")
    assert report["lambda"]["used"] == 1
    assert report["lambda"]["auto"] > 1.3
    automatic = merge(models.recipe(**{"lambda": "auto"}), tmp_path / "auto")
    assert automatic["lambda"]["used"] == report["lambda"]["auto"]
    assert automatic["lambda"]["length"] == pytest.approx(
        report["lambda"]["auto"] * report["lambda"]["length"], rel=1e-3
    )
    assert [n for n in report["notes"] if "merged edit is short" in n]
    assert not [n for n in automatic["notes"] if "merged edit is" in n]


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"lambda": ["auto", 1]}, "there is nothing between"),
        ({"lambda": [{"filter": "norm", "value": "auto"}]}, "found over the whole model"),
        ({"lambda": "auto", "match_norm": "mean"}, "exclude each other"),
        ({"lambda": "auto", "fallback_to_base": False}, "needs `fallback_to_base: true`"),
        ({"lambda": "automatic"}, "or auto"),
        ({"match_norm": "max"}, "it must be mean"),
        ({"match_norm": ["mean", "mean"]}, None),
    ],
)
def test_what_has_no_meaning_is_refused(parameters, says):
    if says is None:
        run(**parameters)
        return
    with pytest.raises(RecipeError, match=says):
        run(**parameters)


def test_a_factor_of_an_edit_needs_a_base():
    with pytest.raises(RecipeError, match="needs a `base_model`"):
        ota_kernels.merge_state_dicts(None, EXPERTS, MOMENTS, lambda_="auto")


def test_small_tensors_that_hold_much_saliency_do_not_count_twice(monkeypatch):
    """Biases are sampled whole and matrices by a tenth: thresholds of the model must weigh them so."""
    shapes = {"layers.0.weight": (1000, 1500), **{f"layers.{i}.bias": (500,) for i in range(4)}}
    base, experts, moments = random_models(3, shapes)
    for of_expert in moments:
        for name in shapes:
            if name.endswith("bias"):
                of_expert[name] *= 3e3

    def length() -> float:
        merged = ota_kernels.merge_state_dicts(base, experts, moments, lambda_="auto", saliency_mass=0.9)
        return math.sqrt(sum(float(np.square(merged[n] - base[n]).sum()) for n in shapes))

    sampled = length()
    monkeypatch.setattr(scale, "_LEAST", 1 << 30)
    monkeypatch.setattr(scale, "_MOST", 1 << 30)
    assert sampled == pytest.approx(length(), rel=0.02)


def test_a_sample_lets_go_of_pages_as_it_goes(models, tmp_path, monkeypatch):
    """A large tensor's pages are never all held: an embedding alone can be a gigabyte."""
    recipe = models.recipe(**{"lambda": "auto"})
    whole = merge(recipe, tmp_path / "whole")["lambda"]["used"]
    held = []
    monkeypatch.setattr(scale, "CHUNK", 1 << 14)
    pieces = scale._pieces

    def watched(tensor, share, terms, release):
        def noted(tile):
            held.append(tile.numel)
            release(tile)

        return pieces(tensor, share, terms, noted)

    monkeypatch.setattr(scale, "_pieces", watched)
    assert merge(recipe, tmp_path / "parts")["lambda"]["used"] == whole
    assert len(held) > 40
    assert max(held) <= (1 << 14) + 64


def test_a_report_that_nobody_asks_says_it_where_that_costs_little(models, tmp_path, monkeypatch):
    recipe = models.recipe("task_arithmetic", weight=1.0)
    assert ota_kernels.merge(recipe, tmp_path / "small")["lambda"]["auto"] > 0
    monkeypatch.setattr(scale, "UNASKED_NOT", range(1 << 26))
    assert ota_kernels.merge(recipe, tmp_path / "between")["lambda"] is None
    asked = models.recipe("task_arithmetic", weight=1.0, **{"lambda": "auto"})
    assert ota_kernels.merge(asked, tmp_path / "asked")["lambda"]["auto"] > 0
