"""From a mount request to an image that can be read: the joint between the daemon and the fetching side."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import trio

from bootstrap.base import Bootstrap
from bootstrap.errors import RafsError
from nydusfs.config import LocalDiskBackend, LocalFsBackend
from nydusfs.courtesy import Courtesy
from nydusfs.daemon.mounted import KernelMounts, MountRequest, OpenImage, serves_xattrs
from nydusfs.errors import NydusError
from nydusfs.image_reader import ImageReader
from nydusfs.profile import decode, export, identity
from nydusfs.services import Services, Wanted

log = logging.getLogger("nydusfs.images")

EXPECTED = 30.0  # seconds that an image is kept open which was said to be mounted soon
MAX_EXPECTED = 8
# Without a reader who waits, on the node: a start is over, or goes on from the cache. And how long that is waited for:
# who reads all the time from afar leaves the processors alone.
REST, NO_REST = 1.0, 60.0


class ReaderImage:
    """`OpenImage` over an `ImageReader`. Source, cache and scheduler belong to all images and stay."""

    def __init__(
        self,
        reader: ImageReader,
        prefetch_files: tuple[str, ...],
        courtesy: Courtesy,
        kernel_mounts: KernelMounts | None = None,
    ) -> None:
        self.reader = reader
        self._courtesy = courtesy
        self._kernel_mounts = kernel_mounts
        self._prefetch_files = [os.fsencode(path) for path in prefetch_files]
        self._learning: trio.CancelScope | None = None

    def for_mount(self, request: MountRequest) -> ReaderImage:
        self._prefetch_files = [os.fsencode(path) for path in request.prefetch_files]
        return self

    async def learn(self) -> None:
        """Before it is mounted: what its start will read, as far as it is known, is fetched meanwhile."""
        with trio.CancelScope() as self._learning:
            try:
                await self.reader.learn()
            except (NydusError, RafsError, OSError) as error:
                log.warning("image %s: fetching ahead of its start stopped: %s", self.reader.name, error)
            except Exception:  # groups of them too: it must cost the head start, not the worker of every mount
                log.exception("image %s: fetching ahead of its start failed unexpectedly", self.reader.name)

    async def prepare(self, request: MountRequest, making: Any) -> None:
        """Before it is mounted, too: the kernel's mount is made, if there will be one."""
        config = request.config
        if self._kernel_mounts is not None and not config.id_mapping:
            xattrs = serves_xattrs(config, self.metadata)
            await self._kernel_mounts.prepare(self.reader, config.fs_driver, xattrs=xattrs, making=making)

    async def rest(self) -> None:
        with trio.move_on_after(NO_REST):
            await trio.sleep(REST)
            while (rested := self._courtesy.rested()) < REST:  # noqa: ASYNC110 - threads read too
                await trio.sleep(REST - rested)

    @property
    def metadata(self) -> Bootstrap:
        return self.reader.bootstrap

    def backend_metrics(self) -> dict[str, Any]:
        return self.reader.backend_counters.as_json()

    def cache_metrics(self) -> dict[str, Any]:
        return self.reader.cache_counters.as_json()

    async def paths(self, inodes: Collection[int]) -> dict[int, str]:
        return await trio.to_thread.run_sync(self.reader.failures.paths_of, inodes)

    async def prefetch(self, *, starting: bool) -> None:
        async with trio.open_nursery() as nursery:
            if starting and self._learning is None:
                nursery.start_soon(self.reader.learn)
            await self.reader.prefetch(self._prefetch_files or None)

    def blob_ids(self) -> set[str]:
        return {blob.id for blob in self.reader.bootstrap.blobs}

    async def profile(self) -> dict[str, Any]:
        """What starts of this image read, `files` in order; see `nydusfs.profile`. Raises `NydusError` without one."""
        store = self.reader.profiles
        if store is None:
            raise NydusError("this image keeps no profile: it has no cache directory, or `learn` is off")
        return await trio.to_thread.run_sync(export, self.reader.bootstrap, store)

    async def set_profile(self, value: bytes) -> None:
        """Replace it. Raises `NydusError`."""
        store = self.reader.profiles
        if store is None:
            raise NydusError("this image keeps no profile: it has no cache directory, or `learn` is off")
        try:
            profile = decode(value)
        except ValueError as error:
            raise NydusError(f"not a profile: {error}") from None
        await trio.to_thread.run_sync(store.save, identity(self.reader.bootstrap), profile)

    async def aclose(self) -> None:
        if self._learning is not None:
            self._learning.cancel()
        if self._kernel_mounts is not None:
            await self._kernel_mounts.discard(self.reader)
        self.reader.close()


@dataclass(slots=True)
class _Expected:
    request: MountRequest
    opened: trio.Event = field(default_factory=trio.Event)
    decided: trio.Event = field(default_factory=trio.Event)
    image: ReaderImage | None = None


