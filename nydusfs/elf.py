"""What the dynamic loader reads of a program or library, from the file's own headers.

Only 64-bit little-endian files are understood, which are all that run on x86-64, arm64 and riscv64. Nothing here is
believed further than that bytes of the same file are fetched early.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct

MAGIC = b"\x7fELF"
HEAD = 4096  # bytes from the start that hold the headers of every file that linkers make

_HEADER = Struct("<16sHHIQQQIHHHHHH")
_PROGRAM = Struct("<IIQQQQQQ")
_DYNAMIC = Struct("<qQ")
RELA = Struct("<QQq")  # offset, info, addend
_LOAD, _DYN, _INTERP, _RELRO = 1, 2, 3, 0x6474E552
_WRITE = 2
NEEDED, PLTRELSZ, HASH, STRTAB, SYMTAB, RELATAB, RELASZ, STRSZ, JMPREL = 1, 2, 4, 5, 6, 7, 8, 10, 23
INIT_ARRAY, INIT_ARRAYSZ, RUNPATH, RPATH = 25, 27, 29, 15
GNU_HASH, VERSYM, RELACOUNT, VERNEED = 0x6FFFFEF5, 0x6FFFFFF0, 0x6FFFFFF9, 0x6FFFFFFE
_TABLES = (HASH, GNU_HASH, SYMTAB, VERSYM, VERNEED)
# What a hostile file may claim: ten times what the largest libraries have.
MAX_NAME = 4096  # bytes: a path
MAX_DYNAMIC = 16 << 10  # 1024 tags
MULTIARCH = {62: b"x86_64-linux-gnu", 183: b"aarch64-linux-gnu", 243: b"riscv64-linux-gnu"}

Range = tuple[int, int]  # offset in the file, size


@dataclass(frozen=True, slots=True)
class Layout:
    """Program headers. `loads`: (address, offset, size) of what is mapped from the file."""

    machine: int
    entry: int
    loads: tuple[tuple[int, int, int], ...]
    interpreter: Range | None
    dynamic: Range | None
    written: tuple[Range, ...]  # what relocations change while the program is loaded

    def offset(self, address: int) -> int | None:
        for start, offset, size in self.loads:
            if start <= address < start + size:
                return offset + address - start
        return None


def layout(head: bytes) -> Layout | None:
    """From the first `HEAD` bytes of a file; None for what is no program."""
    if len(head) < _HEADER.size or head[:4] != MAGIC or head[4:6] != b"\2\1":
        return None
    _, kind, machine, _, entry, place, _, _, _, width, count, *_ = _HEADER.unpack_from(head)
    if kind not in (2, 3) or width != _PROGRAM.size or place + width * count > len(head):
        return None
    loads: list[tuple[int, int, int]] = []
    written: list[Range] = []
    interpreter = dynamic = None
    for number in range(count):
        tag, flags, offset, address, _, size, _, _ = _PROGRAM.unpack_from(head, place + number * width)
        if tag == _LOAD and size:
            loads.append((address, offset, size))
            if flags & _WRITE:
                written.append((offset, size))
        elif tag == _INTERP:
            interpreter = (offset, min(size, MAX_NAME))
        elif tag == _DYN:
            dynamic = (offset, min(size, MAX_DYNAMIC))
    return Layout(machine, entry, tuple(loads), interpreter, dynamic, tuple(written))


def dynamic(data: bytes) -> dict[int, list[int]]:
    """Tag -> values of the dynamic section."""
    found: dict[int, list[int]] = {}
    for tag, value in _DYNAMIC.iter_unpack(data[: len(data) // _DYNAMIC.size * _DYNAMIC.size]):
        if tag == 0:
            break
        found.setdefault(tag, []).append(value)
    return found


def tables(shape: Layout, tags: dict[int, list[int]]) -> list[Range]:
    """The runs of symbol, string and relocation tables, one for each mapped part that holds some (tools that edit
    programs put a longer string table behind everything). Relocations are read to their end; of the others lookups
    touch scattered pages."""
    runs: dict[int, Range] = {}
    for tag, size_tag in ((RELATAB, RELASZ), (JMPREL, PLTRELSZ), (STRTAB, STRSZ), *((tag, 0) for tag in _TABLES)):
        if tag not in tags:
            continue
        address, size = tags[tag][0], tags[size_tag][0] if size_tag in tags else 1
        for number, (start, offset, length) in enumerate(shape.loads):
            if start <= address < start + length:
                low, high = offset + address - start, offset + min(address - start + size, length)
                if number in runs:
                    low, high = min(low, runs[number][0]), max(high, sum(runs[number]))
                runs[number] = (low, high - low)
    return list(runs.values())


def string(data: bytes, offset: int) -> bytes:
    """A name of the string table; b"" for what lies outside, or is none."""
    return data[offset : max(offset, data.find(b"\0", offset, offset + MAX_NAME))] if 0 <= offset < len(data) else b""
