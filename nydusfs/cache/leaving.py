"""Devices that lose their data while kernel mounts have them, so that a cache holds to its limit under live mounts.

The kernel reads a device that is not asked about without telling anybody, and one it was allowed to read a moment
later. So data goes in two steps: first every read is announced again, and only a device that nobody wanted during
`GRACE` is emptied (which also tells what is still in use: that stays). Behind the end of a device the kernel reads
EIO, never zeros, and asks again page by page what a read ahead did not get: a reader who needed longer than `GRACE`
between permission and reading is asked about once more, or at worst gets an error.

What the mounts have in their own page cache stays there: it is right, an image's bytes never change.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

GRACE = 0.25  # seconds; a permitted read begins some 50 us after the answer, later on a busy machine


class Leaving:
    """Of one cache store. `ask(path)`: have every read of this file announced, and open it for writing;
    `quiet(fd)`: its reads need not be announced. All methods from any thread."""

    def __init__(self, ask: Callable[[Path], int], quiet: Callable[[int], None]) -> None:
        self._ask = ask
        self._quiet = quiet
        self._lock = threading.Condition(threading.Lock())
        self._leaving: set[str] = set()
        self._writing: set[str] = set()

    def keep(self, device: str) -> bool:
        """Somebody wants it: if it is complete after this call it stays so for `GRACE` at least. False when it is being
        written or emptied right now."""
        with self._lock:
            self._leaving.discard(device)
            return device not in self._writing

    def keep_when_written(self, device: str) -> None:
        """`keep`, waiting for who is writing or emptying it."""
        with self._lock:
            self._lock.wait_for(lambda: device not in self._writing)
            self._leaving.discard(device)

    def quiet(self, device: str, fd: int, size: int) -> bool:
        """Its reads need not be announced any more, if it is complete now. Raises OSError."""
        with self._lock:
            if device in self._writing or os.fstat(fd).st_size < size:
                return False
            self._leaving.discard(device)
            self._quiet(fd)
            return True

    @contextmanager
    def writing(self, device: str) -> Iterator[None]:
        """Nobody else changes it meanwhile: what is written behind a place that was emptied has zeros before it. Waits
        for others."""
        with self._lock:
            self._lock.wait_for(lambda: device not in self._writing)
            self._leaving.discard(device)
            self._writing.add(device)
        try:
            yield
        finally:
            with self._lock:
                self._writing.discard(device)
                self._lock.notify_all()

    def leave(self, device: str, path: Path) -> int:
        """The first step: a descriptor for the last. Raises OSError."""
        with self._lock:
            fd = self._ask(path)
            self._leaving.add(device)
            return fd

    def take(self, device: str) -> bool:
        """The second, `GRACE` later: nobody else changes it until `empty`. False when it is needed after all."""
        with self._lock:
            wanted = device not in self._leaving or device in self._writing
            self._leaving.discard(device)
            if not wanted:
                self._writing.add(device)
            return not wanted

    def spare(self, device: str) -> None:
        """What was taken stays after all."""
        with self._lock:
            self._writing.discard(device)
            self._lock.notify_all()

    def empty(self, device: str, fd: int) -> None:
        """The last: what was taken loses its data. Raises OSError."""
        try:
            # Without the lock: this is announced as well, and who answers takes it.
            os.ftruncate(fd, 0)
        finally:
            self.spare(device)
