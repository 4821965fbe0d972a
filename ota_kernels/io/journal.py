"""The journal of a merge: which ranges are on the disk, so that a killed merge resumes.

One JSON object a line with its CRC-32, appended: the fingerprint of the job first, then model-wide decisions,
then finished units; a file for each rank. A unit is recorded only after its data is synced. What follows a
line that was cut or damaged is not read: it is as if the merge had been killed before it.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

from ..errors import RunError
from .offsets import of_rank

logger = logging.getLogger(__name__)

NAME = "journal.jsonl"
_FILES = re.compile(r"journal(?:\.(\d+))?\.jsonl")


class Journal:
    """Appends records in the background: `sync` runs before each batch that speaks of data, so that records
    never run ahead of it."""

    def __init__(self, folder: Path, sync: Callable[[], None], rank: int = 0) -> None:
        self._folder = folder
        path = of_rank(folder / NAME, rank)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
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
                data = b"".join(line_of(record) for record, _ in records)
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


def line_of(record: dict) -> bytes:
    """As it is in a journal."""
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%s %08x\n" % (text, zlib.crc32(text))


def read(folder: Path, repair: bool = False) -> dict[int, list[dict]]:
    """The records of a folder's journals, by rank, those that have any. repair: cut what cannot be used off
    the files, which must be done before anything is appended to them."""
    ranks = sorted(int(m[1] or 0) for m in map(_FILES.fullmatch, _names(folder)) if m)
    found = {rank: _read(of_rank(folder / NAME, rank), repair) for rank in ranks}
    return {rank: records for rank, records in found.items() if records}


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _read(path: Path, repair: bool) -> list[dict]:
    data, records, good = path.read_bytes(), [], 0
    for line in data.splitlines(keepends=True):
        record = _record(line)
        if record is None:
            break
        records.append(record)
        good += len(line)
    if good < len(data):
        if data.count(b"\n", good) > 1:  # more than a line that a kill has cut
            logger.warning("%s is damaged after %d records: what follows is merged again", path, len(records))
        if repair:
            os.truncate(path, good)
    return records


def _record(line: bytes) -> dict | None:
    """None where the line is not whole, or not as it was written."""
    text, _, check = line.rpartition(b" ")
    if check != b"%08x\n" % zlib.crc32(text):
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
