"""DeepSpeed universal checkpoints (ds_to_universal.py): one folder per parameter, one file per state."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....errors import InputError
from ....io.reader import Checkpoint
from ...source import Moment, Source
from ..state import State, as_number, pieces
from . import files
from .files import LABEL, ModelStates, Shape, with_aliases
from .rank import beta2_of, check_param_groups, param_group

_MOMENT = "exp_avg_sq"
_FOLDER = "zero"
_POINTER = "latest_universal"


def recognise_universal(path: Path) -> bool:
    """Whether `path` holds a folder zero/, or a file `latest_universal` that names such a folder."""
    return os.path.isdir(path / _FOLDER) or os.path.isfile(path / _POINTER)


def read_universal(path: Path, model: Checkpoint | None) -> Source:
    """The second moments of a universal checkpoint, or of the one that its file `latest_universal` names.

    model: gives the shapes of parameters stored flat (from ZeRO-3) where the model's file was not kept.
    Raises InputError for files that are missing or damaged, and where sizes do not fit.
    """
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
    moments = {
        name: _moment(parameters / name, _known_shape(name, states, model), optimizer) for name in names
    }
    skipped = dict.fromkeys(states.frozen, "frozen")
    skipped |= {name: "never stepped" for name in states.shapes if name not in moments}
    return Source("deepspeed-universal", with_aliases(moments, states, model), skipped)


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

    def step(self, name: str) -> float | None:
        index = self.groups.get(name)
        state = self.states.get(index)
        step = state.get("step") if isinstance(state, dict) else None
        if step is None:
            step = param_group(self.param_groups, index).get("step")
        return as_number(step, f"{self.where}: step of group {index}")

    def beta2(self, name: str) -> float | None:
        return beta2_of(self.param_groups, self.groups.get(name), self.where)


_NO_STATES = ModelStates(Path(), [], {}, {})


def _moment_file(folder: Path) -> Path:
    return folder / f"{_MOMENT}.pt"


def _known_shape(name: str, states: ModelStates, model: Checkpoint | None) -> Shape | None:
    if name in states.shapes or model is None or name not in model.tensors:
        return states.shapes.get(name)
    return model.tensors[name].shape


def _moment(folder: Path, known: Shape | None, optimizer: _Optimizer) -> Moment:
    """The moments in one parameter's folder. known: its shape, which is not with ZeRO-3's values."""
    path = _moment_file(folder)
    content = files.load_value(path)
    is_flat = not isinstance(content, dict)
    state = State(
        {_MOMENT: content} if is_flat else {_MOMENT: content.get("param")}, path, f"{LABEL}: {path}"
    )
    shape = state.shape(_MOMENT)
    if is_flat:
        if known is None:
            raise InputError(
                f"{LABEL}: {path}: is flat, and no *_model_states.pt has its shape: "
                "add --model with the folder of the model that was trained"
            )
        if math.prod(known) != math.prod(shape):
            raise InputError(f"{LABEL}: {path}: has {list(shape)} elements, the parameter {list(known)}")
        shape = known
    step = _step(folder / "step.pt")
    if step is None:
        step = optimizer.step(folder.name)
    return Moment(folder.name, shape, pieces(state.buffer(_MOMENT)), step, optimizer.beta2(folder.name))


def _step(path: Path) -> float | None:
    return as_number(files.load_value(path), f"{LABEL}: {path}") if os.path.isfile(path) else None
