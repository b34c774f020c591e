"""One FUSE connection: mounting it, its first words, requests in and answers out, over a plain /dev/fuse descriptor.

No library stands between: libfuse hands `read` a file handle and not the node, so OPEN could not be switched off (one
round trip for each open), and it cannot continue a session that another process began. The descriptor is all the
state there is, so a worker that died is replaced by giving the next one a copy.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from collections.abc import Sequence

from nydusfs.drivers import kernel
from nydusfs.drivers.fuse_abi import (
    BODY,
    IN_HEADER,
    INIT_IN,
    INIT_OUT,
    KERNEL_MINOR_VERSION,
    KERNEL_VERSION,
    MIN_READ_BUFFER,
    MINOR_FLOOR,
    NOTIFY_INVAL_ENTRY_OUT,
    NOTIFY_INVAL_INODE_OUT,
    OUT_HEADER,
    InitFlag,
    Notify,
    Opcode,
)

log = logging.getLogger("nydusfs.fuse")

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOATIME = 1, 2, 4, 1024
MAX_PAGES = 256  # one READ is 1 MiB at most: the kernel's own limit
READ_AHEAD = 512 << 10
# Requests of the kernel's read-ahead open at once over all images. The kernel's default of 12 would let as many stuck
# read-aheads of one image stop those of all others.
MAX_BACKGROUND = 1024
BUFFER = MIN_READ_BUFFER + 4096  # no request to a read-only file system is larger
WANTED = (
    InitFlag.ASYNC_READ
    | InitFlag.BIG_WRITES
    | InitFlag.DO_READDIRPLUS
    | InitFlag.ASYNC_DIO
    | InitFlag.NO_OPEN_SUPPORT
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.MAX_PAGES
    | InitFlag.CACHE_SYMLINKS
    | InitFlag.NO_OPENDIR_SUPPORT
    | InitFlag.INIT_EXT
    | InitFlag.HAS_RESEND
    | InitFlag.ALLOW_IDMAP
)


class DisconnectedError(Exception):
    """The file system was unmounted or the connection aborted: no request will come any more."""


def mount(mountpoint: str) -> int:
    """mount(2) of a new connection; its descriptor. Raises `kernel.MountError`.

    nosuid and nodev are right although images hold both: execution and device opens through overlayfs are judged by
    the flags of the overlay's own mount, and nothing else may use the lower tree.
    """
    try:
        fd = os.open(kernel.DEV_FUSE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise kernel.MountError(f"{kernel.DEV_FUSE} cannot be opened: {error.strerror}") from None
    data = f"fd={fd},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other"
    libc = ctypes.CDLL(None, use_errno=True)
    flags = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOATIME
    if libc.mount(b"rafs", os.fsencode(mountpoint), b"fuse", ctypes.c_ulong(flags), data.encode()) != 0:
        code = ctypes.get_errno()
        os.close(fd)
        raise kernel.MountError(
            f"mounting FUSE at {mountpoint} failed ({os.strerror(code)}): CAP_SYS_ADMIN and a usable {kernel.DEV_FUSE} "
            "are needed"
        )
    return fd


class Connection:
    """Requests and answers. Thread-safe: each message is one system call."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def handshake(self) -> None:
        """Answer INIT, the first request of a new connection. Raises `kernel.MountError`, `DisconnectedError`."""
        request = self.receive()
        unique = IN_HEADER.unpack_from(request)[2]
        if IN_HEADER.unpack_from(request)[1] != Opcode.INIT or len(request) < BODY + 16:
            raise kernel.MountError("the kernel's first FUSE request is not INIT: another process read the device")
        major, minor, read_ahead, flags, flags2 = INIT_IN.unpack_from(request[BODY:].ljust(INIT_IN.size, b"\0"))
        if major != KERNEL_VERSION or minor < MINOR_FLOOR:
            self.send_error(unique, errno.EPROTO)
            raise kernel.MountError(f"this kernel speaks FUSE {major}.{minor}; Linux 5.4 (7.{MINOR_FLOOR}) is needed")
        offered = flags | (flags2 << 32 if flags & InitFlag.INIT_EXT else 0)
        agreed = int(WANTED) & offered
        answer = INIT_OUT.pack(
            KERNEL_VERSION,
            min(minor, KERNEL_MINOR_VERSION),
            max(read_ahead, READ_AHEAD),
            agreed & 0xFFFF_FFFF,
            MAX_BACKGROUND,
            MAX_BACKGROUND * 3 // 4,
            4096,
            1,
            MAX_PAGES,
            0,
            agreed >> 32,
            0,
            0,
        )
        self.send(unique, answer)
        log.debug("FUSE %d.%d, flags %#x of %#x", major, minor, agreed, offered)

    def receive(self) -> bytes:
        """The next request, header included; waits for it without holding the GIL. Raises `DisconnectedError`."""
        while True:
            try:
                return os.read(self.fd, BUFFER)
            except OSError as error:
                # ENOENT: the request was interrupted while it was copied. EAGAIN: a non-blocking descriptor.
                if error.errno in (errno.ENODEV, errno.ECONNABORTED, errno.EBADF):
                    raise DisconnectedError from None
                if error.errno not in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                    raise

    def send(self, unique: int, *parts: bytes | bytearray | memoryview) -> None:
        """Answer a request. One that is gone meanwhile (its process was killed, the mount aborted) is no error."""
        size = OUT_HEADER.size
        for part in parts:
            size += len(part)
        self._write((OUT_HEADER.pack(size, 0, unique), *parts))

    def reply(self, unique: int, answer: bytes) -> None:
        """`send` of what is small: a copy takes half the time of a second buffer."""
        self._write(OUT_HEADER.pack(OUT_HEADER.size + len(answer), 0, unique) + answer)

    def send_error(self, unique: int, code: int) -> None:
        self._write(OUT_HEADER.pack(OUT_HEADER.size, -code, unique))

    def _write(self, message: bytes | Sequence[bytes | bytearray | memoryview]) -> None:
        try:
            if isinstance(message, bytes):
                os.write(self.fd, message)
            else:
                os.writev(self.fd, message)
        except OSError as failure:
            if failure.errno not in (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED, errno.EBADF):
                raise

    def _notify(self, code: Notify, *parts: bytes) -> None:
        size = OUT_HEADER.size + sum(map(len, parts))
        os.writev(self.fd, [OUT_HEADER.pack(size, int(code), 0), *parts])

    def forget_entry(self, parent: int, name: bytes) -> None:
        """Make the kernel drop a name and all it knows below. Waits for lookups in that directory. Raises OSError."""
        self._notify(Notify.INVAL_ENTRY, NOTIFY_INVAL_ENTRY_OUT.pack(parent, len(name), 0), name, b"\0")

    def forget_pages(self, node: int) -> None:
        """Make the kernel drop all it has of a file's content, or of a directory's listing, and the attributes.

        Waits for reads of it. Raises OSError, ENOENT when the kernel does not know the node.
        """
        self._notify(Notify.INVAL_INODE, NOTIFY_INVAL_INODE_OUT.pack(node, 0, 0))

    def resend(self) -> bool:
        """Have the kernel deliver again what an earlier process read and did not answer; False before Linux 6.9."""
        try:
            self._notify(Notify.RESEND)
        except OSError as error:
            log.warning("requests of the last worker cannot be asked for again (%s)", error.strerror)
            return False
        return True

    def close(self) -> None:
        """From any thread. Those that take requests may be about to answer one: see `kernel.bury`."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            kernel.bury(fd)
