"""Rows of whole matrices on every way through: files, arrays, resumes; masks, calibration, memory."""

from __future__ import annotations

import json

import numpy as np
import oracle
import pytest
import torch
from checkpoints import assert_same_tensors, load_merged, make_set, model_digests
from jobs import Interrupt, merge
from oracle import spectral
from safetensors.torch import save_file
from tolerances import assert_close

import ota_kernels
from ota_kernels import RecipeError
from ota_kernels.run.rules import Rules

SHAPES = {
    "embed_tokens.weight": (20, 12),
    "layers.0.mlp.weight": (33, 17),
    "layers.0.norm.weight": (17,),
    "layers.1.mlp.weight": (21, 40),
    "layers.1.mlp.experts.down_proj": (4, 9, 7),
    "layers.1.conv.weight": (3, 5, 7),
    "scale": (),
    "empty": (0, 5),
    "one.weight": (1, 1),
    "lm_head.weight": (20, 12),
}
ROLES = {
    "embed_tokens.weight": "embedding",
    "lm_head.weight": "output",
    "layers.1.mlp.experts.down_proj": "experts",
}
FFG = {"density": [0.3, 0.5, 0.2]}
CASES = [
    ("tsv", {}),
    ("tsv", {"lambda": 1.7, **FFG}),
    ("tsv", {"saliency_mass": [0.9, 0.95, 1.0], "density_scope": "tensor", "elsewhere": "ota"}),
    ("tsv", {"elsewhere": "ota", "normalise": "global", "precond_threshold": [1e-17, 0.0, 1e-16]}),
    ("iso_c", {"lambda": 0.7}),
    ("iso_c", {"elsewhere": "ota", "power": 1.0, **FFG}),
    ("iso_cts", {}),
    ("iso_cts", {"common": 0.5, **FFG}),
    ("covariance", {}),
    ("covariance", {"covariance_weights": "norm", **FFG}),
    ("opcm", {}),
    ("opcm", {"alpha": 0.8, "elsewhere": "ota", **FFG}),
]  # fmt: skip


@pytest.fixture(scope="module")
def of_type(tmp_path_factory):
    return {
        dtype: make_set(tmp_path_factory.mktemp(dtype), SHAPES, dtype=getattr(torch, dtype))
        for dtype in ("float32", "bfloat16", "float16")
    }


@pytest.fixture(scope="module")
def plain(of_type):
    return of_type["bfloat16"]


def tensors_of(models, curvature: bool) -> dict[str, oracle.Tensor]:
    return {
        name: oracle.Tensor(
            base.double().numpy(),
            tuple(e[name].double().numpy() for e in models.experts),
            tuple(c[name].numpy() for c in models.curvatures) if curvature else None,
            role=ROLES.get(name, "matrix" if base.ndim == 2 else "vector"),
        )
        for name, base in models.base.items()
    }


def recipe_of(models, method: str, parameters: dict, curvature: bool) -> dict:
    files = {"preconditioner_path": list(map(str, models.curvature_files))} if curvature else {}
    return models.recipe(method, **parameters, **files)


def check(dtype: str, found: dict[str, torch.Tensor], truth: dict[str, oracle.Merged]) -> None:
    assert found.keys() == truth.keys()
    for name, merged in truth.items():
        assert_close(dtype, found[name].double().numpy(), merged.out, merged.operand, 3)


