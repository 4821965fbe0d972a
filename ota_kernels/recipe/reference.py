"""What names a model in a recipe: a path or hub id, its revision, an adapter on it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from .parameters import TEXT, parse_plain, show, suggest


@dataclass(frozen=True)
class Reference:
    """A model: a local folder or a hub id, at a revision of the hub, with a LoRA adapter that is added to its
    weights.

    architecture: the name that replaces `architectures` of its config.json.
    """

    path: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    architecture: str | None = None

    @property
    def label(self) -> str:
        """What reports and errors call it."""
        adapter = "" if self.adapter is None else f"+{self.adapter_label}"
        return _at(self.path, self.revision) + adapter

    @property
    def adapter_label(self) -> str:
        """What they call its adapter; empty without one."""
        return "" if self.adapter is None else _at(self.adapter, self.adapter_revision)

    @property
    def model(self) -> Reference:
        """The same without its adapter."""
        return Reference(self.path, self.revision, architecture=self.architecture)

    def as_yaml(self) -> str | dict[str, Any]:
        """The shortest form of which `parse_reference` makes an equal one, whatever exists where."""
        parts = [x for x in (self.path, self.revision, self.adapter, self.adapter_revision) if x is not None]
        if self.architecture is None and not any(c in part for part in parts for c in "+@"):
            return self.label
        found: dict[str, Any] = {"model": _mapping(self.path, self.revision)}
        if self.adapter is not None:
            found["lora"] = _mapping(self.adapter, self.adapter_revision)
        if self.architecture is not None:
            found["override_architecture"] = self.architecture
        return found

    def same_as(self, other: Reference) -> bool:
        """Whether both name one model, by paths that may be written differently."""
        return self._place() == other._place()

    def _place(self) -> tuple:
        adapter = None if self.adapter is None else _real(self.adapter)
        return _real(self.path), self.revision, adapter, self.adapter_revision, self.architecture


def _real(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))


def _at(path: str, revision: str | None) -> str:
    return path if revision is None else f"{path}@{revision}"


def _mapping(path: str, revision: str | None) -> dict[str, str]:
    return {"path": path} | ({} if revision is None else {"revision": revision})


def resolve_path(text: str, folder: Path | None) -> str:
    """A path relative to the recipe's folder, if it exists there and not from the current folder."""
    if folder is None or os.path.exists(text):
        return text
    beside = os.path.join(folder, text)
    return beside if os.path.exists(beside) else text


def parse_reference(value: Any, name: str, folder: Path | None) -> Reference:
    """`path[@revision][+adapter[@revision]]`, or `{model, lora, override_architecture}`. name: what an error
    calls it."""
    if isinstance(value, Mapping):
        return _from_mapping(value, name, folder)
    text = parse_plain(value, name, TEXT)
    local = resolve_path(text, folder)
    if os.path.exists(local):  # whatever signs its name has
        return Reference(local)
    model, plus, adapter = text.partition("+")
    if plus and adapter and os.path.exists(resolve_path(adapter, folder)):
        return Reference(*_from_text(model, text, name, folder), resolve_path(adapter, folder))
    if "+" in adapter:
        raise RecipeError(f"{name} is {show(text)}: one adapter can be added, as `model+adapter`")
    path, revision = _from_text(model, text, name, folder)
    if not plus:
        return Reference(path, revision)
    return Reference(path, revision, *_from_text(adapter, text, name, folder))


def _from_text(part: str, text: str, name: str, folder: Path | None) -> tuple[str, str | None]:
    path, at, revision = part.partition("@")
    if not path.strip() or "@" in revision or (at and not revision.strip()):
        raise RecipeError(
            f"{name} is {show(text)}: it must be `path[@revision][+adapter[@revision]]`; a path with + or @ "
            "in it is "
            "given as {model: {path: ...}}"
        )
    return resolve_path(path, folder), revision if at else None


def _from_mapping(data: Mapping[Any, Any], name: str, folder: Path | None) -> Reference:
    _check_keys(data, ("model", "lora", "override_architecture"), name)
    if data.get("model") is None:
        raise RecipeError(f"`model` is missing in {name}: give {{model: {{path: ...}}}}")
    path, revision = _part(data["model"], f"`model` of {name}", folder)
    adapter, adapter_revision = None, None
    if data.get("lora") is not None:
        adapter, adapter_revision = _part(data["lora"], f"`lora` of {name}", folder)
    architecture = data.get("override_architecture")
    if architecture is not None:
        architecture = parse_plain(architecture, f"`override_architecture` of {name}", TEXT)
    return Reference(path, revision, adapter, adapter_revision, architecture)


def _part(value: Any, name: str, folder: Path | None) -> tuple[str, str | None]:
    if not isinstance(value, Mapping):
        text = parse_plain(value, name, TEXT)
        local = resolve_path(text, folder)
        return (local, None) if os.path.exists(local) else _from_text(text, text, name, folder)
    _check_keys(value, ("path", "revision"), name)
    if value.get("path") is None:
        raise RecipeError(f"`path` is missing in {name}: give a folder or a hub id")
    path = parse_plain(value["path"], f"`path` of {name}", TEXT)
    revision = value.get("revision")
    if revision is not None:
        revision = parse_plain(revision, f"`revision` of {name}", TEXT)
    return resolve_path(path, folder), revision


def _check_keys(data: Mapping[Any, Any], known: tuple[str, ...], name: str) -> None:
    for key, value in data.items():
        if key not in known:
            hint = suggest(key if isinstance(key, str) else "", known)
            raise RecipeError(f"unknown key {show(key)} (value {show(value)}) in {name}; {hint}")
