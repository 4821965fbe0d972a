"""Runs that are over: order from weights in the file or beside it, --names, --base; strides; folders."""

from __future__ import annotations

import pytest
import torch
from checkpoints import save_model
from optimizers import adam_state, assert_extracted, live, saved_states, train
from torch import nn

from ota_kernels import InputError
from ota_kernels.moments import extract
from ota_kernels.moments.readers.matching import match_group_by_group, match_in_order


class Block(nn.Module):
    """Names whose order in files is not the model's: proj before fc, z before a."""

    def __init__(self):
        super().__init__()
        self.z = nn.Linear(4, 4, bias=False)
        self.norm = nn.LayerNorm(4)
        self.a = nn.Linear(4, 4, bias=False)


class Blocks(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.h = nn.ModuleList(Block() for _ in range(layers))
        self.last = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7, bias=False)


GROUPS = {
    "one": lambda m: [{"params": [p for p in m.parameters() if p.requires_grad]}],
    "by dimensions": lambda m: [
        {"params": [p for p in m.parameters() if p.requires_grad and p.dim() > 1]},
        {"params": [p for p in m.parameters() if p.requires_grad and p.dim() < 2], "weight_decay": 0.0},
    ],
    "one for each tensor": lambda m: [{"params": [p]} for p in m.parameters() if p.requires_grad],
    "one for each layer": lambda m: [
        {"params": [*m.tokens.parameters()]},
        *({"params": [*block.parameters()]} for block in m.h),
        {"params": [*m.last.parameters(), *m.head.parameters()]},
    ],
    "one for each layer, from the top": lambda m: [
        {"params": [*m.last.parameters(), *m.head.parameters()]},
        *({"params": [*block.parameters()]} for block in reversed(m.h)),
        {"params": [*m.tokens.parameters()]},
    ],
}


def trained(grouping, model=None):
    torch.manual_seed(0)
    model = model or Blocks()
    optimizer = torch.optim.AdamW(GROUPS[grouping](model), lr=0.1)
    train(model, optimizer)
    return model, optimizer


HOLDERS = {
    "nanoGPT": lambda m, o: {"model": m.state_dict(), "optimizer": o.state_dict(), "iter_num": 3},
    "tutorial": lambda m, o: {"model_state_dict": m.state_dict(), "optimizer_state_dict": o.state_dict()},
    "timm": lambda m, o: {
        "epoch": 1,
        "arch": "x",
        "state_dict": m.state_dict(),
        "optimizer": o.state_dict(),
        "state_dict_ema": {n: t * 0 for n, t in m.state_dict().items()},
    },
    "compiled": lambda m, o: {
        "model": {f"_orig_mod.{n}": t for n, t in m.state_dict().items()},
        "optimizer": o.state_dict(),
    },
    "nested": lambda m, o: {"train": {"net": {"weights": m.state_dict()}, "optim": {"adam": o.state_dict()}}},
}


@pytest.mark.parametrize("grouping", GROUPS)
@pytest.mark.parametrize("holder", HOLDERS)
def test_weights_in_the_same_file(tmp_path, grouping, holder):
    model, optimizer = trained(grouping)
    torch.save(HOLDERS[holder](model, optimizer), tmp_path / "ckpt.pt")
    summary = extract(tmp_path / "ckpt.pt", tmp_path / "v.safetensors")
    assert_extracted(tmp_path / "v.safetensors", live(model, optimizer))
    assert "numbers were named in the order of the checkpoint's own weights" in summary.notes


@pytest.mark.parametrize("given", ["with the model", "beside"])
def test_weights_beside_the_optimizer(tmp_path, given):
    model, optimizer = trained("by dimensions")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    if given == "with the model":
        save_model(tmp_path, model.state_dict())
    extract(tmp_path, tmp_path / "v.safetensors")
    assert_extracted(tmp_path / "v.safetensors", live(model, optimizer))


