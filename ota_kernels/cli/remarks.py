"""What is logged while inputs are read waits until they are understood: an error about them is one line."""

from __future__ import annotations

import logging

import click

_LOGGER = logging.getLogger("ota_kernels")


class _Waiting(logging.Handler):
    """Keeps warnings until they are released, and prints them from then on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.kept: list[str] | None = []

    def emit(self, record: logging.LogRecord) -> None:
        if self.kept is None:
            click.echo(record.getMessage(), err=True)
        else:
            self.kept.append(record.getMessage())


_waiting = _Waiting()


def hold() -> None:
    """From now on, keep warnings."""
    _LOGGER.addHandler(_waiting)


def release() -> None:
    """Print what is kept, and whatever comes, at once."""
    kept, _waiting.kept = _waiting.kept, None
    for line in kept or ():
        click.echo(line, err=True)


def leave() -> None:
    """Log as Python does: somebody asked for more."""
    _LOGGER.removeHandler(_waiting)
