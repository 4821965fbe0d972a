"""Methods of a user's own: rows of words, and functions of torch tensors, on every way through."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import assert_same_tensors, load_merged, make_set, model_digests, raw
from jobs import Interrupt, merge

import ota_kernels
from ota_kernels import BackendError, InputError, RecipeError, merge_state_dicts, merge_tensors
from ota_kernels.recipe import methods
from ota_kernels.run.rules import Rules
from ota_kernels.tensors.terms import BLOCK

SHAPES = {"wide.weight": (180, 400), "norm.weight": (60,), "scale": (), "empty": (0, 3)}


@pytest.fixture(autouse=True)
def _own_names(monkeypatch):
    """What a test registers goes with it."""
    methods.names()
    monkeypatch.setattr(methods, "_REGISTRY", dict(methods._REGISTRY))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("models"), SHAPES)


def recipe_of(models, name: str, **parameters) -> dict:
    """With second moments, whatever the method's name is."""
    recipe = models.recipe(name, **parameters)
    for entry, file in zip(recipe["models"], models.curvature_files, strict=True):
        entry["parameters"]["preconditioner_path"] = str(file)
    return recipe


# Rows of words


def test_a_row_of_words_is_the_method_that_has_them(models):
    """What tables have under other names comes out with the same bytes, on kernels and reference."""
    ota_kernels.method("mine", elect="none", select="all", divide="one")
    ota_kernels.method("my_ota", score="saliency", select="density", weigh="curvature", divide="kept weights")
    ota_kernels.method("my_stitch", select="density", divide="kept count")
    ota_kernels.method("my_magmax", elect="largest")
    pairs = [
        ("mine", "task_arithmetic", {"weight": [0.5, 1.0, -0.25], "lambda_": 0.8}, False),
        ("my_ota", "ota", {"density": [0.3, 0.1, 0.5], "power": 0.7, "scaling_factor": [1, 2, 3]}, True),
        ("my_stitch", "localize_stitch", {"density": 0.2}, False),
        ("my_magmax", "magmax", {"lambda_": 0.7}, False),
    ]
    for mine, theirs, parameters, curvature in pairs:
        for backend in ("native", "reference"):
            curvatures = models.curvatures if curvature else None
            options = {"backend": backend, **parameters}
            own = merge_state_dicts(models.base, models.experts, curvatures, method=mine, **options)
            expected = merge_state_dicts(models.base, models.experts, curvatures, method=theirs, **options)
            assert_same_tensors(own, expected)


def test_a_row_of_chance_keeps_its_share():
    ota_kernels.method("lottery", select="random", divide="experts", elect="sum")
    base, edit = torch.zeros(40000), torch.ones(40000)
    merged = merge_tensors(base, [edit, edit], method="lottery", density=0.25)
    share = 1 - 0.75**2
    assert (merged > 0).float().mean() == pytest.approx(share, abs=0.01)
    assert set(merged.tolist()) == {0.0, 0.5, 1.0}


def test_its_keys_follow_from_the_words():
    ota_kernels.method("plain", select="all")
    ota_kernels.method("curved", score="saliency", select="density", weigh="curvature")
    assert {"lambda", "times", "match_norm", "weight"} == methods.get("plain").keys - {
        "extra_tensors",
        "calibrate",
        "layers",
        "weights_path",
    }
    assert {"density", "saliency_mass", "preconditioner_path", "power"} < methods.get("curved").keys
    assert "weight" not in methods.get("curved").keys


@pytest.mark.parametrize(
    ("name", "words", "text"),
    [
        ("ota", {"select": "all"}, "`ota` is a method of this package"),
        ("x", {"elect": "mob"}, "elect='mob': it must be none, sum, count or largest"),
        ("x", {"select": "all", "each": ["weight"]}, "`each` is for functions"),
    ],
)
def test_refused_words(name, words, text):
    with pytest.raises(RecipeError, match=text):
        ota_kernels.method(name, **words)


# Functions


def add_soft() -> None:
    @ota_kernels.method("soft", each=["weight"])
    def soft(base, experts, curvatures, *, weight=1.0, sharpness=2.0, lambda_=1.0):
        """A softmax of saliencies weighs the edits."""
        edits = torch.stack([w * (x - base) for w, x in zip(weight, experts, strict=True)])
        saliency = torch.stack(curvatures).sqrt() * edits.square()
        return base + lambda_ * (torch.softmax(sharpness * saliency, 0) * edits).sum(0)


