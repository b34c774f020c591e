"""How much disk the segments of a cache may take, and which of them go when it is reached.

A segment is charged before it is written, so the limit holds at every moment, however many images run. What was made
of bootstraps and lies beside the segments (`.maps`) counts too, but is never evicted: a mount needs it. What goes first
is what was used longest ago, with ten minutes' grace for each doubling of its uses: a base layer's interpreter outlives
the pages of a file that was read once. What is being read this moment stays; a segment that is gone is fetched again.

Kernel mounts read what they have without telling anybody. Segments of theirs are given notice before they go, many at
once, and those that turn out to be in use stay (`leaving`).
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("nydusfs.cache")

BLOCK = 4096
BATCH = 0.01  # of the limit, freed at once: choosing victims sorts all segments
GRACE = 600.0  # seconds of recency that each doubling of uses is worth
NOTICE_SHARE = 4  # of the limit, given notice at once at most, as it takes a quarter of a second
NOTICE_MOST = 64 << 20
ROUNDS = 4  # of notices, when all that got one turn out to be in use
FLOOR_EVERY = 8 << 20  # bytes written between two looks at the free space, and no more than 1/256 of the floor


@dataclass(frozen=True, slots=True)
class Limit:
    """`size`: bytes all segments may take; `floor`: bytes of the file system to leave free. 0: not bounded."""

    size: int = 0
    floor: int = 0


@dataclass(slots=True)
class _Entry:
    name: str
    size: int
    used: float
    uses: int = 1
    writing: bool = False  # its file appears at any moment: deleted now, it would stay, and nobody would count it
    noticed: bool = False

    def worth(self) -> float:
        return self.used + GRACE * math.log2(self.uses)


Slot = tuple[str, bytes]  # blob id, segment key


class Quota:
    """`evict` deletes a segment's file, or is True: it needs notice. `notice` waits, deletes those that are not in
    use and says which. Both are called from the thread that writes. `held`: whether a segment must stay now.
    `beside`: bytes of the disk that other files of the cache take. All methods from any thread."""

    def __init__(
        self,
        path: Path,
        limit: Limit,
        evict: Callable[[Slot, str], bool | None],
        notice: Callable[[dict[Slot, str]], set[Slot]] | None = None,
        held: Callable[[Slot, str], bool] = lambda slot, name: False,
    ) -> None:
        self.limit = limit
        self.beside = 0
        self._held = held
        self._path = path
        self._evict = evict
        self._notice = notice
        self._lock = threading.Lock()
        self._entries: dict[Slot, _Entry] = {}
        self._total = 0
        self._pending = 0  # of it, what is being written: statvfs does not know of it yet
        self._unlooked = FLOOR_EVERY
        self._too_small = False
        self.evictions = 0

    @property
    def total(self) -> int:
        """Bytes charged: whole blocks of 4 KiB."""
        return self._total

    def found(self, slot: Slot, name: str, size: int, used: float) -> None:
        """A segment of an earlier process. `used`: seconds since the epoch."""
        with self._lock:
            if slot not in self._entries:
                self._charge(slot, name, size, used)

    def _charge(self, slot: Slot, name: str, size: int, used: float) -> None:
        charged = -(-size // BLOCK) * BLOCK
        old = self._entries.get(slot)
        if old is not None:
            self._uncharge(old)
        self._entries[slot] = _Entry(name, charged, used, 1 if old is None else old.uses)
        self._total += charged

    def used(self, slot: Slot) -> None:
        """A reader got something of it. Without the lock: a lost count does no harm."""
        entry = self._entries.get(slot)
        if entry is not None:
            entry.used = time.time()
            entry.uses += 1

    def gone(self, slot: Slot) -> None:
        """Its file was deleted, or cannot be had. One that is being written this moment will be there all the same: who
        says so looked for an earlier one."""
        with self._lock:
            entry = self._entries.get(slot)
            if entry is not None and not entry.writing:
                self._uncharge(entry)
                del self._entries[slot]

    def failed(self, slot: Slot) -> None:
        """After `reserve`: the file could not be written."""
        with self._lock:
            entry = self._entries.pop(slot, None)
            if entry is not None:
                self._uncharge(entry)

    def _uncharge(self, entry: _Entry) -> None:
        self._total -= entry.size
        if entry.writing:
            self._pending -= entry.size

    def reserve(self, slot: Slot, name: str, size: int, *, must: bool = False) -> bool:
        """Room for a segment about to be written, made if need be; it is charged then. False: it cannot be kept.

        `must`: it is written in any case, since a kernel mount waits for it, and what is too much goes the next time.
        """
        with self._lock:
            if not self._make_room(size) and not must:
                return False
            self._begin(slot, name, size)
            self._unlooked += size
            return True

    def _begin(self, slot: Slot, name: str, size: int) -> None:
        self._charge(slot, name, size, time.time())
        entry = self._entries[slot]
        entry.writing = True
        self._pending += entry.size

    def admit(self, slot: Slot, name: str, size: int) -> bool:
        """As `reserve`, but nothing has to go for it: False when there is no room now."""
        with self._lock:
            need = -(-size // BLOCK) * BLOCK
            if self.limit.size and self._total + need > self._most():
                return False
            if self.limit.floor and self._free() < self.limit.floor:
                return False
            self._begin(slot, name, size)
            return True

    def roomy(self, size: int) -> bool:
        """Whether `reserve` would let nothing go, as of now."""
        with self._lock:
            need = -(-size // BLOCK) * BLOCK
            if self.limit.size and self._total + need > self._most():
                return False
            return not self.limit.floor or self._free() - need >= self.limit.floor

    def written(self, slot: Slot) -> None:
        """After `reserve`: the file is there, or will not be. From now on it may be evicted."""
        with self._lock:
            entry = self._entries.get(slot)
            if entry is not None and entry.writing:
                entry.writing = False
                self._pending -= entry.size

    def free(self, size: int) -> int:
        """Have so many bytes go, whatever the limit; how many went. The disk may be full of other things."""
        freed = 0
        with self._lock:
            for _ in range(ROUNDS):
                more, noticed = self._free_up(size - freed)
                freed += more
                if freed >= size or not noticed:
                    break
        return freed

    def trim(self) -> None:
        """Down to the limit: after it was lowered, or at the start."""
        with self._lock:
            self._unlooked = FLOOR_EVERY
            self._make_room(0)

    def _make_room(self, size: int) -> bool:
        need = -(-size // BLOCK) * BLOCK
        limit, floor = self._most(), self.limit.floor
        if limit and need > limit:
            if not self._too_small:
                self._too_small = True
                log.warning("cache %s: a limit of %d is less than one segment, nothing is kept", self._path, limit)
            return False
        for _ in range(ROUNDS):
            short = 0
            scarce = False
            if limit and self._total + need > limit:
                short = self._total + need - limit + int(limit * BATCH)
            if floor and self._unlooked + need >= min(FLOOR_EVERY, floor // 256):
                free = self._free()
                scarce = free - need < floor
                if scarce:
                    short = max(short, floor + need - free + min(4 << 20, floor // 32))
                else:
                    self._unlooked = 0
            if short <= 0:
                return True
            freed, noticed = self._free_up(short)
            if not noticed or freed >= short:
                break
        if limit and self._total + need > limit:
            return False
        # what went may be open still, and others fill the disk too
        return not (scarce and self._free() - need < floor)

    def _most(self) -> int:
        """Bytes of segments; 0: no limit. Files beside them may take half of it at most."""
        size = self.limit.size
        return max(size - self.beside, size // 2)

    def _free(self) -> int:
        """Bytes of the disk that will be free when all that is being written is."""
        try:
            info = os.statvfs(self._path)
        except OSError:
            return 1 << 62
        return info.f_bavail * info.f_frsize - self._pending

    def _free_up(self, short: int) -> tuple[int, bool]:
        """Bytes freed, and whether some were given notice. The lock is open while that runs."""
        freed = 0
        given: dict[Slot, _Entry] = {}
        size, most = 0, min(self.limit.size // NOTICE_SHARE or NOTICE_MOST, NOTICE_MOST)
        for slot, entry in sorted(self._entries.items(), key=lambda item: item[1].worth()):
            if freed + size >= (max(short, most) if given else short):
                break
            if entry.writing or entry.noticed or self._held(slot, entry.name):
                continue
            if self._evict(slot, entry.name):
                entry.noticed = True
                given[slot] = entry
                size += entry.size
                continue
            self._drop(slot)
            freed += entry.size
        if given and self._notice is not None:
            names = {slot: entry.name for slot, entry in given.items()}
            self._lock.release()
            try:
                gone = self._notice(names)
            finally:
                self._lock.acquire()
            for slot, entry in given.items():
                entry.noticed = False
                if self._entries.get(slot) is not entry:
                    continue  # gone, and perhaps written again
                if slot in gone:
                    self._drop(slot)
                    freed += entry.size
                else:
                    entry.used, entry.uses = time.time(), entry.uses + 1
        return freed, bool(given)

    def _drop(self, slot: Slot) -> None:
        self._total -= self._entries.pop(slot).size
        self.evictions += 1
