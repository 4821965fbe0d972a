"""Every row of the table against the oracle: shapes, types, numbers of experts, choices among equals."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from checkpoints import (
    assert_same_tensors,
    load_merged,
    make_set,
    model_digests,
    save_model,
    second_moments,
)
from jobs import Interrupt, merge
from oracle import spectral
from safetensors.torch import save_file
from tolerances import assert_close

import ota_kernels
from ota_kernels.recipe import methods
from ota_kernels.run.rules import Rules

SHAPES = {
    "embed_tokens.weight": (40, 24),
    "w": (33, 47),
    "long": (203,),
    "cube": (3, 5, 7),
    "one": (1,),
    "s": (),
}
BASE_IGNORED = ("linear", "passthrough", "karcher", "checkpoints", "fisher")

# method -> settings that are tried: (experts, parameters); a list is a value per expert.
CASES: dict[str, list[tuple[int, dict]]] = {
    "linear": [(3, {"weight": [0.5, -0.2, 1.5]}), (2, {"normalize": False, "weight": [0.3, 0.9]})],
    "passthrough": [(1, {}), (1, {"scale": 0.3})],
    "task_arithmetic": [
        (3, {"weight": [0.5, -0.2, 1.0]}),
        (2, {"weight": [0.4, 0.9], "normalize": True, "lambda_": 1.3}),
        (2, {"weight": [0.5, -0.5], "normalize": True}),
    ],
    "ties": [
        (3, {"weight": [0.5, 0.3, 1.0], "density": 0.4}),
        (5, {"weight": 1.0, "density": [1.0, 0.7, 0.3, 0.05, 0.0]}),
        (3, {"weight": [1, -0.7, 0.4], "density": 0.5, "rescale": True, "normalize": False, "lambda_": 0.8}),
        (1, {"weight": 0.7, "density": 0.5}),
        (3, {"weight": [0.5, 0.3, 1.0], "density": 0.4, "consensus": "count"}),
        (3, {"weight": 1.0, "density": [0.4, 0.1, 1.0], "density_scope": "model"}),
        (2, {"weight": [1.0, -1.0], "density": 0.6, "zero_sign": "majority", "normalize": False}),
    ],
    "dare_linear": [
        (3, {"weight": [0.5, 0.3, 1.0], "density": 0.4}),
        (2, {"weight": 1.0, "density": [0.9, 0.2], "rescale_by": "density"}),
    ],
    "dare_ties": [
        (3, {"weight": [0.5, 0.3, 1.0], "density": 0.4}),
        (4, {"weight": 1.0, "density": [1.0, 0.0, 0.5, 0.3], "rescale": False, "normalize": True}),
    ],
    "breadcrumbs": [
        (3, {"weight": [0.5, 0.3, 1.0], "density": 0.6, "gamma": 0.1}),
        (2, {"weight": 1.0, "density": [0.95, 0.3], "gamma": [0.2, 0.0], "rescale": True}),
    ],
    "breadcrumbs_ties": [
        (3, {"weight": [0.5, 0.3, 1.0], "density": 0.5, "gamma": 0.05}),
        (3, {"weight": [0.5, 0.3, 1.0], "density": 0.4, "gamma": 0.1, "density_scope": "model"}),
    ],
    "della": [
        (3, {"weight": [0.5, 0.3, 1.0], "density": 0.5, "epsilon": 0.2}),
        (2, {"weight": 1.0, "density": [1.0, 0.4], "epsilon": 0.1}),
        (3, {"weight": [0.5, 0.3, 1.0], "density": [1.0, 0.4, 0.7], "rescale_by": "density"}),
    ],
    "della_linear": [
        (2, {"weight": [0.6, 0.8], "density": 0.4, "rescale": False}),
        (2, {"weight": [0.6, 0.8], "density": [0.4, 0.0], "rescale_by": "density"}),
    ],
    "sce": [
        (3, {"select_topk": 0.3}),
        (3, {}),
        (4, {"select_topk": 0.9, "lambda_": 0.5}),
        (1, {"select_topk": 0.5}),
    ],
    "ram": [(3, {}), (3, {"epsilon": 0.003})],
    "ramplus_tl": [(3, {"epsilon": 0.003}), (2, {"epsilon": 0.003, "r": 0.5, "alpha": 2.0})],
    "ramplus": [(3, {"epsilon": 0.003})],
    "consensus": [(4, {}), (3, {"q": 0.2, "k": 1, "lambda_": 0.5})],
    "magmax": [(3, {}), (2, {"lambda_": 1.0})],
    "nearswap": [(1, {"t": 0.002}), (1, {"t": 0.1})],
    "arcee_fusion": [(1, {})],
    "slerp": [(1, {"t": 0.3}), (1, {"t": 0.0}), (1, {"t": 1.0})],
    "nuslerp": [
        (2, {"weight": [0.3, 0.9]}),
        (2, {"weight": [0.3, 0.9], "nuslerp_flatten": False}),
        (2, {"weight": [0.3, 0.9], "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ],
    "multislerp": [(3, {"weight": [0.3, 0.9, 0.5]}), (2, {"weight": [1.0, 0.6], "normalize_weights": False})],
    "karcher": [(3, {}), (2, {"max_iter": 100, "tol": 1e-9})],
    "model_stock": [(3, {}), (2, {"filter_wise": True})],
    "ffg": [
        (1, {"density": 0.3}),
        (1, {"density": 0.1, "density_scope": "tensor", "lambda_": 0.6}),
        (1, {"saliency_mass": 0.8}),
        (1, {"precond_threshold": 1e-15}),
    ],
    "fisher": [
        (3, {"weight": [0.5, 1.0, 2.0]}),
        (2, {"normalise": "global", "fisher_floor": 0.0}),
        (3, {"normalise": "none", "weight": [1.0, -0.2, 0.0], "fisher_floor": 2.0**-40}),
    ],
    "localize_stitch": [
        (3, {"density": 0.3}),
        (2, {"density": [0.05, 1.0], "embeddings": "merge", "lambda_": 0.8}),
    ],
    "checkpoints": [
        (5, {}),
        (4, {"decay": "ema", "beta": 0.8}),
        (3, {"decay": "lawa", "k": 2}),
        (3, {"decay": "linear"}),
    ],
}  # fmt: skip
GROUPED = [(name, i) for name, cases in CASES.items() for i in range(len(cases))]


def drawn(shape: tuple[int, ...], n_experts: int, seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Base and experts; coarse edits, so that many magnitudes are equal, and one in eight is 0."""
    rng = np.random.default_rng(seed)
    base = np.asarray(rng.normal(0, 0.05, shape))
    found = [base]
    for _ in range(n_experts):
        edit = np.round(rng.normal(0, 6, shape)) * 2.0**-11
        found.append(np.where(rng.random(shape) < 0.8, base + edit, base + rng.normal(0, 0.004, shape)))
    return [torch.from_numpy(np.asarray(x, np.float64)).to(torch.float32).to(dtype) for x in found]


