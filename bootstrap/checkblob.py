"""A data blob against its bootstrap: framing, blob meta, and every chunk. Reference: RAFS format 4 and 10."""

from __future__ import annotations

import hashlib
import os
from typing import BinaryIO

from bootstrap.base import Blob, Bootstrap
from bootstrap.chunkmap import Chunk, ChunkMap, decode_chunk, iter_chunks, require_supported, verify_crc
from bootstrap.codec import decompress
from bootstrap.errors import DigestMismatch, FormatError, RafsError
from bootstrap.inlined import read_toc, read_toc_entry, sections
from bootstrap.layout import blobmeta, toc
from bootstrap.layout.common import BlobFeatures, ChunkFlags, Compressor

_MAX_SECTION = 1 << 30


def check_blobs(image: Bootstrap, folder: str) -> int:
    """Check the data of all blobs; the number of chunks decoded.

    Each blob is a file in `folder` named by its id (or the file the bootstrap itself lies in). Raises FormatError,
    CodecError or DigestMismatch at the first flaw, RafsError when a blob is not there; all name the blob's file.
    """
    chunks = ChunkMap.open(image, None)
    total = 0
    try:
        for blob in image.blobs:
            path = os.path.join(folder, blob.id)
            if not os.path.exists(path) and os.path.basename(image.path).split(".", 1)[0] == blob.id:
                path = image.path
            try:
                with open(path, "rb") as file:
                    total += _check_blob(file, blob, chunks)
            except OSError as error:
                raise RafsError(f"cannot read data blob {path}: {error.strerror}") from error
            except FormatError as error:
                raise FormatError(f"{path}: {error.structure}", error.offset, error.message) from error
            except RafsError as error:
                if blob.id in str(error):
                    raise
                raise type(error)(f"{path}: {error}") from error
    finally:
        chunks.close()
    return total


def _read(file: BinaryIO, offset: int, size: int, what: str) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise FormatError(what, offset, f"the blob ends after {len(data)} of {size} bytes")
    return data


def _check_blob(file: BinaryIO, blob: Blob, chunks: ChunkMap) -> int:
    require_supported(blob)
    size = os.fstat(file.fileno()).st_size
    if size < blob.data_size:
        raise FormatError("data blob", size, f"{size} bytes, shorter than its data of {blob.data_size}")
    rows = list(iter_chunks(chunks, blob.index))
    if blob.ci_uncompressed_size:
        _check_meta(file, blob, rows)
    digests = _check_framing(file, size, blob)
    for chunk in rows:
        stored = _read(file, chunk.compressed_offset, chunk.compressed_size, "chunk")
        plain = decode_chunk(chunk, blob, stored)
        if chunk.flags & ChunkFlags.HAS_CRC:
            verify_crc(chunk, blob, plain)
        if digests and digests[32 * chunk.index : 32 * chunk.index + 32] != chunk.digest:
            raise DigestMismatch(f"chunk {chunk.index}: the blob's own list has another digest than the bootstrap")
    return len(rows)


def _check_meta(file: BinaryIO, blob: Blob, rows: list[Chunk]) -> None:
    """The blob meta says the same as the blob table and the chunk records (4.7)."""
    at = blob.ci_offset + blob.ci_compressed_size
    header = blobmeta.Header(*blobmeta.HEADER.unpack(_read(file, at, blobmeta.HEADER_SIZE, "blob meta header")))
    if header.magic != blobmeta.MAGIC or header.magic2 != blobmeta.MAGIC:
        raise FormatError("blob meta header", at, f"magic {header.magic:#x}, {header.magic2:#x}")
    says = (header.ci_entries, header.ci_compressor, header.ci_offset, header.ci_compressed_size)
    table = (blob.chunk_count, blob.ci_compressor, blob.ci_offset, blob.ci_compressed_size)
    if says != table or header.ci_uncompressed_size != blob.ci_uncompressed_size:
        raise FormatError("blob meta header", at, f"entries, compressor, offset, size {says}, in the bootstrap {table}")
    if blob.ci_compressor > Compressor.ZSTD or blob.ci_uncompressed_size > _MAX_SECTION:
        raise FormatError("blob meta", blob.ci_offset, f"{blob.ci_uncompressed_size} bytes, compressor {table[1]}")
    stored = _read(file, blob.ci_offset, blob.ci_compressed_size, "blob meta")
    plain = decompress(Compressor(blob.ci_compressor), stored, blob.ci_uncompressed_size)
    wide = bool(blob.features & BlobFeatures.CHUNK_INFO_V2)
    for chunk in rows:
        entry: blobmeta.EntryV1 | blobmeta.EntryV2
        entry = blobmeta.unpack_v2(plain, 24 * chunk.index) if wide else blobmeta.unpack_v1(plain, 16 * chunk.index)
        place = (chunk.compressed_offset, chunk.compressed_size, chunk.uncompressed_offset, chunk.uncompressed_size)
        if entry[:4] != place and chunk.compressed_size:
            raise FormatError("blob meta", blob.ci_offset, f"chunk {chunk.index}: {entry[:4]} instead of {place}")


def _check_framing(file: BinaryIO, size: int, blob: Blob) -> bytes:
    """Tar headers and table of contents, where the features promise them; the digest list if there is one."""
    if not blob.features & BlobFeatures.HAS_TAR_HEADER:
        return b""
    for header, at in sections(file, size):
        if header.name == toc.IMAGE_BLOB and (at or header.size != blob.data_size):
            raise FormatError("tar header", at, f"data of {header.size} bytes, {blob.data_size} in the bootstrap")
    digests = b""
    if not blob.features & BlobFeatures.HAS_TOC:
        return digests
    entries = read_toc(file, size)
    if not entries:
        raise FormatError("table of contents", size, "is missing")
    if blob.toc_size and any(blob.toc_digest):
        tail = _read(file, size - blob.toc_size, blob.toc_size, "table of contents") if blob.toc_size <= size else b""
        if hashlib.sha256(tail).digest() != blob.toc_digest:
            raise DigestMismatch("the table of contents is not the one the bootstrap names")
    for entry in entries:
        # That of image.blob covers its tar header instead of what its name says (reference 4.9, 11).
        lz4_meta = entry.name == toc.BLOB_META and entry.compressor == Compressor.LZ4_BLOCK
        if entry.name == toc.IMAGE_BLOB or lz4_meta:
            continue
        content = read_toc_entry(file, entry, _MAX_SECTION)
        if entry.name == toc.BLOB_DIGEST:
            digests = content
    if digests and len(digests) != 32 * blob.chunk_count:
        raise FormatError("blob.digest", 0, f"{len(digests)} bytes for {blob.chunk_count} chunks")
    return digests
