"""The table of contents of an eStargz layer: where it is, unpacked, and as entries of a tar. RAFS format 7.5.

No I/O: the caller fetches the ranges that are named here.
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from typing import NamedTuple

import msgspec
import zstandard

from bootstrap import tar
from bootstrap.errors import BuildError, CodecError, DigestMismatch, FormatError
from bootstrap.layout.common import DEFAULT_CHUNK_SIZE, Compressor, is_chunk_size
from bootstrap.layout.estargz import (
    DEFAULT_CHUNK_SIZE as STARGZ_CHUNK_SIZE,
)
from bootstrap.layout.estargz import (
    FOOTER_SIZE,
    LANDMARKS,
    TOC_NAME,
    ZSTD_FOOTER_SIZE,
    compressed_bound,
    unpack_footer,
    unpack_zstd_footer,
    zstd_chunked,
)

__all__ = ["TAIL_SIZE", "Toc", "TocChunk", "parse_toc", "toc_compressor", "toc_range", "unpack_toc"]

TAIL_SIZE = max(FOOTER_SIZE, ZSTD_FOOTER_SIZE)
"""So many bytes from the end of a layer tell whether it is eStargz, and where its table is."""

MAX_STORED = 64 << 20
MAX_TOC = 128 << 20
"""JSON of a layer of some 300,000 files; a hostile one must not take all memory."""

_ZSTD_FRAME = bytes.fromhex("28b52ffd")
_TYPES = {
    "dir": tar.DIRECTORY,
    "reg": tar.REGULAR,
    "symlink": tar.SYMLINK,
    "hardlink": tar.LINK,
    "char": tar.CHAR,
    "block": tar.BLOCKDEV,
    "fifo": tar.FIFO,
}


class _Entry(msgspec.Struct):
    """Fields of the JSON that matter here, by their names there."""

    name: str
    type: str
    size: int = 0
    modtime: str = ""
    linkName: str = ""
    mode: int = 0
    uid: int = 0
    gid: int = 0
    devMajor: int = 0
    devMinor: int = 0
    xattrs: dict[str, bytes] | None = None
    digest: str = ""
    offset: int = 0
    innerOffset: int = 0
    chunkOffset: int = 0
    chunkSize: int = 0
    chunkDigest: str = ""

    def as_tar(self) -> tar.Entry:
        """The entry of the tar that this one stands for."""
        kind = _TYPES.get(self.type)
        if kind is None:
            raise BuildError(f"eStargz table: {self.name!r} is of the unknown type {self.type!r}")
        if not 0 <= self.uid <= 0xFFFFFFFF or not 0 <= self.gid <= 0xFFFFFFFF:
            raise BuildError(f"eStargz table: {self.name!r}: owner {self.uid}:{self.gid} does not fit 32 bits")
        if not 0 <= self.size < 1 << 63:
            raise BuildError(f"eStargz table: {self.name!r}: size {self.size}")
        size = self.size if kind == tar.REGULAR else 0
        name = self.name.encode()
        entry = tar.Entry(name, kind, self.mode & 0o7777, self.uid, self.gid, size, _seconds(self.modtime))
        entry.linkname = self.linkName.encode()
        entry.devmajor, entry.devminor = self.devMajor, self.devMinor
        if self.xattrs:
            entry.xattrs = {key.encode(): value for key, value in self.xattrs.items()}
        return entry


class _Table(msgspec.Struct):
    version: int
    entries: list[_Entry]


@functools.lru_cache(4096)
def _seconds(text: str) -> int:
    """Since 1970, of a time as RFC 3339 writes it; the TOC has whole seconds, like the tar headers it comes from."""
    if not text:
        return 0
    try:
        return int(datetime.fromisoformat(text).timestamp() // 1)
    except (ValueError, OverflowError):
        raise BuildError(f"eStargz table: {text!r} is no time") from None


def toc_range(tail: bytes, size: int) -> tuple[int, int]:
    """Offset and length of the gzip member (or zstd frame) of the table, from the last TAIL_SIZE (or more) bytes of
    a layer of `size` bytes. FormatError if the layer is no eStargz archive or its table would be too large."""
    if zstd_chunked(tail):
        offset, length = unpack_zstd_footer(tail, size)
    else:
        offset = unpack_footer(tail, size)
        length = size - offset
    if length > MAX_STORED:
        raise FormatError("eStargz table", offset, f"{length} compressed bytes are more than {MAX_STORED}")
    return offset, length


def toc_compressor(stored: bytes) -> Compressor:
    """What the chunks of a layer are compressed with, from its stored table."""
    return Compressor.ZSTD if stored.startswith(_ZSTD_FRAME) else Compressor.GZIP


def unpack_toc(stored: bytes, digest: str | None = None) -> bytes:
    """The JSON inside that gzip member or zstd frame. `digest`: what it must have ("sha256:...", the layer's
    annotation), if known.

    Raises CodecError for bytes that do not decode, DigestMismatch for others than those named.
    """
    text = _zstd_toc(stored) if toc_compressor(stored) == Compressor.ZSTD else _gzip_toc(stored)
    if digest is not None and digest != f"sha256:{hashlib.sha256(text).hexdigest()}":
        raise DigestMismatch(f"the eStargz table of contents has not the digest {digest} that the image names")
    return text


def _zstd_toc(stored: bytes) -> bytes:
    """The text alone."""
    try:
        text = zstandard.ZstdDecompressor().stream_reader(stored).read(MAX_TOC + 1)
    except zstandard.ZstdError as error:
        raise CodecError(f"zstd:chunked table of contents: {error}") from error
    if len(text) > MAX_TOC:
        raise CodecError(f"zstd:chunked table of contents: more than {MAX_TOC} bytes")
    return text


def _gzip_toc(stored: bytes) -> bytes:
    """The one file of a tar."""
    try:
        packed = zlib.decompressobj(31).decompress(stored, MAX_TOC + tar.READ_SIZE)
    except zlib.error as error:
        raise CodecError(f"eStargz table of contents: {error}") from error
    name = TOC_NAME.encode()
    header = packed[: tar.BLOCK]
    if len(header) < tar.BLOCK or header[: len(name) + 1] != name + b"\0":
        raise CodecError(f"eStargz table of contents: a tar entry {header[:100].split(bytes(1))[0]!r}")
    try:
        length = int(header[124:136].split(b"\0")[0].strip() or b"x", 8)
    except ValueError:
        raise CodecError("eStargz table of contents: its tar header has no size") from None
    if length > MAX_TOC or tar.BLOCK + length > len(packed):
        raise CodecError(f"eStargz table of contents: {length} bytes in {len(packed)}, {MAX_TOC} are the limit")
    return packed[tar.BLOCK : tar.BLOCK + length]


class TocChunk(NamedTuple):
    """A chunk of a file: where its gzip member or zstd frame begins, most bytes of that, bytes of the file, SHA-256."""

    offset: int
    stored_bound: int
    size: int
    digest: bytes


class Toc:
    """The entries of a table. `blob_size`: bytes of the layer, or up to where its file data ends."""

    def __init__(self, entries: list[_Entry], blob_size: int, compressor: Compressor = Compressor.GZIP) -> None:
        self.compressor = compressor
        self._entries = entries
        self._blob_size = blob_size
        starts = sorted({entry.offset for entry in entries if entry.type in ("reg", "chunk") and entry.offset})
        if starts and not 0 < starts[0] <= starts[-1] < blob_size:
            raise BuildError(f"eStargz table: file data at {starts[0]}..{starts[-1]} of a layer of {blob_size} bytes")
        self._next = dict(pairwise([*starts, blob_size]))

    def chunk_size(self) -> int | None:
        """The chunk size of files that have several chunks; None if none has: any that is large enough fits then."""
        for entry in self._entries:
            if entry.type == "reg" and 0 < entry.chunkSize < entry.size:
                return entry.chunkSize
        return None

    def fitting_chunk_size(self) -> int:
        """A chunk size for an image of this layer: its own, or the usual one of eStargz, or more for large chunks."""
        found = self.chunk_size()
        if found is not None:
            if not is_chunk_size(found):
                raise BuildError(
                    f"eStargz chunk size {found} is not a power of two from 4096 to 16 MiB: convert the image"
                )
            return found
        largest = max((entry.size for entry in self._entries if entry.type == "reg"), default=0)
        found = STARGZ_CHUNK_SIZE
        while found < largest:
            found *= 2
        if not is_chunk_size(found):
            raise BuildError(f"eStargz chunk of {largest} bytes: more than 16 MiB; convert the image")
        return found

    def files(self, chunk_size: int = DEFAULT_CHUNK_SIZE) -> Iterator[tuple[tar.Entry, list[TocChunk]]]:
        """Entries in order, each with its chunks, all of `chunk_size` but the last of a file.

        Raises BuildError, naming the file, for a table that contradicts itself or has no chunk digests.
        """
        entries = self._entries
        at = 0
        while at < len(entries):
            first = entries[at]
            at += 1
            if first.type == "chunk":
                raise BuildError(f"eStargz table: a chunk of {first.name!r}, which does not come before it")
            start = at
            while at < len(entries) and entries[at].type == "chunk":
                at += 1
            entry = first.as_tar()
            if first.name.removeprefix("./") in (*LANDMARKS, TOC_NAME):
                continue
            chunks: list[TocChunk] = []
            if entry.type == tar.REGULAR and entry.size:
                chunks = self._chunks([first, *entries[start:at]], chunk_size)
            elif start < at:
                raise BuildError(f"eStargz table: {first.name!r} has chunks but no content")
            yield entry, chunks

    def _chunks(self, pieces: list[_Entry], chunk_size: int) -> list[TocChunk]:
        first = pieces[0]
        where = f"eStargz table: {first.name!r}"
        found = []
        done = 0
        for piece in pieces:
            size = piece.chunkSize or first.size - piece.chunkOffset
            if piece.name != first.name or piece.chunkOffset != done or not 0 < size <= first.size - done:
                raise BuildError(
                    f"{where}: chunk of {size} bytes at {piece.chunkOffset}, {done} of {first.size} are there"
                )
            if piece.innerOffset:
                raise BuildError(f"{where}: shares a gzip member with another chunk; convert the image")
            done += size
            if size > chunk_size or (done < first.size and size != chunk_size):
                raise BuildError(f"{where}: chunk of {size} bytes, the image has chunks of {chunk_size}")
            end = self._next.get(piece.offset)
            if end is None:
                raise BuildError(f"{where}: no offset of its data")
            name = piece.chunkDigest or (first.digest if len(pieces) == 1 else "")
            # zstd: blocks may be as small as their writer liked
            bound = end - piece.offset
            if self.compressor == Compressor.GZIP:
                bound = min(bound, compressed_bound(size))
            found.append(TocChunk(piece.offset, bound, size, _digest(name, where)))
        if done != first.size:
            raise BuildError(f"{where}: chunks of {done} bytes, the file has {first.size}")
        return found


def _digest(text: str, where: str) -> bytes:
    if not text:
        raise BuildError(f"{where}: no digest of its content, which nobody could verify; convert the image")
    kind, _, digits = text.partition(":")
    try:
        value = bytes.fromhex(digits)
    except ValueError:
        value = b""
    if kind != "sha256" or len(value) != 32:
        raise BuildError(f"{where}: digest {text!r} is no sha256")
    return value


def parse_toc(text: bytes, blob_size: int, compressor: Compressor = Compressor.GZIP) -> Toc:
    """The table in its JSON form (version 1). BuildError if it is not that."""
    try:
        table = msgspec.json.decode(text, type=_Table)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise BuildError(f"eStargz table of contents: {error}") from error
    if table.version != 1:
        raise BuildError(f"eStargz table of contents of version {table.version}; 1 is known")
    return Toc(table.entries, blob_size, compressor)
