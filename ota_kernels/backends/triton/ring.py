"""What tiles from the host pass through on their way to a device and back: a ring of slots, used again and
again.

    mapped pages or file --> pinned memory --copy--> device --kernels--> device --copy--> pinned --> result

A slot is one tile's place: pinned memory, device memory and a stream. A worker thread takes a slot, fills
the pinned memory, lets everything else follow on the slot's stream, waits without the GIL, and gives the slot
back. The steps of one tile depend on each other, and a stream keeps their order by itself. Different tiles
depend on nothing of each other, and streams of different slots run side by side on what a device has one of
each: an engine for copies to it, one for copies from it, and the processors. So with three slots one tile is
copied in while another is computed and a third is copied out. One stream for copies and one for kernels, tied
by events, would overlap the same steps, but there a late tile holds up all that were launched after it.

Memory on the device is bounded by the slots, whatever the model's size: a slot's arena has the size of the
largest tile it has held, and what a launch allocates beside it (results, candidates, counts: in proportion to
the tile) comes from and goes back to the pool that torch keeps for the slot's stream.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
import torch

from . import MOST_SLOTS
from .device import DeviceMemoryError, is_out_of_memory, line_of
from .filling import Filling

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_ALIGNMENT = 256  # of the parts of an arena, in bytes: as of torch's own tensors, more than any load wants
_GRANULE = 2 << 20  # bytes by which memory grows: the pages of CUDA's large allocations, and huge pages
_CHUNK = 4 << 20  # bytes that are copied to the device while the next ones are filled in


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


class Pinned:
    """Page-locked host memory: uint8[nbytes] as `array` (numpy) and as `tensor` (torch), for one device;
    nbytes: above 0.

    A device copies from and to it by itself, while the host goes on. Memory that cannot be locked is used as
    it is: copies are right, but the host waits for them. It is not torch's (`pin_memory=True`): that rounds
    sizes up to powers of two, keeps what is given up, and, given up after its device has failed, ends the
    process, because its destructor throws."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # whole pages
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a system without huge pages; locking takes one by one then
                memory.madvise(mmap.MADV_HUGEPAGE)
        self.array = np.frombuffer(memory, np.uint8)
        self.tensor = torch.from_numpy(self.array)
        self._device = device
        self._locked = device.type == "cuda" and _lock(self.tensor, device)

    def close(self) -> None:
        """Unlock it. No copy may be under way."""
        if self._locked:
            with torch.cuda.device(self._device):
                torch.cuda.cudart().cudaHostUnregister(self.tensor.data_ptr())
            self._locked = False


def _lock(tensor: torch.Tensor, device: torch.device) -> bool:
    code = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.numel(), 0))
    if code == 0:
        return True
    logger.warning("%s: memory cannot be page-locked (CUDA error %d): copies take longer", device, code)
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)  # or torch's next kernel of this thread would report the error again
    return False


