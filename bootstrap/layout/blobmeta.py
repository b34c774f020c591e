"""Blob meta (the table of chunks inside a v6 data blob); reference: RAFS format 4.7."""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from bootstrap.errors import FormatError

MAGIC = 0xB10BB10B
HEADER_SIZE = 4096
HEADER = Struct("<IIIIQQQQQI4032xI")
ENTRY_V1 = Struct("<QQ")
ENTRY_V2 = Struct("<QQQ")

V2_COMPRESSED = 0x1
V2_ZRAN = 0x2
V2_BATCH = 0x4
V2_ENCRYPTED = 0x8
V2_HAS_CRC = 0x10
MAX_V2_SIZE = 0xFFFFFF
"""A 24-byte entry has 24 bits for the stored size: 16 MiB that do not compress are one too many."""


class Header(NamedTuple):
    """The 4096 bytes behind the table, never compressed (4.7.1), fields in order."""

    magic: int
    features: int
    ci_compressor: int
    ci_entries: int
    ci_offset: int
    ci_compressed_size: int
    ci_uncompressed_size: int
    ci_zran_offset: int = 0
    ci_zran_size: int = 0
    ci_zran_count: int = 0
    magic2: int = MAGIC


class EntryV1(NamedTuple):
    """One chunk: sizes and offsets in bytes. Compressed if the two sizes differ."""

    compressed_offset: int
    compressed_size: int
    uncompressed_offset: int
    uncompressed_size: int


class EntryV2(NamedTuple):
    """One chunk with flags (V2_*) and 8 bytes of data whose meaning the flags give (4.7.3)."""

    compressed_offset: int
    compressed_size: int
    uncompressed_offset: int
    uncompressed_size: int
    flags: int
    data: int


def pack_position(number: int, offset: int) -> int:
    """`data` of an entry that lies in batch or slice `number`, at `offset` of its decompressed bytes."""
    return number << 32 | offset


def unpack_position(data: int) -> tuple[int, int]:
    """Batch or slice number, and offset in its decompressed bytes."""
    return data >> 32, data & 0xFFFF_FFFF


def unpack_header(data: bytes | memoryview, offset: int) -> Header:
    """The header in these 4096 bytes; `offset` is their place in the file, for the error only."""
    if len(data) != HEADER_SIZE:
        raise FormatError("blob meta header", offset, f"{len(data)} bytes instead of {HEADER_SIZE}")
    header = Header._make(HEADER.unpack(data))
    if header.magic != MAGIC or header.magic2 != MAGIC:
        raise FormatError("blob meta header", offset, f"magics {header.magic:#x}, {header.magic2:#x}")
    return header


def pack_v1(compressed_offset: int, compressed_size: int, uncompressed_offset: int, uncompressed_size: int) -> bytes:
    """A 16-byte entry (4.7.2). Sizes 1..16 MiB; the uncompressed offset is a multiple of 4096."""
    c = compressed_size - 1
    u = uncompressed_size - 1
    return ENTRY_V1.pack(
        (u & 0xFFFFF) << 44 | uncompressed_offset & 0xFFF_FFFF_F000 | (u >> 20 & 0xF) << 8,
        (c & 0xFFFFF) << 44 | (c >> 20 & 0xF) << 40 | compressed_offset & 0xFF_FFFF_FFFF,
    )


def unpack_v1(data: bytes | memoryview, offset: int = 0) -> EntryV1:
    u, c = ENTRY_V1.unpack_from(data, offset)
    return EntryV1(
        c & 0xFF_FFFF_FFFF,
        (c >> 44 | (c >> 40 & 0xF) << 20) + 1,
        u & 0xFFF_FFFF_F000,
        (u >> 44 | (u >> 8 & 0xF) << 20) + 1,
    )


def pack_v2(entry: EntryV2) -> bytes:
    """A 24-byte entry (4.7.3)."""
    return ENTRY_V2.pack(
        entry.uncompressed_offset >> 12 | (entry.uncompressed_size - 1) << 32 | entry.flags << 56,
        entry.compressed_offset | entry.compressed_size << 40,
        entry.data,
    )


def unpack_v2(data: bytes | memoryview, offset: int = 0) -> EntryV2:
    u, c, d = ENTRY_V2.unpack_from(data, offset)
    return EntryV2(c & 0xFF_FFFF_FFFF, c >> 40, (u & 0xFFFF_FFFF) << 12, (u >> 32 & 0xFF_FFFF) + 1, u >> 56, d)
