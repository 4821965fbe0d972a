"""One renaming step behind all readers: wrappers, prefixes, what transformers saves, other frameworks."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import save_model
from optimizers import adam_state, assert_extracted, saved_states, train
from safetensors.torch import load_file

from ota_kernels import InputError
from ota_kernels.io.reader import Checkpoint
from ota_kernels.moments import extract
from ota_kernels.moments.arrangement import Arrangement, Part, _Reader, arranged
from ota_kernels.moments.readers.naming import unwrapped
from ota_kernels.moments.source import Moment, Piece

SHAPES = {
    "model.embed_tokens.weight": (11, 4),
    "model.layers.0.mlp.up_proj.weight": (6, 4),
    "model.layers.0.mlp.down_proj.weight": (4, 6),
    "model.layers.1.mlp.up_proj.weight": (6, 4),
    "model.norm.weight": (4,),
    "lm_head.weight": (11, 4),
}


def states_of(shapes):
    return {name: adam_state(shape) for name, shape in shapes.items()}


def moments_of(states):
    return {name: state["exp_avg_sq"] for name, state in states.items()}


def model_of(folder, shapes, config=None):
    return save_model(folder, {name: torch.rand(shape) for name, shape in shapes.items()}, config=config)


RENAMES = {
    "compiled": lambda n: f"_orig_mod.{n}",
    "parallel": lambda n: f"module.{n}",
    "parallel, compiled": lambda n: f"module._orig_mod.{n}",
    "compiled, parallel": lambda n: f"_orig_mod.module.{n}",
    "FSDP": lambda n: f"_fsdp_wrapped_module.{n}".replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "checkpointed": lambda n: n.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
    "trl": lambda n: f"pretrained_model.{n}",
    "Lightning": lambda n: f"model.{n}",
    "PEFT": lambda n: f"base_model.model.{n}",
    "sentence transformers": lambda n: f"0.auto_model.{n.removeprefix('model.')}",
    "somebody's": lambda n: f"policy.actor_net.{n}",
    "without the model's": lambda n: n.removeprefix("model."),
}


@pytest.mark.parametrize("kind", RENAMES)
@pytest.mark.parametrize("reader", ["torch", "dcp", "universal"])
def test_wrappers_and_prefixes(tmp_path, kind, reader):
    states = states_of(SHAPES)
    renamed = {RENAMES[kind](name): state for name, state in states.items()}
    model_of(tmp_path / "model", SHAPES)
    path = tmp_path / "checkpoint"
    if reader == "torch":
        saved_states(path.with_suffix(".pt"), renamed)
        path = path.with_suffix(".pt")
    elif reader == "dcp":
        groups = [{"params": list(renamed), "betas": (0.9, 0.99)}]
        dcp.save({"optimizer": {"state": renamed, "param_groups": groups}}, checkpoint_id=path)
    else:
        for name, state in renamed.items():
            (path / "zero" / name).mkdir(parents=True)
            torch.save({"param": state["exp_avg_sq"]}, path / "zero" / name / "exp_avg_sq.pt")
    summary = extract(path, tmp_path / "v.safetensors", tmp_path / "model")
    assert_extracted(tmp_path / "v.safetensors", moments_of(states))
    assert (summary.missing, summary.extra) == ({}, ())


def test_heads_that_the_model_lacks_are_left_out(tmp_path):
    states = states_of(SHAPES)
    renamed = {f"pretrained_model.{n}": s for n, s in states.items()} | {"v_head.weight": adam_state((1, 4))}
    model_of(tmp_path / "model", SHAPES)
    path = saved_states(tmp_path / "a.pt", renamed)
    summary = extract(path, tmp_path / "v.safetensors", tmp_path / "model")
    assert_extracted(tmp_path / "v.safetensors", moments_of(states))
    assert summary.extra == ("v_head.weight",)


def test_two_models_in_one_checkpoint(tmp_path):
    """Actor and critic both fit: neither is taken."""
    states = {who: states_of(SHAPES) for who in ("actor", "critic")}
    both = {f"{who}.{n}": s for who, own in states.items() for n, s in own.items()}
    model_of(tmp_path / "model", SHAPES)
    path = saved_states(tmp_path / "a.pt", both)
    with pytest.raises(InputError, match=r"read in two ways that cover 6 parameters.*'actor\.'.*'critic\.'"):
        extract(path, tmp_path / "v.safetensors", tmp_path / "model")
    for who in ("actor", "critic"):
        out = tmp_path / f"{who}.safetensors"
        extract(path, out, tmp_path / "model", prefix=f"{who}.")
        assert_extracted(out, moments_of(states[who]))
    with pytest.raises(InputError, match=r"no name begins with 'x\.'; one is 'actor\."):
        extract(path, tmp_path / "v.safetensors", tmp_path / "model", prefix="x.")


def test_a_partial_match_is_an_error(tmp_path):
    """One parameter has the model's name, the others are the model's in no known way."""
    odd = {"model.norm.weight": (4,)} | {f"blocks.{i}.w": (6, 4) for i in range(3)}
    model_of(tmp_path / "model", SHAPES)
    path = saved_states(tmp_path / "a.pt", states_of(odd))
    with pytest.raises(
        InputError, match=r"covers 1 of 6 parameters.*3 that the model lacks.*'blocks\.0\.w'.*5"
    ):
        extract(path, tmp_path / "v.safetensors", tmp_path / "model")
    assert not (tmp_path / "v.safetensors").exists()


def test_parameters_of_the_model_that_were_frozen(tmp_path):
    """No name is unknown: what is not covered is listed, as before; buffers are no parameters."""
    states = states_of({n: s for n, s in SHAPES.items() if "layers.0" in n})
    model_of(tmp_path / "model", SHAPES | {"model.layers.0.bn.running_mean": (4,)})
    path = saved_states(tmp_path / "a.pt", {f"module.{n}": s for n, s in states.items()})
    summary = extract(path, tmp_path / "v.safetensors", tmp_path / "model")
    assert_extracted(tmp_path / "v.safetensors", moments_of(states))
    assert len(summary.missing) == 4
    assert summary.parameters == 6


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_model.model.q.lora_A.default.weight", "base_model.model.q.lora_A.weight"),
        ("base_model.model.q.lora_B.my_adapter.weight", "base_model.model.q.lora_B.weight"),
        ("base_model.model.q.lora_A.weight", "base_model.model.q.lora_A.weight"),
        ("base_model.model.e.lora_embedding_A.default", "base_model.model.e.lora_embedding_A"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "base_model.model.lm_head.weight"),
        ("base_model.model.q.base_layer.weight", "base_model.model.q.weight"),
        ("a._orig_mod.b", "a.b"),
        ("my_orig_mod.b", "my_orig_mod.b"),
    ],
)
def test_what_wrappers_put_in(name, expected):
    assert unwrapped(name) == expected


def test_names_of_a_parallel_module_without_a_model(tmp_path):
    """In front of all names it is no part of theirs; else it may be one."""
    state = adam_state()
    for names, expected in (
        (("module.a", "module.b"), ("a", "b")),
        (("module.a", "head.b"), ("module.a", "head.b")),
    ):
        path = saved_states(tmp_path / "a.pt", dict.fromkeys(names, state))
        extract(path, tmp_path / "v.safetensors", overwrite=True)
        assert set(load_file(tmp_path / "v.safetensors")) == set(expected)


def test_two_names_that_become_one(tmp_path):
    states = {"_orig_mod.w": adam_state(), "w": adam_state()}
    with pytest.raises(InputError, match="'w' occurs twice: every parameter needs a name of its own"):
        extract(saved_states(tmp_path / "a.pt", states), tmp_path / "v.safetensors")


# What transformers renames, splits or stacks on saving.


def small(architecture):
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 saves what it trains")
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    if architecture == "Mixtral":
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=3))
    if architecture == "Qwen3Moe":
        more = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 4}
        return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **more))
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
    )
    return transformers.ViTModel(config)


@pytest.mark.parametrize("keyed", ["by name", "by number", "by name, in front"])
@pytest.mark.parametrize("architecture", ["Mixtral", "Qwen3Moe", "ViT"])
def test_what_transformers_splits_and_renames(tmp_path, architecture, keyed):
    """Moments as weights: a model whose weights are the moments is saved by transformers itself."""
    model = small(architecture)
    optimizer = torch.optim.AdamW(model.named_parameters())
    train(model, optimizer, steps=1)
    model.save_pretrained(tmp_path / "model")
    content = optimizer.state_dict()
    (group,) = content["param_groups"]
    if keyed == "by number":
        group.pop("param_names", None)
    elif "front" in keyed:
        group["param_names"] = [f"module.{name}" for name in group["param_names"]]
    torch.save(content, tmp_path / "a.pt")
    moments = {n: optimizer.state[p]["exp_avg_sq"] for n, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(moments[name])
    model.save_pretrained(tmp_path / "expected")
    summary = extract(tmp_path / "a.pt", tmp_path / "v.safetensors", tmp_path / "model")
    assert_extracted(tmp_path / "v.safetensors", load_file(tmp_path / "expected" / "model.safetensors"))
    assert (summary.missing, summary.extra) == ({}, ())


def test_fused_experts_without_a_config(tmp_path):
    fused = {"layers.0.mlp.experts.gate_up_proj": (3, 8, 5), "layers.0.mlp.experts.down_proj": (3, 5, 4)}
    states = states_of(fused)
    gate_up, down = (states[name]["exp_avg_sq"] for name in fused)
    expected = {}
    for i in range(3):
        prefix = f"layers.0.mlp.experts.{i}"
        expected[f"{prefix}.gate_proj.weight"], expected[f"{prefix}.up_proj.weight"] = gate_up[i].chunk(2)
        expected[f"{prefix}.down_proj.weight"] = down[i]
    model_of(tmp_path / "model", {name: tuple(value.shape) for name, value in expected.items()})
    path = saved_states(tmp_path / "a.pt", states)
    extract(path, tmp_path / "v.safetensors", tmp_path / "model")
    assert_extracted(tmp_path / "v.safetensors", expected)


# Other frameworks.

LLAMA = {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 16}
TITAN = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", (11, 16)),
    "layers.0.attention.wq.weight": ("model.layers.0.self_attn.q_proj.weight", (16, 16)),
    "layers.0.attention.wk.weight": ("model.layers.0.self_attn.k_proj.weight", (8, 16)),
    "layers.0.attention.wv.weight": ("model.layers.0.self_attn.v_proj.weight", (8, 16)),
    "layers.0.attention.wo.weight": ("model.layers.0.self_attn.o_proj.weight", (16, 16)),
    "layers.0.feed_forward.w1.weight": ("model.layers.0.mlp.gate_proj.weight", (24, 16)),
    "layers.0.feed_forward.w2.weight": ("model.layers.0.mlp.down_proj.weight", (16, 24)),
    "layers.0.feed_forward.w3.weight": ("model.layers.0.mlp.up_proj.weight", (24, 16)),
    "layers.0.attention_norm.weight": ("model.layers.0.input_layernorm.weight", (16,)),
    "layers.0.ffn_norm.weight": ("model.layers.0.post_attention_layernorm.weight", (16,)),
    "norm.weight": ("model.norm.weight", (16,)),
    "output.weight": ("lm_head.weight", (11, 16)),
}
TUNE = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", (11, 16)),
    "layers.0.attn.q_proj.weight": ("model.layers.0.self_attn.q_proj.weight", (16, 16)),
    "layers.0.attn.k_proj.weight": ("model.layers.0.self_attn.k_proj.weight", (8, 16)),
    "layers.0.attn.v_proj.weight": ("model.layers.0.self_attn.v_proj.weight", (8, 16)),
    "layers.0.attn.output_proj.weight": ("model.layers.0.self_attn.o_proj.weight", (16, 16)),
    "layers.0.mlp.w1.weight": ("model.layers.0.mlp.gate_proj.weight", (24, 16)),
    "layers.0.mlp.w2.weight": ("model.layers.0.mlp.down_proj.weight", (16, 24)),
    "layers.0.mlp.w3.weight": ("model.layers.0.mlp.up_proj.weight", (24, 16)),
    "layers.0.sa_norm.scale": ("model.layers.0.input_layernorm.weight", (16,)),
    "layers.0.mlp_norm.scale": ("model.layers.0.post_attention_layernorm.weight", (16,)),
    "norm.scale": ("model.norm.weight", (16,)),
    "output.weight": ("lm_head.weight", (11, 16)),
}


def as_hugging_face(weight, head=4):
    """The rows of query and key as Meta's weights are converted: neighbours become halves of a head."""
    rows, columns = weight.shape
    return weight.view(rows // head, head // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


@pytest.mark.parametrize("back", [False, True], ids=["to Hugging Face", "back"])
@pytest.mark.parametrize("names", [TITAN, TUNE], ids=["torchtitan", "torchtune"])
def test_names_of_other_frameworks(tmp_path, names, back):
    theirs = {name: adam_state(shape) for name, (_, shape) in names.items()}
    ours = {}
    for name, (other, _) in names.items():
        value = theirs[name]["exp_avg_sq"]
        turned = any(part in other for part in ("q_proj", "k_proj"))
        ours[other] = as_hugging_face(value) if turned else value
    if back:
        states = {name: adam_state(value.shape, exp_avg_sq=value) for name, value in ours.items()}
        expected = moments_of(theirs)
    else:
        states, expected = theirs, ours
    model_of(tmp_path / "model", {name: tuple(v.shape) for name, v in expected.items()}, LLAMA)
    extract(saved_states(tmp_path / "a.pt", states), tmp_path / "v.safetensors", tmp_path / "model")
    assert_extracted(tmp_path / "v.safetensors", expected)


@pytest.mark.parametrize("kind", ["qwen3", "mamba"])
def test_rows_of_other_architectures(tmp_path, kind):
    """Qwen 3 has halves everywhere; where the order of rows is not known, nothing is extracted."""
    states = {name: adam_state(shape) for name, (_, shape) in TITAN.items()}
    expected = {other: states[name]["exp_avg_sq"] for name, (other, _) in TITAN.items()}
    config = LLAMA | {"model_type": kind}
    model_of(tmp_path / "model", {name: tuple(v.shape) for name, v in expected.items()}, config)
    path = saved_states(tmp_path / "a.pt", states)
    if kind == "qwen3":
        extract(path, tmp_path / "v.safetensors", tmp_path / "model")
        assert_extracted(tmp_path / "v.safetensors", expected)
    else:
        with pytest.raises(InputError, match="covers 10 of 12 parameters"):
            extract(path, tmp_path / "v.safetensors", tmp_path / "model")


# Arrangements.


def _held(sources, arrange):
    """What stays in memory of a tensor that was read in two parts: one piece."""
    parts = [
        arrange(f"{i}", Arrangement((6, 5), (Part("one", (6, 5), (5, 1), 30 * i),)), sources) for i in (0, 1)
    ]
    for part in parts:
        for piece in part.pieces:
            piece.read()
    return _Reader._last[1]


def moment(name, values):
    flat = values.reshape(-1).numpy()
    pieces = tuple(
        Piece(i, len(flat[i : i + 7]), lambda i=i: flat[i : i + 7]) for i in range(0, len(flat), 7)
    )
    return Moment(name, tuple(values.shape), pieces)


def test_parts_and_permutations_in_pieces(monkeypatch):
    """Of sources in small pieces, read some rows at a time; against torch's own views."""
    monkeypatch.setattr("ota_kernels.moments.arrangement._PIECE_ELEMENTS", 11)
    one, other = torch.rand(4, 6, 5), torch.rand(3, 5)
    sources = {"one": moment("one", one), "other": moment("other", other)}

    def read(arrangement):
        found = arranged("new", arrangement, sources)
        values = [torch.from_numpy(piece.read()) for piece in found.pieces]
        assert [p.start for p in found.pieces] == [
            sum(len(v) for v in values[:i]) for i in range(len(values))
        ]
        return torch.cat(values).reshape(found.shape)

    def part(name, view):
        return Part(name, tuple(view.shape), tuple(view.stride()), view.storage_offset())

    assert len(_held(sources, arranged)) <= 7
    for view in (one[2], one[1, 3:], one.transpose(0, 2), one[:, ::2], one[3, 5, 4], one[1].t()):
        assert torch.equal(read(Arrangement(tuple(view.shape), (part("one", view),))), view)
    views = one[2, :3], other
    for axis in (0, 1):
        joined = torch.cat(views, axis)
        parts = (part("one", views[0]), part("other", views[1]))
        assert torch.equal(read(Arrangement(tuple(joined.shape), parts, axis)), joined)


def test_the_model_that_was_meant_is_said(tmp_path):
    """A folder whose config is another model's: the error says what is wrong, not a version that it has."""
    model = small("Qwen3Moe")
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, steps=1)
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    for version, advice in (
        (config["transformers_version"], "of another model"),
        ("4.40.0", "is of transformers 4.40.0"),
    ):
        file.write_text(json.dumps(config | {"moe_intermediate_size": 6, "transformers_version": version}))
        with pytest.raises(InputError, match=advice):
            extract(tmp_path / "a.pt", tmp_path / "v.safetensors", tmp_path / "model")


def test_shapes_are_part_of_a_reading(tmp_path):
    """A prefix is not taken for its names alone."""
    model_of(tmp_path / "model", {"w": (2, 3), "b": (3,)})
    path = saved_states(tmp_path / "a.pt", states_of({"x.w": (3, 2), "x.b": (4,)}))
    with pytest.raises(InputError, match="has no second moments of any parameter"):
        extract(path, tmp_path / "v.safetensors", tmp_path / "model")
    assert Checkpoint.open(tmp_path / "model", "model").tensors["w"].shape == (2, 3)
