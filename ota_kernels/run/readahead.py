"""Asks for the pages of tiles that are next."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from ..io.filesystems import slow_maps
from ..io.pages import advise
from ..select.sample import are_cached
from ..tensors.buffer import Buffer
from ..tensors.tile import TensorInputs

logger = logging.getLogger(__name__)

_IN_FLIGHT = 16  # reads at a time, of files whose faults are slow
_READ = 1 << 22  # bytes of each


class ReadAhead:
    """Keeps a disk at work: a fault asks for one piece at a time, and waits for it. Does nothing where the
    page cache holds the inputs of `tensors` already. Files on a network file system are read into the page
    cache, by large reads in flight; of others the system is told."""

    def __init__(self, tensors: Sequence[TensorInputs]) -> None:
        self._tensors = tensors
        self._slow: dict[str, int] = {}  # descriptors by file; -1: not slow, or not to be opened
        self._folders: set[str] = set()
        self._readers: ThreadPoolExecutor | None = None
        self._local = threading.local()

    @functools.cached_property
    def is_idle(self) -> bool:
        return are_cached([buffer for tensor in self._tensors for buffer in tensor.buffers])

    def __call__(self, buffers: Iterable[Buffer]) -> None:
        """These will be read soon. Waits for room in the disk's queue, not for their pages."""
        if self.is_idle:
            return
        for buffer in buffers:
            descriptor = -1 if buffer.offset < 0 else self._slow_file(buffer.origin)
            if descriptor < 0:
                advise(buffer.data, "willneed")
                continue
            self._readers = self._readers or ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="ota-read")
            end = buffer.offset + buffer.data.size
            for begin in range(buffer.offset, end, _READ):
                self._readers.submit(self._read, descriptor, begin, min(_READ, end - begin))

    def _slow_file(self, path: str) -> int:
        if path not in self._slow:
            self._slow[path], name = -1, slow_maps(path)
            if name is not None:
                with suppress(OSError):  # whoever reads the map says so
                    self._slow[path] = os.open(path, os.O_RDONLY)
                folder = os.path.dirname(path)
                if folder not in self._folders:
                    self._folders.add(folder)
                    logger.info("%s is on %s: files are read ahead, %d at a time", folder, name, _IN_FLIGHT)
        return self._slow[path]

    def _read(self, descriptor: int, begin: int, nbytes: int) -> None:
        room = getattr(self._local, "room", None)
        if room is None:
            room = self._local.room = bytearray(_READ)
        with suppress(OSError):
            os.preadv(descriptor, [memoryview(room)[:nbytes]], begin)

    def close(self) -> None:
        if self._readers is not None:
            self._readers.shutdown(cancel_futures=True)
        for descriptor in self._slow.values():
            if descriptor >= 0:
                os.close(descriptor)
        self._slow.clear()
