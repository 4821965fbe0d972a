"""LoRA adapters: W + s B A against float64, every way PEFT writes them, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from checkpoints import load_merged, save_model
from safetensors.torch import save_file

from ota_kernels import merge
from ota_kernels.errors import InputError
from ota_kernels.planning.adapters import round_to
from ota_kernels.planning.inputs import Inputs
from ota_kernels.recipe.schema import parse_recipe
from ota_kernels.tensors.computed import is_computed

SHAPES = {
    "model.embed_tokens.weight": (70, 12),
    "model.layers.0.self_attn.q_proj.weight": (150, 12),
    "model.layers.0.self_attn.q_proj.bias": (150,),
    "model.layers.0.mlp.up_proj.weight": (33, 12),
    "model.layers.0.conv.weight": (8, 5, 3, 3),
    "model.norm.weight": (12,),
    "lm_head.weight": (70, 12),
}
Q, UP, CONV = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.0.conv"


def random(shape, seed, scale=0.02):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model(tmp_path):
    tensors = {name: random(shape, i) for i, (name, shape) in enumerate(SHAPES.items())}
    save_model(
        tmp_path / "model", {name: t.bfloat16() for name, t in tensors.items()}, config={"vocab_size": 70}
    )
    return {name: t.bfloat16() for name, t in tensors.items()}


def lora(module, rank, seed, dtype=torch.float32):
    """Factors for a linear layer or a convolution."""
    shape = SHAPES[f"{module}.weight"]
    a = random((rank, *shape[1:]), seed).to(dtype)
    b = random((shape[0], rank, *(1 for _ in shape[2:])), seed + 1, 1.0).to(dtype)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def save_adapter(folder, tensors, *, pickled=False, prefix="base_model.model.", **config):
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    named = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    if pickled:
        torch.save(named, folder / "adapter_model.bin")
    else:
        save_file(named, folder / "adapter_model.safetensors")
    return folder


def product(tensors, module):
    """B A in float64, [m, n]."""
    a, b = (tensors[f"{module}.lora_{side}.weight"].double() for side in "AB")
    return b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1)


def recipe(tmp_path, **top):
    return {
        "merge_method": "linear",
        "models": [{"model": f"{tmp_path / 'model'}+{tmp_path / 'adapter'}"}],
        **top,
    }


def sources(data):
    """The elements of every tensor of the only model, as float64."""
    with Inputs(parse_recipe(data)) as inputs:
        found = {}
        for entry in inputs.entries:
            source = entry.experts[0].source
            values = source.slice(0, len(source))
            found[entry.name] = torch.from_numpy(values.float32().copy()).double().reshape(entry.shape)
        return found


def assert_values(found, expected):
    for name, tensor in expected.items():
        scale = tensor.abs().max().item()
        assert (found[name] - tensor).abs().max().item() <= 4e-7 * scale, name


def test_linear_layers_ranks_and_alphas(model, tmp_path):
    tensors = lora(Q, 4, 10) | lora(UP, 2, 20, torch.bfloat16) | lora(CONV, 3, 30)
    save_adapter(
        tmp_path / "adapter",
        tensors,
        rank_pattern={"mlp.up_proj": 2, "conv": 3},
        alpha_pattern={"up_proj": 5, "xx": 9},
    )
    exact = {name: tensor.double() for name, tensor in model.items()}
    exact[f"{Q}.weight"] += 8 / 4 * product(tensors, Q)
    exact[f"{UP}.weight"] += 5 / 2 * product(tensors, UP)
    exact[f"{CONV}.weight"] += (8 / 3 * product(tensors, CONV)).reshape(8, 5, 3, 3)
    assert_values(sources(recipe(tmp_path)), exact)


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_rslora_and_files(model, tmp_path, pickled, prefix):
    tensors = lora(Q, 4, 10)
    save_adapter(tmp_path / "adapter", tensors, pickled=pickled, prefix=prefix, use_rslora=True)
    exact = {f"{Q}.weight": model[f"{Q}.weight"].double() + 8 / 2 * product(tensors, Q)}
    assert_values(sources(recipe(tmp_path)), exact)


def test_transposed_weights(model, tmp_path):
    a, b = random((4, 150), 1), random((12, 4), 2)
    save_adapter(
        tmp_path / "adapter", {f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b}, fan_in_fan_out=True
    )
    exact = {f"{Q}.weight": model[f"{Q}.weight"].double() + 2 * (b.double() @ a.double()).T}
    assert_values(sources(recipe(tmp_path)), exact)


def dora(tensors, module, seed):
    """A magnitude for a linear layer or a convolution, as PEFT shapes it."""
    size, *rest = SHAPES[f"{module}.weight"]
    shape = (1, size, *(1 for _ in rest[1:])) if rest[1:] else (size,)
    return tensors | {f"{module}.lora_magnitude_vector": random(shape, seed, 0.5) + 1}


def test_dora(model, tmp_path):
    """W' has rows of the lengths m_i in the direction of W + s B A."""
    tensors = dora(dora(lora(Q, 4, 10) | lora(CONV, 4, 30), Q, 40), CONV, 41)
    save_adapter(tmp_path / "adapter", tensors, use_dora=True)
    expected = {n: t.double() for n, t in model.items()}
    for module in (Q, CONV):
        w = expected[f"{module}.weight"]
        moved = w.reshape(w.shape[0], -1) + 2 * product(tensors, module)
        m = tensors[f"{module}.lora_magnitude_vector"].double().reshape(-1, 1)
        expected[f"{module}.weight"] = (m * moved / moved.norm(dim=1, keepdim=True)).reshape(w.shape)
    assert_values(sources(recipe(tmp_path)), expected)
    with Inputs(parse_recipe(recipe(tmp_path))) as inputs:
        source = {e.name: e.experts[0].source for e in inputs.entries}[f"{Q}.weight"]
        whole = source.slice(0, len(source)).data
        parts = [source.slice(s, min(s + 101, len(source))).data for s in range(0, len(source), 101)]
        assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rounded_to_a_type_before_it_is_merged(model, tmp_path, dtype, ota_merge):
    """As a merged copy of that type would be; the rest of the model stays as it is."""
    tensors = lora(Q, 4, 10) | {f"{Q}.lora_B.bias": random((150,), 12)}
    save_adapter(tmp_path / "adapter", tensors, lora_bias=True)
    (tmp_path / "r.yaml").write_text(json.dumps(recipe(tmp_path, dtype="float32")))
    code, _, _ = ota_merge("run", tmp_path / "r.yaml", tmp_path / "out", "-q", "--lora-merge-dtype", dtype)
    assert code == 0
    out = load_merged(tmp_path / "out")
    type_ = getattr(torch, dtype)
    w = model[f"{Q}.weight"].float() + (2 * product(tensors, Q)).float()
    step = torch.finfo(type_).eps * w.abs() + 4e-7 * w.abs().max()
    assert torch.equal(out[f"{Q}.weight"].to(type_).float(), out[f"{Q}.weight"])
    assert ((out[f"{Q}.weight"] - w).abs() <= step).all()
    assert torch.equal(out[f"{UP}.weight"], model[f"{UP}.weight"].float())
    if dtype != "float32":
        assert not torch.equal(out[f"{Q}.bias"], model[f"{Q}.bias"].float() + 2 * tensors[f"{Q}.lora_B.bias"])


