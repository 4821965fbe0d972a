"""How pinned memory is filled from mapped files: copied from their maps, or read from the files into it.

A copy takes a fault for every window of pages, and the pages must be let go again, which interrupts every
processor of the process; a read takes neither, but goes through the file system. Which is faster differs
between kernels, file systems and numbers of threads: both are tried on the first tiles, the faster one stays.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time

import numpy as np

from ...io.pages import read_into
from ...sizes import format_bytes

logger = logging.getLogger(__name__)

_TRIED = 8  # tiles of each way


class Filling:
    """Of all slots of a device. Used by many threads at once."""

    def __init__(self) -> None:
        self.reads: bool | None = None  # which way stays; None: both are tried
        self._lock = threading.Lock()
        self._turns = itertools.count()
        self._seconds: dict[bool, list[float]] = {False: [], True: []}  # of a byte, by whether it was read

    def tile(self) -> Tile:
        """The way of one tile's bytes."""
        reads = self.reads
        return Tile(self, next(self._turns) % 2 == 1 if reads is None else reads)

    def took(self, reads: bool, nbytes: int, seconds: float) -> None:
        """A tile's bytes of mapped files were there after so many seconds."""
        if self.reads is not None or not nbytes:
            return
        with self._lock:
            self._seconds[reads].append(seconds / nbytes)
            if self.reads is None and min(map(len, self._seconds.values())) >= _TRIED:
                copied, read = (float(np.median(of)) for of in self._seconds.values())
                self.reads = read < copied
                rates = [format_bytes(int(1 / max(x, 1e-12))) for x in (copied, read)]
                way = "reads" if self.reads else "copies"
                logger.info("pinned memory: %s per second copied, %s read by a thread; %s", *rates, way)


class Tile:
    """One tile on its way; `fill` its pieces, then `done`. reads: whether those of files are read."""

    def __init__(self, filling: Filling, reads: bool) -> None:
        self._filling, self.reads = filling, reads
        self._begun, self._nbytes = time.perf_counter(), 0

    def fill(self, target: np.ndarray, piece: np.ndarray) -> None:
        """target, piece: uint8[n]."""
        if self.reads and read_into(target, piece):
            self._nbytes += piece.size
            return
        target[:] = piece
        self._nbytes += 0 if self.reads else piece.size

    def done(self) -> None:
        self._filling.took(self.reads, self._nbytes, time.perf_counter() - self._begun)
