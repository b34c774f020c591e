"""Cache files that upstream's nydusd left in a work directory: their data is taken over rather than fetched again.

Names as its versions give them (reference 0 and 5.1), of which a work directory may hold several:

    <blob id>.blob.data    2.2.0 to 2.2.4 and from 2.3 on: plain data, each chunk at its uncompressed offset
    <blob id>.blob.raw     the same with `cache.compressed`: stored bytes at their offsets in the blob
    <blob id>              2.1 and 2.2.5: either

Which chunks are there its chunk map says, but only their digests are believed: a hole does not have the right one, and
after a power cut upstream's map may call ready what was lost. The files are never changed.
"""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

from bootstrap.chunkmap import ChunkMap
from bootstrap.decode import verify
from bootstrap.errors import DigestMismatch, RafsError
from nydusfs.segments import BadChunk, Segment, decode, runs

log = logging.getLogger("nydusfs.cache")

DATA_SUFFIX, RAW_SUFFIX, META_SUFFIX = ".blob.data", ".blob.raw", ".blob.meta"
FOREIGN_SUFFIXES = (
    DATA_SUFFIX, ".blob.data.chunk_map", RAW_SUFFIX, ".blob.raw.chunk_map", META_SUFFIX, ".blob.digest", ".blob.toc",
    ".chunk_map",
)  # fmt: skip


class _File:
    """One such file; `plain` and `raw`: what it may hold."""

    def __init__(self, path: Path, fd: int, *, plain: bool, raw: bool) -> None:
        self.path, self.fd, self.plain, self.raw = path, fd, plain, raw

    def take(self, chunks: ChunkMap, segment: Segment) -> bytearray | None:
        found = self._plain(chunks, segment) if self.plain else None
        if found is None and self.raw:
            found = self._stored(chunks, segment)
        return found

    def _plain(self, chunks: ChunkMap, segment: Segment) -> bytearray | None:
        plain = bytearray(segment.size)
        view = memoryview(plain)
        try:
            for row in segment.rows:
                chunk = chunks.chunk(row)
                place = segment.place(chunk.uncompressed_offset)
                part = view[place : place + chunk.uncompressed_size]
                if os.preadv(self.fd, [part], chunk.uncompressed_offset) < len(part):
                    return None
                verify(chunk, segment.blob, part)
        except (DigestMismatch, RafsError, OSError, ValueError, KeyError):
            return None
        return plain

    def _stored(self, chunks: ChunkMap, segment: Segment) -> bytearray | None:
        plain = bytearray(segment.size)
        try:
            for start, end, units in runs(chunks, segment):
                stored = os.pread(self.fd, end - start, start)
                if len(stored) < end - start:
                    return None
                decode(segment, chunks, units, start, memoryview(stored), plain)
        except (BadChunk, RafsError, OSError, ValueError, KeyError):
            return None
        return plain


class ForeignBlob:
    """What upstream left of one blob. `take` is for worker threads."""

    def __init__(self, files: list[_File]) -> None:
        self._files = files
        self._taken = 0

    @classmethod
    def find(cls, folder: Path, blob_id: str) -> ForeignBlob | None:
        files: list[_File] = []
        for suffix, plain, raw in ((DATA_SUFFIX, True, False), (RAW_SUFFIX, False, True), ("", True, True)):
            path = folder / f"{blob_id}{suffix}"
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError:
                continue
            if stat.S_ISREG(os.fstat(fd).st_mode):
                files.append(_File(path, fd, plain=plain, raw=raw))
            else:
                os.close(fd)  # our own directory of segments
        return cls(files) if files else None

    @classmethod
    def of_file(cls, path: Path) -> ForeignBlob | None:
        """A file of stored bytes alone, whatever its name; None when it cannot be opened."""
        try:
            return cls([_File(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC), plain=False, raw=True)])
        except OSError:
            return None

    def take(self, chunks: ChunkMap, segment: Segment) -> bytearray | None:
        """The plain bytes of a segment if every chunk of it is there and right, else None."""
        for file in self._files:
            plain = file.take(chunks, segment)
            if plain is not None:
                if not self._taken:
                    log.info("cache file %s of another nydusd is taken over, segment by segment", file.path)
                self._taken += 1
                return plain
        return None

    def close(self) -> None:
        for file in self._files:
            os.close(file.fd)
