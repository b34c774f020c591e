"""What a worker was asked and has not answered, in memory that outlives it.

The kernel delivers an event once. A reader whose event was taken by a worker that died waits until somebody answers
the number the event had; so each number is written down before anything is done about it, in a memory file the keeper
holds. Between read(2) and that lies a gap of microseconds, which `reading` marks: what fell into it is unknown, and
all numbers are denied once (the kernel then asks again).
"""

from __future__ import annotations

import mmap
import os
import threading
from struct import Struct
from typing import NamedTuple

HEADER = Struct("<8sI")  # magic, version; then READING bytes, one per thread
MAGIC = b"nydusjnl"
VERSION = 1
READING_OFFSET = HEADER.size
MAX_THREADS = 16
ENTRY = Struct("<BxHi")  # used, length of the name, number; then the name, and at the end
PLACE = Struct("<QQ")  # offset and size of the read; 0, 0 from a worker that wrote none
ENTRY_SIZE = 192
NAME_SIZE = ENTRY_SIZE - ENTRY.size - PLACE.size
ENTRIES = 4096
_FIRST = 4096
SIZE = _FIRST + ENTRIES * ENTRY_SIZE

SWEEP = 20_000
"""Numbers to deny when one got lost: a new descriptor takes the lowest free number, and a worker has some 13,000 open
files at most (8192 of the cache, 4096 events, connections). 27 ms."""


class Pending(NamedTuple):
    slot: int
    number: int
    name: str
    offset: int
    size: int


class Journal:
    """Over a memory file of `create`. Raises ValueError for one that is not."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, SIZE)
        if HEADER.unpack_from(self._map) != (MAGIC, VERSION):
            raise ValueError("not a journal of this version")
        self._free = [slot for slot, used in enumerate(self._used()) if not used]
        self._room = threading.Semaphore(len(self._free))

    @staticmethod
    def create() -> int:
        fd = os.memfd_create("nydusd-events", os.MFD_CLOEXEC)
        os.truncate(fd, SIZE)
        os.pwrite(fd, HEADER.pack(MAGIC, VERSION), 0)
        return fd

    def _used(self) -> bytes:
        """The first byte of every entry."""
        return self._map[_FIRST:SIZE:ENTRY_SIZE]

    def reading(self, thread: int, now: bool) -> None:
        self._map[READING_OFFSET + thread] = now

    def left(self) -> list[Pending]:
        """What an earlier worker did not answer."""
        found = []
        for slot in (slot for slot, used in enumerate(self._used()) if used):
            at = _FIRST + slot * ENTRY_SIZE
            _, length, number = ENTRY.unpack_from(self._map, at)
            name = self._map[at + ENTRY.size : at + ENTRY.size + min(length, NAME_SIZE)]
            place = PLACE.unpack_from(self._map, at + ENTRY_SIZE - PLACE.size)
            found.append(Pending(slot, number, name.decode("ascii", "replace"), *place))
        return found

    def take_gap(self) -> bool:
        """Whether an earlier worker may have read an event that is not among `left`; asks once."""
        marks = slice(READING_OFFSET, READING_OFFSET + MAX_THREADS)
        gap = any(self._map[marks])
        self._map[marks] = bytes(MAX_THREADS)
        return gap

    def write(self, number: int, name: str, offset: int = 0, size: int = 0) -> int:
        """Write an event down; its slot. Waits when there are more than `ENTRIES`."""
        self._room.acquire()
        slot = self._free.pop()
        at = _FIRST + slot * ENTRY_SIZE
        text = name.encode("ascii", "replace")[:NAME_SIZE]
        self._map[at + 1 : at + ENTRY.size + len(text)] = ENTRY.pack(0, len(text), number)[1:] + text
        PLACE.pack_into(self._map, at + ENTRY_SIZE - PLACE.size, offset, size)
        self._map[at] = 1  # last: what is used is whole
        return slot

    def clear(self, slot: int) -> None:
        self._map[_FIRST + slot * ENTRY_SIZE] = 0
        self._free.append(slot)
        self._room.release()
