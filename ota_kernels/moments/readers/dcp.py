"""PyTorch distributed checkpoints (torch.distributed.checkpoint): sharded optimizer state of FSDP.

Keys are paths joined by dots: [prefix.]state.NAME.exp_avg_sq and .step for each parameter, and one of
- [prefix.]param_groups.NAME.betas, with flatten_optimizer_state_dict=True (torchtitan);
- [prefix.]param_groups.INDEX.betas and .params, from torch 2.4 on (accelerate, Trainer);
- [prefix.]param_groups, one list of dicts, before.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import InputError
from ...io.header import quoted
from ...io.reader import Checkpoint
from ..source import Moment, Piece, Source
from .state import as_number

if TYPE_CHECKING:
    from .dcp_storage import Storage

_METADATA_FILE = ".metadata"
# Accelerate and the Trainer keep the optimizer in a folder of its own.
_OPTIMIZER_FOLDER = "optimizer_0"
_MOMENT_KEY = re.compile(r"(?P<prefix>(?:.*?\.)??)state\.(?P<name>.+)\.exp_avg_sq")


def recognise_dcp(path: Path) -> bool:
    """Whether `path` or its folder optimizer_0 is a torch distributed checkpoint."""
    return _folder(path) is not None


def read_dcp(path: Path, model: Checkpoint | None) -> Source:
    """The second moments of a distributed checkpoint: the folder with .metadata, or one with optimizer_0/.

    model: is not needed. Raises InputError for files that are missing or damaged, and for a state that is
    keyed by number.
    """
    from .dcp_storage import Storage

    folder = _folder(path)
    if folder is None:
        raise InputError(f"checkpoint: {path}: holds neither {_METADATA_FILE} nor {_OPTIMIZER_FOLDER}/")
    storage = Storage(folder)
    keys = {key: match for key in storage.shapes if (match := _MOMENT_KEY.fullmatch(key))}
    if not keys:
        raise InputError(
            f"{storage.where}: holds no optimizer state with exp_avg_sq: name the optimizer's folder"
        )
    groups = {prefix: _Groups(storage, prefix) for prefix in {match["prefix"] for match in keys.values()}}
    moments: dict[str, Moment] = {}
    for key, match in keys.items():
        name = match["name"]
        if name.isdigit():
            raise InputError(
                f"{storage.where}: {quoted(key)}: its optimizer state is keyed by number, not by name: "
                "save what get_optimizer_state_dict returns"
            )
        if name in moments:
            raise InputError(f"{storage.where}: several optimizers have second moments of {quoted(name)}")
        step = _number(storage, f"{match['prefix']}state.{name}.step")
        moments[name] = Moment(
            name, storage.shapes[key], tuple(_pieces(storage, key)), step, groups[match["prefix"]].beta2(name)
        )
    listed = {name for group in groups.values() for name in group.names}
    skipped = dict.fromkeys(sorted(listed - moments.keys()), "never stepped")
    return Source("dcp", tuple(moments.values()), skipped)


class _Groups:
    """The param_groups beside the states under `prefix`. names: of the parameters that they list."""

    def __init__(self, storage: Storage, prefix: str) -> None:
        self._storage = storage
        self._root = f"{prefix}param_groups"
        self._listed = {
            name: group.get("betas") for group in self._groups() for name in group.get("params") or ()
        }
        flat = re.compile(re.escape(self._root) + r"\.(.*\D.*)\.betas")
        self._flat = {match[1]: key for key in storage.objects if (match := flat.fullmatch(key))}
        self.names = {*self._listed, *self._flat}

    def beta2(self, name: str) -> float | None:
        """Of the group that lists `name`; None where nothing says it."""
        if name in self._flat:
            return self._beta2(self._storage.read_object(self._flat[name]))
        return self._beta2(self._listed.get(name))

    def _groups(self) -> list[dict[str, Any]]:
        """The groups that list their parameters. Raises InputError for anything else under their keys."""
        if self._root in self._storage.objects:
            groups = self._storage.read_object(self._root)
        else:
            groups = list(self._numbered())
        if not isinstance(groups, list) or not all(
            isinstance(group, dict) and _are_names(group.get("params")) for group in groups
        ):
            raise InputError(f"{self._storage.where}: {quoted(self._root)} does not list parameters by name")
        return groups

    def _numbered(self) -> Iterator[dict[str, Any]]:
        for index in count():
            keys = {key: f"{self._root}.{index}.{key}" for key in ("params", "betas")}
            if keys["params"] not in self._storage.objects:
                return
            yield {
                key: self._storage.read_object(at) for key, at in keys.items() if at in self._storage.objects
            }

    def _beta2(self, betas: Any) -> float | None:
        beta2 = betas[1] if isinstance(betas, (tuple, list)) and len(betas) > 1 else None
        return as_number(beta2, f"{self._storage.where}: beta2 in {self._root}")


def _are_names(names: Any) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def _folder(path: Path) -> Path | None:
    folders = (path, path / _OPTIMIZER_FOLDER)
    return next((folder for folder in folders if os.path.isfile(folder / _METADATA_FILE)), None)


def _number(storage: Storage, key: str) -> float | None:
    """The number stored under `key`, as a tensor of one element or as an object; None where there is none."""
    if key in storage.objects:
        return as_number(storage.read_object(key), f"{storage.where}: {quoted(key)}")
    shape = storage.shapes.get(key)
    if shape is None or math.prod(shape) != 1:
        return None
    storage.boxes(key)
    return as_number(storage.read(key, (0,) * len(shape), shape).item(), f"{storage.where}: {quoted(key)}")


def _pieces(storage: Storage, key: str) -> Iterator[Piece]:
    """Ranges of whole rows that cut no stored part, so that each part is read once."""
    shape = storage.shapes[key]
    boxes = storage.boxes(key)
    if not shape:
        yield Piece(0, 1, partial(_read, storage, key, (), ()))
        return
    row = math.prod(shape[1:])
    for start, stop in _uncut(boxes, shape[0]):
        if row * (stop - start):
            offsets, sizes = (start, *(0 for _ in shape[1:])), (stop - start, *shape[1:])
            yield Piece(start * row, (stop - start) * row, partial(_read, storage, key, offsets, sizes))


def _uncut(boxes: list[tuple[tuple[int, ...], tuple[int, ...]]], rows: int) -> Iterator[tuple[int, int]]:
    """[start, stop) row ranges that cover all rows and whose bounds lie within no box."""
    start = reached = 0
    for first, taken in sorted((offsets[0], sizes[0]) for offsets, sizes in boxes if sizes[0]):
        if first >= reached > start:
            yield start, reached
            start = reached
        reached = max(reached, first + taken)
    yield start, rows


def _read(storage: Storage, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> np.ndarray:
    return storage.read(key, offsets, sizes).reshape(-1)
