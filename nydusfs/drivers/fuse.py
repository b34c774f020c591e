"""The FUSE driver: one pyfuse3 mount that serves many images as subtrees."""

from __future__ import annotations

import errno
import logging
import os
from typing import NamedTuple

import pyfuse3
import trio

from nydusfs.drivers import kernel, session
from nydusfs.drivers.operations import ImageOperations
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

# nosuid and nodev are right although images hold both: execution and device opens through overlayfs are judged by the
# flags of the overlay's own mount, and nothing else may use the lower tree.
OPTIONS = frozenset({"fsname=rafs", "ro", "nosuid", "nodev", "noatime", "default_permissions", "allow_other"})
READ_AHEAD_KIB = 1024
# Requests of the kernel's read-ahead open at once over all images (default 12); see `kernel.set_queue_depth`.
BACKGROUND = 1024
# Each waiting read holds one pyfuse3 task. The bound only stops runaways: with too few, blocked reads of one image
# would keep the others' metadata requests from being taken.
MAX_TASKS = 16384
STOP_GRACE = 2.0  # seconds for blocked reads to be answered with EIO


class TooManyImagesError(NydusError):
    """All image indexes are in use."""


class InFlightInfo(NamedTuple):
    node: int
    opcode: int
    unique: int
    started: float


