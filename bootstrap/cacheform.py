"""A blob in the form of a cache: `<id>.blob.data`, the uncompressed image, with `<id>.blob.meta` (reference 4.11).

`nydus-image create --blob-cache-dir` writes these two and no blob. Its chunks are stored plain, so the blob that would
have been written can be read out of them.
"""

from __future__ import annotations

import os
from bisect import bisect_right

from bootstrap.errors import FormatError
from bootstrap.layout import blobmeta
from bootstrap.layout.common import BlobFeatures

DATA_SUFFIX = ".blob.data"
META_SUFFIX = ".blob.meta"


class CacheForm:
    """The chunk data of a blob, read by the offsets that stored blobs have. Thread-safe.

    Raises FormatError when the table is unusable or says that chunks are compressed, OSError when a file is not there.
    """

    def __init__(self, path: str) -> None:
        """`path`: that of the blob, which need not exist."""
        with open(path + META_SUFFIX, "rb") as file:
            data = memoryview(file.read())
        end = len(data) - blobmeta.HEADER_SIZE
        if end < 0:
            raise FormatError("blob meta", 0, f"{path}{META_SUFFIX} has only {len(data)} bytes")
        header = blobmeta.unpack_header(data[end:], end)
        wide = header.features & BlobFeatures.CHUNK_INFO_V2
        step = blobmeta.ENTRY_V2.size if wide else blobmeta.ENTRY_V1.size
        if header.ci_entries * step > end:
            raise FormatError("blob meta", 0, f"{path}{META_SUFFIX}: no room for {header.ci_entries} entries")
        self._starts: list[int] = []
        self._places: list[tuple[int, int]] = []
        places = []
        for at in range(0, header.ci_entries * step, step):
            entry = blobmeta.unpack_v2(data, at) if wide else blobmeta.unpack_v1(data, at)
            if entry.compressed_size != entry.uncompressed_size:
                raise FormatError("blob meta entry", at, f"{path}{META_SUFFIX}: a compressed chunk in a cache of plain")
            places.append((entry.compressed_offset, entry.uncompressed_offset, entry.uncompressed_size))
        for start, offset, size in sorted(places):
            self._starts.append(start)
            self._places.append((offset, size))
        self._fd = os.open(path + DATA_SUFFIX, os.O_RDONLY | os.O_CLOEXEC)

    def pread(self, size: int, offset: int) -> bytes:
        """Stored bytes, fewer where the table has no chunk."""
        parts = []
        while size > 0:
            number = bisect_right(self._starts, offset) - 1
            if number < 0:
                break
            place, length = self._places[number]
            within = offset - self._starts[number]
            part = os.pread(self._fd, min(size, length - within), place + within) if within < length else b""
            if not part:
                break
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