def model(n_experts: int, dtype: torch.dtype = torch.float32) -> dict[str, list[torch.Tensor]]:
    return {name: drawn(shape, n_experts, i, dtype) for i, (name, shape) in enumerate(SHAPES.items())}


def moments(method: str, tensors: dict, n_experts: int) -> list[dict[str, torch.Tensor]] | None:
    """Second moments for the rows that need them."""
    if method not in ("ffg", "fisher"):
        return None
    base = {name: found[0] for name, found in tensors.items()}
    return [second_moments(base, 70 + t) for t in range(n_experts)]


def truths(method: str, tensors: dict, parameters: dict, with_base: bool) -> dict[str, oracle.Merged]:
    h = moments(method, tensors, len(next(iter(tensors.values()))) - 1)
    exact = {
        name: oracle.Tensor(
            found[0].double().numpy() if with_base else None,
            tuple(x.double().numpy() for x in found[1:]),
            None if h is None else tuple(x[name].numpy() for x in h),
            role="embedding" if "embed" in name else "matrix" if found[0].ndim == 2 else "vector",
        )
        for name, found in tensors.items()
    }
    keys = {key.rstrip("_"): value for key, value in parameters.items()}
    return oracle.evaluate(exact, method, **keys)


def check(
    method: str, n_experts: int, parameters: dict, backend: str, out: str, dtype=torch.float32, has_base=True
):
    tensors = model(n_experts, dtype)
    with_base = has_base and method not in BASE_IGNORED
    expected = truths(method, tensors, parameters, with_base)
    given = dict(parameters)
    if "weight" in given and not isinstance(given["weight"], list):
        given["weight"] = [given["weight"]] * n_experts
    merged = ota_kernels.merge_state_dicts(
        {name: found[0] for name, found in tensors.items()} if with_base else None,
        [{name: found[1 + t] for name, found in tensors.items()} for t in range(n_experts)],
        moments(method, tensors, n_experts),
        method=method,
        out_dtype=out,
        backend=backend,
        **given,
    )
    assert merged.keys() == expected.keys()
    for name, truth in expected.items():
        assert_close(out, merged[name].double().numpy(), truth.out, truth.operand, n_experts)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(("method", "case"), GROUPED)
