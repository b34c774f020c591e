"""RAFS v5: layouts and constants; reference: RAFS format 2. Everything is aligned to 8 bytes."""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

SUPER_MAGIC = 0x52414653
SUPER_VERSION = 0x500
SUPER_SIZE = 0x2000
MAX_FILE_SIZE = 0x8000_0000
ALIGNMENT = 8
ROOT_INO = 1
MAX_SYMLINK = 65535
MAX_XATTR_VALUE = 65536
NO_RDEV = 0xFFFF_FFFF
"""i_rdev of nodes built from a tar that are no device and no fifo."""

SUPERBLOCK = Struct("<IIIIQQQQQIIIIQ8112x")
INODE = Struct("<32sQQIIIIQQQIIIHHIIQ8x")
EXT_BLOB = Struct("<IIQQ40x")
INODE_OFFSET = Struct("<I")
"""Entry of the inode table: record offset / 8, by node index - 1. Also the prefetch table's entry (inode number)."""
READAHEAD = Struct("<II")
"""Head of a blob table entry: readahead offset and size; the id follows, NUL between entries, none after the last."""
XATTR_TOTAL = Struct("<Q")
XATTR_PAIR = Struct("<I")

INODE_SYMLINK = 0x1
INODE_HARDLINK = 0x2
INODE_XATTR = 0x4
INODE_HAS_HOLE = 0x8


class Superblock(NamedTuple):
    """Superblock (2.1), fields in order; `block_size` is the chunk size."""

    magic: int
    version: int
    sb_size: int
    block_size: int
    flags: int
    inodes_count: int
    inode_table_offset: int
    prefetch_table_offset: int
    blob_table_offset: int
    inode_table_entries: int
    prefetch_table_entries: int
    blob_table_size: int
    extended_blob_table_entries: int
    extended_blob_table_offset: int


class Inode(NamedTuple):
    """Fixed part of an inode record (2.6), fields in order."""

    digest: bytes
    parent: int
    ino: int
    uid: int
    gid: int
    projid: int
    mode: int
    size: int
    blocks: int
    flags: int
    nlink: int
    child_index: int
    child_count: int
    name_size: int
    symlink_size: int
    rdev: int
    mtime_nsec: int
    mtime: int


class ExtBlob(NamedTuple):
    """Extended blob table entry (2.5)."""

    chunk_count: int
    features: int
    uncompressed_size: int
    compressed_size: int


def align8(size: int) -> int:
    return (size + 7) & ~7
