"""PyTorch distributed checkpoints (torch.distributed.checkpoint): sharded optimizer state of FSDP.

Keys are paths joined by dots: [prefix.]state.NAME.exp_avg_sq and .step for each parameter (Megatron:
[prefix.]state.exp_avg_sq.NAME), and one of
- [prefix.]param_groups.NAME.betas, with flatten_optimizer_state_dict=True (torchtitan);
- [prefix.]param_groups.INDEX.betas and .params, from torch 2.4 on (accelerate, Trainer);
- [prefix.]param_groups, one list of dicts, before.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import InputError
from ...io.header import quoted
from ..source import FactoredMoment, Moment, Source
from . import kinds
from .eight_bit import NESTED
from .kinds import Accepted
from .numbered import Entry, find_names
from .request import Request
from .state import State
from .values import Lazy, LazyObject, Values

if TYPE_CHECKING:
    from .dcp_storage import Storage

_METADATA_FILE = ".metadata"
# Accelerate and the Trainer keep the optimizer in a folder of its own.
_OPTIMIZER_FOLDER = "optimizer_0"
_STATE = re.compile(r"(?P<prefix>(?:.*?\.)??)state\.(?P<rest>.+)")


def recognise_dcp(path: Path) -> bool:
    """Whether `path` or its folder optimizer_0 is a torch distributed checkpoint."""
    return _folder(path) is not None


def read_dcp(path: Path, request: Request | None) -> Source:
    """The second moments of a distributed checkpoint: the folder with .metadata, or one with optimizer_0/.

    Raises InputError for files that are missing or damaged, for a state that is not known to be Adam's or its
    kin's, and where it is not certain which parameter a state by number belongs to.
    """
    from .dcp_storage import Storage

    request = request or Request()
    folder = _folder(path)
    if folder is None:
        raise InputError(f"checkpoint: {path}: holds neither {_METADATA_FILE} nor {_OPTIMIZER_FOLDER}/")
    storage = Storage(folder)
    entries = _entries(storage)
    groups = {prefix: _Groups(storage, prefix) for prefix in {prefix for prefix, _ in entries}}
    accepted: dict[tuple[str, str], Accepted] = {}
    for (prefix, name), keys in entries.items():
        values = {key: _stored(storage, at) for key, at in keys.items()}
        where = f"{storage.where}: state[{quoted(name)}]"
        state = State(values, folder, where, groups[prefix].settings(name))
        accepted[prefix, name] = kinds.accept(state, as_adam=request.as_adam)
    names, notes = _names(storage, groups, accepted, request)
    moments: dict[str, Moment | FactoredMoment] = {}
    for key, one in accepted.items():
        if names[key] in moments:
            raise InputError(
                f"{storage.where}: several optimizers have second moments of {quoted(names[key])}"
            )
        moments[names[key]] = one.moment(names[key])
        notes += [one.note] if one.note else []
    listed = {
        names.get((prefix, name), name) for prefix, group in groups.items() for name in group.names
    } | set(names.values())
    skipped = dict.fromkeys(sorted(listed - moments.keys()), "never stepped")
    return Source("dcp", tuple(moments.values()), skipped, notes=tuple(dict.fromkeys(notes)))


def _names(
    storage: Storage,
    groups: Mapping[str, _Groups],
    accepted: Mapping[tuple[str, str], Accepted],
    request: Request,
) -> tuple[dict[tuple[str, str], str], list[str]]:
    """The parameters' names: the keys', or, of a state by number, those that an order proves."""
    names = {key: key[1] for key in accepted}
    notes: list[str] = []
    for prefix, group in groups.items():
        numbers = [name for at, name in accepted if at == prefix]
        if not all(name.isdigit() for name in numbers):
            continue
        lists = group.lists or [sorted(numbers, key=int)]
        entries = [
            [Entry(int(n), None, accepted[prefix, n].shape if (prefix, n) in accepted else None) for n in one]
            for one in lists
        ]
        found, said = find_names(entries, _weights(storage, prefix), request, storage.where)
        notes += said
        for one, named in zip(lists, found, strict=True):
            names |= {(prefix, n): name for n, name in zip(one, named, strict=True) if name is not None}
    return names, notes


def _weights(storage: Storage, prefix: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights beside the optimizer under `prefix`, in the order in which they were saved."""
    others = {k: s for k, s in storage.shapes.items() if not k.startswith(prefix or "state.")}
    of_model = {k.removeprefix("model."): s for k, s in others.items() if k.startswith("model.")}
    return of_model or others


def _entries(storage: Storage) -> dict[tuple[str, str], dict[str, str]]:
    """By optimizer's prefix and parameter: what the state keeps, and under which key of the storage."""
    found = [(key, match) for key in (*storage.shapes, *storage.objects) if (match := _STATE.fullmatch(key))]
    names: dict[tuple[str, str], dict[str, str]] = {}
    for _, match in found:
        name, _, kept = match["rest"].rpartition(".")
        if kept in kinds.MOMENT_KEYS and name:
            names[match["prefix"], name.removesuffix(f".{NESTED}")] = {}
    for key, match in found:
        prefix, rest = match["prefix"], match["rest"]
        at = len(rest)
        while (at := rest.rfind(".", 0, at)) > 0:  # the longest name that the key begins with
            if (prefix, rest[:at]) in names:
                kept = rest[at + 1 :].removeprefix(f"{NESTED}.").partition(".")[0]
                names[prefix, rest[:at]][kept] = key
                break
    names = names or _by_state_first(found)
    if names:
        return names
    kept = {match["rest"].rpartition(".")[2] for _, match in found if "." in match["rest"]}
    if kept & {"step", "exp_avg", "momentum_buffer", "square_avg", "sum"}:
        raise kinds.nothing([f"only {', '.join(sorted(kept))}"], storage.where)
    raise InputError(
        f"{storage.where}: holds no optimizer state with exp_avg_sq: name the optimizer's folder"
    )


