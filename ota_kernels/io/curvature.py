"""Curvature files: the second moments of one expert, as they are or compressed (see stored.py)."""

from __future__ import annotations

import functools
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..tensors.buffer import Buffer
from ..tensors.curvature import Curvature, Full, Log8, Rank1
from . import stored, torchfile
from .folder import where
from .header import quoted
from .reader import FILE_SUFFIX, INDEX_SUFFIX, Checkpoint, fingerprint
from .stored import MOMENT

_TORCH_SUFFIXES = (".pt", ".pth", ".bin")


class Held(NamedTuple):
    """The curvature of one parameter: its shape, and a view of it."""

    shape: tuple[int, ...]
    curvature: Curvature


class CurvatureFile(ABC):
    """The second moments of one expert, mapped; every method takes the name of a parameter.

    label: what errors call it ("models[2]: preconditioner_path"); path: the file or folder.
    """

    def __init__(self, label: str, path: Path):
        self.label = label
        self.path = path

    @staticmethod
    def open(path: Path, label: str) -> CurvatureFile:
        """Open safetensors (a file, an index, a folder) or a torch optimizer file (.pt, .pth, .bin).

        A torch file must be `{"state": {parameter name: {"exp_avg_sq": tensor}}}` and is read with
        `weights_only=True`. Raises InputError for anything else; no moments are read.
        """
        if os.path.isfile(path / "config.json"):
            raise InputError(
                f"{where(label, path)}: is a model, whose weights are no second moments: name the file that "
                "`ota-merge moments extract` makes of its checkpoint"
            )
        if os.path.isdir(path) or path.name.endswith((FILE_SUFFIX, INDEX_SUFFIX)):
            return _SafetensorsCurvature(label, path)
        if path.suffix not in _TORCH_SUFFIXES:
            accepted = ", ".join((FILE_SUFFIX, INDEX_SUFFIX, *_TORCH_SUFFIXES))
            raise InputError(f"{where(label, path)}: not a folder, and not one of {accepted}")
        return _TorchCurvature(label, path)

    @property
    def where(self) -> str:
        """What errors begin with."""
        return where(self.label, self.path)

    def what(self, name: str) -> str:
        """What errors call the curvature of one parameter."""
        return f"{self.path}: the curvature of {name}"

    @property
    def names(self) -> list[str]:
        """The parameters whose curvature the file holds, in its order."""
        return list(dict.fromkeys(map(stored.parameter_of, self.keys())))

    @functools.cached_property
    def compressed(self) -> frozenset[str]:
        """The parameters whose curvature is there in a compressed form, or in part of one."""
        return stored.compressed(self.keys())

    def held(self, name: str, bias_correction: bool = False) -> Held | None:
        """All that a plan needs to know of the curvature of `name`; None if there is none. Errors as of
        `curvature`."""
        found = stored.find(self, name)
        if found is None:
            return None
        correction = self.bias_correction(name) if bias_correction else 1.0
        return Held(tuple(found.shape), found.curvature(correction))

    def find(self, name: str) -> str | None:
        """The key that holds the curvature of parameter `name` (the first one, if there are two), or None.
        Raises InputError where the file contradicts itself about it."""
        found = stored.find(self, name)
        return None if found is None else found.keys[0]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the curvature of `name`. Raises InputError if there is none."""
        return self._stored(name).shape

    def bytes_per_element(self, name: str) -> int:
        """Bytes that each element of `name` takes; 0 where the file holds row and column sums only. Raises
        InputError for a type that is no curvature."""
        return self._stored(name).itemsize

    def curvature(self, name: str, bias_correction: bool = False) -> Full | Rank1 | Log8:
        """A zero-copy view of the curvature of `name`, in the form in which the file holds it.

        bias_correction: whether it is to be divided by 1 - beta2^step. Reads sums and scales, and no element.
        Raises InputError for what is missing, of a wrong type or shape, negative or not finite among those.
        """
        return self._stored(name).curvature(self.bias_correction(name) if bias_correction else 1.0)

    def keys_of(self, name: str) -> tuple[str, ...]:
        """The tensors that hold the curvature of `name`. Raises InputError if there are none."""
        return self._stored(name).keys

    def bias_correction(self, name: str) -> float:
        """1 - beta2^step, which Adam divides the second moments of `name` by.

        Raises InputError where the file does not say step and beta2, or says an impossible one.
        """
        step, beta2 = self.step_and_beta2(name)
        if not (math.isfinite(step) and step > 0 and 0 < beta2 < 1):
            raise InputError(
                f"{self.where}: bias_correction needs step > 0 and 0 < beta2 < 1, "
                f"not step {step} and beta2 {beta2}"
            )
        return 1.0 - beta2**step

    def step_and_beta2(self, name: str) -> tuple[float, float]:
        """What the file says of Adam's step and beta2 for `name`. Raises InputError where it does not."""
        return self._step_and_beta2(self.keys_of(name)[0])

    def metadata(self, name: str) -> dict[str, str]:
        """What the file that holds the curvature of `name` says besides; nothing in a torch file."""
        return self._metadata(self.keys_of(name)[0])

    @property
    def source_format(self) -> str | None:
        """Where the second moments are from, as the file says for all of them; None where it does not."""
        said = {self.metadata(name).get("source_format") for name in self.names}
        return said.pop() if len(said) == 1 else None

    @property
    @abstractmethod
    def total_bytes(self) -> int:
        """Bytes of curvature data."""

    @abstractmethod
    def fingerprint(self) -> list[list[str | int]]:
        """[name, bytes, mtime in ns] of each file, to tell whether an input has changed."""

    @abstractmethod
    def close(self) -> None:
        """Let go of all maps; buffers that are still held keep theirs."""

    @abstractmethod
    def keys(self) -> Iterable[str]:
        """The names of all tensors, in the file's order."""

    @abstractmethod
    def has(self, key: str) -> bool: ...

    @abstractmethod
    def key_shape(self, key: str) -> tuple[int, ...]: ...

    @abstractmethod
    def key_dtype(self, key: str) -> str: ...

    @abstractmethod
    def key_buffer(self, key: str) -> Buffer: ...

    @abstractmethod
    def _step_and_beta2(self, key: str) -> tuple[float, float]: ...

    def _metadata(self, key: str) -> dict[str, str]:
        return {}

    def _stored(self, name: str) -> stored.Stored:
        found = stored.find(self, name)
        if found is None:
            raise InputError(
                f"{self.where}: no curvature for tensor {quoted(name)} "
                f"(looked for that name and {quoted(f'{name}.{MOMENT}')})"
            )
        return found

    def _number(self, value: Any, what: str) -> float:
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            fault = "is missing" if value is None else f"is not a number: {quoted(value)}"
            raise InputError(f"{self.where}: bias_correction: {what} {fault}") from error


