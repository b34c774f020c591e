"""FUSE requests against volumes: routing by node number, errno at the edge, counters.

All metadata requests are answered at once from mapped memory, without a task switch; only `read` waits. The kernel is
told to keep names, attributes (2^32 s) and pages for good, so each is asked once. No state per inode or open file:
the file handle is the node number, FORGET and RELEASE have nothing to do. Requests that write are not served: the
mount is read-only, so the kernel answers them itself with EROFS.
"""

from __future__ import annotations

import errno
import itertools
import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, StatvfsData

from bootstrap.errors import RafsError
from nydusfs.drivers.stats import Fop
from nydusfs.drivers.volume import INDEX_SHIFT, INO_MASK, ROOT_ID, ImageVolume, PseudoTree, Volume
from nydusfs.errors import NydusError, ReadError

log = logging.getLogger("nydusfs.fuse")

OPCODE_READ = 15  # FUSE_READ, as /metrics/inflight shows it
_R = TypeVar("_R")


class InFlight(NamedTuple):
    node: int
    opcode: int
    unique: int
    started: float  # wall clock, seconds
    volume: Volume
    scope: trio.CancelScope


def errno_of(error: Exception) -> int:
    """The errno for anything a volume may raise; unexpected errors are logged, they must not end the session."""
    if isinstance(error, ReadError):
        return error.errno
    if isinstance(error, KeyError):  # a directory of the tree that is gone
        return errno.ESTALE
    if isinstance(error, (RafsError, NydusError)):
        log.error("%s", error)
        return errno.EIO
    debugging = log.isEnabledFor(logging.DEBUG)
    log.error("unexpected %s in a FUSE request: %s", type(error).__name__, error, exc_info=debugging)
    return errno.EIO