def _by_state_first(found: list[tuple[str, re.Match[str]]]) -> dict[tuple[str, str], dict[str, str]]:
    """The same of Megatron's keys, which name the state before the parameter."""
    names: dict[tuple[str, str], dict[str, str]] = {}
    for _, match in found:
        kept, _, name = match["rest"].partition(".")
        if kept == "exp_avg_sq" and name:
            names[match["prefix"], name] = {}
    for key, match in found:
        kept, _, name = match["rest"].partition(".")
        if (match["prefix"], name) in names:
            names[match["prefix"], name][kept] = key
    return names


def _stored(storage: Storage, key: str) -> Lazy | LazyObject:
    if key in storage.objects:
        return LazyObject(partial(storage.read_object, key))
    shape = storage.shapes[key]
    return Lazy(shape, storage.dtype(key), partial(_values, storage, key))


class _Settings(Mapping):
    """Settings of a group, each read when it is asked for."""

    def __init__(self, storage: Storage, keys: Mapping[str, str]) -> None:
        self._storage, self._keys = storage, keys
        self._read: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        key = self._keys[name]
        if key not in self._storage.objects:
            return _stored(self._storage, key)
        if name not in self._read:
            self._read[name] = self._storage.read_object(key)
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class _Groups:
    """The param_groups beside the states under `prefix`. names: of the parameters that they list; lists: the
    parameters of each group, by name or number, where groups list them."""

    def __init__(self, storage: Storage, prefix: str) -> None:
        self._storage = storage
        self._root = f"{prefix}param_groups"
        found = self._groups()
        self.lists = [[str(name) for name in group.get("params") or ()] for group in found]
        self._listed = {str(name): group for group in found for name in group.get("params") or ()}
        flat = re.compile(re.escape(self._root) + r"\.(.*\D.*)\.([^.]+)")
        self._flat: dict[str, dict[str, str]] = {}
        for key in (*storage.objects, *storage.shapes):
            if match := flat.fullmatch(key):
                self._flat.setdefault(match[1], {})[match[2]] = key
        self.names = {name for name in (*self._listed, *self._flat) if not name.isdigit()}

    def settings(self, name: str) -> Mapping[str, Any]:
        """Of the group that lists `name`; none where nothing says them."""
        if name in self._flat:
            return _Settings(self._storage, self._flat[name])
        return self._listed.get(name, {})

    def _groups(self) -> list[Mapping[str, Any]]:
        """The groups that list their parameters. Raises InputError for anything else under their keys."""
        if self._root in self._storage.objects:
            groups = self._storage.read_object(self._root)
        else:
            groups = list(self._numbered())
        if not isinstance(groups, list) or not all(
            isinstance(group, Mapping) and _are_parameters(group.get("params")) for group in groups
        ):
            raise InputError(f"{self._storage.where}: {quoted(self._root)} does not list parameters")
        return groups

    def _numbered(self) -> Iterator[Mapping[str, Any]]:
        for index in count():
            start = f"{self._root}.{index}."
            keys = {
                key.removeprefix(start): key
                for key in (*self._storage.objects, *self._storage.shapes)
                if key.startswith(start)
            }
            if f"{start}params" not in self._storage.objects:
                return
            yield _Settings(self._storage, keys)


def _are_parameters(names: Any) -> bool:
    return isinstance(names, list) and all(isinstance(name, (str, int)) for name in names)


def _folder(path: Path) -> Path | None:
    folders = (path, path / _OPTIMIZER_FOLDER)
    return next((folder for folder in folders if os.path.isfile(folder / _METADATA_FILE)), None)


def _values(storage: Storage, key: str) -> Values:
    """The elements, cut into ranges of whole rows that cut no stored part, so that each part is read once."""
    shape = storage.shapes[key]
    boxes = storage.boxes(key)
    if not shape:
        return Values(1, lambda start, stop: storage.read(key, (), ()).reshape(-1))
    row = math.prod(shape[1:])
    cuts = tuple((first * row, last * row) for first, last in _uncut(boxes, shape[0]) if row * (last - first))
    return Values(row * shape[0], partial(_read, storage, key, row), cuts)


def _uncut(boxes: list[tuple[tuple[int, ...], tuple[int, ...]]], rows: int) -> Iterator[tuple[int, int]]:
    """[start, stop) row ranges that cover all rows and whose bounds lie within no box."""
    start = reached = 0
    for first, taken in sorted((offsets[0], sizes[0]) for offsets, sizes in boxes if sizes[0]):
        if first >= reached > start:
            yield start, reached
            start = reached
        reached = max(reached, first + taken)
    yield start, rows


def _read(storage: Storage, key: str, row: int, start: int, stop: int) -> np.ndarray:
    if start == stop:
        return np.zeros(0, np.float32)
    shape = storage.shapes[key]
    first, last = start // row, -(-stop // row)
    offsets, sizes = (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    return storage.read(key, offsets, sizes).reshape(-1)[start - first * row : stop - first * row]
