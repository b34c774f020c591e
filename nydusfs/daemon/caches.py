"""Caches of a daemon at work, as `nydusctl cache` sees and changes them."""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import trio

from bootstrap.base import HOLE
from bootstrap.errors import RafsError
from nydusfs.cache import CacheStore, outside
from nydusfs.daemon.mounted import MountedImage
from nydusfs.daemon.mounts import MountTable
from nydusfs.drivers.fuse import FuseDriver
from nydusfs.errors import CacheError
from nydusfs.image_reader import ImageReader
from nydusfs.segments import Segment
from nydusfs.services import Services

log = logging.getLogger("nydusfs.daemon")

_REGULAR = 8  # DT_REG


class Caches:
    """Belongs to the trio thread."""

    def __init__(self, services: Services, mounts: MountTable, driver: FuseDriver) -> None:
        self._services = services
        self._mounts = mounts
        self._driver = driver

    def report(self) -> dict[str, Any]:
        """Stores of this process, and the mounted images with the blobs they read from."""
        return {
            "stores": [outside.report(store) for store in self._services.stores()],
            "images": [
                {
                    "mountpoint": where,
                    "source": os.path.abspath(mounted.request.source),
                    "blobs": sorted(mounted.image.blob_ids()),
                }
                for where, mounted in self._mounts.images.items()
            ],
        }

    async def drop(self, path: str, blob_id: str, names: Sequence[str], *, damaged: bool) -> dict[str, Any]:
        """Delete segments. `damaged`: what the kernel has of the files they are parts of goes as well. Raises
        `CacheError`."""
        store = self._store(path)
        blob = store.blob(blob_id)
        gone = await trio.to_thread.run_sync(partial(outside.drop, store, blob, names, damaged=damaged))
        if damaged and gone:
            log.warning("cache %s: %d damaged segments of blob %s were deleted: they are fetched again",
                        store.path, len(gone), blob_id)  # fmt: skip
            for mounted in list(self._mounts.images.values()):
                await self._forget_pages(mounted, blob_id, gone)
        return {"dropped": gone}

    async def adopt(self, path: str, blob_id: str, names: Sequence[str], staged: str) -> dict[str, Any]:
        """Take verified segments over from a staging directory below the store. Raises `CacheError`."""
        store = self._store(path)
        blob = store.blob(blob_id)
        taken, why = await trio.to_thread.run_sync(outside.adopt, store, blob, names, staged)
        return {"adopted": taken, "refused": why}

    def _store(self, path: str) -> CacheStore:
        wanted = os.path.realpath(path)
        for store in self._services.stores():
            if os.path.realpath(store.path) == wanted:
                return store
        raise CacheError(f"cache {path} is not one of this nydusd")

    async def _forget_pages(self, mounted: MountedImage, blob_id: str, names: Sequence[str]) -> None:
        reader = getattr(mounted.image, "reader", None)
        if not isinstance(reader, ImageReader) or blob_id not in mounted.image.blob_ids():
            return
        try:
            inodes = await trio.to_thread.run_sync(files_of, reader, blob_id, names)
        except (RafsError, ValueError, OSError) as error:
            log.warning("image %s: which files lie in damaged segments is not known: %s", reader.name, error)
            return
        await self._driver.forget_pages(mounted.volume, inodes)


def files_of(reader: ImageReader, blob_id: str, names: Sequence[str]) -> list[int]:
    """Inodes with data in these segments of the image; a walk over all of it, for a worker thread. Raises RafsError."""
    spans: list[tuple[int, int, int]] = []
    for blob in reader.bootstrap.blobs:
        if blob.id == blob_id and not reader.chunks.lacks_meta(blob.index):
            for name in names:
                segment = _segment(reader.segment, blob.index, name)
                for row in segment.rows if segment is not None else ():
                    chunk = reader.chunks.chunk(row)
                    start = chunk.uncompressed_offset
                    spans.append((blob.index, start, start + chunk.uncompressed_size))
    spans.sort()
    starts = [span[:2] for span in spans]
    found: dict[int, None] = {}
    if not spans:
        return []
    for _, entry in reader.bootstrap.walk():
        if entry.dtype != _REGULAR or entry.ino in found:
            continue
        size = reader.bootstrap.attr(entry.ino).size
        for extent in reader.bootstrap.extents(entry.ino, 0, size) if size else ():
            if extent.blob_index == HOLE:
                continue
            at = bisect_right(starts, (extent.blob_index, extent.blob_offset + extent.size - 1)) - 1
            if at >= 0 and spans[at][0] == extent.blob_index and spans[at][2] > extent.blob_offset:
                found[entry.ino] = None
                break
    return list(found)


def _segment(make: Callable[[int, int], Segment], blob_index: int, name: str) -> Segment | None:
    try:
        segment = make(blob_index, int(name.partition("-")[0]))
    except (KeyError, ValueError, RafsError):
        return None
    return segment if segment.name == name else None
