"""From a mount request to an image that can be read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import trio

from bootstrap.base import Bootstrap
from bootstrap.chunkmap import ChunkMap, decode_chunk
from bootstrap.reader import open_bootstrap
from nydusfs.config import LocalFsBackend
from nydusfs.counters import BackendCounters, CacheCounters
from nydusfs.daemon.mounts import MountRequest, OpenImage
from nydusfs.errors import ConfigError, ReadError


class LocalReader:
    """Chunks straight from a directory of blobs, decoded and verified at each read."""

    def __init__(self, bootstrap: Bootstrap, chunks: ChunkMap, backend: LocalFsBackend) -> None:
        self.bootstrap = bootstrap
        self.chunks = chunks
        self.backend = backend
        self.limit = trio.CapacityLimiter(4)
        self._fds: dict[int, int] = {}

    def _fd(self, index: int) -> int:
        if index not in self._fds:
            where = Path(self.backend.blob_file or Path(self.backend.dir) / self.bootstrap.blobs[index].id)
            self._fds[index] = os.open(where, os.O_RDONLY | os.O_CLOEXEC)
        return self._fds[index]

    def _read(self, ino: int, offset: int, size: int) -> bytes:
        parts = []
        for extent in self.bootstrap.extents(ino, offset, size):
            chunk = self.chunks.chunk(self.chunks.find(extent.blob_index, extent.blob_offset))
            try:
                stored = os.pread(self._fd(extent.blob_index), chunk.compressed_size, chunk.compressed_offset)
            except OSError as error:
                raise ReadError(f"{self.bootstrap.path}: {error}") from None
            data = decode_chunk(chunk, self.bootstrap.blobs[extent.blob_index], memoryview(stored))
            start = extent.blob_offset - chunk.uncompressed_offset
            parts.append(data[start : start + extent.size])
        return b"".join(parts)

    async def read(self, ino: int, offset: int, size: int) -> bytes:
        return await trio.to_thread.run_sync(self._read, ino, offset, size, limiter=self.limit, abandon_on_cancel=True)


class LocalImage:
    def __init__(self, metadata: Bootstrap, reader: LocalReader) -> None:
        self.metadata = metadata
        self.reader = reader

    def backend_metrics(self) -> dict[str, Any]:
        return BackendCounters("localfs").as_json()

    def cache_metrics(self) -> dict[str, Any]:
        return CacheCounters().as_json()

    async def prefetch(self) -> None:
        return

    async def aclose(self) -> None:
        self.metadata.close()


class ImageOpener:
    async def __call__(self, request: MountRequest) -> OpenImage:
        backend = request.config.backend
        if not isinstance(backend, LocalFsBackend):
            raise ConfigError("backend.type", "only localfs")

        def work() -> LocalImage:
            bootstrap = open_bootstrap(request.source)
            return LocalImage(bootstrap, LocalReader(bootstrap, ChunkMap.open(bootstrap, None), backend))

        return await trio.to_thread.run_sync(work)
