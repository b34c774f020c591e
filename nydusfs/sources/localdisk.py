"""Blobs as partitions of a local disk or its image, or at given places of one without partitions (reference 4.9)."""

from __future__ import annotations

import os
import time
from pathlib import Path

import trio

from nydusfs.config import DiskBlob, LocalDiskBackend
from nydusfs.counters import BackendCounters
from nydusfs.errors import ConfigError, SourceError, os_reason
from nydusfs.sources.base import Buffer, Check, FileSource, Priority, WrongBytes
from nydusfs.sources.gpt import BASIC_DATA, GptError, read_partitions
from nydusfs.sources.localfs import TooShort, pread

_SHORT_NAME = 32  # characters of a blob id that fit a basic data partition's name


class LocalDiskSource(FileSource):
    def __init__(self, backend: LocalDiskBackend) -> None:
        """Reads the partition table. Raises `ConfigError` for a disk that cannot be used."""
        self.counters = BackendCounters("localdisk")
        self.name = f"localdisk {backend.device_path}"
        self._path = Path(backend.device_path)
        self._alone: DiskBlob | None = None
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                size = os.lseek(fd, 0, os.SEEK_END)  # a block device has no size in its inode
                self._blobs = dict(backend.blobs) if backend.disable_gpt else _scan(fd, size)
            finally:
                os.close(fd)
        except OSError as error:
            raise ConfigError("device_path", f"{backend.device_path}: {os_reason(error)}") from None
        except GptError as error:
            raise ConfigError("device_path", f"{backend.device_path}: {error} (see disable_gpt)") from None
        for blob_id, place in self._blobs.items():
            if place.offset + place.size > size:
                where = f"{place.size} bytes at {place.offset}"
                raise ConfigError(
                    "blobs", f"blob {blob_id}: {where} lie outside of {backend.device_path} ({size} bytes)"
                )
        if backend.disable_gpt and not backend.blobs:
            self._alone = DiskBlob(0, size)

    def _find(self, blob_id: str) -> DiskBlob | None:
        return self._blobs.get(blob_id) or self._blobs.get(blob_id[:_SHORT_NAME]) or self._alone

    def open_blob(self, blob_id: str, end: int) -> tuple[int, int] | None:
        place = self._find(blob_id)
        if place is None or end > place.size:
            return None
        try:
            return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC), place.offset
        except OSError:
            return None

    async def read(
        self,
        blob_id: str,
        offset: int,
        size: int,
        priority: Priority,
        check: Check | None = None,
        urgent: trio.Event | None = None,
    ) -> Buffer:
        started = time.monotonic()
        reason, damaged = "", False
        place = self._find(blob_id)
        if place is None:
            reason = "no partition of this name"
        elif offset + size > place.size:
            reason, damaged = f"the partition ends at {place.size}, {size} bytes at {offset} are wanted", True
        else:
            try:
                data = await trio.to_thread.run_sync(pread, self._path, place.offset + offset, size)
                if check is not None:
                    await check(data)
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
            except (TooShort, WrongBytes) as error:
                reason, damaged = str(error), True
            else:
                self.counters.record(size, started, False)
                return data
        self.counters.record(size, started, True)
        what = f"cannot read {size} bytes at {offset} of blob {blob_id} from {self.name}"
        raise SourceError(what, [(str(self._path), reason)], damaged=damaged)

    async def aclose(self) -> None:
        pass


def _scan(fd: int, size: int) -> dict[str, DiskBlob]:
    """Basic data partitions are named by the first half of a blob's id; of others the id's two halves are the name and
    the partition's GUID. Raises `GptError`."""
    found: dict[str, DiskBlob] = {}
    for partition in read_partitions(lambda offset, count: os.pread(fd, count, offset), size):
        name = partition.name
        if partition.kind != BASIC_DATA:
            name += partition.guid.hex
        if not name or name in found:
            what = f"a second partition for blob {name}" if name else f"partition {partition.guid} has no name"
            raise GptError(f"{what}, at offset {partition.offset}")
        found[name] = DiskBlob(partition.offset, partition.size)
    return found
