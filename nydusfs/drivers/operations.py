"""FUSE requests against volumes: routing by node number, errno at the edge, counters.

Requests are taken by a few plain threads, which answer at once from mapped memory and from cached data: no task
switch, one system call in and one out. One of them serves until it is about to wait for the disk, then it lets the next
one take requests: while all of them wait at the device each request wakes another one, and two that are awake fight
for the interpreter. Only a `read` whose data is not here goes to the event loop.
OPEN and OPENDIR are answered with ENOSYS once, which tells the kernel never to ask again and to keep pages and
directory lists; names and attributes are kept for good (2^32 s). No state per inode or open file: FORGET and RELEASE
have nothing to do. Requests that write do not come: the mount is read-only, so the kernel refuses them itself.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

import trio

from bootstrap.errors import RafsError
from nydusfs.drivers.connection import Connection, DisconnectedError
from nydusfs.drivers.fuse_abi import (
    ATTR_OUT,
    BODY,
    DIRENT,
    ENTRY_OUT,
    GETXATTR_IN,
    GETXATTR_OUT,
    IN_START,
    INTERRUPT_IN,
    READ_IN,
    READ_RANGE,
    STATFS_OUT,
    WRITES,
    Opcode,
)
from nydusfs.drivers.stats import Fop
from nydusfs.drivers.volume import INDEX_SHIFT, INO_MASK, ROOT_ID, AttrLike, ImageVolume, PseudoTree, Volume
from nydusfs.errors import NydusError, ReadError
from nydusfs.hands import Hands
from nydusfs.lane import SLOTS

log = logging.getLogger("nydusfs.fuse")

_READ = int(Fop.READ)
OPCODE_READ = int(Opcode.READ)  # as /metrics/inflight shows it
_MASK = (1 << 64) - 1
_NO_ENTRY = bytes(ENTRY_OUT.size)
_NO_ATTR = (0,) * 16
_pack_entry = ENTRY_OUT.pack
_PAD = (b"", b"\0" * 7, b"\0" * 6, b"\0" * 5, b"\0" * 4, b"\0" * 3, b"\0" * 2, b"\0")
_OURS = frozenset(map(int, (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.DESTROY)))  # no volume's
Answer = bytes | int
"""An errno where that is an answer like any other: to raise it takes as long as the rest of a GETXATTR."""


class FuseError(Exception):
    """An answer that is an errno."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.errno = code


class InFlight(NamedTuple):
    node: int
    began: int  # of time.perf_counter_ns()
    volume: Volume
    scope: trio.CancelScope


def errno_of(error: Exception, what: str) -> int:
    """The errno for anything a volume may raise in `what`. One line says why, but for a `ReadError`, whose maker did.
    Unexpected errors must not end the session."""
    if isinstance(error, (FuseError, ReadError)):
        return error.errno
    if isinstance(error, (RafsError, NydusError)):
        log.error("%s: %s", what, error)
        return errno.EIO
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    debugging = log.isEnabledFor(logging.DEBUG)
    if isinstance(error, KeyError):  # a directory of the tree that is gone, more often than not
        log.info("%s: no %s%s", what, error, where)
        return errno.ESTALE
    log.error("%s: unexpected %s%s: %s", what, type(error).__name__, where, error, exc_info=debugging)
    return errno.EIO


def _read_of(volume: Volume, ino: int, offset: int, size: int) -> str:
    return f"image {volume.stats.id}: read of {size} bytes at {offset} of inode {ino}"


def pack_attr(node: int, attr: AttrLike) -> tuple[int, ...]:
    """The fields of `fuse_attr`. One stored time serves as all three, as upstream's does."""
    seconds = attr.mtime & _MASK  # before 1970: two's complement
    nsec = attr.mtime_nsec
    return (
        node, attr.size, attr.blocks, seconds, seconds, seconds, nsec, nsec, nsec,
        attr.mode, attr.nlink, attr.uid, attr.gid, attr.rdev, 4096, 0,
    )  # fmt: skip


