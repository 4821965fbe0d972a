"""Which file systems serve mapped files slowly: each fault is a question to another machine or process."""

from __future__ import annotations

import ctypes
import functools
import os
import sys

# f_type of statfs (linux/magic.h, and the file systems' own headers).
_SLOW = {
    0x6969: "NFS",
    0x0BD00BD0: "Lustre",
    0x65735546: "FUSE",
    0xFF534D42: "CIFS",
    0xFE534D42: "SMB",
    0x00C36400: "Ceph",
    0x47504653: "GPFS",
    0x19830326: "BeeGFS",
    0x01021997: "9P",
}


def slow_maps(path: str) -> str | None:
    """The name of the file system of `path`, where reads in flight are faster than faults; None elsewhere."""
    return _SLOW.get(type_of(path))


def type_of(path: str) -> int:
    """f_type; 0 where the system does not tell."""
    if sys.platform != "linux":
        return 0
    found = ctypes.create_string_buffer(512)  # struct statfs, whose first word it is
    if _statfs()(os.fsencode(path), found) != 0:
        return 0
    return ctypes.c_long.from_buffer(found).value & 0xFFFFFFFF


@functools.cache
def _statfs():
    function = ctypes.CDLL(None, use_errno=True).statfs
    function.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    return function
