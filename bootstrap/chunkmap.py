"""The one extent map: from a place in an uncompressed blob to the chunk that fills it, for every format.

Rows are CHUNK_RECORDs sorted by (blob, uncompressed offset) in a small derived file that is mapped, so a map of a
million chunks costs no memory of ours. The file is bound to its bootstrap by a fingerprint and to itself by a
checksum: a stale or damaged one is rebuilt. Row layout differs from CHUNK_RECORD in one field: `file_offset`, which
means nothing here, holds `context` (the batch or slice a chunk lies in).

Building reads the chunk records once: 100,000 of them take about 0.2 s. Opening again costs a checksum (8 MB: 4 ms).
"""

from __future__ import annotations

import mmap
import os
import tempfile
from bisect import bisect_left
from collections.abc import Iterator
from struct import Struct
from struct import error as StructError
from typing import NamedTuple

from blake3 import blake3

from bootstrap.base import Blob, Bootstrap
from bootstrap.codec import decompress
from bootstrap.digest import digest
from bootstrap.errors import CodecError, DigestMismatch, FormatError, RafsError
from bootstrap.layout.common import (
    CHUNK_RECORD,
    MAX_CHUNK_SIZE,
    MAX_CHUNKS_PER_BLOB,
    BlobFeatures,
    ChunkFlags,
)
from bootstrap.reader_v6 import BootstrapV6

MAGIC = b"nydus chunk map\0"
VERSION = 1
HEADER = Struct("<16sIIQ32s32s")
"""magic, version, blobs, rows, fingerprint of the bootstrap, BLAKE3 of all that follows the header."""
BLOB_START = Struct("<Q")
"""Behind the header, for each blob and once more for the end: its first row."""

_ROW = CHUNK_RECORD.size
_row = CHUNK_RECORD.unpack_from
_row_offset = Struct("<56xQ").unpack_from
_facts = Struct("<40xIIQQ8xI4x").unpack_from  # stored size, size, stored offset, uncompressed offset, index
_KEY = Struct("<32xI20xQ16x")  # blob index, uncompressed offset
_INDEX = Struct("<72xI4x")
_NO_CONTEXT = bytes(8)
_NOT_YET = (
    (BlobFeatures.ZRAN, "chunks inside a gzip layer (zran)"),
    (BlobFeatures.SEPARATE, "chunks inside an original layer"),
    (BlobFeatures.ENCRYPTED, "encrypted blobs"),
    (BlobFeatures.TARFS, "tarfs blobs"),
    (BlobFeatures.EXTERNAL, "external blobs"),
)
_NOT_YET_BITS = sum(feature for feature, _ in _NOT_YET)
_NO_DIGEST = bytes(32)


class Chunk(NamedTuple):
    """One row. Sizes and offsets in bytes; `flags` are ChunkFlags; `context` is 0 unless a batch or slice holds it."""

    digest: bytes
    blob_index: int
    flags: int
    compressed_size: int
    uncompressed_size: int
    compressed_offset: int
    uncompressed_offset: int
    context: int
    index: int  # type: ignore[assignment]  # the name the format gives it; nobody needs tuple.index
    crc32: int


