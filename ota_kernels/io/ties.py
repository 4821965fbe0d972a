"""Output matrices that are tied to the embeddings, as names and config.json have it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

# The head of a language model, by itself or under modules that have no number: layers have one.
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight", "output_layer.weight")
_HEAD = re.compile(rf"(?:[A-Za-z_]\w*\.)*(?:{'|'.join(map(re.escape, _HEADS))})")
# Their tie keys, if any, speak of other embeddings or are defaults that somebody wrote out.
_OTHER_SECTIONS = re.compile(r"vision|visual|audio|image|speech|vq|quanti|compression", re.IGNORECASE)


def is_head(name: str) -> bool:
    """Whether a model may tie the tensor of this name to its embeddings."""
    return name.endswith(_HEADS) and _HEAD.fullmatch(name) is not None


def tie_in_config(config: Mapping[str, Any] | None, head: str = "") -> bool | None:
    """What config.json, nested configurations of language models included, says about `tie_word_embeddings`;
    None where it is silent or contradicts itself. head: the output matrix in question; where a section of the
    configuration is that of a module it lies in, what other sections say is about others."""
    said = set(_tie_values(_of_module(config or {}, head.split("."))))
    return said.pop() if len(said) == 1 else None


def _of_module(config: Mapping[str, Any], modules: Sequence[str]) -> Mapping[str, Any]:
    """The configuration without the sections of other modules, where one is of one of these."""
    own = {f"{module}_config" for module in modules} & {
        k for k, v in config.items() if isinstance(v, Mapping)
    }
    if not own:
        return config
    return {k: v for k, v in config.items() if k in own or not isinstance(v, Mapping)}


def _tie_values(config: Mapping[str, Any]) -> Iterator[bool]:
    value = config.get("tie_word_embeddings")
    if isinstance(value, bool):
        yield value
    for key, section in config.items():
        if isinstance(section, Mapping) and not _OTHER_SECTIONS.search(str(key)):
            yield from _tie_values(section)


def has_tied_embeddings(config: Mapping[str, Any] | None, names: Iterable[str]) -> bool:
    """Whether a model of this configuration takes its output matrix from its embeddings.

    As config.json says; where it does not say (tied is the default of transformers, and defaults are left
    out), whether no output matrix is stored. False without a config.json.
    """
    if config is None:
        return False
    said = tie_in_config(config)
    return said if said is not None else not any(map(is_head, names))