def test_values(method, case, backend):
    n_experts, parameters = CASES[method][case]
    for out in ("float64", "float32", "bfloat16"):
        check(method, n_experts, parameters, backend, out)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("method", CASES)
def test_sixteen_bit_inputs(method, backend):
    """Whose differences are few, so that most selections are among equals."""
    n_experts, parameters = CASES[method][0]
    check(method, n_experts, parameters, backend, "float32", torch.bfloat16)
    check(method, n_experts, parameters, backend, "float16", torch.float16)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
def test_without_a_base(method, backend):
    n_experts, parameters = CASES[method][0]
    check(method, n_experts, parameters, backend, "float32", has_base=False)


@pytest.mark.parametrize(("method", "case"), GROUPED)
def test_files(method, case, tmp_path):
    """A recipe of folders gives the bytes that the same tensors in memory do."""
    n_experts, parameters = CASES[method][case]
    tensors = dict(sorted(model(n_experts).items()))  # as files have them, for counts over the model
    with_base = method not in BASE_IGNORED
    own = {k: v for k, v in parameters.items() if isinstance(v, list)}
    if "weight" in methods.get(method).keys and "weight" not in own:
        own["weight"] = [parameters.get("weight", 1.0)] * n_experts
    shared = {k.rstrip("_"): v for k, v in parameters.items() if k not in own}
    folders = [
        save_model(tmp_path / str(t), {n: x[t] for n, x in tensors.items()}) for t in range(n_experts + 1)
    ]
    h = moments(method, tensors, n_experts)
    if h is not None:
        own["preconditioner_path"] = [str(folder / "h.safetensors") for folder in folders[1:]]
        for path, of_expert in zip(own["preconditioner_path"], h, strict=True):
            save_file(of_expert, path)
    recipe = {
        "merge_method": method,
        "models": [
            {"model": str(folder), "parameters": {k: v[t] for k, v in own.items()}}
            for t, folder in enumerate(folders[1:])
        ],
        "parameters": shared,
    } | ({"base_model": str(folders[0])} if with_base else {})
    merge(recipe, tmp_path / "out")
    own.pop("preconditioner_path", None)
    found = ota_kernels.merge_state_dicts(
        {n: x[0] for n, x in tensors.items()} if with_base else None,
        [{n: x[1 + t] for n, x in tensors.items()} for t in range(n_experts)],
        h,
        method=method,
        **(parameters | own),
    )
    assert_same_tensors(load_merged(tmp_path / "out"), found)


def test_what_is_found_of_the_model_is_resumed(tmp_path):
    """Places of an exact count over the model, and the sign of most sums, come from the journal."""
    models = make_set(tmp_path / "models", {f"layers.{i}.w": (20, 30) for i in range(4)})
    keys = {"density_scope": "model", "zero_sign": "majority"}
    recipe = models.recipe("ties", weight=[1.0, -1.0, 1.0], density=[0.3, 0.6, 1.0], **keys)
    options = {"tile_elements": 300, "threads": 1}
    merge(recipe, tmp_path / "expected", **options)
    with pytest.raises(KeyboardInterrupt):
        merge(recipe, tmp_path / "out", Rules(before=Interrupt("tile", 4)), **options)
    report = merge(recipe, tmp_path / "out", resume=True, **options)
    assert report["resumed"]
    assert model_digests(tmp_path / "out") == model_digests(tmp_path / "expected")
    kept = [expert["kept"] for expert in report["experts"]]
    assert kept == [720, 1440, 2400]  # exactly, over the model
    assert report["options"]["seed"] == 0


def test_every_method_is_tried():
    elsewhere = {"ota", "combine", *spectral.METHODS}
    assert set(CASES) | elsewhere == set(methods.names())
