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

import ctypes
import errno
import fcntl
import logging
import os
import re
import threading
import time
from pathlib import Path

import trio

from nydusfs.cache.devices import DeviceFiles
from nydusfs.cache.foreign import FOREIGN_SUFFIXES, ForeignBlob
from nydusfs.cache.openfiles import OpenFile, OpenFiles
from nydusfs.cache.quota import Limit, Quota
from nydusfs.errors import CacheError
from nydusfs.segments import KEY_SIZE, Segment

log = logging.getLogger("nydusfs.cache")

SYNC_DELAY = 1.0  # seconds a finished segment may wait to be made durable: one journal commit then serves many
CLOSE_SECONDS = 2.0  # for the last batch when the daemon ends; under disk load one fdatasync takes seconds
FULL_PAUSE = 1.0  # seconds without attempts to write after the disk was found full
MAX_SIDE_STORES = 64
INLINE_READ = 128 * 1024  # bytes; larger reads wait for the disk in a thread
SLOW_DISK = 0.001  # seconds a read may keep the loop, on average
SLOW_PAUSE = 5.0  # seconds without such reads after the disk was found slow
SEGMENTS_SUFFIX = ".segments"
MAX_MAPS = 1024  # derived chunk maps (12 bytes per chunk) and tables of blobs (1 to 4 % of a gzip layer) kept
_NAME = re.compile(rf"([0-9]{{1,12}})-([0-9a-f]{{{KEY_SIZE * 2}}})(?:\.([0-9a-z]+))?")
_RWF_NOWAIT = getattr(os, "RWF_NOWAIT", 0)