@pytest.mark.parametrize(("method", "parameters"), CASES, ids=str)
def test_files(of_type, tmp_path, method, parameters):
    """With curvature and without by turns."""
    for number, (dtype, models) in enumerate(of_type.items()):
        curvature, out = (number + len(parameters)) % 2 == 0, tmp_path / dtype
        truth = oracle.evaluate(tensors_of(models, curvature), method, **parameters)
        report = merge(recipe_of(models, method, parameters, curvature), out, tile_elements=1 << 14)
        check(dtype, load_merged(out), truth)
        kept = [sum(int(merged.masks[t].sum()) for merged in truth.values()) for t in range(3)]
        assert [expert["kept"] for expert in report["experts"]] == kept
        assert report["unkept"] == sum(int(merged.unkept.sum()) for merged in truth.values())


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("method", "parameters"), CASES[1:10:4], ids=str)
def test_arrays(plain, method, parameters, backend):
    truth = oracle.evaluate(tensors_of(plain, True), method, **parameters)
    given = {key.replace("lambda", "lambda_"): value for key, value in parameters.items()}
    merged = ota_kernels.merge_state_dicts(
        plain.base, plain.experts, plain.curvatures, method=method, backend=backend, **given
    )
    check("bfloat16", merged, truth)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("task_arithmetic", {"weight": [1.0, 0.5, 1.0]}),
        ("ota", {"density": [0.3, 0.3, 0.3]}),
        ("ties", {"weight": [1.0, 1.0, 1.0], "density": [0.4, 0.4, 0.4]}),
        ("tsv", {"lambda": 1.5}),
        ("dare_ties", {"weight": [1.0, 1.0, 1.0], "density": [0.5, 0.5, 0.5]}),
    ],
    ids=str,
)
@pytest.mark.parametrize(("calibrate", "alpha"), [("svc", None), ("shrink", 1.0)])
def test_calibration_of_any_row(plain, tmp_path, method, parameters, calibrate, alpha):
    tensors = tensors_of(plain, method == "ota")
    truth = spectral.calibrated(tensors, oracle.evaluate(tensors, method, **parameters), alpha)
    recipe = recipe_of(plain, method, parameters | {"calibrate": calibrate}, method == "ota")
    merge(recipe, tmp_path / "out", tile_elements=1 << 14)
    check("bfloat16", load_merged(tmp_path / "out"), truth)


def test_the_same_bytes_for_any_threads_tiles_and_kills(plain, tmp_path):
    recipe = recipe_of(plain, "tsv", {"elsewhere": "ota", "calibrate": "svc", **FFG}, True)
    merge(recipe, tmp_path / "expected", threads=1)
    expected = model_digests(tmp_path / "expected")
    for threads, tile in ((3, 1 << 14), (2, 300)):
        out = tmp_path / f"out{threads}"
        merge(recipe, out, threads=threads, tile_elements=tile)
        assert model_digests(out) == expected
    out = tmp_path / "killed"
    for step in (3, 2, 2):
        with pytest.raises(KeyboardInterrupt):
            merge(
                recipe, out, Rules(before=Interrupt("tile", step)), threads=1, tile_elements=300, resume=True
            )
    assert merge(recipe, out, threads=2, tile_elements=500, resume=True)["resumed"]
    assert model_digests(out) == expected


def test_adapters_are_the_weights_that_they_stand_for(plain, tmp_path):
    """Computed row by row, as often as an edit is read."""
    models = []
    for t in range(2):
        adapter, full = tmp_path / f"adapter{t}", tmp_path / f"full{t}"
        adapter.mkdir()
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        a, b = (
            torch.randn(shape, generator=torch.Generator().manual_seed(t)) for shape in ((2, 17), (33, 2))
        )
        module = "base_model.model.layers.0.mlp"
        factors = {f"{module}.lora_A.weight": 0.01 * a, f"{module}.lora_B.weight": b}
        save_file(factors, adapter / "adapter_model.safetensors")
        models.append({"model": f"{plain.base_folder}+{adapter}"})
        ota_kernels.merge({"merge_method": "linear", "models": models[-1:], "dtype": "float32"}, full)
    recipe = {"merge_method": "tsv", "base_model": str(plain.base_folder), "dtype": "float32"}
    full = [{"model": str(tmp_path / f"full{t}")} for t in range(2)]
    for name, given in (("of_adapters", models), ("of_weights", full)):
        merge(recipe | {"models": given}, tmp_path / name, tile_elements=300)
    found, expected = (load_merged(tmp_path / name) for name in ("of_adapters", "of_weights"))
    assert_same_tensors(found, expected)
    edit = found["layers.0.mlp.weight"].double() - plain.base["layers.0.mlp.weight"].double()
    assert 0.1 < edit.norm() < 10


def test_small_neighbours_stay_matrices(tmp_path):
    """Where other rows merge small tensors as one."""
    models = make_set(tmp_path, {f"layers.{i}.mlp.weight": (5, 7) for i in range(40)}, dtype=torch.float32)
    for parameters in ({}, {"elsewhere": "ota"}):
        truth = oracle.evaluate(tensors_of(models, False), "tsv", **parameters)
        merge(recipe_of(models, "tsv", parameters, False), tmp_path / "out", overwrite=True)
        check("float32", load_merged(tmp_path / "out"), truth)


