"""More sources: torchao's quantized states, Lightning, several optimizers, types that are not read."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from checkpoints import save_model
from optimizers import STEPS, adam_state, assert_extracted, live, saved_states, train
from safetensors.torch import load_file
from torch import nn

from ota_kernels import InputError, merge
from ota_kernels.io.inert import Inert
from ota_kernels.io.reader import Checkpoint
from ota_kernels.moments import extract
from ota_kernels.moments.readers import quantized

# torchao.


def quantized_state(kind, shape, block):
    """A state as torchao lays it out, and the second moments that it means, one by one."""
    numel = torch.Size(shape).numel()
    scale = torch.rand(numel // block) + 0.1
    made = type("Inert", (Inert,), {"path": f"torchao.optim.subclass.OptimState{kind}"})()
    if kind == "Fp8":
        codes = torch.rand(shape).to(torch.float8_e4m3fn)
        parts = {"codes": codes, "scale": scale}
        found = codes.float().flatten().tolist()
    elif kind == "8bit":
        codes, qmap = torch.randint(0, 256, shape, dtype=torch.uint8), torch.rand(256)
        parts = {"codes": codes, "scale": scale, "qmap": qmap}
        found = [qmap[code].item() for code in codes.flatten().tolist()]
    else:
        codes, qmap = torch.randint(0, 256, (numel // 2,), dtype=torch.uint8), torch.rand(16)
        parts = {"codes": codes, "scale": scale, "qmap": qmap, "_shape": torch.Size(shape)}
        found = [qmap[half].item() for code in codes.tolist() for half in (code >> 4, code & 15)]
    made.__setstate__(parts | {"signed": False, "block_size": block})
    expected = torch.tensor([value * scale[i // block].item() for i, value in enumerate(found)])
    return made, expected.reshape(shape)


@pytest.mark.parametrize("kind", ["8bit", "4bit", "Fp8"])
def test_layouts_of_torchao(kind):
    """In pieces that begin and end within blocks and, of 4 bits, within a byte."""
    state, expected = quantized_state(kind, (12, 16), 16)
    assert quantized.shape_of(state) == (12, 16)
    read = quantized.reader(state, "x")
    flat = expected.flatten()
    for start, stop in ((0, 192), (0, 1), (1, 2), (15, 33), (7, 7), (191, 192)):
        torch.testing.assert_close(torch.from_numpy(read(start, stop)), flat[start:stop], rtol=1e-6, atol=0)


@pytest.mark.parametrize("fault", ["scale", "codes", "qmap"])
def test_states_of_torchao_that_do_not_fit(fault):
    state, _ = quantized_state("8bit", (12, 16), 16)
    wrong = {"scale": torch.rand(5), "codes": torch.zeros(7, dtype=torch.uint8), "qmap": torch.rand(16)}
    state.state[fault] = wrong[fault]
    if fault == "codes":
        state.state["_shape"] = (12, 16)
    with pytest.raises(InputError, match=r"do not fit|qmap has 16"):
        quantized.reader(state, "x")


@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_torchao_itself(tmp_path, kind):
    optim = pytest.importorskip("torchao.optim")
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 3))
    optimizer = getattr(optim, kind)(model.parameters(), betas=(0.9, 0.98))
    train(model, optimizer)
    save_model(tmp_path / "model", model.state_dict())
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    summary = extract(tmp_path / "a.pt", tmp_path / "v.safetensors")
    expected = {
        name: value.dequantize()
        if hasattr(value, "dequantize") and type(value) is not torch.Tensor
        else value
        for name, value in live(model, optimizer).items()
    }
    assert type(live(model, optimizer)["0.weight"]) is not torch.Tensor
    found = load_file(tmp_path / "v.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.float(), rtol=1e-6, atol=0)
    assert (summary.step, summary.beta2) == (STEPS, 0.98)


# Lightning, several optimizers.


def two_optimizers():
    torch.manual_seed(0)
    model = nn.ModuleDict({"g": nn.Linear(3, 4), "d": nn.Linear(4, 5)})
    optimizers = [torch.optim.Adam(model[part].named_parameters(prefix=part)) for part in "gd"]
    for optimizer in optimizers:
        train(model, optimizer)
    return model, optimizers


@pytest.mark.parametrize("holder", ["optimizer_states", "optimizers", "by name"])
def test_several_optimizers(tmp_path, holder):
    model, optimizers = two_optimizers()
    states = [optimizer.state_dict() for optimizer in optimizers]
    content = dict(zip("gd", states, strict=True)) if holder == "by name" else states
    torch.save({holder.replace(" ", "_"): content, "epoch": 3}, tmp_path / "a.pt")
    extract(tmp_path / "a.pt", tmp_path / "v.safetensors")
    expected = {}
    for optimizer in optimizers:
        expected |= live(model, optimizer)
    assert_extracted(tmp_path / "v.safetensors", expected)


def test_several_optimizers_of_one_parameter(tmp_path):
    state = adam_state()
    group = {"params": ["w"], "betas": (0.9, 0.99)}
    torch.save([{"state": {"w": state}, "param_groups": [group]}] * 2, tmp_path / "a.pt")
    with pytest.raises(InputError, match="'w' occurs twice"):
        extract(tmp_path / "a.pt", tmp_path / "v.safetensors")


def test_a_checkpoint_of_lightning(tmp_path):
    """As lightning 2 lays it out: weights with the module's prefix, states by number, and callbacks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    content = {
        "epoch": 1,
        "global_step": STEPS,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"net.{name}": tensor for name, tensor in model.state_dict().items()},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "x", "best_model_score": None}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"last_epoch": 1}],
        "hyper_parameters": {"lr": 1e-3},
    }
    torch.save(content, tmp_path / "last.ckpt")
    save_model(tmp_path / "model", model.state_dict())
    for given in (None, tmp_path / "model"):
        extract(tmp_path / "last.ckpt", tmp_path / "v.safetensors", given, overwrite=True)
        prefix = "net." if given is None else ""
        assert_extracted(
            tmp_path / "v.safetensors", {f"{prefix}{n}": v for n, v in live(model, optimizer).items()}
        )