class _SafetensorsCurvature(CurvatureFile):
    """step and beta2 come from the file's `__metadata__`."""

    def __init__(self, label: str, path: Path):
        super().__init__(label, path)
        self._checkpoint = Checkpoint.open(path, label)

    @property
    def total_bytes(self) -> int:
        return self._checkpoint.total_bytes

    def held(self, name: str, bias_correction: bool = False) -> Held | None:
        """What most files hold of most tensors is found by one look: there may be hundreds of thousands."""
        if not (bias_correction or name in self.compressed):
            tensors = self._checkpoint.tensors
            info = tensors.get(f"{name}.{MOMENT}") or tensors.get(name)
            if info is not None and info.dtype.name in stored.FULL_TYPES:
                return Held(info.shape, Full(self._checkpoint.buffer(info.name)))
        return super().held(name, bias_correction)

    def fingerprint(self) -> list[list[str | int]]:
        return self._checkpoint.fingerprint()

    def close(self) -> None:
        self._checkpoint.close()

    def keys(self) -> Iterable[str]:
        return self._checkpoint.tensors

    def has(self, key: str) -> bool:
        return key in self._checkpoint.tensors

    def key_shape(self, key: str) -> tuple[int, ...]:
        return self._checkpoint.tensors[key].shape

    def key_dtype(self, key: str) -> str:
        return self._checkpoint.tensors[key].dtype.name

    def key_buffer(self, key: str) -> Buffer:
        return self._checkpoint.buffer(key)

    def _step_and_beta2(self, key: str) -> tuple[float, float]:
        metadata = self._metadata(key)
        return (
            self._number(metadata.get("step"), 'metadata "step"'),
            self._number(metadata.get("beta2"), 'metadata "beta2"'),
        )

    def _metadata(self, key: str) -> dict[str, str]:
        return self._checkpoint.metadata_of(key)


