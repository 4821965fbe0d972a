"""Where a merge works before it is published.

.OUT.ota-merge/        hidden sibling of OUT; what a killed merge leaves, and what --resume continues
    lock               held while a merge runs; says by whom, and is touched all the while
    journal.jsonl      fingerprint, decisions, finished ranges; of further ranks journal.1.jsonl, ...
    candidates.bin     undecided elements; candidates.1.bin, ...
    token              what every rank must see
    files/             the output folder, renamed to OUT when everything is on the disk
    replaced/          the former OUT, for the moment between two renames (--overwrite)
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from ..errors import OutputError, RunError
from ..sizes import format_bytes
from . import journal
from .assets import sync_folder

TOUCH = 10.0  # seconds between two signs of life in the lock
_STALE = 60.0  # seconds without one after which another host may take it


class WorkFolder:
    """The hidden sibling of OUT; a context manager that locks it.

    needed_bytes: room that the output takes, checked before the first byte; resume: go on with what is there;
    overwrite: start again, unless told to resume. Raises OutputError where an unfinished merge is in the way,
    another one runs, or the disk has no room.
    """

    def __init__(self, out: Path, needed_bytes: int, *, resume: bool, overwrite: bool) -> None:
        self.out = out
        self.path = out.parent / f".{out.name}.ota-merge"
        self.files = self.path / "files"
        self._needed_bytes = needed_bytes
        self._resume, self._overwrite = resume, overwrite
        self._lock = -1
        self._released = threading.Event()

    def check(self) -> None:
        """Raise OutputError where the merge could not begin; writes nothing."""
        if self.path.exists() and not (self._resume or self._overwrite):
            raise OutputError(
                f"an unfinished merge into {self.out} is there ({self.path}): --resume goes on, "
                "--overwrite starts again"
            )
        self._check_room()

    def __enter__(self) -> WorkFolder:
        self.check()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._restore_replaced()
            if not self._resume or not self.files.exists() or not journal.read(self.path, repair=True):
                self._empty()
            self.files.mkdir(exist_ok=True)
        except OSError as error:
            self.__exit__()
            raise OutputError(f"cannot write to {self.path}: {error.strerror}") from error
        except OutputError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock >= 0:
            self._released.set()
            with suppress(OSError):
                os.ftruncate(self._lock, 0)  # nobody holds it
            os.close(self._lock)
            self._lock = -1

    def _check_room(self) -> None:
        parent = next(p for p in self.path.parents if p.exists())
        free = shutil.disk_usage(parent).free
        allocated = sum(f.stat().st_blocks * 512 for f in self.files.glob("*.safetensors"))
        if free + allocated < self._needed_bytes:
            raise OutputError(
                f"the merge needs {format_bytes(self._needed_bytes)} in {parent}, where {format_bytes(free)} "
                "are free: free some room or name another folder"
            )

    def _take_lock(self) -> None:
        """By the system where it has locks, across hosts by signs of life in the file: not every network file
        system has locks that other hosts see."""
        fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            holder = _holder(fd)
            by = f" (process {holder['process']} on {holder['host']})" if holder else ""
            busy = f"another merge is writing {self.out}{by}: wait for it, or name another folder"
            with suppress(OSError):  # there are no locks
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise OutputError(busy) from error
            if holder and holder["host"] != host() and (age := self._age(fd)) < _STALE:
                raise OutputError(f"{busy}; if that process is gone, try again in {_STALE - age:.0f} seconds")
            with suppress(OSError):  # no room for a name
                os.ftruncate(fd, 0)
                os.pwrite(fd, json.dumps({"host": host(), "process": os.getpid()}).encode(), 0)
        except BaseException:
            os.close(fd)
            raise
        self._lock = fd
        threading.Thread(target=self._touch, name="ota-lock", daemon=True).start()

    def _age(self, fd: int) -> float:
        """Seconds since the lock was touched, by the clock of the file system."""
        clock = self.path / "clock"
        clock.touch()
        age = clock.stat().st_mtime - os.fstat(fd).st_mtime
        clock.unlink()
        return age

    def _touch(self) -> None:
        while not self._released.wait(TOUCH):
            with suppress(OSError):
                os.utime(self.path / "lock")

    def _restore_replaced(self) -> None:
        """Put the former OUT back after a kill between the two renames: it goes only for a finished merge."""
        replaced = self.path / "replaced"
        if replaced.exists() and not self.out.exists():
            os.rename(replaced, self.out)

    def _empty(self) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()

    def records(self, fingerprint: str, inputs: Mapping[str, list]) -> dict[int, list[dict]]:
        """The journals of the merge to resume, by rank; none for a new one. inputs: what tells whether a file
        has changed, by its path. OutputError when they are another merge's, by the file that has changed."""
        found = journal.read(self.path)
        for first, *_ in found.values():
            if first.get("fingerprint") == fingerprint:
                continue
            changed = [
                path
                for path, seen in first.get("inputs", {}).items()
                if (inputs[path] != seen if path in inputs else not os.path.exists(path))
            ]
            what = f"was of another {changed[0]}, which has changed since" if changed else None
            raise OutputError(
                f"the unfinished merge in {self.path} {what or 'had another recipe, inputs or options'}: "
                "--overwrite starts again"
            )
        return found

    def meet(self, tell: Callable, wait: Callable[[], None], is_first: bool) -> None:
        """Check that all ranks see this folder. tell, wait: as of `run.ranks.Ranks`. RunError where one does
        not."""
        token, path = tell(lambda: os.urandom(8).hex()), self.path / "token"
        try:
            if is_first:
                path.write_text(token)
            wait()
            seen = path.read_text() if self.files.is_dir() else ""
        except OSError:
            seen = ""
        if seen != token:
            raise RunError(
                f"{host()} does not see {self.path} as rank 0 has made it: name an output folder on a file "
                "system that all hosts share"
            )

    def check_written(self, sizes: Mapping[str, int]) -> None:
        """RunError where a file is not there with its size, by its name: it was taken away from under us."""
        for name, size in sizes.items():
            path = self.files / name
            if not path.is_file() or path.stat().st_size != size:
                raise RunError(f"{path} was taken away while it was written: merge again with --overwrite")

    def remove_if_published(self) -> None:
        """Delete what a kill right after `publish` renamed the files left here."""
        if self.path.exists() and not self.files.exists():
            self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def publish(self) -> None:
        """Rename the finished files to OUT; what was there before is deleted last."""
        try:
            if self.out.exists() and any(self.out.iterdir()):
                os.rename(self.out, self.path / "replaced")
            os.rename(self.files, self.out)
            sync_folder(self.out.parent)
        except OSError as error:
            raise self._not_moved(error) from error
        self.remove()

    def _not_moved(self, error: OSError) -> RunError:
        return RunError(f"cannot move the result to {self.out}: {error.strerror}; it is in {self.files}")


