"""The files of a DeepSpeed checkpoint: found and loaded without DeepSpeed, their pickles held to data."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....errors import InputError
from ....io import torchfile
from ....io.header import quoted

LABEL = "checkpoint"
_OPTIMIZER_SUFFIX = "_optim_states.pt"
_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
# ZeRO-1 and 2 write the first, ZeRO-3 the second and one more for each rank, which says the same.
_MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelStates:
    """What the model's file says of its parameters.

    groups: shapes by name, in the order of the flat partitions; frozen: shapes of parameters that were not
    trained; aliases: name -> the name of the parameter that it shares; round_robin: whether ZeRO-2 dealt the
    parameters out to several ranks instead of keeping their order (round_robin_gradients).
    """

    path: Path
    groups: list[dict[str, Shape]]
    frozen: dict[str, Shape]
    aliases: dict[str, str]
    round_robin: bool = False

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of all trained parameters."""
        return {name: shape for group in self.groups for name, shape in group.items()}


def load(path: Path) -> dict[str, Any]:
    """The dict in a file of the checkpoint, its tensors mapped. Raises InputError for anything else."""
    content = load_value(path)
    if not isinstance(content, dict):
        raise InputError(f"{LABEL}: {path}: holds a {type(content).__name__}, not a dict: is it DeepSpeed's?")
    return content


def load_value(path: Path) -> Any:
    """The content of a file of the checkpoint. Raises InputError where torchfile.load does."""
    return torchfile.load_stored(path, LABEL)


def latest_folder(path: Path, pointer: str) -> Path:
    """The folder beside the file `pointer` that it names. Raises InputError where there is none."""
    try:
        tag = (path / pointer).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{LABEL}: {path / pointer}: cannot be read: {error}") from error
    if not tag or not os.path.isdir(path / tag):
        raise InputError(
            f"{LABEL}: {path / pointer}: names the folder {quoted(tag)}, which is not there: "
            "give the folder of the step that is meant"
        )
    return path / tag


def has_optimizer_files(folder: Path) -> bool:
    """Whether some rank's optimizer file lies in `folder` itself."""
    return any(_OPTIMIZER_FILE.fullmatch(name) for name in _names(folder))


def has_whole_optimizer(folder: Path) -> bool:
    """Whether `folder` is of stage 0 without parallelism: one model file, which holds the optimizer, too."""
    names = _names(folder)
    return "zero" not in names and [n for n in names if n.endswith("_model_states.pt")] == [_MODEL_FILES[0]]


def optimizer_files(folder: Path) -> list[Path]:
    """The optimizer files of a folder, by rank.

    Raises InputError where one is missing, and for tensor, pipeline or expert parallelism.
    """
    files: dict[int, Path] = {}
    for name in _names(folder):
        if not name.endswith(_OPTIMIZER_SUFFIX):
            continue
        match = _OPTIMIZER_FILE.fullmatch(name)
        if match is None:
            raise InputError(
                f"{LABEL}: {folder / name}: is not of plain ZeRO: experts spread over ranks are not supported"
            )
        if int(match[2]):
            raise InputError(
                f"{LABEL}: {folder / name}: is of tensor or pipeline parallelism: "
                "convert the checkpoint with DeepSpeed's ds_to_universal.py"
            )
        other = files.setdefault(int(match[1]), folder / name)
        if other.name != name:
            raise InputError(
                f"{LABEL}: {folder}: holds {other.name} and {name}: remove the older run's files"
            )
    if not files:
        raise InputError(f"{LABEL}: {folder}: holds no *{_OPTIMIZER_SUFFIX} files")
    gap = next((rank for rank in range(len(files)) if rank not in files), None)
    if gap is not None:
        raise missing_rank(folder, gap)
    return [files[rank] for rank in range(len(files))]


def missing_rank(folder: Path, rank: int) -> InputError:
    """The error for a folder without the file of `rank`."""
    return InputError(
        f"{LABEL}: {folder}: lacks the optimizer file of rank {rank}: "
        "copy the files of all ranks into one folder"
    )


def model_file(folder: Path) -> Path | None:
    """The file that names the parameters, or None."""
    return next((folder / name for name in _MODEL_FILES if os.path.isfile(folder / name)), None)


def model_states(folder: Path) -> ModelStates:
    """The names and shapes in a folder's model file. Raises InputError if it is missing or malformed."""
    path = model_file(folder)
    if path is None:
        raise InputError(
            f"{LABEL}: {folder}: lacks {_MODEL_FILES[0]} or {_MODEL_FILES[1]}, which name the parameters"
        )
    content = load(path)
    where = f"{LABEL}: {path}"
    listed = content.get("param_shapes")
    if not isinstance(listed, list):
        raise InputError(f"{where}: has no list param_shapes: was it trained with ZeRO?")
    groups = [_shapes(group, f"{where}: param_shapes[{i}]") for i, group in enumerate(listed)]
    names = [name for group in groups for name in group]
    if len(set(names)) < len(names):
        raise InputError(f"{where}: param_shapes names a parameter twice")
    aliases = _aliases(content.get("shared_params"), where)
    frozen = content.get("frozen_param_shapes")
    if frozen is None:
        # ZeRO-1 does not list frozen parameters, but keeps their weights.
        known = {*names, *aliases, *(content.get("buffer_names") or ())}
        frozen = {name: shape for name, shape in _weights(content).items() if name not in known}
    frozen = _shapes(frozen, f"{where}: frozen_param_shapes")
    dealt = path.name == _MODEL_FILES[0] and is_round_robin(content) and content.get("dp_world_size") != 1
    return ModelStates(path, groups, frozen, aliases, dealt)


def is_round_robin(content: Mapping[str, Any]) -> bool:
    """Whether the training's configuration, which a file carries, had round_robin_gradients."""
    config = content.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    return isinstance(zero, dict) and bool(zero.get("round_robin_gradients"))


def _names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def _shapes(shapes: Any, where: str) -> dict[str, Shape]:
    if not isinstance(shapes, Mapping):
        raise InputError(f"{where}: is not a dict of shapes by name")
    for name, shape in shapes.items():
        if not isinstance(name, str) or not _is_shape(shape):
            raise InputError(f"{where}: {quoted(name)} has no shape but {quoted(shape)}")
    return {name: tuple(shape) for name, shape in shapes.items()}


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, (tuple, list)) and all(isinstance(size, int) and size >= 0 for size in shape)


def _aliases(shared: Any, where: str) -> dict[str, str]:
    if shared is None:
        return {}
    if not isinstance(shared, Mapping) or not all(
        isinstance(n, str) for pair in shared.items() for n in pair
    ):
        raise InputError(f"{where}: shared_params is not a dict of names")
    return dict(shared)


def _weights(content: Mapping[str, Any]) -> dict[str, Shape]:
    """Shapes of the stored weights that are tensors; none where they lie in files of their own."""
    weights = content.get("module")
    if not isinstance(weights, Mapping):
        return {}
    return {name: tuple(weight.shape) for name, weight in weights.items() if hasattr(weight, "shape")}
