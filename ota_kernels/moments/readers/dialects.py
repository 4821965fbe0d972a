"""Names of the same Llama-like model in other frameworks: torchtitan's (Meta's) and torchtune's, and back.

    torchtitan  layers.0.attention.wq.weight     torchtune  layers.0.attn.q_proj.weight
    Hugging Face  model.layers.0.self_attn.q_proj.weight

Rotary embeddings turn pairs of a head's rows: neighbours at Meta, halves at Hugging Face, so the rows of
query and key matrices have another order, which is known for the architectures below and for no other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ...io.reader import Checkpoint
from ..arrangement import Arrangement, Part, row_major, whole

Shape = tuple[int, ...]

_TITAN = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_TUNE = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "attn.q_norm.scale": "self_attn.q_norm.weight",
    "attn.k_norm.scale": "self_attn.k_norm.weight",
    "sa_norm.scale": "input_layernorm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
# By model_type of config.json: whether query and key rows change their order.
_TITAN_PAIRS = {"llama": True, "qwen3": False, "qwen2": False}
_TUNE_PAIRS = {"llama": True, "mistral": True, "gemma": True, "qwen2": False, "qwen3": False}
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")
_TURNED = re.compile(r"\.(q_proj|k_proj|wq|wk)\.(weight|bias)$")


@dataclass(frozen=True)
class Dialect:
    """name: what notes call it; parts: the words of one framework -> the other's; pairs: by model_type,
    whether rows are turned; back: from Hugging Face's names."""

    name: str
    parts: Mapping[str, str]
    pairs: Mapping[str, bool]
    back: bool = False

    def arrangements(self, shapes: Mapping[str, Shape], model: Checkpoint) -> dict[str, Arrangement]:
        """The tensors in the other framework's names, of those of `shapes` whose name and row order are
        known."""
        found = {}
        for name, shape in shapes.items():
            new = self._renamed(name)
            if new is None:
                continue
            arrangement = self._rows(name, shape, model)
            if arrangement is not None:
                found[new] = arrangement
        return found

    def _renamed(self, name: str) -> str | None:
        if name in self.parts:
            return self.parts[name]
        match = _LAYER.fullmatch(name)
        if match is None:
            return None
        number, rest = match.groups()
        prefix = "layers." if self.back else "model.layers."
        for part, other in self.parts.items():
            if rest == part or rest.startswith(f"{part}."):
                return f"{prefix}{number}.{other}{rest.removeprefix(part)}"
        return None

    def _rows(self, name: str, shape: Shape, model: Checkpoint) -> Arrangement | None:
        if not _TURNED.search(name):
            return whole(name, shape)
        config = model.config or {}
        turned = self.pairs.get(config.get("model_type"))
        if turned is None:
            return None
        if not turned:
            return whole(name, shape)
        size = _head_size(config)
        if not size or size % 2 or shape[0] % size:
            return None
        heads, *rest = shape[0] // size, *shape[1:]
        halves = (size // 2, 2) if not self.back else (2, size // 2)
        heads_stride, first, second, *others = row_major((heads, *halves, *rest))
        view = (heads, halves[1], halves[0], *rest)
        return Arrangement(shape, (Part(name, view, (heads_stride, second, first, *others)),))


def _head_size(config: Mapping) -> int | None:
    """Rows of one head, by config.json."""
    size, heads = config.get("head_dim"), config.get("num_attention_heads")
    if isinstance(size, int):
        return size
    hidden = config.get("hidden_size")
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None


def _turned_back(parts: Mapping[str, str]) -> dict[str, str]:
    return {other: part for part, other in parts.items()}


DIALECTS = (
    Dialect("torchtitan's names to Hugging Face's", _TITAN, _TITAN_PAIRS),
    Dialect("torchtune's names to Hugging Face's", _TUNE, _TUNE_PAIRS),
    Dialect("Hugging Face's names to torchtitan's", _turned_back(_TITAN), _TITAN_PAIRS, back=True),
    Dialect("Hugging Face's names to torchtune's", _turned_back(_TUNE), _TUNE_PAIRS, back=True),
)
