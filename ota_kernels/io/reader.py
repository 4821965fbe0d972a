"""Model files: zero-copy views over mapped safetensors files, single or sharded.

Opening a checkpoint reads headers only; a file is mapped when the first of its tensors is asked for.
"""

from __future__ import annotations

import functools
import itertools
import mmap
import os
import resource
import sys
import threading
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ..errors import InputError
from ..tensors.buffer import Buffer
from ..tensors.dtypes import DType
from .folder import (
    FILE_SUFFIX,
    INDEX_SUFFIX,
    TORCH_INDEX_SUFFIX,
    check_is_model,
    foreign_format,
    kind_by_names,
    refuse_kind,
    unfinished,
    weight_files,
    where,
)
from .header import Header, parse_json_object, quoted, read_header
from .pages import guarded
from .parts import Part, parts_of
from .signature import check_real
from .sizes import read_settings
from .table import Table
from .ties import has_tied_embeddings
from .torch_weights import SUFFIXES as TORCH_SUFFIXES
from .torch_weights import read_torch_header


class MappedFile:
    """One file of tensors, mapped read-only; a context manager.

    header: the file's header where it was read before, as that of a torch file must be. The map lives until
    `close` and until the last buffer cut from it is gone. Raises InputError if the file is unreadable or
    malformed, or has changed its size since `header` was read.
    """

    def __init__(self, path: Path, header: Header | None = None):
        self.path = path
        self.header = header or read_header(path)
        self._origin = str(path)
        self._bytes: np.ndarray | None = _map(path, self.header.file_size)

    def buffer(self, name: str) -> Buffer:
        """A zero-copy view of tensor `name`. Raises KeyError for a name that the file lacks."""
        tensors = self.header.tensors
        return self.view(*tensors.place(tensors.row(name)))

    def view(self, dtype: DType, begin: int, end: int) -> Buffer:
        """A zero-copy view of the bytes of a tensor of the file."""
        if self._bytes is None:
            raise ValueError(f"{self.path} is closed")
        return Buffer(self._bytes[begin:end], dtype, self._origin, begin)

    def close(self) -> None:
        """Let go of the map; buffers that are still held keep it."""
        self._bytes = None

    def __enter__(self) -> MappedFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Checkpoint:
    """A model as its files hold it (safetensors, or torch's); safe to use from several threads.

    label: what errors call it ("base_model", "models[2]"); root: the folder it lies in; files: its shards;
    tensors: name -> TensorInfo over all shards, in file order; of a folder of several models with the part's
    prefix ("unet/"); stems: by prefix, what names of weight files begin with; alone: what lies beside the
    weights is not of this model.
    """

    def __init__(
        self,
        label: str,
        root: Path,
        headers: dict[Path, Header],
        parts: Mapping[Path, Part] | None = None,
        alone: bool = False,
    ):
        self.label = label
        self._alone = alone
        self.root = root
        self.files = list(headers)
        self.tensors: Table
        self._headers = headers
        self._parts = parts or {}
        self.stems = {part.prefix: part.stem for part in self._parts.values()} or {"": "model"}
        self._starts: list[int] = []  # number of each file's first tensor
        self._maps: list[MappedFile | None] = [None] * len(headers)
        self._lock = threading.Lock()
        if len(headers) == 1 and not self._prefix(self.files[0]):
            self.tensors, self._starts = headers[self.files[0]].tensors, [0]
        else:
            self.tensors = self._together()

    @classmethod
    def open(cls, path: Path, label: str, alone: bool = False) -> Checkpoint:
        """Open a folder, one file (.safetensors, or a torch file) or an index; reads headers only.

        What a folder's weights are, `folder.weight_files` says.
        Raises InputError for whatever is missing, malformed or contradictory.
        """
        files = _entry_files(path, label)
        return cls(label, files[0].parent, _headers_of(files), alone=alone)

    def buffer(self, name: str) -> Buffer:
        """A zero-copy view of tensor `name`; maps its shard first where that has not been done.

        Raises KeyError for a name that the checkpoint lacks, InputError if the shard cannot be mapped.
        """
        row = self.tensors.row(name)
        number = bisect_right(self._starts, row) - 1
        mapped = self._maps[number] or self._map(number)
        return mapped.view(*self.tensors.place(row))

    def _map(self, number: int) -> MappedFile:
        with self._lock:
            path = self.files[number]
            mapped = self._maps[number] = self._maps[number] or MappedFile(path, self._headers[path])
        return mapped

    def _prefix(self, path: Path) -> str:
        return self._parts[path].prefix if path in self._parts else ""

    def path_of(self, name: str) -> Path:
        """The file that holds tensor `name`."""
        return self.files[bisect_right(self._starts, self.tensors.row(name)) - 1]

    def metadata_of(self, name: str) -> dict[str, str]:
        """The `__metadata__` of the file that holds tensor `name`."""
        return self._headers[self.path_of(name)].metadata

    @property
    def total_bytes(self) -> int:
        """Bytes of tensor data over all shards."""
        return sum(info.nbytes for info in self.tensors.infos())

    @functools.cached_property
    def config(self) -> dict[str, Any] | None:
        """config.json beside the weights, or None. Raises InputError if it is not a JSON object."""
        path = self.root / "config.json"
        return _read_json_object(path) if not self._alone and os.path.exists(path) else None

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output head shares the input embedding, as `ties.has_tied_embeddings` tells."""
        return has_tied_embeddings(self.config, self.tensors)

    def fingerprint(self) -> list[list[str | int]]:
        """[name relative to root, bytes, mtime in ns] of each file, to tell whether an input has changed."""
        return fingerprint(self.files, self.root)

    def close(self) -> None:
        """Let go of all maps; a later `buffer` maps again."""
        with self._lock:
            for mapped in filter(None, self._maps):
                mapped.close()
            self._maps = [None] * len(self.files)

    def _together(self) -> Table:
        """The tensors of all files."""
        tables = [header.tensors for header in self._headers.values()]
        self._starts = list(itertools.accumulate(map(len, tables[:-1]), initial=0))
        try:
            return Table.joined(tables, list(map(self._prefix, self.files)))
        except ValueError as error:
            (name,) = error.args
        first, second, *_ = (
            path
            for path, table in zip(self.files, tables, strict=True)
            if name.startswith(self._prefix(path)) and name[len(self._prefix(path)) :] in table
        )
        raise InputError(
            f"{self.label}: tensor {quoted(name)} is in two files, "
            f"{first} and {second.name}: remove one, or name the file that is meant"
        )


def _headers_of(files: Sequence[Path]) -> dict[Path, Header]:
    """The headers of weight files, or of the shards that an index names."""
    if not files[0].name.endswith((INDEX_SUFFIX, TORCH_INDEX_SUFFIX)):
        return {file: _read_header(file) for file in files}
    (index,) = files
    weight_map = _read_weight_map(index)
    shards = {written: index.parent / written for written in dict.fromkeys(weight_map.values())}
    headers = {file: _read_header(file) for file in dict.fromkeys(shards.values())}
    names = {written: headers[file].tensors.keys() for written, file in shards.items()}
    for name, written in weight_map.items():
        if name not in names[written]:
            raise InputError(
                f"{index}: says that {shards[written].name} holds tensor {quoted(name)}, but it does not"
            )
    return headers


def _read_header(file: Path) -> Header:
    return read_torch_header(file) if file.name.endswith(TORCH_SUFFIXES) else read_header(file)


def open_model(path: Path, label: str, alone: bool = False) -> Checkpoint:
    """A checkpoint that is a model: InputError, by its name, for an adapter and other kinds. alone: of a
    file, whatever lies beside it."""
    check_is_model(path, label)
    headers: dict[Path, Header] = {}
    parts: dict[Path, Part] = {}
    for part in parts_of(path, label):
        found = _headers_of(part.files)
        headers |= found
        parts |= dict.fromkeys(found, part)
    checkpoint = Checkpoint(label, path, headers, parts) if headers else Checkpoint.open(path, label, alone)
    kind = checkpoint.tensors.say(kind_by_names)
    if kind is not None:
        raise refuse_kind(*kind, label, path)
    return checkpoint


def fingerprint(files: Iterable[Path], root: Path) -> list[list[str | int]]:
    """[name relative to root, bytes, mtime in ns] of each file. Raises InputError if one is gone."""
    result: list[list[str | int]] = []
    for path in files:
        try:
            status = path.stat()
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        result.append([path.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns])
    return result


def _map(path: Path, expected_size: int) -> np.ndarray:
    """The bytes of `path`, mapped read-only as uint8[expected_size]; its descriptor is closed again."""
    _lift_descriptor_limit()
    # Python < 3.13 keeps a duplicate of the descriptor as long as the map lives.
    untracked = {"trackfd": False} if sys.version_info >= (3, 13) else {}
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            if size != expected_size:
                raise InputError(f"{path}: changed while in use: {size} bytes now, {expected_size} before")
            return guarded(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ, **untracked), path)
    except OSError as error:
        raise InputError(f"{path}: cannot be mapped: {error.strerror}") from error


@functools.cache
def _lift_descriptor_limit() -> None:
    """Allow one descriptor per map: five experts of 400 B parameters have more shards than the usual 1024."""
    if sys.version_info < (3, 13):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(OSError, ValueError):  # macOS refuses its own hard limit; the soft one then stays
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _entry_files(path: Path, label: str) -> list[Path]:
    """The index alone, or the weight files, that `path` stands for; at least one."""
    # os.path, unlike Path, also answers for names that are too long or that may not be looked up.
    if os.path.isdir(path):
        return weight_files(path, label)
    if not os.path.exists(path):
        raise InputError(f"{where(label, path)}: no such file or folder")
    if not path.name.endswith((FILE_SUFFIX, INDEX_SUFFIX, TORCH_INDEX_SUFFIX, *TORCH_SUFFIXES)):
        raise InputError(f"{where(label, path)}: not a {FILE_SUFFIX} file{foreign_format(path)}")
    return [path]


def _read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard as it is written, as the index says; every shard exists, at a path inside the
    folder."""
    weight_map = _read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no weight_map (tensor name -> file name)")
    for name, shard in weight_map.items():
        if type(shard) is not str:
            raise InputError(f"{index}: weight_map[{quoted(name)}] is not a file name: {quoted(shard)}")
    for shard in dict.fromkeys(weight_map.values()):
        _check_shard(index, shard)
    return weight_map


def _check_shard(index: Path, shard: str) -> None:
    """The path that is written must stay inside; a link may lead out, as it does in the cache of the hub."""
    written = PurePosixPath(shard)
    if written.is_absolute() or ".." in written.parts or "\\" in shard or not written.name:
        raise InputError(f"{index}: shard path {quoted(shard)} leaves the folder of the index")
    if not os.path.isfile(index.parent / written):
        raise InputError(
            f"{index}: names shard {quoted(written.name)}, which is missing from the folder"
            f"{unfinished(index.parent)}: fetch it again"
        )


def _read_json_object(path: Path) -> dict[str, Any]:
    check_real(path)
    try:
        text = read_settings(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_json_object(text, str(path))
