"""A file of `torch.save(optimizer.state_dict())`, as the Hugging Face Trainer and accelerate write it too.

file --> content.py: optimizers and weights in it --> kinds.py: whose states --> numbered.py: whose names
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...io.header import quoted
from ..source import Source
from . import kinds
from .content import Optimizer, load, optimizers, weight_shapes
from .eight_bit import NESTED
from .kinds import Accepted
from .numbered import Entry, find_names
from .request import Request
from .sharded import first_rank_file, join, rank_files
from .state import State

_FILES = ("optimizer.pt", "optimizer.bin", "optimizer.pth")
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_TRAINER_FILE = "trainer_state.json"
_FURTHER = re.compile(r"optimizer_\d+\.(bin|pt)")
_LABEL = "checkpoint"
# Weights beside an optimizer's file, in the model's order as torch saves them.
_WEIGHTS = ("pytorch_model.bin", "model.pt", "model.pth")

Key = int | str


@dataclass(frozen=True)
class _Group:
    """One of param_groups. keys: its parameters in the state; names: their names where it says them."""

    keys: tuple[Key, ...]
    names: tuple[str, ...] | None
    settings: Mapping[str, Any]


def recognise_trainer(path: Path) -> bool:
    """Whether `path` is a checkpoint of the Hugging Face Trainer with one optimizer file, or is that file."""
    folder = path.parent if path.name in _FILES else path
    return (folder / _TRAINER_FILE).is_file() and _file(folder) is not None


def recognise_torch(path: Path) -> bool:
    """Whether `path` is a torch file, or a folder with an optimizer's."""
    if path.is_file():
        return path.suffix in _SUFFIXES or zipfile.is_zipfile(path)
    return _file(path) is not None


def read_trainer(path: Path, request: Request) -> Source:
    """As `read_torch`; the Trainer's rules for groups tell mappings apart that shapes do not."""
    return _read("trainer", path, request)


def read_torch(path: Path, request: Request) -> Source:
    """The second moments in a torch file, or in the optimizer file of a folder; of all optimizers in it.

    Raises InputError for a file that holds no optimizer state or no second moments, where a state is not
    known to be Adam's or its kin's, or where it is not certain which parameter a state belongs to.
    """
    return _read("torch", path, request)


def _file(path: Path) -> Path | None:
    named = next((path / name for name in _FILES if (path / name).is_file()), None)
    return named or first_rank_file(path)


def _read(format_name: str, path: Path, request: Request) -> Source:
    file = path if path.is_file() else _file(path)
    if file is None:
        raise InputError(f"{_LABEL}: {path}: holds none of {', '.join(_FILES)}")
    files = rank_files(file)
    content = load(files[0], _LABEL)
    found = optimizers(content, f"{_LABEL}: {file}")
    if len(files) > 1:
        found = _joined(files, found)
    weights = weight_shapes(content) or _weights_beside(file)
    read = [_read_one(one, file, weights, request, by_trainer=format_name == "trainer") for one in found]
    moments = tuple(moment for source in read for moment in source.moments)
    covered = {moment.name for moment in moments}
    skipped = {n: why for source in read for n, why in source.skipped.items() if n not in covered}
    notes = [note for source in read for note in source.notes] + _further_files(file)
    return Source(format_name, moments, skipped, notes=tuple(dict.fromkeys(notes)))


def _joined(files: list[Path], first: list[Optimizer]) -> list[Optimizer]:
    """The optimizers in the files of all ranks, of which rank 0's are read already."""
    others = [optimizers(load(file, _LABEL), f"{_LABEL}: {file}") for file in files[1:]]
    if any(len(one) != len(first) for one in others):
        raise InputError(f"{first[0].where}: the files of its ranks hold different optimizers")
    return [
        replace(one, state=join([one.state, *(other[i].state for other in others)], one.where))
        for i, one in enumerate(first)
    ]


