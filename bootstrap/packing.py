"""The chunk stage's hands: digest, checksum and compression of chunks in threads, results in order.

Codecs and hashes release the interpreter's lock, so two threads use two cores; what comes out does not depend on how
many there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

BATCH_BYTES = 1 << 19
"""Work is handed over in pieces of at least this size: a task costs 40 us, a 2 KiB chunk alone 25 us."""

Item = TypeVar("Item")
Packed = TypeVar("Packed")


class Packer(Generic[Item, Packed]):
    """Runs `work` on lists of items, in threads, and then `commit` on each list and its results, in order, in the
    thread that calls `add` and `flush`.

    `threads` 1: everything happens in that thread. What `work` raises is raised by `add` or `flush`. Memory: at most
    two lists per thread are under way. Use as a context manager: it owns the threads.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], list[Packed]],
        commit: Callable[[list[Item], list[Packed]], None],
        threads: int,
    ) -> None:
        self._work = work
        self._commit = commit
        self._threads = threads
        self._items: list[Item] = []
        self._size = 0
        self._running: deque[tuple[list[Item], Future[list[Packed]]]] = deque()
        self._pool = ThreadPoolExecutor(threads, "chunk") if threads > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def add(self, item: Item, size: int) -> None:
        """Take an item of `size` bytes of work; it is committed at the latest by `flush`."""
        self._items.append(item)
        self._size += size
        if self._size >= BATCH_BYTES:
            self._submit()

    def flush(self) -> None:
        """Commit everything taken so far."""
        self._submit()
        while self._running:
            self._finish()

    def _submit(self) -> None:
        items, self._items, self._size = self._items, [], 0
        if not items:
            return
        if self._pool is None:
            self._commit(items, self._work(items))
            return
        self._running.append((items, self._pool.submit(self._work, items)))
        while len(self._running) > 2 * self._threads or (self._running and self._running[0][1].done()):
            self._finish()

    def _finish(self) -> None:
        items, future = self._running.popleft()
        self._commit(items, future.result())
