"""A merge by one process, or by several on torch.distributed: what they must say to each other.

    tell      rank 0's answer, for all                  take    the next piece of work that nobody has
    total     arrays added up over all ranks            wait    until all have come here
    check     RunError where another rank has ended     done    bytes that are done, of all where rank 0 asks

A rank that ends with an exception tells the others why. All ranks call `tell`, `total`, `take` and `wait` in
the same order. Waiting is done by asking the store again and again, so that an interrupt and the end of
another rank are noticed; arrays go by gloo, which is asked only when all are there. A rank that is not heard
of for LOST seconds has ended.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from ..errors import InputError, OtaError, RunError, StoppedError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store

logger = logging.getLogger(__name__)

BEAT = 2.0  # seconds between two signs of life
LOST = 30.0  # seconds without one
_START = 300.0  # seconds until the first
_LEAVE = 10.0  # seconds that rank 0, which may serve the store, waits for others to leave
_ANSWER = 60.0  # seconds in which the store must answer
TOGETHER = LOST  # seconds in which gloo must
_POLL = 0.002, 0.2  # seconds between two questions, at first and at most
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # as torchrun sets it
_HINT = "the same command with --resume goes on, with any number of processes"

Item = TypeVar("Item")
Value = TypeVar("Value")


class Ranks(Protocol):
    """The processes of a merge. rank: this one's number; size: how many; several: whether more than one."""

    rank: int
    size: int

    @property
    def several(self) -> bool: ...

    def tell(self, answer: Callable[[], Value]) -> Value: ...

    def total(self, array: np.ndarray) -> np.ndarray: ...

    def take(self, pieces: Sequence[Item], sizes: Sequence[int]) -> Iterator[Item]: ...

    def wait(self) -> None: ...

    def check(self) -> None: ...

    def done(self, nbytes: int) -> int: ...

    def __enter__(self) -> Ranks: ...

    def __exit__(self, *error: object) -> None: ...


class Alone:
    """The only process."""

    rank, size, several = 0, 1, False

    def tell(self, answer: Callable[[], Value]) -> Value:
        return answer()

    def total(self, array: np.ndarray) -> np.ndarray:
        return array

    def take(self, pieces: Sequence[Item], sizes: Sequence[int]) -> Iterator[Item]:
        return iter(pieces)

    def wait(self) -> None:
        pass

    check = wait

    def done(self, nbytes: int) -> int:
        return nbytes

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *error: object) -> None:
        pass


ALONE = Alone()