class ImageOpener:
    """Opens need no network; reading the bootstrap and indexing its chunks happens in a worker thread."""

    def __init__(
        self, services: Services, mountpoint: str, nursery: trio.Nursery, kernel_mounts: KernelMounts | None = None
    ) -> None:
        self._services = services
        self._kernel_mounts = kernel_mounts
        self._mountpoint = mountpoint
        self._nursery = nursery
        self._expected: dict[str, _Expected] = {}  # by bootstrap

    def expect(self, request: MountRequest) -> None:
        """This image is about to be mounted: it is opened now, and what its start will read is fetched, as far as that
        is known. Between the unpacking of its metadata and the mount pass 0.1 to 0.4 s in which the link is idle."""
        if request.source not in self._expected and len(self._expected) < MAX_EXPECTED:
            expected = self._expected[request.source] = _Expected(request)
            self._nursery.start_soon(self._keep_open, expected)

    async def _keep_open(self, expected: _Expected) -> None:
        request, making = expected.request, None
        try:
            with trio.move_on_after(EXPECTED):
                making = await self._begin_image(request)
                expected.image = await self._open(request)
                expected.opened.set()
                self._nursery.start_soon(expected.image.learn)
                self._nursery.start_soon(expected.image.reader.source.greet)
                await expected.image.prepare(request, making)
                await expected.decided.wait()
        except (NydusError, RafsError, OSError) as error:
            log.info("image expected at %s cannot be opened: %s", request.mountpoint, error)
        except Exception:  # a bug must cost the head start, not the daemon
            log.exception("image expected at %s cannot be opened", request.mountpoint)
        finally:
            if making is not None:
                making.close()
            expected.opened.set()
            if self._expected.get(request.source) is expected:
                del self._expected[request.source]
            # taken away: a mount that comes in this very moment must not be given what is being closed
            image, expected.image = expected.image, None
            if image is not None:
                await image.aclose()

    async def _begin_image(self, request: MountRequest) -> Any:
        config = request.config
        if self._kernel_mounts is None or config.id_mapping or not config.cache.persistent:
            return None
        try:
            store = self._services.store(config.cache.work_dir)
        except NydusError:
            return None
        enable = config.enable_xattr
        return await self._kernel_mounts.begin_image(request.source, store, config.fs_driver, enable_xattr=enable)

    async def _as_expected(self, request: MountRequest) -> ReaderImage | None:
        expected = self._expected.pop(request.source, None)
        if expected is None:
            return None
        await expected.opened.wait()
        expected.decided.set()
        if expected.request.config != request.config:
            return None
        image, expected.image = expected.image, None
        return image.for_mount(request) if image is not None else None

    async def __call__(self, request: MountRequest) -> OpenImage:
        return await self._as_expected(request) or await self._open(request)

    async def _open(self, request: MountRequest) -> ReaderImage:
        # In a thread: a path that leads into this daemon's own mount is answered by the loop.
        await trio.to_thread.run_sync(self._refuse_own_files, request)
        reader = await self._services.open_image(request.source, request.config, name=request.mountpoint)
        return self._image(reader, request)

    async def open_all(self, requests: Sequence[MountRequest]) -> list[OpenImage | Exception]:
        def refuse() -> list[Exception | None]:
            return [_raised(self._refuse_own_files, request) for request in requests]

        refused = await trio.to_thread.run_sync(refuse)
        found: dict[int, OpenImage | Exception] = {at: error for at, error in enumerate(refused) if error is not None}
        for at, request in enumerate(requests):
            if at not in found and (image := await self._as_expected(request)) is not None:
                found[at] = image
        rest = [at for at in range(len(requests)) if at not in found]
        found.update(zip(rest, await self.reopen([requests[at] for at in rest]), strict=True))
        return [found[at] for at in range(len(requests))]

    async def reopen(self, requests: Sequence[MountRequest]) -> list[OpenImage | Exception]:
        """Images that a daemon served until now, all at once: their readers wait."""
        wanted = [Wanted(request.source, request.config, request.mountpoint) for request in requests]
        return [
            found if isinstance(found, Exception) else self._image(found, request)
            for request, found in zip(requests, await self._services.open_images(wanted), strict=True)
        ]

    def _image(self, reader: ImageReader, request: MountRequest) -> ReaderImage:
        return ReaderImage(reader, request.prefetch_files, self._services.scheduler.courtesy, self._kernel_mounts)

    def _refuse_own_files(self, request: MountRequest) -> None:
        """A cache, bootstrap or blob below the own mountpoint would have the daemon wait for itself for ever: page
        faults and file calls of the event loop are not answered by anybody else."""
        config = request.config
        paths = {"bootstrap": request.source}
        if config.cache.persistent:
            paths["device.cache.config.work_dir"] = config.cache.work_dir
        if isinstance(config.backend, LocalFsBackend):
            paths["device.backend.config.dir"] = config.backend.dir
            paths["device.backend.config.blob_file"] = config.backend.blob_file
        elif isinstance(config.backend, LocalDiskBackend):
            paths["device.backend.config.device_path"] = config.backend.device_path
        for what, path in paths.items():
            if not path:
                continue
            try:
                resolved = os.path.realpath(path)
            except ValueError as error:  # a zero byte, or half a surrogate pair
                raise NydusError(f"{what} is no path: {error}") from None
            if resolved == self._mountpoint or resolved.startswith(self._mountpoint.rstrip("/") + "/"):
                raise NydusError(f"{what} {path} lies below the daemon's own mountpoint {self._mountpoint}: move it")


def _raised(call: Callable[[MountRequest], None], request: MountRequest) -> Exception | None:
    try:
        call(request)
    except (NydusError, OSError) as error:
        return error
    return None
