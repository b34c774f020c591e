"""The FUSE driver: one kernel mount that serves many images as subtrees."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import trio

from nydusfs.drivers import connection, kernel
from nydusfs.drivers.idmap import IdMap
from nydusfs.drivers.operations import OPCODE_READ, ImageOperations, RequestLoop
from nydusfs.drivers.stats import FsStats
from nydusfs.drivers.volume import (
    MAX_INDEX,
    ROOT_ID,
    ImageData,
    ImageVolume,
    Metadata,
    MountMissingError,
    TreeChange,
    split_mountpoint,
)
from nydusfs.errors import NydusError

log = logging.getLogger("nydusfs.fuse")

# A page fault reads so much around it. With 1 MiB the import of 1,000 modules had 73 MB read from the cache, with
# 512 KiB 60, with the kernel's own 128 KiB 46; 46.4, 42.9 and 42.2 MB were fetched for it. Files that are read in
# sequence are slower the less it is.
READ_AHEAD_KIB = 512
STOP_GRACE = 2.0  # seconds for blocked reads to be answered with EIO
DEFAULT_THREADS = 4
# Indexes that the next worker leaves out, since the kernel may have learned of them from this one: an image that is
# shown but not saved yet, when the worker dies, must not give its numbers to another.
AHEAD = 64


class TooManyImagesError(NydusError):
    """All image indexes are in use."""


class InFlightInfo(NamedTuple):
    node: int
    opcode: int
    unique: int
    started: float  # wall clock, seconds


class FuseDriver:
    """Life of the mount: `open` (or `adopt`) -> `serve` (runs until unmounted or stopped) -> `close`."""

    def __init__(self, mountpoint: str, threads: int = DEFAULT_THREADS) -> None:
        self.mountpoint = mountpoint
        self.operations = ImageOperations()
        self.connection = connection.Connection(-1)
        self.loop = RequestLoop(self.connection, self.operations, threads)
        self._next_index = 0
        self._generation = 0
        self._promised = 0  # indexes from there on that `numbering` counts as given
        self.promise: Callable[[], None] = lambda: None  # `numbering` is to be saved for the next worker
        self._mounted: kernel.MountEntry | None = None
        self._adopted = False
        self._serving = False
        self._notifying = trio.Lock()

    # -- the kernel mount

    def open(self) -> None:
        """mount(2). Raises `kernel.MountError`. Requests wait in the kernel until `serve` runs."""
        self.connection.fd = connection.mount(self.mountpoint)
        try:
            self.connection.handshake()
        except connection.DisconnectedError:
            raise kernel.MountError(f"the mount at {self.mountpoint} was gone at once: it was unmounted") from None
        self._mounted = kernel.mount_at(self.mountpoint)
        self._tune()

    def adopt(self, fd: int) -> None:
        """Go on with the connection of an earlier process, whose images are to be mounted first (`restore`)."""
        os.set_blocking(fd, True)
        self.connection.fd = fd
        self._mounted = kernel.mount_at(self.mountpoint)
        self._adopted = True

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer requests until the file system is unmounted or `stop` was called."""
        if self._adopted:
            # Before the first answer: what the last process read and did not answer is ours now.
            self.connection.resend()
        self._serving = True
        await self.loop.run(task_status)

    def _tune(self) -> None:
        if self._mounted is None:
            return
        # The kernel takes the smaller of INIT's answer and this setting, whose default is 128 KiB.
        before = kernel.set_read_ahead(self._mounted, READ_AHEAD_KIB)
        if before is None:
            log.warning("FUSE read-ahead refused by the kernel: reads work, slower")
        log.debug("FUSE mount %d:%d tuned", self._mounted.major, self._mounted.minor)

    async def stop(self, *, unmount: bool = True, successor: bool = False) -> None:
        """End the session. Waiting reads get EIO, unless there is a successor to answer them; `unmount` detaches."""
        loop = self.loop
        if successor:
            self._serving = False
            loop.hand_over()
            return
        loop.closing = True
        cancelled = loop.cancel_reads()
        with trio.move_on_after(STOP_GRACE):
            await loop.wait_idle()
            if cancelled:
                # After a failed read-ahead the kernel asks once more for the page: that must be answered as well.
                await trio.sleep(0.05)
            async with self._notifying:  # the session must not go away under a notification
                pass
        if unmount:
            self.detach()
        self._serving = False
        loop.finish()

    def detach(self) -> None:
        """Lazy umount, if the mount is still ours; safe to call twice and from any thread."""
        ours = self._mounted
        if ours is not None:
            seen = kernel.mount_at(self.mountpoint)
            if seen is not None and (seen.major, seen.minor) == (ours.major, ours.minor):
                try:
                    kernel.detach_erofs(self.mountpoint)
                    kernel.umount_detach(self.mountpoint)
                except OSError as error:
                    log.error("umount of %s failed: %s", self.mountpoint, error.strerror)
            self._mounted = None

    def close(self) -> None:
        """Close /dev/fuse. Whoever still holds files of the mount gets ENOTCONN once this process ended, unless
        another one has the connection."""
        self.connection.close()

    # -- images

    def _take_index(self) -> int:
        for _ in range(MAX_INDEX):
            if not self._promised:
                self._promised = AHEAD
                self.promise()
            self._promised -= 1
            self._next_index += 1
            if self._next_index > MAX_INDEX:
                self._next_index = 1
                self._generation += 1
            if self._next_index not in self.operations.images:
                return self._next_index
        raise TooManyImagesError(f"{MAX_INDEX} images are mounted, there is no room for more")

    def check_free(self, mountpoint: str) -> None:
        """Raise `MountExistsError` or ValueError when an image cannot be mounted there."""
        self.operations.tree.check_free(split_mountpoint(mountpoint))

    async def mount(
        self, mountpoint: str, metadata: Metadata, data: ImageData, stats: FsStats,
        *, serve_xattrs: bool, idmap: IdMap | None = None,
    ) -> ImageVolume:  # fmt: skip
        """Show an image at `mountpoint` of the tree. Raises `MountExistsError`, `TooManyImagesError`, ValueError."""
        parts = split_mountpoint(mountpoint)
        operations = self.operations
        operations.tree.check_free(parts)
        names_before = self._root_names() if not parts else []
        image = ImageVolume(self._take_index(), self._generation, metadata, data, stats, serve_xattrs, idmap)
        operations.images[image.index] = image
        change = operations.tree.attach(parts, image)
        await self._forget(change, names_before)
        return image

    def restore(
        self, mountpoint: str, index: int, generation: int, metadata: Metadata, data: ImageData, stats: FsStats,
        *, serve_xattrs: bool, idmap: IdMap | None = None,
    ) -> ImageVolume:  # fmt: skip
        """Put an image back where an earlier process showed it: the kernel knows its node numbers."""
        image = ImageVolume(index, generation, metadata, data, stats, serve_xattrs, idmap)
        self.operations.tree.attach(split_mountpoint(mountpoint), image)
        self.operations.images[index] = image
        return image

    @property
    def numbering(self) -> tuple[int, int]:
        """The last index that may have been given to an image, and its generation; a successor goes on from here."""
        turns, last = divmod(self._next_index + self._promised, MAX_INDEX + 1)
        return last + turns, self._generation + turns

    @numbering.setter
    def numbering(self, value: tuple[int, int]) -> None:
        self._next_index, self._generation = value
        self._promised = 0

    async def replace(
        self, mountpoint: str, metadata: Metadata, data: ImageData, stats: FsStats,
        *, serve_xattrs: bool, idmap: IdMap | None = None,
    ) -> ImageVolume:  # fmt: skip
        """Put another image (or the same with other settings) in the place of a mounted one, without a gap."""
        parts = split_mountpoint(mountpoint)
        names_before = self._root_names() if not parts else []
        image = ImageVolume(self._take_index(), self._generation, metadata, data, stats, serve_xattrs, idmap)
        old, _ = self.operations.tree.detach(parts)
        self.operations.images[image.index] = image
        change = self.operations.tree.attach(parts, image)
        await self._retire(old, change, names_before)
        return image

    async def umount(self, mountpoint: str) -> None:
        """Remove an image. Its waiting reads end with EIO, open files get ESTALE. Raises `MountMissingError`."""
        parts = split_mountpoint(mountpoint)
        names_before = self._root_names() if not parts else []
        old, change = self.operations.tree.detach(parts)
        await self._retire(old, change, names_before)

    async def _retire(self, image: ImageVolume, change: TreeChange, names: list[bytes]) -> None:
        operations = self.operations
        with trio.CancelScope(shield=True):
            operations.images.pop(image.index, None)
            self.loop.cancel_reads(image)
            await self._forget(change, names)
            await self.loop.wait_idle(image)

    def _root_names(self) -> list[bytes]:
        volume, ino = self.operations.route(ROOT_ID)
        return [name for name, _, _, _ in volume.list_dir(ino, 0)]

    async def _forget(self, change: TreeChange, names_before: list[bytes]) -> None:
        """Make the kernel drop what it knows about a changed name.

        Dropping one name drops the whole cached subtree below it, so umount costs one message and not one per inode.
        When the root itself changes, every name of the old and the new root goes, remembered absences included.
        """
        if not self._serving:
            return  # nobody can have asked for anything yet
        if change.parent:
            entries = [(change.parent, change.name)]
        else:
            entries = [(ROOT_ID, name) for name in {*names_before, *self._root_names()}]

        def tell() -> None:
            for parent, name in entries:
                try:
                    self.connection.forget_entry(parent, name)
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ENOTCONN):
                        log.warning("the kernel kept %s cached: %s", os.fsdecode(name), error)
            try:
                # its listing too, which the kernel keeps when it was read: it would never show what was mounted since
                self.connection.forget_pages(change.parent or ROOT_ID)
            except OSError:
                pass  # not known to the kernel

        # The call waits for a lookup in the same directory to be answered, so it must not run in this thread.
        with trio.CancelScope(shield=True):
            async with self._notifying:
                if self._serving and not self.loop.closing:
                    await trio.to_thread.run_sync(tell)

    async def forget_pages(self, image: ImageVolume, inodes: Iterable[int]) -> None:
        """Make the kernel drop what it has of these files' content: the next read asks again."""

        def tell() -> None:
            for ino in inodes:
                try:
                    self.connection.forget_pages(image.base | ino)
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ENOTCONN):
                        log.warning("the kernel kept pages of inode %d cached: %s", ino, error)

        # The call waits for reads of the file that are under way: not in this thread.
        with trio.CancelScope(shield=True):
            async with self._notifying:
                if self._serving and not self.loop.closing:
                    await trio.to_thread.run_sync(tell)

    def inflight(self) -> list[InFlightInfo]:
        now, ticks = time.time(), time.perf_counter_ns()
        return [
            InFlightInfo(node, OPCODE_READ, unique, now - (ticks - began) / 1e9)
            for unique, (node, began) in self.loop.waiting().items()
        ]


__all__ = ["FuseDriver", "InFlightInfo", "MountMissingError", "TooManyImagesError"]
