"""What a tensor is in its network, told by its name and shape."""

from __future__ import annotations

import re

EMBEDDING, OUTPUT, MATRIX, VECTOR = "embedding", "output", "matrix", "vector"

# What `detailed_role` answers, in the order of a table.
DETAILED_ROLES = ("q", "k", "v", "o", "gate", "up", "down", "embeddings", "norms", "output", "other")

_EMBEDDING = re.compile(
    r"(^|[./])(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|embeddings?)\.weight$"
)
_OUTPUT = re.compile(r"(^|[./])(lm_head|embed_out|output|score)\.weight$")

# By the name of the module, or of it and the one or two it lies in: Llama, Mistral, Qwen; Meta's own names
# and Mixtral's experts (w1, w2, w3); GPT-2; GPT-NeoX; Phi; BERT. Fused matrices (c_attn, query_key_value) are
# "other".
_MODULES = {
    "q": ("q_proj", "wq", "self.query"),
    "k": ("k_proj", "wk", "self.key"),
    "v": ("v_proj", "wv", "self.value"),
    "o": ("o_proj", "wo", "attn.c_proj", "attention.dense", "self_attn.dense", "attention.output.dense"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "w3", "c_fc", "dense_h_to_4h", "fc1", "intermediate.dense"),
    "down": ("down_proj", "w2", "mlp.c_proj", "dense_4h_to_h", "fc2", "output.dense"),
    "embeddings": (
        "embed_tokens",
        "tok_embeddings",
        "wte",
        "wpe",
        "word_embeddings",
        "embed_in",
        "position_embeddings",
        "token_type_embeddings",
    ),
    "output": ("lm_head", "embed_out", "output", "score"),
}
_ROLE_OF_MODULE = {module: role for role, modules in _MODULES.items() for module in modules}
# Fused experts of a mixture, [experts, rows, columns]; other tensors of three axes are convolutions.
_EXPERTS = re.compile(r"(^|[._])experts?[._]", re.IGNORECASE)
_NORM = re.compile(r"norm|^ln(_|$)", re.IGNORECASE)
_LAYER = re.compile(r"(^|\.)(layers?|h|blocks?)\.(\d+)\.")


def detailed_role(name: str) -> str:
    """Which of DETAILED_ROLES a tensor has in a transformer, by its name; biases go with their matrix."""
    modules = name.split(".")
    if modules[-1] in ("weight", "bias") and len(modules) > 1:
        modules.pop()
    for module in (".".join(modules[-3:]), ".".join(modules[-2:]), modules[-1]):
        if module in _ROLE_OF_MODULE:
            return _ROLE_OF_MODULE[module]
    return "norms" if _NORM.search(modules[-1]) else "other"


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor belongs to; None outside the layers."""
    found = _LAYER.search(name)
    return int(found[3]) if found else None


def role_of(name: str, shape: tuple[int, ...]) -> str:
    """EMBEDDING and OUTPUT for vocabulary matrices, MATRIX for other 2-D tensors, VECTOR for the rest."""
    if len(shape) != 2:
        return VECTOR
    if _EMBEDDING.search(name):
        return EMBEDDING
    return OUTPUT if _OUTPUT.search(name) else MATRIX


def matrix_of(name: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """(rows, columns) of each matrix that a tensor consists of, for methods of whole matrices: a MATRIX is
    one, fused experts are one each; None for everything else."""
    fused = len(shape) == 3 and _EXPERTS.search(name) is not None
    if 0 in shape or not (fused or role_of(name, shape) == MATRIX):
        return None
    return shape[-2], shape[-1]
