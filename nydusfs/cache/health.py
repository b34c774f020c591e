"""Whether the disk of a cache takes data now: what is known of it, how long to leave it alone, what is said about it.

A full disk is not written to again before it has some room: on a nearly full one small segments would go in and out,
each time with a warning. Any other failure is tried again after a pause that doubles. One warning when it begins, one
line when it is over; what goes wrong again within `QUIET` of a warning is no news.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from pathlib import Path

log = logging.getLogger("nydusfs.cache")

PAUSE, LONGEST_PAUSE = 1.0, 8.0  # seconds between attempts
QUIET = 600.0  # seconds between two warnings
LEAST_ROOM, MOST_ROOM = 4 << 20, 64 << 20  # bytes that must be free again: 2 % of the disk, within these
SLOW_DISK = 0.001  # seconds a read may keep the loop, on average
SLOW_PAUSE = 5.0  # seconds without such reads after the disk was found slow
FULL = (errno.ENOSPC, errno.EDQUOT)


class Speed:
    """Whether to wait for the disk on the loop: with a fast one that is shorter than the way to a thread and back.

    On a busy machine with two cores, random 4 KiB reads of a cached file went from 650 to 4,000 a second.
    """

    def __init__(self) -> None:
        self._mean = 0.0  # seconds, over about the last 8 reads
        self._thread_until = 0.0

    def fast(self) -> bool:
        return time.monotonic() >= self._thread_until

    def took(self, seconds: float) -> None:
        self._mean += (seconds - self._mean) / 8
        if self._mean > SLOW_DISK:
            self._mean = 0.0
            self._thread_until = time.monotonic() + SLOW_PAUSE


class Health:
    """All methods from any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._code = 0  # of the failure that lasts
        self._until = 0.0
        self._pause = PAUSE
        self._warned = {"write": -QUIET, "read": -QUIET}
        self._said = False  # that it failed: then also that it is over

    def usable(self) -> bool:
        """Whether to try a write."""
        if not self._code:
            return True
        with self._lock:
            now = time.monotonic()
            if now < self._until:
                return False
            if self._code in FULL and not _has_room(self._path):
                self._until = now + PAUSE
                return False
            return True

    def well(self) -> bool:
        """Whether the last write worked."""
        return not self._code

    def full(self) -> bool:
        """Whether the last write failed for want of room."""
        return self._code in FULL

    def failed(self, error: OSError) -> None:
        """A write did not work."""
        with self._lock:
            self._pause = min(LONGEST_PAUSE, self._pause * 2) if self._code and error.errno not in FULL else PAUSE
            self._until = time.monotonic() + self._pause
            if not self._code:
                self._said = self._warn(
                    "write",
                    "is full" if error.errno in FULL else f"cannot be written ({reason(error)})",
                    "data is served without being kept until there is room again"
                    if error.errno in FULL
                    else "data is served without being kept until it can",
                )
            self._code = error.errno or errno.EIO

    def worked(self) -> None:
        """A write did."""
        if not self._code:
            return
        with self._lock:
            if self._code and self._said:
                log.info("cache %s can be written again", self._path)
            self._code, self._said, self._pause = 0, False, PAUSE

    def unreadable(self, error: OSError) -> None:
        """A file could not be read; its data is fetched again."""
        with self._lock:
            self._warn("read", f"cannot be read ({reason(error)})", "what is missing is fetched again")

    def _warn(self, kind: str, what: str, effect: str) -> bool:
        now = time.monotonic()
        news = now >= self._warned[kind] + QUIET
        if news:
            self._warned[kind] = now
        log.log(logging.WARNING if news else logging.DEBUG, "cache %s %s: %s", self._path, what, effect)
        return news


def _has_room(path: Path) -> bool:
    try:
        info = os.statvfs(path)
    except OSError:
        return True  # writing will say what is the matter
    return info.f_bavail * info.f_frsize >= min(MOST_ROOM, max(LEAST_ROOM, info.f_blocks * info.f_frsize // 50))


def reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
