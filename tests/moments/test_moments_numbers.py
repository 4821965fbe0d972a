"""States that are keyed by number: the mapping to names is proved, or refused."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from checkpoints import save_model
from hypothesis import given
from hypothesis import strategies as st
from optimizers import STEPS, assert_extracted, decay_groups, live, nameless, train

from ota_kernels import InputError
from ota_kernels.moments import extract
from ota_kernels.moments.readers.decay import decay_rules
from ota_kernels.moments.readers.matching import match_by_shape, match_in_order

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
