"""The blob cache of one work directory: files that say by their existence what is ready.

    <work_dir>/<blob id>/<number>-<key>          a segment, verified and durable
    <work_dir>/<blob id>/<number>-<key>.<boot>   verified and complete, not yet known to be on the disk
    <work_dir>/<blob id>/<number>-<key>.part     being written

(`<blob id>.segments` where old versions of upstream's nydusd have a file of the blob's name.)

A segment is written to `.part` after its digests were checked, renamed to `.<boot id>` when complete and to its plain
name after fdatasync, a second later in a batch. After a crash of the process alone the second kind is good (the page
cache lived on) and is adopted; after a reboot its boot id differs and it is deleted. So unknown means absent, there is
no state file that could disagree with the data, and evicting a segment is one unlink.

One process writes a directory (flock). A second one, such as a dedicated daemon of another image, gets a directory of
its own below it: nothing is shared then, and nothing can be corrupted.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import trio

from nydusfs.cache.claim import claim
from nydusfs.cache.devices import DeviceFiles
from nydusfs.cache.durability import RWF_NOWAIT, Syncer, resident
from nydusfs.cache.foreign import FOREIGN_SUFFIXES, ForeignBlob
from nydusfs.cache.fresh import Fresh
from nydusfs.cache.health import Health, Speed
from nydusfs.cache.leaving import GRACE
from nydusfs.cache.maps import map_path
from nydusfs.cache.openfiles import OpenFile, OpenFiles
from nydusfs.cache.quota import Limit, Quota
from nydusfs.errors import CacheError
from nydusfs.segments import KEY_SIZE, Plain, Segment

log = logging.getLogger("nydusfs.cache")

SYNC_DELAY = 1.0  # seconds a finished segment may wait to be made durable: one journal commit then serves many
INLINE_READ = 128 * 1024  # bytes; larger reads wait for the disk in a thread
SEGMENTS_SUFFIX = ".segments"
_NAME = re.compile(rf"([0-9]{{1,12}})-([0-9a-f]{{{KEY_SIZE * 2}}})(?:\.([0-9a-z]+))?")
NAME = _NAME  # of a segment file: number, key, ending


def boot_id() -> str:
    """Of this boot of the kernel; 8 hex digits are enough to tell it from the last. Where it is not known, one that no
    other process has: what was not durable is then fetched again."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", "")[:8]
    except OSError:
        return os.urandom(4).hex()


