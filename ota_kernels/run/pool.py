"""Worker threads: ordered results, bounded tasks in flight, and nothing left running after an error."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class InPlace:
    """A Pool without threads: one task after the other on the caller's."""

    threads = 1
    run = staticmethod(map)
    together = staticmethod(map)


IN_PLACE = InPlace()


class Pool:
    """Threads that share the kernels' work. Kernels release the GIL, so threads are enough."""

    def __init__(self, threads: int, before_each: Callable[[], None] = lambda: None) -> None:
        """before_each: called before each task is handed out, by the thread that has called `run`."""
        self.threads, self._before_each = threads, before_each
        self._workers = threading.local()
        self._executor = ThreadPoolExecutor(
            threads, thread_name_prefix="ota", initializer=lambda: setattr(self._workers, "busy", True)
        )

    def run(self, fn: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """fn of every item, in order, with at most two tasks a thread begun or waiting.

        `items` is consumed lazily by the caller's thread, which may itself use the pool. Within a task,
        items run in its own thread: a task that waited for others could hold up all of them. The first
        exception, an interrupt too, cancels what has not begun and waits for what has.
        """
        if self.is_worker:
            yield from map(fn, items)
            return
        pending: deque = deque()
        try:
            for item in items:
                self._before_each()
                pending.append(self._executor.submit(fn, item))
                if len(pending) > 2 * self.threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
            wait(pending)

    # Of units that other merges may share (run/gang.py).
    together = run

    def submit(self, task: Callable[[], object]) -> None:
        """Have a worker do a task, which raises nothing."""
        self._executor.submit(task)

    @property
    def is_worker(self) -> bool:
        """Whether the caller is one of the threads."""
        return getattr(self._workers, "busy", False)

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
