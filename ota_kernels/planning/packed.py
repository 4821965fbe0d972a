"""A model that is a base and a pack of what differs: its tensors are made tile by tile, in memory and on
disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..errors import InputError
from ..io.assets import home
from ..io.header import quoted
from ..io.pack import EXACT, SHARED, Entry, PackedPart, PackFile, hash_of
from ..io.pack_codec import TILE, tiles_of
from ..io.parts import is_weights
from ..io.ties import has_tied_embeddings
from ..tensors.buffer import Buffer
from ..tensors.computed import Computed, Source, is_computed
from ..tensors.dtypes import BY_NAME
from .models import Info, Model

_PROBED = 64  # tiles of a base that tell at once whether it is the one; all are looked at when they are read


class BaseTiles:
    """Hashes of the tiles of a model's tensors, each found once, for all packs that it is the base of."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._found: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def hashes(self, name: str, tiles: range) -> np.ndarray:
        """Of these tiles of a stored tensor, uint32."""
        base = self._model.source(name)
        count = -(-len(base) // TILE)
        found, known = self._found.setdefault(name, (np.zeros(count, np.uint32), np.zeros(count, bool)))
        for j in tiles:
            if not known[j]:
                found[j] = hash_of(base.slice(j * TILE, min((j + 1) * TILE, len(base))).data)
                known[j] = True
        return found[tiles.start : tiles.stop]


class Packed:
    """The Model that a pack on its base is. label: what errors call it; config: what the expert's
    config.json says; shared: the file of the edit that it shares with others; own_base: whether nobody
    else reads the base; tiles: the base's."""

    def __init__(
        self,
        base: Model,
        pack: PackFile,
        config: dict[str, Any] | None,
        shared: PackFile | None = None,
        own_base: bool = True,
        tiles: BaseTiles | None = None,
    ) -> None:
        self.label, self._base, self.pack, self.config, self._shared = pack.label, base, pack, config, shared
        self.own_base = own_base
        self.tensors = {name: Info(e.shape, e.dtype) for name, e in pack.entries.items()}
        self._tiles = tiles or BaseTiles(base)
        for name, entry in pack.entries.items():
            if entry.values == SHARED:
                self._check_shared(name, entry)

    def _check_shared(self, name: str, entry: Entry) -> None:
        found = None if self._shared is None else self._shared.shared_edit(name)
        if found is None or found[0] != entry.shape or found[1].dtype.name not in ("bfloat16", "float16"):
            raise self.pack.error(
                f"the edit that it shares with others lacks {quoted(name)}: make them again"
            )

    @property
    def tied_embeddings(self) -> bool:
        return has_tied_embeddings(self.config, self.tensors)

    def source(self, name: str, stands_for: str | None = None) -> Source:
        entry = self.pack.entries[name]
        shared = None if entry.values != SHARED else self._shared.shared_edit(name)[1]
        return Unpacked(self, name, self._base.source(name), shared)

    def bytes_per_element(self, name: str) -> float:
        """Of the pack, and of a base that is read for nothing else."""
        entry = self.pack.entries[name]
        of_base = entry.dtype.itemsize * self.own_base
        return of_base + self.pack.record_bytes(name) / max(entry.numel, 1) + 2 * (entry.values == SHARED)

    def check_base(self, name: str, start: int, stop: int) -> None:
        """InputError unless elements [start, stop) of the base are those that the expert was packed
        against."""
        tiles = tiles_of(start, stop)
        wanted = self.pack.base_hashes(name)[tiles.start : tiles.stop]
        if not np.array_equal(self._tiles.hashes(name, tiles), wanted):
            where = self._base.source(name).origin
            raise self.pack.error(f"{where} is not the base that it was packed against: {name} is another")

    def what(self, name: str) -> str:
        return f"{self.label}: {name}"

    def fingerprint(self) -> list:
        shared = [] if self._shared is None else self._shared.fingerprint()
        return [self._base.fingerprint(), self.pack.fingerprint(), *shared]

    def close(self) -> None:
        self.pack.close()


class Unpacked(Computed):
    """One tensor of an expert that is packed: in the base's type where values are exact, else in float32,
    of float64 in float64. Any range of elements is made of the tiles that hold it."""

    def __init__(self, model: Packed, name: str, base: Buffer, shared: Buffer | None) -> None:
        entry = model.pack.entries[name]
        wide = "float64" if entry.dtype.name == "float64" else "float32"
        dtype = entry.dtype if entry.values == EXACT else BY_NAME[wide]
        super().__init__(entry.shape, dtype, model.what(name), model.bytes_per_element(name))
        self.columns = 1
        self._model, self._name, self._base, self._shared = model, name, base, shared

    def slice(self, start: int, stop: int) -> PackedPart:
        stop = max(start, stop)
        self._model.check_base(self._name, start, stop)
        shared = None if self._shared is None else self._shared.slice(start, stop)
        return self._model.pack.part(self._name, self._base.slice(start, stop), start, stop, shared)

    def gather(self, positions: np.ndarray) -> Buffer:
        positions = np.asarray(positions).astype(np.int64, copy=False)
        order = np.argsort(positions, kind="stable")
        ascending = positions[order]
        shared = None if self._shared is None else self._shared.gather(ascending)
        made = self._model.pack.gathered(self._name, self._base.gather(ascending), ascending, shared)
        out = np.empty_like(made).reshape(-1, self.dtype.itemsize)
        out[order] = made.reshape(-1, self.dtype.itemsize)
        return Buffer(out.reshape(-1), self.dtype, self.origin)

    def rows(self, first: int, stop: int) -> np.ndarray:
        return self.slice(first, stop).data.reshape(stop - first, -1)

    def parts(self, first: int, stop: int) -> Iterator[Buffer]:
        """What of the pack is read, and of a base that is read for nothing else."""
        yield from self._model.pack.parts(self._name, first, stop)
        if self._shared is not None:
            yield self._shared.slice(first, stop)
        if self._model.own_base:
            yield self._base.slice(first, stop)


def probes(sizes: Mapping[str, int]) -> list[tuple[str, int]]:
    """Some tiles, spread over tensors of these sizes: (name, number of the tile)."""
    found = [(name, j) for name, numel in sizes.items() for j in range(-(-numel // TILE))]
    count = min(_PROBED, len(found))
    return [found[i * len(found) // count] for i in range(count)]


def other_base(pack: PackFile, base: Model, tiles: BaseTiles) -> str | None:
    """Why a model is not the one that an expert was packed against; None where it is, as far as names,
    types, shapes and the elements of some of its tiles tell."""
    for name, entry in pack.entries.items():
        info = base.tensors.get(name)
        if info is None:
            return f"has no {quoted(name)}"
        if (tuple(info.shape), info.dtype) != (entry.shape, entry.dtype) or is_computed(base.source(name)):
            return f"{name} is {info.dtype.name}{list(info.shape)}, not {entry.dtype.name}{list(entry.shape)}"
    for name, j in probes({name: entry.numel for name, entry in pack.entries.items()}):
        if tiles.hashes(name, range(j, j + 1))[0] != pack.base_hashes(name)[j]:
            return f"tile {j} of {name} is another"
    return None


def beside_weights(pack: PackFile, base: Path, folder: Path) -> None:
    """Fill `folder` with the expert's files that are no weights: links to those of the base, and the
    pack's own."""
    own, home_of_base = pack.beside(), home(base)
    if home_of_base.is_dir():
        for name in sorted(os.listdir(home_of_base)):
            if name not in own and not is_weights(home_of_base / name):
                (folder / name).symlink_to((home_of_base / name).resolve())
    for name, content in own.items():
        (folder / name).write_bytes(content)


def shared_edit_of(pack: PackFile) -> PackFile | None:
    """The open file of the edit that a pack shares with others; None without one."""
    if pack.shared is None:
        return None
    name, mark = str(pack.shared.get("file")), pack.shared.get("mark")
    if Path(name).name != name:
        raise pack.error(f"names a shared edit {quoted(name)}, which leads elsewhere: make it again")
    shared = PackFile(pack.path.with_name(name), pack.label)
    if shared.shared is None or shared.shared.get("mark") != mark:
        shared.close()
        raise pack.error(f"{name} beside it is the shared edit of other experts: fetch them together")
    return shared


def raise_other_base(pack: PackFile, reasons: list[str]) -> NoReturn:
    """InputError: none of the models that were tried is the base."""
    named = f"{pack.base.model} (content {pack.base.content[:12]})"
    raise InputError(
        f"{pack.label}: is packed against {named}, which was not found: {'; '.join(reasons)}: "
        "name that model as base_model, or in its place"
    )