class WorkFile(WorkFolder):
    """The same where OUT is one file. name: of the file that it is, among the others."""

    def __init__(self, out: Path, needed_bytes: int, *, resume: bool, overwrite: bool, name: str) -> None:
        super().__init__(out, needed_bytes, resume=resume, overwrite=overwrite)
        self._name = name

    def check_written(self, sizes: Mapping[str, int]) -> None:
        """RunError where a file is not there with its size, by its name: it was taken away from under us."""
        for name, size in sizes.items():
            path = self.files / name
            if not path.is_file() or path.stat().st_size != size:
                raise RunError(f"{path} was taken away while it was written: merge again with --overwrite")

    def remove_if_published(self) -> None:
        if not (self.files / self._name).exists():
            self.remove()

    def publish(self) -> None:
        """Rename the finished file to OUT, in place of what was there."""
        try:
            os.replace(self.files / self._name, self.out)
            sync_folder(self.out.parent)
        except OSError as error:
            raise self._not_moved(error) from error
        self.remove()


def host() -> str:
    return socket.gethostname()


def _holder(fd: int) -> dict | None:
    """Who holds the lock, as it says; None where nobody does."""
    try:
        found = json.loads(os.pread(fd, 1000, 0))
        return {"host": str(found["host"]), "process": int(found["process"])}
    except (ValueError, KeyError, TypeError):
        return None
