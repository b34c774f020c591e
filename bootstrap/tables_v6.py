"""Superblocks, device slots and blob table of a v6 bootstrap: what is read once, when it is opened.

Reference: RAFS format 1.1 to 1.4.
"""

from __future__ import annotations

import mmap
from itertools import pairwise

from bootstrap.base import Blob, blob_id
from bootstrap.errors import FormatError
from bootstrap.layout import v6
from bootstrap.layout.common import (
    BLOB_FEATURES_UNKNOWN,
    CHUNK_RECORD,
    INLINE_BLOB_ID,
    MAX_CHUNKS_PER_BLOB,
    SUPER_FLAGS_KNOWN,
    BlobFeatures,
    Compressor,
    Digester,
    SuperFlags,
    data_size,
    is_chunk_size,
)

_COMPRESSION_BITS = (
    SuperFlags.COMPRESS_NONE | SuperFlags.COMPRESS_LZ4_BLOCK | SuperFlags.COMPRESS_GZIP | SuperFlags.COMPRESS_ZSTD
)
_DIGEST_BITS = SuperFlags.HASH_BLAKE3 | SuperFlags.HASH_SHA256


def read_superblock(data: mmap.mmap) -> v6.Superblock:
    """The EROFS superblock (1.1) of a mapped file. Raises FormatError."""
    name, at = "v6 superblock", v6.SUPER_OFFSET
    if len(data) < v6.BLOCK_SIZE:
        raise FormatError(name, at, f"the file ends after {len(data)} bytes")
    sb = v6.Superblock(*v6.SUPERBLOCK.unpack_from(data, at))
    if sb.magic != v6.SUPER_MAGIC:
        raise FormatError(name, at, f"magic {sb.magic:#x}")
    if not sb.feature_compat & v6.FEATURE_COMPAT_RAFS:
        raise FormatError(name, at + 8, f"an EROFS image without RAFS data (compat {sb.feature_compat:#x})")
    if sb.feature_incompat != v6.FEATURE_INCOMPAT:
        raise FormatError(name, at + 80, f"incompat features {sb.feature_incompat:#x} instead of 0xc")
    if sb.blkszbits not in (9, 12):
        raise FormatError(name, at + 12, f"block size 2^{sb.blkszbits}")
    if sb.checksum or sb.extslots or sb.union:
        raise FormatError(name, at, "a field that must be 0 is not (checksum, extslots, union)")
    if sb.devt_slotoff != v6.DEVICE_SLOT_OFFSET_UNITS:
        raise FormatError(name, at + 88, f"device table in slot {sb.devt_slotoff} instead of 11")
    if not sb.inos:
        raise FormatError(name, at + 16, "no inodes")
    if len(data) % (1 << sb.blkszbits):
        raise FormatError(name, at, f"file size {len(data)} is not a multiple of the block size: truncated?")
    if sb.xattr_blkaddr << sb.blkszbits > len(data):
        raise FormatError(name, at + 44, f"shared xattrs in block {sb.xattr_blkaddr}, behind the end of the file")
    if sb.meta_blkaddr << sb.blkszbits > len(data):
        raise FormatError(name, at + 40, f"inodes start in block {sb.meta_blkaddr}, behind the end of the file")
    return sb


def read_ext_superblock(data: mmap.mmap, superblock: v6.Superblock) -> v6.ExtSuperblock:
    """The RAFS superblock (1.2), its tables inside the file. Raises FormatError."""
    name, at = "v6 extended superblock", v6.EXT_SUPER_OFFSET
    ext = v6.ExtSuperblock(*v6.EXT_SUPERBLOCK.unpack_from(data, at))
    flags = ext.flags
    if flags & ~SUPER_FLAGS_KNOWN:
        raise FormatError(name, at, f"unknown flags {flags & ~SUPER_FLAGS_KNOWN:#x}")
    if (flags & _COMPRESSION_BITS).bit_count() != 1 or (flags & _DIGEST_BITS).bit_count() != 1:
        raise FormatError(name, at, f"flags {flags:#x} do not name one compressor and one digest")
    if bool(flags & SuperFlags.TARFS) != (superblock.blkszbits == 9):
        raise FormatError(name, at, f"flags {flags:#x} do not fit block size 2^{superblock.blkszbits}")
    if not is_chunk_size(ext.chunk_size):
        raise FormatError(name, at + 20, f"chunk size {ext.chunk_size:#x}")
    if not ext.prefetch_table_offset:  # very old images leave a size there
        ext = ext._replace(prefetch_table_size=0)
    tables = (
        ("blob table", ext.blob_table_offset, ext.blob_table_size, v6.BLOB_ENTRY.size, v6.BLOCK_SIZE),
        ("prefetch table", ext.prefetch_table_offset, ext.prefetch_table_size, v6.NID.size, 8),
        ("chunk table", ext.chunk_table_offset, ext.chunk_table_size, CHUNK_RECORD.size, v6.BLOCK_SIZE),
    )
    spans = []
    for table, offset, size, entry, alignment in tables:
        if not size:
            continue
        if offset % alignment or offset < v6.BLOCK_SIZE or size % entry or offset + size > len(data):
            raise FormatError(name, at, f"{table} of {size} bytes at {offset:#x} is misplaced or cut")
        spans.append((offset, offset + size, table))
    spans.sort()
    for (_, end, first), (start, _, second) in pairwise(spans):
        if start < end:
            raise FormatError(name, at, f"{first} and {second} overlap at {start:#x}")
    return ext


