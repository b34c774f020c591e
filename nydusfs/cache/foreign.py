"""Cache files that upstream's nydusd left in a work directory: their data is taken over rather than fetched again.

`<blob id>.blob.data` is the uncompressed blob image with holes where nothing was fetched (reference 4.11). Which chunks
are there its `.chunk_map` says, but only their digests are believed: a hole does not have the right one.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from bootstrap.chunkmap import ChunkMap
from bootstrap.decode import verify
from bootstrap.errors import DigestMismatch, RafsError
from nydusfs.segments import Segment

log = logging.getLogger("nydusfs.cache")

DATA_SUFFIX = ".blob.data"
FOREIGN_SUFFIXES = (DATA_SUFFIX, ".blob.data.chunk_map", ".blob.raw", ".blob.raw.chunk_map", ".blob.meta", ".chunk_map")


class ForeignBlob:
    """One such file. `take` is for worker threads."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path = path
        self._fd = fd
        self._taken = 0

    @classmethod
    def find(cls, folder: Path, blob_id: str) -> ForeignBlob | None:
        path = folder / f"{blob_id}{DATA_SUFFIX}"
        try:
            return cls(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW))
        except OSError:
            return None

    def take(self, chunks: ChunkMap, segment: Segment) -> bytearray | None:
        """The plain bytes of a segment if every chunk of it is there and right, else None."""
        plain = bytearray(segment.size)
        try:
            if os.preadv(self._fd, [plain], segment.start) < segment.size:
                return None
            view = memoryview(plain)
            for row in segment.rows:
                chunk = chunks.chunk(row)
                begin = chunk.uncompressed_offset - segment.start
                verify(chunk, segment.blob, view[begin : begin + chunk.uncompressed_size])
        except (DigestMismatch, RafsError, OSError, ValueError):
            return None
        if not self._taken:
            log.info("cache file %s of another nydusd is taken over, segment by segment", self._path)
        self._taken += 1
        return plain

    def close(self) -> None:
        os.close(self._fd)
