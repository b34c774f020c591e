"""Checks and settings of the process before it serves: root, limits, what an earlier life left behind."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
from pathlib import Path

import trio

from nydusfs.drivers import kernel
from nydusfs.errors import NydusError
from nydusfs.services import Services

log = logging.getLogger("nydusfs.daemon")

RLIMIT_RESERVE = 16384  # open files left to the rest of the machine


def raise_nofile_limit(wanted: int) -> None:
    """Allow `wanted` open files, 0 leaves the limit. What the machine does not grant is clamped with a warning."""
    if wanted <= 0:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        machine = int(Path("/proc/sys/fs/file-max").read_text())
    except (OSError, ValueError):
        machine = wanted + RLIMIT_RESERVE
    target = min(wanted, max(machine - RLIMIT_RESERVE, soft))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, max(hard, target)))
    except (ValueError, OSError) as error:
        granted = min(target, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (granted, hard))
        except (ValueError, OSError):
            granted = soft
        log.warning(
            "rlimit-nofile %d is not permitted here (%s): going on with %d, the hard limit is %d",
            target,
            getattr(error, "strerror", None) or error,
            granted,
            hard,
        )
        target = granted
    log.info("Set rlimit-nofile to %d, maximum %d", target, max(hard, target))


def check_mountpoint(path: str) -> str:
    """The canonical path of an existing directory, after a dead daemon's mount on it was detached.

    Raises `NydusError`/`MountError`: not there, no directory, or served by a living process.
    """
    # Does not stat the last component of a dead mount in a way that fails; below a hung one it never comes back.
    absolute = kernel.call_with_deadline(lambda: os.path.realpath(path), 5.0)
    if not isinstance(absolute, str):
        raise NydusError(f"mountpoint {path}: a file system there does not answer; see `grep fuse /proc/mounts`")
    if kernel.clear_dead_mount(absolute):
        log.warning("a dead daemon's mount at %s was detached", absolute)
    try:
        with os.scandir(absolute):
            pass
    except FileNotFoundError:
        raise NydusError(f"mountpoint {path} does not exist: create the directory first") from None
    except NotADirectoryError:
        raise NydusError(f"mountpoint {path} is not a directory") from None
    except OSError as error:
        raise NydusError(f"mountpoint {path}: {error.strerror}") from None
    return absolute


def check_privileges() -> None:
    if os.geteuid() != 0:
        raise NydusError("nydusd must run as root: mounting FUSE with allow_other needs CAP_SYS_ADMIN")


def like_any_other() -> None:
    """For a worker: the keeper it descends from hides from the kernel's out-of-memory killer, this one does not."""
    try:
        Path("/proc/self/oom_score_adj").write_text("0")
    except OSError:
        pass  # not ours to set


_M_ARENA_MAX, _M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -8, -1, -3
IDLE_SECONDS = 3.0
_KEPT = 64 << 20  # free bytes that an arena holds on to until `give_back_memory`


def tame_allocator() -> None:
    """Let all threads share two malloc arenas, and keep freed memory for the next chunk; best effort, only glibc has
    the call.

    By default each worker thread gets an arena of its own that keeps what a large chunk map needed while it was built:
    measured 1 MB per mount of a 100,000-file image over 12 mounts, against 50 kB so.
    Buffers of a chunk come and go at the top of the heap: given back each time, their page faults were a quarter of the
    processor time of a cold sequential read.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_ARENA_MAX, 2)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT // 2)
    except (OSError, AttributeError):
        pass


def give_back_memory() -> None:
    """Return freed heap pages to the kernel: after work that needed much for a moment. Takes about 1 ms."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass


async def give_back_when_idle(services: Services) -> None:
    """For ever: what fetching needed, once nothing was fetched for a while. No timer runs while nothing happens."""
    while True:
        await services.scheduler.settled(IDLE_SECONDS)
        for store in services.stores():
            store.fresh.clear()
        await trio.to_thread.run_sync(give_back_memory)
