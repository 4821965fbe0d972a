"""Sums that survive a kill, in two mapped files of which one is always whole.

.OUT.ota-estimate/     hidden sibling of OUT; what a stopped estimate leaves, and what --resume continues
    lock               held while an estimate runs
    state.json         the fingerprint, how many samples are summed, and which file holds them
    0.safetensors      each laid out as OUT is, with sums in the place of means
    1.safetensors

Samples are added to the file that the state does not name. A commit syncs that file and then names it; the
other one becomes a copy, to which the next samples are added. What is added between two commits is lost in a
kill, and done again.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..errors import OutputError, RunError
from ..io.assets import sync_folder, write_file
from ..io.header import build_header
from ..sizes import format_bytes
from ..tensors.dtypes import BY_NAME

_STATE = "state.json"
_FLOAT32 = BY_NAME["float32"]


class Sums:
    """Float32 sums by parameter name; a context manager that locks the folder beside `out`.

    done: how many samples the last commit holds. Entering raises OutputError where another estimate runs, an
    unfinished one is in the way, or the one to resume had another fingerprint. Leaving removes a folder
    without a commit: there is nothing to resume.
    """

    def __init__(self, out: Path, fingerprint: str, *, resume: bool, overwrite: bool) -> None:
        self.out = out
        self.path = work_folder(out)
        self.done = 0
        self._fingerprint = fingerprint
        self._resume, self._overwrite = resume, overwrite
        self._whole: int | None = None  # the file of the last commit
        self._ranges: dict[str, tuple[int, int]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._maps: tuple[np.ndarray, ...] = ()
        self._lock = -1

    def __enter__(self) -> Sums:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            self._take_lock()
            check_unfinished(self.out, resume=self._resume, overwrite=self._overwrite)
            if self._resume:
                self._read_state()
            else:
                (self.path / _STATE).unlink(missing_ok=True)
                sync_folder(self.path)  # before the files that it speaks of are made anew
        except OSError as error:
            self._unlock()
            raise OutputError(f"cannot write to {self.path}: {error.strerror}") from error
        except OutputError:
            self._unlock()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._maps = ()
        try:
            if self._whole is None:
                self.remove()
        finally:
            self._unlock()

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"another estimate is writing {self.out}: wait for it, or name another file"
            ) from error

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _read_state(self) -> None:
        path = self.path / _STATE
        if not path.exists():
            return
        try:
            state = json.loads(path.read_bytes())
            fingerprint, done, whole = state["fingerprint"], int(state["done"]), int(state["file"])
        except (ValueError, TypeError, KeyError) as error:
            raise OutputError(f"{path} is damaged: start again with --overwrite") from error
        if fingerprint != self._fingerprint:
            raise OutputError(
                f"the unfinished estimate in {self.path} had another model, data, options or version: "
                "--overwrite starts again"
            )
        self.done, self._whole = done, whole

    def allocate(self, shapes: Mapping[str, tuple[int, ...]], metadata: dict[str, str]) -> None:
        """Lay both files out, but for that of the last commit; all the room they need is taken now.

        shapes: of each parameter; metadata: of OUT. Raises OutputError where the disk has no room, or where
        the last commit's file is not laid out like that.
        """
        tensors = [(name, _FLOAT32, shape) for name, shape in shapes.items()]
        header, ranges = build_header(tensors, metadata)
        self._shapes = dict(shapes)
        self._ranges = dict(zip(shapes, ranges, strict=True))
        size = len(header) + sum(4 * math.prod(shape) for shape in shapes.values())
        try:
            for number, path in enumerate(self._files):
                if number != self._whole:
                    _create(path, header, size)
                elif not _is_laid_out(path, header, size):
                    raise OutputError(
                        f"{path} is damaged, or another version of transformers made it: "
                        "start again with --overwrite"
                    )
            sync_folder(self.path)
            self._maps = tuple(np.memmap(path, np.uint8, "r+", shape=size) for path in self._files)
        except OSError as error:
            raise OutputError(
                f"cannot make two files of {format_bytes(size)} in {self.path}: {error.strerror}; "
                "free some room or name another folder"
            ) from error

    @property
    def _files(self) -> tuple[Path, Path]:
        return self.path / "0.safetensors", self.path / "1.safetensors"

    @property
    def _working(self) -> int:
        """The file that samples are added to."""
        return 0 if self._whole is None else 1 - self._whole

    def open(self) -> dict[str, np.ndarray]:
        """The sums as last committed, to add to until the next commit: mapped float32 of each parameter's
        shape."""
        if self._whole is not None:
            np.copyto(self._maps[self._working], self._maps[self._whole])
        return self._views(self._working)

    def _views(self, file: int) -> dict[str, np.ndarray]:
        data = self._maps[file]
        return {
            name: data[begin:end].view(np.float32).reshape(self._shapes[name])
            for name, (begin, end) in self._ranges.items()
        }

    def commit(self, done: int) -> None:
        """Put what was added on the disk, as the sums of `done` samples. Raises RunError if that fails."""
        state = {"fingerprint": self._fingerprint, "done": done, "file": self._working}
        with _writing(self.path):
            self._maps[self._working].flush()
            write_file(self.path / f"{_STATE}.new", json.dumps(state).encode())
            os.replace(self.path / f"{_STATE}.new", self.path / _STATE)
            sync_folder(self.path)
        self._whole, self.done = self._working, done

    def publish(self) -> None:
        """Write the means of the last commit's sums, rename them to OUT, remove the folder."""
        with _writing(self.path):
            means = self._views(self._working)
            for name, sums in self._views(self._whole).items():
                np.divide(sums, np.float32(self.done), out=means[name])
            self._maps[self._working].flush()
            os.replace(self._files[self._working], self.out)
            sync_folder(self.out.parent)
        self.remove()

    def remove(self) -> None:
        """Delete the folder."""
        self._whole = None
        shutil.rmtree(self.path, ignore_errors=True)


def work_folder(out: Path) -> Path:
    """The hidden folder beside `out`."""
    return out.parent / f".{out.name}.ota-estimate"


def check_unfinished(out: Path, *, resume: bool, overwrite: bool) -> None:
    """OutputError where an unfinished estimate lies beside `out` and nobody said what to do with it."""
    folder = work_folder(out)
    if (folder / _STATE).exists() and not (resume or overwrite):
        raise OutputError(
            f"an unfinished estimate of {out} is there ({folder}): --resume goes on, --overwrite starts again"
        )


def remove_finished(out: Path, fingerprint: str) -> None:
    """Delete what a kill right after `publish` renamed OUT left. Raises OutputError if it is another's."""
    if work_folder(out).exists():
        with Sums(out, fingerprint, resume=True, overwrite=False) as sums:
            sums.remove()


def _create(path: Path, header: bytes, size: int) -> None:
    """A file of `header` and zeros, with all its blocks: a write to a map on a full disk kills a process."""
    with path.open("wb") as file:
        file.write(header)
        file.flush()
        os.posix_fallocate(file.fileno(), 0, size)
        os.fsync(file.fileno())


def _is_laid_out(path: Path, header: bytes, size: int) -> bool:
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_size == size and file.read(len(header)) == header


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write to {folder}: {error.strerror}; make room or mend the disk, then --resume"
        ) from error
