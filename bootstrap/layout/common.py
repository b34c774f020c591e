"""What RAFS v5 and v6 share: numbers, flags and the 80-byte chunk record. Reference: RAFS format 0.2 - 0.5 and 1.12."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct

MIN_CHUNK_SIZE = 0x1000
MAX_CHUNK_SIZE = 0x1000000
DEFAULT_CHUNK_SIZE = 0x100000
MAX_CHUNKS_PER_BLOB = 1 << 24
MAX_BLOBS = 255  # a chunk address keeps blob index + 1 in one byte
MAX_BLOB_ID = 64
MAX_NAME = 255
MAX_XATTR_NAME = 255
DIGEST_SIZE = 32
INLINE_BLOB_ID = "x" * 64
"""Blob id of a layer bootstrap that lies inside its own blob: stands for the id taken from the file name."""


class Compressor(IntEnum):
    """Compression of chunks, as numbered in blob tables and blob meta headers."""

    NONE = 0
    LZ4_BLOCK = 1
    GZIP = 2
    ZSTD = 3

    @property
    def label(self) -> str:
        """The name on command lines and in JSON: none, lz4_block, gzip, zstd."""
        return self.name.lower()


class Digester(IntEnum):
    """Digest of chunks and v5 inodes (always 32 bytes)."""

    BLAKE3 = 0
    SHA256 = 1

    @property
    def label(self) -> str:
        return self.name.lower()


class Cipher(IntEnum):
    """Encryption of a blob, as numbered in blob tables (0.3). Images use NONE and AES_128_XTS."""

    NONE = 0
    AES_128_XTS = 1
    AES_256_XTS = 2
    AES_256_GCM = 3

    @property
    def label(self) -> str:
        """The name upstream gives it: none, aes-128-xts ..."""
        return self.name.lower().replace("_", "-")


class SuperFlags(IntFlag):
    """`s_flags` of both superblocks (0.4)."""

    COMPRESS_NONE = 0x1
    COMPRESS_LZ4_BLOCK = 0x2
    HASH_BLAKE3 = 0x4
    HASH_SHA256 = 0x8
    EXPLICIT_UIDGID = 0x10
    HAS_XATTR = 0x20
    COMPRESS_GZIP = 0x40
    COMPRESS_ZSTD = 0x80
    INLINED_CHUNK_DIGEST = 0x100
    TARFS = 0x200
    ENCRYPT_NONE = 0x0100_0000
    ENCRYPT_XTS = 0x0200_0000


SUPER_FLAGS_KNOWN = 0xFF00_03FF
"""Named bits plus the reserved ones readers accept (0x0400_0000 and up); any other set bit refuses the image."""

COMPRESSOR_FLAG = {
    Compressor.NONE: SuperFlags.COMPRESS_NONE,
    Compressor.LZ4_BLOCK: SuperFlags.COMPRESS_LZ4_BLOCK,
    Compressor.GZIP: SuperFlags.COMPRESS_GZIP,
    Compressor.ZSTD: SuperFlags.COMPRESS_ZSTD,
}
"""In the order in which readers look at them when several are set."""

DIGESTER_FLAG = {Digester.BLAKE3: SuperFlags.HASH_BLAKE3, Digester.SHA256: SuperFlags.HASH_SHA256}


class BlobFeatures(IntFlag):
    """Features of one data blob (0.5)."""

    ALIGNED = 0x1
    INLINED_FS_META = 0x2
    CHUNK_INFO_V2 = 0x4
    ZRAN = 0x8
    SEPARATE = 0x10
    INLINED_CHUNK_DIGEST = 0x20
    TARFS = 0x40
    BATCH = 0x80
    ENCRYPTED = 0x100
    IS_CHUNKDICT_GENERATED = 0x200
    IS_SEPARATED_WITH_PREFETCH_FILES = 0x400
    EXTERNAL = 0x800
    HAS_TAR_HEADER = 0x1000_0000
    HAS_TOC = 0x2000_0000
    CAP_TAR_TOC = 0x4000_0000


BLOB_FEATURES_UNKNOWN = 0x8000_F000
"""Bits a v6 reader refuses: unknown ones of the low 16 and the one that never reaches a disk."""


class ChunkFlags(IntFlag):
    """`flags` of a chunk record (1.12)."""

    COMPRESSED = 0x1
    HOLE = 0x2
    ENCRYPTED = 0x4
    BATCH = 0x8
    HAS_CRC = 0x10


CHUNK_RECORD = Struct("<32sIIIIQQQII")
"""digest, blob index, flags, compressed size, uncompressed size, compressed offset, uncompressed offset,
file offset, index, crc32: 80 bytes."""


def round_up(value: int, unit: int) -> int:
    """The smallest multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit


def is_chunk_size(value: int) -> bool:
    """A power of two of 4 KiB to 16 MiB."""
    return MIN_CHUNK_SIZE <= value <= MAX_CHUNK_SIZE and value & (value - 1) == 0


def compressor_of(flags: int) -> Compressor:
    """The compressor the superblock names; lz4_block when it names none (0.4)."""
    for kind, bit in COMPRESSOR_FLAG.items():
        if flags & bit:
            return kind
    return Compressor.LZ4_BLOCK


def digester_of(flags: int) -> Digester:
    """The digester the superblock names; BLAKE3 when it names none (0.4)."""
    if flags & SuperFlags.HASH_SHA256 and not flags & SuperFlags.HASH_BLAKE3:
        return Digester.SHA256
    return Digester.BLAKE3


def super_flags(compressor: Compressor, digester: Digester) -> SuperFlags:
    """The two bits every superblock has, to be or-ed with the rest."""
    return COMPRESSOR_FLAG[compressor] | DIGESTER_FLAG[digester]


def data_size(features: int, compressed_size: int, ci_offset: int, ci_size: int) -> int:
    """Bytes of chunk data at the head of the stored blob (4.10, last paragraph).

    `ci_size` is the blob meta's `ci_uncompressed_size`, 0 where a blob has none (v5).
    """
    if features & BlobFeatures.SEPARATE or not features & BlobFeatures.CAP_TAR_TOC:
        return compressed_size
    end = ci_offset if ci_size else compressed_size
    if features & BlobFeatures.HAS_TAR_HEADER:
        end -= 0x200
    return max(end, 0)
