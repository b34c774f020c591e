"""What the kernel must be asked around a FUSE mount: mount table, lazy umount, read-ahead.

Nothing here touches a path below a mount that this process serves: such a call could wait for its own answer.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from nydusfs.errors import NydusError

MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
DEV_FUSE = "/dev/fuse"


class MountError(NydusError):
    """The kernel cannot give what a mount needs; the text says what is missing and what to do."""


class MountEntry(NamedTuple):
    mountpoint: str
    fstype: str
    source: str
    major: int
    minor: int


_ESCAPES = {"\\040": " ", "\\011": "\t", "\\012": "\n", "\\134": "\\", "\\043": "#"}


def _unescape(field: str) -> str:
    if "\\" not in field:
        return field
    out, position = [], 0
    while position < len(field):
        token = field[position : position + 4]
        out.append(_ESCAPES.get(token, field[position]))
        position += 4 if token in _ESCAPES else 1
    return "".join(out)


def parse_mountinfo(text: str) -> list[MountEntry]:
    """The lines of `/proc/self/mountinfo`, bottom first (the last entry for a path is the visible one)."""
    entries = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, tail = left.split(" "), right.split(" ")
        if len(fields) < 5 or len(tail) < 2:
            continue
        major, _, minor = fields[2].partition(":")
        entries.append(MountEntry(_unescape(fields[4]), tail[0], _unescape(tail[1]), int(major), int(minor)))
    return entries


def mounts() -> list[MountEntry]:
    """All mounts of this process's namespace, bottom first."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        return parse_mountinfo(table.read())


def mount_at(mountpoint: str) -> MountEntry | None:
    """The topmost mount exactly at this absolute path, not counting those of the EROFS driver above a FUSE mount."""
    stack = [entry for entry in mounts() if entry.mountpoint == mountpoint]
    while len(stack) > 1 and stack[-1].fstype == "erofs" and any(e.fstype.startswith("fuse") for e in stack[:-1]):
        stack.pop()
    return stack[-1] if stack else None


def detach_erofs(mountpoint: str) -> None:
    """Lazily unmount what the EROFS driver put above the FUSE mount at this path. Raises OSError."""
    for entry in mounts():
        if entry.mountpoint == mountpoint and entry.fstype == "erofs":
            umount_detach(mountpoint)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def umount_detach(mountpoint: str) -> bool:
    """`umount -l`: True when something was mounted there. OSError for anything but "not a mountpoint"."""
    if _libc().umount2(os.fsencode(mountpoint), MNT_DETACH | UMOUNT_NOFOLLOW) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOENT):
        return False
    raise OSError(code, os.strerror(code), mountpoint)


def bury(fd: int) -> None:
    """Close a descriptor that threads may be about to write to, in whatever order things end: its number is given to no
    other file as long as this process lives, and whoever still uses it gets EBADF."""
    grave = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        os.dup2(grave, fd, inheritable=False)
    finally:
        os.close(grave)


def call_with_deadline(action: Callable[[], object], seconds: float) -> BaseException | object:
    """Run a call that may hang in the kernel in a thread of its own; its result, its exception, or `TimeoutError`."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(action())
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0] if outcome else TimeoutError(f"no answer within {seconds} s")


def clear_dead_mount(mountpoint: str) -> bool:
    """Detach what a dead daemon left at `mountpoint`; True when there was such a mount.

    A daemon killed by SIGKILL leaves a mount that answers ENOTCONN for ever. statfs always asks the server, so it tells
    the dead from the living; a server that does not answer within 2 s counts as living.
    Raises `MountError` when a living process serves the path.
    """
    found = False
    # More than one dead mount can be stacked when earlier starts piled up on each other.
    for _ in range(16):
        entry = mount_at(mountpoint)
        if entry is None or not entry.fstype.startswith("fuse"):
            return found
        # The EROFS mount above needs nobody to answer; without it a living daemon serves by FUSE.
        detach_erofs(mountpoint)
        answer = call_with_deadline(lambda: os.statvfs(mountpoint), 2.0)
        if isinstance(answer, OSError) and answer.errno in (errno.ENOTCONN, errno.ECONNABORTED):
            umount_detach(mountpoint)
            found = True
            continue
        raise MountError(
            f"mountpoint {mountpoint}: a living process already serves a FUSE mount here ({entry.source}); "
            f"stop it or run `umount -l {mountpoint}` first"
        )
    raise MountError(f"mountpoint {mountpoint}: dead mounts keep coming back, run `umount -l` on it by hand")


def check_fuse_device(path: str = DEV_FUSE) -> None:
    """Raise `MountError` when FUSE cannot work here: no device, no permission, not a device."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise MountError(
            f"{path} does not exist: load the kernel module (`modprobe fuse`) or, in a container, pass the device in"
        ) from None
    if not stat.S_ISCHR(mode):
        raise MountError(f"{path} is not a device: it must be character device 10:229")
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise MountError(
            f"{path} cannot be opened: {error.strerror} (the kernel must have FUSE, and we need root)"
        ) from None


def set_read_ahead(entry: MountEntry, kib: int) -> int | None:
    """Raise the read-ahead of a mount; the old value in KiB, None when the kernel does not let us.

    With 1024 instead of the default 128 the kernel asks for whole chunks of 1 MiB at once (sequential cold reads were
    2 to 3 times faster). Holds only when made after INIT was answered.
    """
    path = Path(f"/sys/class/bdi/{entry.major}:{entry.minor}/read_ahead_kb")
    try:
        before = int(path.read_text())
        if before < kib:
            path.write_text(str(kib))
        return before
    except (OSError, ValueError):
        return None
