"""From a mount request to an image that can be read: the joint between the daemon and the fetching side."""

from __future__ import annotations

import os
from typing import Any

from bootstrap.base import Bootstrap
from nydusfs.daemon.mounts import MountRequest, OpenImage
from nydusfs.image_reader import ImageReader
from nydusfs.services import Services


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

    async def prefetch(self) -> None:
        await self.reader.prefetch(self._prefetch_files or None)

    async def aclose(self) -> None:
        self.reader.close()


class ImageOpener:
    """Opens need no network; reading the bootstrap and indexing its chunks happens in a worker thread."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def __call__(self, request: MountRequest) -> OpenImage:
        reader = await self._services.open_image(request.source, request.config, name=request.mountpoint)
        return ReaderImage(reader, request.prefetch_files)
