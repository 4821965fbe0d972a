"""Where a merge works before it is published.

.OUT.ota-merge/        hidden sibling of OUT; what a killed merge leaves, and what --resume continues
    lock               held while a merge runs
    journal.jsonl      fingerprint, decisions, finished ranges
    files/             the output folder, renamed to OUT when everything is on the disk
    replaced/          the former OUT, for the moment between two renames (--overwrite)
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from ..errors import OutputError, RunError
from ..sizes import format_bytes
from . import journal
from .assets import sync_folder


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
            if not self._resume or not self.files.exists() or not journal.read(self.path):
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
        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"another merge is writing {self.out}: wait for it, or name another folder"
            ) from error

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

    def journal_records(self, fingerprint: str) -> list[dict]:
        """The journal of the merge to resume; empty for a new one. OutputError when it is another merge's."""
        records = journal.read(self.path)
        if records and records[0].get("fingerprint") != fingerprint:
            raise OutputError(
                f"the unfinished merge in {self.path} had another recipe, inputs or options: "
                "--overwrite starts again"
            )
        return records

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
