"""Single elements: how they are decoded, rounded, counted as overflow, and repaired where not finite."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from models import (
    INPUT_DTYPES,
    OUTPUT_DTYPES,
    Experts,
    buffer,
    make_recipe,
    merge_model,
    merge_one,
    merge_tile,
    random_experts,
)

from ota_kernels.errors import InputError
from ota_kernels.tensors.curvature import Full, Uniform
from ota_kernels.tensors.dtypes import BY_NAME
from ota_kernels.tensors.terms import ExpertTerms, Terms, Words
from ota_kernels.tensors.tile import TensorInputs

_MEAN = Words(score="none", select="all", weigh="constant", divide="number")
_PLAIN = Terms(_MEAN, (ExpertTerms(),))


def every_pattern(dtype: str) -> torch.Tensor:
    """All values of an 8- or 16-bit float type, in the order of their bits."""
    itemsize = BY_NAME[dtype].itemsize
    bits = np.arange(1 << (8 * itemsize), dtype=f"uint{8 * itemsize}")
    return torch.from_numpy(bits.view(np.uint8)).view(getattr(torch, dtype))


def inputs(experts: tuple[torch.Tensor, ...], out_dtype: str) -> TensorInputs:
    shape = (experts[0].numel(),)
    found = tuple(map(buffer, experts))
    return TensorInputs("weight", shape, BY_NAME[out_dtype], None, found, (Uniform(),) * len(found))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_every_bit_pattern_decodes_as_in_torch(backend, dtype):
    stored = every_pattern(dtype)
    truth = stored.float().numpy()
    finite = np.isfinite(truth)
    decoded, bad = backend.edits(inputs((stored,), "float32"), 0, _PLAIN)
    np.testing.assert_array_equal(decoded.view(np.int32)[finite], truth.view(np.int32)[finite])
    assert [(b.role, b.count, b.first) for b in bad] == [
        ("weights", int((~finite).sum()), int(np.flatnonzero(~finite)[0]))
    ]
    # The merge kernel: half of two copies.
    terms = Terms(_MEAN, (ExpertTerms(),) * 2, denominator=2.0)
    data, stats = merge_tile(inputs((stored, stored), "float32"), terms, backend)
    np.testing.assert_array_equal(data.view(np.float32), truth)  # NaN equals NaN here
    assert {(b.expert, b.count) for b in stats.nonfinite} == {(t, int((~finite).sum())) for t in (0, 1)}
    assert stats.overflow == (~finite).sum()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_curvature_decodes_as_in_torch(backend, dtype):
    """Without a base and with score_scale 1, a score is the curvature itself."""
    stored = every_pattern(dtype)
    truth = stored.float().numpy()
    usable = np.isfinite(truth) & (truth >= 0)
    tensor = replace(inputs((torch.ones_like(stored),), "float32"), curvatures=(Full(buffer(stored)),))
    scores, bad = backend.scores(tensor, 0, Terms(Words(score="curvature"), (ExpertTerms(),)))
    np.testing.assert_array_equal(scores[usable], truth[usable])
    assert [(b.role, b.count) for b in bad] == [("curvature", int((~usable).sum()))]


def neighbours_of_ties(dtype: str) -> np.ndarray:
    """float32 midway between each two neighbours of a 16-bit type, and the float32 on both sides of it."""
    finite = every_pattern(dtype).double().numpy()
    finite = np.unique(finite[np.isfinite(finite)])
    with np.errstate(over="ignore"):
        midway = np.float32((finite[1:] + finite[:-1]) / 2)
    return np.concatenate([midway, np.nextafter(midway, np.float32(np.inf)), np.nextafter(midway, -np.inf)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_to_16_bits_is_that_of_torch(backend, dtype):
    """Nearest, ties to even; subnormal results; what rounds beyond the largest number is an overflow."""
    rng = np.random.default_rng(1)
    anything = rng.integers(0, 1 << 32, 100_000, dtype=np.uint32).view(np.float32)
    largest = np.float32(torch.finfo(getattr(torch, dtype)).max)
    edges = np.float32([largest, np.nextafter(largest, np.inf), 65519.996, 65520.0, 2.0**-149, 0.0, np.inf])
    values = np.concatenate([anything, neighbours_of_ties(dtype), edges, -edges])
    values = np.where(np.isnan(values), np.float32(0), values) + np.float32(0)  # -0 is 0 after an addition
    stored = torch.from_numpy(values)
    truth = stored.to(getattr(torch, dtype))
    data, stats = merge_tile(inputs((stored,), dtype), _PLAIN, backend)
    merged = torch.from_numpy(data).view(getattr(torch, dtype))
    np.testing.assert_array_equal(merged.float().numpy(), truth.float().numpy())
    overflow = int(torch.isinf(truth).sum())
    assert stats.overflow == overflow > 2


def test_rounding_to_float32_is_that_of_torch(backend):
    rng = np.random.default_rng(2)
    anything = rng.integers(0, 1 << 32, 50_000, dtype=np.uint32).view(np.float32)
    finite = anything[np.isfinite(anything)].astype(np.float64)
    midway = (finite + np.nextafter(np.float32(finite), np.float32(np.inf))) / 2
    values = torch.from_numpy(
        np.concatenate([finite, midway, midway * (1 + 2.0**-52), finite * (1 + 2.0**-40)])
    )
    values = values[torch.isfinite(values.float())]
    data, stats = merge_tile(inputs((values,), "float32"), _PLAIN, backend)
    np.testing.assert_array_equal(data.view(np.float32), values.float().numpy())
    assert stats.overflow == 0


@pytest.mark.parametrize("out_dtype", OUTPUT_DTYPES)
def test_overflow_is_counted(backend, out_dtype):
    """2 max and -2 max, from float32 (or from float64) values that are finite themselves."""
    dtype = getattr(torch, out_dtype)
    like = torch.float32 if dtype.itemsize < 4 else dtype
    values = torch.tensor([1.0, torch.finfo(dtype).max, -torch.finfo(dtype).max, 0.5], dtype=like)
    if dtype == torch.float64:
        values[1:3] = torch.tensor([1e38, -1e38])  # inputs are finite in float32
    terms = replace(_PLAIN, lambda_=2.0 if dtype != torch.float64 else 1e300)
    data, stats = merge_tile(inputs((values,), out_dtype), terms, backend)
    merged = torch.from_numpy(data).view(dtype)
    assert stats.overflow == 2
    assert torch.isinf(merged).tolist() == [False, True, True, False]


@pytest.mark.parametrize("offset", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_unaligned_inputs_give_the_same_bytes(backend, dtype, offset):
    experts = random_experts(3, (1100,), 2, dtypes=(dtype,), base_dtype=dtype)
    tensor = experts.inputs("float32")
    moved = replace(
        tensor,
        base=shifted(tensor.base, offset),
        experts=tuple(shifted(e, offset) for e in tensor.experts),
        curvatures=tuple(Full(shifted(c.values, offset)) for c in tensor.curvatures),
    )
    recipe = make_recipe(2, density=0.4)
    one, other = (merge_model(recipe, [x], backend)["weight"][0] for x in (tensor, moved))
    assert one.data.tobytes() == other.data.tobytes()
    np.testing.assert_array_equal(one.masks, other.masks)


def shifted(aligned, offset: int):
    """The same bytes, `offset` bytes into an aligned array."""
    room = np.zeros(aligned.data.size + 8, np.uint8)
    room = room[-room.ctypes.data % 8 :]
    moved = room[offset : offset + aligned.data.size]
    moved[:] = aligned.data
    return replace(aligned, data=moved)


BAD = {
    "base-nan": ("base", np.nan),
    "base-inf": ("base", np.inf),
    "expert-nan": ("expert", np.nan),
    "expert-inf": ("expert", -np.inf),
    "curvature-nan": ("curvature", np.nan),
    "curvature-inf": ("curvature", np.inf),
    "curvature-negative": ("curvature", -1e-30),
}
PLACES = [3, 600, 601]


def spoiled(where: str, value: float) -> Experts:
    """Three experts, with bad values in the base, in expert 1, or in its curvature."""
    experts = random_experts(4, (1027,), dtypes=("float32",), base_dtype="float32")
    target = {"base": experts.base, "expert": experts.experts[1], "curvature": experts.curvatures[1]}[where]
    target[PLACES] = value
    return experts


@pytest.mark.parametrize(
    "parameters", [{}, {"density": 0.3}, {"masked_task_vector_merge_method": "ties"}], ids=str
)
@pytest.mark.parametrize("bad", BAD)
def test_values_that_are_not_finite_are_an_error(backend, bad, parameters):
    """It names the input, the tensor, the count and the first index."""
    where, value = BAD[bad]
    tensor = spoiled(where, value).inputs("float32", "layers.0.weight")
    tensor = replace(
        tensor,
        base=replace(tensor.base, origin="base.safetensors"),
        experts=tuple(replace(e, origin=f"expert{t}") for t, e in enumerate(tensor.experts)),
        curvatures=tuple(Full(replace(c.values, origin=f"v{t}")) for t, c in enumerate(tensor.curvatures)),
    )
    with pytest.raises(InputError) as raised:
        merge_model(make_recipe(3, **parameters), [tensor], backend)
    text = str(raised.value)
    origin = {"base": "base.safetensors", "expert": "expert1", "curvature": "v1"}[where]
    assert text.startswith(f"{origin}: layers.0.weight: 3 of 1027 ")
    assert "first at flat index 3;" in text
    assert ("negative or not finite" in text) == (where == "curvature")
    assert "\n" not in text


@pytest.mark.parametrize("parameters", [{}, {"density": 0.3}, {"normalise": "global"}], ids=str)
@pytest.mark.parametrize("bad", BAD)
def test_on_nonfinite_writes_the_base_value(backend, bad, parameters):
    where, value = BAD[bad]
    experts = spoiled(where, value)
    parameters = {"on_nonfinite": "base", **parameters}
    outcome = merge_one(make_recipe(3, **parameters), experts, backend, "float32")
    base = experts.base.numpy()
    np.testing.assert_array_equal(outcome.out[PLACES], base[PLACES])
    assert outcome.stats.repaired == len(PLACES)
    truth = oracle.evaluate({"weight": experts.exact()}, **parameters)["weight"]
    others = np.setdiff1d(np.arange(1027), PLACES)
    np.testing.assert_array_equal(outcome.masks[:, others], truth.masks[:, others])
    np.testing.assert_array_equal(outcome.out[others], np.float32(truth.out)[others])
