"""fanotify(7), the part that asks before content is read. Names are those of `linux/fanotify.h`."""

from __future__ import annotations

import ctypes
import errno
import os
from struct import Struct
from typing import NamedTuple

FAN_CLOEXEC = 0x1
FAN_NONBLOCK = 0x2
FAN_CLASS_PRE_CONTENT = 0x8
FAN_UNLIMITED_QUEUE = 0x10
FAN_UNLIMITED_MARKS = 0x20

FAN_PRE_ACCESS = 0x0010_0000
FAN_Q_OVERFLOW = 0x4000

FAN_MARK_ADD = 0x1
FAN_MARK_REMOVE = 0x2
FAN_MARK_MOUNT = 0x10
FAN_MARK_IGNORED_SURV_MODIFY = 0x40
FAN_MARK_EVICTABLE = 0x200
FAN_MARK_IGNORE = 0x400

FAN_ALLOW = 0x1
FAN_DENY = 0x2
FAN_NOFD = -1
FANOTIFY_METADATA_VERSION = 3

EVENT_METADATA = Struct("<IBBHQii")  # struct fanotify_event_metadata
FAN_EVENT_INFO_TYPE_RANGE = 6
EVENT_INFO_RANGE = Struct("<BxHxxxxQQ")  # struct fanotify_event_info_range
RESPONSE = Struct("<iI")  # struct fanotify_response
EVENT_SIZE = 3 * EVENT_METADATA.size
"""Room for one event with its range (24 + 24 bytes), not for two: what is read and not yet written down is little."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fanotify_init.argtypes = [ctypes.c_uint, ctypes.c_uint]
_libc.fanotify_mark.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p]


class Event(NamedTuple):
    """`fd`: the file, open for reading and writing without events of its own; to be closed after the answer.
    `offset`, `size`: what is to be read of it, in bytes."""

    fd: int
    pid: int
    mask: int
    offset: int
    size: int


def init() -> int:
    """A group whose events must be answered. Raises OSError: EINVAL where the kernel has no such class, EPERM."""
    flags = FAN_CLOEXEC | FAN_NONBLOCK | FAN_CLASS_PRE_CONTENT | FAN_UNLIMITED_QUEUE | FAN_UNLIMITED_MARKS
    fd: int = _libc.fanotify_init(flags, os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_LARGEFILE", 0))
    if fd < 0:
        raise _error("fanotify_init")
    return fd


def mark_mount(group: int, tree: int) -> None:
    """Ask before every read through the mount that `tree` is a descriptor of. Raises OSError."""
    _mark(group, FAN_MARK_ADD | FAN_MARK_MOUNT, _path(tree))


def mark_inode(group: int, fd: int) -> None:
    """Ask before every read of this file by any path. Raises OSError."""
    _mark(group, FAN_MARK_ADD | FAN_MARK_EVICTABLE, _path(fd))


def ignore(group: int, fd: int) -> None:
    """From now on nothing is asked about this file. The mark goes with the inode. Raises OSError."""
    _mark(group, FAN_MARK_ADD | FAN_MARK_IGNORE | FAN_MARK_IGNORED_SURV_MODIFY | FAN_MARK_EVICTABLE, _path(fd))


def heed(group: int, fd: int) -> None:
    """Take `ignore` back, if it was there. Raises OSError."""
    _mark(group, FAN_MARK_REMOVE | FAN_MARK_IGNORE | FAN_MARK_IGNORED_SURV_MODIFY, _path(fd), absent_ok=True)


def read_event(group: int) -> Event | None:
    """The next event; None when there is none, or it has no file. Raises OSError."""
    try:
        data = os.read(group, EVENT_SIZE)
    except BlockingIOError:
        return None
    length, version, _, at, mask, fd, pid = EVENT_METADATA.unpack_from(data)
    if version != FANOTIFY_METADATA_VERSION:
        raise OSError(f"fanotify events of version {version}")
    if fd < 0:
        return None
    offset = size = 0
    if at + EVENT_INFO_RANGE.size <= min(length, len(data)):
        kind, _, offset, size = EVENT_INFO_RANGE.unpack_from(data, at)
        if kind != FAN_EVENT_INFO_TYPE_RANGE:
            offset = size = 0
    return Event(fd, pid, mask, offset, size)


def answer(group: int, number: int, response: int) -> bool:
    """Let the reader of the event with this descriptor number go on. False when nobody waits under the number."""
    try:
        os.write(group, RESPONSE.pack(number, response))
    except FileNotFoundError:
        return False
    return True


def _path(fd: int) -> bytes:
    return b"/proc/self/fd/%d" % fd


def _mark(group: int, flags: int, path: bytes, *, absent_ok: bool = False) -> None:
    if _libc.fanotify_mark(group, flags, FAN_PRE_ACCESS, -100, path) != 0:
        if absent_ok and ctypes.get_errno() == errno.ENOENT:
            return
        raise _error("fanotify_mark")


def _error(call: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{call}: {os.strerror(code)}")
