"""The functional API: what goes in and out, that nothing else matters, and what wrong arguments raise."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from models import INPUT_DTYPES, OUTPUT_DTYPES, make_recipe, merge_model, random_experts
from tolerances import assert_close

from ota_kernels import merge_state_dicts, merge_tensors
from ota_kernels.backends import native
from ota_kernels.errors import BackendError, InputError, RecipeError

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

DENSITY = {"density": 0.3}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("out_dtype", [None, *OUTPUT_DTYPES])
def test_merge_tensors_is_the_merge(backend, out_dtype):
    experts = random_experts(1, (21, 30), dtypes=("bfloat16", "float32"))
    merged = merge_tensors(
        experts.base,
        experts.experts,
        experts.curvatures,
        out_dtype=out_dtype,
        backend=backend.NAME,
        density=[0.3, 0.5, 0.1],
        lambda_=1.2,
    )
    assert merged.dtype == getattr(torch, out_dtype or "bfloat16")
    assert merged.shape == (21, 30)
    parameters = {"density": [0.3, 0.5, 0.1], "lambda": 1.2}
    truth = oracle.evaluate({"weight": experts.exact()}, **parameters)["weight"]
    assert_close(out_dtype or "bfloat16", merged.double().numpy(), truth.out, truth.operand, 3)
    tensor = experts.inputs(out_dtype or "bfloat16")
    outcome = merge_model(make_recipe(3, **parameters), [tensor], backend)["weight"][0]
    assert bits(merged) == outcome.data.tobytes()


def test_without_a_base_and_without_curvature(backend):
    experts = random_experts(2, (300,), base_dtype=None)
    merged = merge_tensors(None, experts.experts, experts.curvatures, backend=backend.NAME, **DENSITY)
    truth = oracle.evaluate({"weight": experts.exact()}, **DENSITY)["weight"]
    assert_close("bfloat16", merged.double().numpy(), truth.out, truth.operand, 3)
    plain = random_experts(3, (300,), curvature_dtypes=None)
    merged = merge_tensors(plain.base, plain.experts, backend=backend.NAME, **DENSITY)
    truth = oracle.evaluate({"weight": plain.exact()}, **DENSITY)["weight"]
    assert_close("bfloat16", merged.double().numpy(), truth.out, truth.operand, 3)


def test_linear_ignores_base_and_curvature(backend):
    experts = random_experts(4, (300,))
    shared = {"method": "linear", "weight": [1, 2, 0.5], "backend": backend.NAME}
    merged = merge_tensors(experts.base, experts.experts, experts.curvatures, **shared)
    truth = oracle.evaluate({"weight": experts.exact()}, "linear", weight=[1, 2, 0.5])["weight"]
    assert_close("bfloat16", merged.double().numpy(), truth.out, truth.operand, 3)
    assert bits(merged) == bits(merge_tensors(None, experts.experts, **shared))


def test_name_tells_embeddings_from_matrices(backend):
    """Embeddings and output matrices have one norm, other matrices another."""
    experts = random_experts(5, (24, 18), dtypes=("float32",), base_dtype="float32")
    parameters = {"rescale": True, "density": 0.2}
    found = set()
    for name in ("model.embed_tokens.weight", "lm_head.weight", "mlp.weight"):
        merged = merge_tensors(
            experts.base, experts.experts, experts.curvatures, name=name, backend=backend.NAME, **parameters
        )
        truth = oracle.evaluate({name: experts.exact(name)}, **parameters)[name]
        assert_close("float32", merged.double().numpy(), truth.out, truth.operand, 3)
        found.add(bits(merged))
    assert len(found) == 2


SHAPES = {"layers.0.weight": (20, 33), "layers.0.bias": (33,), "scale": (), "empty": (0,)}


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("normalise", ["none", "model"])
def test_merge_state_dicts(backend, scope, normalise):
    model = {name: random_experts(seed, shape) for seed, (name, shape) in enumerate(SHAPES.items())}
    parameters = {"density": 0.3, "density_scope": scope, "normalise": normalise}
    merged = merge_state_dicts(
        {name: e.base for name, e in model.items()},
        [{name: e.experts[t] for name, e in model.items()} for t in range(3)],
        [{name: e.curvatures[t] for name, e in model.items()} for t in range(3)],
        backend=backend.NAME,
        **parameters,
    )
    truth = oracle.evaluate({name: e.exact(name) for name, e in model.items()}, **parameters)
    assert list(merged) == list(SHAPES)
    for name, tensor in merged.items():
        assert tensor.shape == SHAPES[name]
        assert_close("bfloat16", tensor.double().numpy(), truth[name].out, truth[name].operand, 3)


@pytest.mark.parametrize("policy", ["uniform", "base"])
def test_missing_curvature(backend, policy):
    with_moments, without = random_experts(6, (400,)), random_experts(7, (300,), curvature_dtypes=None)
    merged = merge_state_dicts(
        {"a": with_moments.base, "b": without.base},
        [{"a": w, "b": u} for w, u in zip(with_moments.experts, without.experts, strict=True)],
        [{"a": h} for h in with_moments.curvatures],
        backend=backend.NAME,
        missing_curvature=policy,
        **DENSITY,
    )
    truth = oracle.evaluate({"a": with_moments.exact(), "b": without.exact()}, **DENSITY)
    assert_close("bfloat16", merged["a"].double().numpy(), truth["a"].out, truth["a"].operand, 3)
    if policy == "base":
        assert bits(merged["b"]) == bits(without.base)
    else:
        assert_close("bfloat16", merged["b"].double().numpy(), truth["b"].out, truth["b"].operand, 3)


def test_integers_are_copied_where_all_agree():
    index = torch.arange(5)
    models = [{"index": index.clone(), "w": torch.full((3,), float(t))} for t in range(3)]
    merged = merge_state_dicts(models[0], models[1:])
    assert torch.equal(merged["index"], index)
    assert merged["index"].data_ptr() != models[0]["index"].data_ptr()
    models[2]["index"][0] = 9
    with pytest.raises(InputError, match=r"experts\[1\]\['index'\] differs from base\['index'\]"):
        merge_state_dicts(models[0], models[1:])
    models[2]["index"] = index.int()
    with pytest.raises(InputError, match=r"experts\[1\]\['index'\] differs"):
        merge_state_dicts(models[0], models[1:])
    models[2]["index"] = index.float()
    with pytest.raises(InputError, match=r"experts\[1\]\['index'\] differs"):
        merge_state_dicts(models[0], models[1:])


@pytest.mark.parametrize(
    "parameters",
    [
        {"density": 0.3},
        {"saliency_mass": 0.9, "normalise": "model"},
        {"density": 0.3, "density_scope": "tensor", "normalise": "global", "rank1_approx": True},
        {"masked_task_vector_merge_method": "ties", "ties_density": 0.3, "rescale": True, "rank": 2},
    ],
    ids=["model", "mass", "tensor", "ties"],
)
def test_threads_do_not_change_a_byte(parameters):
    """Two tensors above one chunk, so that surveys too are shared out, and small ones."""
    shapes = {"large": (1 << 20, 1), "wide": (64, 16500), "vector": (777,), "scale": ()}
    model = {name: random_experts(s, shape, 2) for s, (name, shape) in enumerate(shapes.items())}
    runs = [
        merge_state_dicts(
            {name: e.base for name, e in model.items()},
            [{name: e.experts[t] for name, e in model.items()} for t in range(2)],
            [{name: e.curvatures[t] for name, e in model.items()} for t in range(2)],
            threads=threads,
            **parameters,
        )
        for threads in (1, 4)
    ]
    for name in shapes:
        assert bits(runs[0][name]) == bits(runs[1][name]), name


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_numpy_in_numpy_out(backend, dtype):
    experts = random_experts(8, (17, 9), dtypes=(dtype,), base_dtype=dtype)
    arguments = [x.numpy() for x in (experts.base, *experts.experts, *experts.curvatures)]
    merged = merge_tensors(arguments[0], arguments[1:4], arguments[4:], backend=backend.NAME, **DENSITY)
    assert isinstance(merged, np.ndarray)
    assert merged.dtype == np.dtype(dtype)
    like = merge_tensors(experts.base, experts.experts, experts.curvatures, backend=backend.NAME, **DENSITY)
    assert isinstance(like, torch.Tensor)
    np.testing.assert_array_equal(merged, like.numpy())
    wide = merge_tensors(arguments[0], arguments[1:4], arguments[4:], out_dtype="float64", **DENSITY)
    assert wide.dtype == np.float64


def test_numpy_has_no_bfloat16():
    """Torch tensors come out in any type; a numpy array can only where numpy has it."""
    ones = np.ones(3, np.float32)
    with pytest.raises(RecipeError, match="numpy has no bfloat16"):
        merge_tensors(ones, [ones, ones], out_dtype="bfloat16")
    merged = merge_tensors(torch.ones(3), [ones, ones], out_dtype="bfloat16")
    assert merged.dtype == torch.bfloat16


def test_numpy_arrays_of_any_layout(backend):
    """Strided, reversed, unaligned and big-endian views give the same values as plain arrays."""
    experts = random_experts(9, (40, 12), dtypes=("float32",), base_dtype="float32")
    plain = [x.numpy() for x in (experts.base, *experts.experts, *experts.curvatures)]

    def unaligned(x):
        room = np.zeros(x.nbytes + 1, np.uint8)
        view = room[1:].view(np.float32).reshape(x.shape)
        view[:] = x
        assert not view.flags.aligned
        return view

    views = {
        "fortran": np.asfortranarray,
        "strided": lambda x: np.repeat(x, 3, axis=1)[:, ::3],
        "reversed": lambda x: x[::-1].copy()[::-1],
        "unaligned": unaligned,
        "big-endian": lambda x: x.astype(">f4"),
        "read-only": lambda x: np.frombuffer(x.tobytes(), np.float32).reshape(x.shape),
    }
    expected = merge_tensors(plain[0], plain[1:4], plain[4:], backend=backend.NAME, **DENSITY)
    for kind, view in views.items():
        changed = [view(x) for x in plain]
        merged = merge_tensors(changed[0], changed[1:4], changed[4:], backend=backend.NAME, **DENSITY)
        np.testing.assert_array_equal(merged, expected, kind)
        assert merged.dtype.isnative


@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_torch_tensors_of_any_layout(backend, dtype):
    experts = random_experts(10, (30, 14), dtypes=(dtype,), base_dtype=dtype)
    tensors = [experts.base, *experts.experts, *experts.curvatures]
    shared = {"backend": backend.NAME, "out_dtype": "float32", **DENSITY}
    expected = merge_tensors(tensors[0], tensors[1:4], tensors[4:], **shared)
    views = {
        "transposed": lambda x: x.t().contiguous().t(),
        "strided": lambda x: torch.stack([x, x], dim=2)[:, :, 1],
        "offset": lambda x: torch.cat([x[:1], x])[1:],
        "parameter": lambda x: x.clone().requires_grad_() if x.dtype.itemsize > 1 else x,
    }
    for kind, view in views.items():
        changed = [view(x) for x in tensors]
        merged = merge_tensors(changed[0], changed[1:4], changed[4:], **shared)
        assert bits(merged) == bits(expected), kind
        assert not merged.requires_grad


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_element_of_any_stride(dtype):
    """Contiguous whatever its stride says."""
    like = getattr(torch, dtype)
    one, three = (torch.full((4,), x, dtype=like)[1::3] for x in (1.0, 3.0))
    assert one.stride() == (3,)
    assert merge_tensors(one, [one, three]).tolist() == [2.0]
    if dtype == "float32":
        assert merge_tensors(one.numpy(), [one.numpy(), three.numpy()]).tolist() == [2.0]


def test_lazily_negated_tensors():
    """`.imag` of a conjugate holds the numbers with the other sign; one number is contiguous."""
    for values in ([1.0], [1.0, -2.0, 3.0]):
        x = torch.complex(torch.zeros(len(values)), torch.tensor(values)).conj().imag
        assert x.is_neg()
        assert merge_tensors(x, [x, x]).tolist() == [-v for v in values]


def test_inputs_are_not_modified(backend):
    experts = random_experts(11, (64, 20), dtypes=INPUT_DTYPES[:3])
    tensors = [experts.base, *experts.experts, *experts.curvatures]
    before = [bits(x) for x in tensors]
    merged = merge_tensors(
        experts.base,
        experts.experts,
        experts.curvatures,
        backend=backend.NAME,
        rank1_approx=True,
        rescale=True,
        **DENSITY,
    )
    assert [bits(x) for x in tensors] == before
    merged.zero_()
    assert [bits(x) for x in tensors] == before


ONES = torch.ones(3)
WRONG = {
    "shapes": (
        lambda: merge_tensors(ONES, [ONES, torch.ones(2)]),
        InputError,
        ("experts[1]['weight'] has shape [2]", "[3]"),
    ),
    "curvature-shape": (
        lambda: merge_tensors(ONES, [ONES], [torch.ones(3, 1)]),
        InputError,
        ("curvatures[0]['weight'] has shape [3, 1]",),
    ),
    "curvature-count": (lambda: merge_tensors(ONES, [ONES, ONES], [ONES]), InputError, ("2 experts but 1",)),
    "curvature-type": (
        lambda: merge_tensors(ONES, [ONES], [ONES.double()]),
        InputError,
        ("curvatures[0]['weight'] is float64", "float32, bfloat16 or float16"),
    ),
    "curvature-absent": (
        lambda: merge_state_dicts({"w": ONES}, [{"w": ONES}], [{}]),
        InputError,
        ("curvatures[0] has no 'w'", "missing_curvature"),
    ),
    "names": (
        lambda: merge_state_dicts({"a": ONES, "b": ONES}, [{"a": ONES}]),
        InputError,
        ("experts[0]", "has no tensor b, which other models have"),
    ),
    "unknown-key": (
        lambda: merge_tensors(ONES, [ONES], densty=0.2),
        RecipeError,
        ("'densty'", "0.2", "did you mean `density`?"),
    ),
    "unknown-method": (
        lambda: merge_tensors(ONES, [ONES], method="liner"),
        RecipeError,
        ("'liner'", "did you mean `linear`?"),
    ),
    "range": (lambda: merge_tensors(ONES, [ONES], density=1.5), RecipeError, ("`density`", "1.5", "[0, 1]")),
    "values-per-expert": (
        lambda: merge_tensors(ONES, [ONES, ONES], density=[0.5]),
        RecipeError,
        ("`density` has 1 values for 2 experts",),
    ),
    "no-experts": (lambda: merge_tensors(ONES, []), RecipeError, ("models",)),
    "too-many-experts": (lambda: merge_tensors(ONES, [ONES] * 65), RecipeError, ("65", "64")),
    "one-without-base": (lambda: merge_tensors(None, [ONES]), RecipeError, ("two models",)),
    "rescale-without-base": (
        lambda: merge_tensors(None, [ONES, ONES], rescale=True),
        RecipeError,
        ("`rescale: true` needs a `base_model`",),
    ),
    "out-dtype": (
        lambda: merge_tensors(ONES, [ONES], out_dtype="int8"),
        RecipeError,
        ("`out_dtype`", "int8"),
    ),
    "float8-out": (
        lambda: merge_tensors(ONES.to(torch.float8_e5m2), [ONES]),
        InputError,
        ("base['weight'] is float8_e5m2", "give out_dtype"),
    ),
    "complex": (
        lambda: merge_tensors(ONES.to(torch.complex64), [ONES]),
        InputError,
        ("base['weight']", "complex64"),
    ),
    "complex-numpy": (lambda: merge_tensors(np.ones(3, complex), [ONES]), InputError, ("complex128",)),
    "list": (lambda: merge_tensors(ONES, [[1.0, 1.0, 1.0]]), InputError, ("experts[0]['weight'] is a list",)),
    "sparse": (
        lambda: merge_tensors(ONES, [ONES.to_sparse()]),
        InputError,
        ("torch.sparse_coo", ".to_dense()"),
    ),
    "meta": (
        lambda: merge_tensors(ONES, [torch.ones(3, device=torch.device("meta"))]),
        BackendError,
        ("experts[0]['weight'] is on meta", ".cpu()"),
    ),
    "backend": (lambda: merge_tensors(ONES, [ONES], backend="triton"), BackendError, ("'triton'", "native")),
    "threads": (lambda: merge_tensors(ONES, [ONES], threads=0), RecipeError, ("at least 1, not 0",)),
    "bias-correction": (
        lambda: merge_tensors(ONES, [ONES], [ONES], bias_correction=True),
        RecipeError,
        ("`bias_correction`", "1 - beta2^step"),
    ),
    "path": (
        lambda: merge_tensors(ONES, [ONES], preconditioner_path="v.pt"),
        RecipeError,
        ("`preconditioner_path`", "`curvatures`"),
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(wrong):
    """The documented class, and one line that names the culprit and what to do."""
    call, error, parts = WRONG[wrong]
    with pytest.raises(error) as raised:
        call()
    text = str(raised.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


@pytest.mark.parametrize(
    ("role", "value"),
    [
        ("base", float("nan")),
        ("base", float("inf")),
        ("experts[1]", float("nan")),
        ("experts[1]", float("-inf")),
        ("curvatures[1]", float("nan")),
        ("curvatures[1]", float("inf")),
        ("curvatures[1]", -1e-30),
    ],
)
def test_values_that_are_not_finite(backend, role, value):
    """The error names the input, the tensor, the count and the first index."""
    experts = random_experts(12, (6, 100))
    tensors = {"base": experts.base, "experts[1]": experts.experts[1], "curvatures[1]": experts.curvatures[1]}
    tensors[role].view(-1)[[70, 599]] = value
    arguments = (experts.base, experts.experts, experts.curvatures)
    with pytest.raises(InputError) as raised:
        merge_tensors(*arguments, name="mlp.weight", backend=backend.NAME)
    text = str(raised.value)
    assert text.startswith(f"{role}['mlp.weight']: mlp.weight: 2 of 600 ")
    assert "the first at flat index 70;" in text


def test_an_instruction_set_that_is_not_there(monkeypatch):
    monkeypatch.setenv("OTA_KERNELS_ISA", "v9")
    native.instruction_set.cache_clear()
    try:
        with pytest.raises(BackendError, match=r"OTA_KERNELS_ISA=v9: this machine runs .*base"):
            merge_tensors(ONES, [ONES, ONES], backend="native")
    finally:
        native.instruction_set.cache_clear()


def test_a_key_of_another_method_is_an_error():
    """Unlike a recipe's, which mergekit would take: whoever calls can leave it out."""
    with pytest.raises(RecipeError, match="`density` is not used by `linear`: leave it out"):
        merge_tensors(ONES, [ONES, ONES], method="linear", density=0.2)
