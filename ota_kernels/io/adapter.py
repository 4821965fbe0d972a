"""The folder of a PEFT adapter: its adapter_config.json, and its tensors by the names of the model they
change."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..tensors.buffer import Buffer
from . import torchfile
from .header import quoted
from .reader import MappedFile, fingerprint
from .tokenizer import read_json

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = re.compile(r"^(base_model\.model\.)+")


class AdapterTensor(NamedTuple):
    """One tensor of an adapter, mapped."""

    shape: tuple[int, ...]
    buffer: Buffer


class AdapterFile:
    """An open adapter. label: what errors call it; config: its adapter_config.json; tensors: by names without
    PEFT's prefix `base_model.model.` and without the adapter's own name.

    Raises InputError for a folder that is no adapter, or whose files are malformed.
    """

    def __init__(self, folder: Path, label: str) -> None:
        self.label, self.folder = label, folder
        if not (folder / CONFIG).is_file():
            raise InputError(f"{label}: {folder}: has no {CONFIG}, so it is no adapter")
        self.config: dict[str, Any] = read_json(folder / CONFIG)
        self._file: MappedFile | None = None
        self.tensors: dict[str, AdapterTensor] = {}
        if (folder / WEIGHTS).is_file():
            self._file = MappedFile(folder / WEIGHTS)
            for key, info in self._file.header.tensors.items():
                self._add(key, AdapterTensor(info.shape, self._file.buffer(key)))
        elif (folder / PICKLED).is_file():
            self._add_pickled(folder / PICKLED)
        else:
            raise InputError(f"{label}: {folder}: has neither {WEIGHTS} nor {PICKLED}")
        if not self.tensors:
            raise InputError(f"{label}: {folder}: the adapter has no tensors")

    def _add_pickled(self, path: Path) -> None:
        content = torchfile.load(path, self.label)
        if not isinstance(content, dict):
            raise InputError(f"{self.label}: {path}: not a dictionary of tensors")
        for key, tensor in content.items():
            if not isinstance(key, str) or not torchfile.is_plain(tensor):
                raise InputError(f"{self.label}: {path}: {quoted(key)} is not a plain contiguous tensor")
            self._add(key, AdapterTensor(tuple(tensor.shape), torchfile.buffer(tensor, path)))

    def _add(self, key: str, tensor: AdapterTensor) -> None:
        name = _PREFIX.sub("", key).replace(".modules_to_save.", ".").replace(".default.", ".")
        if name in self.tensors:
            raise InputError(f"{self.label}: {self.folder}: holds {quoted(name)} twice")
        self.tensors[name] = tensor

    def fingerprint(self) -> list[list[str | int]]:
        """[name, bytes, mtime in ns] of each file, to tell whether it has changed."""
        return fingerprint(self._files(), self.folder)

    def _files(self) -> Iterable[Path]:
        yield self.folder / CONFIG
        yield self.folder / (WEIGHTS if self._file is not None else PICKLED)

    def close(self) -> None:
        """Let go of the map."""
        self.tensors = {}
        if self._file is not None:
            self._file.close()
