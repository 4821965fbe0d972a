"""Output shards: every file is sized and its header written before the first tile; tiles land in any order,
from any thread."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import RunError
from ..tensors.buffer import Buffer
from ..tensors.dtypes import DType
from .assets import sync_folder, write_file
from .checksums import Leaves, Sums, complete
from .header import build_header
from .offsets import copy_at, read_at, write_at


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the output. begin, end: absolute byte offsets in its shard."""

    name: str
    shape: tuple[int, ...]
    dtype: DType
    shard: int
    begin: int
    end: int


@dataclass(frozen=True)
class Shard:
    """One output file: its name, its header's bytes, and its whole size in bytes."""

    name: str
    header: bytes
    size: int


@dataclass(frozen=True)
class Layout:
    """The exact bytes of the output's tensors, known before any is written. stems: as `layout` takes them."""

    tensors: tuple[OutputTensor, ...]
    shards: tuple[Shard, ...]
    stems: Mapping[str, str] = field(default_factory=lambda: {"": "model"})

    @property
    def total_bytes(self) -> int:
        return sum(shard.size for shard in self.shards)


def layout(
    tensors: Sequence[tuple[str, DType, tuple[int, ...]]],
    shard_size: int,
    stems: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Layout:
    """Cut tensors, in order, into shards of at most `shard_size` bytes of data (one tensor at least each).

    Within a shard, wider types come first, so that every tensor is aligned to its element size. stems: what
    names of files begin with, by the prefix of tensors ("" or the folder "unet/") that they hold; metadata:
    what headers say beside `format: pt`.
    """
    stems = {"": "model"} | dict(stems or {})
    parts: dict[str, list[int]] = {}
    for i, (name, _, _) in enumerate(tensors):
        parts.setdefault(part_of(name, stems), []).append(i)
    placed: dict[int, OutputTensor] = {}
    shards: list[Shard] = []
    for prefix, members in (parts or {"": []}).items():
        groups = _groups(tensors, members, shard_size)
        for number, group in enumerate(groups):
            ordered = sorted(group, key=lambda i: -tensors[i][1].itemsize)
            own = [(tensors[i][0].removeprefix(prefix), *tensors[i][1:]) for i in ordered]
            header, ranges = build_header(own, {"format": "pt"} | dict(metadata or {}))
            for i, (begin, end) in zip(ordered, ranges, strict=True):
                name, dtype, shape = tensors[i]
                placed[i] = OutputTensor(name, tuple(shape), dtype, len(shards), begin, end)
            count = "" if len(groups) == 1 else f"-{number + 1:05d}-of-{len(groups):05d}"
            name = f"{prefix}{stems[prefix]}{count}.safetensors"
            shards.append(Shard(name, header, ranges[-1][1] if ranges else len(header)))
    return Layout(tuple(placed[i] for i in range(len(tensors))), tuple(shards), stems)


def part_of(name: str, prefixes: Iterable[str]) -> str:
    """The prefix of the part of a model that a tensor belongs to."""
    return next((prefix for prefix in prefixes if prefix and name.startswith(prefix)), "")


def _groups(
    tensors: Sequence[tuple[str, DType, tuple[int, ...]]], members: Sequence[int], shard_size: int
) -> list[list[int]]:
    """Indices of tensors by shard."""
    groups: list[list[int]] = [[]]
    filled = 0
    for i in members:
        _, dtype, shape = tensors[i]
        size = math.prod(shape) * dtype.itemsize
        if groups[-1] and filled + size > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(i)
        filled += size
    return groups


class ShardWriter:
    """The shards of a layout in a folder, open for writing at any offset. create: make them, and write their
    headers; shared: other processes, maybe on other hosts, write them too."""

    def __init__(self, folder: Path, plan: Layout, *, create: bool = True, shared: bool = False) -> None:
        self._layout, self._folder, self._shared = plan, folder, shared
        self._fds: list[int] = []
        self._lock = threading.Lock()
        self._unsynced: set[int] = set()
        self._leaves = Leaves(plan)
        try:
            if not create:
                self._open()
                return
            for number, shard in enumerate(plan.shards):
                (folder / shard.name).parent.mkdir(parents=True, exist_ok=True)
                self._fds.append(os.open(folder / shard.name, os.O_RDWR | os.O_CREAT, 0o644))
                if shard.size:
                    os.posix_fallocate(self._fds[-1], 0, shard.size)
                os.ftruncate(self._fds[-1], shard.size)
                self._write(number, 0, shard.header)
            for parent in {(folder / shard.name).parent for shard in plan.shards} | {folder}:
                sync_folder(parent)  # a journal must not outlive the files that it speaks of
        except OSError as error:
            self.close()
            raise RunError(
                f"cannot write to {folder}: {error.strerror}; make room or fix the folder, then --resume"
            ) from error

    def _open(self) -> None:
        """As they are."""
        for shard in self._layout.shards:
            self._fds.append(os.open(self._folder / shard.name, os.O_RDWR))

    def _write(self, shard: int, offset: int, data) -> None:
        write_at(self._fds[shard], offset, data)
        with self._lock:
            self._unsynced.add(shard)

    def write(self, tensor: OutputTensor, start: int, data: np.ndarray, final: bool = True) -> None:
        """Write elements from flat index `start` of a tensor; data: uint8, the elements' bytes; final:
        whether they will not be patched."""
        begin = start * tensor.dtype.itemsize
        try:
            self._write(tensor.shard, tensor.begin + begin, data)
        except OSError as error:
            name = self._layout.shards[tensor.shard].name
            raise RunError(f"cannot write {name}: {error.strerror}; free some room and --resume") from error
        if final:
            self._leaves.add(tensor, begin, data)
        else:
            self._leaves.forget(tensor, begin, begin + len(data))

    def copy(self, tensor: OutputTensor, start: int, piece: Buffer) -> None:
        """Write elements that are final; those of a file go from file to file where the system can."""
        begin = start * tensor.dtype.itemsize
        place, count = tensor.begin + begin, len(piece.data)
        if piece.offset < 0 or not copy_at(piece.origin, piece.offset, self._fds[tensor.shard], place, count):
            self.write(tensor, start, piece.data)
            return
        with self._lock:
            self._unsynced.add(tensor.shard)
        self._leaves.add(tensor, begin, piece.data)

    def patch(
        self, tensor: OutputTensor, start: int, stop: int, positions: np.ndarray, merged: np.ndarray
    ) -> None:
        """Overwrite elements at `positions` (uint32[m]) of the range [start, stop), which was written, by
        merged (uint8, m elements); they are final."""
        from .. import _native

        size, fd = tensor.dtype.itemsize, self._fds[tensor.shard]
        begin, end = start * size, stop * size
        # Network file systems write mapped pages back whole: with what others wrote beside the range.
        mapped = not self._shared and (
            len(positions) == 0
            or _native.scatter_in_file(fd, tensor.begin + begin, stop - start, positions, merged, size)
        )
        if not mapped:
            room = self._read(tensor, begin, end)
            _native.scatter(room, positions, merged, size)
            self.write(tensor, start, room)
            return
        with self._lock:
            self._unsynced.add(tensor.shard)
        self._leaves.add(tensor, begin, self._read(tensor, begin, end))

    def _read(self, tensor: OutputTensor, begin: int, end: int) -> np.ndarray:
        """Bytes [begin, end) of a tensor, as they are in its file."""
        name = self._layout.shards[tensor.shard].name
        data = np.empty(end - begin, np.uint8)
        try:
            whole = read_at(self._fds[tensor.shard], tensor.begin + begin, data)
        except OSError as error:
            raise RunError(f"cannot read {name}: {error.strerror}; --resume when it can") from error
        if not whole:
            raise RunError(f"{name} was cut while it was written; start again with --overwrite")
        return data

    def checksums(
        self,
        run: Callable = map,
        total: Callable[[np.ndarray], np.ndarray] = lambda array: array,
        part: tuple[int, int] = (0, 1),
    ) -> Sums:
        """Of everything that was written. run: as `Pool.run`, for what has to be read once more; total: adds
        up arrays of all processes that write; part: (i, n), this one's number and how many they are."""
        if self._shared:  # what others wrote is seen by who opens a file after they synced it
            self.sync()
            self._leaves.add_up(total)
            self._close_files()
            self._open()
        complete(self._leaves, self._read, run, part)
        if self._shared:
            self._leaves.add_up(total)
        return self._leaves.sums()

    def sync(self) -> None:
        """Wait until everything written so far is on the disk."""
        with self._lock:
            shards, self._unsynced = self._unsynced, set()
        for shard in sorted(shards):
            os.fdatasync(self._fds[shard])

    def close(self) -> None:
        self._close_files()

    def _close_files(self) -> None:
        while self._fds:
            os.close(self._fds.pop())


def write_index(folder: Path, plan: Layout) -> None:
    """The index of every sharded part of the output; nothing for a single file."""
    shards, stems = plan.shards, plan.stems
    parts: dict[str, list[OutputTensor]] = {}
    for tensor in plan.tensors:
        parts.setdefault(part_of(tensor.name, stems), []).append(tensor)
    for prefix, tensors in parts.items():
        if len({t.shard for t in tensors}) == 1:
            continue
        index = {
            "metadata": {"total_size": sum(t.end - t.begin for t in tensors)},
            "weight_map": {
                t.name.removeprefix(prefix): shards[t.shard].name.removeprefix(prefix) for t in tensors
            },
        }
        path = folder / f"{prefix}{stems[prefix]}.safetensors.index.json"
        write_file(path, (json.dumps(index, indent=2) + "\n").encode())
