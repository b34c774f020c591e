"""A data blob against its bootstrap: framing, blob meta, and every chunk. Reference: RAFS format 4 and 10."""

from __future__ import annotations

import hashlib
import os
from typing import BinaryIO

from bootstrap import blobmeta
from bootstrap.base import Blob, Bootstrap
from bootstrap.blobsource import Blobs, Folder, open_blobs
from bootstrap.chunkmap import iter_chunks
from bootstrap.decode import NO_DIGEST, is_legacy_stargz, verify_crc
from bootstrap.errors import DigestMismatch, FormatError, RafsError
from bootstrap.inlined import read_toc, read_toc_entry, sections
from bootstrap.layout import toc
from bootstrap.layout.blobmeta import V2_ENCRYPTED
from bootstrap.layout.common import BlobFeatures, ChunkFlags, Compressor

_MAX_SECTION = 1 << 30


def check_blobs(image: Bootstrap, folder: str) -> int:
    """Check the data of all blobs; the number of chunks decoded.

    Each blob is a file in `folder` named by its id (or the file the bootstrap itself lies in). Raises FormatError,
    CodecError or DigestMismatch at the first flaw, RafsError when a blob is not there; all name the blob's file.
    """
    total = 0
    files = Folder(folder, image.path)
    with open_blobs(image, files) as blobs:
        for blob in image.blobs:
            path = files.path(blob.id)
            try:
                total += _check_blob(blobs, files, blob)
            except FormatError as error:
                raise FormatError(f"{path}: {error.structure}", error.offset, error.message) from error
            except RafsError as error:
                if blob.id in str(error):
                    raise
                raise type(error)(f"{path}: {error}") from error
    return total


def _check_blob(blobs: Blobs, files: Folder, blob: Blob) -> int:
    size = _size(files.path(blob.id))
    if size is not None and size < blob.data_size:
        raise FormatError("data blob", size, f"{size} bytes, shorter than its data of {blob.data_size}")
    meta_blob = files.path(_meta_blob(blob, blobs.image.path))
    if blob.ci_uncompressed_size and os.path.exists(meta_blob):
        _check_meta(blobs, blob)
    digests = _check_framing(meta_blob, blob)
    count = 0
    for chunk, plain in blobs.read_chunks(blob.index):
        if chunk.flags & ChunkFlags.HAS_CRC and chunk.digest != NO_DIGEST:
            verify_crc(chunk, blob, plain)
        if digests and digests[32 * chunk.index : 32 * chunk.index + 32] != chunk.digest:
            raise DigestMismatch(f"chunk {chunk.index}: the blob's own list has another digest than the bootstrap")
        count += 1
    return count


def _size(path: str) -> int | None:
    """None where the blob is there in cache form only."""
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _meta_blob(blob: Blob, own: str) -> str:
    """The id of the blob that holds blob meta, digests and table of contents."""
    if not blob.features & BlobFeatures.SEPARATE:
        return blob.id
    return blob.meta_digest.hex() if any(blob.meta_digest) else os.path.basename(own).split(".", 1)[0]


def _check_meta(blobs: Blobs, blob: Blob) -> None:
    """The blob meta says the same as the blob table and the chunk records (4.7)."""
    where = blobmeta.meta_range(blob, os.path.basename(blobs.image.path).split(".", 1)[0])
    region, header = blobmeta.read_meta(blob, where, blobs.source.read(*where[:3]))
    meta = blobmeta.BlobMeta(blob, region, header)
    for chunk in iter_chunks(blobs.chunks, blob.index):
        unit, _ = meta.place(chunk)
        entry = meta.entry(chunk.index)
        stored = (entry.compressed_offset, entry.compressed_size)
        place = (chunk.compressed_offset, chunk.compressed_size)
        # The stored size of a legacy stargz chunk is an estimate of its builder.
        if unit.kind == "chunk" and stored != place and not is_legacy_stargz(blob):
            raise FormatError("blob meta entry", chunk.index, f"chunk {chunk.index}: at {stored} instead of {place}")
        if bool(entry.flags & V2_ENCRYPTED) != bool(chunk.flags & ChunkFlags.ENCRYPTED):
            raise FormatError("blob meta entry", chunk.index, f"flags {entry.flags:#x} of chunk {chunk.index}")


def _check_framing(path: str, blob: Blob) -> bytes:
    """Tar headers and table of contents, where the features promise them; the digest list if there is one."""
    if not blob.features & BlobFeatures.HAS_TAR_HEADER or not os.path.exists(path):
        return b""
    try:
        with open(path, "rb") as file:
            return _check_sections(file, os.fstat(file.fileno()).st_size, blob)
    except OSError as error:
        raise RafsError(f"cannot read data blob {path}: {error.strerror}") from error


def _check_sections(file: BinaryIO, size: int, blob: Blob) -> bytes:
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
        if blob.toc_size > size:
            raise FormatError("table of contents", 0, f"{blob.toc_size} bytes in a blob of {size}")
        file.seek(size - blob.toc_size)
        if hashlib.sha256(file.read(blob.toc_size)).digest() != blob.toc_digest:
            raise DigestMismatch("the table of contents is not the one the bootstrap names")
    for entry in entries:
        # That of image.blob covers its tar header instead of what its name says (reference 4.9, 11).
        if entry.name == toc.IMAGE_BLOB or not _readable(entry, blob):
            continue
        content = read_toc_entry(file, entry, _MAX_SECTION)
        if entry.name == toc.BLOB_DIGEST:
            digests = content
    if digests and len(digests) != 32 * blob.chunk_count:
        raise FormatError("blob.digest", 0, f"{len(digests)} bytes for {blob.chunk_count} chunks")
    return digests


def _readable(entry: toc.TocEntry, blob: Blob) -> bool:
    """Upstream cannot read an lz4 table through the ToC; an encrypted one is checked by `_check_meta`."""
    if entry.name not in (toc.BLOB_META, toc.BLOB_META_HEADER):
        return True
    lz4 = entry.name == toc.BLOB_META and entry.compressor == Compressor.LZ4_BLOCK
    return not lz4 and not blob.features & BlobFeatures.ENCRYPTED
