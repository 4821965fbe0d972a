"""What lies in a torch file of a training run: its optimizers, and the weights in the model's order."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import InputError
from ...io import torchfile
from ...io.header import quoted
from .values import shape_of

# How deep trainers nest an optimizer's state, or the weights, in what they save.
_DEEPEST = 4
# Under what an optimizer's states lie where there is no list of param_groups beside them to tell.
_HOLDERS = ("optimizer", "optimizer_state_dict", "optim")
# Copies of the weights, and what is no weight at all.
_NO_WEIGHTS = re.compile(r"ema|teacher|swa|average|target|^state$|optim|sched|scaler|rng", re.IGNORECASE)
# Buffers that state dicts of weights hold between the parameters.
BUFFER = re.compile(
    r"(^|\.)(running_mean|running_var|num_batches_tracked|position_ids|inv_freq|original_inv_freq|masked_bias|"
    r"freqs_cis|cos_cached|sin_cached|e_score_correction_bias|expert_bias|tokens_per_expert|relative_position_index)$"
    r"|(^|\.)rotary_emb\.|\.attn\.bias$"
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Optimizer:
    """One optimizer's state dict. where: what errors call it; state: by parameter; groups: param_groups."""

    where: str
    state: dict[Any, Any]
    groups: Any


def load(path: Path, label: str) -> Any:
    """The content of a torch file, nothing in it run."""
    return torchfile.load_stored(path, label)


def optimizers(content: Any, where: str) -> list[Optimizer]:
    """The optimizers in `content`, wherever they lie in it. Raises InputError where there is none."""
    if isinstance(content, dict):
        for holder in ("", *_HOLDERS):
            plain = content if not holder else content.get(holder)
            if isinstance(plain, dict) and isinstance(plain.get("state"), dict):
                return [Optimizer(where, plain["state"], plain.get("param_groups"))]
    found = list(_nested(content, (), 0))
    if not found:
        raise InputError(
            f'{where}: not an optimizer\'s state: nowhere in it is a dict "state" with "param_groups" beside'
        )
    several = len(found) > 1
    return [
        Optimizer(
            f"{where}: {quoted('.'.join(path))}" if several else where, one["state"], one["param_groups"]
        )
        for path, one in found
    ]


def weight_shapes(content: Any) -> dict[str, Shape]:
    """Shapes of the largest state dict of weights in `content`, in its order: parameters as
    `named_parameters()` gives them, tied ones once, known buffers left out; none where there is none."""
    best: dict[str, torch.Tensor] = {}
    for weights in _weights(content, "", 0):
        best = weights if len(weights) > len(best) else best
    shapes, places = {}, set()
    for name, tensor in best.items():
        plain = isinstance(tensor, torch.Tensor)
        place = (tensor.data_ptr(), tuple(tensor.shape)) if plain and tensor.numel() else name
        is_float = not plain or tensor.is_floating_point()
        if place not in places and is_float and not BUFFER.search(name):
            shapes[name] = shape_of(tensor)
        places.add(place)
    return shapes


def _nested(content: Any, path: tuple[str, ...], depth: int) -> Iterator[tuple[tuple[str, ...], dict]]:
    if isinstance(content, dict) and isinstance(content.get("state"), dict) and "param_groups" in content:
        yield path, content
    elif depth < _DEEPEST:
        for key, value in _children(content):
            yield from _nested(value, (*path, key), depth + 1)


def _weights(content: Any, key: str, depth: int) -> Iterator[dict[str, torch.Tensor]]:
    if not isinstance(content, Mapping) or _NO_WEIGHTS.search(key) or "param_groups" in content:
        return
    tensors = {n: t for n, t in content.items() if isinstance(n, str) and shape_of(t) is not None}
    if tensors and len(tensors) >= len(content) / 2:
        yield tensors
    elif depth < _DEEPEST:
        for name, value in _children(content):
            yield from _weights(value, name, depth + 1)


def _children(content: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict):
        yield from ((str(key), value) for key, value in content.items())
    elif isinstance(content, (list, tuple)):
        yield from ((str(i), value) for i, value in enumerate(content))
