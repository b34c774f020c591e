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

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import trio

from nydusfs.cache.blob import BlobCache
from nydusfs.cache.claim import claim
from nydusfs.cache.devices import DeviceFiles, remove_devices
from nydusfs.cache.durability import RWF_NOWAIT, Syncer
from nydusfs.cache.foreign import FOREIGN_SUFFIXES
from nydusfs.cache.fresh import Fresh
from nydusfs.cache.health import LEAST_ROOM, Health, Speed
from nydusfs.cache.leaving import GRACE
from nydusfs.cache.maps import map_path
from nydusfs.cache.names import NAME, SEGMENTS_SUFFIX, unlink
from nydusfs.cache.openfiles import OpenFile, OpenFiles
from nydusfs.cache.quota import Limit, Quota, Slot
from nydusfs.cache.reserve import RESERVE, has_room
from nydusfs.cache.spread import spread
from nydusfs.errors import CacheError
from nydusfs.hands import Hands
from nydusfs.segments import Segment

log = logging.getLogger("nydusfs.cache")

SYNC_DELAY = 1.0  # seconds a finished segment may wait to be made durable: one journal commit then serves many


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

    def __init__(
        self, work_dir: str | os.PathLike[str], *, boot: str | None = None, claims: Mapping[str, int] | None = None
    ) -> None:
        """`claims`: see `claim`."""
        self.boot = boot or boot_id()
        self.path, self.claim = claim(Path(work_dir), claims or {})
        spread(self.path)
        self.files = OpenFiles()
        self.fresh = Fresh()
        self._blobs: dict[str, BlobCache] = {}
        self._opening = threading.Lock()  # over new ones
        self.syncer = Syncer(self.boot)
        self._wake = trio.Event()
        self._token: trio.lowlevel.TrioToken | None = None  # while `sync_forever` runs
        self.devices: DeviceFiles | None = None  # segment files that kernel mounts have as devices
        self.nowait = bool(RWF_NOWAIT)
        self.quota: Quota | None = None
        self._counting = threading.Lock()  # over who looks at all files
        self.disk = Speed()
        self.health = Health(self.path)

    def set_limit(self, limit: Limit) -> None:
        """From now on; what is too much goes at once. For a worker thread: it looks at every file."""
        with self._counting:  # a second count would not know what is written under the first
            if self.quota is not None:
                self.quota.limit = limit
            elif limit.size or limit.floor:
                self.quota = self._counted(limit, lambda slot, _: self.files.in_use(slot))
        self.count_beside()
        if self.quota is not None:
            if limit.size and self.devices is not None:
                self.devices.reserve.let_go()  # all that mounts have can go from now on
            self.quota.trim()

    def _counted(self, limit: Limit, held: Callable[[Slot, str], bool]) -> Quota:
        quota = Quota(self.path, limit, self._evict, self._give_notice, held)
        for folder in os.scandir(self.path):
            if folder.name.startswith(".") or not folder.is_dir(follow_symlinks=False):
                continue
            blob_id = folder.name.removesuffix(SEGMENTS_SUFFIX)
            for path, match in _segment_files(folder.path):
                name, key = f"{match[1]}-{match[2]}", bytes.fromhex(match[2])
                if match[3] in (None, self.boot) and (facts := _facts(path, f"{folder.path}/{name}")) is not None:
                    quota.found((blob_id, key), name, facts.st_size, max(facts.st_atime, facts.st_mtime))
        return quota

    def count_devices(self) -> None:
        """What workers left that died before they linked a device: it counts like all else, and can go. For a worker
        thread."""
        if self.quota is None or self.devices is None:
            return
        try:
            for blob_id, name, facts in self.devices.alone():
                if match := NAME.fullmatch(name):
                    slot = blob_id, bytes.fromhex(match[2])
                    self.quota.found(slot, name, facts.st_size, facts.st_mtime)
        except OSError as error:  # a mount goes meanwhile, and its devices with it
            log.debug("cache %s: devices are not counted: %s", self.path, error.strerror)

    def make_room(self, size: int) -> bool:
        """The disk is full and so many bytes must be written: what was used longest ago goes, also where the cache has
        no limit, or else something of the reserve. False when nothing can go. For a worker thread."""
        with self._counting:
            try:
                if has_room(self.path, size + LEAST_ROOM // 4):
                    return True  # somebody made it meanwhile
                # All files are looked at, so that is not done for a single segment.
                freed = (self.quota or self._counted(Limit(), self._stays)).free(max(size, LEAST_ROOM))
                given = 0 if self.devices is None or freed >= size else self.devices.reserve.give(LEAST_ROOM)
            except OSError as error:
                log.error("cache %s: no room can be made: %s", self.path, error.strerror)
                return False
        what = f"{freed} bytes that nobody read" + (f" and {given} of the reserve" if given else "")
        log.info("cache %s is full: %s went for what a kernel mount waits for", self.path, what)
        return freed + given > 0

    def _stays(self, slot: Slot, name: str) -> bool:
        """Whether it is read now, or its room would not be free without it: kernel mounts have it open."""
        if self.files.in_use(slot) or self.devices is None:
            return self.files.in_use(slot)
        return self.devices.mounted(slot[0]) and not self.devices.can_leave(slot[0], name)

    def count_beside(self) -> None:
        """Have the limit know what files that are no segments take, after one was made. For a worker thread."""
        if self.quota is not None:
            self.quota.beside = sum(_allocated(self.path / name) for name in (".maps", ".erofs/images"))

    def keep_reserve(self) -> bool:
        """A kernel mount is to be made: whether its readers will get what they wait for when the disk is full. For a
        worker thread."""
        if self.devices is None or (self.quota is not None and self.quota.limit.size):
            return True
        return self.devices.reserve.keep()

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
            unlink(folder / f"{name}{ending}")

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
        for slot in list(taken):
            with devices.naming:
                if devices.can_leave(slot[0], segments[slot]):
                    self._delete(slot, segments[slot])
                    continue
            taken.remove(slot)  # meanwhile a mount was made that has it by its plain path
            devices.spare(slot[0], segments[slot])
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
        """The cache of a blob, one object for all mounts; from any thread. Raises `CacheError` for an id that is no
        file name."""
        if (known := self._blobs.get(blob_id)) is not None:
            return known
        if blob_id.startswith(".") or "/" in blob_id:
            raise CacheError(f"cache {self.path}: blob id {blob_id!r} is not usable as a directory name")
        with self._opening:
            if blob_id not in self._blobs:
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
            match = NAME.fullmatch(name)
            if match is not None:
                key = bytes.fromhex(match[2])
                self.files.drop((blob_id, key))
                if self.quota is not None:
                    self.quota.gone((blob_id, key))
            unlink(folder / name)
        try:
            folder.rmdir()
        except OSError:
            pass  # not there, or not empty: what is not ours stays
        for ending in FOREIGN_SUFFIXES:
            unlink(self.path / f"{blob_id}{ending}")
        unlink(self.path / blob_id)
        for name in remove_devices(self.path, self.boot, blob_id):
            if self.quota is not None and (match := NAME.fullmatch(name)) is not None:
                self.quota.gone((blob_id, bytes.fromhex(match[2])))  # it may have been there alone
        if cache is not None:
            cache.abandon()
        if names:
            log.info("cache %s: blob %s removed, %d segments", self.path, blob_id, len(names))

    def map_path(self, name: str) -> str | None:
        """Where to keep a derived chunk map of that name, see `maps`."""
        return map_path(self.path / ".maps", name, self.health)

    # Durability

    def kick(self) -> None:
        """Tell `sync_forever` that there is something to do. From any thread, which wakes the loop once a second."""
        if self._wake.is_set():
            return
        if self._token is None:
            self._wake.set()
            return
        try:
            self._token.run_sync_soon(self._woken)
        except trio.RunFinishedError:
            pass  # what is left is the next process's

    def _woken(self) -> None:
        self._wake.set()

    async def sync_forever(self) -> None:
        """Make finished segments durable in batches, until cancelled; what is left then is the next process's."""
        self._token = trio.lowlevel.current_trio_token()
        while True:
            await self._wake.wait()
            await trio.sleep(SYNC_DELAY)
            self._wake = trio.Event()
            await trio.to_thread.run_sync(self.sync)

    def sync(self) -> None:
        """Make what is finished durable. For a worker thread."""
        self.syncer.sync()
        if self.devices is not None:
            self.devices.reserve.refill()
        else:  # of processes that were killed
            unlink(self.path / RESERVE)

    # Descriptors

    def acquire(self, blob: BlobCache, segment: Segment, durable: bool, hands: Hands | None = None) -> OpenFile | None:
        """An open segment file, to be given back to `files`; None when there is none. From any thread."""
        slot = (blob.blob_id, segment.key)
        blob.used = time.time()
        if self.quota is not None:
            self.quota.used(slot)
        return self.files.again(slot) or self.files.acquire(slot, lambda: blob.paths(segment, durable), hands)

    def stop_syncing(self) -> None:
        """Any thread: the process is about to end."""
        self.syncer.stop()

    def close(self) -> None:
        """Make durable what the last seconds allow and let go of the directory."""
        self.stop_syncing()
        self.sync()
        for blob in self._blobs.values():
            blob.abandon()
        self.files.close()
        os.close(self.claim)


def _segment_files(folder: str) -> list[tuple[str, re.Match[str]]]:
    """None of a folder that goes meanwhile. Raises OSError."""
    try:
        return [(entry.path, match) for entry in os.scandir(folder) if (match := NAME.fullmatch(entry.name))]
    except FileNotFoundError:
        return []


def _facts(path: str, durable: str) -> os.stat_result | None:
    """Of a segment's file, which may get its durable name this moment; None: it went. Raises OSError."""
    for name in (path, durable):
        try:
            return os.lstat(name)
        except FileNotFoundError:
            continue
    return None


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