class ImageOperations:
    """The pseudo tree and the images in it, by index; what each request answers."""

    def __init__(self) -> None:
        self.tree = PseudoTree()
        self.images: dict[int, ImageVolume] = {}
        handlers: dict[Opcode, tuple[Fop, Callable[[Volume, int, int, bytes], Answer]]] = {
            Opcode.LOOKUP: (Fop.LOOKUP, self._lookup),
            Opcode.GETATTR: (Fop.GETATTR, self._getattr),
            Opcode.READLINK: (Fop.READLINK, self._readlink),
            Opcode.READDIR: (Fop.READDIR, self._readdir),
            Opcode.READDIRPLUS: (Fop.READDIRPLUS, self._readdirplus),
            Opcode.GETXATTR: (Fop.GETXATTR, self._getxattr),
            Opcode.LISTXATTR: (Fop.LISTXATTR, self._listxattr),
        }
        # Plain numbers: an enumeration's member as a key or an index takes five times as long.
        self._handlers = {int(opcode): (int(fop), handler) for opcode, (fop, handler) in handlers.items()}

    def route(self, node: int) -> tuple[Volume, int]:
        """The volume a node number belongs to, and its inode there. Raises `FuseError` ESTALE."""
        index = node >> INDEX_SHIFT
        if index:
            image = self.images.get(index)
            if image is None:
                raise FuseError(errno.ESTALE)
            return image, node & INO_MASK
        if node == ROOT_ID and (image := self.tree.root_image) is not None:
            return image, image.root_ino
        return self.tree, node

    def answer(self, opcode: int, node: int, request: bytes) -> Answer:
        """What to answer a request that is neither `read` nor about the connection itself. Raises `FuseError`."""
        found = self._handlers.get(opcode)
        if found is None:
            if opcode == Opcode.STATFS:
                return self._statfs()  # of all images: upstream's counts it for none
            raise FuseError(errno.EROFS if opcode in WRITES else errno.ENOSYS)
        fop, handler = found
        began = time.perf_counter_ns()
        volume: Volume | None = self.images.get(node >> INDEX_SHIFT)  # as `route`
        ino = node & INO_MASK
        if volume is None:
            volume, ino = self.route(node)
        failed = True
        try:
            result = handler(volume, ino, node, request)
            failed = False
            return result
        except FuseError:
            raise
        except Exception as error:
            what = f"image {volume.stats.id}: {Opcode(opcode).name} of inode {ino}"
            raise FuseError(errno_of(error, what)) from None
        finally:
            volume.stats.count(fop, ino, time.perf_counter_ns() - began, failed)

    # -- one method per request

    def _entry(self, volume: Volume, node: int) -> bytes:
        """Of a child in this volume; what hangs in the tree of mountpoints is another's."""
        ino = node & INO_MASK
        if not volume.index or node >> INDEX_SHIFT != volume.index:
            volume, ino = self.route(node)
        attr = volume.attr(ino)
        timeout = int(volume.entry_timeout)
        seconds, nsec = attr.mtime & _MASK, attr.mtime_nsec  # as `pack_attr`
        return _pack_entry(
            node, volume.generation, timeout, timeout, 0, 0,
            volume.shown(node, ino), attr.size, attr.blocks, seconds, seconds, seconds, nsec, nsec, nsec,
            attr.mode, attr.nlink, attr.uid, attr.gid, attr.rdev, 4096, 0,
        )  # fmt: skip

    def _lookup(self, volume: Volume, ino: int, node: int, request: bytes) -> Answer:
        child = volume.lookup(ino, request[BODY:-1])
        if child:
            return self._entry(volume, child)
        # Node 0 with a timeout is "absent, and you may remember that"; ENOENT would not be remembered.
        return _pack_entry(0, 0, int(volume.negative_timeout), 0, 0, 0, *_NO_ATTR)

    def _getattr(self, volume: Volume, ino: int, node: int, request: bytes) -> Answer:
        return ATTR_OUT.pack(int(volume.entry_timeout), 0, 0, *pack_attr(volume.shown(node, ino), volume.attr(ino)))

    def _readlink(self, volume: Volume, ino: int, node: int, request: bytes) -> Answer:
        return volume.readlink(ino)

    # Positions on the wire: 1 behind ".", 2 behind "..", then the volume's cookie + 2. The kernel looks at the type and
    # number of the dot entries only, and a volume does not know a directory's parent.

    def _readdir(self, volume: Volume, ino: int, node: int, request: bytes) -> Answer:
        _, start, size, *_ = READ_IN.unpack_from(request, BODY)
        parts: list[bytes] = []
        left = size
        pack = DIRENT.pack
        if start < 2:
            for position, name in enumerate((b".", b"..")[start:], start + 1):
                parts += (pack(node, position, len(name), stat.S_IFDIR >> 12), name, _PAD[len(name)])
                left -= DIRENT.size + 8
        for name, child, cookie, dtype in volume.list_dir(ino, max(0, start - 2)):
            length = len(name)
            left -= DIRENT.size + (length + 7 & ~7)
            if left < 0:
                break
            parts += (pack(child, cookie + 2, length, dtype), name, _PAD[length & 7])
        return b"".join(parts)

    def _readdirplus(self, volume: Volume, ino: int, node: int, request: bytes) -> Answer:
        _, start, size, *_ = READ_IN.unpack_from(request, BODY)
        parts: list[bytes] = []
        left = size
        pack = DIRENT.pack
        overhead = ENTRY_OUT.size + DIRENT.size
        if start < 2:
            for position, name in enumerate((b".", b"..")[start:], start + 1):
                parts += (_NO_ENTRY, pack(node, position, len(name), stat.S_IFDIR >> 12), name, _PAD[len(name)])
                left -= overhead + 8
        for name, child, cookie, dtype in volume.list_dir(ino, max(0, start - 2)):
            length = len(name)
            left -= overhead + (length + 7 & ~7)
            if left < 0:
                break
            parts += (self._entry(volume, child), pack(child, cookie + 2, length, dtype), name, _PAD[length & 7])
        return b"".join(parts)

    def _getxattr(self, volume: Volume, ino: int, node: int, request: bytes) -> Answer:
        # Two of five requests of a cold start: overlayfs asks for one of its own of each file, at each first look.
        if volume.lacks_xattrs(ino):
            return errno.ENODATA
        size, _ = GETXATTR_IN.unpack_from(request, BODY)
        value = volume.xattrs(ino).get(request[BODY + GETXATTR_IN.size : -1])
        return errno.ENODATA if value is None else self._sized(size, value)

    def _listxattr(self, volume: Volume, ino: int, node: int, request: bytes) -> Answer:
        size, _ = GETXATTR_IN.unpack_from(request, BODY)
        return self._sized(size, b"".join(name + b"\0" for name in volume.xattrs(ino)))

    @staticmethod
    def _sized(size: int, value: bytes) -> Answer:
        if size == 0:
            return GETXATTR_OUT.pack(len(value), 0)
        if len(value) > size:
            raise FuseError(errno.ERANGE)
        return value

    def _statfs(self) -> Answer:
        files = sum(image.metadata.inode_count for image in list(self.images.values()))
        return STATFS_OUT.pack(0, 0, 0, files, 0, 512, 255, 512, 0)


