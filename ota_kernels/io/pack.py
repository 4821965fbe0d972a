"""Packed experts: what differs from a base, in one safetensors file. README.md has the format."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from xxhash import xxh3_64_intdigest

from ..errors import InputError
from ..tensors.buffer import Buffer
from ..tensors.dtypes import BY_NAME, OUTPUT_NAMES, DType
from .header import parse_json_object, quoted
from .pack_codec import TILE, tiles_of
from .pages import advise
from .reader import MappedFile, fingerprint

FORMAT, VERSION, SUFFIX = "ota_kernels.pack", 2, ".pack"
EXACT, SIGN, SHARED = VALUES = ("exact", "sign", "shared")  # by the numbers that csrc/pack.cpp knows
# Beside tensors, by the beginnings of their names in the file.
RECORDS, TILES, SHARED_EDIT, FILE = "records/", "tiles/", "shared/", "file/"
_MOST_BESIDE = 1 << 28  # bytes of a file beside the weights
_MAPPED = 1 << 13  # bytes of records of which the pages are let go
COLUMNS = 4  # of `tiles/`: bytes of the record, elements kept, hash of the record, hash of the base's tile


class Entry(NamedTuple):
    """One tensor of the expert. dtype: the base's; values: EXACT, SIGN or SHARED; scale: of signs or of
    the shared edit."""

    shape: tuple[int, ...]
    dtype: DType
    values: str
    scale: float = 1.0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def as_json(self) -> dict[str, Any]:
        found = {"shape": list(self.shape), "dtype": self.dtype.name, "values": self.values}
        return found if self.values == EXACT else found | {"scale": self.scale}


@dataclass(frozen=True)
class Base:
    """What a pack is packed against. path: where it lay; model: what it was called, a folder or a hub id;
    content: SHA-256 of its tensors' names, types, shapes and the hash of each tile."""

    path: str
    model: str
    content: str


def is_pack(path: Path) -> bool:
    """Whether a model's path is that of a pack, by its name."""
    return path.name.endswith(SUFFIX) and not os.path.isdir(path)


