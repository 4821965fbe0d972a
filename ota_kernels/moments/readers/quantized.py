"""Optimizer states of torchao: tensors of subclasses that keep codes and one scale per block.

    OptimState8bit   v_i = qmap[code_i] * scale[i // block]; block = elements / scales
    OptimState4bit   the same, two codes in a byte, the high half first
    OptimStateFp8    v_i = float8 code_i * scale[i // block]

A file that torch.save wrote names the class and holds its parts as attributes; here it is an `Inert`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from ...errors import InputError
from ...io.inert import Inert

_CLASSES = ("OptimState8bit", "OptimState4bit", "OptimStateFp8")
_REBUILD = "torch._utils._rebuild_wrapper_subclass"


def shape_of(value: Inert) -> tuple[int, ...] | None:
    """The shape of the tensor that a quantized state stands for; None for any other object."""
    if value.path.rpartition(".")[2] not in _CLASSES:
        return None
    codes, shape = value.attributes.get("codes"), value.attributes.get("_shape")
    if shape is None and isinstance(codes, torch.Tensor):
        shape = codes.shape
    return tuple(shape) if isinstance(shape, (tuple, list, torch.Size)) else None


def reader(value: Inert, what: str) -> Callable[[int, int], np.ndarray]:
    """Reads [start, stop) of its elements as float32. Raises InputError where its parts do not fit."""
    parts = value.attributes
    codes, scale, qmap = (parts.get(name) for name in ("codes", "scale", "qmap"))
    packed = value.path.endswith("4bit")
    is_float = value.path.endswith("Fp8")
    tensors = (codes, scale) if is_float else (codes, scale, qmap)
    if not all(isinstance(part, torch.Tensor) for part in tensors):
        raise InputError(f"{what}: {value.path} without its codes and scales")
    numel = 1
    for size in shape_of(value):
        numel *= size
    stored = codes.numel() * (2 if packed else 1)
    if stored != numel or scale.numel() == 0 or numel % scale.numel():
        raise InputError(
            f"{what}: {codes.numel()} codes and {scale.numel()} scales do not fit {numel} elements"
        )
    if not is_float and qmap.numel() != (16 if packed else 256):
        raise InputError(f"{what}: qmap has {qmap.numel()} values")
    return partial(_decode, codes.reshape(-1), scale.reshape(-1), qmap, numel // scale.numel(), packed)


def _decode(
    codes: torch.Tensor, scale: torch.Tensor, qmap: Any, block: int, packed: bool, start: int, stop: int
) -> np.ndarray:
    if packed:
        pairs = codes[start // 2 : -(-stop // 2)]
        found = torch.stack([pairs >> 4, pairs & 15], dim=-1).view(-1)[start % 2 :][: stop - start]
    else:
        found = codes[start:stop]
    values = found.float() if qmap is None else qmap.float()[found.long()]
    return (values * scale.float()[torch.arange(start, stop) // block]).numpy()