def boot_id() -> str:
    """Of this boot of the kernel; 8 hex digits are enough to tell it from the last. Where it is not known, one that no
    other process has: what was not durable is then fetched again."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", "")[:8]
    except OSError:
        return os.urandom(4).hex()


class _Disk:
    """Whether to wait for the disk on the loop: with a fast one that is shorter than the way to a thread and back.

    On a busy machine with two cores, random 4 KiB reads of a cached file went from 650 to 4,000 a second.
    """

    def __init__(self) -> None:
        self._mean = 0.0  # seconds, over about the last 8 reads
        self._thread_until = 0.0

    def fast(self) -> bool:
        return time.monotonic() >= self._thread_until

    def took(self, seconds: float) -> None:
        self._mean += (seconds - self._mean) / 8
        if self._mean > SLOW_DISK:
            self._mean = 0.0
            self._thread_until = time.monotonic() + SLOW_PAUSE


class CacheStore:
    """Open with `CacheStore(work_dir)`, run `sync_forever` in a nursery, `close` at the end.

    Raises `CacheError` when the directory cannot be made or written. Methods belong to the trio thread, except
    `BlobCache.write`, which is made for a worker thread.
    """

    def __init__(self, work_dir: str | os.PathLike[str], *, boot: str | None = None) -> None:
        self.boot = boot or boot_id()
        self.path, self._lock_fd = _claim(Path(work_dir))
        self.files = OpenFiles()
        self._blobs: dict[str, BlobCache] = {}
        self._pending: list[tuple[BlobCache, str, bytes]] = []
        self._pending_lock = threading.Lock()
        self._wake = trio.Event()
        self._full_until = 0.0
        self._full = False
        self._sync_until = float("inf")
        self.devices: DeviceFiles | None = None  # segment files that kernel mounts have as devices
        self.nowait = bool(_RWF_NOWAIT)
        self.quota: Quota | None = None
        self.disk = _Disk()

    def set_limit(self, limit: Limit) -> None:
        """From now on; what is too much goes at once. For a worker thread: it looks at every file."""
        if self.quota is not None:
            self.quota.limit = limit
        elif limit.size or limit.floor:
            quota = Quota(self.path, limit, self._evict)
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
        if self.quota is not None:
            self.quota.trim()

    def _evict(self, slot: tuple[str, bytes], name: str) -> None:
        blob_id, key = slot
        blob = self._blobs.get(blob_id)
        if blob is not None:
            blob.evicted(key)
        self.files.drop((blob_id, key))
        folder = blob.path if blob is not None else self.folder(blob_id)
        for ending in (f".{self.boot}", ""):  # in this order: `sync` may rename the first to the second meanwhile
            _unlink(folder / f"{name}{ending}")

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
        if cache is not None and cache.foreign is not None:
            cache.foreign.close()
        if names:
            log.info("cache %s: blob %s removed, %d segments", self.path, blob_id, len(names))

    def map_path(self, name: str) -> str:
        """Where to keep a derived chunk map of that name; the ones used longest ago make room. For a worker thread."""
        folder = self.path / ".maps"
        try:
            try:
                os.utime(folder / name)
                return str(folder / name)
            except FileNotFoundError:
                folder.mkdir(mode=0o700, exist_ok=True)
                (folder / name).touch(mode=0o600)
            if len(os.listdir(folder)) > MAX_MAPS:
                maps = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
                for path in maps[:-MAX_MAPS]:
                    _unlink(path)
        except FileNotFoundError:
            pass  # another image's map was renamed into place this instant
        except OSError as error:
            raise CacheError(f"cache {self.path}: {_reason(error)}") from None
        return str(folder / name)

    # Durability

    def _finished(self, blob: BlobCache, name: str, key: bytes) -> None:
        with self._pending_lock:
            self._pending.append((blob, name, key))

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
        """fdatasync everything finished, then give it its final name. For a worker thread.

        After `stop_syncing` a batch under way ends at the next file; the rest keeps the name that is good until the
        next boot.
        """
        with self._pending_lock:
            batch, self._pending = self._pending, []
        opened: list[tuple[BlobCache, str, bytes, int]] = []
        for blob, name, key in batch:
            if time.monotonic() >= self._sync_until:
                break
            try:
                fd = os.open(blob.path / f"{name}.{self.boot}", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue  # evicted, or the directory was removed: nothing to make durable
            opened.append((blob, name, key, fd))
            # Start the write-out of this one while the next is opened: the first fdatasync below then commits the
            # journal for all of them.
            _start_writeout(fd)
            if len(opened) >= 64:
                self._commit(opened)
                opened = []
        self._commit(opened)

    def _commit(self, opened: list[tuple[BlobCache, str, bytes, int]]) -> None:
        for blob, name, key, fd in opened:
            try:
                if time.monotonic() >= self._sync_until:
                    continue
                os.fdatasync(fd)
                os.rename(blob.path / f"{name}.{self.boot}", blob.path / name)
                blob.durable(key)
            except FileNotFoundError:
                pass  # evicted meanwhile
            except OSError as error:
                log.warning("cache %s: segment %s is dropped, it cannot be made durable: %s", blob.path, name, error)
                blob.lost(name, key)
            finally:
                os.close(fd)

    # Full disks

    def may_write(self) -> bool:
        return time.monotonic() >= self._full_until

    def note_write(self, error: OSError | None) -> None:
        """From the writing thread: one warning when writing stops working, one line when it works again."""
        if error is None:
            if self._full:
                self._full = False
                log.info("cache %s can be written again", self.path)
            return
        self._full_until = time.monotonic() + FULL_PAUSE
        if not self._full:
            self._full = True
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "is full" if full else f"cannot be written ({_reason(error)})"
            log.warning("cache %s %s: data is served without being kept until there is room again", self.path, what)

    # Descriptors

    def acquire(self, blob: BlobCache, key: bytes, names: tuple[str, ...]) -> OpenFile | None:
        """An open segment file, to be given back to `files`; None when there is none. From any thread."""
        slot = (blob.blob_id, key)
        if self.quota is not None:
            self.quota.used(slot)
        return self.files.acquire(slot, (blob.path / name for name in names))

    def stop_syncing(self) -> None:
        """Any thread: the process is about to end and has `CLOSE_SECONDS` left for its last batches."""
        self._sync_until = min(self._sync_until, time.monotonic() + CLOSE_SECONDS)

    def close(self) -> None:
        """Make durable what `CLOSE_SECONDS` allow and let go of the directory."""
        self.stop_syncing()
        self.sync()
        self.files.close()
        os.close(self._lock_fd)


class BlobCache:
    """The segments of one blob."""

    def __init__(self, store: CacheStore, blob_id: str) -> None:
        self.store = store
        self.blob_id = blob_id
        self.path = store.folder(blob_id)
        self.foreign = ForeignBlob.find(store.path, blob_id)
        self._ready: dict[bytes, bool] = {}  # key -> durable
        try:
            self.path.mkdir(mode=0o700, exist_ok=True)
            self._load()
        except OSError as error:
            store.note_write(error)  # full, most likely: `write` tries again

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
                self.store._finished(self, f"{match[1]}-{match[2]}", key)
            else:
                _unlink(self.path / entry.name)
        if not all(self._ready.values()):
            self.store.kick()

    def __contains__(self, key: bytes) -> bool:
        return key in self._ready

    def __len__(self) -> int:
        return len(self._ready)

    def durable(self, key: bytes) -> None:
        if key in self._ready:
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

    def evicted(self, key: bytes) -> None:
        self._ready.pop(key, None)

    def lost(self, name: str, key: bytes) -> None:
        """The disk did not take it: what the page cache still has may turn into what the disk has, any moment.

        The file is emptied, so that whoever has it open, a kernel mount too, gets an error and never zeros.
        """
        self.forget(key)
        self.store.files.drop((self.blob_id, key))
        for ending in ("", f".{self.store.boot}"):
            try:
                os.truncate(self.path / f"{name}{ending}", 0)
            except OSError:
                pass  # not there, or a disk in no state to do it
            _unlink(self.path / f"{name}{ending}")

    def read_now(self, segment: Segment, offset: int, size: int) -> bytearray | None:
        """Like `read`, from any thread but the event loop's: waits for the disk."""
        key, name = segment.key, segment.name
        file = self.store.acquire(self, key, (name, f"{name}.{self.store.boot}", name))
        if file is None:
            return None
        data = bytearray(size)
        try:
            return data if os.preadv(file.fd, [data], offset) == size else None
        except OSError:
            return None  # `read` says why
        finally:
            self.store.files.release(file)

    async def read(self, segment: Segment, offset: int, size: int) -> bytearray | None:
        """Bytes of a ready segment; None when its file is gone or short, which makes the segment absent."""
        key = segment.key
        name = segment.name
        names = (name,) if self._ready.get(key) else (name, f"{name}.{self.store.boot}", name)
        file = self.store.acquire(self, key, names)
        if file is None:
            self.forget(key)
            return None
        data = bytearray(size)
        try:
            got = -1
            if self.store.nowait:
                try:
                    got = os.preadv(file.fd, [data], offset, _RWF_NOWAIT)
                except BlockingIOError:
                    pass  # not in the page cache: let a thread wait for the disk
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                        raise
                    self.store.nowait = False
            if got != size:
                if size <= INLINE_READ and self.store.disk.fast():
                    began = time.perf_counter()
                    got = os.preadv(file.fd, [data], offset)
                    self.store.disk.took(time.perf_counter() - began)
                else:
                    got = await trio.to_thread.run_sync(os.preadv, file.fd, [data], offset)
        except OSError as error:
            log.warning("cache %s/%s cannot be read (%s), it is fetched again", self.path, name, _reason(error))
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

    def write(self, segment: Segment, plain: bytearray) -> bool:
        """Keep verified bytes. False when the disk does not take them. For a worker thread; `add` follows."""
        if not self.store.may_write():
            return False
        quota, slot = self.store.quota, (self.blob_id, segment.key)
        if quota is not None and not quota.reserve(slot, segment.name, len(plain)):
            return False
        try:
            return self._write(segment, plain)
        finally:
            if quota is not None:
                quota.written(slot)

    def _write(self, segment: Segment, plain: bytearray) -> bool:
        part = self.path / f"{segment.name}.part"
        devices = self.store.devices
        try:
            ready = self.path / f"{segment.name}.{self.store.boot}"
            if devices is not None and devices.fill(self.blob_id, segment, plain, ready):
                self.store.note_write(None)
                return True
            try:
                fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:  # the directory was cleaned up under us
                self.path.mkdir(mode=0o700, exist_ok=True)
                fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                view = memoryview(plain)
                while view:
                    view = view[os.write(fd, view) :]
            finally:
                os.close(fd)
            os.rename(part, ready)
        except OSError as error:
            _unlink(part)
            if self.store.quota is not None:
                self.store.quota.gone((self.blob_id, segment.key))
            self.store.note_write(error)
            return False
        self.store.note_write(None)
        return True

    def add(self, segment: Segment) -> None:
        """From the trio thread, after `write` said True: readable from now on, durable soon."""
        if segment.key not in self._ready:
            self._ready[segment.key] = False
            self.store._finished(self, segment.name, segment.key)
            self.store.kick()


def _claim(work_dir: Path) -> tuple[Path, int]:
    """The directory to use and its lock: `work_dir`, or the first free `worker-N` below it."""
    last: OSError | None = None
    for number in range(1, MAX_SIDE_STORES + 1):
        path = work_dir if number == 1 else work_dir / f".worker-{number}"
        fd = -1
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            last = error
            continue
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise CacheError(f"cache {path} cannot be used: {_reason(error)}") from None
        if number > 1:
            log.warning("cache %s is in use by another process: using %s, nothing is shared", work_dir, path)
        return path, fd
    raise CacheError(f"cache {work_dir} is in use by {MAX_SIDE_STORES} processes already ({last})")


def _unlink(path: Path) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass  # gone already, or the disk is in no state to care


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


_libc = ctypes.CDLL(None, use_errno=True)
_SYNC_FILE_RANGE_WRITE = 2


def _start_writeout(fd: int) -> None:
    """sync_file_range(2) on the whole file, without waiting. A failure only costs time: fdatasync follows."""
    try:
        _libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)
    except AttributeError:
        pass  # a libc without it
