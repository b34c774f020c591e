"""RAFS v6: an EROFS image with extras. Layouts, constants and packing; reference: RAFS format 1 and 1.1 - 1.13."""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

BLOCK_SIZE = 4096
TARFS_BLOCK_SIZE = 512
SUPER_OFFSET = 1024
SUPER_MAGIC = 0xE0F5E1E2
EXT_SUPER_OFFSET = 1152
DEVICE_TABLE_OFFSET = 1408
DEVICE_SLOT_OFFSET_UNITS = 11  # of 128 bytes: 1408
MIN_FILE_SIZE = 8192
ROOT_NID = 128
NID_UNIT = 32
FEATURE_COMPAT_RAFS = 0x4000_0000
FEATURE_INCOMPAT = 0x0000_000C  # chunked files, device table
MAX_SYMLINK = 4096
MAX_INO = 0x7FFF_FFFF
MAX_XATTR_VALUE = 65535
MAPPED_ALIGNMENT = 0x80000

SUPERBLOCK = Struct("<IIIBBHQQIIII16s16sIHHH38x")
EXT_SUPERBLOCK = Struct("<QQIIQQQII200x")
DEVICE_SLOT = Struct("<64sII56x")
BLOB_ENTRY = Struct("<64sIIIIIIQQIIQQQ32s32sQ8sI36x")
INODE_EXTENDED = Struct("<HHHHQIIIIQII16x")
INODE_COMPACT = Struct("<HHHHIIIIHH4x")
DIRENT = Struct("<QHBB")
CHUNK_ADDRESS = Struct("<HHI")
XATTR_HEADER = Struct("<IB7x")
XATTR_ENTRY = Struct("<BBH")
SHARED_XATTR = Struct("<I")
"""Behind the header, as many as it says: place of an entry in the shared area, in units of 4 bytes."""
NID = Struct("<I")

FORMAT_EXTENDED = 1
FORMAT_MASK = 0xF
LAYOUT_FLAT_PLAIN = 0
LAYOUT_FLAT_INLINE = 2
LAYOUT_CHUNK_BASED = 4
CHUNK_FORMAT_INDEXES = 0x20
CHUNK_FORMAT_BITS = 0x1F

XATTR_PREFIXES = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}

# EROFS file types and the DT_* numbers of readdir (1.9)
FILE_TYPE_TO_DT = (0, 8, 4, 2, 6, 1, 12, 10)  # unknown, regular, directory, char, block, fifo, socket, symlink
DT_TO_FILE_TYPE = {dt: number for number, dt in enumerate(FILE_TYPE_TO_DT) if dt}


class Superblock(NamedTuple):
    """EROFS superblock (1.1), fields in order."""

    magic: int = SUPER_MAGIC
    checksum: int = 0
    feature_compat: int = FEATURE_COMPAT_RAFS
    blkszbits: int = 12
    extslots: int = 0
    root_nid: int = ROOT_NID
    inos: int = 0
    build_time: int = 0
    build_time_nsec: int = 0
    blocks: int = 0
    meta_blkaddr: int = 0
    xattr_blkaddr: int = 0
    uuid: bytes = bytes(16)
    volume_name: bytes = bytes(16)
    feature_incompat: int = FEATURE_INCOMPAT
    union: int = 0
    extra_devices: int = 0
    devt_slotoff: int = DEVICE_SLOT_OFFSET_UNITS


class ExtSuperblock(NamedTuple):
    """RAFS extended superblock (1.2); sizes in bytes."""

    flags: int
    blob_table_offset: int
    blob_table_size: int
    chunk_size: int
    chunk_table_offset: int
    chunk_table_size: int
    prefetch_table_offset: int = 0
    prefetch_table_size: int = 0
    padding: int = 0


class BlobEntry(NamedTuple):
    """Blob table entry (1.4). `cipher_iv` is bytes 8..15 of the IV; bytes 0..7 lie in `blob_meta_size`."""

    blob_id: bytes
    blob_index: int
    chunk_size: int
    chunk_count: int
    compressor: int
    digester: int
    features: int
    compressed_size: int
    uncompressed_size: int
    blob_toc_size: int = 0
    ci_compressor: int = 0
    ci_offset: int = 0
    ci_compressed_size: int = 0
    ci_uncompressed_size: int = 0
    blob_toc_digest: bytes = bytes(32)
    blob_meta_digest: bytes = bytes(32)
    blob_meta_size: int = 0
    cipher_iv: bytes = bytes(8)
    cipher: int = 0


def chunk_address(blob_index: int, chunk_index: int, blkaddr: int) -> tuple[int, int, int]:
    """lo, hi and block address of a chunk address (1.10), to be packed by CHUNK_ADDRESS."""
    return chunk_index & 0xFFFF, (blob_index + 1) | (chunk_index >> 16) << 8, blkaddr


def encode_rdev(major: int, minor: int) -> int:
    """The 32-bit Linux device number (1.11): 259:300 is 0x11032C."""
    return (major & 0xFFF) << 8 | (minor & 0xFF) | (minor & 0xFFF00) << 12


def xattr_area_size(icount: int) -> int:
    """Bytes of the inline xattr area of an inode whose `i_xattr_icount` is `icount`."""
    return 12 + 4 * (icount - 1) if icount else 0
