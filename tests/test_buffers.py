"""Tensors that no optimizer trained, and tensors that only some models have, in files and in dictionaries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import load_merged, random_tensors, save_model, second_moments
from models import buffer
from safetensors.torch import save_file

from ota_kernels import InputError, RecipeError, merge, merge_state_dicts, plan
from ota_kernels.planning.buffers import (
    CONSTANT,
    COUNTER,
    EMA,
    FIXED,
    STATISTICS,
    as_float64,
    average,
    kind_of,
)
from ota_kernels.tensors.dtypes import BY_NAME

W = {"h.0.w": (5, 3)}
INV_FREQ = "h.0.rotary_emb.inv_freq"
FREQUENCIES = 1e4 ** -(torch.arange(8).float() / 8)
MASK = torch.full((6, 6), float("-inf")).triu(1)


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


class Files:
    """Merges dictionaries as folders on the disk."""

    def __init__(self, root):
        self.root = root

    def __call__(self, models, base=None, **options):
        dtype = options.pop("out_dtype", None)
        method = options.pop("method", "linear")
        for name, tensors in {**({"base": base} if base else {}), **dict(enumerate(models))}.items():
            save_model(self.root / str(name), tensors)
        recipe = {
            "merge_method": method,
            "models": [{"model": str(self.root / str(t))} for t in range(len(models))],
            "parameters": options,
        }
        recipe |= {"out_dtype": dtype} if dtype else {}
        recipe |= {"base_model": str(self.root / "base")} if base else {}
        self.report = merge(recipe, self.root / "out", overwrite=True)
        return load_merged(self.root / "out")


class Memory:
    def __init__(self, root):
        pass

    def __call__(self, models, base=None, **options):
        options.setdefault("method", "linear")
        return merge_state_dicts(base, models, **options)


@pytest.fixture(params=[Files, Memory], ids=["files", "dictionaries"])
def merged(request, tmp_path):
    return request.param(tmp_path)


def pair(**extra):
    """Two models that have all these tensors too (`__` for a dot)."""
    named = {name.replace("__", "."): tensor for name, tensor in extra.items()}
    return [random_tensors(W, seed) | named for seed in (1, 2)]


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (4,), FIXED),
        ("rotary_emb.original_inv_freq", (4,), FIXED),
        ("embeddings.position_ids", (1, 9), FIXED),
        ("h.0.attn.masked_bias", (), FIXED),
        ("h.0.attn.bias", (1, 1, 9, 9), FIXED),
        ("h.0.attn.bias", (9,), None),
        ("text.attn_mask", (9, 9), FIXED),
        ("bn.num_batches_tracked", (), COUNTER),
        ("bn.running_mean", (3,), STATISTICS),
        ("model_ema.decay", (), EMA),
        ("rope.freqs", (4,), CONSTANT),
        ("x.causal_attention_mask", (4,), CONSTANT),
        ("feed_forward.input_max", (), CONSTANT),
        ("mask_token", (4,), None),
        ("masked_spec_embed", (4,), None),
        ("schema.weight", (4,), None),
        ("h.0.mlp.weight", (4, 4), None),
    ],
)
def test_kinds(name, shape, kind):
    assert kind_of(name, shape) == kind


@pytest.mark.parametrize("method", ["linear", "ota"])
@pytest.mark.parametrize("out_dtype", [None, "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (INV_FREQ, FREQUENCIES),
        ("h.0.attn.masked_bias", torch.tensor(-1e9)),
        ("text.attn_mask", MASK),
        ("h.0.attn.bias", torch.ones(1, 1, 4, 4).tril().bool()),
        ("position_ids", torch.arange(5)[None]),
        ("bn.num_batches_tracked", torch.tensor(7)),
        ("rope.freqs", FREQUENCIES),
    ],
)
def test_equal_buffers_are_copied_bit_for_bit(merged, method, out_dtype, name, tensor):
    models = pair(**{name: tensor})
    base = random_tensors(W, 0) | {name: tensor}
    extra = {} if method == "linear" else {"missing_curvature": "uniform"}
    found = merged(models, base, method=method, out_dtype=out_dtype, **extra)
    assert bits(found[name]) == bits(tensor)
    assert found["h.0.w"].dtype == getattr(torch, out_dtype or "float32")


def test_a_buffer_needs_no_curvature(tmp_path):
    shared = {INV_FREQ: FREQUENCIES, "bn.num_batches_tracked": torch.tensor(3)}
    base = random_tensors(W, 0) | shared | {"bn.running_mean": torch.zeros(3)}
    experts = [
        random_tensors(W, seed) | shared | {"bn.running_mean": torch.ones(3) * seed} for seed in (1, 3)
    ]
    models = []
    for t, tensors in enumerate(experts):
        save_model(tmp_path / str(t), tensors)
        save_file(second_moments(random_tensors(W, 0), 9), tmp_path / f"{t}.safetensors")
        parameters = {"preconditioner_path": str(tmp_path / f"{t}.safetensors"), "density": 0.5}
        models.append({"model": str(tmp_path / str(t)), "parameters": parameters})
    save_model(tmp_path / "base", base)
    recipe = {"merge_method": "ota", "base_model": str(tmp_path / "base"), "models": models}
    merge(recipe, tmp_path / "out")
    found = load_merged(tmp_path / "out")
    assert bits(found[INV_FREQ]) == bits(FREQUENCIES)
    torch.testing.assert_close(found["bn.running_mean"], torch.full((3,), 2.0))  # alike, all edits kept
    curvatures = [second_moments(random_tensors(W, 0), 9)] * 2
    again = merge_state_dicts(base, experts, curvatures, density=0.5)
    assert {n: bits(t) for n, t in again.items()} == {n: bits(t) for n, t in found.items()}


@pytest.mark.parametrize("order", [1, -1])
def test_a_buffer_of_two_types_is_taken_in_the_exact_one(merged, order):
    ids = torch.arange(9)[None]
    models = [
        random_tensors(W, 1) | {"position_ids": ids},
        random_tensors(W, 2) | {"position_ids": ids.half()},
    ]
    assert bits(merged(models[::order])["position_ids"]) == bits(ids)
    models = [
        random_tensors(W, 1) | {INV_FREQ: FREQUENCIES},
        random_tensors(W, 2) | {INV_FREQ: FREQUENCIES.bfloat16()},
    ]
    assert bits(merged(models[::order])[INV_FREQ]) == bits(FREQUENCIES)


def test_masks_of_other_depths_are_one_mask(merged):
    low = MASK.clone().masked_fill(MASK.isinf(), torch.finfo(torch.float16).min)
    models = [random_tensors(W, 1) | {"attn_mask": MASK}, random_tensors(W, 2) | {"attn_mask": low}]
    assert bits(merged(models)["attn_mask"]) == bits(MASK)


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        (INV_FREQ, FREQUENCIES, FREQUENCIES * 2),
        ("position_ids", torch.arange(4), torch.arange(4) + 2),
        ("position_ids", torch.arange(4), torch.arange(4).half() + 1),
        ("attn_mask", MASK, MASK.T.contiguous()),
    ],
)
def test_fixed_buffers_that_differ_are_refused(merged, name, one, other):
    models = [random_tensors(W, 1) | {name: one}, random_tensors(W, 2) | {name: other}]
    with pytest.raises(InputError, match="a buffer that no training changes differs between"):
        merged(models)


def test_constants_that_differ_are_parameters(merged):
    """Some models learn what others compute."""
    models = [random_tensors(W, 1) | {"rope.freqs": FREQUENCIES * s} for s in (1.0, 3.0)]
    found = merged(models, out_dtype="bfloat16")["rope.freqs"]
    torch.testing.assert_close(found, FREQUENCIES * 2)  # float32: in its own type all the same


class TestCounters:
    NAME = "bn.num_batches_tracked"

    def models(self, *values):
        return [random_tensors(W, t) | {self.NAME: torch.tensor(v)} for t, v in enumerate(values)]

    def test_the_newest_without_a_base(self, merged):
        assert merged(self.models(3, 9, 5))[self.NAME] == 9

    def test_the_bases(self, merged):
        base, *experts = self.models(4, 9, 5)
        found = merged(experts, base, method="ota", missing_curvature="uniform")
        assert found[self.NAME] == 4


class TestExtraTensors:
    EXTRA = random_tensors({"extra.w": (4, 3)}, 7)["extra.w"]

    def models(self, **extra):
        return [random_tensors(W, 1), random_tensors(W, 2) | extra, random_tensors(W, 3)]

    def test_a_parameter_is_an_error_that_says_how_to_go_on(self, merged):
        with pytest.raises(InputError, match=r"extra\.w.*`extra_tensors: take`, `drop` or `average`"):
            merged(self.models(**{"extra.w": self.EXTRA}))

    def test_take(self, merged):
        found = merged(self.models(**{"extra.w": self.EXTRA}), extra_tensors="take", out_dtype="float16")
        assert bits(found["extra.w"]) == bits(self.EXTRA)

    def test_drop(self, merged):
        found = merged(self.models(**{"extra.w": self.EXTRA}), extra_tensors="drop")
        assert found.keys() == W.keys()

    @pytest.mark.parametrize("out_dtype", ["float32", "bfloat16", "float16"])
    def test_average(self, merged, out_dtype):
        models = self.models(**{"extra.w": self.EXTRA})
        models[2]["extra.w"] = self.EXTRA * 3.3
        found = merged(models, extra_tensors="average", out_dtype=out_dtype)["extra.w"]
        expected = (self.EXTRA.double() + models[2]["extra.w"].double()) / 2
        assert torch.equal(found, expected.to(getattr(torch, out_dtype)))

    def test_the_base_comes_first(self, merged):
        base = random_tensors(W, 0) | {"extra.w": self.EXTRA}
        experts = [random_tensors(W, 1), random_tensors(W, 2) | {"extra.w": self.EXTRA + 1}]
        options = {"missing_curvature": "uniform", "extra_tensors": "take"}
        found = merged(experts, base, method="ota", **options)
        assert bits(found["extra.w"]) == bits(self.EXTRA)

    @pytest.mark.parametrize("policy", ["error", "take", "average"])
    def test_buffers_are_taken(self, merged, policy):
        models = self.models(**{INV_FREQ: FREQUENCIES, "ids.position_ids": torch.arange(3)})
        found = merged(models, extra_tensors=policy, out_dtype="bfloat16")
        assert bits(found[INV_FREQ]) == bits(FREQUENCIES)
        assert bits(found["ids.position_ids"]) == bits(torch.arange(3))

    def test_buffers_may_be_dropped(self, merged):
        assert merged(self.models(**{INV_FREQ: FREQUENCIES}), extra_tensors="drop").keys() == W.keys()

    def test_a_copy_of_the_weights_that_one_model_has_is_dropped(self, merged):
        """Beside merged weights it would be another model's."""
        models = self.models(**{"model_ema.h0w": random_tensors(W, 8)["h.0.w"]})
        assert merged(models).keys() == W.keys()

    def test_a_wrong_policy(self, merged):
        with pytest.raises(RecipeError, match="error, take, drop or average"):
            merged(self.models(), extra_tensors="keep")

    def test_what_happened_is_named(self, tmp_path):
        files = Files(tmp_path)
        files(self.models(**{"extra.w": self.EXTRA, INV_FREQ: FREQUENCIES}), extra_tensors="drop")
        assert files.report["left_out"].keys() == {"extra.w", INV_FREQ}
        assert any("extra.w" in note and "left out" in note for note in files.report["notes"])
        files(self.models(**{INV_FREQ: FREQUENCIES}))
        assert files.report["not_merged"] == {INV_FREQ: "take"}
        assert any(f"buffers taken from {tmp_path / '1'}" in note for note in files.report["notes"])

    def test_plan_counts_what_is_read(self, tmp_path):
        for t, tensors in enumerate(self.models(**{"extra.w": self.EXTRA})):
            save_model(tmp_path / str(t), tensors)
        recipe = {
            "merge_method": "linear",
            "models": [{"model": str(tmp_path / str(t))} for t in range(3)],
            "parameters": {"extra_tensors": "take"},
        }
        assert plan(recipe).bytes_in == 3 * 15 * 4 + 12 * 4


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]
)
def test_values_of_every_type_are_torchs(dtype):
    tensor = torch.randn(400, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    np.testing.assert_array_equal(as_float64(buffer(tensor).data, BY_NAME[dtype]), tensor.double().numpy())


def test_a_mean_is_rounded_once():
    """Halfway between two bfloat16 values but for bits beyond float32: rounding twice would lose them."""
    low = 1 + 2.0**-8  # the middle of 1 and 1 + 2^-7
    values = np.array([low, low + 2.0**-40, low - 2.0**-40, -low - 2.0**-40, np.inf, 3e38, 1e-45, 0.0])
    raw = values.view(np.uint8)
    found = average([(raw, BY_NAME["float64"])] * 2, BY_NAME["bfloat16"])
    expected = [1, 1 + 2.0**-7, 1, -1 - 2.0**-7, np.inf, 3e38, 0, 0]
    numbers = as_float64(found, BY_NAME["bfloat16"])
    np.testing.assert_allclose(numbers, expected, rtol=2.0**-8, atol=1e-44)
    np.testing.assert_array_equal(numbers[:5], expected[:5])
    assert np.isnan(
        as_float64(
            average([(np.array([np.nan]).view(np.uint8), BY_NAME["float64"])], BY_NAME["bfloat16"]),
            BY_NAME["bfloat16"],
        )
    )[0]
