"""LoRA: states under the adapter's own names, lifted to full matrices, and estimates of base + adapter."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import save_model
from optimizers import STEPS, adam_state, assert_extracted, metadata_of, saved_states, train
from safetensors.torch import load_file, save_file

from ota_kernels import InputError, merge
from ota_kernels.moments import extract, show
from ota_kernels.moments.lift import SOURCE_FORMAT, lift
from ota_kernels.moments.readers.adapter import scaling

PREFIX = "base_model.model."


def base_model(layers=2):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


class Adapter(torch.nn.Module):
    """A and B of some modules, as PEFT makes and names them, in the order of the base's modules."""

    def __init__(self, base, rank=3, alpha=6, modules=("q_proj", "v_proj", "down_proj")):
        super().__init__()
        self.rank, self.alpha, self.names = rank, alpha, []
        self.matrices = torch.nn.ParameterList()
        for name, module in base.named_modules():
            if name.rpartition(".")[2] in modules:
                m, n = module.weight.shape
                a, b = torch.empty(rank, n), torch.zeros(m, rank)
                torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5))
                self.names += [f"{PREFIX}{name}.lora_{part}.default.weight" for part in "AB"]
                self.matrices += [torch.nn.Parameter(a), torch.nn.Parameter(b)]

    def named(self):
        return dict(zip(self.names, self.matrices, strict=True))

    def save(self, folder, **config):
        folder.mkdir()
        tensors = {n.replace(".default", ""): p.detach().clone() for n, p in self.named().items()}
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": self.rank, "lora_alpha": self.alpha} | config
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder


def trained(folder, **config):
    base = base_model()
    base.save_pretrained(folder / "base")
    adapter = Adapter(base)
    optimizer = torch.optim.AdamW(list(adapter.named().items()), betas=(0.9, 0.99))
    train(adapter, optimizer)
    adapter.save(folder / "adapter", **config)
    moments = {
        n.replace(".default", ""): optimizer.state[p]["exp_avg_sq"] for n, p in adapter.named().items()
    }
    return adapter, optimizer, moments


@pytest.mark.parametrize("given", ["model", "nothing"])
@pytest.mark.parametrize("reader", ["torch", "dcp"])
def test_states_by_name(tmp_path, reader, given):
    adapter, optimizer, moments = trained(tmp_path)
    states = {n: optimizer.state[p] for n, p in adapter.named().items()}
    groups = [{"params": list(states), "betas": (0.9, 0.99)}]
    path = tmp_path / ("a.pt" if reader == "torch" else "dcp")
    if reader == "torch":
        torch.save({"state": states, "param_groups": groups}, path)
    else:
        dcp.save({"optim": {"state": states, "param_groups": groups}}, checkpoint_id=path)
    summary = extract(path, tmp_path / "v.safetensors", tmp_path / "adapter" if given == "model" else None)
    assert_extracted(tmp_path / "v.safetensors", moments)
    assert any("moments lift" in note for note in summary.notes)
    assert (summary.missing, summary.extra) == ({}, ())


@pytest.mark.parametrize("base", ["--base", "its config", "unknown"])
def test_states_by_number_beside_the_adapter(tmp_path, base):
    """A checkpoint of the Trainer: two groups, of which one is empty."""
    config = {"base_model_name_or_path": str(tmp_path / "base")} if base == "its config" else {}
    _, optimizer, moments = trained(tmp_path, **config)
    content = optimizer.state_dict()
    (group,) = content["param_groups"]
    group.pop("param_names", None)
    content["param_groups"] = [group, group | {"params": [], "weight_decay": 0.0}]
    torch.save(content, tmp_path / "adapter" / "optimizer.pt")
    (tmp_path / "adapter" / "trainer_state.json").write_text("{}")
    given = {"base": tmp_path / "base"} if base == "--base" else {}
    if base == "unknown":
        with pytest.raises(InputError, match="is an adapter, whose order is its base's: add --base"):
            extract(tmp_path / "adapter", tmp_path / "v.safetensors")
        return
    extract(tmp_path / "adapter", tmp_path / "v.safetensors", **given)
    assert_extracted(tmp_path / "v.safetensors", moments)


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], "all-linear"], ids=["two", "all"])
def test_an_adapter_of_peft(tmp_path, modules):
    """By number, in PEFT's own order."""
    peft = pytest.importorskip("peft")
    base = base_model(layers=3)
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=modules))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for p in model.parameters():
        p.grad = 0.1 * torch.randn_like(p) if p.requires_grad else None
    optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    torch.save(optimizer.state_dict(), tmp_path / "adapter" / "optimizer.pt")
    extract(tmp_path / "adapter", tmp_path / "v.safetensors", base=tmp_path / "base")
    expected = {
        n.replace(".default", ""): optimizer.state[p]["exp_avg_sq"]
        for n, p in model.named_parameters()
        if p in optimizer.state
    }
    assert_extracted(tmp_path / "v.safetensors", expected)