class FuseDriver:
    """Life of the mount: `open` -> `serve` (runs until unmounted or stopped) -> `close`.

    pyfuse3 keeps its session in module globals: one driver per process.
    """

    def __init__(self, mountpoint: str) -> None:
        self.mountpoint = mountpoint
        self.operations = ImageOperations()
        self._next_index = 0
        self._generation = 0
        self._mounted: kernel.MountEntry | None = None
        self._opened = False
        self._notifying = trio.Lock()

    # -- the kernel mount

    def open(self) -> None:
        """mount(2). Raises `kernel.MountError`. Requests wait in the kernel until `serve` runs."""
        before = session.devices()
        try:
            pyfuse3.init(self.operations, self.mountpoint, set(OPTIONS))
        except RuntimeError as error:
            raise kernel.MountError(
                f"mounting FUSE at {self.mountpoint} failed ({error}): CAP_SYS_ADMIN and a usable /dev/fuse are needed"
            ) from None
        self._opened = True
        session.never_block(session.devices() - before)
        self._mounted = kernel.mount_at(self.mountpoint)

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer requests until the file system is unmounted or `stop` was called. Started when INIT is answered."""
        async with trio.open_nursery() as nursery:

            async def announce() -> None:
                await self.operations.ready.wait()
                await trio.lowlevel.checkpoint()
                self._tune()
                task_status.started()

            nursery.start_soon(announce)
            try:
                await pyfuse3.main(min_tasks=4, max_tasks=MAX_TASKS)
            finally:
                nursery.cancel_scope.cancel()

    def _tune(self) -> None:
        # libfuse's INIT answer overwrites the read-ahead, so this must come behind it.
        if self._mounted is None:
            return
        before = kernel.set_read_ahead(self._mounted, READ_AHEAD_KIB)
        deeper = kernel.set_queue_depth(self._mounted, BACKGROUND)
        if before is None or not deeper:
            log.warning(
                "FUSE tuning refused by the kernel (read-ahead %s, queue depth %s): reads work, slower",
                "refused" if before is None else "set",
                "set" if deeper else "refused",
            )
        log.debug("FUSE mount %d:%d tuned", self._mounted.major, self._mounted.minor)

    async def stop(self, *, unmount: bool = True) -> None:
        """End the session: waiting reads get EIO, the mount is detached (`unmount`) or left behind as a dead one."""
        operations = self.operations
        operations.closing = True
        cancelled = operations.cancel_reads()
        with trio.move_on_after(STOP_GRACE):
            await operations.wait_idle()
            if cancelled:
                # After a failed read-ahead the kernel asks once more for the page: that must be answered as well.
                await trio.sleep(0.05)
            async with self._notifying:  # the session must not go away under a notification
                pass
        if unmount:
            self.detach()
        if self._opened:
            pyfuse3.terminate()

    def detach(self) -> None:
        """Lazy umount, if the mount is still ours; safe to call twice and from any thread."""
        ours = self._mounted
        if ours is not None:
            seen = kernel.mount_at(self.mountpoint)
            if seen is not None and (seen.major, seen.minor) == (ours.major, ours.minor):
                try:
                    kernel.umount_detach(self.mountpoint)
                except OSError as error:
                    log.error("umount of %s failed: %s", self.mountpoint, error.strerror)
            self._mounted = None

    def close(self) -> None:
        """Close /dev/fuse. Whoever still holds files of the mount gets ENOTCONN from here on."""
        if self._opened:
            self._opened = False
            pyfuse3.close(unmount=False)

    # -- images

    def _take_index(self) -> int:
        for _ in range(MAX_INDEX):
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
        self, mountpoint: str, metadata: Metadata, data: ImageData, stats: FsStats, *, serve_xattrs: bool
    ) -> None:
        """Show an image at `mountpoint` of the tree. Raises `MountExistsError`, `TooManyImagesError`, ValueError."""
        parts = split_mountpoint(mountpoint)
        operations = self.operations
        operations.tree.check_free(parts)
        names_before = self._root_names() if not parts else []
        image = ImageVolume(self._take_index(), self._generation, metadata, data, stats, serve_xattrs)
        operations.images[image.index] = image
        change = operations.tree.attach(parts, image)
        await self._forget(change, names_before)

    async def replace(
        self, mountpoint: str, metadata: Metadata, data: ImageData, stats: FsStats, *, serve_xattrs: bool
    ) -> None:
        """Put another image (or the same with other settings) in the place of a mounted one, without a gap."""
        parts = split_mountpoint(mountpoint)
        names_before = self._root_names() if not parts else []
        image = ImageVolume(self._take_index(), self._generation, metadata, data, stats, serve_xattrs)
        old, _ = self.operations.tree.detach(parts)
        self.operations.images[image.index] = image
        change = self.operations.tree.attach(parts, image)
        await self._retire(old, change, names_before)

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
            operations.cancel_reads(image)
            await self._forget(change, names)
            await operations.wait_idle(image)

    def _root_names(self) -> list[bytes]:
        volume, ino = self.operations._route(ROOT_ID)
        return [name for name, _, _ in volume.list_dir(ino, 0)]

    async def _forget(self, change: TreeChange, names_before: list[bytes]) -> None:
        """Make the kernel drop what it knows about a changed name.

        Dropping one name drops the whole cached subtree below it, so umount costs one message and not one per inode.
        When the root itself changes, every name of the old and the new root goes, remembered absences included.
        """
        if not self._opened or not self.operations.ready.is_set():
            return  # nobody can have asked for anything yet
        if change.parent:
            entries = [(change.parent, change.name)]
        else:
            entries = [(ROOT_ID, name) for name in {*names_before, *self._root_names()}]

        def tell() -> None:
            for parent, name in entries:
                try:
                    pyfuse3.invalidate_entry(parent, name)
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ENOTCONN):
                        log.warning("the kernel kept %s cached: %s", os.fsdecode(name), error)
            try:
                pyfuse3.invalidate_inode(change.parent or ROOT_ID, attr_only=True)
            except OSError:
                pass  # not known to the kernel

        # The call waits for a lookup in the same directory to be answered, so it must not run in this thread.
        with trio.CancelScope(shield=True):
            async with self._notifying:
                if self._opened and not self.operations.closing:
                    await trio.to_thread.run_sync(tell)

    def inflight(self) -> list[InFlightInfo]:
        return [
            InFlightInfo(read.node, read.opcode, read.unique, read.started)
            for read in self.operations.inflight.values()
        ]


__all__ = ["FuseDriver", "InFlightInfo", "MountMissingError", "TooManyImagesError"]