class _Server(Hands):
    """One of the threads: whether it is its turn to take requests."""

    __slots__ = ("_changing", "_mine", "_turn", "began", "node", "unique", "volume")

    def __init__(self, turn: threading.Lock) -> None:
        super().__init__()
        self.unique = 0  # of the read that it is at; set while it has its turn, so that no interrupt comes before
        self.node = self.began = 0
        self.volume: Volume | None = None
        self._changing = threading.Lock()  # over which read that is: what is told to one must not reach the next
        self._turn = turn
        self._mine = False

    def begin_read(self, unique: int, node: int, volume: Volume, began: int) -> None:
        with self._changing:
            self.unique, self.volume, self.stopped = unique, volume, 0
            self.node, self.began = node, began

    def end(self) -> None:
        self.unique, self.volume = 0, None  # what is unmounted meanwhile goes at once

    def at(self) -> tuple[int, int, int]:
        """Of the read that it is at: its number (0: none), its node, and when it began, of time.perf_counter_ns()."""
        with self._changing:
            return self.unique, self.node, self.began

    def end_read(self, code: int, is_it: Callable[[int, Volume | None], bool]) -> bool:
        """Have it give up the read that it is at, if that is the one. From any thread."""
        with self._changing:
            found = bool(self.unique) and is_it(self.unique, self.volume)
            if found:
                self.give_up(code)
            return found

    def take_turn(self) -> None:
        if not self._mine:
            self._turn.acquire()
            self._mine = True

    def waits(self) -> None:
        if self._mine:
            self._mine = False
            self._turn.release()