class Several:
    """One of several processes; a context manager that tells the others of an exception within it.

    store: of torch.distributed, the same for all ranks and used by nothing else.
    """

    several = True

    def __init__(self, store: Store, rank: int, size: int, *, beat: float = BEAT, lost: float = LOST) -> None:
        self.rank, self.size = rank, size
        self._store, self._beat, self._lost = store, beat, lost
        self._calls = itertools.count()
        self._gloo: Any = None
        self._failure: OtaError | None = None
        self._done = self._shown = 0
        self._of_others: dict[int, int] = {}
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._watch, name="ota-heart", daemon=True)

    # What ranks say to each other

    def tell(self, answer: Callable[[], Value]) -> Value:
        """What `answer` gives on rank 0 (JSON), on all ranks."""
        key = f"told/{next(self._calls)}"
        if self.rank == 0:
            value = answer()
            self._store.set(key, json.dumps(value))
            return value
        self._poll(lambda: self._store.check([key]))
        return json.loads(self._store.get(key))

    def total(self, array: np.ndarray) -> np.ndarray:
        """The sum of the ranks' arrays (integers, or floats of which all but one are 0), of one shape."""
        import torch

        self.wait()
        signed = array.view(np.int64) if array.dtype == np.uint64 else array
        summed = torch.from_numpy(np.array(signed, copy=True, ndmin=1))
        # gloo may wait for a rank that ends just now: meanwhile this thread asks who is there.
        failed: list[RuntimeError] = []
        adding = threading.Thread(target=self._add, args=(summed, failed), daemon=True)
        adding.start()
        while adding.is_alive():
            adding.join(_POLL[1])
            self.check()
        if failed:
            time.sleep(2 * self._beat)  # the one that has ended may have said why
            self.check()
            raise RunError(f"a process of this merge cannot be reached any more; {_HINT}") from failed[0]
        return summed.numpy().view(array.dtype).reshape(array.shape)

    def _add(self, array: Tensor, failed: list[RuntimeError]) -> None:
        """Add the ranks' arrays in place; an error goes to `failed`."""
        from torch.distributed import PrefixStore, ProcessGroupGloo

        try:
            if self._gloo is None:
                # While gloo waits it holds its connection, on which no sign of life goes then: it has one
                # of its own, where torch makes them (2.8).
                own = self._store.clone() if hasattr(self._store, "clone") else self._store
                store = PrefixStore("gloo", own)
                self._gloo = ProcessGroupGloo(store, self.rank, self.size, timedelta(seconds=TOGETHER))
            self._gloo.allreduce([array]).wait()
        except RuntimeError as error:
            failed.append(error)

    def take(self, pieces: Sequence[Item], sizes: Sequence[int]) -> Iterator[Item]:
        """Pieces that no other rank takes, all ranks together all of them: first, one after the other, those
        of this rank's own part (ranks have neighbouring pieces of the same size together), then what others
        have not begun. sizes: of the pieces."""
        return self._taken(f"taken/{next(self._calls)}", pieces, _parts(sizes, self.size))

    def _taken(self, name: str, pieces: Sequence[Item], parts: list[int]) -> Iterator[Item]:
        for i in range(self.size):
            part = (self.rank + i) % self.size
            begin, end = parts[part], parts[part + 1]
            while (piece := begin + self._asked(self._store.add, f"{name}/{part}", 1) - 1) < end:
                self.check()
                yield pieces[piece]

    def wait(self) -> None:
        """Until all ranks have come here."""
        key = f"there/{next(self._calls)}"
        self._asked(self._store.add, key, 1)
        self._poll(lambda: self._store.add(key, 0) >= self.size)

    def done(self, nbytes: int) -> int:
        """Count bytes of work that this rank has done. On rank 0, by how much the sum of all has grown since
        it last asked, as far as it has heard; on others the same bytes."""
        self._done += nbytes
        if self.rank:
            return nbytes
        total = self._done + sum(list(self._of_others.values()))
        grown, self._shown = total - self._shown, total
        return grown

    def check(self) -> None:
        """Raise where another rank has ended: RunError on the rank that says so, StoppedError on others."""
        if self._failure is not None:
            raise self._failure

    def _poll(self, holds: Callable[[], bool]) -> None:
        pause = _POLL[0]
        while not self._asked(holds):
            self.check()
            time.sleep(pause)
            pause = min(1.5 * pause, _POLL[1])

    def _asked(self, question: Callable[..., Value], *arguments: Any) -> Value:
        try:
            return question(*arguments)
        except RuntimeError as error:  # of torch.distributed: the store's process is gone
            self.check()
            raise RunError(f"rank {self.rank} cannot reach the store of torchrun; {_HINT}") from error

    # Who is there

    def __enter__(self) -> Several:
        self._say_alive(0)
        self._heart.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._ended.set()
        self._heart.join()
        said = True
        if error is not None and error is not self._failure and not isinstance(error, StoppedError):
            text = str(error) if isinstance(error, OtaError) else kind.__name__
            said = self._fail(f"rank {self.rank}: {text}", isinstance(error, InputError))
        self._leave()
        if not said:
            raise StoppedError("another rank has said why") from error

    def _leave(self) -> None:
        """Rank 0 goes last."""
        until = time.monotonic() + _LEAVE
        try:
            self._store.add("left", 1)
            while self.rank == 0 and self._store.add("left", 0) < self.size and time.monotonic() < until:
                time.sleep(_POLL[0])
        except RuntimeError:  # the store is gone, and with it the others
            pass

    def _fail(self, text: str, of_input: bool = False) -> bool:
        """Have all ranks end; whether this is the first to say so, which shows the reason."""
        own = json.dumps([self.rank, text, of_input])
        try:
            first = self._store.compare_set("failed", "", own)
        except RuntimeError:  # the store is gone: each says it
            return True
        return first.decode() == own

    def _say_alive(self, beat: int) -> None:
        self._store.set(f"alive/{self.rank}", json.dumps([beat, socket.gethostname(), self._done]))

    def _watch(self) -> None:
        """Beats; looks whether some rank has failed; rank 0 also whether all beat, the others whether rank 0
        does."""
        watched = [r for r in range(self.size) if r != self.rank and (self.rank == 0 or r == 0)]
        heard = {r: (None, time.monotonic()) for r in watched}
        for beat in itertools.count(1):
            try:
                self._say_alive(beat)
                if self._store.check(["failed"]):
                    _, text, of_input = json.loads(self._store.get("failed"))
                    self._failure = StoppedError(text, of_input)
                    return
                now = time.monotonic()
                for r in watched:
                    sign = self._store.get(f"alive/{r}") if self._store.check([f"alive/{r}"]) else b""
                    if sign != heard[r][0]:
                        heard[r] = sign, now
                        self._of_others[r] = json.loads(sign)[2] if sign else 0
                    elif now - heard[r][1] > (self._lost if sign else _START):
                        host = f" on {json.loads(sign)[1]}" if sign else ""
                        text = f"rank {r} of {self.size}{host} has ended; {_HINT}"
                        self._failure = RunError(text) if self._fail(text) else StoppedError(text)
                        return
            except RuntimeError:
                self._failure = RunError(f"rank {self.rank} cannot reach the store of torchrun; {_HINT}")
                return
            if self._ended.wait(self._beat):
                return


def _parts(sizes: Sequence[int], count: int) -> list[int]:
    """Where `count` parts of neighbouring pieces begin, and the end: about the same size each."""
    ends = np.cumsum(np.asarray(sizes, np.int64)) if len(sizes) else np.zeros(0, np.int64)
    total = int(ends[-1]) if len(ends) else 0
    middles = ends - np.asarray(sizes, np.int64) // 2
    return [int(np.searchsorted(middles, total * i / count)) for i in range(count)] + [len(sizes)]


def of_torchrun() -> bool:
    """Whether this process is one of several."""
    return all(os.environ.get(name) for name in _ENVIRONMENT) and os.environ["WORLD_SIZE"] != "1"


def is_first() -> bool:
    """Whether this process speaks for the merge: all others of torchrun's are silent."""
    return not of_torchrun() or os.environ["RANK"] == "0"


_merges = itertools.count()  # of this process: each has its own keys in the store


def of_environment() -> Ranks:
    """The ranks that torchrun has started, else this process alone."""
    if not of_torchrun():
        return ALONE
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else its traces surround the line that says why
    from torch.distributed import PrefixStore

    store, rank, size = _rendezvous()
    logger.info("rank %d of %d on %s", rank, size, socket.gethostname())
    return Several(PrefixStore(f"ota_kernels/{next(_merges)}", store), rank, size)


@functools.cache
def _rendezvous() -> tuple[Store, int, int]:
    """(store, rank, size): kept, since rank 0 may serve the store."""
    from torch.distributed.rendezvous import rendezvous

    try:
        return next(rendezvous("env://", timeout=timedelta(seconds=_ANSWER)))
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RunError(f"the other processes of this merge cannot be met at {where}: {error}") from error