class Slot:
    """One tile's place. Used by one thread at a time, in `current()`."""

    def __init__(self, device: torch.device, filling: Filling) -> None:
        self._device, self._filling = device, filling
        self._stream = self._done = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            # A thread that waits for a stream spins on its processor, of which another one has need to fill.
            self._done = torch.cuda.Event(blocking=True)
        self._pinned: Pinned | None = None
        self._arena: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Of the arena on the device; there is as much pinned memory."""
        return 0 if self._arena is None else self._arena.numel()

    def drop(self) -> None:
        """Give up the memory; the next tile takes what it needs."""
        if self._pinned is not None:
            with contextlib.suppress(RuntimeError):  # of a device that has failed
                self._wait()
            self._pinned.close()
        self._pinned = self._arena = None

    def _wait(self) -> None:
        if self._done is not None:
            self._done.record(self._stream)
            self._done.synchronize()

    def current(self) -> contextlib.AbstractContextManager:
        """Where kernels are launched on the slot's stream."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def load(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Arrays of any type on the device: their bytes, uint8 each, there when the stream arrives at what is
        launched next; good until the slot's next `load`."""
        flat = [np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in arrays]
        ends = np.cumsum([_aligned(a.size) for a in flat], dtype=np.int64).tolist()
        starts = [0, *ends[:-1]]
        used = ends[-1] if ends else 0
        pinned, arena = self._grown(used)
        tile, sent = self._filling.tile(), 0
        for start, a in zip(starts, flat, strict=True):
            for place in range(0, a.size, _CHUNK):
                piece = a[place : place + _CHUNK]
                end = start + place + piece.size
                tile.fill(pinned.array[end - piece.size : end], piece)
                if end - sent >= _CHUNK:
                    arena[sent:end].copy_(pinned.tensor[sent:end], non_blocking=True)
                    sent = end
        tile.done()
        arena[sent:used].copy_(pinned.tensor[sent:used], non_blocking=True)
        return [arena[start : start + a.size] for start, a in zip(starts, flat, strict=True)]

    def _grown(self, nbytes: int) -> tuple[Pinned, torch.Tensor]:
        """Pinned memory and arena of so many bytes or more."""
        if self._pinned is None or self._arena is None or self.nbytes < nbytes:
            self.drop()  # before there is more
            size = max(-(-nbytes // _GRANULE), 1) * _GRANULE
            self._arena = torch.empty(size, dtype=torch.uint8, device=self._device)
            self._pinned = Pinned(size, self._device)
        return self._pinned, self._arena

    def store(self, pairs: Iterable[tuple[torch.Tensor, np.ndarray]]) -> None:
        """Copy device tensors into host arrays (uint8, as many bytes), through the pinned memory: what `load`
        left there is on the device by then. Waits for the stream, without the GIL."""
        pinned, _ = self._grown(0)
        waiting: list[tuple[int, np.ndarray]] = []
        used, size = 0, pinned.array.size

        def collect() -> None:
            self._wait()
            for start, part in waiting:
                part[:] = pinned.array[start : start + part.size]
            waiting.clear()

        for tensor, array in pairs:
            data = tensor.view(torch.uint8)
            for start in range(0, array.size, size):
                part = array[start : start + size]
                if used + part.size > size:
                    collect()
                    used = 0
                end = used + part.size
                pinned.tensor[used:end].copy_(data[start : start + part.size], non_blocking=True)
                waiting.append((used, part))
                used = _aligned(end)
        collect()

    def fetch(self, tensors: Iterable[torch.Tensor]) -> list[np.ndarray]:
        """The bytes of device tensors in memory of their own."""
        pairs = [(x, np.empty(x.numel() * x.itemsize, np.uint8)) for x in tensors]
        self.store(pairs)
        return [array for _, array in pairs]


class Ring:
    """The slots of one device: made when they are needed, `most` of them, fewer once memory has run out."""

    def __init__(self, device: torch.device, most: int = MOST_SLOTS) -> None:
        self._device = device
        self._most, self._made = most, 0
        self._filling = Filling()
        self._free: list[Slot] = []
        self._changed = threading.Condition()

    def run(self, work: Callable[[Slot], Result]) -> Result:
        """work(slot), with a slot's stream as the current one; waits until a slot is free.

        Where memory runs out, the slot is given up for good and the work done in another one, from the start;
        raises DeviceMemoryError where there is no other.
        """
        while True:
            slot, reason = self._take(), None
            try:
                with slot.current():
                    result = work(slot)
            except BaseException as error:
                slot.drop()  # copies may be under way: nobody must fill its memory before they end
                if not is_out_of_memory(error):
                    self._give(slot)
                    raise
                reason = line_of(error)
            if reason is None:
                self._give(slot)
                return result
            # Here, past the handler, nothing refers to the tensors of the failed attempt any more.
            if not self._retire(slot, reason):
                raise DeviceMemoryError(reason)

    def release(self) -> None:
        """Give up the memory of slots that are not in use."""
        with self._changed:
            for slot in self._free:
                slot.drop()

    def _take(self) -> Slot:
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._made < self._most)
            if self._free:
                return self._free.pop()
            slot = Slot(self._device, self._filling)
            self._made += 1
            return slot

    def _give(self, slot: Slot) -> None:
        with self._changed:
            self._free.append(slot)
            self._changed.notify()

    def _retire(self, slot: Slot, reason: str) -> bool:
        """Go on without this slot, where another one is left."""
        with self._changed:
            others = self._made - 1
            self._most = max(others, 1)
            if not others:
                self._free.append(slot)
                self._changed.notify()
                return False
            self._made = others
        logger.warning("%s: goes on with %d tiles in flight (%s)", self._device, others, reason)
        return True
