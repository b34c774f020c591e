"""Which driver shows a mounted image: EROFS above FUSE, FUSE's twin above FUSE, or FUSE alone."""

from __future__ import annotations

import logging

import trio

from bootstrap.errors import RafsError
from nydusfs.daemon.mounted import KernelMounts, MountedImage
from nydusfs.drivers.fuse import FuseDriver
from nydusfs.drivers.volume import Metadata
from nydusfs.errors import NydusError

log = logging.getLogger("nydusfs.daemon")

MANY = 200_000  # inodes; of an image with more nobody looks whether they have extended attributes


class Showing:
    """`begin` when FUSE answers; before it does, `show` does nothing. Images are in FUSE's tree already."""

    def __init__(self, driver: FuseDriver, background: trio.Nursery, kernel_mounts: KernelMounts | None) -> None:
        self._driver = driver
        self._background = background
        self._kernel_mounts = kernel_mounts
        self._serving = kernel_mounts is None
        self._unbound: list[MountedImage] = []  # for the twin, if they may be, when there is time

    async def restore(self, mounted: MountedImage) -> None:
        """Known to FUSE again, as an earlier worker had it."""
        if self._kernel_mounts is not None and mounted.idmap is None:
            await self._kernel_mounts.restore(mounted.request.mountpoint, mounted.volume, mounted.image.reader)

    async def begin(self, images: list[MountedImage], restored: list[MountedImage]) -> None:
        """FUSE answers: all of `images` are shown. Raises `NydusError`."""
        self._serving = True
        for mounted in images:
            # whoever uses a restored image has its paths from how it was shown before
            if not await self._by_kernel(mounted) and mounted not in restored:
                await self._by_twin(mounted)

    async def show(self, mounted: MountedImage, *, soon: bool = False) -> None:
        """`soon`: what only makes it faster may follow. Raises `NydusError`."""
        if self._serving and not await self._by_kernel(mounted):
            if soon:
                await self._driver.need_twin()  # a supervisor gets descriptors now, not when images follow
                self._unbound.append(mounted)
            else:
                await self._by_twin(mounted)

    async def show_later(self, mounted: MountedImage) -> None:
        """`mounted.settled` tells when."""
        over = mounted.attaching = trio.Event()
        if self._kernel_mounts is not None:
            await self._kernel_mounts.stand_by(mounted.request.config.fs_driver)

        async def show() -> None:
            try:
                if self._serving and not await self._by_kernel(mounted) and self._driver.twin is not None:
                    await self._by_twin(mounted)
            except NydusError as error:
                log.error("mount at %s: %s", mounted.request.mountpoint, error)
                mounted.refused = str(error)
            finally:
                over.set()

        self._background.start_soon(show)

    def show_rest(self) -> None:
        """What is to follow, one after the other: after a reboot there may be hundreds, and containers that want the
        processor."""

        async def show() -> None:
            while self._unbound:
                mounted = self._unbound.pop(0)
                over = mounted.attaching = trio.Event()
                try:
                    await self._by_twin(mounted)
                finally:
                    over.set()

        if self._unbound:
            self._background.start_soon(show)

    async def settle(self, mounted: MountedImage) -> None:
        """How it is shown changes no more."""
        if mounted in self._unbound:
            self._unbound.remove(mounted)
        await mounted.settled()

    async def hide(self, where: str) -> None:
        """Take away what EROFS shows there; the twin goes with FUSE's own."""
        if self._kernel_mounts is not None:
            await self._kernel_mounts.detach(where)

    async def _by_kernel(self, mounted: MountedImage) -> bool:
        if self._kernel_mounts is None:
            return False
        if mounted.idmap is not None:
            # the kernel shows the owners that the image has
            if mounted.request.config.fs_driver == "erofs":
                raise NydusError("id_mapping cannot be had with fs_driver erofs: use auto or fuse")
            log.info("%s is served by FUSE: it has an id_mapping", mounted.request.mountpoint)
            return False
        where, driver = mounted.request.mountpoint, mounted.request.config.fs_driver
        reader, xattrs = mounted.image.reader, mounted.serve_xattrs
        return await self._kernel_mounts.attach(where, mounted.volume, reader, driver, xattrs=xattrs)

    async def _by_twin(self, mounted: MountedImage) -> None:
        metadata = mounted.image.metadata
        if not mounted.serve_xattrs or not await trio.to_thread.run_sync(_bears_xattrs, metadata):
            await self._driver.bind(mounted.request.mountpoint)


def _bears_xattrs(metadata: Metadata) -> bool:
    try:
        return metadata.bears_xattrs(MANY)
    except RafsError:
        return True  # who meets it is told
