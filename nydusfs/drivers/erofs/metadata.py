"""Metadata images in the cache: whether one is there, and how it comes there."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import trio

from nydusfs.drivers.erofs.image import (
    PARTIAL,
    DeviceFile,
    UnsuitableError,
    fingerprint,
    open_image,
    write_and_open,
)
from nydusfs.drivers.erofs.maker import Making
from nydusfs.image_reader import ImageReader
from nydusfs.keeper.jobs import Jobs

TABLES_SECONDS = 10.0  # for the blobs' own tables, which FUSE can wait for later
MAX_IMAGES = 256  # kept per cache
ABANDONED = 600.0  # seconds without a change to an image in the making
MAX_METADATA = 1 << 30
"""Bytes of a bootstrap, all of which are read at the mount: an image of a million files has some 300 MB, a sparse file
may have a TB."""


class MetadataImage:
    """That of an image, at `path`, if it is there; `mark` is its fingerprint."""

    def __init__(self, reader: ImageReader, path: Path, mark: bytes, *, xattrs: bool) -> None:
        self.path = path
        self.mark = mark
        self._reader = reader
        self._xattrs = xattrs

    @classmethod
    async def of(cls, reader: ImageReader, folder: Path, *, xattrs: bool) -> MetadataImage:
        mark = await trio.to_thread.run_sync(fingerprint, reader.bootstrap, xattrs)
        return cls(reader, folder / mark.hex(), mark, xattrs=xattrs)

    async def made_apart(
        self,
        jobs: Jobs,
        listed: Callable[[list[DeviceFile]], Awaitable[None]],
        making: Making | None = None,
        *,
        patient: bool = False,
    ) -> list[DeviceFile] | None:
        """Its devices; it is made by a process of its own if it is not there, which may have begun. None: only
        `made_here` can tell. `listed` is given the devices while the rest is made, and they may prove wrong. `patient`:
        that process lets everybody else go first. Raises `UnsuitableError`."""
        path, mark, enable = self.path, self.mark, self._reader.config.enable_xattr
        files = await trio.to_thread.run_sync(_open_used, path, mark)
        if files is not None:
            return files
        making = making or await trio.to_thread.run_sync(
            lambda: Making.begin(
                jobs, self._reader.bootstrap.path, path.parent, enable_xattr=enable, patient=patient
            )
        )
        if making is not None:
            with closing(making):
                files = await making.finish(path, mark, listed)
        return files

    async def made_here(self) -> list[DeviceFile]:
        """The same by this process, of images whose blobs have tables of their own. Raises `UnsuitableError`, RafsError
        for bad metadata, OSError."""
        reader = self._reader
        with trio.move_on_after(TABLES_SECONDS):
            await reader.load_tables()
        if any(reader.chunks.lacks_meta(blob.index) for blob in reader.bootstrap.blobs):
            raise UnsuitableError("the tables of its blobs cannot be had now")
        return await trio.to_thread.run_sync(write_and_open, reader, self.path, self.mark, self._xattrs)


def check_suitable(reader: ImageReader) -> None:
    """As far as that is known without a look at its tree. Raises `UnsuitableError`."""
    if reader.store is None:
        raise UnsuitableError("it has no cache directory (device.cache)")
    if reader.config.cache.validate:
        raise UnsuitableError("cached data is to be hashed at every read (cache validate), which EROFS cannot do")
    if len(reader.bootstrap.data) > MAX_METADATA:
        raise UnsuitableError(f"its metadata of {len(reader.bootstrap.data) >> 20} MiB is more than 1024")


def _open_used(path: Path, mark: bytes) -> list[DeviceFile] | None:
    files = open_image(path, mark)
    if files is not None:
        try:
            os.utime(path)
        except OSError:
            pass  # `prune` takes it for older than it is
    return files


def prune(folder: Path, used: Callable[[], set[str]]) -> None:
    """Images used longest ago make room, but none of those `used` by mounts, of which a next worker must know what
    devices they have. Also what an image was to become when its writer was killed."""
    found: list[tuple[float, str]] = []
    for path in folder.iterdir():
        try:
            when = path.stat().st_mtime
        except FileNotFoundError:
            continue  # it is what it was to become now
        if not path.name.startswith(PARTIAL):
            found.append((when, path.name))
        elif when < time.time() - ABANDONED:
            path.unlink(missing_ok=True)
    if len(found) > MAX_IMAGES:
        kept = used()
        for _, name in sorted(found)[:-MAX_IMAGES]:
            if name not in kept:
                (folder / name).unlink(missing_ok=True)