class PackFile:
    """An open pack. label: what errors call it; form, settings: how it was made; entries: by the tensors'
    names.

    Raises InputError for a file that is no pack, is malformed, or of a later version.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.path, self.label, self.files = path, label, [path]
        self._where = str(path) if label == str(path) else f"{label}: {path}"
        self._file = MappedFile(path)
        try:
            self._read()
        except BaseException:
            self.close()
            raise
        self.tiles = functools.lru_cache(maxsize=None)(self._tiles)

    def error(self, what: str) -> InputError:
        """An error about the file."""
        return InputError(f"{self._where}: {what}")

    def _read(self) -> None:
        said = self._file.header.metadata
        if said.get("format") != FORMAT:
            raise self.error("is no pack, or a damaged one: `ota-merge pack` writes packs")
        if said.get("version") != str(VERSION):
            raise self.error(
                f"is a pack of version {quoted(said.get('version'))}, and this ota-kernels reads version "
                f"{VERSION}: update it, or make the pack again"
            )
        if said.get("check") != check_of(said):
            raise self.error(
                "is a damaged pack: its metadata are not those that were written; fetch it again"
            )
        try:
            self.form, self.expert = said["form"], said["expert"]
            self.settings = self._json(said["settings"])
            self.base = Base(**{key: str(value) for key, value in self._json(said["base"]).items()})
            self.shared: dict[str, Any] | None = self._json(said["shared"]) if "shared" in said else None
            table = self._json(said["tensors"])
            self.entries = {name: self._entry(name, found) for name, found in table.items()}
        except (KeyError, TypeError) as error:
            raise self.error(
                f"is a damaged pack: its metadata lack or mistake {error}; make it again"
            ) from None
        for name, entry in self.entries.items():
            self._check(name, entry)

    def _json(self, text: str) -> dict[str, Any]:
        return parse_json_object(text.encode(), f"{self._where}: the metadata")

    def _entry(self, name: str, found: Any) -> Entry:
        shape, dtype, values = found["shape"], BY_NAME[found["dtype"]], found["values"]
        scale = found.get("scale", 1.0)
        plain = isinstance(shape, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in shape)
        if not plain or math.prod(shape) >= 1 << 63 or type(scale) is not float or not math.isfinite(scale):
            raise self.error(f"is a damaged pack: what it says of {quoted(name)}; make it again")
        if values not in VALUES or (values != EXACT and dtype.name not in OUTPUT_NAMES):
            raise self.error(
                f"is a damaged pack: {quoted(name)} is {quoted(values)} in {dtype.name}; make it again"
            )
        return Entry(tuple(shape), dtype, values, scale)

    def _check(self, name: str, entry: Entry) -> None:
        """Whether what is stored of a tensor has the sizes that its entry says."""
        stored = self._file.header.tensors
        records, tiles = stored.get(RECORDS + name), stored.get(TILES + name)
        wanted = (-(-entry.numel // TILE), COLUMNS)
        if records is None or tiles is None or (tiles.shape, tiles.dtype.name) != (wanted, "uint32"):
            raise self.error(f"is a damaged pack: {quoted(name)} has not {wanted[0]} tiles; make it again")
        if records.dtype.name != "uint8":
            raise self.error(f"is a damaged pack: records of {quoted(name)} are no bytes; make it again")

    def _tiles(self, name: str) -> Tiles:
        entry, table = self.entries[name], self._file.buffer(TILES + name)
        columns = np.frombuffer(table.data.tobytes(), "<u4").reshape(-1, COLUMNS)
        records, most = (
            self._file.buffer(RECORDS + name),
            np.minimum(TILE, entry.numel - TILE * np.arange(len(columns))),
        )
        sizes, kept = columns[:, 0].astype(np.int64), columns[:, 1].astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(sizes)])
        if ends[-1] != len(records) or (kept > most).any():
            raise self.error(f"is a damaged pack: records of {quoted(name)} do not add up; make it again")
        hashes = (columns[:, 2].tolist(), columns[:, 3].copy())
        return Tiles(records, ends, kept, *hashes, np.zeros(len(kept), bool))

    def _check_records(self, name: str, numbers: Iterable[int]) -> None:
        """InputError where the record of one of these tiles is not what was written; each is looked at
        once."""
        tiles = self.tiles(name)
        data, ends, kept = memoryview(tiles.records.data), tiles.ends, tiles.kept
        for j in numbers:
            if not tiles.sound[j]:
                if hash_of(data[ends[j] : ends[j + 1]], int(kept[j])) != tiles.hashes[j]:
                    raise self.damaged(name, j)
                tiles.sound[j] = True

    def parts(self, name: str, start: int, stop: int) -> Iterator[Buffer]:
        """The records that elements [start, stop) of a tensor are in."""
        if stop > start:
            tiles, numbers = self.tiles(name), tiles_of(start, stop)
            yield tiles.records.slice(int(tiles.ends[numbers.start]), int(tiles.ends[numbers.stop]))

    def record_bytes(self, name: str) -> int:
        """Of all records of a tensor."""
        return self._file.header.tensors[RECORDS + name].nbytes

    def damaged(self, name: str, tile: int) -> InputError:
        """The error about a tile whose record is not what was written."""
        return self.error(f"is damaged: tile {tile} of {quoted(name)}; fetch it or make it again")

    def part(
        self, name: str, base: Buffer, start: int, stop: int, shared: Buffer | None = None
    ) -> PackedPart:
        """Elements [start, stop) of a tensor: EXACT in its own type, others in float32, of float64 in
        float64. base: the same elements of the base; shared: of the shared edit."""
        numbers = tiles_of(start, stop)
        self._check_records(name, numbers)
        return PackedPart(self, name, base, shared, (start, stop), numbers)

    def gathered(
        self, name: str, base: Buffer, positions: np.ndarray, shared: Buffer | None = None
    ) -> np.ndarray:
        """As `part`, at positions in ascending order (int64[m]), which may repeat: uint8; base and shared:
        the elements there."""
        numel = self.entries[name].numel
        self._check_records(name, np.unique(positions // TILE).tolist())
        return PackedPart(self, name, base, shared, (0, numel), tiles_of(0, numel)).at(positions)

    def base_hashes(self, name: str) -> np.ndarray:
        """Of each tile of the base's tensor, uint32[tiles]."""
        return self.tiles(name).base_hashes

    def shared_edit(self, name: str) -> tuple[tuple[int, ...], Buffer] | None:
        """Of a file of edits that experts share: a tensor's shape and elements."""
        info = self._file.header.tensors.get(SHARED_EDIT + name)
        return None if info is None else (info.shape, self._file.buffer(SHARED_EDIT + name))

    def beside(self) -> dict[str, bytes]:
        """Files of the expert that are not the base's: configuration, tokenizer."""
        found = {}
        for key in self._file.header.tensors:
            name = key.removeprefix(FILE)
            if key == name:
                continue
            if "/" in name or "\\" in name or name.startswith("."):
                raise self.error(f"holds a file {quoted(name)}, whose name leads elsewhere: make it again")
            try:
                content = zlib.decompressobj()
                found[name] = content.decompress(self._file.buffer(key).data, _MOST_BESIDE)
                if not content.eof:
                    raise self.error(f"is damaged: its file {quoted(name)} has no end; fetch it again")
            except zlib.error as error:
                raise self.error(f"is damaged: its file {quoted(name)} ({error}); fetch it again") from None
        return found

    def fingerprint(self) -> list[list[str | int]]:
        """[name, bytes, mtime in ns], to tell whether it has changed."""
        return fingerprint([self.path], self.path.parent)

    def close(self) -> None:
        """Let go of the map."""
        if hasattr(self, "tiles"):
            self.tiles.cache_clear()
        self._file.close()


