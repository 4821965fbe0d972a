"""Files of one rank each, whose states are DTensors (FSDP2): their local tensors, put together again.

A DTensor that torch.save wrote holds the rank's `_local_tensor`, and in `_spec` the placements (Shard(dim) on
a mesh of one dimension) and the shape of the whole. Rank i has the i-th part along dim; the last ones may be
shorter, or empty.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import InputError
from ...io.header import quoted
from ...io.inert import Inert

_RANK = re.compile(r"(?P<head>.*rank[_-]?)(?P<rank>\d+)(?P<tail>[^/]*\.(?:pt|pth|bin))")
_WORLD = re.compile(r"world_size[_-]?(\d+)")
_OPTIMIZER = re.compile(r"optim", re.IGNORECASE)

Shape = tuple[int, ...]


def is_dtensor(value: Any) -> bool:
    return isinstance(value, Inert) and value.path.rpartition(".")[2] == "DTensor"


def shape_of(value: Inert) -> Shape | None:
    """The shape of the whole tensor that a rank's DTensor is a part of; None for any other object."""
    if not is_dtensor(value):
        return None
    spec = value.attributes.get("_spec")
    meta = spec.attributes.get("tensor_meta") if isinstance(spec, Inert) else None
    if not isinstance(meta, Inert):
        return None
    shape = meta.args[0] if meta.args else meta.attributes.get("shape")
    return tuple(shape) if isinstance(shape, (tuple, list)) else None


def rank_files(file: Path) -> list[Path]:
    """`file`, or the files of all ranks by rank, if it is one of them. InputError where one is missing."""
    match = _RANK.fullmatch(file.name)
    if match is None or not _OPTIMIZER.search(file.name):
        return [file]
    found: dict[int, Path] = {}
    for path in file.parent.iterdir():
        other = _RANK.fullmatch(path.name)
        if other and (other["head"], other["tail"]) == (match["head"], match["tail"]):
            found[int(other["rank"])] = path
    world = _WORLD.search(file.name)
    count = int(world[1]) if world else max(found) + 1
    missing = next((rank for rank in range(count) if rank not in found), None)
    if missing is not None:
        raise InputError(
            f"checkpoint: {file.parent}: lacks the file of rank {missing} beside {file.name}: copy the files "
            "of all ranks into one folder"
        )
    return [found[rank] for rank in range(count)]


def first_rank_file(folder: Path) -> Path | None:
    """The optimizer's file of rank 0 in a folder of files by rank, or None."""
    if not folder.is_dir():
        return None
    found = [
        path
        for path in sorted(folder.iterdir())
        if (match := _RANK.fullmatch(path.name)) and int(match["rank"]) == 0 and _OPTIMIZER.search(path.name)
    ]
    return found[0] if len(found) == 1 else None


def join(states: Sequence[Mapping[Any, Any]], where: str) -> dict[Any, Any]:
    """One optimizer's state out of those of all ranks. Raises InputError where they do not fit."""
    if any(state.keys() != states[0].keys() for state in states):
        raise InputError(f"{where}: the files of its ranks have different parameters: are they of one step?")
    return {
        key: {
            name: _joined(
                [state[key].get(name) for state in states], f"{where}: state[{quoted(key)}]: {name}"
            )
            for name in values
        }
        if isinstance(values, dict)
        else values
        for key, values in states[0].items()
    }


def _joined(parts: Sequence[Any], what: str) -> Any:
    first = parts[0]
    if not any(map(is_dtensor, parts)):
        if isinstance(first, torch.Tensor) and first.numel() > 1 and len(parts) > 1:
            raise InputError(f"{what}: is a plain tensor in each rank's file: which part it is, is not said")
        return first
    if not all(map(is_dtensor, parts)):
        raise InputError(f"{what}: is a DTensor in some ranks' files only")
    return whole(parts, what)


def whole(parts: Sequence[Inert], what: str) -> Any:
    """The tensor that the DTensors of all ranks are. Raises InputError where they are not all of it."""
    from .values import Lazy, Values

    shape, locals_ = shape_of(parts[0]), [part.attributes.get("_local_tensor") for part in parts]
    placements = parts[0].attributes["_spec"].attributes.get("placements") if shape is not None else None
    if not isinstance(placements, (tuple, list)) or len(placements) != 1:
        raise InputError(
            f"{what}: is spread over a mesh of several dimensions: save one state dict of all ranks"
        )
    if not all(isinstance(local, torch.Tensor) for local in locals_):
        raise InputError(f"{what}: some rank's file holds no part of it")
    kind = placements[0].path.rpartition(".")[2]
    dimension = placements[0].attributes.get("dim")
    if kind == "Replicate":
        return locals_[0]
    if kind != "Shard" or not isinstance(dimension, int):
        raise InputError(f"{what}: is placed as {kind}: save one state dict of all ranks")
    filled = [local for local in locals_ if local.numel()]
    sizes = sum(local.shape[dimension] for local in filled)
    if sizes != shape[dimension] or any(
        local.shape[:dimension] + local.shape[dimension + 1 :] != shape[:dimension] + shape[dimension + 1 :]
        for local in filled
    ):
        raise InputError(
            f"{what}: the parts in {len(parts)} files do not make {list(shape)}: is one missing?"
        )
    dtype = str(filled[0].dtype).removeprefix("torch.") if filled else "float32"
    return Lazy(
        shape,
        dtype,
        lambda: Values(math.prod(shape), partial(_read, filled, dimension, math.prod(shape[1:]))),
    )


def _read(parts: Sequence[torch.Tensor], dimension: int, row: int, start: int, stop: int) -> np.ndarray:
    """[start, stop) of the whole, by rows of its first dimension."""
    if start == stop:
        return np.zeros(0, np.float32)
    first, last = start // row, -(-stop // row)
    if dimension:
        rows = torch.cat([part[first:last].float() for part in parts], dimension)
    else:
        bounds = np.cumsum([0, *(part.shape[0] for part in parts)])
        cuts = [
            part[max(first - low, 0) : max(last - low, 0)].float()
            for part, low in zip(parts, bounds, strict=False)
        ]
        rows = torch.cat(cuts)
    return rows.reshape(-1)[start - first * row : stop - first * row].numpy()
