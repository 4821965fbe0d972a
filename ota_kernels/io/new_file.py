"""One safetensors file, written in pieces of any order and published whole."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from ..errors import OutputError
from ..tensors.dtypes import DType
from .assets import sync_folder
from .header import build_header
from .offsets import write_at
from .reader import FILE_SUFFIX

_TOKEN_BYTES = 4

Entry = tuple[str, DType, tuple[int, ...]]  # name, type, shape of a tensor


def check_new_file(
    out: Path, *, overwrite: bool, suffix: str = FILE_SUFFIX, kind: str = "safetensors file"
) -> None:
    """Raise OutputError where `out` cannot become a file of this kind."""
    if out.suffix != suffix:
        raise OutputError(f"{out}: the output is a {kind}: let its name end in {suffix}")
    if os.path.isdir(out):
        raise OutputError(f"{out}: is a folder: name a file")
    if os.path.lexists(out) and not overwrite:
        raise OutputError(f"{out}: exists: name another file, or give --overwrite")
    if not os.path.isdir(out.parent):
        raise OutputError(f"{out}: its folder does not exist: make it first")


class NewFile:
    """The file while it is written, from any thread. size: its bytes."""

    def __init__(self, descriptor: int, entries: Sequence[Entry], metadata: dict[str, str]) -> None:
        self._descriptor = descriptor
        # Wider types first: then every tensor is aligned to its element size.
        ordered = sorted(entries, key=lambda entry: -entry[1].itemsize)
        header, ranges = build_header(ordered, metadata)
        placed = zip(ordered, ranges, strict=True)
        self._places = {name: (begin, dtype.itemsize) for (name, dtype, _), (begin, _) in placed}
        self.size = ranges[-1][1] if ranges else len(header)
        os.posix_fallocate(descriptor, 0, self.size)
        write_at(descriptor, 0, header)

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Write the bytes of `values` from flat index `start` of tensor `name` on."""
        begin, itemsize = self._places[name]
        write_at(self._descriptor, begin + start * itemsize, values.reshape(-1).view(np.uint8))


@contextmanager
def new_file(out: Path, entries: Sequence[Entry], metadata: dict[str, str]) -> Iterator[NewFile]:
    """A file of these tensors under a hidden name beside `out`: synced and renamed to `out` at the end, or
    removed on any exception; what a killed process left there is removed first. Raises OutputError where the
    disk refuses."""
    hidden = None
    try:
        _remove_left(out)
        hidden, descriptor = _open_hidden(out)
        try:
            yield NewFile(descriptor, entries, metadata)
            os.fsync(descriptor)
            os.replace(hidden, out)
        finally:
            os.close(descriptor)
        sync_folder(out.parent)
    except OSError as error:
        raise OutputError(
            f"{out}: cannot be written: {error.strerror}: make room there, or name another folder"
        ) from error
    finally:
        if hidden is not None:
            hidden.unlink(missing_ok=True)


def _open_hidden(out: Path) -> tuple[Path, int]:
    """A new hidden file, locked as long as its descriptor is open."""
    while True:
        hidden = out.with_name(f".{out.name}.{secrets.token_hex(_TOKEN_BYTES)}")
        descriptor = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):  # not every file system has locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Between the two calls another process may have taken it for one that was left.
        if hidden.exists():
            return hidden, descriptor
        os.close(descriptor)


def _remove_left(out: Path) -> None:
    """Remove hidden files of `out` whose process is gone: those that nobody holds a lock of."""
    name = re.compile(re.escape(f".{out.name}.") + f"[0-9a-f]{{{2 * _TOKEN_BYTES}}}")
    for path in out.parent.iterdir():
        if name.fullmatch(path.name) is None:
            continue
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)