def soft64(models, weight, sharpness, lambda_) -> dict[str, torch.Tensor]:
    found = {}
    for name, base in models.base.items():
        base = base.double()
        edits = torch.stack(
            [w * (e[name].double() - base) for w, e in zip(weight, models.experts, strict=True)]
        )
        saliency = torch.stack([c[name].double() for c in models.curvatures]).sqrt() * edits.square()
        found[name] = base + lambda_ * (torch.softmax(sharpness * saliency, 0) * edits).sum(0)
    return found


PARAMETERS = {"weight": [1.0, 0.5, 2.0], "sharpness": 1e4, "lambda": 0.9}


class TestFunction:
    @pytest.fixture(autouse=True)
    def soft(self, _own_names):
        add_soft()

    def test_files_and_arrays(self, models, tmp_path):
        report = merge(recipe_of(models, "soft", **PARAMETERS), tmp_path / "out", tile_elements=999)
        found = load_merged(tmp_path / "out")
        exact = soft64(models, [1.0, 0.5, 2.0], 1e4, 0.9)
        for name, tensor in exact.items():
            assert found[name].dtype == torch.bfloat16
            torch.testing.assert_close(found[name].double(), tensor, rtol=2**-8, atol=1e-6)
        assert (report["passes"], report["backend"]) == (1, "reference")
        in_memory = merge_state_dicts(
            models.base,
            models.experts,
            models.curvatures,
            method="soft",
            weight=[1.0, 0.5, 2.0],
            sharpness=1e4,
            lambda_=0.9,
        )
        assert_same_tensors(found, in_memory)

    def test_float64_for_wide_outputs(self, models):
        merged = merge_state_dicts(
            models.base, models.experts, models.curvatures, method="soft", out_dtype="float64"
        )
        for name, tensor in soft64(models, [1.0] * 3, 2.0, 1.0).items():
            torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-12)  # curvature is float32

    @pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 2, "tile_elements": BLOCK + 5}], ids=str)
    def test_the_same_bytes_for_any_tiles_and_after_a_kill(self, models, tmp_path, options):
        recipe = recipe_of(models, "soft", **PARAMETERS)
        merge(recipe, tmp_path / "expected")
        with pytest.raises(KeyboardInterrupt):
            merge(recipe, tmp_path / "out", Rules(before=Interrupt("tile", 3)), **options)
        report = merge(recipe, tmp_path / "out", resume=True, **options)
        assert report["resumed"]
        assert model_digests(tmp_path / "out") == model_digests(tmp_path / "expected")

    def test_changed_code_does_not_go_on(self, models, tmp_path):
        recipe = recipe_of(models, "soft", **PARAMETERS)
        with pytest.raises(KeyboardInterrupt):
            merge(recipe, tmp_path / "out", Rules(before=Interrupt("tile", 3)))

        @ota_kernels.method("soft", each=["weight"])
        def soft(base, experts, curvatures, *, weight=1.0, sharpness=2.0, lambda_=1.0):
            return base + experts[0] - experts[0]

        with pytest.raises(ota_kernels.OutputError, match="had another recipe, inputs or options"):
            merge(recipe, tmp_path / "out", resume=True)

    def test_its_keys_are_checked(self, models, tmp_path):
        with pytest.raises(RecipeError, match=r"sharpnes.*did you mean `sharpness`"):
            merge(recipe_of(models, "soft", sharpnes=3), tmp_path / "out")
        with pytest.raises(RecipeError, match="`sharpness` in `parameters` is 'very'"):
            merge(recipe_of(models, "soft", sharpness="very"), tmp_path / "out")

    def test_the_table_shows_it(self, ota_merge):
        code, printed, _ = ota_merge("methods", "soft")
        assert code == 0
        assert printed.startswith("soft (of your own): A softmax of saliencies weighs the edits.")
        assert "sharpness: a parameter of soft (a finite float32 number; of the merge; default: 2)" in printed

    @pytest.mark.parametrize("options", [{"backend": "native"}, {"device": "cuda"}], ids=str)
    def test_other_backends_say_why_not(self, models, tmp_path, options):
        with pytest.raises(BackendError, match="runs by the reference backend on the CPU"):
            merge(recipe_of(models, "soft"), tmp_path / "out", **options)