class ImageOperations(pyfuse3.Operations):
    """`pyfuse3.Operations` over a `PseudoTree` and the images in it, by index."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self) -> None:
        super().__init__()
        self.tree = PseudoTree()
        self.images: dict[int, ImageVolume] = {}
        self.inflight: dict[int, InFlight] = {}
        self.closing = False
        self.ready = trio.Event()  # the kernel's INIT was answered
        self._unique = itertools.count(1)
        self._ended = trio.lowlevel.ParkingLot()

    def init(self) -> None:
        self.ready.set()

    # -- routing

    def _route(self, node: int) -> tuple[Volume, int]:
        index = node >> INDEX_SHIFT
        if index:
            image = self.images.get(index)
            if image is None:
                raise FUSEError(errno.ESTALE)
            return image, node & INO_MASK
        if node == ROOT_ID and (image := self.tree.root_image) is not None:
            return image, image.root_ino
        return self.tree, node

    def _entry(self, node: int) -> EntryAttributes:
        volume, ino = self._route(node)
        return self._attributes(volume, ino, node)

    @staticmethod
    def _attributes(volume: Volume, ino: int, node: int) -> EntryAttributes:
        attr = volume.attr(ino)
        entry = EntryAttributes()
        entry.st_ino = node
        entry.generation = volume.generation
        entry.entry_timeout = entry.attr_timeout = volume.entry_timeout
        entry.st_mode = attr.mode
        entry.st_nlink = attr.nlink
        entry.st_uid = attr.uid
        entry.st_gid = attr.gid
        entry.st_rdev = attr.rdev
        entry.st_size = attr.size
        entry.st_blksize = 4096
        entry.st_blocks = attr.blocks
        # One stored time serves as all three, as upstream's does.
        nanoseconds = attr.mtime * 1_000_000_000 + attr.mtime_nsec
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = nanoseconds
        return entry

    def _answer(self, fop: Fop, node: int, action: Callable[[Volume, int], _R]) -> _R:
        """Run one metadata request, count it under its volume, turn every error into an errno."""
        began = time.perf_counter_ns()
        volume, ino = self._route(node)
        failed = True
        try:
            result = action(volume, ino)
            failed = False
            return result
        except FUSEError:
            raise
        except Exception as error:
            raise FUSEError(errno_of(error)) from None
        finally:
            volume.stats.count(fop, ino, time.perf_counter_ns() - began, failed)

    # -- metadata

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        def action(volume: Volume, ino: int) -> EntryAttributes:
            child = volume.lookup(ino, name)
            if child:
                return self._entry(child)
            # Inode 0 with a timeout is "absent, and you may remember that"; ENOENT would not be remembered.
            absent = EntryAttributes()
            absent.st_ino = 0
            absent.entry_timeout = volume.negative_timeout
            absent.attr_timeout = 0
            return absent

        return self._answer(Fop.LOOKUP, parent_inode, action)

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._answer(Fop.GETATTR, inode, lambda volume, ino: self._attributes(volume, ino, inode))

    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return self._answer(Fop.READLINK, inode, lambda volume, ino: volume.readlink(ino))

    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        return self._answer(Fop.OPENDIR, inode, lambda volume, ino: inode)

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        reply = pyfuse3.readdir_reply

        def action(volume: Volume, ino: int) -> None:
            # Positions on the wire: 1 behind ".", 2 behind "..", then the volume's cookie + 2. The kernel looks at the
            # type and number of the dot entries only, and a volume does not know a directory's parent.
            if start_id < 2:
                own = self._attributes(volume, ino, fh)
                if start_id < 1 and not reply(token, b".", own, 1):
                    return
                if not reply(token, b"..", own, 2):
                    return
            for name, child, cookie in volume.list_dir(ino, max(0, start_id - 2)):
                if not reply(token, name, self._entry(child), cookie + 2):
                    return

        self._answer(Fop.READDIRPLUS, fh, action)

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        def action(volume: Volume, ino: int) -> bytes:
            value = volume.xattrs(ino).get(name)
            if value is None:
                raise FUSEError(errno.ENODATA)
            return value

        return self._answer(Fop.GETXATTR, inode, action)

    async def listxattr(self, inode: int, ctx: RequestContext) -> list[bytes]:
        return self._answer(Fop.LISTXATTR, inode, lambda volume, ino: list(volume.xattrs(ino)))

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        answer = StatvfsData()
        answer.f_bsize = answer.f_frsize = 512
        answer.f_namemax = 255
        answer.f_blocks = answer.f_bfree = answer.f_bavail = 0
        answer.f_files = sum(image.metadata.inode_count for image in self.images.values())
        answer.f_ffree = answer.f_favail = 0
        return answer

    def forget(self, inode_list: Any) -> None:  # type: ignore[override]
        """Nothing is remembered per inode. A plain function: pyfuse3 awaits the result only if there is one."""

    # -- data

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        return self._answer(Fop.OPEN, inode, lambda volume, ino: FileInfo(fh=inode, keep_cache=True))

    async def read(self, fh: int, off: int, size: int) -> bytes:
        volume, ino = self._route(fh)
        if self.closing:
            raise FUSEError(errno.EIO)
        began = time.perf_counter_ns()
        unique = next(self._unique)
        failed = True
        scope = trio.CancelScope()
        self.inflight[unique] = InFlight(fh, OPCODE_READ, unique, time.time(), volume, scope)
        try:
            with scope:
                data = await volume.read(ino, off, size)
                failed = False
                volume.stats.count_read(ino, size, len(data), time.perf_counter_ns() - began)
                return data
        except FUSEError:
            raise
        except Exception as error:
            raise FUSEError(errno_of(error)) from None
        finally:
            del self.inflight[unique]
            self._ended.unpark_all()
            volume.stats.count(Fop.READ, ino, time.perf_counter_ns() - began, failed)
        raise FUSEError(errno.EIO)  # cancelled: the image is being unmounted or the daemon stops

    async def flush(self, fh: int) -> None:
        # ENOSYS once tells the kernel never to ask again: one round trip less per close().
        raise FUSEError(errno.ENOSYS)

    async def release(self, fh: int) -> None:
        return

    async def releasedir(self, fh: int) -> None:
        return

    def cancel_reads(self, volume: Volume | None = None) -> int:
        """End the reads now waiting (of one volume, or all) with EIO; how many there were."""
        waiting = [read for read in self.inflight.values() if volume is None or read.volume is volume]
        for read in waiting:
            read.scope.cancel()
        return len(waiting)

    async def wait_idle(self, volume: Volume | None = None) -> None:
        """Return when no read of this volume (or at all) is waiting any more."""
        while any(volume is None or read.volume is volume for read in self.inflight.values()):
            await self._ended.park()
