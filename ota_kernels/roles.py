"""What a tensor is in its network, told by its name and shape."""

from __future__ import annotations

import re
from collections.abc import Iterable

EMBEDDING, OUTPUT, MATRIX, VECTOR = "embedding", "output", "matrix", "vector"

_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|embeddings?)\.weight$"
)
_OUTPUT = re.compile(r"(^|\.)(lm_head|embed_out|output|score)\.weight$")


def role_of(name: str, shape: tuple[int, ...]) -> str:
    """EMBEDDING and OUTPUT for vocabulary matrices, MATRIX for other 2-D tensors, VECTOR for the rest."""
    if len(shape) != 2:
        return VECTOR
    if _EMBEDDING.search(name):
        return EMBEDDING
    return OUTPUT if _OUTPUT.search(name) else MATRIX


def embedding_for(output_name: str, names: Iterable[str]) -> str | None:
    """The embedding that a tied output matrix shares its weights with, if the model has exactly one."""
    if not _OUTPUT.search(output_name):
        return None
    found = [name for name in names if _EMBEDDING.search(name)]
    return found[0] if len(found) == 1 else None
