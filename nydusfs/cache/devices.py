"""Segment files as devices of mounts: they are there when the mount is made and get their bytes later, all at once.

    <work_dir>/.erofs/images/<fingerprint>                  metadata images
    <work_dir>/.erofs/files.<boot id>/<key>/<blob id>/<segment>   devices that were not complete at some mount
    <work_dir>/.erofs/files.<boot id>/.opened/<blob id>     a bit for each segment that a mount has by its plain path
    <work_dir>/.erofs/reserve                               see `reserve`

The key is the cache's own: the kernel tells a device by the end of its path.

A device is empty until its segment is verified; then it is written from front to back and is the same inode as the
segment file of the cache (a hard link). So its size tells whether it is complete: what a dead worker left half-written
is a beginning of the right bytes, and the kernel reads EIO behind the end of a file. Sizes say nothing after a power
cut, so the folder has the boot's id: devices of another boot are deleted, the cache's own files are durable.

Where a cache has no limit, mounts have complete segments by their plain path, and nobody is ever asked about those.
Where it has one they are devices like all others, so that they can be emptied (`leaving`). What a mount of this boot
opened by its plain path is never emptied: that mount could not ask for it.
"""

from __future__ import annotations

import os
import shutil
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

from nydusfs.cache.leaving import Leaving
from nydusfs.cache.names import unlink
from nydusfs.cache.reserve import Reserve
from nydusfs.cache.spread import make_folder, spread
from nydusfs.segments import Plain, Segment

OPENED = ".opened"
MOST_PLAIN = 1 << 24  # numbers of segments that can be noted as opened so: of 4 TiB
ANY = ".plain"  # of versions that noted only that a mount had some segment so


class Driver(Protocol):
    """Who makes the mounts. `device` is `<key>/<blob id>/<segment>`. From any thread."""

    def filled(self, device: str, fd: int, size: int) -> None:
        """It has its bytes, in the page cache; `size` in whole blocks."""

    def durable(self, device: str, fd: int) -> None:
        """It is complete and on the disk: before that a failed write-out may put zeros where bytes were."""

    def mounted(self, blob: str) -> bool:
        """Whether a mount has devices of `<key>/<blob id>`."""

    def ask(self, path: Path) -> int:
        """See `Leaving`."""

    def quiet(self, fd: int) -> None:
        """See `Leaving`."""


def device_key(store_path: Path) -> str:
    """What names of a cache's devices begin with."""
    return blake2b(os.fsencode(store_path.resolve()), digest_size=4).hexdigest()


