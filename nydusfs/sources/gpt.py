"""Partitions of a disk with a GUID partition table (UEFI specification 2.10, chapter 5.3)."""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Callable
from typing import NamedTuple

BASIC_DATA = uuid.UUID("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7")
_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_ENTRY = struct.Struct("<16s16sQQQ72s")
_MAX_ENTRIES = 4096
_MAX_ENTRY = 4096
_SECTORS = (512, 4096)

Read = Callable[[int, int], bytes]


class Partition(NamedTuple):
    """`offset` and `size` in bytes."""

    name: str
    guid: uuid.UUID
    kind: uuid.UUID
    offset: int
    size: int


class GptError(ValueError):
    """The message names structure, offset and value."""


def read_partitions(read: Read, size: int) -> list[Partition]:
    """`read(offset, size)` gives bytes of a disk of `size` bytes, fewer at its end. The table at the disk's end is used
    when the first is damaged. Raises `GptError`, and what `read` raises."""
    first: GptError | None = None
    for sector in _SECTORS:
        for offset in (sector, size - sector):
            if offset < sector:
                continue
            header = read(offset, _HEADER.size)
            if not header.startswith(b"EFI PART"):
                continue
            try:
                return _table(read, size, header, offset, sector)
            except GptError as error:
                first = first or error
    raise first or GptError("no GUID partition table: no 'EFI PART' at offset 512 or 4096, nor at the disk's end")


def _table(read: Read, size: int, raw: bytes, offset: int, sector: int) -> list[Partition]:
    if len(raw) < _HEADER.size:
        raise GptError(f"GPT header at offset {offset}: the disk ends in it")
    _, _, length, crc, _, _, _, _, _, _, table, count, entry_size, table_crc = _HEADER.unpack(raw)
    if not _HEADER.size <= length <= sector:
        raise GptError(f"GPT header at offset {offset}: header size {length}")
    whole = read(offset, length)
    if zlib.crc32(whole[:16] + bytes(4) + whole[20:]) != crc:
        raise GptError(f"GPT header at offset {offset}: its checksum is wrong")
    if not _ENTRY.size <= entry_size <= _MAX_ENTRY or count > _MAX_ENTRIES:
        raise GptError(f"GPT header at offset {offset}: {count} entries of {entry_size} bytes")
    start = table * sector
    if start + count * entry_size > size:
        raise GptError(f"GPT header at offset {offset}: table at sector {table} lies outside of the disk")
    entries = read(start, count * entry_size)
    if len(entries) != count * entry_size or zlib.crc32(entries) != table_crc:
        raise GptError(f"GPT table at offset {start}: its checksum is wrong")
    return [found for number in range(count) if (found := _partition(entries, number, entry_size, sector, size, start))]


def _partition(entries: bytes, number: int, entry_size: int, sector: int, size: int, start: int) -> Partition | None:
    kind, guid, first, last, _, name = _ENTRY.unpack_from(entries, number * entry_size)
    if kind == bytes(16):
        return None
    if last < first or (last + 1) * sector > size:
        where = start + number * entry_size
        raise GptError(f"GPT entry {number} at offset {where}: sectors {first} to {last} lie outside of the disk")
    text = name.decode("utf-16-le", "replace").partition("\0")[0]
    return Partition(
        text,
        uuid.UUID(bytes_le=guid),
        uuid.UUID(bytes_le=kind),
        first * sector,
        (last + 1 - first) * sector,
    )