def _read_one(
    optimizer: Optimizer,
    file: Path,
    weights: dict[str, tuple[int, ...]],
    request: Request,
    *,
    by_trainer: bool,
) -> Source:
    where = optimizer.where
    groups = _groups(optimizer, where)
    states = _states(optimizer, groups, file, where)
    accepted = {key: kinds.accept(state, as_adam=request.as_adam) for key, state in states.items()}
    entries = [
        [
            Entry(key, None if group.names is None else group.names[i], _shape(accepted.get(key)))
            for i, key in enumerate(group.keys)
        ]
        for group in groups
    ]
    if not any(accepted.values()):
        return Source("torch", (), {str(key): kinds.absence(state) for key, state in states.items()})
    named, notes = find_names(entries, weights, request, where, by_trainer=by_trainer)
    moments, skipped = [], {}
    for group, names in zip(groups, named, strict=True):
        for key, name in zip(group.keys, names, strict=True):
            found = accepted.get(key)
            if found is not None:
                moments.append(found.moment(name))
                notes = [*notes, found.note] if found.note else notes
            elif name is not None:
                skipped[name] = kinds.absence(states.get(key))
    return Source("torch", tuple(moments), skipped, notes=tuple(dict.fromkeys(notes)))


def _states(optimizer: Optimizer, groups: list[_Group], file: Path, where: str) -> dict[Key, State]:
    settings = {key: group.settings for group in groups for key in group.keys}
    states = {}
    for key, values in optimizer.state.items():
        entry = f"{where}: state[{quoted(key)}]"
        if not isinstance(key, (int, str)) or not isinstance(values, dict):
            raise InputError(f"{entry}: is not a dict under a parameter's number or name")
        nested = values.get(NESTED)
        if isinstance(nested, dict):
            values = {k: v for k, v in values.items() if k != NESTED} | nested
        if values:
            states[key] = State(values, file, entry, settings.get(key))
    return states


def _groups(optimizer: Optimizer, where: str) -> list[_Group]:
    """param_groups; where there are none, one group of the names in the state."""
    keys = [key for key, values in optimizer.state.items() if values]
    found = optimizer.groups
    if found is None and all(isinstance(key, str) for key in keys):
        return [_Group(tuple(keys), None, {})]
    if not isinstance(found, list):
        raise InputError(f"{where}: has no list of param_groups: save the whole optimizer.state_dict()")
    groups = [_group(group, f"{where}: param_groups[{i}]") for i, group in enumerate(found)]
    listed = {key for group in groups for key in group.keys}
    if len(listed) < sum(len(group.keys) for group in groups):
        raise InputError(f"{where}: param_groups list a parameter twice")
    stray = next((key for key in keys if key not in listed), None)
    if stray is not None:
        raise InputError(f"{where}: state[{quoted(stray)}] is in none of the param_groups")
    return groups


def _group(group: Any, where: str) -> _Group:
    keys = group.get("params") if isinstance(group, dict) else None
    if not isinstance(keys, list) or not all(isinstance(key, (int, str)) for key in keys):
        raise InputError(f"{where}: has no list params of numbers or names")
    names = group.get("param_names")
    if names is not None and not (
        isinstance(names, list) and len(names) == len(keys) and all(isinstance(name, str) for name in names)
    ):
        raise InputError(f"{where}: param_names are not one name for each of its {len(keys)} parameters")
    return _Group(tuple(keys), None if names is None else tuple(names), group)


def _shape(accepted: Accepted | None) -> tuple[int, ...] | None:
    return None if accepted is None else accepted.shape


def _weights_beside(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights in a torch file beside an optimizer's file, in its order; none where it cannot be
    read, for then it says nothing."""
    ranked = [file.name.replace("optim", "model", 1)] if len(rank_files(file)) > 1 else []
    for name in ranked or (_WEIGHTS if file.name in _FILES else ()):
        if (file.parent / name).is_file():
            try:
                return weight_shapes(load(file.parent / name, _LABEL))
            except InputError:
                continue
    return {}


def _further_files(file: Path) -> list[str]:
    """accelerate numbers the optimizers after the first."""
    further = sorted(path.name for path in file.parent.iterdir() if _FURTHER.fullmatch(path.name))
    if file.name not in _FILES or not further:
        return []
    return [f"{', '.join(further)} beside {file.name} holds another optimizer: name it to extract that, too"]
