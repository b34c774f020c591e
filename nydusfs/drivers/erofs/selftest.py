"""Whether EROFS mounts can be trusted on this kernel and this cache directory: by doing it, in some milliseconds.

A small image is mounted, attached nowhere, and read. Four things must be seen: a compact inode has a time of its own
(since Linux 6.15), the read is announced before it happens, a device without data gives EIO (and not zeros, as later
kernels seem to), and filled data comes out right.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import os
import select
import shutil
import tempfile
import threading
import time
import zlib
from pathlib import Path

from nydusfs.config import FsDriver
from nydusfs.drivers import mountapi
from nydusfs.drivers.erofs import fanotify, mount
from nydusfs.errors import NydusError

SECONDS = 5.0
PREFIX = ".selftest-"
NEEDED = "Linux 6.15 or newer with CONFIG_EROFS_FS_BACKED_BY_FILE and CONFIG_FANOTIFY_ACCESS_PERMISSIONS is needed"
DATA = bytes(range(256)) * 32  # two blocks
MTIME = 1_700_000_000
_IMAGE = (
    "eNrt1zEOgyAUxvEHcWiih3BooxN38AxewfYevUsPVt07OLj7VBi0bUKim/9fAvkg8EiYQATAWXXt8A45EyP2x5ppzkTWy+beSMrVRml27rdcIQAAAA"
    "6UaPtUVspp0Nf37V8g5Ku+REO+aU58LnTWOff4V/+i7fXUnflSP/dnfp9gov8gAAAAAABgbQRA8Qu6"
)


class UnsupportedError(NydusError):
    """What this machine lacks for EROFS mounts, and what to do about it."""


def run(folder: Path) -> None:
    """Raises `UnsupportedError`. `folder`: on the file system of cache and metadata; nothing stays in it."""
    try:
        _sweep(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=PREFIX) as scratch:
            _Test(Path(scratch)).run()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UnsupportedError("the disk of the cache is full") from None
        raise UnsupportedError(f"{error.strerror or error}: {NEEDED}, and a cache on ext4, xfs or btrfs") from None


def _sweep(folder: Path) -> None:
    """What a worker left that was killed in its test. Younger ones may be another daemon's, at work."""
    for left in folder.glob(PREFIX + "*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.lstat().st_mtime > 10 * SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def tiny_image() -> bytes:
    """One file `f` of two blocks, `DATA`, on one device: as `bootstrap.write_erofs` makes it, but without numpy, for
    who only asks."""
    return zlib.decompress(base64.b64decode(_IMAGE))


def choose(wanted: FsDriver, folder: Path) -> tuple[FsDriver, str]:
    """By which driver images are served whose cache is in a folder (that exists), and why. Never `auto`."""
    if wanted == "fuse":
        return "fuse", "as configured"
    try:
        run(folder)
    except NydusError as error:
        return "fuse", str(error)
    return "erofs", "its self-test passed"


class _Test:
    def __init__(self, folder: Path) -> None:
        self._image = folder / "image"
        self._files = folder / "files"
        self._device = self._files / "d"
        self._fds: list[int] = []

    def run(self) -> None:
        for file in (self._image, self._device):
            file.parent.mkdir(mode=0o700, exist_ok=True)
            file.touch(mode=0o600)
        self._image.write_bytes(tiny_image())
        try:
            self._check()
        finally:
            # The group first: whoever still waits for an answer then goes on.
            for fd in self._fds:
                os.close(fd)

    def _check(self) -> None:
        group = self._keep(fanotify.init())
        tree = self._keep(mountapi.clone_tree(self._files))
        fanotify.mark_mount(group, tree)
        mounted = self._keep(mount.open_erofs(str(self._image), [f"/proc/self/fd/{tree}/d"]))
        file = self._keep(os.open("f", os.O_RDONLY | os.O_CLOEXEC, dir_fd=mounted))

        if os.fstat(file).st_mtime != MTIME:
            raise UnsupportedError(f"this kernel gives files the time of their image: {NEEDED}")
        asked, found = _read(group, file)
        if not asked:
            raise UnsupportedError(f"a read of a marked file was not announced: {NEEDED}")
        if not (isinstance(found, OSError) and found.errno == errno.EIO):
            raise UnsupportedError("this kernel reads zeros where a device has no data: a crash would give wrong bytes")
        self._device.write_bytes(DATA)
        asked, found = _read(group, file)
        if not asked or found != DATA:
            raise UnsupportedError("a device that was filled after the mount does not read right on this kernel")

    def _keep(self, fd: int) -> int:
        self._fds.append(fd)
        return fd


def _read(group: int, file: int) -> tuple[bool, object]:
    """Read all of a file in a thread, allowing what the kernel asks: whether it asked, and bytes or error."""
    outcome: list[object] = []
    done, told = os.pipe2(os.O_CLOEXEC)

    def read() -> None:
        try:
            outcome.append(os.pread(file, len(DATA), 0))
        except OSError as error:
            outcome.append(error)
        os.write(told, b".")

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    asked = False
    poller = select.poll()  # select(2) knows no descriptors above 1023
    for fd in (group, done):
        poller.register(fd, select.POLLIN)
    try:
        while True:
            ready = [fd for fd, _ in poller.poll(SECONDS * 1000)]
            if group in ready and (event := fanotify.read_event(group)) is not None:
                asked = True
                fanotify.answer(group, event.fd, fanotify.FAN_ALLOW)
                os.close(event.fd)
            elif done in ready:
                return asked, outcome[0]
            elif not ready:
                raise UnsupportedError(f"a read of the self-test took more than {SECONDS:.0f} s")
    finally:
        if outcome:
            thread.join(SECONDS)
        if not thread.is_alive():  # else it is going to write there
            os.close(done)
            os.close(told)