@dataclass(frozen=True)
class Tiles:
    """Of the tiles of a tensor: their records; ends, where each begins, and the end of the last one; kept
    (int64 each); hashes, of the records; base_hashes, of the base's elements (uint32); sound: which records
    are known to be whole."""

    records: Buffer
    ends: np.ndarray
    kept: np.ndarray
    hashes: list[int]
    base_hashes: np.ndarray
    sound: np.ndarray


class PackedPart(Buffer):
    """Elements of a packed tensor, decoded when somebody looks at them. The native kernels decode what they
    merge themselves, a stretch at a time (csrc/pack_arguments.hpp reads these attributes).

    base, shared: those elements of the base and of the shared edit; records: of the tiles that hold them,
    from number `first` on.
    """

    __slots__ = (
        *("base", "counts", "first", "numel", "offsets", "records", "scale", "shared", "size", "start"),
        *("stop", "type", "values", "_made", "_name", "_pack"),
    )
    tile = TILE

    def __init__(
        self,
        pack: PackFile,
        name: str,
        base: Buffer,
        shared: Buffer | None,
        elements: tuple[int, int],
        numbers: range,
    ) -> None:
        entry, tiles, first, last = pack.entries[name], pack.tiles(name), numbers.start, numbers.stop
        exact = entry.values == EXACT
        wide = "float64" if entry.dtype.name == "float64" else "float32"
        given = {
            "dtype": entry.dtype if exact else BY_NAME[wide],
            "origin": f"{pack.label}: {name}",
            "offset": -1,
            "base": base,
            "shared": shared,
            "records": tiles.records.slice(int(tiles.ends[first]), int(tiles.ends[last])),
            "offsets": tiles.ends[first : last + 1],
            "counts": tiles.kept[first:last],
            "first": first,
            "numel": entry.numel,
            "start": elements[0],
            "stop": elements[1],
            "values": VALUES.index(entry.values),
            "type": -1 if entry.dtype.code is None else entry.dtype.code,
            "size": entry.dtype.itemsize,
            "scale": entry.scale,
            "_pack": pack,
            "_name": name,
            "_made": None,
        }
        for key, value in given.items():
            object.__setattr__(self, key, value)

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def data(self) -> np.ndarray:
        from .. import _native

        if self._made is None:
            room = np.empty(len(self) * self.dtype.itemsize, np.uint8)
            self._check(_native.unpack(self, room) if len(self) else -1)
            object.__setattr__(self, "_made", room)
        return self._made

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The elements at ascending positions, uint8; base and shared are those alone."""
        from .. import _native

        room = np.empty(len(positions) * self.dtype.itemsize, np.uint8)
        self._check(_native.unpack_at(self, positions, room))
        return room

    def _check(self, bad: int) -> None:
        if bad >= 0:
            raise self.damaged(bad)

    def damaged(self, tile: int) -> InputError:
        """The error about a tile whose record is none."""
        return self._pack.damaged(self._name, tile)

    def __del__(self) -> None:
        records = getattr(self, "records", ())
        # A call takes longer than few pages are worth.
        if len(records) >= _MAPPED and not sys.is_finalizing():
            advise(records.data, "dontneed")


def metadata(
    form: str, expert: str, settings: dict[str, Any], base: Base, entries: dict[str, Entry], **more: Any
) -> dict[str, str]:
    """A pack's, as `PackFile` reads them."""
    found = {
        "settings": settings,
        "base": asdict(base),
        "tensors": {name: entry.as_json() for name, entry in entries.items()},
        **more,
    }
    texts = {key: json.dumps(value, allow_nan=False) for key, value in found.items()}
    said = {"format": FORMAT, "version": str(VERSION), "form": form, "expert": expert} | texts
    return said | {"check": check_of(said)}


def check_of(said: Mapping[str, str]) -> str:
    """SHA-256 of all other metadata: keys and values in order of keys, a zero byte after each."""
    digest = hashlib.sha256()
    for key in sorted(said.keys() - {"check"}):
        digest.update(f"{key}\0{said[key]}\0".encode())
    return digest.hexdigest()


def hash_of(data: bytes | memoryview | np.ndarray, seed: int = 0) -> int:
    """The low half of XXH3-64: of a tile of a base; of a record, with how many elements it keeps as the
    seed."""
    return xxh3_64_intdigest(data, seed) & 0xFFFFFFFF
