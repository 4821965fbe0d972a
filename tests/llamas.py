"""Tiny Llamas on disk: names, configuration and tokenizer as real ones have them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from checkpoints import save_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HIDDEN, MLP, LETTERS = 4, 6, "abcdefghijkl"


def shapes(layers: int, rows: int = 16) -> dict[str, tuple[int, ...]]:
    found = {"model.embed_tokens.weight": (rows, HIDDEN)}
    for i in range(layers):
        at = f"model.layers.{i}."
        found |= {f"{at}self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qo"}
        found |= {f"{at}mlp.up_proj.weight": (MLP, HIDDEN), f"{at}mlp.down_proj.weight": (HIDDEN, MLP)}
        found[f"{at}input_layernorm.weight"] = (HIDDEN,)
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (rows, HIDDEN)}


def tokenizer(folder: Path, added: tuple[str, ...] = (), template: str | None = None) -> int:
    """Byte-level BPE over a few letters with special tokens after them; returns how many tokens it has."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate([*LETTERS, "ab", "cd"])}
    made = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("c", "d")]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", *added)])
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    config |= {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return made.get_vocab_size()


def llama(
    folder: Path, seed: int, layers: int, *, rows: int = 16, like: dict | None = None, dtype=torch.float32
) -> dict[str, np.ndarray]:
    """Weights near 0.05, edits of a tenth of that where it is `like` another model; returned as float64."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes(layers, rows).items():
        if like is not None and name in like and like[name].shape == shape:
            values = like[name] + rng.normal(0, 0.005, shape)
        else:
            values = rng.normal(0, 0.05, shape)
        tensors[name] = torch.from_numpy(values).to(dtype)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers}
    config |= {
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "vocab_size": rows,
        "tie_word_embeddings": False,
    }
    save_model(folder, tensors, config=config)
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}
