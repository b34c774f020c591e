"""Which process a cache directory belongs to: one at a time, by flock(2), which ends with the process."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from pathlib import Path

from nydusfs.cache.health import FULL, reason
from nydusfs.errors import CacheDiskError, CacheError

log = logging.getLogger("nydusfs.cache")

MAX_SIDE_STORES = 64
DISK_TROUBLE = (*FULL, errno.EROFS, errno.EIO)  # the disk is at fault, not who named the directory


def claim(work_dir: Path) -> tuple[Path, int]:
    """The directory to use and its lock: `work_dir`, or the first free `worker-N` below it."""
    last: OSError | None = None
    for number in range(1, MAX_SIDE_STORES + 1):
        path = work_dir if number == 1 else work_dir / f".worker-{number}"
        fd = -1
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = _lock_file(path)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            last = error
            continue
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            kind = CacheDiskError if error.errno in DISK_TROUBLE else CacheError
            raise kind(f"cache {path} cannot be used: {reason(error)}") from None
        if number > 1:
            log.warning("cache %s is in use by another process: using %s, nothing is shared", work_dir, path)
        return path, fd
    raise CacheError(f"cache {work_dir} is in use by {MAX_SIDE_STORES} processes already ({last})")


def _lock_file(path: Path) -> int:
    """The directory itself where there is no such file and none can be made. Raises OSError."""
    try:
        # not for writing: that would keep the file system from being remounted read-only
        return os.open(path / ".lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in DISK_TROUBLE:
            raise
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
