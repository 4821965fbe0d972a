"""A file of `torch.save(optimizer.state_dict())`, as the Hugging Face Trainer and accelerate write it too."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ...errors import InputError
from ...io import torchfile
from ...io.header import quoted
from ...io.reader import Checkpoint
from ..source import Source
from . import adafactor, adam, eight_bit
from .matching import match_by_shape, match_in_order
from .order import UnknownOrderError, parameter_order
from .state import State, as_number

_FILES = ("optimizer.pt", "optimizer.bin", "optimizer.pth")
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_TRAINER_FILE = "trainer_state.json"
_HOLDERS = ("optimizer", "optimizer_state_dict")
_LABEL = "checkpoint"
# What torch.compile, FSDP and activation checkpointing put into parameter names.
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARALLEL = "module."  # DistributedDataParallel, which a model may also call a part of its own

Key = int | str


@dataclass(frozen=True)
class _Group:
    """One of param_groups. keys: its parameters in the state; names: their names where it says them."""

    keys: tuple[Key, ...]
    names: tuple[str, ...] | None
    beta2: float | None


_LAYOUTS = (adam, eight_bit, adafactor)


def recognise_trainer(path: Path) -> bool:
    """Whether `path` is a checkpoint of the Hugging Face Trainer with one optimizer file, or is that file."""
    folder = path.parent if path.name in _FILES else path
    return (folder / _TRAINER_FILE).is_file() and _file(folder) is not None


def recognise_torch(path: Path) -> bool:
    """Whether `path` is a torch file, or a folder with an optimizer's."""
    return path.suffix in _SUFFIXES if path.is_file() else _file(path) is not None


def read_trainer(path: Path, model: Checkpoint | None) -> Source:
    """As `read_torch`; the Trainer's rules for groups tell mappings apart that shapes do not."""
    return _read("trainer", path, model)


def read_torch(path: Path, model: Checkpoint | None) -> Source:
    """The second moments in a torch file, or in the optimizer file of a folder.

    model: needed where the state is keyed by number. Raises InputError for a file that holds no optimizer
    state or no second moments, or where it is not certain which parameter a state belongs to.
    """
    return _read("torch", path, model)


def _file(path: Path) -> Path | None:
    return next((path / name for name in _FILES if (path / name).is_file()), None)


def _read(format_name: str, path: Path, model: Checkpoint | None) -> Source:
    file = path if path.is_file() else _file(path)
    if file is None:
        raise InputError(f"{_LABEL}: {path}: holds none of {', '.join(_FILES)}")
    where = f"{_LABEL}: {file}"
    content = _optimizer_state(torchfile.load(file, _LABEL), where)
    states = _states(content["state"], file, where)
    if not any(map(_layout, states.values())):
        kept = sorted({key for state in states.values() for key in state.keys})
        raise InputError(f"{where}: holds no second moments, only {quoted(kept)}: was it trained with Adam?")
    groups = _groups(content, states, where)
    named = _names(groups, states, model, where, by_trainer=format_name == "trainer")
    moments, skipped = [], {}
    for group, names in zip(groups, named, strict=True):
        for key, name in zip(group.keys, names, strict=True):
            state = states.get(key)
            layout = _layout(state)
            if layout is not None:
                moments.append(layout.moment(state, name, group.beta2))
            elif name is not None:
                skipped[name] = "never stepped" if state is None else f"only {', '.join(state.keys)}"
    return Source(format_name, tuple(moments), skipped)


def _optimizer_state(content: Any, where: str) -> dict[str, Any]:
    """The state dict of the optimizer, which may lie in a dict of other things."""
    if isinstance(content, dict):
        for candidate in (content, *(content.get(holder) for holder in _HOLDERS)):
            if isinstance(candidate, dict) and isinstance(candidate.get("state"), dict):
                return candidate
    raise InputError(
        f'{where}: not an optimizer\'s state: it has no dict "state", alone or under {" or ".join(_HOLDERS)}'
    )


def _states(entries: dict[Any, Any], file: Path, where: str) -> dict[Key, State]:
    states = {}
    for key, values in entries.items():
        entry = f"{where}: state[{quoted(key)}]"
        if not isinstance(key, (int, str)) or not isinstance(values, dict):
            raise InputError(f"{entry}: is not a dict under a parameter's number or name")
        nested = values.get(eight_bit.NESTED)
        if values:
            states[key] = State(values | nested if isinstance(nested, dict) else values, file, entry)
    return states


def _layout(state: State | None) -> ModuleType | None:
    """The module of _LAYOUTS that reads `state`; None for a parameter without second moments."""
    return next((layout for layout in _LAYOUTS if state is not None and layout.fits(state)), None)


def _groups(content: Mapping[str, Any], states: Mapping[Key, State], where: str) -> list[_Group]:
    """param_groups; where there are none, one group of the names in the state."""
    found = content.get("param_groups")
    if found is None and all(isinstance(key, str) for key in states):
        return [_Group(tuple(states), None, None)]
    if not isinstance(found, list):
        raise InputError(f"{where}: has no list of param_groups: save the whole optimizer.state_dict()")
    groups = [_group(group, f"{where}: param_groups[{i}]") for i, group in enumerate(found)]
    keys = {key for group in groups for key in group.keys}
    if len(keys) < sum(len(group.keys) for group in groups):
        raise InputError(f"{where}: param_groups list a parameter twice")
    stray = next((key for key in states if key not in keys), None)
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
    betas = group.get("betas")
    beta2 = betas[1] if isinstance(betas, (list, tuple)) and len(betas) > 1 else None
    return _Group(tuple(keys), None if names is None else tuple(names), as_number(beta2, f"{where}: beta2"))


def _names(
    groups: list[_Group],
    states: Mapping[Key, State],
    model: Checkpoint | None,
    where: str,
    *,
    by_trainer: bool,
) -> list[list[str | None]]:
    """The name of each group's parameters; None where nobody can tell and none is needed."""
    if all(group.names is not None for group in groups):
        return [[_unwrapped(name, model) for name in group.names] for group in groups]
    if all(isinstance(key, str) for group in groups for key in group.keys):
        return [[_unwrapped(key, model) for key in group.keys] for group in groups]
    if model is None:
        raise InputError(
            f"{where}: its optimizer state is keyed by number, not by name: "
            "add --model with the folder of the model that was trained"
        )
    shapes = [[_shape(states.get(key)) for key in group.keys] for group in groups]
    try:
        order = parameter_order(model)
    except UnknownOrderError as missing:
        stored = {name: info.shape for name, info in model.tensors.items() if info.dtype.is_float}
        return match_by_shape(shapes, stored, where, str(missing))
    return match_in_order(shapes, order.shapes, where, order.decaying if by_trainer else ())


def _unwrapped(name: str, model: Checkpoint | None) -> str:
    """The model's name of a parameter that wrappers may have renamed."""
    name = _WRAPPERS.sub("", name)
    inner = name.removeprefix(_PARALLEL)
    return inner if model is not None and name not in model.tensors and inner in model.tensors else name


def _shape(state: State | None) -> tuple[int, ...] | None:
    layout = _layout(state)
    return None if layout is None else layout.shape(state)
