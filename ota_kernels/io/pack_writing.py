"""Writes packs: records are collected in a file without a name, since a pack's header has their sizes."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import OutputError
from ..tensors.dtypes import BY_NAME
from . import pack
from .new_file import new_file
from .offsets import read_at, write_at
from .pack import Base, Entry

_COPY = 1 << 24  # bytes
_U8, _U32 = BY_NAME["uint8"], BY_NAME["uint32"]


class Spool:
    """Bytes that wait, in a file that goes with the process. Raises OutputError where the disk refuses."""

    def __init__(self, folder: Path) -> None:
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            raise OutputError(
                f"{folder}: cannot be written: {error.strerror}: name another folder"
            ) from error
        self._folder, self._end, self._lock = folder, 0, threading.Lock()

    def put(self, data: bytes | np.ndarray) -> tuple[int, int]:
        """Where they are: (offset, bytes)."""
        size = len(data)
        with self._lock:
            begin, self._end = self._end, self._end + size
        self.replace(begin, data)
        return begin, size

    def replace(self, begin: int, data: bytes | np.ndarray) -> None:
        """Write over what was put there, of no fewer bytes."""
        try:
            write_at(self._file.fileno(), begin, data)
        except OSError as error:
            raise OutputError(
                f"{self._folder}: cannot be written: {error.strerror}: make room there"
            ) from error

    def get(self, place: tuple[int, int]) -> np.ndarray:
        """uint8[n]."""
        data = np.empty(place[1], np.uint8)
        if not read_at(self._file.fileno(), place[0], data):
            raise OutputError(f"{self._folder}: what was written there cannot be read again")
        return data

    def close(self) -> None:
        self._file.close()


class Encoded(NamedTuple):
    """A tile. record: its bytes; kept: elements kept; base_hash: of the base's elements; sums: of
    |d| and d^2 over what is kept, in float64."""

    record: bytes
    kept: int
    base_hash: int
    sums: tuple[float, float] = (0.0, 0.0)


@dataclass
class _Tensor:
    entry: Entry
    tiles: list[tuple[int, int, int, int]] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    totals: np.ndarray = field(default_factory=lambda: np.zeros(2))


class PackWriter:
    """One pack, tensor after tensor, tile after tile."""

    def __init__(self, spool: Spool) -> None:
        self._spool, self._tensors = spool, dict[str, _Tensor]()

    def begin(self, name: str, entry: Entry) -> None:
        """The next tensor."""
        self._tensors[name] = _Tensor(entry)

    def add(self, name: str, tiles: Iterable[Encoded]) -> None:
        """The next tiles of a tensor."""
        tensor, records = self._tensors[name], []
        for tile in tiles:
            own = pack.hash_of(tile.record, tile.kept)
            tensor.tiles.append((len(tile.record), tile.kept, own, tile.base_hash))
            tensor.totals += tile.sums
            records.append(tile.record)
        tensor.places.append(self._spool.put(b"".join(records)))

    def kept(self, name: str) -> int:
        """Elements kept of a tensor."""
        return sum(kept for _, kept, _, _ in self._tensors[name].tiles)

    def totals(self, name: str) -> tuple[float, float]:
        """Sums of |d| and of d^2 over what is kept of a tensor."""
        first, second = self._tensors[name].totals.tolist()
        return first, second

    def scale(self, name: str, value: float) -> None:
        """The scale of a tensor."""
        tensor = self._tensors[name]
        tensor.entry = tensor.entry._replace(scale=float(value))

    @property
    def entries(self) -> dict[str, Entry]:
        return {name: tensor.entry for name, tensor in self._tensors.items()}

    def content(self) -> str:
        """SHA-256 of the base's tensors, in order of names: of each its name, type and shape as JSON, and
        the hash of each tile as 4 bytes, the lowest first."""
        digest = hashlib.sha256()
        for name in sorted(self._tensors):
            tensor = self._tensors[name]
            digest.update(json.dumps([name, tensor.entry.dtype.name, list(tensor.entry.shape)]).encode())
            digest.update(np.array([t[3] for t in tensor.tiles], "<u4").tobytes())
        return digest.hexdigest()

    def write(
        self,
        out: Path,
        form: str,
        expert: str,
        settings: Mapping[str, Any],
        base: Base,
        beside: Mapping[str, bytes],
        **more: Any,
    ) -> int:
        """Publish the pack; its bytes. beside: contents of files that are no weights; more: of its
        metadata."""
        compressed = {pack.FILE + name: zlib.compress(content) for name, content in beside.items()}
        listed = [(name, _U8, (len(content),)) for name, content in compressed.items()]
        for name, tensor in self._tensors.items():
            listed.append((pack.TILES + name, _U32, (len(tensor.tiles), pack.COLUMNS)))
            listed.append((pack.RECORDS + name, _U8, (sum(size for _, size in tensor.places),)))
        said = pack.metadata(form, expert, dict(settings), base, self.entries, **more)
        with new_file(out, listed, said) as file:
            for name, content in compressed.items():
                file.write(name, 0, np.frombuffer(content, np.uint8))
            for name, tensor in self._tensors.items():
                table = np.array(tensor.tiles, "<u4").reshape(-1, pack.COLUMNS)
                file.write(pack.TILES + name, 0, table)
                at = 0
                for begin, size in tensor.places:
                    for start in range(0, size, _COPY):
                        piece = self._spool.get((begin + start, min(_COPY, size - start)))
                        file.write(pack.RECORDS + name, at, piece)
                        at += len(piece)
        return os.path.getsize(out)