def test_a_merge_says_that_an_adapters_moments_do_not_fit(tmp_path):
    _, _, moments = trained(tmp_path)
    save_file({n: v.clone() for n, v in moments.items()}, tmp_path / "v.safetensors")
    base_model().save_pretrained(tmp_path / "expert")
    recipe = {
        "merge_method": "ota",
        "base_model": str(tmp_path / "base"),
        "models": [
            {
                "model": str(tmp_path / "expert"),
                "parameters": {"preconditioner_path": str(tmp_path / "v.safetensors")},
            }
        ],
    }
    with pytest.raises(InputError, match="21 tensors have no curvature"):
        merge(recipe, tmp_path / "out")


# Lift.


def sampled(m=24, n=32, rank=4, steps=400, alpha=8.0):
    """Adam's second moments of W, A and B from the same random gradients; rows and columns of all sizes."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.exp(torch.randn(m, 1, generator=generator))
    columns = torch.exp(torch.randn(1, n, generator=generator))
    a = (torch.rand(rank, n, generator=generator) * 2 - 1) / math.sqrt(n)
    b = 0.02 * torch.randn(m, rank, generator=generator)
    scale, beta2 = alpha / rank, 0.99
    moments = [torch.zeros(m, n), torch.zeros(rank, n), torch.zeros(m, rank)]
    for _ in range(steps):
        gradient = 1e-3 * rows * columns * torch.randn(m, n, generator=generator)
        for v, g in zip(moments, (gradient, scale * b.T @ gradient, scale * gradient @ a.T), strict=True):
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    return a, b, *moments


def save_pair(folder, a, b, moment_a, moment_b, **config):
    """States and adapter of one module; its base."""
    name = f"{PREFIX}model.layers.0.q_proj"
    states = {f"{name}.lora_A.default.weight": moment_a, f"{name}.lora_B.default.weight": moment_b}
    saved_states(folder / "a.pt", {n: adam_state(v.shape, exp_avg_sq=v) for n, v in states.items()})
    (folder / "adapter").mkdir()
    save_file(
        {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b},
        folder / "adapter" / "adapter_model.safetensors",
    )
    config = {"r": a.shape[0], "lora_alpha": 8} | config
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    shape = (a.shape[1], b.shape[0]) if config.get("fan_in_fan_out") else (b.shape[0], a.shape[1])
    weights = {"model.layers.0.q_proj.weight": torch.rand(shape), "model.norm.weight": torch.rand(5)}
    save_model(folder / "base", weights)


def product(file, name="model.layers.0.q_proj.weight"):
    found = load_file(file)
    rows, columns = (found[f"{name}.exp_avg_sq_{kind}"].double() for kind in ("row", "col"))
    torch.testing.assert_close(rows.sum(), columns.sum(), rtol=1e-5, atol=0)
    return rows[:, None] * columns / rows.sum()


@pytest.mark.parametrize("source", ["checkpoint", "extracted"])
def test_lifted_curvature_follows_the_truth(tmp_path, source):
    """Its logarithm, and its scale; the profiles are exactly the sums that they are said to be."""
    a, b, full, moment_a, moment_b = sampled()
    save_pair(tmp_path, a, b, moment_a, moment_b)
    states = tmp_path / "a.pt"
    if source == "extracted":
        extract(states, tmp_path / "v.safetensors", tmp_path / "adapter")
        states = tmp_path / "v.safetensors"
    summary = lift(states, tmp_path / "l.safetensors", tmp_path / "base", tmp_path / "adapter")
    found = product(tmp_path / "l.safetensors")
    logs = np.corrcoef(found.log().flatten(), full.double().log().flatten())[0, 1]
    assert logs > 0.9
    assert 0.5 < (found.sum() / full.sum()).item() < 2
    r, c = moment_b.double().sum(1), moment_a.double().sum(0)
    shares = c / c.sum()
    total = r.sum() / (4.0 * (shares * a.double().square().sum(0)).sum())
    torch.testing.assert_close(found, total * (r / r.sum())[:, None] * shares, rtol=1e-5, atol=0)
    assert (summary.tensors, summary.parameters, summary.skipped, summary.scaled) == (1, 2, {}, True)
    assert metadata_of(tmp_path / "l.safetensors") == {
        "format": "pt",
        "source_format": SOURCE_FORMAT,
        "step": str(STEPS),
        "beta2": "0.999",
    }
    assert "estimate" in show(tmp_path / "l.safetensors").source_format


def test_lift_a_checkpoint_of_the_trainer(tmp_path):
    """States by number beside the adapter: the base that they are lifted to has the order, too."""
    _, optimizer, moments = trained(tmp_path)
    content = optimizer.state_dict()
    content["param_groups"][0].pop("param_names", None)
    torch.save(content, tmp_path / "adapter" / "optimizer.pt")
    summary = lift(tmp_path / "adapter", tmp_path / "l.safetensors", tmp_path / "base")
    assert (summary.tensors, summary.scaled) == (6, True)
    name = "model.layers.1.mlp.down_proj"
    rows = moments[f"{PREFIX}{name}.lora_B.weight"].double().sum(1)
    columns = moments[f"{PREFIX}{name}.lora_A.weight"].double().sum(0)
    found = product(tmp_path / "l.safetensors", f"{name}.weight")
    expected = rows[:, None] * columns / (rows.sum() * columns.sum()) * found.sum()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_the_scale_without_an_adapter(tmp_path):
    """That of PEFT's first values: right up to (alpha / r)^2."""
    a, b, full, moment_a, moment_b = sampled(alpha=4.0)
    save_pair(tmp_path, a, b, moment_a, moment_b)
    summary = lift(tmp_path / "a.pt", tmp_path / "l.safetensors", tmp_path / "base")
    assert not summary.scaled
    assert 0.3 < (product(tmp_path / "l.safetensors").sum() / full.sum()).item() < 3


