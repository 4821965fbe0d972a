"""Where a model's layers are, told by the names of its tensors: `<prefix><number>.<rest>`."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

# The last word before a layer's number, as transformers names stacks of layers.
_STACKS = frozenset(("layers", "layer", "h", "blocks", "block", "resblocks"))
_NUMBERED = re.compile(r"((?:[^.]+\.)*?)(\d+)\.(.+)", re.DOTALL)

# What a network computes before its first layer: embeddings of tokens, positions, types, patches, and their
# norms. Everything else outside of the layers comes after them. An output matrix may be called embed_out.
_BEFORE = re.compile(
    r"(^|[._])(embed(?!_?out)\w*|tok_embeddings|word_embeddings\w*|w[tp]e|patch\w*|pos|position\w*|"
    r"cls_token|class_\w+|conv1|shared|ln_pre|pre_?la?yernorm\w*|pre_layrnorm|project_in)([._]|$)"
)


@functools.lru_cache(1 << 16)
def split(name: str) -> tuple[str, int, str] | None:
    """(prefix, number, rest) at a name's first number; None where it has none."""
    found = _NUMBERED.fullmatch(name)
    return None if found is None else (found[1], int(found[2]), found[3])


def comes_before(name: str) -> bool:
    """Whether a tensor outside of the layers is used before them."""
    return _BEFORE.search(name) is not None


def stacks(names: Iterable[str]) -> dict[str, int]:
    """The stacks of layers of a model: number of layers by prefix, in order. Where no prefix ends in a usual
    word, the one that most tensors have."""
    sizes: dict[str, int] = {}
    tensors: Counter[str] = Counter()
    for name in names:
        found = split(name)
        if found is not None:
            prefix, number, _ = found
            sizes[prefix] = max(sizes.get(prefix, 0), number + 1)
            tensors[prefix] += 1
    usual = {p: size for p, size in sizes.items() if p.rstrip(".").rpartition(".")[2] in _STACKS}
    if usual or not sizes:
        return usual
    (most, _), *_ = tensors.most_common(1)
    return {most: sizes[most]}


def position(name: str, layers: dict[str, int]) -> float:
    """Where a tensor's layer is in its stack: from 0 for the first to 1 for the last; of a stack of one 1; 0
    outside of all. layers: as `stacks` gives them."""
    found = split(name)
    if found is None or found[0] not in layers:
        return 0.0
    return relative(found[1], layers[found[0]])


def relative(number: int, layers: int) -> float:
    """Layer `number` of `layers`, from 0 to 1."""
    return number / (layers - 1) if layers > 1 else 1.0


@dataclass(frozen=True)
class Stack:
    """The layers of one model. prefix: what stands before a layer's number; layers: by number, the rests of
    its tensors' names; before, after: names of the tensors outside of the layers."""

    prefix: str
    layers: tuple[tuple[str, ...], ...]
    before: tuple[str, ...]
    after: tuple[str, ...]

    @classmethod
    def of(cls, names: Iterable[str], prefix: str, size: int) -> Stack:
        """The stack with this prefix; another's tensors count as outside."""
        layers: list[list[str]] = [[] for _ in range(size)]
        before, after = [], []
        for name in names:
            found = split(name)
            if found is not None and found[0] == prefix:
                layers[found[1]].append(found[2])
            elif comes_before(name):
                before.append(name)
            else:
                after.append(name)
        return cls(prefix, tuple(map(tuple, layers)), tuple(before), tuple(after))