class _TorchCurvature(CurvatureFile):
    """step comes from the parameter's own state, beta2 from the betas that all param_groups share."""

    def __init__(self, label: str, path: Path):
        super().__init__(label, path)
        content = self._load()
        self._states = self._check_states(content)
        self._groups = content.get("param_groups")
        self._moments = {name: state[MOMENT] for name, state in self._states.items() if MOMENT in state}
        if not self._moments:
            raise InputError(f"{where(label, path)}: its optimizer state holds no {MOMENT}")
        for name, moment in self._moments.items():
            self._check_plain(name, moment)
            self._check_kind(name)

    @property
    def total_bytes(self) -> int:
        return sum(moment.nbytes for moment in self._moments.values())

    def fingerprint(self) -> list[list[str | int]]:
        return fingerprint([self.path], self.path.parent)

    def close(self) -> None:
        self._moments, self._states = {}, {}

    def _load(self) -> dict[Any, Any]:
        content = torchfile.load(self.path, self.label)
        if not isinstance(content, dict) or not isinstance(content.get("state"), dict):
            raise InputError(
                f"{self.where}: not an optimizer file, "
                f'which is {{"state": {{parameter name: {{"{MOMENT}": tensor}}}}}}'
            )
        return content

    def _check_states(self, content: dict[Any, Any]) -> dict[str, dict[Any, Any]]:
        for name, state in content["state"].items():
            if not isinstance(name, str):
                raise InputError(
                    f"{self.where}: its state is keyed by {quoted(name)}, "
                    "not by parameter names: `ota-merge moments extract` finds these"
                )
            if not isinstance(state, dict):
                raise InputError(f"{self.where}: state[{quoted(name)}] is not a dict")
        return content["state"]

    def _check_plain(self, name: str, moment: Any) -> None:
        """Only a dense tensor in one piece of the file can be viewed without a copy."""
        if not torchfile.is_plain(moment):
            raise InputError(f"{self.where}: {MOMENT} of {quoted(name)} is not a plain contiguous tensor")

    def _check_kind(self, name: str) -> None:
        """Raise InputError for a state that is another optimizer's than Adam, or that must be converted."""
        from ..moments.readers.kinds import accept
        from ..moments.readers.state import State

        groups = self._groups if isinstance(self._groups, list) else []
        group = next((g for g in groups if isinstance(g, dict) and name in (g.get("params") or ())), None)
        where = f"{self.where}: state[{quoted(name)}]"
        accepted = accept(State(self._states[name], self.path, where, group))
        if accepted is not None and accepted.factor != 1.0:
            raise InputError(f"{where}: is of {accepted.kind.name}: `ota-merge moments extract` converts it")

    def keys(self) -> Iterable[str]:
        return self._moments

    def has(self, key: str) -> bool:
        return key in self._moments

    def key_shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._moments[key].shape)

    def key_dtype(self, key: str) -> str:
        return str(self._moments[key].dtype).removeprefix("torch.")

    def key_buffer(self, key: str) -> Buffer:
        return torchfile.buffer(self._moments[key], self.path)

    def _step_and_beta2(self, key: str) -> tuple[float, float]:
        step = self._number(self._states[key].get("step"), f"step of {quoted(key)}")
        return step, self._beta2()

    def _beta2(self) -> float:
        try:
            betas = [group["betas"][1] for group in self._groups]
        except (TypeError, KeyError, IndexError):
            betas = []
        values = {self._number(beta2, "betas[1] of param_groups") for beta2 in betas or [None]}
        if len(values) > 1:
            raise InputError(f"{self.where}: bias_correction: param_groups differ in beta2")
        return values.pop()
