"""Images as EROFS mounts: each lies on top of the directory where the FUSE driver shows the same image.

FUSE stays below for three reasons: it makes the tree of mountpoints, it serves images that cannot be EROFS mounts, and
it tells when somebody unmounts from outside. A reader never meets it where an EROFS mount is.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import trio

from bootstrap.errors import RafsError
from nydusfs.cache import CacheStore
from nydusfs.cache.devices import DeviceFiles
from nydusfs.cache.durability import resident
from nydusfs.config import FsDriver
from nydusfs.drivers import kernel, mountapi
from nydusfs.drivers.apart import apart
from nydusfs.drivers.erofs import fanotify
from nydusfs.drivers.erofs.answers import Answers
from nydusfs.drivers.erofs.disks import Disks, DiskUnsuitableError
from nydusfs.drivers.erofs.events import Events, Question
from nydusfs.drivers.erofs.filling import ErofsImage
from nydusfs.drivers.erofs.image import DeviceFile, UnsuitableError, most_devices
from nydusfs.drivers.erofs.journal import Journal
from nydusfs.drivers.erofs.maker import Making
from nydusfs.drivers.erofs.metadata import MetadataImage, check_suitable, prune
from nydusfs.drivers.erofs.prepared import PreparedMount
from nydusfs.drivers.erofs.settling import Settling
from nydusfs.drivers.fuse import InFlightInfo
from nydusfs.drivers.operations import OPCODE_READ
from nydusfs.drivers.volume import ImageVolume
from nydusfs.errors import NydusError
from nydusfs.image_reader import ImageReader
from nydusfs.keeper.jobs import Jobs
from nydusfs.keeper.link import KeeperLink

log = logging.getLogger("nydusfs.erofs")

GROUP, JOURNAL = "fanotify", "journal"  # names of held descriptors
LOOK = 0.003  # seconds between looks at who waits, after a worker's death
_T = TypeVar("_T")


class ErofsDriver:
    """`start` when images of an earlier worker are `restore`d, or the first of them; `begin` when all are and FUSE
    answers; `stop` at the end."""

    def __init__(self, mountpoint: str, link: KeeperLink | None, choice: FsDriver, jobs: Jobs) -> None:
        self._choice = choice
        self._jobs = jobs
        self._disks = Disks(choice)
        self._mountpoint = mountpoint
        self._link = link
        self._held = {} if link is None else link.held
        self._events: Events | None = None
        self._nursery: trio.Nursery
        self._images: dict[str, ErofsImage] = {}
        self._prepared: dict[ImageReader, PreparedMount] = {}
        self._ahead: set[ImageReader] = set()  # those that `prepare` was called for
        self._blobs: dict[str, list[ErofsImage]] = {}
        self._devices: dict[CacheStore, DeviceFiles] = {}
        self._opening = threading.Lock()
        self._trees: dict[CacheStore, int] = {}
        self._lock = trio.Lock()
        self._turn = trio.CancelScope()  # of who has it and makes a mount
        self._over = False
        self._grouping = trio.Lock()
        self._making = trio.Lock()  # not a process for each of a hundred images
        self._left: set[str] | None = None  # mounts of the last worker; the table is long where there are many
        self._settling = Settling(self._images, self._users, self._target)
        self._answers = Answers(self._users, self._settling)

    # -- life

    def had(self, where: str) -> bool:
        """Whether an earlier worker, whose group is here, mounted something at this path of the tree."""
        if self._left is None:
            self._left = self._mounted() if self.descriptors() else set()
        return self._target(where) in self._left

    def unknown(self) -> set[str]:
        """The caches (`device_key`) of devices that readers wait for and that are no image's yet."""
        waiting = [] if self._events is None else list(self._events.waiting.values())
        return {one.question.name.partition("/")[0] for one in waiting if not self._users(one.question.name)}

    async def asked(self, until: float) -> None:
        """Until nobody waits, somebody waits for an image that is not `restore`d, or then."""
        await trio.lowlevel.checkpoint()  # what was left of the last worker is known
        while self._events is not None and self._events.waiting and not self.unknown():
            if trio.current_time() >= until:
                break
            await trio.sleep(LOOK)

    async def caught_up(self) -> None:
        """Until those are answered who wait now."""
        if self._events is not None:
            left = set(self._events.waiting)
            while left:
                await trio.sleep(LOOK)
                left &= set() if self._events is None else self._events.waiting.keys()

    def descriptors(self) -> dict[str, int]:
        """What another process needs to go on with the mounts, by name; none where none was made."""
        if GROUP not in self._held or JOURNAL not in self._held:
            return {}
        return {name: self._held[name] for name in (GROUP, JOURNAL)}

    def adopt(self, mountpoint: str, descriptors: Mapping[str, int]) -> None:
        """Before images of another process are `restore`d: the descriptors that it gave, now this one's."""
        self._mountpoint = mountpoint
        if GROUP in descriptors and JOURNAL in descriptors:
            self._hold(descriptors[GROUP], descriptors[JOURNAL])

    async def start(self, nursery: trio.Nursery) -> None:
        """Go on with the group of an earlier worker, if there was one. Questions about images that are not `restore`d
        yet wait for `begin`."""
        self._nursery = nursery
        if self._events is None and self.descriptors():
            await self._serve()

    async def begin(self) -> None:
        """FUSE answers: paths below the mountpoint can be asked for from now on."""
        self._answers.all_known()
        mounted = await _in_thread(self._mounted)  # the table is long where there are many mounts
        for where in mounted - {self._target(image) for image in self._images}:
            log.warning("an EROFS mount at %s that nobody knows is detached", where)
            await trio.to_thread.run_sync(_umount, where)
        for store in list(self._devices):
            self._nursery.start_soon(trio.to_thread.run_sync, store.count_devices)
            self._nursery.start_soon(trio.to_thread.run_sync, store.keep_reserve)

    async def stop(self, *, successor: bool) -> None:
        """Readers that wait get EIO unless a successor answers them."""
        if self._events is not None:
            self._events.stop(successor=successor)
            for image in self._images.values():
                image.give_up()
            self._answers.end()
            self._events = None
        self._over = True
        self._turn.cancel()
        if not successor:
            async with self._lock:
                pass  # the mount that was in the making is given up, or there
            for where in list(self._images):
                image = self._forget(where)
                await trio.to_thread.run_sync(self._clean, image)
            while self._prepared:
                _, prepared = self._prepared.popitem()
                await trio.to_thread.run_sync(self._clean, prepared)

    @property
    def _group(self) -> int:
        return self._held.get(GROUP, -1)

    def _hold(self, group: int, journal: int) -> None:
        for name, fd in ((GROUP, group), (JOURNAL, journal)):
            if self._link is not None:
                self._link.hold(name, fd)
            self._held[name] = fd

    async def _serve(self) -> None:
        self._events = Events(self._group, Journal(self._held[JOURNAL]), self._answers)
        self._answers.begin(self._nursery)
        await self._nursery.start(self._events.run)
        self._nursery.start_soon(self._settling.run)

    async def _need_group(self) -> None:
        """Raises OSError."""
        async with self._grouping:
            if self._events is None:
                self._hold(fanotify.init(), Journal.create())
                await self._serve()

    async def stand_by(self, choice: FsDriver | None) -> None:
        """`descriptors` has what the mount will hang on that is about to be made. Whoever keeps them for the next
        process asks when the mount is asked for, not again when it is there."""
        if (choice or self._choice) != "fuse" and self._answers.knows_all:
            try:
                await self._need_group()
            except OSError as error:
                log.debug("no group for events: %s", error)  # `attach` tells

    # -- images

    async def at_hand(self, where: str, reader: ImageReader, choice: FsDriver | None, *, xattrs: bool) -> bool:
        """Whether the mount is worth to be waited for: it must be EROFS, or an earlier mount has left what takes long
        to make. The first start of an image would wait up to 0.3 s for that."""
        store = reader.store
        if (choice or self._choice) != "auto" or where in self._images or reader in self._prepared or store is None:
            return True
        try:
            check_suitable(reader)
            self._check_crowd()
            devices = await _in_thread(lambda: self._open_devices(store))
            metadata = await MetadataImage.of(reader, devices.images, xattrs=xattrs)
            return await _in_thread(metadata.path.exists)
        except (UnsuitableError, OSError):
            return True  # `attach` tells

    async def make(self, reader: ImageReader, *, xattrs: bool) -> None:
        """Have it `at_hand`, while nobody waits, one image after the other. What fails is left to `attach` to tell."""
        store = reader.store
        if store is None or not self._answers.knows_all:
            return
        try:
            check_suitable(reader)
            trial = self._disks.trial(store, self._nursery)
            await trial.passed()
            devices = await _in_thread(lambda: self._open_devices(store))
            metadata = await MetadataImage.of(reader, devices.images, xattrs=xattrs)
            async with self._making:
                await metadata.made_apart(self._jobs, _no_hurry, patient=True)
                await self._prune(devices)
        except (NydusError, RafsError, OSError) as error:
            log.debug("image %s is not made ready for erofs: %s", reader.name, error)

    async def attach(
        self, where: str, volume: ImageVolume, reader: ImageReader, choice: FsDriver | None, *, xattrs: bool
    ) -> None:
        """Mount an image at a path of the tree, over the volume that FUSE shows there. Raises `NydusError` if it must
        be EROFS and cannot be."""
        choice = choice or self._choice
        if choice == "fuse" or where in self._images:
            return
        async with self._making_mounts():
            if where in self._images:
                return
            try:
                await self._attach(where, volume, reader, xattrs, choice == "erofs")
                log.info("image %s: fs_driver erofs, %d devices", where, len(self._images[where].files))
            except (NydusError, RafsError, OSError) as error:
                reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
                if choice == "erofs":
                    raise NydusError(f"fs_driver erofs is not possible for {where}: {reason}") from None
                level = logging.DEBUG if isinstance(error, DiskUnsuitableError) else logging.INFO
                log.log(level, "image %s: fs_driver fuse, as erofs is not possible: %s", where, reason)

    async def detach(self, where: str) -> None:
        """Umount; waiting reads get EIO. No device, mark or mount stays, unless somebody still uses the mount."""
        if where not in self._images:
            return
        image = self._forget(where)
        await _in_thread(lambda: _umount(self._target(where)))
        image.cancel()
        await _in_thread(lambda: self._clean(image))

    async def restore(self, where: str, volume: ImageVolume, reader: ImageReader) -> None:
        """Know an image again if an earlier worker mounted it, and its group and cache are here; else `begin` detaches
        it."""
        if reader.store is None or not self.had(where):
            return
        try:
            devices = self._open_devices(reader.store)
        except OSError as error:
            log.error(
                "image %s: its kernel mount is lost: cache %s: %s", where, reader.store.path, error.strerror or error
            )
            return
        _open_caches(reader)
        self._remember(where, ErofsImage(where, volume, reader, devices, []))
        self._answers.one_more()

    async def begin_image(
        self, bootstrap: str, store: CacheStore, choice: FsDriver | None, *, enable_xattr: bool
    ) -> Making | None:
        """Before the image is opened, for `prepare`: the longest of what that waits for. To be closed."""
        if (choice or self._choice) != "erofs" or not self._answers.knows_all:
            return None  # FUSE shows it until nobody waits

        def begin() -> Making | None:
            try:
                folder = self._open_devices(store).images
            except OSError:
                return None
            return Making.begin(self._jobs, bootstrap, folder, enable_xattr=enable_xattr)

        return await _in_thread(begin)

    async def prepare(
        self, reader: ImageReader, choice: FsDriver | None, *, xattrs: bool, making: Making | None = None
    ) -> None:
        """Do now what `attach` would, if it is `at_hand`; `discard` if that does not follow. What fails is left to
        `attach` to tell."""
        if (choice or self._choice) == "fuse" or not self._answers.knows_all:
            return
        if not await self.at_hand("", reader, choice, xattrs=xattrs):
            return
        self._ahead.add(reader)
        async with self._making_mounts():
            if any(image.reader is reader for image in self._images.values()):
                return
            try:
                await self._prepare(reader, xattrs, (choice or self._choice) == "erofs", making)
            except (NydusError, RafsError, OSError) as error:
                log.debug("image %s is not made ready for erofs: %s", reader.name, error)

    async def discard(self, reader: ImageReader) -> None:
        """An image that was prepared is not mounted."""
        if reader not in self._ahead:
            return
        async with self._lock:  # it may be in the making
            self._ahead.discard(reader)
            prepared = self._prepared.pop(reader, None)
        if prepared is not None:
            await _in_thread(lambda: self._clean(prepared))

    @asynccontextmanager
    async def _making_mounts(self) -> AsyncIterator[None]:
        """One at a time; `stop` ends who is at it, and who comes later before he begins."""
        async with self._lock:
            with trio.CancelScope() as self._turn:
                if self._over:
                    self._turn.cancel()
                yield

    async def _attach(self, where: str, volume: ImageVolume, reader: ImageReader, xattrs: bool, must: bool) -> None:
        if reader not in self._prepared:
            await self._prepare(reader, xattrs, must)
        prepared = self._prepared[reader]
        try:
            if not await _in_thread(prepared.store.keep_reserve) and not must:
                raise UnsuitableError("the disk of its cache is nearly full, and the kernel reads nothing else")
        except BaseException:  # given up, too, while the mount was made, which no thread hears of
            self._prepared.pop(reader, None)  # `stop` may have had it first
            with trio.CancelScope(shield=True):
                await _in_thread(lambda: self._clean(prepared))
            raise
        image = ErofsImage(where, volume, reader, prepared.devices, prepared.files, prepared.mark)
        image.direct = prepared.direct
        self._remember(where, image)
        del self._prepared[reader]

        def attach() -> None:
            if not prepared.plain:
                image.know_files()
            prepared.attach(self._target(where))

        try:
            await _in_thread(attach)
            self._settling.changed()
        except BaseException:
            self._forget(where)
            with trio.CancelScope(shield=True):
                await _in_thread(lambda: self._clean(prepared))
            raise

    async def _prepare(self, reader: ImageReader, xattrs: bool, must: bool, making: Making | None = None) -> None:
        check_suitable(reader)
        if not must:
            self._check_crowd()
        store = reader.store
        assert store is not None
        began = time.monotonic()
        devices = await _in_thread(lambda: self._open_devices(store))
        metadata = await MetadataImage.of(reader, devices.images, xattrs=xattrs)
        prepared = self._prepared[reader] = PreparedMount(reader, devices, metadata.path, metadata.mark)
        try:
            trial = self._disks.trial(store, self._nursery)
            trial.check()

            async def listed(found: list[DeviceFile]) -> None:
                await trial.passed()
                await self._open_all(prepared, store, found)

            files = await metadata.made_apart(self._jobs, listed, making)
            await trial.passed()
            files = files if files is not None else await metadata.made_here()
            written = time.monotonic() - began
            await self._open_all(prepared, store, files)
            self._nursery.start_soon(self._prune, devices)
            await _in_thread(lambda: prepared.make(self._tree(store, devices), self._group))
            log.info(
                "image %s: %d devices for erofs: %.3f s for the metadata image, %.3f for files, %.3f for the mount",
                *(reader.name, len(files), written, *prepared.seconds),
            )
        except BaseException:
            self._prepared.pop(reader, None)  # `stop` may have had it first
            with trio.CancelScope(shield=True):
                await _in_thread(lambda: self._clean(prepared))
            raise

    async def _prune(self, devices: DeviceFiles) -> None:
        """Metadata images that no mount uses."""
        mounts: list[ErofsImage | PreparedMount] = [*self._images.values(), *self._prepared.values()]
        users = [one for one in mounts if one.devices is devices]
        try:
            await _in_thread(lambda: prune(devices.images, lambda: set().union(*(one.image_names() for one in users))))
        except (OSError, ValueError) as error:  # one was unmounted meanwhile, and its bootstrap closed
            log.debug("metadata images in %s are not looked through: %s", devices.images, error)

    async def _open_all(self, prepared: PreparedMount, store: CacheStore, files: list[DeviceFile]) -> None:
        await self._need_group()
        _open_caches(prepared.reader)
        await _in_thread(
            lambda: prepared.open_devices(files, self._tree(store, prepared.devices), self._group)
        )

    def _open_devices(self, store: CacheStore) -> DeviceFiles:
        """From any thread. Raises OSError."""
        with self._opening:
            devices = self._devices.get(store)
            if devices is None:
                devices = self._devices[store] = DeviceFiles(store.path, store.boot, self)
                store.devices = devices
            return devices

    def _tree(self, store: CacheStore, devices: DeviceFiles) -> int:
        if store not in self._trees:
            tree = mountapi.clone_tree(devices.root)
            fanotify.mark_mount(self._group, tree)
            self._trees[store] = tree
        return self._trees[store]

    def _target(self, where: str) -> str:
        return self._mountpoint.rstrip("/") + where.rstrip("/")

    def _mounted(self) -> set[str]:
        """Where EROFS mounts are, at and below the mountpoint."""
        below = self._mountpoint.rstrip("/") + "/"
        return {
            entry.mountpoint
            for entry in kernel.mounts()
            if entry.fstype == "erofs" and (entry.mountpoint == self._mountpoint or entry.mountpoint.startswith(below))
        }

    def _remember(self, where: str, image: ErofsImage) -> None:
        self._images[where] = image
        for key in image.keys:
            self._blobs.setdefault(key, []).append(image)

    def _forget(self, where: str) -> ErofsImage:
        image = self._images.pop(where)
        for key in image.keys:
            self._blobs[key].remove(image)
            if not self._blobs[key]:
                del self._blobs[key]
        return image

    def _check_crowd(self) -> None:
        """Raises `UnsuitableError` where kernel mounts have as many devices as this machine's memory should hold. Those
        of an earlier worker count when they are known: to find out takes a look at each one's whole metadata."""
        held, most = sum(len(image.files) for image in self._images.values()), most_devices()
        if held >= most:
            raise UnsuitableError(f"kernel mounts have {held} devices, and this machine's memory is for {most}")

    def _clean(self, gone: ErofsImage | PreparedMount) -> None:
        """Delete the devices that no other mount of this cache has."""
        if isinstance(gone, PreparedMount):
            gone.close()
        kept = set[tuple[str, str]]()
        others: list[ErofsImage | PreparedMount] = [*self._images.values(), *self._prepared.values()]
        for other in others:
            if other.devices is gone.devices and not other.blob_ids.isdisjoint(gone.blob_ids):
                kept |= other.names()
        for blob_id, name in gone.names() - kept:
            gone.devices.remove(blob_id, name)
        if not any(other.devices is gone.devices for other in others):
            gone.devices.reserve.let_go()

    # -- readers who wait

    def inflight(self) -> list[InFlightInfo]:
        """Readers who wait for data, as FUSE's list has them."""
        if self._events is None:
            return []
        found = []
        for number, (question, _, _) in list(self._events.waiting.items()):
            image = next(iter(self._users(question.name)), None)
            node = 0
            if image is not None:
                node = image.volume.base | (image.file_at(question)[0] or image.volume.root_ino)
            found.append(InFlightInfo(node, OPCODE_READ, number, question.began))
        return found

    def _users(self, device: str) -> tuple[ErofsImage, ...]:
        return tuple(self._blobs.get(device.rpartition("/")[0], ()))

    # -- what devices tell (`cache.devices.Driver`)

    def filled(self, device: str, fd: int, size: int) -> None:
        """Who waits for it goes on."""
        events = self._events
        if events is None:
            return
        image = next(iter(self._users(device)), None)
        if image is not None:
            keep = image.devices.leaving.keep

            def complete(question: Question) -> bool:
                own = fd if question.fd < 0 else question.fd
                try:
                    found = os.fstat(own).st_size if keep(device) else 0
                    return found >= size and resident(own, found)
                except OSError:
                    return False  # it was answered meanwhile, and its descriptor closed

            events.filled(device, complete)

    def durable(self, device: str, fd: int) -> None:
        self._settling.durable(device, fd)

    def mounted(self, blob: str) -> bool:
        made = list(self._prepared.values())
        return blob in self._blobs or any(blob.partition("/")[2] in one.blob_ids for one in made)

    def quiet(self, fd: int) -> None:
        fanotify.ignore(self._group, fd)

    def ask(self, path: Path) -> int:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            # For mounts of a daemon that is gone, whose mark went with it. What we do to the file ourselves is then
            # announced too, and allowed at once.
            fanotify.mark_inode(self._group, fd)
            fanotify.heed(self._group, fd)
        except OSError:
            os.close(fd)
            raise
        return fd


def _open_caches(reader: ImageReader) -> None:
    """Look into the cache's directories, which only the trio thread may."""
    for blob in reader.bootstrap.blobs:
        reader.cache(blob)


def _umount(where: str) -> None:
    apart(lambda: kernel.umount_detach(where), keep=-1)


async def _no_hurry(found: list[DeviceFile]) -> None:
    """Of an image in the making."""


async def _in_thread(work: Callable[[], _T]) -> _T:
    return await trio.to_thread.run_sync(work)
