"""LoRA adapters, as PEFT names and orders their matrices.

    optimizer   base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight
    file        base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
    model       model.layers.0.self_attn.q_proj.weight

PEFT puts an adapter into each module of the base model, so its parameters come in the base's order of
modules, and within a module in the order of SUFFIXES.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...io.header import parse_json_object
from ...io.reader import Checkpoint
from .transformers_layout import UnknownOrderError, build

Shape = tuple[int, ...]

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
_MATRIX = re.compile(r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?$")
SUFFIXES = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
)


def is_adapter(names: Iterable[str]) -> bool:
    """Whether some of the names are an adapter's matrices."""
    return any(_MATRIX.search(name) for name in names)


def config_of(folder: Path) -> dict[str, Any]:
    """adapter_config.json in `folder`; empty without one."""
    path = folder / CONFIG
    return parse_json_object(path.read_bytes(), str(path)) if path.is_file() else {}


def scaling(config: Mapping[str, Any], rank: int, module: str) -> float:
    """The factor of B A: alpha / r, or alpha / sqrt(r) (rsLoRA); patterns give some modules an alpha of their
    own."""
    alpha = config.get("lora_alpha", rank)
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if module == pattern or module.endswith(f".{pattern}"):
            alpha = own
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def adapter_order(adapter: Checkpoint, base: Checkpoint | None) -> dict[str, Shape]:
    """Shapes of the adapter's parameters by name in its file, in the order of `named_parameters`.

    base: the model that it is for; else the folder that adapter_config.json names. Raises UnknownOrderError
    where neither can be had, or the base has no module for some matrix.
    """
    built = build(_base_of(adapter) if base is None else base)
    order: dict[str, Shape] = {}
    for module, _ in built.named_modules():
        for suffix in _suffixes(module, adapter.tensors):
            name = f"{PREFIX}{module}.{suffix}"
            order[name] = adapter.tensors[name].shape
    lost = next((name for name in adapter.tensors if name not in order), None)
    if lost is not None:
        raise UnknownOrderError(f"the base model has no module for {lost!r} of {adapter.root}")
    return order


def _suffixes(module: str, tensors: Mapping[str, Any]) -> list[str]:
    return [suffix for suffix in (*SUFFIXES, "weight", "bias") if f"{PREFIX}{module}.{suffix}" in tensors]


def _base_of(adapter: Checkpoint) -> Checkpoint:
    named = config_of(adapter.root).get("base_model_name_or_path")
    if isinstance(named, str) and os.path.isdir(named):
        return Checkpoint.open(Path(named), "base")
    raise UnknownOrderError(
        f"{adapter.root} is an adapter, whose order is its base's: add --base with the folder of that model"
    )
