"""The images a daemon serves: mount, remount, umount, each all or nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import trio

from bootstrap.errors import RafsError
from nydusfs.daemon.errors import ALREADY_EXISTS, DOES_NOT_EXIST, MountFailedError
from nydusfs.daemon.handover import KeptMount
from nydusfs.daemon.mounted import KernelMounts, MountedImage, MountRequest, Opener, OpenImage
from nydusfs.daemon.process import give_back_memory
from nydusfs.drivers.fuse import FuseDriver
from nydusfs.drivers.stats import FsStats
from nydusfs.drivers.volume import MountExistsError, MountMissingError, split_mountpoint
from nydusfs.errors import NydusError
from nydusfs.profile import WINDOW as START_SECONDS

log = logging.getLogger("nydusfs.daemon")

TOGETHER = 8  # images that are opened at a time


def canonical(mountpoint: str) -> str:
    """`/a/b` for `/a//b/`. Raises `MountFailedError` for what cannot be a mountpoint."""
    try:
        parts = split_mountpoint(mountpoint)
    except ValueError as error:
        raise MountFailedError(f"invalid argument `{error}`") from None
    return "/" + b"/".join(parts).decode("utf-8", "surrogateescape")


class MountTable:
    """`changed` is called after each change, before its caller hears of it."""

    def __init__(
        self,
        driver: FuseDriver,
        opener: Opener,
        background: trio.Nursery,
        changed: Callable[[], None] = lambda: None,
        kernel_mounts: KernelMounts | None = None,
    ) -> None:
        self._kernel_mounts = kernel_mounts
        self._serving = kernel_mounts is None
        self._driver = driver
        self._driver.promise = changed
        self._changed = changed
        self._opener = opener
        self._background = background
        self._busy: dict[str, trio.Event] = {}  # mountpoints that are being changed
        self._restored: list[MountedImage] = []  # whose work behind the scenes begins when readers are served
        self.images: dict[str, MountedImage] = {}

    def get(self, mountpoint: str) -> MountedImage | None:
        try:
            return self.images.get(canonical(mountpoint))
        except MountFailedError:
            return None

    @asynccontextmanager
    async def _claim(self, mountpoint: str) -> AsyncIterator[None]:
        """One change at a time per mountpoint; the others wait for it: only then it is known whether it is mounted."""
        while mountpoint in self._busy:
            await self._busy[mountpoint].wait()
        over = self._busy[mountpoint] = trio.Event()
        try:
            yield
        finally:
            del self._busy[mountpoint]
            over.set()

    def expect(self, request: MountRequest) -> None:
        """A mount is about to be asked for. Raises `MountFailedError` for what cannot be a mountpoint."""
        where = canonical(request.mountpoint)
        if where not in self.images:
            self._opener.expect(request.at(where))

    async def mount(self, request: MountRequest, *, later: bool = False) -> MountedImage:
        """Raises `MountFailedError`; then nothing of the attempt is left. `later`: FUSE is enough for now, `attached`
        tells when the kernel's mount is there. It always is for one that nobody is to wait for: `_patiently`."""
        (found,) = await self.mount_all([request], later=later)
        if isinstance(found, MountFailedError):
            raise found
        return found

    async def attached(self, mountpoint: str) -> None:
        """Returns when an image that was mounted `later` is shown by the driver that it will have. Raises
        `MountFailedError`: no such image, or it must be EROFS and cannot be: FUSE shows it until it is umounted."""
        mounted = self.get(mountpoint)
        if mounted is None:
            raise MountFailedError(DOES_NOT_EXIST)
        if mounted.attaching is not None and mounted.patience is None:
            await mounted.attaching.wait()
        if mounted.refused:
            raise MountFailedError(mounted.refused)

    async def mount_all(
        self, requests: Sequence[MountRequest], *, later: bool = False
    ) -> list[MountedImage | MountFailedError]:
        """Each as `mount` would, but what is kept for the next worker is written once: it grows with each of them."""
        found: list[MountedImage | MountFailedError] = [MountFailedError(DOES_NOT_EXIST) for _ in requests]
        wanted: dict[int, MountRequest] = {}
        for number, request in enumerate(requests):
            try:
                wanted[number] = request.at(canonical(request.mountpoint))
            except MountFailedError as error:
                found[number] = error
        limit = trio.CapacityLimiter(TOGETHER)
        ready: dict[int, OpenImage | Exception] = {}

        async def one(number: int) -> None:
            async with limit:
                try:
                    found[number] = await self._mount(wanted[number], lambda: ready.pop(number, None), later)
                except MountFailedError as error:
                    found[number] = error

        async with AsyncExitStack() as claims:
            # sorted: two of these calls must not wait for each other
            for where in sorted({request.mountpoint for request in wanted.values()}):
                await claims.enter_async_context(self._claim(where))
            if len(requests) == 1:
                for number in wanted:
                    await one(number)  # no nursery, which wraps what it raises
            else:
                ready.update(zip(wanted, await self._opener.open_all(list(wanted.values())), strict=True))
                try:
                    async with trio.open_nursery() as nursery:
                        for number in wanted:
                            nursery.start_soon(one, number)
                finally:
                    for image in ready.values():  # that had no place
                        if not isinstance(image, Exception):
                            await image.aclose()
            mounted = [each for each in found if isinstance(each, MountedImage)]
            if mounted:
                self._changed()
            for each in mounted:
                self._start(each)
        give_back_memory()
        for each in mounted:
            log.info("Rafs filesystem mounted at %s", each.request.mountpoint)
        return found

    async def _mount(
        self, request: MountRequest, ready: Callable[[], OpenImage | Exception | None], later: bool
    ) -> MountedImage:
        """Nothing of a failure is left. `ready`: see `_open`."""
        where = request.mountpoint
        try:
            self._driver.check_free(where)
        except MountExistsError as error:
            log.error("mount at %s refused: %s", where, error)
            raise MountFailedError(ALREADY_EXISTS) from None
        mounted = await self._open(request, ready)
        metadata = mounted.image.metadata
        try:
            mounted.volume = await self._driver.mount(
                where,
                metadata,
                mounted.image.reader,
                mounted.stats,
                serve_xattrs=mounted.serve_xattrs,
                idmap=mounted.idmap,
            )
        except NydusError as error:
            await mounted.image.aclose()
            detail = ALREADY_EXISTS if isinstance(error, MountExistsError) else str(error)
            raise MountFailedError(detail) from None
        self.images[where] = mounted
        try:
            if not later:
                await self._attach(mounted)
            elif not await self._patiently(mounted):
                if self._kernel_mounts is not None:
                    await self._kernel_mounts.stand_by(request.config.fs_driver)
                mounted.attaching = trio.Event()
                self._background.start_soon(self._attach_later, mounted, mounted.attaching)
        except NydusError as error:
            del self.images[where]
            await self._driver.umount(where)
            await self._close(mounted)
            log.error("mount at %s failed: %s", where, error)
            raise MountFailedError(str(error)) from None
        return mounted

    async def remount(self, request: MountRequest) -> None:
        """Swap bootstrap and configuration of a mounted image. On failure the old one stays."""
        where = canonical(request.mountpoint)
        request = request.at(where)
        async with self._claim(where):
            old = self.images.get(where)
            if old is None:
                raise MountFailedError(DOES_NOT_EXIST)
            fresh = await self._open(request)
            await old.settled()
            await self._detach(where)
            fresh.volume = await self._driver.replace(
                where,
                fresh.image.metadata,
                fresh.image.reader,
                fresh.stats,
                serve_xattrs=fresh.serve_xattrs,
                idmap=fresh.idmap,
            )
            self.images[where] = fresh
            try:
                await self._attach(fresh)
            except NydusError as error:
                log.error("%s: it is served by FUSE", error)
            self._changed()
            self._start(fresh)
            await self._close(old)
        log.info("Rafs filesystem remounted at %s", where)

    async def umount(self, mountpoint: str) -> None:
        where = canonical(mountpoint)
        async with self._claim(where):
            mounted = self.images.get(where)
            if mounted is None:
                raise MountFailedError(DOES_NOT_EXIST)
            await mounted.settled()
            await self._detach(where)
            try:
                await self._driver.umount(where)
            except MountMissingError:
                pass  # the tree lost it already; the rest must still go
            del self.images[where]
            self._changed()
            await self._close(mounted)
            give_back_memory()
        log.info("Rafs filesystem umounted at %s", where)

    async def restore(self, images: Sequence[tuple[MountRequest, KeptMount]]) -> None:
        """Open images that an earlier worker served, under their node numbers. One that cannot be opened any more is
        logged and left out: its files answer ESTALE."""
        opened = await self._opener.reopen([request for request, _ in images])
        for (request, kept), image in zip(images, opened, strict=True):
            if isinstance(image, Exception):
                log.error("image at %s is lost: %s", request.mountpoint, image)
            else:
                await self._restore(self._mounted(request, image), kept)
                await trio.lowlevel.checkpoint()  # readers of others may be waiting

    async def _restore(self, mounted: MountedImage, kept: KeptMount) -> None:
        request = mounted.request
        mounted.mounted_ns = kept.mounted_ns
        mounted.volume = self._driver.restore(
            request.mountpoint,
            kept.index,
            kept.generation,
            mounted.image.metadata,
            mounted.image.reader,
            mounted.stats,
            serve_xattrs=mounted.serve_xattrs,
            idmap=mounted.idmap,
        )
        self.images[request.mountpoint] = mounted
        if self._kernel_mounts is not None and mounted.idmap is None:
            await self._kernel_mounts.restore(request.mountpoint, mounted.volume, mounted.image.reader)
        self._restored.append(mounted)

    async def begin(self) -> None:
        """FUSE answers, so that kernel mounts can be made for images that are there already. Raises `NydusError` when
        one that was not `restore`d must be EROFS and cannot be."""
        self._serving = True
        restored, self._restored = self._restored, []
        for mounted in restored:
            self._start(mounted)
        for mounted in list(self.images.values()):
            try:
                await self._attach(mounted)
            except NydusError as error:
                if mounted not in restored:
                    raise
                # the worker goes on: it has other images, and the next one would fare no better
                log.error("%s: it is served by FUSE", error)
                mounted.refused = str(error)

    async def _attach(self, mounted: MountedImage) -> None:
        if not await self._patiently(mounted):
            await self._attach_now(mounted)

    async def _patiently(self, mounted: MountedImage) -> bool:
        """Whether FUSE shows the image until nobody waits for data: what the kernel's mount takes is not at hand, and
        may be had later."""
        kernel_mounts, driver = self._kernel_mounts, mounted.request.config.fs_driver
        where, reader = mounted.request.mountpoint, mounted.image.reader
        if not self._serving or kernel_mounts is None or mounted.idmap is not None:
            return False
        if await kernel_mounts.at_hand(where, reader, driver, xattrs=mounted.serve_xattrs):
            return False
        await kernel_mounts.stand_by(driver)
        mounted.attaching, mounted.patience = trio.Event(), trio.CancelScope()
        self._background.start_soon(self._attach_at_rest, mounted, mounted.attaching, mounted.patience)
        return True

    async def _attach_at_rest(self, mounted: MountedImage, over: trio.Event, patience: trio.CancelScope) -> None:
        kernel_mounts = self._kernel_mounts
        assert kernel_mounts is not None
        try:
            with patience:
                await mounted.image.rest()
                await kernel_mounts.make(mounted.image.reader, xattrs=mounted.serve_xattrs)
                await self._attach_now(mounted)
        except NydusError as error:
            log.error("mount at %s: %s", mounted.request.mountpoint, error)
        finally:
            over.set()

    async def _attach_now(self, mounted: MountedImage) -> None:
        if self._serving and self._kernel_mounts is not None:
            if mounted.idmap is not None:
                # the kernel shows the owners that the image has
                if mounted.request.config.fs_driver == "erofs":
                    raise NydusError("id_mapping cannot be had with fs_driver erofs: use auto or fuse")
                log.info("%s is served by FUSE: it has an id_mapping", mounted.request.mountpoint)
                return
            xattrs = mounted.serve_xattrs
            driver = mounted.request.config.fs_driver
            where, reader = mounted.request.mountpoint, mounted.image.reader
            await self._kernel_mounts.attach(where, mounted.volume, reader, driver, xattrs=xattrs)

    async def _attach_later(self, mounted: MountedImage, over: trio.Event) -> None:
        try:
            await self._attach_now(mounted)
        except NydusError as error:
            log.error("mount at %s: %s", mounted.request.mountpoint, error)
            mounted.refused = str(error)
        finally:
            over.set()

    async def _detach(self, where: str) -> None:
        if self._kernel_mounts is not None:
            await self._kernel_mounts.detach(where)

    def kept(self) -> list[KeptMount]:
        return [mounted.kept for mounted in self.images.values()]

    async def close_all(self) -> None:
        """At the daemon's end: the kernel no longer asks."""
        for mounted in list(self.images.values()):
            await self._close(mounted)
        self.images.clear()

    async def _open(
        self, request: MountRequest, ready: Callable[[], OpenImage | Exception | None] = lambda: None
    ) -> MountedImage:
        """`ready`: takes what came of opening it already, if that was tried."""
        for path in request.prefetch_files:
            if not path.startswith("/"):
                raise MountFailedError("invalid prefetch file list")
        try:
            image = ready() or await self._opener(request)
            if isinstance(image, Exception):
                raise image
        except (NydusError, RafsError, OSError) as error:
            reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            named = request.source in reason or isinstance(error, NydusError)
            reason = reason if named else f"bootstrap {request.source}: {reason}"
            log.error("mount at %s failed: %s", request.mountpoint, reason)
            raise MountFailedError(f"RAFS failed to handle request, {reason}") from None
        return self._mounted(request, image)

    @staticmethod
    def _mounted(request: MountRequest, image: OpenImage) -> MountedImage:
        config = request.config
        stats = FsStats(
            request.mountpoint,
            files=config.iostats_files,
            access_pattern=config.access_pattern,
            latest_files=config.latest_read_files,
        )
        flags = " | ".join(str(flag.name) for flag in image.metadata.flags)
        version = image.metadata.version
        log.info("%s features: %s", "RAFS v5 super block" if version == 5 else "RAFS", flags)
        log.info("RAFS filesystem imported")
        return MountedImage(request, image, stats)

    def _start(self, mounted: MountedImage) -> None:
        # A worker that follows another one finds images that have been running for long.
        starting = time.time_ns() - mounted.mounted_ns < START_SECONDS * 10**9

        async def prefetch() -> None:
            with mounted.background:
                try:
                    await mounted.image.prefetch(starting=starting)
                except (NydusError, RafsError, OSError) as error:
                    log.warning("prefetch for %s stopped: %s", mounted.request.mountpoint, error)
                except Exception:  # groups of them too: it must cost the head start, not the worker of every mount
                    log.exception("prefetch for %s failed unexpectedly", mounted.request.mountpoint)

        self._background.start_soon(prefetch)

    async def _close(self, mounted: MountedImage) -> None:
        mounted.background.cancel()
        try:
            await mounted.image.aclose()
        except (NydusError, OSError) as error:
            log.warning("closing %s: %s", mounted.request.mountpoint, error)


def sole(values: Sequence[Any]) -> Any:
    """The only element; None when there are none or several."""
    return values[0] if len(values) == 1 else None
