"""A data blob against its bootstrap: framing, blob meta, and every chunk. Reference: RAFS format 4 and 10."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from typing import BinaryIO

from bootstrap import blobmeta
from bootstrap.base import Blob, Bootstrap, Chunk
from bootstrap.blobsource import Blobs, Folder, Part, open_blobs
from bootstrap.chunkmap import iter_chunks
from bootstrap.decode import NO_DIGEST, is_legacy_stargz, verify_crc, where
from bootstrap.errors import DigestMismatch, FormatError, RafsError
from bootstrap.inlined import read_toc, read_toc_entry, sections
from bootstrap.layout import toc
from bootstrap.layout.blobmeta import HEADER, HEADER_SIZE, V2_ENCRYPTED
from bootstrap.layout.common import BlobFeatures, ChunkFlags, Compressor
from bootstrap.packing import Packer

_MAX_SECTION = 1 << 30
_READ = 1 << 22


def check_blobs(
    image: Bootstrap, folder: str, *, threads: int = 2, progress: Callable[[int], None] | None = None
) -> int:
    """Check the data of all blobs; the number of chunks decoded.

    Each blob is a file in `folder` named by its id (or the file the bootstrap itself lies in). `progress` is called
    with uncompressed bytes. Raises FormatError, CodecError or DigestMismatch at the first flaw, RafsError when a blob
    is not there; all name the blob's file.
    """
    total = 0
    files = Folder(folder, image.path)
    with open_blobs(image, files) as blobs:
        for blob in image.blobs:
            path = files.path(blob.id)
            try:
                total += _check_blob(blobs, files, blob, threads, progress)
            except FormatError as error:
                raise FormatError(f"{path}: {error.structure}", error.offset, error.message) from error
            except RafsError as error:
                if blob.id in str(error):
                    raise
                raise type(error)(f"{path}: {error}") from error
    return total


_Item = tuple[Chunk, "bytes | memoryview | Part"]


def _check_blob(
    blobs: Blobs, files: Folder, blob: Blob, threads: int, progress: Callable[[int], None] | None
) -> int:
    size = _size(files.path(blob.id))
    if size is not None and size < blob.data_size:
        raise FormatError("data blob", size, f"{size} bytes, shorter than its data of {blob.data_size}")
    meta_blob = files.path(_meta_blob(blob, blobs.image.path))
    region = header = b""
    if blob.ci_uncompressed_size and os.path.exists(meta_blob):
        region, header = _check_meta(blobs, blob)
    digests = _check_framing(meta_blob, blob, {toc.BLOB_META: region, toc.BLOB_META_HEADER: header})
    _look_at_id(files.path(blob.id), blob, len(digests))
    count = 0

    def verify(items: list[_Item]) -> list[int]:
        sizes = []
        for chunk, part in items:
            plain = blobs.decode(part)
            if chunk.flags & ChunkFlags.HAS_CRC and chunk.digest != NO_DIGEST:
                verify_crc(chunk, blob, plain)
            if digests and digests[32 * chunk.index : 32 * chunk.index + 32] != chunk.digest:
                raise DigestMismatch(
                    f"{where(chunk, blob)}: the blob's own list has another digest than the bootstrap"
                )
            sizes.append(len(plain))
        return sizes

    def count_in(_: list[_Item], sizes: list[int]) -> None:
        nonlocal count
        count += len(sizes)
        if progress is not None:
            progress(sum(sizes))

    with Packer(verify, count_in, threads) as packer:
        for chunk, part in blobs.blob_parts(blob.index):
            packer.add((chunk, part), chunk.uncompressed_size)
        packer.flush()
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


def _check_meta(blobs: Blobs, blob: Blob) -> tuple[bytes, bytes]:
    """The blob meta says the same as the blob table and the chunk records (4.7); its plain region and header."""
    span = blobmeta.meta_range(blob, os.path.basename(blobs.image.path).split(".", 1)[0])
    region, header = blobmeta.read_meta(blob, span, blobs.source.read(*span[:3]))
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
    return region, HEADER.pack(*header)


def _look_at_id(path: str, blob: Blob, digests: int) -> None:
    """Warn when a blob is not named by its hash (4.10): it may have been given another id, or be another blob.

    The hash leaves out `digests` bytes of blob.digest where the bootstrap lies apart, and layers are hashed whole.
    """
    if len(blob.id) != 64 or not os.path.exists(path):
        return
    whole, without = hashlib.sha256(), hashlib.sha256()
    start = blob.ci_offset + blob.ci_compressed_size + HEADER_SIZE + toc.TAR_HEADER_SIZE
    at = 0
    with open(path, "rb") as file:
        while data := file.read(_READ):
            whole.update(data)
            cut = [min(max(edge - at, 0), len(data)) for edge in (start, start + digests)]
            without.update(data[: cut[0]])
            without.update(data[cut[1] :])
            at += len(data)
    if blob.id not in (whole.hexdigest(), without.hexdigest()):
        logging.getLogger(__name__).warning("blob %s is not named by its SHA-256", blob.id)


def _check_framing(path: str, blob: Blob, plain: dict[str, bytes]) -> bytes:
    """Tar headers and table of contents, where the features promise them; the digest list if there is one.

    `plain`: sections by name that were decoded already.
    """
    if not blob.features & BlobFeatures.HAS_TAR_HEADER or not os.path.exists(path):
        return b""
    try:
        with open(path, "rb") as file:
            return _check_sections(file, os.fstat(file.fileno()).st_size, blob, plain)
    except OSError as error:
        raise RafsError(f"cannot read data blob {path}: {error.strerror}") from error


def _check_sections(file: BinaryIO, size: int, blob: Blob, plain: dict[str, bytes]) -> bytes:
    found = {}
    for header, at in sections(file, size):
        found[header.name] = (at, header.size)
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
        if entry.name == toc.IMAGE_BLOB:
            _check_image_blob(file, entry, blob)
            continue
        if (entry.compressed_offset, entry.compressed_size) != _place(entry.name, found):
            raise FormatError("table of contents", entry.compressed_offset, f"{entry.name} is not where its section is")
        if _readable(entry, blob):
            content = read_toc_entry(file, entry, _MAX_SECTION)
        else:
            content = plain[entry.name]
            if hashlib.sha256(content).digest() != entry.digest:
                raise DigestMismatch(f"{entry.name}: its SHA-256 in the table of contents is wrong")
        if entry.name == toc.BLOB_DIGEST:
            digests = content
    if digests and len(digests) != 32 * blob.chunk_count:
        raise FormatError("blob.digest", 0, f"{len(digests)} bytes for {blob.chunk_count} chunks")
    return digests


def _place(name: str, found: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """Offset and size of a section; table and header of the blob meta share one."""
    at, size = found.get(toc.BLOB_META if name == toc.BLOB_META_HEADER else name, (-1, 0))
    if name == toc.BLOB_META:
        return at, size - HEADER_SIZE
    return (at + size - HEADER_SIZE, HEADER_SIZE) if name == toc.BLOB_META_HEADER else (at, size)


def _check_image_blob(file: BinaryIO, entry: toc.TocEntry, blob: Blob) -> None:
    """The digest of the data covers its tar header too (4.9, 11), which builders but upstream's may leave out."""
    hashed = hashlib.sha256()
    file.seek(0)
    left = blob.data_size
    while left and (data := file.read(min(left, _READ))):
        hashed.update(data)
        left -= len(data)
    alone = hashed.digest()
    hashed.update(file.read(toc.TAR_HEADER_SIZE))
    if entry.digest not in (hashed.digest(), alone):
        raise DigestMismatch("the chunk data is not what the table of contents says")


def _readable(entry: toc.TocEntry, blob: Blob) -> bool:
    """Whether the entry alone tells how to read it: not so an lz4 table, which it cannot name, or an encrypted one."""
    if entry.name not in (toc.BLOB_META, toc.BLOB_META_HEADER):
        return True
    lz4 = entry.name == toc.BLOB_META and entry.compressor == Compressor.LZ4_BLOCK
    return not lz4 and not blob.features & BlobFeatures.ENCRYPTED
