"""Checksums of an output's tensors and shards, taken while tiles land in any order, from any thread.

    tensor --cut--> leaves of LEAF bytes (the last one shorter) --XXH3-64 each, little-endian--> one after the
    other --XXH3-64--> the tensor's checksum
    shard: XXH3-64 of its header, then of its tensors' checksums (little-endian), in the order of the file

A leaf is hashed when its last bytes are written, while they are in the cache. Where tiles meet within one, or
an earlier process wrote it, it is read once more at the end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

if TYPE_CHECKING:
    from .writer import Layout, OutputTensor

LEAF = 1 << 18
_TASK = 64  # leaves that one worker reads: those of small tensors are a few bytes


@dataclass(frozen=True)
class Sums:
    """Hexadecimal checksums by name."""

    tensors: Mapping[str, str]
    shards: Mapping[str, str]

    def as_dict(self) -> dict:
        about = (
            f"XXH3-64 of XXH3-64 digests: of {LEAF} bytes each in a tensor, of header and tensors in a shard"
        )
        return {"method": about, "leaf": LEAF, "shards": dict(self.shards), "tensors": dict(self.tensors)}


class Leaves:
    """Digests of a layout's leaves. digests: uint64[n], valid where `known`."""

    def __init__(self, plan: Layout) -> None:
        self._layout = plan
        counts = [-(-(t.end - t.begin) // LEAF) for t in plan.tensors]
        self._first = dict(zip((t.name for t in plan.tensors), accumulate(counts, initial=0), strict=False))
        self.digests = np.zeros(sum(counts), np.uint64)
        self.known = np.zeros(len(self.digests), bool)
        self._everybodys = self.known.copy()  # leaves that all processes know
        self._lock = threading.Lock()

    def forget(self, tensor: OutputTensor, begin: int, end: int) -> None:
        """Bytes [begin, end) of a tensor are not final."""
        first = self._first.get(tensor.name)
        if first is None:  # it stands for several tensors, which are read at the end
            return
        with self._lock:
            self.known[first + begin // LEAF : first - (-end // LEAF)] = False

    def add(self, tensor: OutputTensor, begin: int, data: np.ndarray) -> None:
        """data (uint8): what the tensor holds from byte `begin` on. Leaves that it holds a part of are not
        known afterwards."""
        if tensor.name not in self._first:
            return
        size, end = tensor.end - tensor.begin, begin + len(data)
        whole = range(-(-begin // LEAF), -(-size // LEAF) if end == size else end // LEAF)
        found = [_digest(data[i * LEAF - begin : (i + 1) * LEAF - begin]) for i in whole]
        self.forget(tensor, begin, end)
        first = self._first[tensor.name]
        with self._lock:
            self.digests[first + whole.start : first + whole.start + len(found)] = found
            self.known[first + whole.start : first + whole.start + len(found)] = True

    def add_up(self, total: Callable[[np.ndarray], np.ndarray]) -> None:
        """With those of other processes. total: adds up arrays of all of them. What only this one knew of was
        written whole by this one."""
        own = self.known & ~self._everybodys
        digests = total(np.where(own, self.digests, np.uint64(0)))
        known = total(own.astype(np.int64)) > 0
        self.digests = np.where(self._everybodys, self.digests, digests)
        self._everybodys = known | self._everybodys
        self.known = self._everybodys.copy()

    def unknown(self) -> Iterator[tuple[OutputTensor, int, int]]:
        """Ranges of bytes (tensor, begin, end) of leaves that are not known, a leaf each."""
        for tensor in self._layout.tensors:
            first, size = self._first[tensor.name], tensor.end - tensor.begin
            for leaf in np.flatnonzero(~self.known[first : first - (-size // LEAF)]).tolist():
                yield tensor, leaf * LEAF, min((leaf + 1) * LEAF, size)

    def sums(self) -> Sums:
        """From all leaves."""
        of_tensor, of_shard = {}, [[] for _ in self._layout.shards]
        for tensor in sorted(self._layout.tensors, key=lambda t: (t.shard, t.begin, t.end)):
            first, size = self._first[tensor.name], tensor.end - tensor.begin
            own = self.digests[first : first - (-size // LEAF)].astype("<u8")
            digest = _digest(own.view(np.uint8))
            of_tensor[tensor.name] = f"{digest:016x}"
            of_shard[tensor.shard].append(digest)
        shards = zip(self._layout.shards, of_shard, strict=True)
        return Sums(of_tensor, {shard.name: _of_shard(shard.header, own) for shard, own in shards})


def _digest(data: np.ndarray) -> int:
    return xxh3_64_intdigest(memoryview(data))


def _of_shard(header: bytes, tensors: Iterable[int]) -> str:
    return xxh3_64_hexdigest(header + np.array(list(tensors), "<u8").tobytes())


def complete(
    leaves: Leaves,
    read: Callable[[OutputTensor, int, int], np.ndarray],
    run: Callable = map,
    part: tuple[int, int] = (0, 1),
) -> None:
    """Find the leaves that are not known. read: bytes [begin, end) of a tensor; run: as `Pool.run`; part:
    (i, n), only the i-th of n parts."""

    def of_leaves(places: list[tuple[OutputTensor, int, int]]) -> None:
        for place in places:
            leaves.add(place[0], place[1], read(*place))

    unknown = list(leaves.unknown())
    first, end = (len(unknown) * i // part[1] for i in (part[0], part[0] + 1))
    for _ in run(of_leaves, (unknown[i : min(i + _TASK, end)] for i in range(first, end, _TASK))):
        pass
