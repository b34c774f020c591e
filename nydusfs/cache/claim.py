"""Which process a cache directory belongs to: one at a time.

A claim is an flock(2), which the process's successor may be given as a descriptor: nobody else has the directory
meanwhile, and mounts whose devices lie in it find them again. Since both could then believe to have it, a record lock,
which is the process's alone, says who is at work.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from struct import Struct
from types import MappingProxyType

from nydusfs.cache.devices import device_key
from nydusfs.cache.health import FULL, reason
from nydusfs.errors import CacheDiskError, CacheError

log = logging.getLogger("nydusfs.cache")

MAX_SIDE_STORES = 64
DISK_TROUBLE = (*FULL, errno.EROFS, errno.EIO)  # the disk is at fault, not who named the directory


_FLOCK = Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid
_NONE: Mapping[str, int] = MappingProxyType({})


def claim(work_dir: Path, given: Mapping[str, int] = _NONE) -> tuple[Path, int]:
    """The directory to use and its lock: `work_dir`, or the first free `worker-N` below it. `given`: locks of a
    predecessor by the directory's `device_key`; such a directory goes before others."""
    last: OSError | None = None
    places = [work_dir, *(work_dir / f".worker-{number}" for number in range(2, MAX_SIDE_STORES + 1))]
    if given:
        places.sort(key=lambda path: device_key(path) not in given)
    for path in places:
        fd = -1
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = _lock_file(path)
            mine = given.get(device_key(path), -1) if given else -1
            if mine >= 0 and os.path.samestat(os.fstat(mine), os.fstat(fd)):
                os.close(fd)
                fd = os.dup(mine)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _be_alone(fd)
        except BlockingIOError as error:
            os.close(fd)
            last = error
            continue
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            kind = CacheDiskError if error.errno in DISK_TROUBLE else CacheError
            raise kind(f"cache {path} cannot be used: {reason(error)}") from None
        if path != work_dir:
            log.warning("cache %s is in use by another process: using %s, nothing is shared", work_dir, path)
        return path, fd
    raise CacheError(f"cache {work_dir} is in use by {MAX_SIDE_STORES} processes already ({last})")


def _be_alone(fd: int) -> None:
    """Raises BlockingIOError while another process with this claim lives, OSError. The lock goes with the first
    descriptor of the file that this process closes."""
    fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: the other kind wants a descriptor for writing
    found = fcntl.fcntl(fd, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    if _FLOCK.unpack(found)[0] != fcntl.F_UNLCK:
        raise BlockingIOError(errno.EAGAIN, "its last process lives")


def _lock_file(path: Path) -> int:
    """The directory itself where there is no such file and none can be made. Raises OSError."""
    try:
        # not for writing: that would keep the file system from being remounted read-only
        return os.open(path / ".lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in DISK_TROUBLE:
            raise
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
