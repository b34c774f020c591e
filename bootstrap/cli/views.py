"""What `inspect` shows: parts of an image as lines of text, in upstream's forms."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntFlag
from typing import TYPE_CHECKING, Any

from bootstrap.cli.listing import quoted

if TYPE_CHECKING:
    from bootstrap.base import Chunk
    from bootstrap.reader import Bootstrap

_FLAG_NAMES = {
    "COMPRESS_NONE": "COMPRESSION_NONE",
    "COMPRESS_LZ4_BLOCK": "COMPRESSION_LZ4",
    "COMPRESS_GZIP": "COMPRESSION_GZIP",
    "COMPRESS_ZSTD": "COMPRESSION_ZSTD",
    "EXPLICIT_UIDGID": "EXPLICIT_UID_GID",
    "TARFS": "TARTFS_MODE",
    "ENCRYPT_NONE": "ENCRYPTION_NONE",
    "ENCRYPT_XTS": "ENCRYPTION_ASE_128_XTS",
}
_CIPHERS = {0: "None", 1: "Aes128Xts", 2: "Aes256Xts", 3: "Aes256Gcm"}
LETTERS = {4: "d", 8: "-", 10: "l", 2: "c", 6: "b", 1: "p", 12: "s"}


class Absent(Exception):
    """What was asked for is not in the image."""


def _flags(flags: IntFlag) -> str:
    return " | ".join(_FLAG_NAMES.get(str(flag.name), str(flag.name)) for flag in flags)


def path_text(path: bytes) -> str:
    """A path from the root on one line of text."""
    return "/" + path.decode("utf-8", "backslashreplace")


def paths_of(image: Bootstrap, wanted: set[int]) -> dict[int, list[bytes]]:
    """All paths of some inodes, without the slash in front."""
    found: dict[int, list[bytes]] = {image.root: [b""]} if image.root in wanted else {}
    if wanted - found.keys():
        for path, entry in image.walk():
            if entry.ino in wanted:
                found.setdefault(entry.ino, []).append(path)
    return found


def superblock(image: Bootstrap) -> Iterator[str]:
    from bootstrap.reader_v5 import BootstrapV5
    from bootstrap.reader_v6 import BootstrapV6

    tables = [0] * 6
    if isinstance(image, BootstrapV6):
        ext = image.ext
        tables = [ext.blob_table_offset, ext.blob_table_size, ext.prefetch_table_offset,
                  ext.prefetch_table_size // 4, ext.chunk_table_offset, ext.chunk_table_size]  # fmt: skip
    elif isinstance(image, BootstrapV5):
        sb = image.superblock
        tables[:4] = [sb.blob_table_offset, sb.blob_table_size, sb.prefetch_table_offset, sb.prefetch_table_entries]
    yield ""
    yield f"    Version:                {image.version}"
    yield f"    Inodes Count:           {image.inode_count}"
    yield f"    Chunk Size:             {image.chunk_size // 1024}KB"
    yield f"    Root Inode:             {image.root}"
    yield f"    Flags:                  {_flags(image.flags)}"
    yield f"    Blob table offset:      {tables[0]:#x}"
    yield f"    Blob table size:        {tables[1]:#x}"
    yield f"    Prefetch table offset:  {tables[2]:#x}"
    yield f"    Prefetch table entries: {tables[3]:#x}"
    yield f"    Chunk table offset:     {tables[4]:#x}"
    yield f"    Chunk table size:       {tables[5]:#x}"
    yield "    "


def blob_table(image: Bootstrap) -> Iterator[str]:
    from bootstrap.layout import v6
    from bootstrap.layout.common import INLINE_BLOB_ID, BlobFeatures, Compressor

    for blob in image.blobs:
        mapped = 0
        if image.version == 6:
            at = v6.DEVICE_TABLE_OFFSET + blob.index * v6.DEVICE_SLOT.size
            mapped = v6.DEVICE_SLOT.unpack_from(image.data, at)[2]
        inlined = blob.features & BlobFeatures.INLINED_FS_META
        secret = blob.features & BlobFeatures.ENCRYPTED  # there the place of digest and size holds key and IV
        meta = Compressor(blob.ci_compressor).label if blob.ci_compressor <= Compressor.ZSTD else blob.ci_compressor
        yield ""
        yield f"Blob Index:             {blob.index}"
        yield f"Blob ID:                {blob.id}"
        yield f"Raw Blob ID:            {INLINE_BLOB_ID if inlined else blob.id}"
        yield f"Blob Size:              {blob.compressed_size}"
        yield f"Compressed Data Size:   {blob.data_size}"
        yield f"Uncompressed Data Size: {blob.uncompressed_size}"
        yield f"Mapped Block Address:   {mapped}"
        yield f"Features:               {_flags(blob.features)}"
        yield f"Compressor:             {blob.compressor.label}"
        yield f"Digester:               {blob.digester.name.capitalize()}"
        yield f"Cipher:                 {_CIPHERS.get(blob.cipher, blob.cipher)}"
        yield f"Chunk Size:             {blob.chunk_size:#x}"
        yield f"Chunk Count:            {blob.chunk_count}"
        yield f"Prefetch Table Offset:  {blob.readahead_offset}"
        yield f"Prefetch Table Size:    {blob.readahead_size}"
        yield f"Meta Compressor:        {meta}"
        yield f"Meta Offset:            {blob.ci_offset}"
        yield f"Meta Compressed Size:   {blob.ci_compressed_size}"
        yield f"Meta Uncompressed Size: {blob.ci_uncompressed_size}"
        yield f"ToC Digest:             {blob.toc_digest.hex()}"
        yield f"ToC Size:               {blob.toc_size}"
        yield f"RAFS Blob Digest:       {bytes(32).hex() if secret else blob.meta_digest.hex()}"
        yield f"RAFS Blob Size:         {0 if secret else blob.meta_size}"


def prefetch_table(image: Bootstrap) -> Iterator[str]:
    inodes = image.prefetch_inodes()
    paths = paths_of(image, set(inodes))
    yield f"Total Prefetching Files: {len(inodes)}"
    for ino in inodes:
        shown = " ".join(quoted(b"/" + path) for path in paths.get(ino, [])) or "(no path)"
        yield f"Inode Number: {ino:<10} | Path: {shown} "


def requested(image: Bootstrap, request: str) -> Any:
    """The JSON document of a request; None for a request that has none (nydusd.md 7.3)."""
    if request == "stats":
        return {"inodes_count": image.inode_count}
    if request == "blobs":
        return [
            {
                "blob_id": blob.id,
                "compressed_size": blob.compressed_size,
                "decompressed_size": blob.uncompressed_size,
                "readahead_offset": blob.readahead_offset,
                "readahead_size": blob.readahead_size,
            }
            for blob in image.blobs
        ]
    if request == "prefetch":
        inodes = image.prefetch_inodes()
        paths = paths_of(image, set(inodes))
        return [
            {"inode": ino, "path": [_directory_text(image, ino, path) for path in paths.get(ino, [])]}
            for ino in inodes
        ]
    return None


def _directory_text(image: Bootstrap, ino: int, path: bytes) -> str:
    """Directories end with a slash."""
    return path_text(path) + ("/" if path and image.attr(ino).mode >> 12 == 4 else "")


def inode(image: Bootstrap, ino: int, parent: int, name: bytes) -> Iterator[str]:
    """Attributes of one inode under one of its names."""
    attr = image.attr(ino)
    yield ""
    yield f"Inode Number:       {ino}"
    yield f"Name:               {quoted(name)}"
    yield f"Size:               {attr.size}"
    yield f"Parent:             {parent}"
    yield f"Mode:               0x{attr.mode:X}"
    yield f"Permissions:        {attr.mode:o}"
    yield f"Nlink:              {attr.nlink}"
    yield f"UID:                {attr.uid}"
    yield f"GID:                {attr.gid}"
    yield f"Mtime:              {attr.mtime}"
    yield f"MtimeNsec:          {attr.mtime_nsec}"
    yield f"Blocks:             {attr.blocks}"
    kind = attr.mode >> 12
    if kind in (2, 6):
        yield f"Device:             {attr.rdev >> 8 & 0xFFF}:{attr.rdev & 0xFF | attr.rdev >> 12 & 0xFFF00}"
    if kind == 10:
        yield f"Target:             {quoted(image.readlink(ino))}"
    for key, value in sorted(image.xattrs(ino).items()):
        yield f"Xattr:              {quoted(key)} = {quoted(value)}"


def file_chunks(image: Bootstrap, chunks: list[Chunk]) -> Iterator[str]:
    """The chunks of a file."""
    yield "  Chunk list:"
    for number, chunk in enumerate(chunks):
        yield f"        {number} ->"
        yield f"        file offset: {number * image.chunk_size}, chunk index: {chunk.index}"
        yield f"        compressed size: {chunk.compressed_size}, decompressed size: {chunk.uncompressed_size}"
        yield f"        compressed offset: {chunk.compressed_offset}, decompressed offset: {chunk.uncompressed_offset}"
        yield f"        blob id: {image.blobs[chunk.blob_index].id}"
        yield f"        chunk id: {chunk.digest.hex()}"
        yield "    "


def chunk_users(image: Bootstrap, offset: int) -> Iterator[str]:
    """All files with a chunk stored at this offset of a blob, or around it."""
    from bootstrap.grouped import FileChunks

    chunks = FileChunks(image)
    found = False
    for path, entry in image.walk():
        if entry.dtype != 8:
            continue
        for chunk in chunks.of(entry.ino):
            if not chunk.compressed_offset <= offset < chunk.compressed_offset + max(chunk.compressed_size, 1):
                continue
            found = True
            folder, _, name = path.rpartition(b"/")
            yield ""
            yield f"File: {path_text(name)[1:]:32} Parent Path: {path_text(folder + b'/' if folder else b''):32}"
            yield f"Compressed Offset: {chunk.compressed_offset}, Compressed Size: {chunk.compressed_size}"
            yield f"Decompressed Offset: {chunk.uncompressed_offset}, Decompressed Size: {chunk.uncompressed_size}"
            yield f"Chunk ID: {chunk.digest.hex()},"
            yield f"Blob ID: {image.blobs[chunk.blob_index].id}"
            yield ""
    if not found:
        raise Absent(f"no chunk at offset {offset}")
