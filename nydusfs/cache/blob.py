"""The segments of one blob in a `CacheStore`: which are ready, reading and writing them."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from nydusfs.cache.durability import RWF_NOWAIT, resident
from nydusfs.cache.foreign import ForeignBlob
from nydusfs.cache.health import FULL
from nydusfs.cache.names import NAME, unlink
from nydusfs.cache.spread import make_folder
from nydusfs.hands import Hands
from nydusfs.segments import Plain, Segment

if TYPE_CHECKING:
    from nydusfs.cache.store import CacheStore

INLINE_READ = 128 * 1024  # bytes; larger reads wait for the disk in a thread


class NotSureError(Exception):
    """Read it whole and verify it."""


class BlobCache:
    """The segments of one blob."""

    def __init__(self, store: CacheStore, blob_id: str) -> None:
        self.store = store
        self.blob_id = blob_id
        self.path = store.folder(blob_id)
        self._folder = str(self.path)  # joining paths as objects takes 2 us each time
        self.foreign = ForeignBlob.find(store.path, blob_id)
        self.naming = threading.Lock()  # over which file has a segment's name
        self.wrote = 0.0  # when something was last written, of time.monotonic()
        self.used = 0.0  # when somebody last read from it here, seconds since the epoch
        self._ready: dict[bytes, bool] = {}  # key -> durable
        self._unsure: set[bytes] = set()  # not durable, and seen outside of the page cache
        self._written: dict[bytes, int] = {}  # by key, until `add`: its descriptor, -1 for what is synced
        self._mapped: set[bytes] = set()  # until `add`: written to devices
        try:
            make_folder(self.path)
            self._load()
        except OSError as error:
            store.health.failed(error)  # `write` tries again

    def _load(self) -> None:
        """What an earlier process left: only what is known to be whole."""
        for entry in os.scandir(self.path):
            match = NAME.fullmatch(entry.name)
            if match is None or not entry.is_file(follow_symlinks=False):
                continue
            key = bytes.fromhex(match[2])
            if match[3] is None:
                self._ready[key] = True
            elif match[3] == self.store.boot:
                self._ready.setdefault(key, False)
                self.store.syncer.add(self, f"{match[1]}-{match[2]}", key)
            else:
                unlink(self.path / entry.name)
        if not all(self._ready.values()):
            self.store.kick()

    def __contains__(self, key: bytes) -> bool:
        return key in self._ready

    def __len__(self) -> int:
        return len(self._ready)

    def current(self) -> bool:
        """False once the blob was removed from the cache."""
        return self.store._blobs.get(self.blob_id) is self

    def is_durable(self, key: bytes) -> bool:
        return self._ready.get(key, False)

    def synced(self, name: str, fd: int) -> None:
        """This file is on the disk, whatever name it has."""
        if self.store.devices is not None:
            self.store.devices.synced(self.blob_id, name, fd)

    def durable(self, key: bytes) -> None:
        if key in self._ready:
            self._ready[key] = True

    def found(self, key: bytes) -> None:
        """Somebody else put a durable file of it there."""
        self._ready[key] = True

    def ready_path(self, segment: str) -> Path | None:
        """The file of a ready segment by its name, None when it is absent. From any thread."""
        if bytes.fromhex(segment.partition("-")[2]) not in self._ready:
            return None
        for name in (segment, f"{segment}.{self.store.boot}", segment):  # it is renamed when durable
            if os.path.exists(self.path / name):
                return self.path / name
        return None

    def forget(self, key: bytes) -> None:
        self._ready.pop(key, None)
        self.store.fresh.drop((self.blob_id, key))
        if self.store.quota is not None:
            self.store.quota.gone((self.blob_id, key))

    def evicted(self, key: bytes, name: str) -> None:
        self._ready.pop(key, None)
        self.store.fresh.drop((self.blob_id, key))
        if self.store.devices is None:  # else a kernel mount may have it
            # Its room is wanted now, and `sync` may have it open for a second more. Not once it is durable: after a
            # power cut a file system may have the old size and none of the bytes.
            with self.naming:
                try:
                    os.truncate(self.path / f"{name}.{self.store.boot}", 0)
                except OSError:
                    pass  # it is durable

    def lost(self, name: str, key: bytes, error: OSError) -> None:
        """The disk did not take it: what the page cache still has may turn into what the disk has, any moment.

        The file is emptied, so that whoever has it open, a kernel mount too, gets an error and never zeros.
        """
        self.store.health.failed(error)
        self.forget(key)
        self.store.files.drop((self.blob_id, key))
        devices = self.store.devices
        with nullcontext() if devices is None else devices.writing(self.blob_id, name):
            for ending in ("", f".{self.store.boot}"):
                try:
                    os.truncate(self.path / f"{name}{ending}", 0)
                except OSError:
                    pass  # not there, or a disk in no state to do it
                unlink(self.path / f"{name}{ending}")

    def paths(self, segment: Segment, durable: bool) -> Iterator[str]:
        """Where a ready segment may be."""
        path = f"{self._folder}/{segment.name}"
        yield path
        if not durable:
            yield f"{path}.{self.store.boot}"
            yield path  # it is renamed when durable

    def read_now(self, segment: Segment, offset: int, size: int, hands: Hands) -> Plain | None:
        """Like `read`, from any thread but the event loop's: waits for the disk. None for what is not ready, too."""
        key, store = segment.key, self.store
        plain = store.fresh.get((self.blob_id, key))  # maybe before it is written
        if plain is not None:
            return memoryview(plain)[offset : offset + size]
        durable = self._ready.get(key)
        if durable is None:
            return None
        if not durable and (key in self._unsure or not store.nowait):
            return None
        file = store.acquire(self, segment, durable, hands)
        if file is None:
            return None
        data = hands.room(size)
        try:
            if not durable:
                if resident(file.fd) and os.preadv(file.fd, [data], offset, RWF_NOWAIT) == size:
                    return data
                self._unsure.add(key)
                return None
            if store.nowait:
                try:
                    if os.preadv(file.fd, [data], offset, RWF_NOWAIT) == size:
                        return data
                except BlockingIOError:
                    pass
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                        raise
                    store.nowait = False
            hands.waits()
            return data if os.preadv(file.fd, [data], offset) == size else None
        except OSError:
            return None  # `read` says why
        finally:
            store.files.release(file)

    async def read(self, segment: Segment, offset: int, size: int, *, sure: bool = False) -> Plain | None:
        """Bytes of a ready segment; None when its file is gone or short, which makes the segment absent.

        Raises `NotSureError` when it is not durable and left the page cache: if its write-out failed, the disk has
        something else. `sure`: the caller verifies what it gets.
        """
        key = segment.key
        durable = self._ready.get(key, False)
        if not sure and key in self._ready and (plain := self.store.fresh.get((self.blob_id, key))) is not None:
            return memoryview(plain)[offset : offset + size]
        file = self.store.acquire(self, segment, durable)
        if file is None:
            self.forget(key)
            return None
        data = bytearray(size)
        try:
            got = -1
            if not durable and not sure and (key in self._unsure or not resident(file.fd)):
                self._unsure.add(key)
                raise NotSureError
            if self.store.nowait:
                try:
                    got = os.preadv(file.fd, [data], offset, RWF_NOWAIT)
                except BlockingIOError:
                    pass  # not in the page cache: let a thread wait for the disk
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                        raise
                    self.store.nowait = False
            if got != size:
                if not durable and not sure:
                    self._unsure.add(key)
                    raise NotSureError
                if size <= INLINE_READ and self.store.disk.fast():
                    began = time.perf_counter()
                    got = os.preadv(file.fd, [data], offset)
                    self.store.disk.took(time.perf_counter() - began)
                else:
                    got = await trio.to_thread.run_sync(os.preadv, file.fd, [data], offset)
        except OSError as error:
            self.store.health.unreadable(error)
            got = -1
        finally:
            self.store.files.release(file)
        if got != size:
            self.drop(segment)
            return None
        return data

    def drop(self, segment: Segment) -> None:
        """Forget a segment and delete its file: it was found damaged."""
        self.forget(segment.key)
        self.store.files.drop((self.blob_id, segment.key))
        for name in (segment.name, f"{segment.name}.{self.store.boot}"):
            unlink(self.path / name)

    def offer(self, segment: Segment, plain: Plain) -> bool:
        """Have `read_now` answer from verified bytes that are about to be written. From any thread; they will not be
        changed any more. False: a kernel mount of the blob may be waiting, which reads the file."""
        self.store.fresh.put((self.blob_id, segment.key), plain)
        return self.store.devices is None or not self.store.devices.mounted(self.blob_id)

    def write_waits(self, size: int) -> bool:
        """Whether `write` may be long: kernel mounts are given notice before room is made, what goes is chosen of all
        segments there are, and who writes to a disk that is behind syncs."""
        return (self.store.quota is not None and self.store.devices is not None) or not self.write_hastens(size)

    def write_hastens(self, size: int) -> bool:
        """Whether `write` will wait for nothing but the copying: a disk that is well, where nothing has to go and that
        is not behind. From any thread."""
        quota = self.store.quota
        return self.store.health.well() and not self.store.syncer.full() and (quota is None or quota.roomy(size))

    def write(self, segment: Segment, plain: Plain, *, must: bool = False) -> bool:
        """Keep verified bytes. False when the disk does not take them. For a worker thread; `add` follows.

        `must`: a kernel mount waits for them and reads nothing but the disk, so a full one is made room on.
        """
        if not must and not self.store.health.usable():
            return False
        quota, slot, devices = self.store.quota, (self.blob_id, segment.key), self.store.devices
        if quota is not None:
            wanted = must or (devices is not None and devices.can_leave(self.blob_id, segment.name))
            if not quota.reserve(slot, segment.name, len(plain), must=wanted):
                return False
        try:
            for last in (False, False, True):  # others, who wait too, may take the room that was made
                try:
                    self._write(segment, plain)
                    break
                except OSError as error:
                    if last or not must or error.errno not in FULL or not self.store.make_room(2 * segment.padded):
                        raise
        except OSError as error:
            unlink(self.path / f"{segment.name}.part")
            if quota is not None:
                quota.failed(slot)
            self.store.health.failed(error)
            return False
        finally:
            if quota is not None:
                quota.written(slot)
        if not must:  # else others are to leave what room there is to those that must
            self.store.health.worked()
        return True

    def _write(self, segment: Segment, plain: Plain) -> None:
        path = f"{self._folder}/{segment.name}"
        part, final = f"{path}.part", f"{path}.{self.store.boot}"
        devices = self.store.devices
        fd, behind = -1, self.store.syncer.full()
        self.wrote = time.monotonic()
        try:
            if devices is not None:
                fd = devices.fill(self.blob_id, segment, plain)
            mapped = fd >= 0
            if not mapped:
                fd = self._create(part)
                view = memoryview(plain)
                while view:
                    view = view[os.write(fd, view) :]
            if behind:
                os.fdatasync(fd)
            with self.naming:
                if devices is not None and mapped:
                    devices.link(self.blob_id, segment.name, final, part)
                    self._mapped.add(segment.key)
                else:
                    os.rename(part, final)
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise
        if behind:
            os.close(fd)
        self._hold(segment.key, -1 if behind else fd)

    def _create(self, part: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            return os.open(part, flags, 0o600)
        except FileNotFoundError:  # the directory was cleaned up under us
            make_folder(self.path)
            return os.open(part, flags, 0o600)

    def _hold(self, key: bytes, fd: int) -> None:
        old = self._written.pop(key, -1)
        if old >= 0:
            os.close(old)
            self.store.syncer.held -= 1
        self._written[key] = fd
        self.store.syncer.held += fd >= 0

    def add(self, segment: Segment, plain: Plain | None = None) -> None:
        """After `write` said True: readable from now on, durable soon. `plain`, its bytes, will not be changed any
        more; they are kept a while unless a kernel mount has them. From the thread that wrote, or the trio thread."""
        fd = self._written.pop(segment.key, None)
        if fd is not None:
            self.store.syncer.held -= fd >= 0
            self.store.syncer.add(self, segment.name, segment.key, fd, synced=fd < 0)
            self.store.kick()
        self._unsure.discard(segment.key)
        if plain is not None and segment.key not in self._mapped:
            self.store.fresh.put((self.blob_id, segment.key), plain)
        self._mapped.discard(segment.key)
        self._ready.setdefault(segment.key, False)
        self.used = time.time()

    def abandon(self) -> None:
        """Nothing of it is needed any more."""
        while self._written:
            _, fd = self._written.popitem()
            if fd >= 0:
                os.close(fd)
                self.store.syncer.held -= 1
        if self.foreign is not None:
            self.foreign.close()
            self.foreign = None

    def verified(self, segment: Segment) -> None:
        """A segment that was not sure was read and found right: it may get durable."""
        self._unsure.discard(segment.key)
        if self._ready.get(segment.key) is False:
            self.store.syncer.add(self, segment.name, segment.key)
            self.store.kick()
