"""What a loader reads, from the headers of real programs: this machine's own, judged by what its tools say."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess

import pytest

from nydusfs import elf

PROGRAM = os.path.realpath(shutil.which("ls") or "/bin/ls")
LIBRARY = next(
    (
        line.split()[2]
        for line in subprocess.run(["ldd", PROGRAM], capture_output=True, text=True, check=False).stdout.splitlines()
        if "libc.so" in line
    ),
    "",
)
pytestmark = pytest.mark.skipif(not os.path.exists(LIBRARY), reason="ls of this machine loads no libc.so (musl?)")


def parts(path: str) -> tuple[bytes, elf.Layout, dict[int, list[int]]]:
    with open(path, "rb") as file:
        data = file.read()
    shape = elf.layout(data[: elf.HEAD])
    assert shape is not None and shape.dynamic is not None
    offset, size = shape.dynamic
    return data, shape, elf.dynamic(data[offset : offset + size])


def test_a_program_names_its_loader_and_libraries() -> None:
    data, shape, tags = parts(PROGRAM)
    assert shape.interpreter is not None
    offset, size = shape.interpreter
    assert os.path.exists(data[offset : offset + size].rstrip(b"\0"))
    place = shape.offset(tags[elf.STRTAB][0])
    assert place is not None
    names = {elf.string(data, place + at).decode() for at in tags[elf.NEEDED]}
    text = subprocess.run(["ldd", PROGRAM], capture_output=True, text=True, check=True).stdout
    assert "libc.so.6" in names and names <= set(re.findall(r"^\s*(\S+) =>", text, re.MULTILINE))
    assert shape.offset(shape.entry) is not None


@pytest.mark.parametrize("path", [PROGRAM, LIBRARY])
def test_what_is_told_lies_in_the_file(path: str) -> None:
    data, shape, tags = parts(path)
    assert shape.written and all(start >= 0 and start + size <= len(data) for start, size in shape.written)
    found = elf.tables(shape, tags)
    assert found and all(start > 0 and size > 0 and start + size <= len(data) for start, size in found)
    relocations = shape.offset(tags[elf.RELATAB][0])
    assert relocations is not None
    assert any(s <= relocations and relocations + tags[elf.RELASZ][0] <= s + size for s, size in found)


def test_a_table_that_was_moved_behind_everything_does_not_bring_the_text_along() -> None:
    loads = ((0, 0, 0x1000), (0x1000, 0x1000, 0x900000), (0xA00000, 0xA00000, 0x2000))
    shape = elf.Layout(62, 0, loads, None, None, ())
    tags = {elf.SYMTAB: [0x200], elf.RELATAB: [0x800], elf.RELASZ: [0x300], elf.STRTAB: [0xA00100], elf.STRSZ: [0x80]}
    assert sorted(elf.tables(shape, tags)) == [(0x200, 0x900), (0xA00100, 0x80)]


def test_damaged_headers_are_no_program_or_one_with_other_numbers() -> None:
    with open(PROGRAM, "rb") as file:
        head = file.read(elf.HEAD)
    assert elf.layout(b"#!/bin/sh\n" * 100) is None and elf.layout(head[:63]) is None and elf.layout(b"") is None
    rng = random.Random(5)
    for _ in range(3000):
        bad = bytearray(head)
        for _ in range(rng.randrange(1, 6)):
            bad[rng.randrange(1000)] = rng.randrange(256)
        shape = elf.layout(bytes(bad))
        if shape is not None:
            tags = elf.dynamic(rng.randbytes(320))
            elf.tables(shape, tags)
            shape.offset(rng.randrange(1 << 64))
    assert elf.string(b"abc", 7) == elf.string(b"abc", -1) == b"" and elf.string(b"a\0b", 2) == b""
