"""Worker threads that several merges of the same tiles share: a tile is merged by all of them while it lies
in the cache, and its pages are let go after the last one.

Each merge runs on a thread of its own and asks its member of the gang for what it asks a Pool. Units that
several members ask for wait until every member has come to that place, or is past it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

from ..io.pages import release
from ..tensors.segment import Segment
from ..tensors.tile import TensorInputs
from .pool import Item, Pool, Result

Key = tuple[Segment, ...]
_PAST = (1 << 62, 0)  # behind every unit


class Gang:
    """Threads for so many members; a context manager. members: one for each merge."""

    def __init__(self, threads: int, members: int) -> None:
        self.pool = Pool(threads)
        self.members = [Member(self, k) for k in range(members)]
        self._lock = threading.Lock()
        self._places = [(-1, 0)] * members  # tensor and first element of each one's last unit
        self._waiting: dict[Key, list[tuple[int, Callable[[], Any], Future]]] = {}
        self._stopped = False
        self._local = threading.local()

    def __enter__(self) -> Gang:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.close()

    def stop(self) -> None:
        """Interrupt all members, as Ctrl-C does, when they next ask for something."""
        with self._lock:
            self._stopped = True
            waiting = [future for calls in self._waiting.values() for *_, future in calls]
            self._waiting.clear()
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(KeyboardInterrupt())

    def release(self, tile: TensorInputs) -> None:
        """The tile's pages may go when all members have merged it: all of them read the same ones."""
        if (done := getattr(self._local, "done", None)) is None:
            release(tile)
        else:
            done[tile.name, tile.start] = tile

    def submit(self, k: int, key: Key, call: Callable[[], Any]) -> Future:
        """call: merges a unit for member k."""
        future: Future = Future()
        with self._lock:
            if self._stopped:
                raise KeyboardInterrupt
            self._waiting.setdefault(key, []).append((k, call, future))
            self._places[k] = (key[0].index, key[0].start)
            self._begin_ready()
        return future

    def join(self, k: int) -> None:
        """Member k, which had left, begins: the others wait for it where they are."""
        with self._lock:
            if self._stopped:
                raise KeyboardInterrupt
            self._places[k] = (-1, 0)

    def leave(self, k: int) -> None:
        """Member k asks for no more units."""
        with self._lock:
            self._places[k] = _PAST
            self._begin_ready()

    def withdraw(self, k: int) -> None:
        """Drop what member k asked for and nobody has begun."""
        with self._lock:
            for calls in self._waiting.values():
                for call in [call for call in calls if call[0] == k]:
                    calls.remove(call)
                    call[2].cancel()
                    call[2].set_running_or_notify_cancel()

    def _begin_ready(self) -> None:
        least = min(self._places)
        ready = [key for key in self._waiting if (key[0].index, key[0].start) <= least]
        for key in ready:
            calls = self._waiting.pop(key)
            if calls:
                self.pool.submit(partial(self._merge, calls))

    def _merge(self, calls: list[tuple[int, Callable[[], Any], Future]]) -> None:
        self._local.done = {}
        for _, call, future in calls:
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
        done, self._local.done = self._local.done, None
        for tile in done.values():
            release(tile)


class Member:
    """What one merge uses as its Pool."""

    def __init__(self, gang: Gang, k: int) -> None:
        self._gang, self._k = gang, k
        self._begun = False

    @property
    def threads(self) -> int:
        return self._gang.pool.threads

    def __enter__(self) -> Member:
        return self

    def __exit__(self, *_: object) -> None:
        self._gang.leave(self._k)

    def run(self, fn: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """As Pool.run."""
        return self._gang.pool.run(fn, items)

    def together(self, fn: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """As `run`, of units that other members merge too. Once: what is merged again, is merged alone."""
        if self._begun:
            yield from self.run(fn, items)
            return
        self._begun = True
        pending: deque[Future] = deque()
        try:
            for unit in items:
                key = tuple(segment for segment, _ in unit)
                pending.append(self._gang.submit(self._k, key, partial(fn, unit)))
                if len(pending) > 2 * self.threads:
                    yield pending.popleft().result()
            self._gang.leave(self._k)
            while pending:
                yield pending.popleft().result()
        finally:
            self._gang.leave(self._k)
            self._gang.withdraw(self._k)
            wait(pending)
