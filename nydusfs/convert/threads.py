"""A thread pool whose threads never keep the program alive.

The standard pool's threads are joined at interpreter exit. Ours push to servers and read from mounts that may have gone
silent: after Ctrl-C or an error nobody wants to wait for their time-outs.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class DaemonPool:
    """Leaving the block abandons what is not done: wait for the futures that matter inside it."""

    def __init__(self, threads: int, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True) for number in range(threads)
        ]
        self._closed = threading.Event()
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        self._jobs.put((future, lambda: function(*arguments, **named)))
        return future

    def close(self) -> None:
        self._closed.set()
        for _ in self._threads:
            self._jobs.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, function = job
            if self._closed.is_set():
                future.cancel()
                continue
            future.set_running_or_notify_cancel()
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
