"""The chunk table inside a blob ("blob meta", CCT), where the bootstrap alone does not tell how chunks are stored.

Plain and encrypted chunks are located by their records in the bootstrap. Members of a batch and chunks inside a gzip
layer (zran) are not: their blob meta says which unit holds them and where in it. It is fetched, checked against what
the bootstrap promises of it, and mapped. Reference: RAFS format 4.6, 4.7, 4.9 and 7.2.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from bootstrap import decode
from bootstrap.base import Blob, Chunk
from bootstrap.codec import decompress
from bootstrap.errors import CodecError, DigestMismatch, FormatError
from bootstrap.layout import batch, blobmeta, toc
from bootstrap.layout.common import BlobFeatures, Compressor, round_up
from bootstrap.zran import Contexts, decode_slice

__all__ = ["BlobMeta", "MetaRange", "Unit", "meta_range", "needs_meta", "pack_cache_form", "read_meta"]

MAX_REGION = 1 << 30
"""Refuse a larger table: this one would be of a gzip layer of about 30 GB, or of 40 million chunks."""

MAX_BLOB_SIZE = 1 << 40
MAX_BATCH = 16 << 20
MAX_FIRSTS = 8192
_OWN_HEADER = toc.TAR_HEADER_SIZE


class Unit(NamedTuple):
    """Stored bytes [start, end) of a blob that decode as a whole: chunk `number` (`kind` "chunk"), batch or slice."""

    start: int
    end: int
    number: int
    kind: str = "chunk"


def alone(chunk: Chunk) -> Unit:
    """The unit of a chunk stored by itself."""
    return Unit(chunk.compressed_offset, chunk.compressed_offset + chunk.compressed_size, chunk.index)


def needs_meta(blob: Blob) -> bool:
    """Whether reading the blob takes its blob meta."""
    return bool(blob.features & (BlobFeatures.BATCH | BlobFeatures.ZRAN))


def _data_end(blob: Blob) -> int:
    """Where the chunk data ends; generated dictionaries do not say (1.4)."""
    return blob.data_size or blob.compressed_size or MAX_BLOB_SIZE


class BlobMeta:
    """The blob meta of one blob over its uncompressed region; thread-safe, entries are checked when asked for.

    Raises FormatError when header and blob table contradict each other or the region.
    """

    def __init__(self, blob: Blob, region: bytes | memoryview, header: blobmeta.Header) -> None:
        self.blob = blob
        self._region = region = memoryview(region)
        wide = blob.features & BlobFeatures.CHUNK_INFO_V2
        self._entry_size = blobmeta.ENTRY_V2.size if wide else blobmeta.ENTRY_V1.size
        self._count = header.ci_entries
        check_header(blob, header)
        contexts = header.ci_zran_offset
        if needs_meta(blob):
            misplaced = header.ci_zran_count and contexts != self._count * self._entry_size
            if not wide or misplaced:
                raise FormatError(
                    "blob meta header", 40, f"contexts at {contexts:#x} behind {self._count} entries of blob {blob.id}"
                )
            if not 0 <= header.ci_zran_count <= self._count:
                raise FormatError("blob meta header", 56, f"{header.ci_zran_count} contexts for {self._count} chunks")
        if len(region) < max(self._count * self._entry_size, contexts + header.ci_zran_size):
            raise FormatError("blob meta", 0, f"{len(region)} bytes hold no {self._count} entries and their contexts")
        self._batches = self._slices = 0
        self._firsts: dict[int, int] = {}  # found by `first_of`
        if blob.features & BlobFeatures.ZRAN:
            self._contexts = Contexts(
                region, contexts, header.ci_zran_size, header.ci_zran_count, _data_end(blob)
            )
            self._slices = header.ci_zran_count
        elif blob.features & BlobFeatures.BATCH:
            if header.ci_zran_count * batch.CONTEXT.size > header.ci_zran_size:
                raise FormatError("blob meta header", 48, f"{header.ci_zran_size} bytes of contexts are too few")
            self._batches, self._batches_at = header.ci_zran_count, contexts

    def __len__(self) -> int:
        return self._count

    def entry(self, index: int) -> blobmeta.EntryV2:
        """The entry of a chunk; V1 entries are widened."""
        if not 0 <= index < self._count:
            raise FormatError("blob meta entry", self._entry_size * index, f"chunk {index} of {self._count}")
        if self._entry_size == blobmeta.ENTRY_V2.size:
            return blobmeta.unpack_v2(self._region, self._entry_size * index)
        narrow = blobmeta.unpack_v1(self._region, self._entry_size * index)
        compressed = narrow.compressed_size != narrow.uncompressed_size
        return blobmeta.EntryV2(*narrow, blobmeta.V2_COMPRESSED if compressed else 0, 0)

    def place(self, chunk: Chunk) -> tuple[Unit, int]:
        """The unit that holds a chunk, and the chunk's offset in the decoded unit."""
        entry = self.entry(chunk.index)
        where = self._entry_size * chunk.index
        if entry.uncompressed_offset != chunk.uncompressed_offset or entry.uncompressed_size != chunk.uncompressed_size:
            raise FormatError(
                "blob meta entry", where,
                f"chunk {chunk.index} of blob {self.blob.id} has {entry.uncompressed_size} bytes at "
                f"{entry.uncompressed_offset:#x}, {chunk.uncompressed_size} at {chunk.uncompressed_offset:#x} in the "
                "bootstrap",
            )  # fmt: skip
        if entry.flags & blobmeta.V2_BATCH and self._batches:
            number, offset = blobmeta.unpack_position(entry.data)
            context = self.batch_context(number)
            unit = Unit(entry.compressed_offset, entry.compressed_offset + context.compressed_size, number, "batch")
            size = context.uncompressed_batch_size
        elif entry.flags & blobmeta.V2_ZRAN and self._slices:
            number, offset = blobmeta.unpack_position(entry.data)
            slice_ = self._contexts[number]
            unit = Unit(slice_.in_offset, slice_.in_offset + slice_.in_len, number, "slice")
            size = slice_.out_len
        else:
            if entry.flags & (blobmeta.V2_BATCH | blobmeta.V2_ZRAN) or not chunk.compressed_size:
                raise FormatError("blob meta entry", where, f"flags {entry.flags:#x} of chunk {chunk.index}")
            return alone(chunk), 0
        if offset + chunk.uncompressed_size > size:
            raise FormatError(
                "blob meta entry", where, f"chunk {chunk.index} ends at {offset + chunk.uncompressed_size} of {size}"
            )
        limit = _data_end(self.blob)
        if unit.end > limit:
            raise FormatError("blob meta entry", where, f"{unit.kind} {number} ends at {unit.end:#x} of {limit:#x}")
        return unit, offset

    def batch_context(self, number: int) -> batch.BatchContext:
        """One batch context."""
        at = self._batches_at + number * batch.CONTEXT.size
        if not 0 <= number < self._batches:
            raise FormatError("batch context", at, f"batch {number} of {self._batches}")
        context = batch.unpack_context(self._region, at)
        if not 0 < context.uncompressed_batch_size <= MAX_BATCH or not 0 < context.compressed_size <= 2 * MAX_BATCH:
            raise FormatError("batch context", at, f"{context.compressed_size} to {context.uncompressed_batch_size}")
        return context

    def first_of(self, chunk: Chunk, floor: int) -> int:
        """Uncompressed offset of the first chunk of the same batch or slice that lies at or behind `floor`.

        By the table and not by the chunks an image uses, so that it is the same for all images with this blob. Found
        by bisection: the members of a unit have neighbouring numbers.
        """
        entry = self.entry(chunk.index)
        kinds = entry.flags & (blobmeta.V2_BATCH | blobmeta.V2_ZRAN)
        if not kinds:
            return chunk.uncompressed_offset
        number = entry.data >> 32
        slot = number << 44 | floor
        first = self._firsts.get(slot)
        if first is None:
            if len(self._firsts) >= MAX_FIRSTS:
                self._firsts.clear()
            first = self._firsts[slot] = self._search_first(chunk, kinds, number, floor)
        return min(first, chunk.uncompressed_offset)

    def _search_first(self, chunk: Chunk, kinds: int, number: int, floor: int) -> int:
        low, high = max(0, chunk.index - (chunk.uncompressed_offset - floor) // 4096), chunk.index
        while low < high:
            middle = (low + high) >> 1
            other = self.entry(middle)
            if other.flags & kinds and other.data >> 32 == number and other.uncompressed_offset >= floor:
                high = middle
            else:
                low = middle + 1
        return self.entry(low).uncompressed_offset

    def decode(self, unit: Unit, stored: bytes | memoryview, size: int) -> bytes | bytearray:
        """The first `size` bytes or more that a batch or slice decodes to, unverified. Raises CodecError."""
        try:
            if unit.kind == "slice":
                context = self._contexts[unit.number]
                return decode_slice(context, self._contexts.dictionary(context), stored, size)
            return self._decode_batch(self.batch_context(unit.number), stored)
        except CodecError as error:
            raise CodecError(f"{unit.kind} {unit.number} of blob {self.blob.id}: {error}") from error

    def _decode_batch(self, context: batch.BatchContext, stored: bytes | memoryview) -> bytes:
        if len(stored) != context.compressed_size:
            raise CodecError(f"{len(stored)} stored bytes instead of {context.compressed_size}")
        size = context.uncompressed_batch_size
        if self.blob.features & BlobFeatures.ENCRYPTED:
            # Only then its length tells whether it is compressed: encryption makes less than 16 bytes longer. Upstream
            # looks at the stored length and refuses such batches.
            stored = decode.decrypt_blob(self.blob, stored, size if size == len(stored) else None)
        if len(stored) == size:
            return bytes(stored)
        return decompress(self.blob.compressor, stored, size)


def check_header(blob: Blob, header: blobmeta.Header) -> None:
    """FormatError unless the header says what the blob table does. Its features may differ (reference 4.7.1)."""
    says = header[2:7]
    table = (
        blob.ci_compressor, blob.chunk_count, blob.ci_offset, blob.ci_compressed_size, blob.ci_uncompressed_size
    )  # fmt: skip
    if says != table:
        raise FormatError(
            "blob meta header", 8, f"compressor, entries, offset, sizes {says}, by the bootstrap {table}: {blob.id}"
        )


# ---- where it lies and what vouches for it


class MetaRange(NamedTuple):
    """What to read: `size` bytes from `offset` of a blob, which is not always the one with the data."""

    blob_id: str
    offset: int
    size: int
    whole: bool = False  # all of the meta blob, whose digest the bootstrap names
    toc: bool = False  # up to the table of contents, whose digest the bootstrap names

    @property
    def vouched(self) -> bool:
        """Whether a digest in the bootstrap covers these bytes."""
        return self.whole or self.toc


def meta_range(blob: Blob, own_name: str) -> MetaRange:
    """The stored blob meta of a blob. `own_name` stands for the layer blob that the bootstrap itself came in.

    Raises FormatError when the blob table tells of none, or of one that cannot be.
    """
    core = blob.ci_compressed_size + blobmeta.HEADER_SIZE
    if not blob.ci_uncompressed_size:
        raise FormatError("blob table entry", 0, f"blob {blob.id} has no blob meta")
    if blob.ci_uncompressed_size > MAX_REGION or blob.ci_compressed_size > blob.ci_uncompressed_size:
        raise FormatError("blob table entry", 0, f"blob meta of {blob.ci_uncompressed_size} bytes: blob {blob.id}")
    if blob.ci_offset > MAX_BLOB_SIZE:
        raise FormatError("blob table entry", 0, f"blob meta at {blob.ci_offset:#x}: blob {blob.id}")
    if blob.features & BlobFeatures.SEPARATE:
        if not any(blob.meta_digest):
            return MetaRange(own_name, blob.ci_offset, core)
        name = blob.meta_digest.hex()
        if blob.ci_offset + core <= blob.meta_size <= MAX_REGION:
            return MetaRange(name, 0, blob.meta_size, whole=True)
        return MetaRange(name, blob.ci_offset, core)
    end = blob.ci_offset + core
    names_toc = blob.toc_size and any(blob.toc_digest)
    if names_toc and end + _OWN_HEADER + blob.toc_size <= blob.compressed_size <= end + MAX_REGION:
        return MetaRange(blob.id, blob.ci_offset, blob.compressed_size - blob.ci_offset, toc=True)
    return MetaRange(blob.id, blob.ci_offset, core)


def read_meta(blob: Blob, where: MetaRange, stored: bytes | memoryview) -> tuple[bytes, blobmeta.Header]:
    """Uncompressed region and header out of the bytes of `where`, checked against all that the bootstrap promises.

    That is, by what the image has: the digest of the meta blob, the ToC's digest and the digests in it, the fields of
    the header. Where none of the digests exists (merged layer blobs) those of the chunks decide in the end.
    Raises FormatError, CodecError or DigestMismatch, all of them about these bytes.
    """
    stored = memoryview(stored)
    start = blob.ci_offset - where.offset
    end = start + blob.ci_compressed_size
    if len(stored) != where.size or end + blobmeta.HEADER_SIZE > len(stored):
        raise FormatError("blob meta", blob.ci_offset, f"{len(stored)} of {where.size} bytes")
    if where.whole and not _is_meta_blob(blob, stored):
        raise DigestMismatch(f"meta blob {where.blob_id} of blob {blob.id}: its SHA-256 is wrong")
    region: bytes | memoryview = stored[start:end]
    raw: bytes | memoryview = stored[end : end + blobmeta.HEADER_SIZE]
    if blob.features & BlobFeatures.ENCRYPTED:
        # Its compressed length is not recorded: 18 stored bytes are padding or not, as for chunks.
        compressed = blob.ci_compressor != Compressor.NONE
        region = decode.decrypt_blob(blob, region, None if compressed else blob.ci_uncompressed_size)
        raw = decode.decrypt_blob(blob, raw, blobmeta.HEADER_SIZE)
    header = blobmeta.unpack_header(raw, blob.ci_offset + blob.ci_compressed_size)
    check_header(blob, header)
    if blob.ci_compressor > Compressor.ZSTD:
        raise FormatError("blob meta header", 8, f"compressor {blob.ci_compressor}")
    plain = decompress(Compressor(blob.ci_compressor), region, blob.ci_uncompressed_size)
    if where.toc:
        _check_toc(blob, stored, plain, bytes(raw))
    return plain, header


def _is_meta_blob(blob: Blob, stored: memoryview) -> bool:
    """Whether these are the bytes of the meta blob: as a file, or as the builder hashes it, without `blob.digest`."""
    if hashlib.sha256(stored).digest() == blob.meta_digest:
        return True
    try:
        entries = _toc_at_end(stored)
    except FormatError:
        return False
    for entry in entries:
        if entry.name == toc.BLOB_DIGEST:
            hasher = hashlib.sha256(stored[: entry.compressed_offset])
            hasher.update(stored[entry.compressed_offset + entry.compressed_size :])
            return hasher.digest() == blob.meta_digest
    return False


def _toc_at_end(stored: memoryview) -> list[toc.TocEntry]:
    end = len(stored) - toc.TAR_HEADER_SIZE
    header = toc.parse_tar_header(stored[max(end, 0) :], end)
    if header.name != toc.BLOB_TOC or header.size > end:
        raise FormatError("table of contents", end, f"{header.name!r} of {header.size} bytes")
    return toc.parse_toc(stored[end - header.size : end], end - header.size)


def _check_toc(blob: Blob, stored: memoryview, plain: bytes, header: bytes) -> None:
    tail = stored[len(stored) - blob.toc_size :]
    if hashlib.sha256(tail).digest() != blob.toc_digest:
        raise DigestMismatch(f"table of contents of blob {blob.id}: its SHA-256 is wrong")
    for entry in _toc_at_end(tail):
        content = {toc.BLOB_META: plain, toc.BLOB_META_HEADER: header}.get(entry.name)
        if content is not None and hashlib.sha256(content).digest() != entry.digest:
            raise DigestMismatch(f"{entry.name} of blob {blob.id}: its SHA-256 is wrong")


# ---- the form it has beside bootstraps and in caches (reference 4.11)


def pack_cache_form(plain: bytes, header: blobmeta.Header) -> bytes:
    """`<id>.blob.meta`: the region padded to 4096 bytes, then the header."""
    return plain + bytes(round_up(len(plain), blobmeta.HEADER_SIZE) - len(plain)) + blobmeta.HEADER.pack(*header)


def open_cache_form(blob: Blob, data: bytes | memoryview) -> BlobMeta:
    """The blob meta in a `<id>.blob.meta` file. Raises FormatError when it is not that of the blob."""
    data = memoryview(data)
    end = len(data) - blobmeta.HEADER_SIZE
    if end < blob.ci_uncompressed_size:
        raise FormatError("blob meta", 0, f"{len(data)} bytes are too few for blob {blob.id}")
    header = blobmeta.unpack_header(data[end:], end)
    return BlobMeta(blob, data[: blob.ci_uncompressed_size], header)
