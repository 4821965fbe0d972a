"""The journal of a merge: which ranges are on the disk, so that a killed merge resumes.

One JSON object a line, appended: the fingerprint of the job first, then model-wide decisions, then finished
units. A unit is recorded only after its data is synced. A line that was cut by a kill is ignored.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path

from ..errors import OutputError, RunError

NAME = "journal.jsonl"


class Journal:
    """Appends records in the background: `sync` runs before each batch that speaks of data, so that records
    never run ahead of it."""

    def __init__(self, folder: Path, sync: Callable[[], None]) -> None:
        self._folder = folder
        self._fd = os.open(folder / NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._sync = sync
        self._queue: queue.Queue = queue.Queue()
        self._failure: RunError | None = None
        self._thread = threading.Thread(target=self._drain, name="ota-journal", daemon=True)
        self._thread.start()

    def append(self, record: dict | None, of_data: bool = True) -> None:
        """Record something whose data has been handed to the writer, or that has none; RunError if a write
        has failed."""
        if self._failure is not None:
            raise self._failure
        if record is not None:
            self._queue.put((record, of_data))

    def _drain(self) -> None:
        while True:
            batch = [self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get())
            records = [entry for entry in batch if entry is not None]
            try:
                if len(records) < len(batch) or any(of_data for _, of_data in records):
                    self._sync()
                lines = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record, _ in records)
                data = lines.encode()
                while data:  # a disk that fills up takes a part
                    data = data[os.write(self._fd, data) :]
                os.fdatasync(self._fd)
            except Exception as error:
                reason = getattr(error, "strerror", None) or error
                self._failure = RunError(
                    f"cannot write to {self._folder}: {reason}; make room or mend the disk, then --resume"
                )
                self._failure.__cause__ = error
                return
            if len(records) < len(batch):
                return

    def close(self) -> None:
        """Wait until everything appended is on the disk; RunError if a write has failed."""
        if self._fd < 0:
            return
        self._queue.put(None)
        self._thread.join()
        os.close(self._fd)
        self._fd = -1
        if self._failure is not None:
            raise self._failure


def read(folder: Path) -> list[dict]:
    """The records of a folder's journal; a last line that was cut is dropped from the file too."""
    path = folder / NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise OutputError(f"{path}: not a journal ({error}); start again with --overwrite") from error
