"""Codes are never merged as if they were values; float8 with scales becomes weights exactly."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import torch
from checkpoints import load_merged, random_tensors, save_model
from models import buffer

from ota_kernels import InputError, merge, plan
from ota_kernels.io.float8 import ScaledFloat8, code_values, source_of
from ota_kernels.io.quantised import block_shape, method_in_config, quantisation_of
from ota_kernels.io.reader import Checkpoint
from ota_kernels.tensors.buffer import Buffer
from ota_kernels.tensors.dtypes import BY_NAME

P = "model.layers.0.self_attn.q_proj."
NORM = {"model.norm.weight": torch.ones(8)}


def opened(path):
    return contextlib.closing(Checkpoint.open(path, path.name))


def ints(dtype, *shape):
    return torch.arange(int(np.prod(shape)), dtype=torch.int64).remainder(100).to(dtype).reshape(shape)


FORMATS = {
    "GPTQ": (
        {
            "qweight": ints(torch.int32, 2, 8),
            "qzeros": ints(torch.int32, 1, 1),
            "g_idx": ints(torch.int32, 8),
        },
        None,
        "GPTQ",
    ),
    "AWQ": ({"qweight": ints(torch.int32, 8, 1), "qzeros": ints(torch.int32, 1, 1)}, "awq", "AWQ"),
    "unnamed": ({"qweight": ints(torch.int32, 8, 1), "scales": torch.ones(1, 8).half()}, None, "GPTQ or AWQ"),
    "bitsandbytes 4": (
        {
            "weight": ints(torch.uint8, 32, 1),
            "weight.absmax": torch.ones(1),
            "weight.quant_map": torch.ones(16),
            "weight.quant_state.bitsandbytes__nf4": ints(torch.uint8, 20),
        },
        "bitsandbytes",
        "bitsandbytes 4-bit",
    ),
    "bitsandbytes 4, old": (
        {
            "weight": ints(torch.uint8, 32, 1),
            "weight.absmax": torch.ones(1),
            "weight.quant_map": torch.ones(16),
        },
        None,
        "bitsandbytes 4-bit",
    ),
    "bitsandbytes 8": ({"weight": ints(torch.int8, 8, 8), "SCB": torch.ones(8)}, None, "bitsandbytes 8-bit"),
    "MXFP4": (
        {
            "gate_up_proj_blocks": ints(torch.uint8, 2, 4, 2, 16),
            "gate_up_proj_scales": ints(torch.uint8, 2, 4, 2),
        },
        "mxfp4",
        "MXFP4",
    ),
    "NVFP4": (
        {
            "weight": ints(torch.uint8, 8, 4),
            "weight_scale": torch.ones(8, 1).to(torch.float8_e4m3fn),
            "weight_scale_2": torch.ones(()),
        },
        "modelopt",
        "NVFP4",
    ),
    "compressed-tensors": (
        {
            "weight_packed": ints(torch.int32, 8, 1),
            "weight_scale": torch.ones(8, 1),
            "weight_shape": ints(torch.int64, 2),
        },
        "compressed-tensors",
        "compressed-tensors",
    ),
    "MLX": (
        {"weight": ints(torch.uint32, 8, 1), "scales": torch.ones(8, 1), "biases": torch.ones(8, 1)},
        None,
        "MLX",
    ),
    "HQQ": ({"W_q": ints(torch.uint8, 8, 4), "meta": torch.ones(1)}, None, "HQQ"),
    "AQLM": ({"codes": ints(torch.int16, 8, 1), "codebooks": torch.ones(1, 4)}, None, "AQLM"),
    "int8": ({"weight": ints(torch.int8, 8, 8), "weight_scale": torch.ones(8, 1)}, None, "int8 weights"),
    "an unknown one": ({"weight": ints(torch.uint8, 8, 8)}, "eetq", "eetq"),
    "float8 whose scales are lost": ({"weight": torch.ones(8, 8).to(torch.float8_e4m3fn)}, "fp8", "fp8"),
}


@pytest.mark.parametrize(("tensors", "method", "named"), FORMATS.values(), ids=FORMATS.keys())
def test_formats_are_refused_by_name(tmp_path, tensors, method, named):
    config = {"model_type": "llama"} | ({"quantization_config": {"quant_method": method}} if method else {})
    for name in "ab":
        save_model(tmp_path / name, NORM | {P + end: t for end, t in tensors.items()}, config=config)
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / n)} for n in "ab"],
        "dtype": "float32",
    }
    for job in (lambda: plan(recipe), lambda: merge(recipe, tmp_path / "out")):
        with pytest.raises(InputError) as caught:
            job()
        assert f"a: is quantised: {named} (" in str(caught.value)
        assert P in str(caught.value)
        assert "16 or 32 bits that they were made from" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("codes", "scale"),
    [
        pytest.param("weight", ("weight_scale_inv", (2, 2)), id="DeepSeek"),
        pytest.param("weight", ("weight_scale", (1,)), id="compressed-tensors"),
        pytest.param("weight", ("weight_scale", (256, 1)), id="by row"),
        pytest.param("weight", ("scale_weight", ()), id="ComfyUI"),
        pytest.param("weight", ("qscale_weight", ()), id="Mistral"),
        pytest.param("gate_up_proj", ("gate_up_proj_scale_inv", (2, 2)), id="without .weight"),
    ],
)
def test_float8_with_scales_is_recognised_and_said(tmp_path, codes, scale):
    end, shape = scale
    tensors = {
        P + codes: torch.ones(256, 256).to(torch.float8_e4m3fn),
        P + end: torch.full(shape, 0.5),
        P + "input_scale": torch.ones(()),
        "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn),
    }
    save_model(tmp_path / "a", NORM | tensors)
    with opened(tmp_path / "a") as checkpoint:
        found = quantisation_of(checkpoint)
    assert found.scaled.keys() == {P + codes}
    assert found.scaled[P + codes].name == P + end
    assert found.helpers == {P + end, P + "input_scale", "scaled_fp8"}
    save_model(tmp_path / "b", NORM | tensors)
    models = [{"model": str(tmp_path / n)} for n in "ab"]
    recipe = {"merge_method": "linear", "models": models, "dtype": "bfloat16"}
    assert any("float8 with scales is read as weights" in note for note in plan(recipe).notes)
    report = merge(recipe, tmp_path / "out")
    assert any("float8 with scales is read as weights" in note for note in report["notes"])
    found = load_merged(tmp_path / "out")
    assert found.keys() == {P + codes, *NORM}
    assert torch.equal(found[P + codes], torch.full((256, 256), 0.5, dtype=torch.bfloat16))
    with pytest.raises(InputError, match=r"float8_e4m3fn, which a merge cannot be written in"):
        plan({"merge_method": "linear", "models": models})


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_float8_merges_as_the_weights_that_it_stands_for(tmp_path, backend, scope):
    """Bit for bit, densities included, as files of code x scale in float32 merge."""
    name = P + "weight"
    for seed, folder in enumerate(("base", "a", "b")):
        draw = torch.Generator().manual_seed(seed)
        codes = torch.randn(300, 200, generator=draw).to(torch.float8_e4m3fn)
        scales = torch.rand(3, 2, generator=draw) + 0.5
        spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :200]
        save_model(tmp_path / folder, NORM | {name: codes, P + "weight_scale_inv": scales})
        save_model(tmp_path / f"{folder}32", NORM | {name: codes.float() * spread})
    found = {}
    for end in ("", "32"):
        recipe = {
            "merge_method": "ota",
            "base_model": str(tmp_path / f"base{end}"),
            "models": [{"model": str(tmp_path / f"{n}{end}"), "parameters": {"density": 0.3}} for n in "ab"],
            "parameters": {"missing_curvature": "uniform", "density_scope": scope},
            "dtype": "bfloat16",
        }
        merge(recipe, tmp_path / f"out{end}", backend=backend, tile_elements=7000)
        found[end] = load_merged(tmp_path / f"out{end}")
    assert found[""].keys() == {name, *NORM}
    for tensor in found[""]:
        assert torch.equal(found[""][tensor], found["32"][tensor])


PLAIN = {
    "float8 without scales": {"w.weight": torch.ones(4, 4).to(torch.float8_e5m2)},
    "names like scales": {
        "attn.scales": torch.ones(4),
        "attn.biases": torch.ones(4),
        "attn.weight": torch.ones(4, 4),
    },
    "integers that are no weights": {"position_ids": ints(torch.int64, 4), "w.weight": torch.ones(4, 4)},
    "blocks and scales in floats": {"x_blocks": torch.ones(4), "x_scales": torch.ones(4)},
    "a learned scale": {"attn.weight_scale": torch.ones(4), "w.weight": torch.ones(4, 4)},
}


@pytest.mark.parametrize("tensors", PLAIN.values(), ids=PLAIN.keys())
def test_plain_models_are_not_quantised(tmp_path, tensors):
    save_model(tmp_path, NORM | tensors)
    with opened(tmp_path) as checkpoint:
        assert quantisation_of(checkpoint) is None


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (None, None),
        ({"a": 1}, None),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"text_config": {"quantization_config": {"quant_algo": "FP8"}}}, "FP8"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "4-bit"),
        ({"compression_config": {}}, "of an unnamed method"),
    ],
)
def test_what_the_configuration_claims(config, method):
    assert method_in_config(config) == method


@pytest.mark.parametrize("where", ["quantization_config", "text_config"])
def test_a_claim_over_plain_weights_goes(tmp_path, where):
    claim = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = {"model_type": "llama", "torch_dtype": "bfloat16"}
    config |= {where: claim} if where == "quantization_config" else {where: {"quantization_config": claim}}
    models = [random_tensors({"w.weight": (4, 4)}, seed, torch.bfloat16) for seed in (1, 2)]
    for name, tensors in zip("ab", models, strict=True):
        save_model(tmp_path / name, tensors, config=config)
    recipe = {"merge_method": "linear", "models": [{"model": str(tmp_path / n)} for n in "ab"]}
    merge(recipe, tmp_path / "out")
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["model_type"] == "llama"
    expected = (models[0]["w.weight"].float() + models[1]["w.weight"].float()) / 2
    assert torch.equal(load_merged(tmp_path / "out")["w.weight"], expected.bfloat16())


@pytest.mark.parametrize(("tag", "size"), [("F4", 2), ("F6_E2M3", 3), ("I4", 2)])
def test_types_that_only_quantised_models_have_are_named(tmp_path, tag, size):
    header = json.dumps({"w": {"dtype": tag, "shape": [4], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * size)
    said = "is quantised, of .* \\(type I4\\)" if tag == "I4" else f"is quantised: .* is of type {tag}"
    with pytest.raises(InputError, match=said):
        plan({"merge_method": "linear", "models": [{"model": str(tmp_path)}] * 2})


class TestFloat8:
    @pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
    def test_all_codes_are_torchs(self, dtype):
        codes = torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype))
        np.testing.assert_array_equal(code_values(dtype), codes.float().numpy())

    @pytest.mark.parametrize(
        ("shape", "scales", "said", "block"),
        [
            ((256, 256), (2, 2), None, (128, 128)),
            ((300, 200), (3, 2), (128, 128), (128, 128)),
            ((300, 200), (3, 2), None, (128, 128)),
            ((64, 96), (2, 3), None, (32, 32)),
            ((64, 96), (2, 3), (128, 128), None),
            ((64, 96), (), None, (64, 96)),
            ((64, 96), (1,), None, (64, 96)),
            ((64, 96), (64, 1), None, (1, 96)),
            ((64, 96), (64,), None, (1, 96)),
            ((4, 64, 96), (4, 1, 96), None, (1, 64, 1)),
            ((4, 256, 128), (4, 2, 1), (128, 128), (1, 128, 128)),
            ((64, 96), (5,), None, None),
            ((64, 96), (2, 3, 1), None, None),
            ((), (), None, ()),
        ],
    )
    def test_blocks(self, shape, scales, said, block):
        assert block_shape(shape, scales, said) == block

    @pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
    @pytest.mark.parametrize(
        ("shape", "block"),
        [
            ((5, 7), (5, 7)),
            ((5, 7), (1, 7)),
            ((5, 7), (2, 3)),
            ((6, 8), (3, 4)),
            ((3, 5, 7), (1, 2, 3)),
            ((3, 5, 7), (1, 5, 1)),
            ((9,), (9,)),
            ((9,), (2,)),
            ((), ()),
            ((0, 4), (0, 4)),
        ],
        ids=str,
    )
    def test_every_tile_is_code_times_scale(self, shape, block, dtype):
        rng = np.random.default_rng(0)
        codes = torch.from_numpy(rng.normal(0, 20, shape)).to(getattr(torch, dtype))
        counts = [-(-n // b) if b else 0 for n, b in zip(shape, block, strict=True)]
        scales = torch.from_numpy(rng.uniform(0.001, 3, counts)).float()
        expected = codes.float().double()
        spread = scales.double()
        for axis, (n, b) in enumerate(zip(shape, block, strict=True)):
            spread = spread.repeat_interleave(max(b, 1), axis).narrow(axis, 0, n)
        expected = (expected * spread).float().reshape(-1).numpy()  # float64 holds the product exactly
        source = ScaledFloat8(buffer(codes), shape, buffer(scales), block)
        n = expected.size
        for start, stop in [(0, n), (0, n // 2), (n // 3, n - 1), (n // 2, n // 2), (max(n - 1, 0), n)]:
            found = source.slice(start, max(start, stop))
            assert found.dtype is BY_NAME["float32"]
            np.testing.assert_array_equal(found.data.view(np.float32), expected[start:stop])
        assert source.dtype is BY_NAME["float32"]
        assert source.shape == shape

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
    def test_scales_of_any_type(self, dtype):
        scales = torch.tensor([[0.5, 4.0]]).to(dtype)
        codes = torch.ones(2, 4).to(torch.float8_e4m3fn)
        raw = np.frombuffer(bytes(scales.view(torch.uint8).numpy().reshape(-1)), np.uint8)
        name = str(dtype).removeprefix("torch.")
        source = ScaledFloat8(buffer(codes), (2, 4), Buffer(raw, BY_NAME[name], "s"), (2, 2))
        np.testing.assert_array_equal(source.slice(0, 8).data.view(np.float32), [0.5, 0.5, 4, 4] * 2)

    def test_the_weights_of_a_stored_model(self, tmp_path):
        codes = torch.randn(256, 130, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
        scales = torch.tensor([[0.5, 3.0], [0.001, 7.0]])
        save_model(tmp_path, NORM | {P + "weight": codes, P + "weight_scale_inv": scales})
        with opened(tmp_path) as checkpoint:
            found = quantisation_of(checkpoint)
            source = source_of(checkpoint, P + "weight", found.scaled[P + "weight"])
            tile = source.slice(100, 20_000).data.view(np.float32)
        spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:, :130]
        expected = (codes.double() * spread.double()).float().reshape(-1)[100:20_000]
        np.testing.assert_array_equal(tile, expected.numpy())
        assert found.note.startswith("float8 with scales is read as weights, code x scale")
        assert found.note.endswith("1 tensors; 1 scales and markers go")

    def test_scales_that_do_not_fit_are_refused(self):
        codes, scales = buffer(torch.ones(4, 4).to(torch.float8_e5m2)), buffer(torch.ones(3))
        with pytest.raises(InputError, match="do not fit"):
            ScaledFloat8(codes, (4, 4), scales, (2, 2))

    def test_codes_that_are_not_finite_stay_so(self):
        codes = torch.tensor([float("nan"), float("inf"), 1.0]).to(torch.float8_e5m2)
        found = ScaledFloat8(buffer(codes), (3,), buffer(torch.tensor([2.0])), (3,)).slice(0, 3)
        np.testing.assert_array_equal(found.data.view(np.float32), [np.nan, np.inf, 2.0])

    def test_bytes_per_element_count_scales(self):
        codes = buffer(torch.ones(4, 4).to(torch.float8_e5m2))
        assert ScaledFloat8(codes, (4, 4), buffer(torch.ones(2, 2)), (2, 2)).bytes_per_element == 2.0