class CacheStore:
    """Open with `CacheStore(work_dir)`, run `sync_forever` in a nursery, `close` at the end.

    Raises `CacheError` when the directory cannot be made or written. Methods belong to the trio thread, except
    `BlobCache.write`, which is made for a worker thread.
    """

    def __init__(self, work_dir: str | os.PathLike[str], *, boot: str | None = None) -> None:
        self.boot = boot or boot_id()
        self.path, self._lock_fd = claim(Path(work_dir))
        self.files = OpenFiles()
        self.fresh = Fresh()
        self._blobs: dict[str, BlobCache] = {}
        self.syncer = Syncer(self.boot)
        self._wake = trio.Event()
        self.devices: DeviceFiles | None = None  # segment files that kernel mounts have as devices
        self.nowait = bool(RWF_NOWAIT)
        self.quota: Quota | None = None
        self.disk = Speed()
        self.health = Health(self.path)

    def set_limit(self, limit: Limit) -> None:
        """From now on; what is too much goes at once. For a worker thread: it looks at every file."""
        if self.quota is not None:
            self.quota.limit = limit
        elif limit.size or limit.floor:
            quota = Quota(self.path, limit, self._evict, self._give_notice, self.files.in_use)
            for folder in os.scandir(self.path):
                if folder.name.startswith(".") or not folder.is_dir(follow_symlinks=False):
                    continue
                blob_id = folder.name.removesuffix(SEGMENTS_SUFFIX)
                for entry in os.scandir(folder):
                    match = _NAME.fullmatch(entry.name)
                    if match is not None and match[3] in (None, self.boot):
                        facts = entry.stat(follow_symlinks=False)
                        name, key = f"{match[1]}-{match[2]}", bytes.fromhex(match[2])
                        quota.found((blob_id, key), name, facts.st_size, max(facts.st_atime, facts.st_mtime))
            self.quota = quota
        self.count_beside()
        if self.quota is not None:
            self.quota.trim()

    def count_beside(self) -> None:
        """Have the limit know what files that are no segments take, after one was made. For a worker thread."""
        if self.quota is not None:
            self.quota.beside = sum(_allocated(self.path / name) for name in (".maps", ".erofs/images"))

    def _evict(self, slot: tuple[str, bytes], name: str) -> bool:
        """True: kernel mounts have it, `_give_notice` first."""
        if self.devices is not None and self.devices.can_leave(slot[0], name):
            return True
        self._delete(slot, name)
        return False

    def _delete(self, slot: tuple[str, bytes], name: str) -> None:
        blob_id, key = slot
        blob = self._blobs.get(blob_id)
        if blob is not None:
            blob.evicted(key, name)
        self.files.drop((blob_id, key))
        folder = blob.path if blob is not None else self.folder(blob_id)
        for ending in (f".{self.boot}", ""):  # in this order: `sync` may rename the first to the second meanwhile
            _unlink(folder / f"{name}{ending}")

    def _give_notice(self, segments: dict[tuple[str, bytes], str]) -> set[tuple[str, bytes]]:
        """Empty the devices of those that nobody reads during `GRACE`; which went."""
        devices, given, gone = self.devices, dict[tuple[str, bytes], int](), set[tuple[str, bytes]]()
        assert devices is not None
        for slot, name in segments.items():
            try:
                given[slot] = devices.leave(slot[0], name)
            except FileNotFoundError:  # its last mount went
                self._delete(slot, name)
                gone.add(slot)
            except OSError as error:
                log.error("cache %s: blob %s, segment %s cannot go: %s", self.path, slot[0], name, error.strerror)
        time.sleep(GRACE)
        taken = [slot for slot in given if devices.take(slot[0], segments[slot])]
        for slot in taken:
            self._delete(slot, segments[slot])
        try:
            for folder in {self.folder(slot[0]) for slot in taken}:
                sync_folder(folder)
        except OSError as error:
            self.health.failed(error)  # what a power cut leaves of a disk in this state is anybody's guess
        for slot, fd in given.items():
            try:
                if slot in taken:
                    devices.empty(slot[0], segments[slot], fd)
            except OSError as error:
                log.error("cache %s: blob %s, segment %s stays: %s", self.path, slot[0], segments[slot], error.strerror)
            finally:
                os.close(fd)
        return gone.union(taken)

    def folder(self, blob_id: str) -> Path:
        """Where the segments of a blob are."""
        path = self.path / blob_id
        return path if not path.is_file() else path.with_name(f"{blob_id}{SEGMENTS_SUFFIX}")

    def blob(self, blob_id: str) -> BlobCache:
        """The cache of a blob, one object for all mounts. Raises `CacheError` for an id that is no file name."""
        if blob_id not in self._blobs:
            if blob_id.startswith(".") or "/" in blob_id:
                raise CacheError(f"cache {self.path}: blob id {blob_id!r} is not usable as a directory name")
            self._blobs[blob_id] = BlobCache(self, blob_id)
        return self._blobs[blob_id]

    def remove_blob(self, blob_id: str) -> None:
        """Delete everything of a blob, upstream's files too. For a worker thread; nobody may be using the blob."""
        if not blob_id or blob_id.startswith(".") or "/" in blob_id:
            return
        cache = self._blobs.pop(blob_id, None)
        folder = self.folder(blob_id)
        try:
            names = os.listdir(folder)
        except OSError:
            names = []
        for name in names:
            match = _NAME.fullmatch(name)
            if match is not None:
                key = bytes.fromhex(match[2])
                self.files.drop((blob_id, key))
                if self.quota is not None:
                    self.quota.gone((blob_id, key))
            _unlink(folder / name)
        try:
            folder.rmdir()
        except OSError:
            pass  # not there, or not empty: what is not ours stays
        for ending in FOREIGN_SUFFIXES:
            _unlink(self.path / f"{blob_id}{ending}")
        _unlink(self.path / blob_id)
        if cache is not None:
            cache.abandon()
        if names:
            log.info("cache %s: blob %s removed, %d segments", self.path, blob_id, len(names))

    def map_path(self, name: str) -> str | None:
        """Where to keep a derived chunk map of that name, see `maps`."""
        return map_path(self.path / ".maps", name, self.health)

    # Durability

    def kick(self) -> None:
        """Tell `sync_forever` that there is something to do."""
        self._wake.set()

    async def sync_forever(self) -> None:
        """Make finished segments durable in batches, until cancelled; what is left then is the next process's."""
        while True:
            await self._wake.wait()
            await trio.sleep(SYNC_DELAY)
            self._wake = trio.Event()
            await trio.to_thread.run_sync(self.sync)

    def sync(self) -> None:
        """Make what is finished durable. For a worker thread."""
        self.syncer.sync()

    # Descriptors

    def acquire(self, blob: BlobCache, segment: Segment, durable: bool) -> OpenFile | None:
        """An open segment file, to be given back to `files`; None when there is none. From any thread."""
        slot = (blob.blob_id, segment.key)
        blob.used = time.time()
        if self.quota is not None:
            self.quota.used(slot)
        return self.files.acquire(slot, lambda: blob.paths(segment, durable))

    def stop_syncing(self) -> None:
        """Any thread: the process is about to end."""
        self.syncer.stop()

    def close(self) -> None:
        """Make durable what the last seconds allow and let go of the directory."""
        self.stop_syncing()
        self.sync()
        self.files.close()
        os.close(self._lock_fd)


