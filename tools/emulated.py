"""The compiled kernels of another architecture under the tests of this machine: both ends of a pipe.

    PYTHONPATH=tools OTA_EMULATED="COMMAND" pytest -p emulated tests/backends     # COMMAND runs this file

As a pytest plugin it stands in for `ota_kernels._native`: calls of kernels go to COMMAND, where this file
runs as a program, under an emulator, with that architecture's extension. What they write comes back into the
caller's arrays. tools/aarch64.sh makes and starts it.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

# They concern open files and pages of this process.
_HERE = frozenset(
    ["SPARE", "is_in_memory", "guard", "unguard", "watch", "lost", "scatter_in_file", "ask_for_runs"]
)
_LINE = 64  # arrays keep their places in cache lines: kernels take unaligned ones


def _array(dtype: str, shape: tuple[int, ...], content: bytes, place: int) -> np.ndarray:
    room = np.zeros(len(content) + 2 * _LINE, np.uint8)
    begin = (place - room.ctypes.data) % _LINE
    room[begin : begin + len(content)] = np.frombuffer(content, np.uint8)
    return room[begin : begin + len(content)].view(dtype).reshape(shape)


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if type(value) is not np.ndarray or value.dtype == object:
            return NotImplemented
        return _array, (value.dtype.str, value.shape, value.tobytes(), value.ctypes.data % _LINE)


def _send(stream: Any, value: Any) -> None:
    content = io.BytesIO()
    _Pickler(content).dump(value)
    stream.write(len(content.getbuffer()).to_bytes(8, "little") + content.getbuffer())
    stream.flush()


def _receive(stream: Any) -> Any:
    size = stream.read(8)
    if len(size) < 8:
        raise EOFError("the other end is gone")
    return pickle.loads(stream.read(int.from_bytes(size, "little")))


def _arrays(value: Any) -> Iterator[np.ndarray]:
    """All arrays of an argument, in an order that both ends share."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _arrays(each)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _arrays(getattr(value, field.name))


def _plain(value: Any) -> Any:
    """A result without the extension's own types."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    if type(value).__module__.endswith("_native"):
        return SimpleNamespace(
            **{name: _plain(getattr(value, name)) for name in dir(value) if not name.startswith("_")}
        )
    return value


class Emulated:
    """Stands in for the extension."""

    def __init__(self, command: str, local: Any) -> None:
        self._local, self._lock = local, threading.Lock()
        self._process = subprocess.Popen(shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __getattr__(self, name: str) -> Any:
        if name in _HERE:
            return getattr(self._local, name)

        def call(*arguments: Any) -> Any:
            with self._lock:
                _send(self._process.stdin, (name, arguments))
                error, result, written = _receive(self._process.stdout)
            if error is not None:
                raise error
            for here, there in zip(_arrays(arguments), written, strict=True):
                if here.flags.writeable:
                    here[...] = there
            return result

        return call


def serve() -> None:
    """Answers calls until the pipe ends."""
    from ota_kernels import _native

    answers, sys.stdout = os.fdopen(os.dup(1), "wb"), sys.stderr
    while True:
        try:
            name, arguments = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            result = _plain(getattr(_native, name)(*arguments))
            _send(answers, (None, result, list(_arrays(arguments))))
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            _send(answers, (error, None, []))


def pytest_load_initial_conftests() -> None:
    """Before conftest.py asks for instruction sets."""
    from ota_kernels.backends import native

    emulated = Emulated(os.environ["OTA_EMULATED"], native._extension())
    native._extension = lambda: emulated


def pytest_report_header() -> str:
    return f"kernels run by: {os.environ['OTA_EMULATED']}"


if __name__ == "__main__":
    import emulated  # by the name that pickles know

    emulated.serve()
