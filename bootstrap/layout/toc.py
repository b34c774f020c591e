"""Framing of a nydus-formatted blob: tar headers *behind* their sections, and the table of contents.

Reference: RAFS format 4.8 and 4.9.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from bootstrap.errors import FormatError
from bootstrap.layout.common import Compressor

TAR_HEADER_SIZE = 512
TOC_ENTRY = Struct("<II16s32sQQQ48x")
TOC_READ_SIZE = 4096

IMAGE_BLOB = "image.blob"
BLOB_META = "blob.meta"
BLOB_META_HEADER = "blob.meta.header"
BLOB_DIGEST = "blob.digest"
IMAGE_BOOT = "image.boot"
BLOB_TOC = "rafs.blob.toc"

COMPRESSOR_TO_TOC = {Compressor.NONE: 0x1, Compressor.ZSTD: 0x2, Compressor.LZ4_BLOCK: 0x4}
TOC_TO_COMPRESSOR = {flag: kind for kind, flag in COMPRESSOR_TO_TOC.items()}


class TarHeader(NamedTuple):
    """A section: its name and the bytes it has right before its header."""

    name: str
    size: int


class TocEntry(NamedTuple):
    """One entry of the table of contents; offset and sizes in bytes, digest is SHA-256 of the plain content."""

    name: str
    compressor: Compressor
    digest: bytes
    compressed_offset: int
    compressed_size: int
    uncompressed_size: int


def pack_tar_header(name: str, size: int) -> bytes:
    """The 512-byte GNU header upstream writes: no owner, no time; base-256 for sizes from 8 GiB on."""
    header = bytearray(TAR_HEADER_SIZE)
    encoded = name.encode("ascii")
    header[0 : len(encoded)] = encoded
    header[124:136] = b"%011o\0" % size if size < 8 << 30 else b"\x80" + size.to_bytes(11, "big")
    header[136:148] = b"00000000000\0"
    header[148:156] = b"        "
    header[156:157] = b"0"
    header[257:265] = b"ustar  \0"
    header[148:156] = b"%07o\0" % sum(header)
    return bytes(header)


def parse_tar_header(data: bytes | memoryview, offset: int = 0) -> TarHeader:
    """The section whose header are these 512 bytes; `offset` is their place in the blob, for the error only.

    Raises FormatError unless it is a regular-file GNU header with a right checksum.
    """
    header = bytes(data)
    structure = "tar header"
    if len(header) != TAR_HEADER_SIZE:
        raise FormatError(structure, offset, f"{len(header)} bytes instead of {TAR_HEADER_SIZE}")
    if header[257:265] != b"ustar  \0" or header[156:157] != b"0":
        raise FormatError(structure, offset, "not a GNU header of a regular file")
    try:
        stored = int(header[148:156].rstrip(b"\0 ") or b"x", 8)
        field = header[124:136]
        size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.rstrip(b"\0 ") or b"0", 8)
        name = header[:100].split(b"\0", 1)[0].decode("ascii")
    except ValueError as error:
        raise FormatError(structure, offset, "a number or name in it is not readable") from error
    if size < 0 or stored != sum(header) - sum(header[148:156]) + 8 * 0x20:
        raise FormatError(structure, offset, "its checksum is wrong")
    return TarHeader(name, size)


def pack_toc_entry(entry: TocEntry) -> bytes:
    return TOC_ENTRY.pack(
        COMPRESSOR_TO_TOC[entry.compressor],
        0,
        entry.name.encode("ascii"),
        entry.digest,
        entry.compressed_offset,
        entry.compressed_size,
        entry.uncompressed_size,
    )


def parse_toc(data: bytes | memoryview, offset: int = 0) -> list[TocEntry]:
    """All entries of a table of contents; `offset` is its place in the blob, for errors only."""
    if len(data) % TOC_ENTRY.size:
        raise FormatError("table of contents", offset, f"size {len(data)} is not a multiple of {TOC_ENTRY.size}")
    entries = []
    for at in range(0, len(data), TOC_ENTRY.size):
        flags, _, raw, digest, compressed_offset, compressed_size, uncompressed_size = TOC_ENTRY.unpack_from(data, at)
        kind = TOC_TO_COMPRESSOR.get(flags)
        if kind is None:
            raise FormatError("table of contents entry", offset + at, f"flags {flags:#x} name no known compression")
        try:
            name = raw.rstrip(b"\0").decode("ascii")
        except UnicodeDecodeError as error:
            raise FormatError("table of contents entry", offset + at, f"name {raw!r} is not text") from error
        entries.append(TocEntry(name, kind, digest, compressed_offset, compressed_size, uncompressed_size))
    return entries