def automatic(model: dict[str, oracle.Tensor], found: dict[str, oracle.Merged]) -> float:
    """lambda: auto, of what was merged at lambda 1."""
    kept = length = product = 0.0
    for name, tensor in model.items():
        edit, edits = found[name].out - tensor.base, np.where(found[name].masks, tensor.edits(), 0.0)
        kept, length = kept + np.square(edits).sum(), length + np.square(edit).sum()
        product += sum((edit * d).sum() for d in edits)
    return min(np.sqrt(kept / length), kept / product)


def test_auto_scales_what_formulas_make(plain, tmp_path):
    """lambda: auto of the whole matrices, not of the mean of their edits."""
    model = tensors_of(plain, False)
    factor = automatic(model, oracle.evaluate(model, "tsv"))
    truth = oracle.evaluate(model, "tsv", **{"lambda": factor})
    report = merge(recipe_of(plain, "tsv", {"lambda": "auto"}, False), tmp_path / "out", tile_elements=300)
    assert report["lambda"]["used"] == pytest.approx(factor, rel=1e-5)
    assert report["passes"] == 5  # what is kept and the edits twice, and the base
    check("bfloat16", load_merged(tmp_path / "out"), truth)


@pytest.mark.parametrize(("method", "parameters"), [("ota", FFG), ("tsv", {})], ids=str)
def test_auto_measures_before_calibration(plain, tmp_path, method, parameters):
    model = tensors_of(plain, True)
    factor = automatic(model, oracle.evaluate(model, method, **parameters))
    truth = spectral.calibrated(model, oracle.evaluate(model, method, **parameters, **{"lambda": factor}))
    recipe = recipe_of(plain, method, parameters | {"lambda": "auto", "calibrate": "svc"}, True)
    merge(recipe, tmp_path / "out", tile_elements=300)
    check("bfloat16", load_merged(tmp_path / "out"), truth)


def test_one_expert_and_no_edits(plain):
    """One expert of tsv is the expert; edits of 0 are the base."""
    one = ota_kernels.merge_state_dicts(plain.base, plain.experts[:1], method="tsv", out_dtype="float32")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, plain.experts[0][name].float(), rtol=1e-6, atol=1e-7)
    for method in spectral.METHODS:
        none = ota_kernels.merge_state_dicts(plain.base, [plain.base] * 2, method=method)
        assert all(torch.equal(none[name], plain.base[name]) for name in none)


def test_too_little_memory_is_one_line(plain):
    recipe = recipe_of(plain, "tsv", {}, False)
    needed = ota_kernels.plan(recipe, threads=1).peak_memory
    with pytest.raises(
        RecipeError,
        match=r"too small .* on 1 thread, each of which holds a matrix \(.*\): give it --memory-limit",
    ):
        ota_kernels.plan(recipe, threads=1, memory_limit=needed // 2)


def test_calibration_needs_a_base(plain):
    with pytest.raises(RecipeError, match="`calibrate: svc` needs a `base_model`"):
        ota_kernels.merge_tensors(None, [torch.ones(3, 3)] * 2, method="ota", calibrate="svc")


def test_repaired_elements_are_the_base_also_calibrated(plain):
    """What is not finite is no edit, and spoils nothing else of its matrix."""
    experts = [dict(e) for e in plain.experts]
    experts[1]["layers.1.mlp.weight"] = experts[1]["layers.1.mlp.weight"].clone()
    experts[1]["layers.1.mlp.weight"][3, 4] = float("nan")
    merged = ota_kernels.merge_state_dicts(
        plain.base, experts, plain.curvatures, method="ota", on_nonfinite="base", calibrate="svc"
    )
    assert all(tensor.isfinite().all() for tensor in merged.values())
    whole = ota_kernels.merge_state_dicts(
        plain.base, plain.experts, plain.curvatures, method="ota", calibrate="svc"
    )
    found, expected, base = (m["layers.1.mlp.weight"].double() for m in (merged, whole, plain.base))
    assert (found - expected).norm() < 0.2 * (expected - base).norm()


def test_a_wrong_input_is_named(plain):
    experts = [dict(e) for e in plain.experts]
    experts[1]["layers.1.mlp.weight"] = experts[1]["layers.1.mlp.weight"].clone()
    experts[1]["layers.1.mlp.weight"][3, 4] = float("nan")
    with pytest.raises(ota_kernels.InputError, match=r"layers.1.mlp.weight.*flat index 124"):
        ota_kernels.merge_state_dicts(plain.base, experts, method="iso_c")