def test_rounding_is_to_nearest_even():
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3e38, np.inf, 2**-140], np.float32)
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    assert np.array_equal(round_to(values, "bfloat16"), expected)
    assert round_to(values, "bfloat16").dtype == np.float32
    assert np.isnan(round_to(np.array([np.nan], np.float32), "bfloat16")).all()


def test_embeddings(model, tmp_path):
    name = "model.embed_tokens"
    a, b = random((4, 70), 1), random((12, 4), 2)
    saved = random((70, 12), 3)
    tensors = {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b}
    save_adapter(tmp_path / "adapter", tensors)
    delta = 2 * (b.double() @ a.double()).T
    assert_values(sources(recipe(tmp_path)), {f"{name}.weight": model[f"{name}.weight"].double() + delta})
    save_adapter(tmp_path / "adapter", tensors | {f"{name}.base_layer.weight": saved})
    assert_values(sources(recipe(tmp_path)), {f"{name}.weight": saved.double() + delta})


def test_own_tensors_and_biases(model, tmp_path):
    head, bias, added = random((70, 12), 1), random((150,), 2), random((150,), 3)
    tensors = lora(Q, 4, 10) | {"lm_head.modules_to_save.weight": head, f"{Q}.bias": bias}
    save_adapter(tmp_path / "adapter", tensors, bias="lora_only")
    exact = {
        "lm_head.weight": head.double(),
        f"{Q}.bias": bias.double(),
        "model.norm.weight": model["model.norm.weight"].double(),
    }
    assert_values(sources(recipe(tmp_path)), exact)
    save_adapter(tmp_path / "adapter", lora(Q, 4, 10) | {f"{Q}.lora_B.bias": added}, lora_bias=True)
    exact = {f"{Q}.bias": model[f"{Q}.bias"].double() + 2 * added.double()}
    assert_values(sources(recipe(tmp_path)), exact)


