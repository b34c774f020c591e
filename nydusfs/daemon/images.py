"""From a mount request to an image that can be read: the joint between the daemon and the fetching side."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Any

import trio

from bootstrap.base import Bootstrap
from nydusfs.config import LocalDiskBackend, LocalFsBackend
from nydusfs.daemon.mounts import MountRequest, OpenImage
from nydusfs.errors import NydusError
from nydusfs.image_reader import ImageReader
from nydusfs.profile import decode, export, identity
from nydusfs.services import Services, Wanted


class ReaderImage:
    """`OpenImage` over an `ImageReader`. Source, cache and scheduler belong to all images and stay."""

    def __init__(self, reader: ImageReader, prefetch_files: tuple[str, ...]) -> None:
        self.reader = reader
        self._prefetch_files = [os.fsencode(path) for path in prefetch_files]

    @property
    def metadata(self) -> Bootstrap:
        return self.reader.bootstrap

    def backend_metrics(self) -> dict[str, Any]:
        return self.reader.backend_counters.as_json()

    def cache_metrics(self) -> dict[str, Any]:
        return self.reader.cache_counters.as_json()

    async def paths(self, inodes: Collection[int]) -> dict[int, str]:
        return await trio.to_thread.run_sync(self.reader.paths_of, inodes)

    async def prefetch(self, *, starting: bool) -> None:
        async with trio.open_nursery() as nursery:
            if starting:
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
        self.reader.close()


class ImageOpener:
    """Opens need no network; reading the bootstrap and indexing its chunks happens in a worker thread."""

    def __init__(self, services: Services, mountpoint: str) -> None:
        self._services = services
        self._mountpoint = mountpoint

    async def __call__(self, request: MountRequest) -> OpenImage:
        # In a thread: a path that leads into this daemon's own mount is answered by the loop.
        await trio.to_thread.run_sync(self._refuse_own_files, request)
        reader = await self._services.open_image(request.source, request.config, name=request.mountpoint)
        return ReaderImage(reader, request.prefetch_files)

    async def reopen(self, requests: Sequence[MountRequest]) -> list[OpenImage | Exception]:
        """Images that a daemon served until now, all at once: their readers wait."""
        wanted = [Wanted(request.source, request.config, request.mountpoint) for request in requests]
        return [
            found if isinstance(found, Exception) else ReaderImage(found, request.prefetch_files)
            for request, found in zip(requests, await self._services.open_images(wanted), strict=True)
        ]

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
            resolved = os.path.realpath(path)
            if resolved == self._mountpoint or resolved.startswith(self._mountpoint.rstrip("/") + "/"):
                raise NydusError(f"{what} {path} lies below the daemon's own mountpoint {self._mountpoint}: move it")
