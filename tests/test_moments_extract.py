"""Second moments out of checkpoints that real optimizers and trainers wrote: value for value, by the right
name or not at all."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from checkpoints import mounted_tiny_disk, save_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from ota_kernels import InputError, OutputError, RecipeError
from ota_kernels.cli import moments as command
from ota_kernels.io.curvature import CurvatureFile
from ota_kernels.moments import extract
from ota_kernels.moments.readers import formats
from ota_kernels.moments.readers import state as state_module
from ota_kernels.moments.readers.decay import decay_rules
from ota_kernels.moments.readers.matching import match_by_shape, match_in_order
from ota_kernels.moments.source import Moment, Piece, Source
from ota_kernels.moments.writing import write_moments

STEPS = 3


class Net(nn.Module):
    """Parameters of different shapes, a frozen one among them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.hidden = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.frozen = nn.Linear(6, 3, bias=False).requires_grad_(False)
        self.out = nn.Linear(3, 2)

    def forward(self, tokens):
        return self.out(self.frozen(self.norm(self.hidden(self.embed(tokens)))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def train(model, optimizer, steps=STEPS):
    """Some steps with random gradients; frozen parameters get none."""
    for _ in range(steps):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = 0.1 * torch.randn_like(parameter)
        optimizer.step()


def live(model, optimizer, key="exp_avg_sq"):
    """What the optimizer itself holds, by name."""
    return {n: optimizer.state[p][key] for n, p in model.named_parameters() if key in optimizer.state[p]}


def decay_groups(parameters):
    """As trainers group: matrices decay, vectors do not."""
    parameters = [(n, p) for n, p in parameters if p.requires_grad]
    return [
        {"params": [(n, p) for n, p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def nameless(groups):
    return [group | {"params": [p for _, p in group["params"]]} for group in groups]


def assert_extracted(out, expected):
    """The file holds these float32 bits under these names, and nothing else."""
    found = load_file(out)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor.detach().float()), name


def metadata_of(out):
    with safe_open(out, "pt") as file:
        return file.metadata()


# States with names.


def test_names_in_param_groups(net, tmp_path):
    optimizer = torch.optim.AdamW(decay_groups(net.named_parameters()), betas=(0.9, 0.95))
    if "param_names" not in optimizer.param_groups[0]:
        pytest.skip("torch < 2.7 keeps no names")
    train(net, optimizer)
    torch.save({"epoch": 2, "optimizer": optimizer.state_dict()}, tmp_path / "last.pt")
    summary = extract(tmp_path / "last.pt", tmp_path / "v.safetensors")
    expected = live(net, optimizer)
    assert_extracted(tmp_path / "v.safetensors", expected)
    assert metadata_of(tmp_path / "v.safetensors") == {
        "format": "pt",
        "source_format": "torch",
        "step": str(STEPS),
        "beta2": "0.95",
    }
    assert (summary.format, summary.step, summary.beta2) == ("torch", STEPS, 0.95)
    assert summary.tensors == len(expected)
    assert summary.elements == sum(tensor.numel() for tensor in expected.values())
    assert summary.nbytes == (tmp_path / "v.safetensors").stat().st_size
    assert (summary.missing, summary.extra, summary.varying) == ({}, (), ())


def test_a_merge_reads_what_was_extracted(net, tmp_path):
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99))
    train(net, optimizer)
    by_name = {n: optimizer.state[p] for n, p in net.named_parameters() if p in optimizer.state}
    torch.save(
        {"state": by_name, "param_groups": [{"params": list(by_name), "betas": (0.9, 0.99)}]},
        tmp_path / "a.pt",
    )
    extract(tmp_path / "a.pt", tmp_path / "v.safetensors")
    curvature = CurvatureFile.open(tmp_path / "v.safetensors", "models[0]")
    assert curvature.bias_correction("hidden.weight") == 1 - 0.99**STEPS


def test_names_of_wrapped_modules(net, tmp_path):
    """torch.compile, FSDP and DistributedDataParallel rename parameters; the model's files do not."""
    moments = {f"module._orig_mod.{n}": torch.rand_like(p) for n, p in net.named_parameters()}
    torch.save({"state": {n: {"exp_avg_sq": v} for n, v in moments.items()}}, tmp_path / "optimizer.bin")
    save_model(tmp_path, net.state_dict())
    summary = extract(tmp_path, tmp_path / "v.safetensors")
    assert_extracted(
        tmp_path / "v.safetensors", {n.removeprefix("module._orig_mod."): v for n, v in moments.items()}
    )
    assert (summary.step, summary.beta2, summary.missing, summary.extra) == (None, None, {}, ())


def test_steps_that_differ_are_left_out(net, tmp_path):
    optimizer = torch.optim.AdamW(decay_groups(net.named_parameters()))
    optimizer.param_groups[1]["betas"] = (0.9, 0.9)
    train(net, optimizer)
    net.embed.weight.requires_grad_(False)
    net.embed.weight.grad = None
    train(net, optimizer)
    by_name = {n: optimizer.state[p] for n, p in net.named_parameters() if p in optimizer.state}
    groups = [
        {"params": [n for n, _ in group["params"]], "betas": betas}
        for group, betas in zip(
            decay_groups(Net().named_parameters()), [(0.9, 0.999), (0.9, 0.9)], strict=True
        )
    ]
    torch.save({"state": by_name, "param_groups": groups}, tmp_path / "a.pt")
    summary = extract(tmp_path / "a.pt", tmp_path / "v.safetensors")
    assert (summary.step, summary.beta2, summary.varying) == (None, None, ("step", "beta2"))
    assert metadata_of(tmp_path / "v.safetensors") == {"format": "pt", "source_format": "torch"}
    with pytest.raises(InputError, match=r"metadata .step. is missing"):
        CurvatureFile.open(tmp_path / "v.safetensors", "models[0]").bias_correction("embed.weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_types_become_float32(tmp_path, dtype):
    values = torch.rand(5, 3).to(dtype)
    torch.save({"state": {"w": {"exp_avg_sq": values}}}, tmp_path / "a.pt")
    extract(tmp_path / "a.pt", tmp_path / "v.safetensors")
    assert_extracted(tmp_path / "v.safetensors", {"w": values})


def test_more_than_one_piece(tmp_path):
    """With scalars and empty tensors beside."""
    state = {"w": torch.rand(state_module.PIECE_ELEMENTS + 7), "s": torch.tensor(0.5), "e": torch.zeros(0, 3)}
    torch.save({"state": {n: {"exp_avg_sq": v} for n, v in state.items()}}, tmp_path / "a.pt")
    extract(tmp_path / "a.pt", tmp_path / "v.safetensors")
    assert_extracted(tmp_path / "v.safetensors", state)


# States that are keyed by number: the mapping is proved, or refused.

ALPHABET = [(2, 3), (3,), (4, 4)]


@st.composite
def numbered(draw):
    """Shapes of a model in order, the group of each parameter (-1: in none), and which were never stepped."""
    size = draw(st.integers(1, 6))
    shapes = draw(st.lists(st.sampled_from(ALPHABET), min_size=size, max_size=size))
    owners = draw(st.lists(st.integers(-1, 1), min_size=size, max_size=size))
    unstepped = draw(st.sets(st.integers(0, size - 1), max_size=1))
    return shapes, owners, unstepped


def grouped(items, owners):
    return [[item for item, owner in zip(items, owners, strict=True) if owner == group] for group in (0, 1)]


@given(numbered())
def test_a_mapping_is_taken_only_if_it_is_the_only_one(case):
    """Against all mappings there are, one by one."""
    shapes, owners, unstepped = case
    known = [None if i in unstepped else shape for i, shape in enumerate(shapes)]
    groups = grouped(known, owners)
    names = [f"p{i}" for i in range(len(shapes))]
    fitting = [
        guess
        for guess in itertools.product((-1, 0, 1), repeat=len(shapes))
        if [len(g) for g in grouped(shapes, guess)] == [len(g) for g in groups]
        and all(
            slot in (None, shape)
            for group, taken in zip(groups, grouped(shapes, guess), strict=True)
            for slot, shape in zip(group, taken, strict=True)
        )
    ]
    parameters = dict(zip(names, shapes, strict=True))
    if len(fitting) == 1:
        assert match_in_order(groups, parameters, "x") == grouped(names, owners)
    else:
        with pytest.raises(InputError, match="more than one mapping"):
            match_in_order(groups, parameters, "x")


def test_shapes_that_do_not_fit_the_order():
    parameters = {"a": (2, 3), "b": (3,), "c": (4, 4)}
    with pytest.raises(InputError, match=r"from parameter 'b' \[3\] on"):
        match_in_order([[(2, 3), (4, 4), (3,)]], parameters, "x")
    with pytest.raises(InputError, match="has 4 parameters, the model 3"):
        match_in_order([[(3,)] * 4], parameters, "x")


def test_many_equal_groups_are_refused_soon():
    """Layer-wise rates: every layer is a group, and all look alike."""
    layers, per_layer = 40, 3
    parameters = {f"{i}.{j}": (8, 8) for i in range(layers) for j in range(per_layer)}
    with pytest.raises(InputError, match="more than one mapping"):
        match_in_order([[(8, 8)] * per_layer] * layers, parameters, "x")


def test_shapes_that_occur_once_need_no_order():
    parameters = {"a": (2, 3), "b": (3,), "c": (4, 4), "d": (3,)}
    assert match_by_shape([[(4, 4), None], [(2, 3)]], parameters, "x", "") == [["c", None], ["a"]]
    with pytest.raises(InputError, match="install it"):
        match_by_shape([[(3,)]], parameters, "x", "install it")
    with pytest.raises(InputError, match="more than one mapping"):
        match_by_shape([[(4, 4), (4, 4)]], parameters, "x", "")
    with pytest.raises(InputError, match=r"shape \[5\], the model has none"):
        match_by_shape([[(5,)]], parameters, "x", "")


def test_numbers_of_a_model_without_config(net, tmp_path):
    """norm.weight, norm.bias and hidden.bias have one shape: refused; without them every shape is one."""
    optimizer = torch.optim.AdamW(net.parameters())
    train(net, optimizer)
    save_model(tmp_path / "model", net.state_dict())
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match=r"more than one mapping.*give --model a folder with config\.json"):
        extract(tmp_path / "optimizer.pt", tmp_path / "v.safetensors", tmp_path / "model")
    with pytest.raises(InputError, match="keyed by number, not by name: add --model"):
        extract(tmp_path / "optimizer.pt", tmp_path / "v.safetensors")

    optimizer = torch.optim.AdamW([net.out.bias, net.embed.weight, net.frozen.weight, net.out.weight])
    train(net, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    summary = extract(tmp_path / "optimizer.pt", tmp_path / "v.safetensors", tmp_path / "model")
    assert_extracted(tmp_path / "v.safetensors", live(net, optimizer))
    assert summary.parameters == len(net.state_dict())
    assert set(summary.missing) == {
        "hidden.weight",
        "hidden.bias",
        "norm.weight",
        "norm.bias",
        "frozen.weight",
    }


def make_llama(tied=False, layers=2, biases=False):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attention_bias=biases,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


GROUPINGS = {
    "one group": lambda model: [{"params": list(model.named_parameters())}],
    "matrices and vectors": lambda model: decay_groups(model.named_parameters()),
}


@pytest.mark.parametrize(
    "frozen", [(), ("model.embed_tokens", "model.layers.1.mlp.down_proj")], ids=["all", "frozen"]
)
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_numbers_in_the_order_that_transformers_builds(tmp_path, tied, grouping, frozen):
    model = make_llama(tied, biases=True)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    optimizer = torch.optim.AdamW(nameless(GROUPINGS[grouping](model)))
    train(model, optimizer)
    model.save_pretrained(tmp_path / "model")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    summary = extract(tmp_path / "optimizer.pt", tmp_path / "v.safetensors", tmp_path / "model")
    assert_extracted(tmp_path / "v.safetensors", live(model, optimizer))
    reason = "never stepped" if grouping == "one group" else "not in the optimizer"
    assert summary.missing == {f"{name}.weight": reason for name in frozen}
    assert summary.parameters == len(list(model.parameters()))


OLD_RULES = {
    "< 4.49, norms registered": lambda name: "bias" not in name and "norm" not in name,
    "< 4.49, norms forgotten": lambda name: "bias" not in name,
    "4.49": lambda name: not any(part in name for part in ("bias", "layernorm", "rmsnorm")),
}


@pytest.mark.parametrize("rule", OLD_RULES)
def test_groups_of_older_trainers(tmp_path, rule):
    """The rule of 4.49 gives model.norm.weight decay: by shape it could be any norm of the last layer."""
    model = make_llama()
    names = [n for n, _ in model.named_parameters()]
    by_name = dict(model.named_parameters())
    groups = [[n for n in names if OLD_RULES[rule](n)], [n for n in names if not OLD_RULES[rule](n)]]
    optimizer = torch.optim.AdamW([{"params": [by_name[n] for n in group]} for group in groups])
    train(model, optimizer)
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    (tmp_path / "trainer_state.json").write_text("{}")
    for checkpoint in (tmp_path, tmp_path / "optimizer.pt"):
        summary = extract(checkpoint, tmp_path / "v.safetensors", tmp_path, overwrite=True)
        assert summary.format == "trainer"
        assert_extracted(tmp_path / "v.safetensors", live(model, optimizer))
    if rule == "4.49":
        with pytest.raises(InputError, match="more than one mapping"):
            extract(tmp_path, tmp_path / "w.safetensors", format="torch")


@pytest.mark.parametrize("architecture", ["Llama", "GPT2"])
def test_one_rule_is_that_of_the_installed_trainer(architecture):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 9}
    model = (
        make_llama(biases=True)
        if architecture == "Llama"
        else transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    )
    own = set(transformers.Trainer.get_decay_parameter_names(None, model))
    rules = decay_rules(model)
    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    assert own & {name for name, _ in model.named_parameters()} in (
        rules[-1:] if version >= (4, 53) else rules
    )


def test_rules_that_disagree_decide_nothing():
    parameters = {"a": (3,), "b": (3,), "c": (3,)}
    groups = [[(3,)], [(3,), (3,)]]
    assert match_in_order(groups, parameters, "x", [{"b"}, {"a", "b"}, {"b"}, set()])[0] == ["b"]
    for rules in ([{"a"}, {"b"}], [{"a", "b"}], []):
        with pytest.raises(InputError, match="more than one mapping"):
            match_in_order(groups, parameters, "x", rules)
    # With one frozen, a rule may leave open which.
    assert match_in_order([[(3,)], [(3,)]], parameters | {"b": (4,)}, "x", [{"a", "b"}]) == [["a"], ["c"]]
    with pytest.raises(InputError, match="more than one mapping"):
        match_in_order([[(3,)], [(3,)]], parameters, "x", [{"a"}])


def test_a_model_that_transformers_builds_otherwise(tmp_path):
    model = make_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    for change, advice in (
        ({"architectures": ["NoSuchModel"]}, "no model class 'NoSuchModel'"),
        ({"architectures": ["Trainer"]}, "no model class 'Trainer'"),
        ({"intermediate_size": 40}, r"but the files hold \[48, 32\]"),
        ({"num_attention_heads": "many"}, "transformers cannot build LlamaForCausalLM"),
    ):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=f"more than one mapping.*{advice}"):
            extract(tmp_path / "optimizer.pt", tmp_path / "v.safetensors", folder)
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("frozen", [None, "model.layers.0"], ids=["all", "frozen"])
def test_a_checkpoint_of_the_trainer(tmp_path, tied, frozen):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = make_llama(tied, layers=3)
    if frozen:
        model.get_submodule(frozen).requires_grad_(False)
    data = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(4)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        save_steps=STEPS,
        per_device_train_batch_size=2,
        adam_beta2=0.98,
        weight_decay=0.1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    if frozen:
        with pytest.raises(InputError, match="more than one mapping"):
            extract(checkpoint, tmp_path / "v.safetensors")
        return
    summary = extract(checkpoint, tmp_path / "v.safetensors")
    assert_extracted(tmp_path / "v.safetensors", live(model, trainer.optimizer.optimizer))
    assert (summary.format, summary.step, summary.beta2) == ("trainer", STEPS, 0.98)
    assert (summary.missing, summary.extra) == ({}, ())


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
    monkeypatch.setattr(state_module, "PIECE_ELEMENTS", 2048)
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
        ({"qmap2": None}, "qmap2 is not a plain contiguous tensor"),
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


# Bad input, through the command line: exit code 2, one line, nothing written.


@pytest.fixture
def refused(refused_command, tmp_path):
    def refused(checkpoint, *options, out=tmp_path / "v.safetensors", facts=()):
        refused_command("moments", "extract", checkpoint, out, *options, facts=facts)

    return refused


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def saved(tmp_path, **moments):
    """A state with names."""
    torch.save({"state": {n: {"step": 1, "exp_avg_sq": v} for n, v in moments.items()}}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def test_no_checkpoint(refused, tmp_path):
    refused(tmp_path / "none", facts=[tmp_path / "none", "no such file or folder"])
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", facts=[tmp_path / "folder", *formats.FORMATS])
    for name in ("torch", "trainer"):
        refused(tmp_path / "folder", "--format", name, facts=[tmp_path / "folder", "optimizer.pt"])


def test_a_file_that_is_no_optimizer_state(refused, tmp_path):
    file = tmp_path / "optimizer.pt"
    file.write_bytes(b"not a torch file")
    refused(file, facts=[file, "not a complete, uncompressed torch file"])
    for content in ([1, 2], {"state": 5}, {"optimizer": {"w": torch.ones(2)}}):
        torch.save(content, file)
        refused(file, facts=[file, "not an optimizer's state"])


def test_a_damaged_file(refused, tmp_path):
    file = saved(tmp_path, w=torch.ones(100))
    file.write_bytes(file.read_bytes()[:-200])
    refused(file, facts=[file])


def test_a_pickle_with_code(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state": {"w": {"exp_avg_sq": RunsCode()}}}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", facts=["a.pt", "would run code to load"])


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        pytest.param({"state": {0: {"exp_avg_sq": torch.ones(2)}}}, ["param_groups"], id="no groups"),
        pytest.param({"state": {"w": 3}}, ["state['w']", "not a dict"], id="state"),
        pytest.param({"state": {"w": {}}}, ["no second moments"], id="empty state"),
        pytest.param({"state": {1.5: {}}}, ["1.5"], id="key"),
        pytest.param(
            {"state": {"w": {"momentum_buffer": torch.ones(2)}}}, ["momentum_buffer", "Adam"], id="no moments"
        ),
        pytest.param({"state": {"w": {"exp_avg_sq": 0.5}}}, ["exp_avg_sq is not a plain"], id="no tensor"),
        pytest.param(
            {"state": {"w": {"exp_avg_sq": torch.ones(2, dtype=torch.int32)}}},
            ["int32", "float32"],
            id="integers",
        ),
        pytest.param(
            {"state": {"w": {"exp_avg_sq": torch.ones(2), "step": "many"}}}, ["step", "'many'"], id="step"
        ),
        pytest.param(
            {"state": {"w": {"exp_avg_sq": torch.ones(2), "step": float("nan")}}},
            ["step is nan"],
            id="step nan",
        ),
        pytest.param(
            {"state": {"w": {"exp_avg_sq": torch.ones(2)}}, "param_groups": [{"params": ["w", "w"]}]},
            ["twice"],
            id="listed twice",
        ),
        pytest.param(
            {"state": {"w": {"exp_avg_sq": torch.ones(2)}}, "param_groups": [{"params": ["v"]}]},
            ["'w'", "none of the param_groups"],
            id="stray state",
        ),
        pytest.param(
            {"state": {"w": {"exp_avg_sq": torch.ones(2)}}, "param_groups": [{"params": [[]]}]},
            ["param_groups[0]", "params"],
            id="params",
        ),
        pytest.param(
            {
                "state": {0: {"exp_avg_sq": torch.ones(2)}},
                "param_groups": [{"params": [0], "param_names": [None]}],
            },
            ["param_groups[0]", "param_names"],
            id="param_names",
        ),
        pytest.param(
            {"state": {"_orig_mod.w": {"exp_avg_sq": torch.ones(2)}, "w": {"exp_avg_sq": torch.ones(2)}}},
            ["'w'", "name of its own"],
            id="one name twice",
        ),
    ],
)
def test_contradictory_states(refused, tmp_path, content, facts):
    torch.save(content, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", facts=[tmp_path / "a.pt", *facts])


@pytest.mark.parametrize("bad", [-1.0, -1e-40, float("nan"), float("inf")])
def test_values_that_are_no_second_moments(refused, tmp_path, bad):
    values = torch.ones(4, 5)
    values[2, 1] = values[3, 3] = bad
    refused(saved(tmp_path, good=torch.ones(3), w=values), facts=["'w'", "2 of 20", "element 11"])


def test_the_first_bad_value_of_all_pieces(tmp_path):
    values = np.ones(30, np.float32)
    values[[13, 25, 26]] = -2
    parts = tuple(Piece(i, 10, lambda i=i: values[i : i + 10]) for i in (0, 10, 20))
    with pytest.raises(InputError, match=r"'w': 3 of 30 second moments .* element 13 \(-2\)"):
        write_moments(source(Moment("w", (30,), parts)), tmp_path / "v.safetensors", None, None, "x")


def test_zeros_are_second_moments(tmp_path):
    extract(saved(tmp_path, w=torch.tensor([0.0, -0.0, 1e-45])), tmp_path / "v.safetensors")
    assert_extracted(tmp_path / "v.safetensors", {"w": torch.tensor([0.0, 0.0, 1e-45])})


def test_a_model_that_does_not_fit(refused, tmp_path):
    file = saved(tmp_path, w=torch.ones(4, 5))
    refused(file, "--model", tmp_path / "none", facts=[tmp_path / "none"])
    save_model(tmp_path / "model", {"w": torch.ones(5, 4)})
    refused(file, "--model", tmp_path / "model", facts=["'w'", "[4, 5]", "[5, 4]"])
    save_model(tmp_path / "other", {"x": torch.ones(5, 4)})
    refused(file, "--model", tmp_path / "other", facts=["'w'", tmp_path / "other"])


def test_a_tied_output_matrix_needs_no_moments(tmp_path):
    file = saved(tmp_path, **{"embed_tokens.weight": torch.ones(5, 4)})
    both = {"embed_tokens.weight": torch.ones(5, 4), "lm_head.weight": torch.ones(5, 4)}
    for tied, missing in ((True, {}), (False, {"lm_head.weight": "not in the optimizer"})):
        save_model(tmp_path / "model", both)
        (tmp_path / "model" / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
        summary = extract(file, tmp_path / "v.safetensors", tmp_path / "model", overwrite=True)
        assert summary.missing == missing
        assert summary.parameters == 1 + len(missing)


def test_outputs_that_cannot_be(refused, tmp_path):
    file = saved(tmp_path, w=torch.ones(4))
    existing = tmp_path / "there.safetensors"
    existing.write_text("precious")
    refused(file, out=existing, facts=[existing, "--overwrite"])
    (tmp_path / "folder.safetensors").mkdir()
    refused(file, "--overwrite", out=tmp_path / "folder.safetensors", facts=["is a folder"])
    refused(file, out=tmp_path / "v.pt", facts=["v.pt", ".safetensors"])
    refused(file, out=tmp_path / "none" / "v.safetensors", facts=[tmp_path / "none", "does not exist"])


def test_overwrite(tmp_path):
    out = tmp_path / "v.safetensors"
    out.write_text("old")
    extract(saved(tmp_path, w=torch.ones(4)), out, overwrite=True)
    assert_extracted(out, {"w": torch.ones(4)})
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "v.safetensors"]


def test_a_disk_without_room(refused, tmp_path):
    file = saved(tmp_path, w=torch.ones(1 << 19))
    with mounted_tiny_disk(tmp_path / "disk") as disk:
        refused(file, out=disk / "v.safetensors", facts=[disk / "v.safetensors", "No space left"])
        assert os.listdir(disk) == []


def test_an_unknown_format(tmp_path):
    with pytest.raises(RecipeError, match="'zip' is not one of auto, torch"):
        extract(saved(tmp_path, w=torch.ones(4)), tmp_path / "v.safetensors", format="zip")


def test_the_command_line_offers_every_format():
    (option,) = (p for p in command.extract.params if p.name == "format_name")
    assert list(option.type.choices) == [formats.AUTO, *formats.FORMATS]


def test_a_folder_that_two_formats_recognise(refused, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    saved(tmp_path, w=torch.ones(4)).rename(tmp_path / "folder" / "optimizer.pt")

    def row(name):
        return formats.Format(name, name, "optimizer_file", "recognise_torch", "read_torch")

    monkeypatch.setattr(formats, "FORMATS", {"torch": formats.FORMATS["torch"], "a": row("a")})
    assert formats.choose(tmp_path / "folder", "auto").name == "a"  # says more than "torch"
    monkeypatch.setattr(formats, "FORMATS", {"a": row("a"), "b": row("b")})
    refused(tmp_path / "folder", facts=["--format a or b"])


# Writing.


def source(*moments):
    return Source("test", moments, {})


def pieces(count, size, after=None):
    """`count` pieces of `size` elements; `after` is called in place of reading the last."""

    def read(i):
        if after is not None and i == count - 1:
            after()
        return np.full(size, i, np.float32)

    return tuple(Piece(i * size, size, lambda i=i: read(i)) for i in range(count))


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError])
def test_an_error_leaves_nothing(tmp_path, error):
    def fail():
        assert len(os.listdir(tmp_path)) == 2  # the unfinished file beside the old one
        raise error

    out = tmp_path / "v.safetensors"
    out.write_text("old")
    with pytest.raises(error):
        write_moments(source(Moment("w", (3, 10), pieces(3, 10, after=fail))), out, None, None, "x")
    assert out.read_text() == "old"
    assert os.listdir(tmp_path) == ["v.safetensors"]