def test_transposed_matrices(tmp_path):
    """As GPT-2 keeps them."""
    a, b, _, moment_a, moment_b = sampled()
    for name, more in (("plain", {}), ("turned", {"fan_in_fan_out": True})):
        (tmp_path / name).mkdir()
        save_pair(tmp_path / name, a, b, moment_a, moment_b, **more)
        lift(
            tmp_path / name / "a.pt",
            tmp_path / f"{name}.safetensors",
            tmp_path / name / "base",
            tmp_path / name / "adapter",
        )
    torch.testing.assert_close(
        product(tmp_path / "turned.safetensors"), product(tmp_path / "plain.safetensors").T
    )


def test_scalings_of_adapters():
    assert scaling({"lora_alpha": 16}, 8, "x") == 2
    assert scaling({"lora_alpha": 16, "use_rslora": True}, 4, "x") == 8
    assert scaling({"lora_alpha": 16, "alpha_pattern": {"q_proj": 4}}, 8, "layers.0.q_proj") == 0.5
    assert scaling({}, 8, "x") == 1


def test_what_cannot_be_lifted(tmp_path):
    a, b, _, moment_a, moment_b = sampled()
    save_pair(tmp_path, a, b, moment_a, moment_b)
    full = saved_states(tmp_path / "full.pt", {"w": adam_state()})
    with pytest.raises(InputError, match="no second moments of lora_A and lora_B"):
        lift(full, tmp_path / "l.safetensors", tmp_path / "base")
    save_model(tmp_path / "other", {"model.layers.0.q_proj.weight": torch.rand(7, 32)})
    for base in ("other", "adapter"):
        with pytest.raises(InputError, match="give --model the adapter's base"):
            lift(tmp_path / "a.pt", tmp_path / "l.safetensors", tmp_path / base)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"use_dora": True}))
    with pytest.raises(InputError, match="DoRA"):
        lift(tmp_path / "a.pt", tmp_path / "l.safetensors", tmp_path / "base", tmp_path / "adapter")
    assert not (tmp_path / "l.safetensors").exists()