def test_tied_weights_in_the_same_file(tmp_path):
    """A state dict has the shared matrix twice, the optimizer once."""
    model = Blocks()
    model.head.weight = model.tokens.weight
    model, optimizer = trained("by dimensions", model)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "ckpt.pt")
    extract(tmp_path / "ckpt.pt", tmp_path / "v.safetensors")
    assert_extracted(tmp_path / "v.safetensors", live(model, optimizer))


def test_weights_that_do_not_fit_are_no_order(tmp_path):
    _, optimizer = trained("one")
    other = Blocks(layers=2)
    torch.save({"model": other.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match="has 16 parameters, the model 12"):
        extract(tmp_path / "ckpt.pt", tmp_path / "v.safetensors")


# --names.


def names_file(path, groups):
    path.write_text("\n\n".join("\n".join(group) for group in groups) + "\n")
    return path


@pytest.mark.parametrize("grouping", ["one", "by dimensions"])
def test_given_names(tmp_path, grouping):
    model, optimizer = trained(grouping)
    save_model(tmp_path / "model", model.state_dict())
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    names = [n for n, _ in model.named_parameters()]
    with pytest.raises(InputError, match="or --names"):
        extract(tmp_path / "a.pt", tmp_path / "v.safetensors", tmp_path / "model")
    file = names_file(tmp_path / "names", [names])
    extract(tmp_path / "a.pt", tmp_path / "v.safetensors", tmp_path / "model", names=file)
    assert_extracted(tmp_path / "v.safetensors", live(model, optimizer))


def test_given_names_by_group_need_no_model(tmp_path):
    """Also where no order of the model explains them."""
    model = Blocks()
    names = dict(model.named_parameters())
    groups = [["h.1.a.weight", "h.0.z.weight"], ["h.0.a.weight"], ["head.weight", "h.2.z.weight"]]
    optimizer = torch.optim.AdamW([{"params": [names[n] for n in group]} for group in groups])
    train(model, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    file = names_file(tmp_path / "names", groups)
    extract(tmp_path / "a.pt", tmp_path / "v.safetensors", names=file)
    assert_extracted(tmp_path / "v.safetensors", live(model, optimizer))


def test_given_names_that_do_not_fit(tmp_path):
    model, optimizer = trained("by dimensions")
    save_model(tmp_path / "model", model.state_dict())
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    names = [n for n, _ in model.named_parameters()]
    for groups, message in (
        ([names[:-1]], "has 16 parameters, --names 15"),
        ([[*names[:-1], "nothing"]], "--names has 'nothing', which"),
        ([names[:3], names[3:]], r"its groups have \[8, 8\] parameters, --names \[3, 13\]"),
        ([[*names[:-1], names[0]]], "names 'tokens.weight' twice"),
        ([[]], "holds no names"),
    ):
        file = names_file(tmp_path / "names", groups)
        with pytest.raises(InputError, match=message):
            extract(tmp_path / "a.pt", tmp_path / "v.safetensors", tmp_path / "model", names=file)
    with pytest.raises(InputError, match=r"--names .*none: cannot be read"):
        extract(tmp_path / "a.pt", tmp_path / "v.safetensors", names=tmp_path / "none")


def test_options_that_could_not_be_used_are_errors(tmp_path):
    """Nothing that was asked for is left out without a word."""
    path = saved_states(tmp_path / "a.pt", {"w": adam_state()})
    with pytest.raises(InputError, match=r"--base is compared with the model that was trained: add --model"):
        extract(path, tmp_path / "v.safetensors", base=tmp_path)
    (tmp_path / "zero" / "w").mkdir(parents=True)
    torch.save({"param": torch.rand(4)}, tmp_path / "zero" / "w" / "exp_avg_sq.pt")
    file = names_file(tmp_path / "names", [["w"]])
    with pytest.raises(InputError, match=r"names its parameters itself: --names is for states by number"):
        extract(tmp_path, tmp_path / "v.safetensors", names=file)


# --base.


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["same type", "saved in bfloat16"])
@pytest.mark.parametrize("frozen", ["h.0.", "head", "z", "norm"])
def test_what_equals_the_base_was_frozen(tmp_path, frozen, dtype):
    torch.manual_seed(0)
    model = Blocks(layers=4)
    save_model(tmp_path / "base", model.state_dict())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    model, optimizer = trained("by dimensions", model)
    save_model(
        tmp_path / "model",
        {n: t.to(dtype) if dtype and t.is_floating_point() else t for n, t in model.state_dict().items()},
    )
    # The same file holds the order, but not which were trained.
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    summary = extract(
        tmp_path / "a.pt", tmp_path / "v.safetensors", tmp_path / "model", base=tmp_path / "base"
    )
    assert_extracted(tmp_path / "v.safetensors", live(model, optimizer))
    assert "parameters that equal the base's were taken to be frozen" in summary.notes


@pytest.mark.parametrize("frozen", ["layers.0.", "lm_head"])
def test_a_trainer_that_froze_layers(tmp_path, frozen):
    """All layers have the same shapes: the base tells which were trained, in the order of transformers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    groups = GROUPS["by dimensions"](model)
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    train(model, optimizer)
    model.save_pretrained(tmp_path / "checkpoint")
    torch.save(optimizer.state_dict(), tmp_path / "checkpoint" / "optimizer.pt")
    (tmp_path / "checkpoint" / "trainer_state.json").write_text("{}")
    if frozen == "layers.0.":
        with pytest.raises(InputError, match=r"more than one mapping.*add --base"):
            extract(tmp_path / "checkpoint", tmp_path / "v.safetensors")
    extract(tmp_path / "checkpoint", tmp_path / "v.safetensors", base=tmp_path / "base")
    assert_extracted(tmp_path / "v.safetensors", live(model, optimizer))


def test_weights_in_the_order_of_the_alphabet_are_no_order(tmp_path):
    """As scripts that convert leave them: shapes would fit, and prove nothing."""
    model = nn.ModuleDict({"q": nn.Linear(4, 4, bias=False), "k": nn.Linear(4, 4, bias=False)})
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    weights = dict(sorted(model.state_dict().items()))
    torch.save({"model": weights, "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="keyed by number, not by name"):
        extract(tmp_path / "a.pt", tmp_path / "v.safetensors")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "b.pth.tar")
    extract(tmp_path / "b.pth.tar", tmp_path / "v.safetensors")
    assert_extracted(tmp_path / "v.safetensors", live(model, optimizer))


def test_a_parameter_that_was_trained_without_a_change(tmp_path):
    """It equals the base's; as many others do not as there are states, less one."""
    model = Blocks()
    save_model(tmp_path / "base", model.state_dict())
    model.head.weight.requires_grad_(False)
    model, optimizer = trained("one", model)
    weights = model.state_dict()
    weights["last.weight"] = torch.ones(4)
    save_model(tmp_path / "model", weights)
    torch.save({"model": weights, "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    extract(tmp_path / "a.pt", tmp_path / "v.safetensors", tmp_path / "model", base=tmp_path / "base")
    assert_extracted(tmp_path / "v.safetensors", live(model, optimizer))


def test_names_that_cannot_be_left_out():
    parameters = {"a": (3,), "b": (3,), "c": (3,)}
    assert match_in_order([[(3,), (3,)]], parameters, "x", trained={"a", "c"}) == [["a", "c"]]
    with pytest.raises(InputError, match="more than one mapping"):
        match_in_order([[(3,), (3,)]], parameters, "x", trained={"a"})


# Groups that follow one another.


def test_groups_that_fit_both_ways_prove_nothing():
    parameters = {"a": (3,), "b": (4,), "c": (3,)}
    groups = [[(3,)], [(4,)], [(3,)]]
    assert match_group_by_group(groups, parameters) is None
    assert match_group_by_group(groups[:2], {"a": (3,), "b": (4,)}) == [["a"], ["b"]]
    assert match_group_by_group([[(4,)], [(3,)]], {"a": (3,), "b": (4,)}) == [["b"], ["a"]]
    assert match_group_by_group([[(4,)], [(4,)]], {"a": (3,), "b": (4,)}) is None
    assert match_group_by_group([[(3,)]], parameters) is None


# Order of memory.


def test_states_in_another_order_of_memory(tmp_path):
    """channels_last convolutions, a transposed matrix, an expanded one; in pieces."""
    states = {
        "conv": adam_state(exp_avg_sq=torch.rand(6, 3, 5, 5).to(memory_format=torch.channels_last)),
        "t": adam_state(exp_avg_sq=torch.rand(8, 6).t()),
        "rows": adam_state(exp_avg_sq=torch.rand(1, 6).expand(4, 6)),
        "every": adam_state(exp_avg_sq=torch.rand(12)[::2]),
        "half": adam_state(exp_avg_sq=torch.rand(5, 4).bfloat16().t()),
    }
    for state in states.values():
        state["exp_avg"] = torch.zeros_like(state["exp_avg_sq"])
    extract(saved_states(tmp_path / "a.pt", states), tmp_path / "v.safetensors")
    assert_extracted(tmp_path / "v.safetensors", {n: s["exp_avg_sq"].contiguous() for n, s in states.items()})


def test_pieces_of_a_transposed_state(tmp_path, monkeypatch):
    monkeypatch.setattr("ota_kernels.moments.readers.values.PIECE_ELEMENTS", 5)
    states = {"t": adam_state((4, 3), exp_avg_sq=torch.rand(3, 4).t())}
    extract(saved_states(tmp_path / "a.pt", states), tmp_path / "v.safetensors")
    assert_extracted(tmp_path / "v.safetensors", {"t": states["t"]["exp_avg_sq"].contiguous()})


# Folders.


def test_the_folder_of_a_run(tmp_path):
    state = adam_state()
    (tmp_path / "run" / "checkpoint-500").mkdir(parents=True)
    saved_states(tmp_path / "run" / "checkpoint-500" / "optimizer.pt", {"w": state})
    extract(tmp_path / "run", tmp_path / "v.safetensors")
    assert_extracted(tmp_path / "v.safetensors", {"w": state["exp_avg_sq"]})
    (tmp_path / "run" / "checkpoint-1000").mkdir()
    with pytest.raises(InputError, match=r"holds 2 checkpoints of a run: name one, like .*checkpoint-1000"):
        extract(tmp_path / "run", tmp_path / "w.safetensors")


def test_a_second_optimizer_beside_the_first_is_named(tmp_path):
    state = adam_state()
    saved_states(tmp_path / "optimizer.bin", {"w": state})
    saved_states(tmp_path / "optimizer_1.bin", {"x": state})
    summary = extract(tmp_path, tmp_path / "v.safetensors")
    assert_extracted(tmp_path / "v.safetensors", {"w": state["exp_avg_sq"]})
    (note,) = summary.notes
    assert note.startswith("optimizer_1.bin beside optimizer.bin")
    assert not extract(tmp_path / "optimizer_1.bin", tmp_path / "x.safetensors").notes


# Zeros.


def test_moments_that_are_all_zero(tmp_path):
    states = {"w": adam_state(exp_avg_sq=torch.zeros(4, 5)), "b": adam_state((3,), exp_avg_sq=torch.zeros(3))}
    path = saved_states(tmp_path / "a.pt", states | {"empty": adam_state((0, 2))})
    with pytest.raises(InputError, match="all second moments are 0"):
        extract(path, tmp_path / "v.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt"]


def test_parameters_whose_moments_are_zero_are_listed(tmp_path):
    states = {f"layers.{i}.w": adam_state() for i in range(4)}
    states["layers.1.w"]["exp_avg_sq"] = torch.zeros(4, 5)
    states["layers.3.w"]["exp_avg_sq"][1:] = 0
    factors = {"exp_avg_sq_row": torch.zeros(4), "exp_avg_sq_col": torch.zeros(5), "step": 1}
    summary = extract(saved_states(tmp_path / "a.pt", states | {"f": factors}), tmp_path / "v.safetensors")
    assert summary.zeros == ("layers.1.w", "f")
