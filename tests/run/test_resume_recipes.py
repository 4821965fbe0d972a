"""Going on with merges of adapters, vocabularies, stacked layers and parts: the same bytes, or refused where
any of them has changed since."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import digests, load_merged
from jobs import Interrupt
from jobs import merge as merge_by
from llamas import HIDDEN, llama, tokenizer
from safetensors.torch import save_file

from ota_kernels import OutputError, merge
from ota_kernels.run.rules import Rules

OPTIONS = {"backend": "reference", "tile_elements": 40, "threads": 1}


@pytest.fixture
def models(tmp_path):
    """base; chat, of more tokens; lora, an adapter of base."""
    like = llama(tmp_path / "base", 0, 3, rows=tokenizer(tmp_path / "base"))
    llama(tmp_path / "chat", 1, 3, rows=tokenizer(tmp_path / "chat", ("<|im_end|>",)), like=like)
    save_adapter(tmp_path / "lora", 0.1)
    return tmp_path


def save_adapter(folder, scale):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    at = "base_model.model.model.layers.1.self_attn.q_proj"
    a, b = scale * torch.ones(2, HIDDEN), torch.arange(2.0 * HIDDEN).reshape(HIDDEN, 2)
    save_file({f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}, folder / "adapter_model.safetensors")


def recipe(models, layers=(1, 3), weight=0.5, module=None):
    """Two slices over an adapted model and one of more tokens, whose rows are gathered."""

    def sources(a, b):
        listed = (f"{models / 'base'}+{models / 'lora'}", str(models / "chat"))
        return {"sources": [{"model": m, "layer_range": [a, b]} for m in listed]}

    body = {"slices": [sources(0, 2), sources(*layers)], "parameters": {"weight": [weight, 1]}}
    body = body if module is None else {"modules": {module: body}}
    return {"merge_method": "linear", "tokenizer": {"source": "union"}, "dtype": "float32", **body}


def interrupted(models, out, tile=4):
    with pytest.raises(KeyboardInterrupt):
        merge_by(recipe(models), out, Rules(before=Interrupt("tile", tile)), **OPTIONS)
    assert not out.exists()


@pytest.mark.parametrize("tile", [1, 4, 20])
def test_the_same_bytes(models, tmp_path, tile):
    merge(recipe(models), tmp_path / "whole", **OPTIONS)
    interrupted(models, tmp_path / "out", tile)
    merge(recipe(models), tmp_path / "out", resume=True, **OPTIONS)
    own, other = (
        {n: d for n, d in digests(tmp_path / o).items() if n != "merge_report.json"} for o in ("out", "whole")
    )
    assert own.keys() == other.keys() >= {"model.safetensors", "tokenizer.json", "config.json"}
    assert {n: d for n, d in own.items() if n != "README.md"} == {
        n: d for n, d in other.items() if n != "README.md"
    }
    assert load_merged(tmp_path / "out")["model.embed_tokens.weight"].shape[0] == 16


def adapter_weights(models):
    save_adapter(models / "lora", 0.2)


def adapter_config(models):
    path = models / "lora" / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 2', '"lora_alpha": 4'))


def vocabulary(models):
    path = models / "chat" / "tokenizer.json"
    path.write_text(path.read_text().replace("im_end", "im_stop"))


CHANGES = {
    "adapter": (adapter_weights, {}, {}),
    "adapter's scale": (adapter_config, {}, {}),
    "tokenizer": (vocabulary, {}, {}),
    "layers": (None, {"layers": (0, 2)}, {}),
    "gradient": (None, {"weight": 0.25}, {}),
    "module": (None, {"module": "text_decoder"}, {}),
    "rounded": (None, {}, {"lora_merge_dtype": "bfloat16"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_another_merge(models, tmp_path, change):
    do, more, options = CHANGES[change]
    interrupted(models, tmp_path / "out")
    merge(recipe(models), tmp_path / "done", **OPTIONS)
    if do is not None:
        do(models)
    with pytest.raises(OutputError, match="had another recipe, inputs or options: --overwrite starts again"):
        merge(recipe(models, **more), tmp_path / "out", resume=True, **OPTIONS, **options)
    with pytest.raises(OutputError, match="holds something else than this merge"):
        merge(recipe(models, **more), tmp_path / "done", resume=True, **OPTIONS, **options)