class NotSureError(Exception):
    """Read it whole and verify it."""


class BlobCache:
    """The segments of one blob."""

    def __init__(self, store: CacheStore, blob_id: str) -> None:
        self.store = store
        self.blob_id = blob_id
        self.path = store.folder(blob_id)
        self.foreign = ForeignBlob.find(store.path, blob_id)
        self.naming = threading.Lock()  # over which file has a segment's name
        self.used = 0.0  # when somebody last read from it here, seconds since the epoch
        self._ready: dict[bytes, bool] = {}  # key -> durable
        self._unsure: set[bytes] = set()  # not durable, and seen outside of the page cache
        self._written: dict[bytes, int] = {}  # by key, until `add`: its descriptor, -1 for what is synced
        try:
            self.path.mkdir(mode=0o700, exist_ok=True)
            self._load()
        except OSError as error:
            store.health.failed(error)  # `write` tries again

    def _load(self) -> None:
        """What an earlier process left: only what is known to be whole."""
        for entry in os.scandir(self.path):
            match = _NAME.fullmatch(entry.name)
            if match is None or not entry.is_file(follow_symlinks=False):
                continue
            key = bytes.fromhex(match[2])
            if match[3] is None:
                self._ready[key] = True
            elif match[3] == self.store.boot:
                self._ready.setdefault(key, False)
                self.store.syncer.add(self, f"{match[1]}-{match[2]}", key)
            else:
                _unlink(self.path / entry.name)
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
        if self.store.quota is not None:
            self.store.quota.gone((self.blob_id, key))

    def evicted(self, key: bytes, name: str) -> None:
        self._ready.pop(key, None)
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
                _unlink(self.path / f"{name}{ending}")

    def paths(self, segment: Segment, durable: bool) -> Iterator[Path]:
        """Where a ready segment may be."""
        name = segment.name
        yield self.path / name
        if not durable:
            yield self.path / f"{name}.{self.store.boot}"
            yield self.path / name  # it is renamed when durable

    def read_now(self, segment: Segment, offset: int, size: int) -> Plain | None:
        """Like `read`, from any thread but the event loop's: waits for the disk. None for what is not ready, too."""
        key = segment.key
        durable = self._ready.get(key)
        if durable is None:
            return None
        store = self.store
        plain = store.fresh.get((self.blob_id, key))
        if plain is not None:
            return memoryview(plain)[offset : offset + size]
        if not durable and (key in self._unsure or not store.nowait):
            return None
        file = store.acquire(self, segment, durable)
        if file is None:
            return None
        try:
            if durable:
                found = os.pread(file.fd, size, offset)
                return found if len(found) == size else None
            data = bytearray(size)
            if resident(file.fd) and os.preadv(file.fd, [data], offset, RWF_NOWAIT) == size:
                return data
            self._unsure.add(key)
            return None
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
            _unlink(self.path / name)

    def write_waits(self) -> bool:
        """Whether `write` may wait for more than the disk: kernel mounts are given notice before room is made."""
        return self.store.quota is not None and self.store.devices is not None

    def write(self, segment: Segment, plain: Plain) -> bool:
        """Keep verified bytes. False when the disk does not take them. For a worker thread; `add` follows."""
        if not self.store.health.usable():
            return False
        quota, slot, devices = self.store.quota, (self.blob_id, segment.key), self.store.devices
        must = devices is not None and devices.can_leave(self.blob_id, segment.name)
        if quota is not None and not quota.reserve(slot, segment.name, len(plain), must=must):
            return False
        try:
            self._write(segment, plain)
        except OSError as error:
            _unlink(self.path / f"{segment.name}.part")
            if quota is not None:
                quota.failed(slot)
            self.store.health.failed(error)
            return False
        finally:
            if quota is not None:
                quota.written(slot)
        self.store.health.worked()
        return True

    def _write(self, segment: Segment, plain: Plain) -> None:
        part = self.path / f"{segment.name}.part"
        devices = self.store.devices
        fd, behind = -1, self.store.syncer.full()
        try:
            if devices is not None:
                fd = devices.fill(self.blob_id, segment, plain, part)
            if fd < 0:
                fd = self._create(part)
                view = memoryview(plain)
                while view:
                    view = view[os.write(fd, view) :]
            if behind:
                os.fdatasync(fd)
            with self.naming:
                os.rename(part, self.path / f"{segment.name}.{self.store.boot}")
            if devices is not None:
                _unlink(part)  # rename(2) does nothing when both are one file already
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise
        if behind:
            os.close(fd)
        self._hold(segment.key, -1 if behind else fd)

    def _create(self, part: Path) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            return os.open(part, flags, 0o600)
        except FileNotFoundError:  # the directory was cleaned up under us
            self.path.mkdir(mode=0o700, exist_ok=True)
            return os.open(part, flags, 0o600)

    def _hold(self, key: bytes, fd: int) -> None:
        old = self._written.pop(key, -1)
        if old >= 0:
            os.close(old)
            self.store.syncer.held -= 1
        self._written[key] = fd
        self.store.syncer.held += fd >= 0

    def add(self, segment: Segment, plain: Plain | None = None) -> None:
        """From the trio thread, after `write` said True: readable from now on, durable soon. `plain`, its bytes, will
        not be changed any more."""
        fd = self._written.pop(segment.key, None)
        if fd is not None:
            self.store.syncer.held -= fd >= 0
            self.store.syncer.add(self, segment.name, segment.key, fd, synced=fd < 0)
            self.store.kick()
        self._unsure.discard(segment.key)
        if plain is not None:
            self.store.fresh.put((self.blob_id, segment.key), plain)
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


def _allocated(folder: Path) -> int:
    """Bytes of the disk that the files in it take."""
    try:
        return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in os.scandir(folder))
    except OSError:
        return 0  # none yet, or one went away: counted again at the next


def sync_folder(path: Path) -> None:
    """Names that changed are on the disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _unlink(path: Path) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass  # gone already, or the disk is in no state to care