def test_one_piece_in_memory(tmp_path):
    size = 1 << 20
    tracemalloc.start()
    write_moments(source(Moment("w", (16, size), pieces(16, size))), tmp_path / "v.safetensors", 1, None, "x")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * 4 * size
    found = load_file(tmp_path / "v.safetensors")["w"]
    assert torch.equal(found, torch.arange(16.0)[:, None].expand(16, size))


def test_a_reader_that_leaves_gaps(tmp_path):
    first, second, third = pieces(3, 10)
    for broken in ((first, third), (second, third), (first, second), ()):
        with pytest.raises(InputError, match=r"elements .* missing|second moments for shape \[30\]"):
            write_moments(source(Moment("w", (30,), broken)), tmp_path / "v.safetensors", None, None, "x")
    assert os.listdir(tmp_path) == []


# What is printed.


def test_the_summary(ota_merge, tmp_path):
    torch.save(
        {
            "state": {
                "a": {"step": 20, "exp_avg_sq": torch.ones(4, 5)},
                "gone": {"step": 20, "exp_avg_sq": torch.ones(3)},
            },
            "param_groups": [{"params": ["a", "b", "gone"], "betas": (0.9, 0.999)}],
        },
        tmp_path / "a.pt",
    )
    tensors = {
        "a": torch.ones(4, 5),
        "b": torch.ones(2),
        "c": torch.ones(2),
        "ids": torch.ones(2, dtype=torch.int64),
    }
    save_model(tmp_path / "model", tensors)
    out = tmp_path / "v.safetensors"
    code, printed, errors = ota_merge(
        "moments", "extract", tmp_path / "a.pt", out, "--model", tmp_path / "model"
    )
    assert (code, errors) == (0, "")
    first, *others = printed.splitlines()
    assert first.startswith(f"extracted torch into {out}: 2 tensors, 23 parameters, ")
    assert others == [
        "  step 20, beta2 0.999",
        "  no second moments for 2 of 3 parameters: b (never stepped), c (not in the optimizer)",
        "  not in the model: gone",
    ]


def test_the_summary_without_step(ota_merge, tmp_path):
    code, printed, _ = ota_merge(
        "moments", "extract", saved(tmp_path, w=torch.ones(3)), tmp_path / "v.safetensors"
    )
    assert code == 0
    assert "  step 1, beta2 unknown" in printed
    assert "bias_correction" in printed


def test_help_is_light():
    code = (
        "import sys\nfrom ota_kernels.cli import main\nsys.argv[1:] = ['moments', 'extract', '--help']\n"
        "try: main()\nexcept SystemExit: pass\nassert not {'torch', 'numpy', 'rich'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_existing_output_is_found_before_anything_is_read(tmp_path):
    (tmp_path / "v.safetensors").touch()
    with pytest.raises(OutputError, match="exists"):
        extract(tmp_path / "none", tmp_path / "v.safetensors")