class RequestLoop:
    """The threads that take requests, and the reads that wait on the event loop.

    `start` from the trio thread. A thread ends when the connection does; one that waits for a request when the process
    ends leaves nothing behind, as a request it has not read yet is the kernel's still.
    """

    def __init__(self, connection: Connection, operations: ImageOperations, threads: int) -> None:
        self.connection = connection
        self.operations = operations
        self.closing = False  # reads get EIO
        self.draining = False  # each thread serves the request it may be waiting for and ends
        self.inflight: dict[int, InFlight] = {}
        self._threads = max(threads, 1 + SLOTS)  # one is free for what is cached
        self._turn = threading.Lock()
        self._servers: list[_Server] = []
        self._ended = trio.lowlevel.ParkingLot()
        self._over = trio.Event()
        self._failure: BaseException | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until the file system is unmounted or this is cancelled."""
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for number in range(self._threads):
                # daemon: a thread in read(2) on the device must not keep the process from ending
                threading.Thread(target=self._thread, name=f"fuse-{number}", daemon=True).start()
            task_status.started()
            await self._over.wait()
            nursery.cancel_scope.cancel()
        if self._failure is not None:
            raise OSError(errno.EIO, f"FUSE thread failed: {self._failure}")

    def _thread(self) -> None:
        failure: BaseException | None = None
        server = _Server(self._turn)
        self._servers.append(server)
        try:
            while True:
                server.take_turn()
                if self.draining:
                    break
                self._one(self.connection.receive(), server)
        except DisconnectedError:
            pass
        except BaseException as error:
            log.exception("a FUSE thread failed")
            failure = error
        finally:
            server.waits()
        if self.draining and failure is None:
            return
        try:
            self._token.run_sync_soon(self._end, failure)
        except trio.RunFinishedError:
            pass

    def _end(self, failure: BaseException | None) -> None:
        self._failure = self._failure or failure
        self._over.set()

    def _one(self, request: bytes, server: _Server) -> None:
        opcode, unique, node, pid = IN_START.unpack_from(request)
        connection = self.connection
        try:
            if opcode == OPCODE_READ:
                try:
                    self._read(unique, node, pid, request, server)
                finally:
                    server.end()
                    server.finish()
            elif opcode not in _OURS:
                answer = self.operations.answer(opcode, node, request)
                if isinstance(answer, int):
                    connection.send_error(unique, answer)
                else:
                    connection.reply(unique, answer)
            elif opcode == Opcode.INTERRUPT:
                (which,) = INTERRUPT_IN.unpack_from(request, BODY)
                for other in self._servers:
                    other.end_read(errno.EINTR, lambda unique, _: unique == which)
                self._soon(self._interrupt, which)
            elif opcode == Opcode.DESTROY:
                connection.send(unique)
        except FuseError as error:
            connection.send_error(unique, error.errno)
        except Exception as error:  # one bad request must not end a thread that all images share
            connection.send_error(unique, errno_of(error, f"FUSE request {opcode} of node {node:#x}"))

    def _soon(self, call: Callable[..., object], *args: object) -> None:
        try:
            self._token.run_sync_soon(call, *args)
        except trio.RunFinishedError:
            pass  # the process is about to end; a successor has the request delivered again

    def _read(self, unique: int, node: int, pid: int, request: bytes, server: _Server) -> None:
        volume, ino = self.operations.route(node)
        offset, size = READ_RANGE.unpack_from(request, BODY)
        if self.closing:
            log.warning("%s: EIO, this daemon stops", _read_of(volume, ino, offset, size))
            raise FuseError(errno.EIO)
        began = time.perf_counter_ns()
        server.begin_read(unique, node, volume, began)
        try:
            parts = volume.read_now(ino, offset, size, pid, server)
        except Exception as error:
            volume.stats.count(_READ, ino, time.perf_counter_ns() - began, True)
            raise FuseError(errno_of(error, _read_of(volume, ino, offset, size))) from None
        if parts is None:
            self._soon(self._begin, unique, node, volume, ino, offset, size, began)
            if server.stopped:  # a task that is cancelled at once says why
                self._soon(self._interrupt if server.stopped == errno.EINTR else self._stop, unique)
            return
        self.connection.send(unique, *parts)
        volume.stats.count_read(ino, size, sum(map(len, parts)), time.perf_counter_ns() - began)

    # -- on the event loop

    def _begin(self, unique: int, node: int, volume: Volume, ino: int, offset: int, size: int, began: int) -> None:
        if self._over.is_set():
            return
        scope = trio.CancelScope()
        self.inflight[unique] = InFlight(node, began, volume, scope)
        self._nursery.start_soon(self._wait, scope, unique, volume, ino, offset, size, began)

    async def _wait(
        self, scope: trio.CancelScope, unique: int, volume: Volume, ino: int, offset: int, size: int, began: int
    ) -> None:
        failed, told = True, False
        code = errno.EIO  # cancelled: the image is being unmounted or the daemon stops
        try:
            with scope:
                if self.closing:
                    return
                parts = await volume.read(ino, offset, size)
                failed = False
                self.connection.send(unique, *parts)
                volume.stats.count_read(ino, size, sum(map(len, parts)), time.perf_counter_ns() - began)
        except Exception as error:
            told, code = True, errno_of(error, _read_of(volume, ino, offset, size))
        finally:
            if failed and not self.draining:  # else a successor has it delivered again
                if unique not in self.inflight:
                    code = errno.EINTR
                elif not told:
                    why = "this daemon stops" if self.closing else "the image is unmounted"
                    log.warning("%s: EIO, %s", _read_of(volume, ino, offset, size), why)
                self.connection.send_error(unique, code)
            self.inflight.pop(unique, None)
            self._ended.unpark_all()
            if failed:
                volume.stats.count(_READ, ino, time.perf_counter_ns() - began, True)

    def waiting(self) -> dict[int, tuple[int, int]]:
        """All reads without an answer, also those that a thread waits for by itself (for a server, or a directory that
        hangs): node, and when it began (time.perf_counter_ns()), by number."""
        held = (server.at() for server in self._servers)
        found = {unique: (node, began) for unique, node, began in held if unique}
        return found | {unique: (read.node, read.began) for unique, read in self.inflight.items()}

    def _interrupt(self, unique: int) -> None:
        """The process that reads was killed or got a signal: it waits for our answer to end."""
        read = self.inflight.pop(unique, None)
        if read is not None:
            read.scope.cancel()

    def _stop(self, unique: int) -> None:
        """Of a read that its thread was told to give up before it came here."""
        if (read := self.inflight.get(unique)) is not None:
            read.scope.cancel()

    def finish(self) -> None:
        """Let `run` return, although users of a detached mount may go on asking until the process ends."""
        self._over.set()

    def hand_over(self) -> None:
        """Stop without an answer to what waits: a successor has it delivered again."""
        self.draining = True
        self._over.set()

    def cancel_reads(self, volume: Volume | None = None) -> int:
        """End the reads now waiting (of one volume, or all) with EIO; how many there were."""
        waiting = [read for read in self.inflight.values() if volume is None or read.volume is volume]
        for read in waiting:
            read.scope.cancel()
        asked = [server.end_read(errno.EIO, lambda _, own: volume in (None, own)) for server in self._servers]
        return len(waiting) + sum(asked)

    async def wait_idle(self, volume: Volume | None = None) -> None:
        """Return when no read of this volume (or at all) is waiting any more."""
        while any(volume is None or read.volume is volume for read in self.inflight.values()):
            await self._ended.park()