class DeviceFiles:
    """Of one cache store. Raises OSError when the folders cannot be made."""

    def __init__(self, store_path: Path, boot: str, driver: Driver) -> None:
        self.images = store_path / ".erofs" / "images"
        self.root = store_path / ".erofs" / f"files.{boot}"
        self.key = device_key(store_path)
        self.files = self.root / self.key
        self._folder = str(self.files)
        self.leaving = Leaving(driver.ask, driver.quiet)
        self._driver = driver
        # one by one: `parents` gives those above the mode of anybody's directory
        for folder in (self.images.parent, self.images, self.root, self.files):
            if not folder.is_dir():
                folder.mkdir(mode=0o700, exist_ok=True)
        self.reserve = Reserve(store_path)
        self.naming = threading.Lock()  # over what is noted as plain, and over the deletion of what is not
        self._any_plain = (self.root / ANY).exists()
        spread(self.files)
        for name in os.listdir(store_path / ".erofs"):
            if name.startswith("files.") and name != self.root.name:
                shutil.rmtree(store_path / ".erofs" / name, ignore_errors=True)

    def create(self, blob_id: str, name: str) -> bool:
        """Make an empty device; False when there is one already."""
        path = f"{self._folder}/{blob_id}/{name}"  # thousands are made for a mount: joining objects takes a third
        mode = stat.S_IFREG | 0o600  # mknod(2): to open and close it as well takes a fifth longer
        try:
            try:
                os.mknod(path, mode)
            except FileNotFoundError:
                make_folder(self.files / blob_id)
                os.mknod(path, mode)
        except FileExistsError:
            return False
        return True

    def note_plain(self, blob_id: str, numbers: Iterable[int]) -> None:
        """A mount is about to open these segments by their plain paths, if they are still there. Raises OSError."""
        with self.naming:
            path = self.root / OPENED / blob_id
            try:
                noted = bytearray(path.read_bytes())
            except FileNotFoundError:
                noted = bytearray()
                path.parent.mkdir(mode=0o700, exist_ok=True)
            for number in numbers:
                noted.extend(bytes(max(0, (number >> 3) + 1 - len(noted))))
                noted[number >> 3] |= 1 << (number & 7)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:  # over the old one, which it contains: whoever dies in between has noted no less
                os.pwrite(fd, noted, 0)
            finally:
                os.close(fd)

    def is_plain(self, blob_id: str, name: str) -> bool:
        """Whether a mount may have a segment by its plain path. Raises OSError."""
        if self._any_plain:
            return True
        try:
            fd = os.open(self.root / OPENED / blob_id, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        number = int(name.partition("-")[0])
        try:
            return bool(int.from_bytes(os.pread(fd, 1, number >> 3), "big") >> (number & 7) & 1)
        finally:
            os.close(fd)

    def mounted(self, blob_id: str) -> bool:
        """Whether a mount has devices of this blob."""
        return self._driver.mounted(f"{self.key}/{blob_id}")

    def can_leave(self, blob_id: str, name: str) -> bool:
        """Whether a segment is a device whose data can go while mounts have it."""
        try:
            return os.path.exists(self.files / blob_id / name) and not self.is_plain(blob_id, name)
        except OSError:
            return False

    def writing(self, blob_id: str, name: str) -> AbstractContextManager[None]:
        """See `Leaving`."""
        return self.leaving.writing(self.device(blob_id, name))

    def leave(self, blob_id: str, name: str) -> int:
        """See `Leaving`. Raises OSError, FileNotFoundError when no mount has it any more."""
        return self.leaving.leave(self.device(blob_id, name), self.files / blob_id / name)

    def take(self, blob_id: str, name: str) -> bool:
        """See `Leaving`."""
        return self.leaving.take(self.device(blob_id, name))

    def spare(self, blob_id: str, name: str) -> None:
        """See `Leaving`."""
        self.leaving.spare(self.device(blob_id, name))

    def empty(self, blob_id: str, name: str, fd: int) -> None:
        """See `Leaving`. Raises OSError."""
        self.leaving.empty(self.device(blob_id, name), fd)

    def device(self, blob_id: str, name: str) -> str:
        return f"{self.key}/{blob_id}/{name}"

    def open(self, blob_id: str, name: str, flags: int = os.O_WRONLY) -> int:
        """A descriptor; -1 when no mount needs this device."""
        try:
            return os.open(f"{self._folder}/{blob_id}/{name}", flags | os.O_CLOEXEC)
        except OSError:
            return -1

    def fill(self, blob_id: str, segment: Segment, plain: Plain) -> int:
        """Give a device its bytes; `link` follows. A descriptor of it; -1: no such device.

        Raises OSError, for a full disk; the device is then not complete.
        """
        fd = self.open(blob_id, segment.name)
        if fd < 0:
            return -1
        try:
            with self.writing(blob_id, segment.name):
                write_whole(fd, plain, segment.padded)
            self._driver.filled(self.device(blob_id, segment.name), fd, segment.padded)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def link(self, blob_id: str, name: str, target: str, beside: str) -> None:
        """Let the cache have the same file as `target`; `beside`: a name for the way there. Raises OSError."""
        device = f"{self._folder}/{blob_id}/{name}"
        try:
            os.link(device, target)
            return
        except FileExistsError:  # of an earlier time
            unlink(beside)
        except FileNotFoundError:  # the folder was cleaned up under us
            os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
        os.link(device, beside)
        os.rename(beside, target)
        unlink(beside)  # rename(2) does nothing when both are one file already

    def adopt(self, blob_id: str, name: str, file: Path) -> None:
        """Make a device of a cached file that is complete, unless there is one. Raises OSError."""
        path = self.files / blob_id / name
        make_folder(path.parent)
        try:
            os.link(file, path)
        except FileExistsError:
            pass

    def synced(self, blob_id: str, name: str, fd: int) -> None:
        """A segment file is on the disk: perhaps it is a device."""
        try:
            if os.path.samestat(os.stat(self.files / blob_id / name), os.fstat(fd)):
                self._driver.durable(self.device(blob_id, name), fd)
        except OSError:
            pass  # no device

    def alone(self) -> Iterator[tuple[str, str, os.stat_result]]:
        """Blob, name and facts of those with bytes that the cache has no link to. Raises OSError."""
        for folder in os.scandir(self.files):
            for entry in os.scandir(folder):
                facts = entry.stat(follow_symlinks=False)
                if facts.st_size and facts.st_nlink == 1:
                    yield folder.name, entry.name, facts

    def remove(self, blob_id: str, name: str) -> None:
        """No mount needs it any more; what the cache has of it stays."""
        try:
            os.unlink(self.files / blob_id / name)
        except OSError:
            pass


def remove_devices(store_path: Path, boot: str, blob_id: str) -> list[str]:
    """Names of those of a blob that is of no image any more, deleted: a worker left them that died before it mounted an
    image, or while it unmounted one."""
    folder = store_path / ".erofs" / f"files.{boot}" / device_key(store_path) / blob_id
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    shutil.rmtree(folder, ignore_errors=True)
    return names


def write_whole(fd: int, plain: Plain, padded: int) -> None:
    """From front to back and up to whole blocks: EROFS reads blocks. Raises OSError."""
    parts, at = [memoryview(plain), memoryview(bytes(padded - len(plain)))], 0
    while at < padded:
        done = os.pwritev(fd, parts, at)
        at += done
        parts = [part[max(0, done - begin) :] for part, begin in zip(parts, (0, len(parts[0])), strict=True)]


def usable(path: Path, size: int) -> bool:
    """Whether a segment file of the cache can be a device of `size` bytes; fills its last block up. Raises OSError."""
    try:
        found = os.stat(path).st_size
    except FileNotFoundError:
        return False
    if found == size:
        return True
    if not size - 4096 < found < size:
        return False
    os.truncate(path, size)
    return True
