"""A tar written piece by piece, clean of encodings: names and attribute values are bytes (POSIX.1-2001, PAX)."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from struct import Struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BLOCK = 512
END = bytes(2 * BLOCK)
_HEADER = Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x")
_MAX_OCTAL_SIZE = 8**11 - 1


def entry_header(
    name: bytes,
    kind: bytes,
    mode: int,
    *,
    uid: int = 0,
    gid: int = 0,
    size: int = 0,
    mtime: int = 0,
    link: bytes = b"",
    device: tuple[int, int] = (0, 0),
    xattrs: Mapping[bytes, bytes] | None = None,
) -> bytes:
    """All blocks in front of an entry's data. `kind` is one of tarfile's types. Attributes as SCHILY.xattr records."""
    records = {b"SCHILY.xattr." + key: value for key, value in sorted((xattrs or {}).items())}
    if len(name) > 100:
        records[b"path"] = name
    if len(link) > 100:
        records[b"linkpath"] = link
    if size > _MAX_OCTAL_SIZE:
        records[b"size"] = b"%d" % size
    head = b""
    if records:
        body = b"".join(_record(key, value) for key, value in records.items())
        head = _block(b"PaxHeader/" + name[-80:], tarfile.XHDTYPE, 0o644, size=len(body)) + body + padding(len(body))
    return head + _block(name, kind, mode, uid, gid, min(size, _MAX_OCTAL_SIZE), mtime, link, device)


def padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


def _record(key: bytes, value: bytes) -> bytes:
    """`length key=value newline`, where the length counts itself."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) > len(str(rest)):
        length += 1
    return b"%d %s=%s\n" % (length, key, value)


def _block(
    name: bytes,
    kind: bytes,
    mode: int,
    uid: int = 0,
    gid: int = 0,
    size: int = 0,
    mtime: int = 0,
    link: bytes = b"",
    device: tuple[int, int] = (0, 0),
) -> bytes:
    fields = (
        name[:100], b"%07o\0" % mode, _number(uid, 8), _number(gid, 8), _number(size, 12), _number(mtime, 12),
        b" " * 8, kind, link[:100], b"ustar\x0000", b"", b"", _number(device[0], 8), _number(device[1], 8), b"",
    )  # fmt: skip
    head = bytearray(_HEADER.pack(*fields))
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def _number(value: int, width: int) -> bytes:
    """Octal where it fits, else GNU's base-256, which also holds times before 1970."""
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    return bytes([0x80 if value >= 0 else 0xFF]) + (value & (1 << 8 * (width - 1)) - 1).to_bytes(width - 1, "big")


class PieceStream(io.RawIOBase):
    """A readable over an iterator of pieces of any size, empty ones included. Errors of the iterator come out of read
    as they are."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces: Iterator[bytes] = iter(pieces)
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = memoryview(piece)
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self._left))
        view[:count] = self._left[:count]
        self._left = self._left[count:]
        return count
