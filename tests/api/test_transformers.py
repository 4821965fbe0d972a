"""A Llama of the Hugging Face kind: merged like any checkpoint, loaded and run by transformers."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import (
    CURVATURE,
    ModelSet,
    assert_same_tensors,
    edited,
    load_merged,
    raw,
    second_moments,
    shard_files,
)
from safetensors.torch import save_file

from ota_kernels import merge, merge_state_dicts

transformers = pytest.importorskip("transformers")

RECIPES = {
    "linear": ("linear", {"weight": [0.25, 0.75]}),
    "ota": ("ota", {"density": 0.3}),
}


def make_llama(tied: bool):
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def stored(model) -> dict[str, torch.Tensor]:
    """The tensors that save_pretrained writes: without the copy of a tied head."""
    tied = model.config.tie_word_embeddings
    return {n: t.clone() for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def llamas(request, tmp_path_factory):
    """A base and two variants, each saved by transformers in several shards, with random curvature."""
    root = tmp_path_factory.mktemp("llamas")
    model = make_llama(request.param)
    base = stored(model)
    experts = [edited(base, 1), edited(base, 2)]
    models = ModelSet(root, base, experts, [second_moments(base, 3), second_moments(base, 4)])
    for folder, tensors in zip([models.base_folder, *models.expert_folders], [base, *experts], strict=True):
        model.load_state_dict(tensors, strict=False)
        model.save_pretrained(folder, max_shard_size="20KB")
        assert len(shard_files(folder)) > 1
    for folder, curvature in zip(models.expert_folders, models.curvatures, strict=True):
        save_file(curvature, folder / CURVATURE)
    return models


@pytest.mark.parametrize("name", RECIPES)
def test_transformers_loads_and_generates(llamas, tmp_path, name):
    method, parameters = RECIPES[name]
    out = tmp_path / "merged"
    merge(llamas.recipe(method, **parameters), out, shard_size="25kB")
    curvatures = llamas.curvatures if method == "ota" else None
    expected = merge_state_dicts(llamas.base, llamas.experts, curvatures, method=method, **parameters)
    assert_same_tensors(load_merged(out), expected)
    assert len(shard_files(out)) > 1

    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info  # nothing missing, nothing unexpected
    assert loaded.dtype == torch.bfloat16
    weights = loaded.state_dict()
    for tensor_name, tensor in expected.items():
        assert raw(weights[tensor_name]) == raw(tensor), tensor_name
    tied = loaded.config.tie_word_embeddings
    assert tied == ("lm_head.weight" not in expected)
    assert torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight) == tied

    prompt = torch.tensor([[1, 5, 9]])
    generated = loaded.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert generated.shape == (1, 7)
    assert torch.equal(generated[:, :3], prompt)
    # The merge is what computes: the same tensors put into a fresh model give the same logits.
    fresh = make_llama(tied)
    fresh.load_state_dict(expected, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(loaded(prompt).logits, fresh(prompt).logits, rtol=0, atol=0)


def test_the_output_type_is_what_transformers_loads(llamas, tmp_path):
    recipe = llamas.recipe("linear") | {"dtype": "float32"}
    merge(recipe, tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.dtype == torch.float32
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "float32" in (config.get("dtype"), config.get("torch_dtype"))
    assert "bfloat16" not in config.values()


def test_a_tied_and_an_untied_model_merge_untied(tmp_path):
    folders = []
    for tied in (True, False):
        folders.append(tmp_path / f"tied{tied}")
        make_llama(tied).save_pretrained(folders[-1])
    recipe = {"merge_method": "linear", "models": [{"model": str(folder)} for folder in folders]}
    merge(recipe, tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.config.tie_word_embeddings is False
    ties, unties = (transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    expected = (ties.model.embed_tokens.weight.float() + unties.lm_head.weight.float()) / 2
    assert torch.equal(loaded.lm_head.weight, expected.to(torch.bfloat16))
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