class ChunkMap:
    """All chunks of all blobs of one image, thread-safe and read-only. Rows are numbered from 0 over all blobs."""

    def __init__(self, data: mmap.mmap, starts: list[int]) -> None:
        self._map = data
        self._starts = starts
        self._base = HEADER.size + BLOB_START.size * len(starts)

    def __len__(self) -> int:
        return self._starts[-1]

    @classmethod
    def open(cls, bootstrap: Bootstrap, path: str | None) -> ChunkMap:
        """The map of an image, from the derived file at `path` if it is right, else built and renamed into place.

        None keeps it in an unlinked temporary file. Raises FormatError when the image's chunks contradict each other
        or their blobs, RafsError when the file cannot be written.
        """
        mark = fingerprint(bootstrap)
        if path is not None:
            found = cls._load(path, mark, len(bootstrap.blobs))
            if found is not None:
                return found
        starts, rows = _build(bootstrap)
        try:
            data = _store(starts, rows, mark, path)
        except OSError as error:
            raise RafsError(f"cannot write the chunk map {path or '(temporary)'}: {error}") from error
        del rows
        _trim()
        return cls(data, starts)

    @classmethod
    def _load(cls, path: str, mark: bytes, blobs: int) -> ChunkMap | None:
        """The stored map, None if it is missing, of another bootstrap or damaged."""
        try:
            with open(path, "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):
            return None
        try:
            magic, version, count, rows, found, checksum = HEADER.unpack_from(data, 0)
            if (magic, version, count, found) != (MAGIC, VERSION, blobs, mark):
                raise FormatError("chunk map", 0, "of another bootstrap")
            if len(data) != HEADER.size + BLOB_START.size * (count + 1) + _ROW * rows:
                raise FormatError("chunk map", 0, "cut")
            with memoryview(data) as view, view[HEADER.size :] as body:
                if blake3(body).digest() != checksum:
                    raise FormatError("chunk map", 0, "damaged")
            starts = [BLOB_START.unpack_from(data, HEADER.size + BLOB_START.size * n)[0] for n in range(count + 1)]
        except (FormatError, StructError):
            data.close()
            return None
        return cls(data, starts)

    def chunk(self, row: int) -> Chunk:
        """The chunk in a row."""
        return Chunk._make(_row(self._map, self._base + _ROW * row))

    def blob_rows(self, blob_index: int) -> range:
        """All rows of a blob, in the order of their uncompressed offsets."""
        return range(self._starts[blob_index], self._starts[blob_index + 1])

    def _offset(self, row: int) -> int:
        offset: int = _row_offset(self._map, self._base + _ROW * row)[0]
        return offset

    def rows(self, blob_index: int, start: int, end: int) -> range:
        """Rows whose uncompressed offset lies in [start, end)."""
        rows = self.blob_rows(blob_index)
        low = bisect_left(rows, start, key=self._offset)
        return rows[low : bisect_left(rows, end, lo=low, key=self._offset)]

    def find(self, blob_index: int, offset: int, size: int = 1) -> int:
        """The row whose chunk holds the `size` bytes at this uncompressed offset; KeyError if no single chunk does."""
        rows = self.blob_rows(blob_index)
        place = bisect_left(rows, offset + 1, key=self._offset) - 1
        if place >= 0:
            row = rows[place]
            chunk = _row(self._map, self._base + _ROW * row)
            if offset + size <= chunk[6] + chunk[4]:
                return row
        raise KeyError((blob_index, offset))

    def close(self) -> None:
        """Give the map back."""
        try:
            self._map.close()
        except BufferError:
            pass  # in use by a thread this instant: freed with its last user


def fingerprint(bootstrap: Bootstrap) -> bytes:
    """32 bytes that change whenever anything the rows are made of does: not the file's name or times."""
    hasher = blake3(b"%d %d " % (bootstrap.version, bootstrap.size))
    with memoryview(bootstrap.data) as view:
        if isinstance(bootstrap, BootstrapV6):
            ext = bootstrap.ext
            spans = [
                (0, 4096),
                (ext.blob_table_offset, ext.blob_table_size),
                (ext.chunk_table_offset, ext.chunk_table_size),
            ]
        else:  # chunk records are spread over the file
            spans = [(0, len(view))]
        for start, size in spans:
            with view[start : start + size] as part:
                hasher.update(part)
    found: bytes = hasher.digest()
    return found


def _trim() -> None:
    """Give freed memory back to the system: glibc would keep 20 bytes per chunk of it for the life of the daemon."""
    import ctypes

    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another C library


def _build(bootstrap: Bootstrap) -> tuple[list[int], bytearray]:
    """First row of each blob and the sorted rows, checked against each other and their blobs."""
    blobs = bootstrap.blobs
    if any(blob.features & BlobFeatures.TARFS for blob in blobs):
        return [0] * (len(blobs) + 1), bytearray()  # the table of a tarfs image holds one meaningless record (1.13)
    table = bootstrap.chunk_table()
    # One integer (blob, uncompressed offset, position) sorts three times faster than a tuple and costs a third of it.
    keys = []
    for position, (blob_index, offset) in enumerate(_KEY.iter_unpack(table)):
        if blob_index >= len(blobs) or offset >> 44:
            raise FormatError("chunk record", 0, f"place {offset:#x} in blob {blob_index} of {len(blobs)}")
        keys.append(blob_index << 76 | offset << 32 | position)
    keys.sort()
    rows = bytearray()
    starts = []
    for blob in blobs:
        starts.append(len(rows) // _ROW)
        first = bisect_left(keys, blob.index << 76)
        _add_rows(rows, blob, table, keys[first : bisect_left(keys, (blob.index + 1) << 76, lo=first)])
    starts.append(len(rows) // _ROW)
    return starts, rows


def _add_rows(rows: bytearray, blob: Blob, table: bytes, keys: list[int]) -> None:
    """The rows of one blob behind the others, one per uncompressed offset (v5 repeats a chunk for each file)."""
    end = last = count = -1
    ordered = True
    limit = blob.chunk_count or MAX_CHUNKS_PER_BLOB
    known = start = b""
    for key in keys:
        at = (key & 0xFFFF_FFFF) * _ROW
        stored_size, size, stored_at, offset, index = _facts(table, at)
        row = table[at : at + 64] + _NO_CONTEXT + table[at + 72 : at + _ROW]
        if row == known:
            continue
        if offset < end:
            what = "two different chunks" if row[56:64] == start else "chunks overlap"
            raise FormatError("chunk record", 0, f"{what} at {offset:#x} of blob {blob.id}")
        if not 0 < size <= MAX_CHUNK_SIZE or stored_size > 2 * MAX_CHUNK_SIZE or stored_at >> 40:
            raise FormatError("chunk record", 0, f"{stored_size} to {size} bytes at {offset:#x} of blob {blob.id}")
        if index >= limit:
            raise FormatError("chunk record", 0, f"chunk {index} of {limit} in blob {blob.id}")
        ordered = ordered and index > last
        known, start, end, last, count = row, row[56:64], offset + size, index, count + 1
        rows += row
    # Ready states are kept per index: no two chunks may share one. Builders number chunks in the order of their places.
    if not ordered:
        own = memoryview(rows)[len(rows) - _ROW * (count + 1) :]
        if len({index for (index,) in _INDEX.iter_unpack(own)}) != count + 1:
            raise FormatError("chunk record", 0, f"two chunks of blob {blob.id} have the same index")


def _store(starts: list[int], rows: bytearray, mark: bytes, path: str | None) -> mmap.mmap:
    """Write the file, make it durable and visible at once, and map it."""
    head = b"".join(BLOB_START.pack(start) for start in starts)
    checksum = blake3(head)
    checksum.update(rows)
    header = HEADER.pack(MAGIC, VERSION, len(starts) - 1, starts[-1], mark, checksum.digest())
    with tempfile.NamedTemporaryFile(
        dir=None if path is None else os.path.dirname(os.path.abspath(path)), prefix=".chunkmap-", delete=False
    ) as file:
        try:
            file.write(header)
            file.write(head)
            file.write(rows)
            file.flush()
            if path is None:
                os.unlink(file.name)
            else:
                os.fsync(file.fileno())
                os.rename(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def decode_chunk(chunk: Chunk, blob: Blob, stored: bytes | memoryview) -> bytes:
    """The plain bytes of a chunk from its stored ones: length, decompression and digest checked. Thread-safe.

    Raises CodecError when the bytes do not decode or the blob is of a kind not supported, DigestMismatch when they
    decode to something else than the image was built from.
    """
    if blob.features & _NOT_YET_BITS:
        require_supported(blob)
    if chunk.flags & (ChunkFlags.BATCH | ChunkFlags.ENCRYPTED) or not chunk.compressed_size:
        raise CodecError(f"{_where(chunk, blob)}: batched or encrypted chunks are not supported yet")
    if len(stored) != chunk.compressed_size:
        raise CodecError(f"{_where(chunk, blob)}: {len(stored)} bytes instead of {chunk.compressed_size}")
    if chunk.flags & ChunkFlags.COMPRESSED:
        try:
            plain = decompress(blob.compressor, stored, chunk.uncompressed_size)
        except CodecError as error:
            raise CodecError(f"{_where(chunk, blob)}: {error}") from error
    elif chunk.compressed_size != chunk.uncompressed_size:
        raise CodecError(f"{_where(chunk, blob)}: stored plain but with two sizes")
    else:
        plain = bytes(stored)
    if chunk.digest == _NO_DIGEST:
        # Nothing but its CRC can vouch for such a chunk (reference 5.15); without either it must not be served.
        verify_crc(chunk, blob, plain)
    elif digest(blob.digester, plain) != chunk.digest:
        raise DigestMismatch(f"{_where(chunk, blob)}: its {blob.digester.label} digest is wrong")
    return plain


def require_supported(blob: Blob) -> None:
    """CodecError for a blob whose kind this package cannot decode."""
    for feature, what in _NOT_YET:
        if blob.features & feature:
            raise CodecError(f"blob {blob.id}: {what} are not supported yet")


def verify_crc(chunk: Chunk, blob: Blob, plain: bytes) -> None:
    """DigestMismatch unless the chunk has a CRC-32C and it is that of `plain`."""
    from crc32c import crc32c

    if not chunk.flags & ChunkFlags.HAS_CRC or crc32c(plain) != chunk.crc32:
        raise DigestMismatch(f"{_where(chunk, blob)}: its CRC-32C is wrong or missing")


def _where(chunk: Chunk, blob: Blob) -> str:
    return f"chunk {chunk.index} of blob {blob.id}"


def iter_chunks(chunks: ChunkMap, blob_index: int) -> Iterator[Chunk]:
    """All chunks of a blob."""
    return map(chunks.chunk, chunks.blob_rows(blob_index))