def test_any_slice_has_the_same_bits(model, tmp_path):
    """Tiles, samples and candidates see one value for each element."""
    save_adapter(tmp_path / "adapter", lora(Q, 4, 10) | lora(CONV, 4, 30))
    with Inputs(parse_recipe(recipe(tmp_path))) as inputs:
        for name in (f"{Q}.weight", f"{CONV}.weight"):
            entry = next(e for e in inputs.entries if e.name == name)
            source = entry.experts[0].source
            assert is_computed(source)
            assert len(source) == entry.numel
            whole = source.slice(0, len(source)).data.view(np.float32)
            rng = np.random.default_rng(0)
            for _ in range(30):
                start, stop = sorted(rng.integers(0, len(source) + 1, 2))
                part = source.slice(int(start), int(stop)).data.view(np.float32)
                assert part.tobytes() == whole[start:stop].tobytes()
            positions = rng.integers(0, len(source), 50)
            assert source.gather(positions).data.view(np.float32).tobytes() == whole[positions].tobytes()
            assert len(next(source.parts(3, 5))) == 2 * source.columns


def test_merged_with_another_model(model, tmp_path):
    """One rounding at the end, to the type that the model has."""
    tensors = lora(Q, 4, 10) | lora(UP, 4, 20)
    save_adapter(tmp_path / "adapter", tensors)
    other = {name: random(shape, 50 + i).bfloat16() for i, (name, shape) in enumerate(SHAPES.items())}
    save_model(tmp_path / "other", other)
    data = recipe(tmp_path)
    data["models"].append({"model": str(tmp_path / "other"), "parameters": {"weight": 3}})
    merge(data, tmp_path / "out", backend="reference")
    out = load_merged(tmp_path / "out")
    for name, tensor in out.items():
        exact = model[name].double()
        if name.removesuffix(".weight") in (Q, UP):
            exact = exact + 2 * product(tensors, name.removesuffix(".weight"))
        exact = (exact + 3 * other[name].double()) / 4
        assert tensor.dtype == torch.bfloat16
        assert ((tensor.double() - exact).abs() <= 2.0**-8 * exact.abs() * (1 + 1e-4) + 1e-9).all(), name


def test_task_vectors_of_adapters(model, tmp_path):
    """The base is the model itself, so that the edit is s B A."""
    tensors = lora(Q, 4, 10)
    save_adapter(tmp_path / "adapter", tensors)
    data = recipe(
        tmp_path, merge_method="task_arithmetic", base_model=str(tmp_path / "model"), dtype="float32"
    )
    data["models"][0]["parameters"] = {"weight": 0.5}
    merge(data, tmp_path / "out", backend="reference")
    out = load_merged(tmp_path / "out")
    exact = {name: tensor.double() for name, tensor in model.items()}
    exact[f"{Q}.weight"] += 0.5 * 2 * product(tensors, Q)
    assert_values({name: tensor.double() for name, tensor in out.items()}, exact)


def test_a_changed_adapter_is_another_merge(model, tmp_path):
    save_adapter(tmp_path / "adapter", lora(Q, 4, 10))
    with Inputs(parse_recipe(recipe(tmp_path))) as inputs:
        before = inputs.fingerprint()
        assert str(tmp_path / "adapter") in inputs.adapter_folders
    save_adapter(tmp_path / "adapter", lora(Q, 4, 11) | lora(UP, 4, 2))
    with Inputs(parse_recipe(recipe(tmp_path))) as inputs:
        assert inputs.fingerprint() != before


