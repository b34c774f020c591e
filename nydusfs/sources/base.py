"""What a source is: the one interface between fetching and wherever bytes come from."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable
from enum import IntEnum
from typing import Protocol, TypeAlias

import trio

from nydusfs.counters import BackendCounters
from nydusfs.hands import Hands

Buffer: TypeAlias = bytes | bytearray
Check: TypeAlias = Callable[[Buffer], Awaitable[None]]


class Priority(IntEnum):
    DEMAND = 0
    PREFETCH = 1
    LEARNED = 2  # ahead of readers that will ask for it, as their last starts did


class WrongBytes(Exception):
    """Raised by a `check`: the bytes are not those that the image's digests promise."""


class Source(Protocol):
    name: str  # for logs: "registry 127.0.0.1:5000/a/b"
    counters: BackendCounters

    @property
    def by_range(self) -> bool:
        """Other nodes find what this one fetched only under the very same range: ask as `flights.together` says."""

    def cheap(self, size: int) -> bool:
        """Whether so many bytes more cost little beside the wait for an answer, as far as is known."""

    def instant(self) -> bool:
        """Whether its answers begin so soon that a reader waits no longer for them than for who guesses what he will
        ask for, as far as is known."""

    async def greet(self) -> None:
        """A first read will come soon: have ready what it needs besides its bytes. What fails is left to that read."""

    async def read(
        self,
        blob_id: str,
        offset: int,
        size: int,
        priority: Priority,
        check: Check | None = None,
        urgent: trio.Event | None = None,
    ) -> Buffer:
        """Exactly `size` bytes from byte `offset` of the stored blob. `urgent`: set when a reader waits for a prefetch.

        `check` raises `WrongBytes` when they are not right: the next source is then tried. It may be called more than
        once, never twice at a time. Raises `SourceError` that lists every source tried, within a bounded time.
        """

    async def aclose(self) -> None: ...


class ThreadSource(ABC):
    """What a source is besides whose blobs a reader's thread may read by itself. All methods from any thread."""

    counters: BackendCounters

    @abstractmethod
    def at_hand(self, blob_id: str) -> bool:
        """Whether `read_here` may do something."""

    @abstractmethod
    def read_here(
        self, blob_id: str, offset: int, size: int, hands: Hands, meanwhile: Callable[[], None]
    ) -> Buffer | None:
        """As `Source.read`, in this thread. None, OSError or `HttpError`: it is to be read as always, which says what
        is wrong. `meanwhile` is called while it is waited for, which `hands` may end."""

    def doubt(self, blob_id: str, size: int) -> None:  # noqa: B027 - of no consequence for most
        """So many bytes that were read so were wrong. On the event loop."""

    def learn(self) -> Iterable[tuple[int, float]]:
        """Take in how such reads went since this was called last, on the event loop; bytes and seconds of each that
        says how fast a link is."""
        return ()


class FileSource(ThreadSource):
    """One whose blobs are files of this machine."""

    by_range = False

    def cheap(self, size: int) -> bool:
        return False  # nothing is waited for

    def instant(self) -> bool:
        return False

    async def greet(self) -> None:
        pass

    @abstractmethod
    def open_blob(self, blob_id: str, end: int) -> tuple[int, int] | None:
        """A descriptor of the file that the blob lies in, and where it begins there; None: there is no such file, or it
        is known to end before `end` of the blob. From any thread. Whatever is wrong is left to `read`, which says what.
        """

    def at_hand(self, blob_id: str) -> bool:
        return True

    def read_here(
        self, blob_id: str, offset: int, size: int, hands: Hands, meanwhile: Callable[[], None]
    ) -> bytes | None:
        found = self.open_blob(blob_id, offset + size)
        if found is None:
            return None
        fd, begin = found
        try:
            # As one request: read(2) alone takes pieces of what the disk's read-ahead is, 128 KiB.
            os.posix_fadvise(fd, begin + offset, size, os.POSIX_FADV_WILLNEED)
            meanwhile()
            data = os.pread(fd, size, begin + offset)
            return data if len(data) == size else None
        finally:
            os.close(fd)
