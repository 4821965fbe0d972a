"""Second moments that are not one number for each element: 8-bit Adam's and Adafactor's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import save_model
from optimizers import STEPS, assert_extracted, live, train
from safetensors.torch import load_file
from torch import nn

from ota_kernels import InputError
from ota_kernels.moments import extract
from ota_kernels.moments.readers import values as values_module

# 8-bit Adam.


def eight_bit_state(shape, block, nested):
    """A state as bitsandbytes lays it out, and the second moments that it means."""
    numel = int(np.prod(shape))
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    qmap, absmax = torch.rand(256), torch.rand(-(-numel // block)) + 0.5
    state = {"state1": codes, "state2": codes, "qmap2": qmap, "absmax2": absmax}
    flat = codes.flatten()
    values = [qmap[int(code)] * absmax[i // block] for i, code in enumerate(flat.tolist())]
    expected = torch.stack(values).reshape(shape)
    return ({"step": 7, "__bnb_optimizer_quant_state__": state} if nested else {"step": 7} | state), expected


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("block", [256, 2048])
def test_eight_bit_layouts(tmp_path, monkeypatch, block, nested):
    """In three pieces, of which the last ends within a block."""
    monkeypatch.setattr(values_module, "PIECE_ELEMENTS", 2048)
    state, expected = eight_bit_state((67, 71), block, nested)
    small = torch.rand(5)
    states = {"w": state, "b": {"step": 7, "state2": small}}
    torch.save(
        {"state": states, "param_groups": [{"params": ["w", "b"], "betas": [0.9, 0.995]}]}, tmp_path / "a.pt"
    )
    summary = extract(tmp_path / "a.pt", tmp_path / "v.safetensors")
    assert_extracted(tmp_path / "v.safetensors", {"w": expected, "b": small})
    assert (summary.step, summary.beta2) == (7, 0.995)


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"absmax2": torch.rand(5)}, "5 values of absmax2 do not divide 4757 elements"),
        ({"absmax2": None}, "has no absmax2"),
        ({"qmap2": torch.rand(16)}, "qmap2 has 16 values, not 256"),
        ({"qmap2": None}, "qmap2 is not a plain tensor"),
        ({"absmax2": torch.rand(19).double()}, "absmax2 is float64, not float32"),
        ({"state2": torch.zeros(67, 71, dtype=torch.int8)}, "state2 is int8, not uint8 or float32"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_eight_bit_states_that_do_not_fit(tmp_path, change, fact):
    state, _ = eight_bit_state((67, 71), 256, nested=False)
    torch.save({"state": {"w": state | change}}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=rf"state\['w'\].*{fact}"):
        extract(tmp_path / "a.pt", tmp_path / "v.safetensors")


def test_eight_bit_adam_of_bitsandbytes(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(70, 90), nn.Linear(90, 3))
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), betas=(0.9, 0.99))
    train(model, optimizer)
    save_model(tmp_path / "model", model.state_dict())
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    expected = live(model, optimizer, "state2")
    state = optimizer.state[model[0].weight]
    assert state["state2"].dtype == torch.uint8
    expected["0.weight"] = bitsandbytes.functional.dequantize_blockwise(
        state["state2"], absmax=state["absmax2"], code=state["qmap2"], blocksize=256
    )
    summary = extract(tmp_path / "optimizer.pt", tmp_path / "v.safetensors", tmp_path / "model")
    assert_extracted(tmp_path / "v.safetensors", expected)
    assert (summary.step, summary.beta2) == (STEPS, 0.99)


# Adafactor.


def product(out, name):
    """R_i C_j / sum(R), as a merge computes it, in float64."""
    found = load_file(out)
    rows, columns = (found[f"{name}.exp_avg_sq_{kind}"].double() for kind in ("row", "col"))
    assert columns.sum().item() == pytest.approx(rows.sum().item(), rel=1e-5)
    return rows[:, None] * columns / rows.sum()


def test_adafactor_of_transformers(net, tmp_path):
    transformers = pytest.importorskip("transformers")
    optimizer = transformers.Adafactor(net.parameters(), lr=1e-3, relative_step=False, scale_parameter=False)
    train(net, optimizer)
    states = {n: optimizer.state[p] for n, p in net.named_parameters() if p in optimizer.state}
    torch.save({"state": states}, tmp_path / "a.pt")
    summary = extract(tmp_path / "a.pt", tmp_path / "v.safetensors")
    for name, state in states.items():
        if "exp_avg_sq" in state:
            assert torch.equal(load_file(tmp_path / "v.safetensors")[name], state["exp_avg_sq"])
        else:
            factors = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
            own = optimizer._approx_sq_grad(*factors).double() ** -2
            torch.testing.assert_close(product(tmp_path / "v.safetensors", name), own, rtol=1e-5, atol=0)
    assert (summary.step, summary.beta2, summary.tensors) == (STEPS, None, len(states))


def test_adafactor_of_torch(net, tmp_path):
    """Its update is proportional to gradient / sqrt(v), which shows the v that it uses."""
    optimizer = torch.optim.Adafactor(net.parameters(), lr=0.1, weight_decay=0.0)
    train(net, optimizer, steps=STEPS - 1)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    train(net, optimizer, steps=1)
    states = {n: optimizer.state[p] for n, p in net.named_parameters() if p in optimizer.state}
    torch.save({"state": states}, tmp_path / "a.pt")
    extract(tmp_path / "a.pt", tmp_path / "v.safetensors")
    for name, parameter in net.named_parameters():
        if name not in states:
            continue
        if parameter.dim() == 1:
            assert torch.equal(load_file(tmp_path / "v.safetensors")[name], states[name]["variance"])
            continue
        update = (parameter.detach() - before[name]).double()
        large = update.abs() > 1e-3  # smaller updates are lost in the rounding of the weights
        own = (parameter.grad.double() / update)[large] ** 2
        ratio = product(tmp_path / "v.safetensors", name)[large] / own
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=2e-3, atol=0)


@pytest.mark.parametrize("names", [("row_var", "col_var"), ("exp_avg_sq_row", "exp_avg_sq_col")])
def test_adafactor_of_more_than_two_dimensions(tmp_path, names):
    factors = (
        (torch.rand(3, 5, 1), torch.rand(3, 1, 7))
        if names[0] == "row_var"
        else (torch.rand(3, 5), torch.rand(3, 7))
    )
    torch.save({"state": {"conv": dict(zip(names, factors, strict=True))}}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"state\['conv'\].*shape \[3, 5, 7\].*only matrices and vectors"):
        extract(tmp_path / "a.pt", tmp_path / "v.safetensors")
