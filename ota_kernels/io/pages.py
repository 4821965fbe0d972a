"""Pages of mapped files: which are wanted, which may go, and which could not be read."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..errors import InputError, RunError
from ..tensors.curvature import Curvature
from ..tensors.tile import TensorInputs

_WINDOW = 1 << 16  # bytes around a touched page that Linux maps with it (fault_around_bytes)
_ADVICE = {"willneed": 3, "dontneed": 4}  # MADV_WILLNEED and MADV_DONTNEED on Linux
_REQUEST = 1 << 17  # bytes: of "willneed", Linux reads no more than one request of the device


class MappedMemory:
    """Bytes of a file map that `owner` keeps alive; `numpy.asarray` views them read-only as uint8[nbytes]."""

    def __init__(self, owner: object, address: int, nbytes: int):
        self.owner = owner
        self.__array_interface__ = {
            "version": 3,
            "data": (address, True),
            "shape": (nbytes,),
            "typestr": "|u1",
        }


def advise(array: np.ndarray, advice: str) -> None:
    """Tell the kernel that the file pages under `array` are wanted soon ("willneed") or no more ("dontneed").

    array: contiguous; whole windows of _WINDOW bytes are meant, because a page that is touched maps its
    window: dropped pages of neighbours come back from the file when they are touched. Does nothing for memory
    that is no file map, where "dontneed" would destroy the contents, and on systems other than Linux.
    """
    madvise = _madvise()
    bounds = _file_map(array)
    if madvise is None or array.nbytes == 0 or bounds is None:
        return
    address = array.ctypes.data
    start = max(address - address % _WINDOW, bounds[0])
    end = min(-(-(address + array.nbytes) // _WINDOW) * _WINDOW, bounds[1])
    step = _REQUEST if advice == "willneed" else end - start
    for place in range(start, end, step):
        madvise(place, min(step, end - place), _ADVICE[advice])


def release(part: TensorInputs | Curvature) -> None:
    """Let go of the mapped pages of a tile, or of its curvature: resident memory stays what is in flight."""
    for buffer in part.buffers:
        advise(buffer.data, "dontneed")


_guarded: dict[int, tuple[Path, int]] = {}  # number of a map -> its file, and its bytes
_files: weakref.WeakKeyDictionary[mmap.mmap, tuple[Path, tuple[int, int]]] = weakref.WeakKeyDictionary()


def guarded(mapped: mmap.mmap, path: Path) -> np.ndarray:
    """The bytes of a file's map. Where a read of them fails, `check_reads` says so, if they are `watched`."""
    from .. import _native

    data = np.frombuffer(mapped, np.uint8)
    number = _native.guard(data.ctypes.data, data.size)
    _guarded[number] = path, data.size
    _files[mapped] = path, _identity(os.stat(path))
    weakref.finalize(mapped, _forget, number).atexit = False
    return data


def _forget(number: int) -> None:
    from .. import _native

    _native.unguard(number)
    del _guarded[number]


@contextmanager
def watched() -> Iterator[None]:
    """In here a failing read of a mapped file gives zeros, for which `check_reads` must be asked before
    anything made of them is kept. Else it ends the process: a command with one line (`cli.main`)."""
    from .. import _native

    _native.watch(True)
    try:
        yield
    finally:
        _native.watch(False)


def check_reads() -> None:
    """Raise for the first file of which a read has failed: InputError where it has become shorter, RunError
    for its disk."""
    from .. import _native

    for number in _native.lost():
        path, size = _guarded[number]
        if not os.path.exists(path) or os.path.getsize(path) < size:
            raise InputError(f"{path}: changed while in use: it is shorter than before")
        raise RunError(f"{path}: a read from its disk failed; --resume when it can be read")


def read_into(target: np.ndarray, array: np.ndarray) -> bool:
    """Read the file's bytes under `array` (uint8, of a `guarded` map) into `target` (uint8, as many): no page
    is mapped for that. False, and nothing done, where there is no such file, or another one has its name.

    Raises InputError where the file has become shorter, RunError where its disk fails."""
    whole, owner = _memory(array)
    if not isinstance(owner, mmap.mmap) or owner not in _files:
        return False
    path, identity = _files[owner]
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        if _identity(os.fstat(descriptor)) != identity:
            return False
        begin, done = array.ctypes.data - whole.ctypes.data, 0
        while done < target.size:
            count = os.preadv(descriptor, [memoryview(target)[done:]], begin + done)
            if not count:
                raise InputError(f"{path}: changed while in use: it is shorter than before")
            done += count
    except OSError as error:
        raise RunError(
            f"{path}: a read from its disk failed ({error}); --resume when it can be read"
        ) from None
    finally:
        os.close(descriptor)
    return True


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _memory(array: np.ndarray) -> tuple[np.ndarray, object]:
    """(The array that all of it is a view of, whose memory that is)."""
    whole, owner = array, array.base
    while isinstance(owner, np.ndarray):
        whole, owner = owner, owner.base
    return whole, owner.obj if isinstance(owner, memoryview) else owner


def _file_map(array: np.ndarray) -> tuple[int, int] | None:
    """First address and end of the file map that `array` lies in, whole pages; None for other memory."""
    whole, owner = _memory(array)
    if not isinstance(owner, (mmap.mmap, MappedMemory)):
        return None
    start = whole.ctypes.data
    return start - start % mmap.PAGESIZE, start + whole.nbytes


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