def test_the_command_and_a_merge_with_it(ota_merge, tmp_path):
    a, b, _, moment_a, moment_b = sampled()
    save_pair(tmp_path, a, b, moment_a, moment_b)
    out = tmp_path / "l.safetensors"
    code, printed, errors = ota_merge(
        "moments",
        "lift",
        tmp_path / "a.pt",
        out,
        "--model",
        tmp_path / "base",
        "--adapter",
        tmp_path / "adapter",
    )
    assert (code, errors) == (0, "")
    first, second = printed.splitlines()
    assert first.startswith(f"lifted 1 pairs of LoRA matrices into {out}: an estimate, ")
    assert second == "  1 other tensors of the base have no curvature: merge with `missing_curvature: base`"
    base = load_file(tmp_path / "base" / "model.safetensors")
    save_model(tmp_path / "merged", {n: t + 0.1 * torch.randn_like(t) for n, t in base.items()})
    recipe = {
        "merge_method": "ota",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "merged"), "parameters": {"preconditioner_path": str(out)}}],
        "parameters": {"missing_curvature": "base", "density": 0.5},
    }
    merge(recipe, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["experts"][0]["curvature"] == SOURCE_FORMAT


# Estimates.


def save_tokenizer(folder, size=48):
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


def test_an_estimate_of_base_and_adapter(ota_merge, tmp_path):
    """Equal to that of the merged weights, saved as a model of their own."""
    base = base_model()
    base.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    adapter = Adapter(base, rank=3, alpha=6)
    with torch.no_grad():
        for parameter in adapter.matrices:
            parameter.copy_(0.1 * torch.randn_like(parameter))
        adapter.save(tmp_path / "adapter")
        weights, named = dict(base.named_parameters()), list(adapter.named().items())
        for (name, a), (_, b) in zip(named[::2], named[1::2], strict=True):
            weights[f"{name.removeprefix(PREFIX).partition('.lora_')[0]}.weight"] += 2.0 * b @ a
    base.save_pretrained(tmp_path / "merged")
    save_tokenizer(tmp_path / "merged")
    (tmp_path / "texts.jsonl").write_text('{"text": "w1 w2 w3 w4"}\n{"text": "w5 w6 w7"}\n')
    for model, out in ((f"{tmp_path / 'base'}+{tmp_path / 'adapter'}", "a"), (tmp_path / "merged", "m")):
        code, _, errors = ota_merge(
            "moments", "estimate", model, tmp_path / "texts.jsonl", tmp_path / f"{out}.safetensors"
        )
        assert code == 0, errors
    found, expected = (load_file(tmp_path / f"{out}.safetensors") for out in "am")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-12)
    plain = tmp_path / "b.safetensors"
    assert ota_merge("moments", "estimate", tmp_path / "base", tmp_path / "texts.jsonl", plain)[0] == 0
    assert not torch.allclose(
        load_file(plain)["lm_head.weight"], expected["lm_head.weight"], rtol=1e-2, atol=0
    )


def test_an_adapter_of_another_base(ota_merge, tmp_path):
    base = base_model()
    base.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    (tmp_path / "texts.jsonl").write_text('{"text": "w1 w2 w3 w4"}\n')
    (tmp_path / "adapter").mkdir()
    name = f"{PREFIX}model.layers.9.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 16), f"{name}.lora_B.weight": torch.ones(16, 2)}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    model = f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"
    out = tmp_path / "v.safetensors"
    code, _, errors = ota_merge("moments", "estimate", model, tmp_path / "texts.jsonl", out)
    assert code == 2
    last = errors.splitlines()[-1]
    assert last.startswith("error: adapter ")
    assert "is of no parameter of the base" in last
