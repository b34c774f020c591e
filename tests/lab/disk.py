"""Disk images whose GPT partitions are blobs, in both forms that upstream's localdisk backend reads."""

from __future__ import annotations

import struct
import uuid
import zlib
from pathlib import Path

BASIC = uuid.UUID("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7")
LINUX = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
ENTRIES, ENTRY = 128, 128


def write_disk(path: Path, blobs: dict[str, bytes], *, halves: bool = False, sector: int = 512) -> None:
    """`halves`: a blob's id is its partition's name and GUID; else a basic data partition has the id's first half."""
    table_sectors = ENTRIES * ENTRY // sector
    first = 2 + table_sectors
    entries, places, at = b"", [], first
    for blob_id, data in blobs.items():
        count = -(-len(data) // sector)
        name = blob_id[: -32 if halves else 32]
        guid = uuid.UUID(hex=blob_id[-32:]) if halves else uuid.uuid4()
        kind = LINUX if halves else BASIC
        entries += kind.bytes_le + guid.bytes_le + struct.pack("<QQQ", at, at + count - 1, 0)
        entries += name.encode("utf-16-le").ljust(72, b"\0")
        places.append((at, data))
        at += count
    entries = entries.ljust(ENTRIES * ENTRY, b"\0")
    total = at + table_sectors + 1
    disk = uuid.uuid4().bytes_le
    with path.open("wb") as out:
        out.truncate(total * sector)
        mbr = bytearray(512)
        mbr[446:462] = struct.pack("<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff\xff\xff", 1, min(total - 1, 0xFFFFFFFF))
        mbr[510:] = b"\x55\xaa"
        out.write(mbr)
        for mine, other, table in ((1, total - 1, 2), (total - 1, 1, total - 1 - table_sectors)):
            out.seek(mine * sector)
            out.write(_header(mine, other, first, at - 1, disk, table, entries))
            out.seek(table * sector)
            out.write(entries)
        for place, data in places:
            out.seek(place * sector)
            out.write(data)


def _header(mine: int, other: int, first: int, last: int, disk: bytes, table: int, entries: bytes) -> bytes:
    def pack(crc: int) -> bytes:
        return struct.pack(
            "<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, crc, 0, mine, other, first, last, disk, table, ENTRIES,
            ENTRY, zlib.crc32(entries),
        )  # fmt: skip

    return pack(zlib.crc32(pack(0)))
