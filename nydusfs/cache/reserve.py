"""Room on the disk that a cache keeps for readers of kernel mounts, for the day others have filled it.

FUSE can give a reader bytes that nothing keeps; the kernel reads the disk alone. A cache that has something to let go
makes room by itself, but a young one has nothing, nor has one whose segments mounts have by their plain path. So while
there are kernel mounts there is a file of blocks that were never written. Of a full disk it is given up piece by piece;
what is written there can go for what is read next, so a little is enough for any number of reads.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

from nydusfs.cache.health import FULL, LEAST_ROOM, reason
from nydusfs.cache.names import unlink

log = logging.getLogger("nydusfs.cache")

RESERVE = ".erofs/reserve"  # in a store
SHARE, MOST = 64, 64 << 20  # of the disk, and bytes
FREE = 3  # times as much must stay free when it is made


class Reserve:
    """One of an earlier process is gone on with. All methods from any thread."""

    def __init__(self, store: Path) -> None:
        self._path = store / RESERVE
        self._lock = threading.Lock()
        self._wanted = 0  # bytes; 0: nobody needs it
        self._size = _size(self._path)

    def keep(self) -> bool:
        """Make it, or what was given up of it; False when the disk has too little for that."""
        with self._lock:
            try:
                info = os.statvfs(self._path.parent)
                self._wanted = min(MOST, max(LEAST_ROOM, info.f_blocks * info.f_frsize // SHARE))
                if self._size >= self._wanted:
                    return True
                if info.f_bavail * info.f_frsize < self._wanted - self._size + FREE * self._wanted:
                    return False
                fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    os.posix_fallocate(fd, 0, self._wanted)
                finally:
                    os.close(fd)
            except OSError as error:
                log.debug("%s cannot be made: %s", self._path, reason(error))
                self._size = _size(self._path)
                return False
            self._size = self._wanted
            return True

    def refill(self) -> None:
        """`keep`, if something is missing."""
        if self._size < self._wanted:
            self.keep()

    def give(self, size: int) -> int:
        """Give up so much of it; bytes that were. Raises OSError."""
        with self._lock:
            left = max(0, self._size - size)
            if left < self._size:
                os.truncate(self._path, left)
            given, self._size = self._size - left, left
            return given

    def let_go(self) -> None:
        """The last kernel mount is gone."""
        with self._lock:
            self._wanted = self._size = 0
            unlink(self._path)


def has_room(folder: Path, size: int) -> bool:
    """Whether the disk would take so many bytes now. What it says to be free tells no root's share of it, and ext4
    keeps some for its own tables that nobody gets. Raises OSError."""
    fd = -1
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in FULL:
            raise
        return False
    finally:
        if fd >= 0:
            os.close(fd)
    return True


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