def own(function, name="mine", **options):
    ota_kernels.method(name, **options)(function)
    return name


def test_without_a_base_and_by_a_merger():
    own(lambda experts: torch.stack(experts).median(0).values)
    experts = [{"w": torch.randn(50)} for _ in range(3)]
    expected = torch.stack([e["w"] for e in experts]).double().median(0).values.float()
    merger = ota_kernels.Merger(None, experts)
    assert torch.equal(merger(method="mine")["w"], expected)
    assert torch.equal(merger(method="mine", out={"w": torch.empty(50)})["w"], expected)


def test_an_optional_base_and_numpy():
    def mean(experts, base=None):
        return sum(experts) / len(experts) + (0 if base is None else base)

    own(mean)
    arrays = [np.arange(5, dtype=np.float32), np.ones(5, np.float32)]
    assert np.array_equal(merge_tensors(None, arrays, method="mine"), np.arange(1, 6) / 2)
    assert np.array_equal(merge_tensors(arrays[1], arrays, method="mine"), np.arange(1, 6) / 2 + 1)


def test_a_function_may_write_into_what_it_is_given():
    own(lambda base, experts: base.add_(experts[0]).mul_(0.5))
    base, expert = torch.randn(100, dtype=torch.float64), torch.randn(100, dtype=torch.float64)
    before = base.clone()
    assert torch.equal(merge_tensors(base, [expert], method="mine"), (before + expert) * 0.5)
    assert torch.equal(base, before)


def test_blocks_do_not_depend_on_tiles():
    seen = []

    def noted(base, experts):
        seen.append(len(base))
        return experts[0]

    own(noted)
    expert = torch.randn(2 * BLOCK + 10)
    assert torch.equal(merge_tensors(torch.zeros_like(expert), [expert], method="mine"), expert)
    assert seen == [BLOCK // 2, BLOCK, BLOCK, 10]


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (
            lambda base, experts: experts[0] - experts[0].mean(),
            "is not element by element: the first 40 of 80",
        ),
        (
            lambda base, experts: experts[0].log(),
            r"the function of method 'mine' gives nan at flat index \d+",
        ),
        (lambda base, experts: experts[0][:3], r"gives torch.float32\[3\] where torch.float32\[40\] is due"),
        (lambda base, experts: 3, "gives int where"),
        (lambda base, experts: experts[7], "raised IndexError: list index out of range"),
    ],
    ids=["mean", "nan", "shape", "kind", "error"],
)
def test_refused_results(function, text):
    own(function)
    torch.manual_seed(0)
    base, expert = torch.randn(80).bfloat16(), torch.randn(80).bfloat16()
    with pytest.raises(InputError, match=f"weight: .*{text}"):
        merge_tensors(base, [expert], method="mine")


def test_inputs_that_are_not_finite():
    own(lambda base, experts: base + 0 * experts[1].nan_to_num())
    base, expert = torch.zeros(BLOCK + 9), torch.zeros(BLOCK + 9)
    expert[[5, BLOCK + 3]] = torch.nan
    with pytest.raises(InputError, match=r"experts\[1\].*2 of 32777 weight values .* first at flat index 5"):
        merge_tensors(base, [base, expert], method="mine")


@pytest.mark.parametrize(
    ("function", "options", "text"),
    [
        (lambda base: base, {}, "must take `experts`"),
        (lambda base, experts, more: base, {}, "the function takes 'more'"),
        (lambda base, experts, *, k=(): base, {}, r"the default of 'k' is \(\)"),
        (lambda base, experts: base, {"each": ["k"]}, "each='k' is no keyword-only parameter"),
    ],
    ids=["experts", "more", "default", "each"],
)
def test_refused_signatures(function, options, text):
    with pytest.raises(RecipeError, match=text):
        own(function, **options)


def test_overflow_is_counted(models, tmp_path):
    own(lambda base, experts: base * 0 + 1e6, name="big")
    report = merge(recipe_of(models, "big") | {"dtype": "float16"}, tmp_path / "out")
    assert report["overflow"] == sum(t.numel() for t in models.base.values())
    assert raw(load_merged(tmp_path / "out")["scale"]) == raw(torch.tensor(torch.inf, dtype=torch.float16))