def read_blobs(
    data: mmap.mmap, superblock: v6.Superblock, ext: v6.ExtSuperblock, inline_id: str
) -> list[Blob]:
    """The blob table (1.4) with the device slots (1.3). Raises FormatError."""
    count = ext.blob_table_size // v6.BLOB_ENTRY.size
    if count != superblock.extra_devices:
        raise FormatError(
            "v6 superblock",
            v6.SUPER_OFFSET + 86,
            f"{superblock.extra_devices} devices but {count} blobs in the table",
        )
    if count > 255 or v6.DEVICE_TABLE_OFFSET + count * v6.DEVICE_SLOT.size > len(data):
        raise FormatError("device table", v6.DEVICE_TABLE_OFFSET, f"{count} blobs are too many")
    blobs = [_read_blob(data, ext, index, inline_id) for index in range(count)]
    if len({blob.id for blob in blobs}) != count:
        raise FormatError("blob table", ext.blob_table_offset, "a blob id occurs twice")
    return blobs


def _read_blob(data: mmap.mmap, ext: v6.ExtSuperblock, index: int, inline_id: str) -> Blob:
    name = "blob table entry"
    at = ext.blob_table_offset + index * v6.BLOB_ENTRY.size
    entry = v6.BlobEntry(*v6.BLOB_ENTRY.unpack_from(data, at))
    slot_at = v6.DEVICE_TABLE_OFFSET + index * v6.DEVICE_SLOT.size
    slot_id, blocks, _ = v6.DEVICE_SLOT.unpack_from(data, slot_at)
    features = entry.features
    generated = features & BlobFeatures.IS_CHUNKDICT_GENERATED
    if entry.blob_index != index:
        raise FormatError(name, at + 64, f"index {entry.blob_index} in place {index}")
    if slot_id != entry.blob_id:
        raise FormatError("device slot", slot_at, f"blob id {slot_id!r} is not that of the table")
    if not blocks and not generated:
        raise FormatError("device slot", slot_at + 64, "no blocks")
    if entry.chunk_size != ext.chunk_size:
        raise FormatError(name, at + 68, f"chunk size {entry.chunk_size:#x} instead of {ext.chunk_size:#x}")
    if entry.chunk_count > MAX_CHUNKS_PER_BLOB:
        raise FormatError(name, at + 72, f"{entry.chunk_count} chunks")
    if entry.compressor > 3 or entry.digester > 1:
        raise FormatError(name, at + 76, f"compressor {entry.compressor}, digester {entry.digester}")
    if features & BLOB_FEATURES_UNKNOWN:
        raise FormatError(name, at + 84, f"unknown features {features & BLOB_FEATURES_UNKNOWN:#x}")
    tarfs = bool(features & BlobFeatures.TARFS)
    if entry.compressed_size > 1 << 40 or entry.uncompressed_size > 1 << 44:
        raise FormatError(name, at + 88, f"sizes {entry.compressed_size}, {entry.uncompressed_size}")
    if entry.ci_compressed_size > entry.ci_uncompressed_size:
        raise FormatError(name, at + 120, "blob meta is larger compressed than plain")
    if not (tarfs or generated or features & BlobFeatures.EXTERNAL):
        wide = features & BlobFeatures.CHUNK_INFO_V2
        extra = features & (BlobFeatures.ZRAN | BlobFeatures.BATCH | BlobFeatures.ENCRYPTED)
        least = entry.chunk_count * (24 if wide else 16)
        if entry.ci_uncompressed_size != least and not (wide and extra and entry.ci_uncompressed_size > least):
            raise FormatError(
                name, at + 128, f"blob meta of {entry.ci_uncompressed_size} bytes for {entry.chunk_count} chunks"
            )
    return Blob(
        index=index,
        id=blob_id(entry.blob_id, at, inline_id, INLINE_BLOB_ID),
        chunk_size=entry.chunk_size,
        chunk_count=entry.chunk_count,
        compressor=Compressor(entry.compressor),
        digester=Digester(entry.digester),
        features=BlobFeatures(features),
        compressed_size=entry.compressed_size,
        uncompressed_size=entry.uncompressed_size,
        data_size=data_size(features, entry.compressed_size, entry.ci_offset, entry.ci_uncompressed_size),
        toc_size=entry.blob_toc_size,
        toc_digest=entry.blob_toc_digest,
        ci_compressor=entry.ci_compressor,
        ci_offset=entry.ci_offset,
        ci_compressed_size=entry.ci_compressed_size,
        ci_uncompressed_size=entry.ci_uncompressed_size,
        meta_digest=entry.blob_meta_digest,
        meta_size=entry.blob_meta_size,
        cipher_iv=entry.cipher_iv,
        cipher=entry.cipher,
    )
