"""eStargz archives: where their table of contents is, and what legacy images say about its chunks.

Reference: RAFS format 7.5; the footers are those of the eStargz specification, and of zstd:chunked in the same project:
frames of zstd in place of gzip members.
"""

from __future__ import annotations

from struct import Struct

from bootstrap.errors import FormatError

TOC_NAME = "stargz.index.json"
LANDMARKS = (".prefetch.landmark", ".no.prefetch.landmark")
"""Entries of the archive that are no part of the image."""

DEFAULT_CHUNK_SIZE = 4 << 20

# An empty gzip member whose extra field names the offset of the member that holds the table of contents.
FOOTER_SIZE = 51
FOOTER = Struct("<10sH2sH22s13s")
_GZIP_HEADER = bytes.fromhex("1f8b08040000000000ff")
_EMPTY_DEFLATE = bytes.fromhex("010000ffff") + bytes(8)
_SUBFIELD_ID = b"SG"
_PAYLOAD_SIZE = 22
_MAGIC = b"STARGZ"

# A skippable frame of zstd at the very end: where the table lies, its size there and as text, what it is, a magic.
ZSTD_FOOTER = Struct("<IIQQQQ8s")
ZSTD_FOOTER_SIZE = ZSTD_FOOTER.size
ZSTD_MAGIC = b"GnUlInUx"
_SKIPPABLE, _ESTARGZ_TABLE = 0x184D2A50, 1
_SKIPPABLE_HEADER = 8

LEGACY_FOOTER_SIZE = 47
"""stargz before eStargz: the extra field is the payload itself, without a subfield header."""
LEGACY_FOOTER = Struct("<10sH22s13s")


def pack_footer(toc_offset: int) -> bytes:
    return FOOTER.pack(
        _GZIP_HEADER,
        _PAYLOAD_SIZE + 4,
        _SUBFIELD_ID,
        _PAYLOAD_SIZE,
        b"%016x" % toc_offset + _MAGIC,
        _EMPTY_DEFLATE,
    )


def pack_zstd_footer(toc_offset: int, stored: int, size: int) -> bytes:
    """`stored`, `size`: bytes of the table, compressed and as text."""
    payload = ZSTD_FOOTER_SIZE - _SKIPPABLE_HEADER
    return ZSTD_FOOTER.pack(_SKIPPABLE, payload, toc_offset, stored, size, _ESTARGZ_TABLE, ZSTD_MAGIC)


def zstd_chunked(tail: bytes) -> bool:
    return tail.endswith(ZSTD_MAGIC)


def unpack_zstd_footer(tail: bytes, size: int) -> tuple[int, int]:
    """Offset and compressed length of the table of a zstd:chunked archive of `size` bytes. Raises FormatError."""
    at = size - ZSTD_FOOTER_SIZE
    if len(tail) < ZSTD_FOOTER_SIZE:
        raise FormatError("zstd:chunked footer", max(at, 0), "cut short")
    magic, length, offset, stored, _, kind, _ = ZSTD_FOOTER.unpack(tail[-ZSTD_FOOTER_SIZE:])
    if (magic, length, kind) != (_SKIPPABLE, ZSTD_FOOTER_SIZE - _SKIPPABLE_HEADER, _ESTARGZ_TABLE):
        raise FormatError(
            "zstd:chunked footer", at, "of another form (Podman's, whose chunks have many sizes): convert the image"
        )
    if not _SKIPPABLE_HEADER < offset <= offset + stored <= at or not stored:
        raise FormatError("zstd:chunked footer", at, f"table of {stored} bytes at {offset:#x}, not before the footer")
    return offset, stored


def unpack_footer(tail: bytes, size: int) -> int:
    """Offset of the table of contents, from the last bytes (51 or more) of an archive of `size` bytes.

    Raises FormatError when they are neither footer: the archive is no eStargz.
    """
    if len(tail) >= FOOTER_SIZE:
        head, _, subfield, length, payload, _ = FOOTER.unpack(tail[-FOOTER_SIZE:])
        if (head[:4], subfield, length) == (_GZIP_HEADER[:4], _SUBFIELD_ID, _PAYLOAD_SIZE):
            return _offset(payload, size, FOOTER_SIZE)
    if len(tail) >= LEGACY_FOOTER_SIZE:
        head, length, payload, _ = LEGACY_FOOTER.unpack(tail[-LEGACY_FOOTER_SIZE:])
        if (head[:4], length) == (_GZIP_HEADER[:4], _PAYLOAD_SIZE):
            return _offset(payload, size, LEGACY_FOOTER_SIZE)
    raise FormatError("eStargz footer", max(size - FOOTER_SIZE, 0), "not that of an eStargz archive")


def _offset(payload: bytes, size: int, footer_size: int) -> int:
    at = size - footer_size
    digits, magic = payload[:16], payload[16:]
    if magic != _MAGIC or not all(digit in b"0123456789abcdef" for digit in digits):
        raise FormatError("eStargz footer", at, f"payload {payload!r}")
    offset = int(digits, 16)
    if offset >= at:
        raise FormatError("eStargz footer", at, f"table of contents at {offset:#x}, behind the end")
    return offset


def compressed_bound(uncompressed_size: int) -> int:
    """The most bytes that one gzip member of a chunk takes: all a legacy image says of its stored size."""
    return uncompressed_size + 151 + 5 * (uncompressed_size // 16384)
