"""From written to durable: segments are synced in batches and then get their plain names.

The descriptor a segment was written with is kept until its fdatasync: only so does the kernel tell of a write-out that
failed meanwhile. Once nobody has the file open it may forget file and failure together, and an fdatasync through a new
descriptor would succeed over zeros.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import resource
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nydusfs.cache.blob import BlobCache

log = logging.getLogger("nydusfs.cache")

CLOSE_SECONDS = 2.0  # for the last batch when the daemon ends; under disk load one fdatasync takes seconds
BATCH = 64
RWF_NOWAIT = getattr(os, "RWF_NOWAIT", 0)


@dataclass(frozen=True, slots=True)
class _Written:
    """`fd`: the one it was written with; -1 for what an earlier process left, or what is `synced` already."""

    blob: BlobCache
    name: str
    key: bytes
    fd: int
    synced: bool


class Syncer:
    """Of one store. All methods from any thread."""

    def __init__(self, boot: str) -> None:
        self._boot = boot
        self._lock = threading.Lock()
        self._waiting: list[_Written] = []
        self._until = float("inf")
        self._most = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 16)
        self.held = 0  # descriptors of what was written and not yet `add`ed; a guess

    def full(self) -> bool:
        """Whether so much waits for the disk that who writes should sync by himself."""
        return self.held + len(self._waiting) >= self._most

    def add(self, blob: BlobCache, name: str, key: bytes, fd: int = -1, *, synced: bool = False) -> None:
        with self._lock:
            self._waiting.append(_Written(blob, name, key, fd, synced))

    def stop(self) -> None:
        """The process is about to end and has `CLOSE_SECONDS` left for its last batches."""
        self._until = min(self._until, time.monotonic() + CLOSE_SECONDS)

    def sync(self) -> None:
        """fdatasync everything written, then give it its final name. Waits for the disk.

        After `stop` a batch under way ends at the next file; the rest keeps the name that is good until the next boot.
        """
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for begin in range(0, len(waiting), BATCH):
            batch = []
            for item in waiting[begin : begin + BATCH]:
                fd = item.fd if item.fd >= 0 or self._late() else self._adopt(item)
                if fd >= 0:
                    batch.append((item, fd))
                    if not item.synced and not self._late():
                        # Start the write-out of this one while the next is looked at: the first fdatasync below then
                        # commits the journal for all of them.
                        _start_writeout(fd)
            for item, fd in batch:
                try:
                    if not self._late():
                        self._commit(item, fd)
                finally:
                    os.close(fd)

    def _late(self) -> bool:
        return time.monotonic() >= self._until

    def _adopt(self, item: _Written) -> int:
        """Open it by name. What an earlier process of this boot left and is not in the page cache any more keeps its
        name until it was read and verified: its write-out may have failed unnoticed. -1: not now."""
        try:
            fd = os.open(item.blob.path / f"{item.name}.{self._boot}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return -1  # evicted, or the directory was removed: nothing to make durable
        if item.synced or resident(fd):
            return fd
        os.close(fd)
        return -1

    def _commit(self, item: _Written, fd: int) -> None:
        blob, name = item.blob, item.name
        try:
            if not item.synced:
                os.fdatasync(fd)
            blob.synced(name, fd)
            temporary = blob.path / f"{name}.{self._boot}"
            with blob.naming:  # it may have been evicted and written again, in another file
                if os.path.samestat(os.stat(temporary), os.fstat(fd)):
                    os.rename(temporary, blob.path / name)
                    blob.durable(item.key)
        except FileNotFoundError:
            pass  # evicted meanwhile
        except OSError as error:
            blob.lost(name, item.key, error)


_libc = ctypes.CDLL(None, use_errno=True)
_SYNC_FILE_RANGE_WRITE = 2
_SYS_cachestat = 451  # Linux 6.5; the same on all architectures but alpha
_CachestatRange, _Cachestat = ctypes.c_uint64 * 2, ctypes.c_uint64 * 5


def resident(fd: int, size: int = -1) -> bool:
    """Whether all of a file (of this size, if that is known) is in the page cache, as far as the kernel tells: some
    microseconds."""
    if size < 0:
        size = os.fstat(fd).st_size
    span, found = _CachestatRange(0, 0), _Cachestat()
    if _libc.syscall(_SYS_cachestat, ctypes.c_uint(fd), span, found, ctypes.c_uint(0)) == 0:
        return bool(found[0] * mmap.PAGESIZE >= size)
    try:
        return not RWF_NOWAIT or os.preadv(fd, [bytearray(size)], 0, RWF_NOWAIT) == size
    except BlockingIOError:
        return False
    except OSError:
        return True  # it does not tell


def _start_writeout(fd: int) -> None:
    """sync_file_range(2) on the whole file, without waiting. A failure only costs time: fdatasync follows."""
    try:
        _libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)
    except AttributeError:
        pass  # a libc without it