# Types of safetensors files that nothing here computes with.


TYPES = {
    "F8_E8M0": ([16], 16),
    "F8_E4M3FNUZ": ([4], 4),
    "F8_E5M2FNUZ": ([4], 4),
    "C64": ([2], 16),
    "F4": ([32], 16),
    "F6_E2M3": ([4], 3),
    "F6_E3M2": ([8, 3], 18),
}


def with_type(folder, tag, shape, size):
    """A model's file with one more tensor of another type behind."""
    folder.mkdir(exist_ok=True)
    values = torch.rand(4, 5)
    header = {
        "w": {"dtype": "F32", "shape": [4, 5], "data_offsets": [0, 80]},
        "odd": {"dtype": tag, "shape": shape, "data_offsets": [80, 80 + size]},
    }
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + values.numpy().tobytes() + bytes(range(size))
    (folder / "model.safetensors").write_bytes(data)
    return folder


@pytest.mark.parametrize("tag", TYPES)
def test_types_that_are_not_read(tmp_path, tag):
    """Beside what is read they do no harm."""
    state = adam_state()
    path = saved_states(tmp_path / "a.pt", {"w": state})
    model = with_type(tmp_path / "model", tag, *TYPES[tag])
    summary = extract(path, tmp_path / "v.safetensors", model)
    assert_extracted(tmp_path / "v.safetensors", {"w": state["exp_avg_sq"]})
    assert (summary.parameters, summary.missing) == (1, {})
    info = Checkpoint.open(model, "model").tensors["odd"]
    assert (list(info.shape), info.nbytes) == TYPES[tag]


@pytest.mark.parametrize("tag", TYPES)
def test_a_merge_copies_whole_bytes_or_refuses(tmp_path, tag):
    """A tensor of half bytes cannot be cut where an element ends."""
    models = [with_type(tmp_path / name, tag, *TYPES[tag]) for name in ("base", "one", "two")]
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(m), "parameters": {"weight": 1.0}} for m in models[1:]],
    }
    if tag.startswith(("F4", "F6")):
        with pytest.raises(InputError, match=f"'odd'.*{tag}"):
            merge(recipe, tmp_path / "out")
        return
    merge(recipe, tmp_path / "out")
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert bytes(range(TYPES[tag][1])) in data


@pytest.mark.parametrize("size", [15, 17])
def test_sizes_of_half_bytes_are_checked(tmp_path, size):
    model = with_type(tmp_path / "model", "F4", [32], size)
    with pytest.raises(InputError, match=r"F4 of shape \[32\] takes 16 bytes"):
        Checkpoint.open(model, "model")


def test_metadata_that_is_null(tmp_path):
    """Some writers say null where they have none, and the library reads it."""
    text = json.dumps(
        {"__metadata__": None, "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    ).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    assert set(load_file(tmp_path / "model.safetensors")) == {"w"}
    assert Checkpoint.open(tmp_path, "model").metadata_of("w") == {}