WRONG = {
    "dora": ({}, {"use_dora": True}, f"{Q} and `use_dora` do not agree"),
    "ia3": ({}, {"peft_type": "IA3"}, "an adapter of the kind 'IA3'; only LoRA"),
    "pissa": ({}, {"init_lora_weights": "pissa_niter_4"}, "started by pissa_niter_4"),
    "rank": ({}, {"r": 8}, "has rank 4, but adapter_config.json says 8"),
    "alpha": ({}, {"lora_alpha": "big"}, "lora_alpha"),
    "module": (
        {
            "model.layers.9.x.lora_A.weight": torch.ones(4, 2),
            "model.layers.9.x.lora_B.weight": torch.ones(2, 4),
        },
        {},
        "changes model.layers.9.x, which the model does not have",
    ),
    "tensor": (
        {"model.layers.0.odd": torch.ones(2)},
        {},
        "holds 'model.layers.0.odd', which is no LoRA weight",
    ),
    "magnitude": (
        {f"{Q}.lora_magnitude_vector": torch.ones(150)},
        {},
        f"{Q} and `use_dora` do not agree",
    ),
    "dora rows": (
        {f"{Q}.lora_magnitude_vector": torch.ones(149)},
        {"use_dora": True},
        f"DoRA's magnitude for {Q}.weight has 149 elements, the tensor 150 rows",
    ),
    "dora transposed": (
        {f"{Q}.lora_magnitude_vector": torch.ones(150)},
        {"use_dora": True, "fan_in_fan_out": True},
        "DoRA on an embedding or a transposed weight",
    ),
    "half": ({f"{UP}.lora_A.weight": torch.ones(4, 12)}, {}, "has one of the two factors"),
    "shape": (
        {f"{UP}.lora_A.weight": torch.ones(4, 12), f"{UP}.lora_B.weight": torch.ones(34, 4)},
        {},
        f"B A for {UP}.weight has shape [34, 12], the tensor [33, 12]",
    ),
    "factors": (
        {f"{UP}.lora_A.weight": torch.ones(4, 12), f"{UP}.lora_B.weight": torch.ones(33, 3)},
        {},
        "the factors of",
    ),
    "bias": (
        {
            f"{UP}.lora_A.weight": torch.ones(4, 12),
            f"{UP}.lora_B.weight": torch.ones(33, 4),
            f"{UP}.lora_B.bias": torch.ones(33),
        },
        {},
        "adds a bias to",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_refused(model, tmp_path, wrong):
    tensors, config, text = WRONG[wrong]
    save_adapter(tmp_path / "adapter", lora(Q, 4, 10) | tensors, **config)
    with pytest.raises(InputError) as caught:
        sources(recipe(tmp_path))
    assert text in str(caught.value)
    assert str(tmp_path / "adapter") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_adapter(model, tmp_path):
    data = recipe(tmp_path)
    data["models"][0]["model"] = f"{tmp_path / 'model'}+{tmp_path / 'model'}"
    with pytest.raises(InputError, match="so it is no adapter"):
        sources(data)
    save_adapter(tmp_path / "adapter", lora(Q, 4, 10))
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="has neither"):
        sources(recipe(tmp_path))


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_selection_sees_what_a_merged_folder_would_hold(model, tmp_path, backend, scope):
    """The same bytes as from files of the computed values, for all tiles: samples, brackets, candidates and
    tiles are of one kind."""
    save_adapter(tmp_path / "adapter", lora(Q, 4, 10) | lora(UP, 4, 20) | lora(CONV, 4, 30))
    with Inputs(parse_recipe(recipe(tmp_path))) as inputs:
        made = {}
        for entry in inputs.entries:
            source = entry.experts[0].source
            values = np.array(source.slice(0, len(source)).float32())
            made[entry.name] = torch.from_numpy(values).reshape(entry.shape)
    save_model(tmp_path / "made", made)
    moments = {name: (random(shape, 80 + i) ** 2 + 1e-12) for i, (name, shape) in enumerate(SHAPES.items())}
    save_file(moments, tmp_path / "v.safetensors")
    outputs = []
    for number, (name, tiles) in enumerate(
        [(str(tmp_path / "made"), None), (f"{tmp_path / 'model'}+{tmp_path / 'adapter'}", None), (None, 256)]
    ):
        name = name or f"{tmp_path / 'model'}+{tmp_path / 'adapter'}"
        data = {
            "merge_method": "ota",
            "base_model": str(tmp_path / "model"),
            "models": [
                {"model": name, "parameters": {"preconditioner_path": str(tmp_path / "v.safetensors")}}
            ],
            "parameters": {"density": 0.3, "density_scope": scope, "normalise": "global"},
            "dtype": "float32",
        }
        merge(data, tmp_path / f"out{number}", backend=backend, tile_elements=tiles)
        outputs.append(load_merged(tmp_path / f"out{number}"))
    for name in SHAPES:
        assert torch.equal(outputs[0][name], outputs[1][name]), name
        assert torch.equal(outputs[0][name], outputs[2][name]), name
    assert not torch.equal(outputs[0][f"{Q}.weight"], made[f"{Q}.weight"])
