"""What is logged while inputs are read waits until they are understood: an error about them is one line."""

from __future__ import annotations

import logging

_LOGGER = logging.getLogger("ota_kernels")


class _Waiting(logging.Handler):
    """Keeps warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.kept: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record)


_waiting = _Waiting()


def hold() -> None:
    """From now on, keep warnings."""
    _waiting.kept = []
    _LOGGER.addHandler(_waiting)


def drop() -> None:
    """Forget what is kept; from now on, log as Python does."""
    _LOGGER.removeHandler(_waiting)
    _waiting.kept = []


def release() -> None:
    """Print what is kept, unless somebody else was told; from now on, log as Python does."""
    kept = _waiting.kept
    drop()
    if not _LOGGER.hasHandlers() and logging.lastResort is not None:
        for record in kept:
            logging.lastResort.handle(record)
