"""DeepSpeed universal checkpoints (ds_to_universal.py): one folder per parameter, one file per state."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ....errors import InputError
from ....io.reader import Checkpoint
from ...source import FactoredMoment, Moment, Source
from .. import kinds
from ..kinds import Accepted
from ..naming import unwrapped
from ..request import Request
from ..state import State, as_number
from . import files
from .files import LABEL, ModelStates, Shape
from .rank import check_param_groups, param_group

_MOMENT = "exp_avg_sq"
_FOLDER = "zero"
_POINTER = "latest_universal"


def recognise_universal(path: Path) -> bool:
    """Whether `path` holds a folder zero/, or a file `latest_universal` that names such a folder."""
    return os.path.isdir(path / _FOLDER) or os.path.isfile(path / _POINTER)


def read_universal(path: Path, request: Request | None) -> Source:
    """The second moments of a universal checkpoint, or of the one that its file `latest_universal` names.

    The request's model gives the shapes of parameters stored flat (from ZeRO-3) where the model's file was
    not kept. Raises InputError for files that are missing or damaged, where sizes do not fit, and for states
    that are not known to be Adam's or its kin's.
    """
    request = request or Request()
    folder = path if os.path.isdir(path / _FOLDER) else files.latest_folder(path, _POINTER)
    parameters = folder / _FOLDER
    names = [
        name for name in sorted(os.listdir(parameters)) if os.path.isfile(_moment_file(parameters / name))
    ]
    if not names:
        raise InputError(f"{LABEL}: {parameters}: holds no folder of a parameter with a file {_MOMENT}.pt")
    states = _NO_STATES if files.model_file(folder) is None else files.model_states(folder)
    if states.round_robin:
        raise InputError(
            f"{LABEL}: {folder}: DeepSpeed converts checkpoints of round_robin_gradients wrongly: "
            "extract from the checkpoint that was converted"
        )
    optimizer = _Optimizer.load(parameters / "optimizer_state.pt", states)
    accepted = {name: _accepted(parameters / name, optimizer, request) for name in names}
    moments = {
        name: _moment(name, _known_shape(name, states, request.model), one, is_flat, optimizer)
        for name, (one, is_flat) in accepted.items()
    }
    skipped = dict.fromkeys(states.frozen, "frozen")
    skipped |= {name: "never stepped" for name in states.shapes if name not in moments}
    notes = tuple(dict.fromkeys(one.note for one, _ in accepted.values() if one.note))
    return Source("deepspeed-universal", tuple(moments.values()), skipped, states.aliases, notes)


@dataclass(frozen=True)
class _Optimizer:
    """What the common file says of all parameters.

    groups: the flat group of each parameter by name; param_groups: of the torch optimizer; states: its state
    by flat group, which only ZeRO-3 leaves in.
    """

    where: str
    groups: Mapping[str, int]
    param_groups: list[dict[str, Any]]
    states: Mapping[int, Any]

    @classmethod
    def load(cls, path: Path, states: ModelStates) -> _Optimizer:
        """Raises InputError for a damaged file; one that is missing says nothing."""
        where = f"{LABEL}: {path}"
        content = files.load(path) if os.path.isfile(path) else {}
        param_groups = content.get("param_groups", [])
        check_param_groups(param_groups, where)
        base = content.get("optimizer_state_dict")
        kept = base.get("state") if isinstance(base, dict) else None
        groups = {name: index for index, group in enumerate(states.groups) for name in group}
        return cls(where, groups, param_groups, kept if isinstance(kept, dict) else {})

    def group(self, name: str) -> Mapping[str, Any]:
        """Settings of the parameter's group."""
        return param_group(self.param_groups, self.groups.get(name))

    def step(self, name: str) -> float | None:
        index = self.groups.get(name)
        state = self.states.get(index)
        step = state.get("step") if isinstance(state, dict) else None
        return as_number(step, f"{self.where}: step of group {index}")


_NO_STATES = ModelStates(Path(), [], {}, {})


def _moment_file(folder: Path) -> Path:
    return folder / f"{_MOMENT}.pt"


def _known_shape(name: str, states: ModelStates, model: Checkpoint | None) -> Shape | None:
    if name in states.shapes:
        return states.shapes[name]
    stored = None if model is None else model.tensors.get(unwrapped(name))
    return None if stored is None else stored.shape


def _accepted(folder: Path, optimizer: _Optimizer, request: Request) -> tuple[Accepted, bool]:
    """What lies in one parameter's folder: a file for each key of its state, and its weights in fp32.pt; and
    whether the values are flat, as ZeRO-3's are."""
    values, is_flat = {}, False
    for file in sorted(folder.glob("*.pt")):
        if file.stem != "fp32":
            content = files.load_value(file)
            if file.stem == _MOMENT:
                is_flat = not isinstance(content, dict)
            values[file.stem] = content.get("param", content) if isinstance(content, dict) else content
    state = State(values, _moment_file(folder), f"{LABEL}: {folder}", optimizer.group(folder.name))
    state.shape(_MOMENT)
    return kinds.accept(state, as_adam=request.as_adam), is_flat


def _moment(
    name: str, known: Shape | None, accepted: Accepted, is_flat: bool, optimizer: _Optimizer
) -> Moment | FactoredMoment:
    """The moments of one parameter. known: its shape, which is not with ZeRO-3's values, that are flat."""
    found = accepted.moment(name, optimizer.step(name))
    if not is_flat:
        return found
    path = f"{accepted.state.where}/{_MOMENT}.pt"
    if known is None:
        raise InputError(
            f"{path}: is flat, and no *_model_states.pt has its shape: "
            "add --model with the folder of the model that was trained"
        )
    if math.prod(known) != math.prod(found.shape):
        raise InputError(f"{path}: has {list(found.shape)} elements, the parameter {list(known)}")
    return replace(found, shape=known)
