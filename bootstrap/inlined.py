"""Sections of a nydus-formatted blob, found from its end. Reference: RAFS format 4.8 and 4.9."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Protocol

from bootstrap.codec import decompress
from bootstrap.errors import DigestMismatch, FormatError
from bootstrap.layout import toc

MAX_BOOTSTRAP = 1 << 30
"""Refuse to unpack more: 4 million files make about 600 MB."""


class Seekable(Protocol):
    """What is needed of a blob: a binary file or a map."""

    def seek(self, offset: int, /) -> object: ...
    def read(self, size: int, /) -> bytes: ...


def _read(blob: Seekable, offset: int, size: int) -> bytes:
    blob.seek(offset)
    data = blob.read(size)
    if len(data) != size:
        raise FormatError("blob", offset, f"ends after {len(data)} of {size} bytes")
    return data


def sections(blob: Seekable, size: int) -> Iterator[tuple[toc.TarHeader, int]]:
    """Sections from the last to the first, each with its offset; FormatError when the chain breaks."""
    end = size
    while end:
        at = end - toc.TAR_HEADER_SIZE
        if at < 0:
            raise FormatError("tar header", 0, f"only {end} bytes are left for it")
        header = toc.parse_tar_header(_read(blob, at, toc.TAR_HEADER_SIZE), at)
        if header.size > at:
            raise FormatError(
                "tar header", at, f"section {header.name!r} of {header.size} bytes starts before the blob"
            )
        end = at - header.size
        yield header, end


def read_toc(blob: Seekable, size: int) -> list[toc.TocEntry]:
    """The table of contents at the end of a blob; empty when the blob has none."""
    header, at = next(sections(blob, size), (None, 0))
    if header is None or header.name != toc.BLOB_TOC:
        return []
    if header.size > 64 * toc.TOC_ENTRY.size:
        raise FormatError("table of contents", at, f"{header.size} bytes")
    return toc.parse_toc(_read(blob, at, header.size), at)


def read_toc_entry(blob: Seekable, entry: toc.TocEntry, limit: int) -> bytes:
    """Plain content of an entry of at most `limit` bytes, checked against its digest. Not for `image.blob`."""
    if not 0 < entry.uncompressed_size <= limit or entry.compressed_size > entry.uncompressed_size:
        raise FormatError(
            "table of contents", entry.compressed_offset, f"{entry.name} of {entry.uncompressed_size} bytes"
        )
    stored = _read(blob, entry.compressed_offset, entry.compressed_size)
    content = decompress(entry.compressor, stored, entry.uncompressed_size)
    if hashlib.sha256(content).digest() != entry.digest:
        raise DigestMismatch(f"{entry.name} at offset {entry.compressed_offset:#x} of the blob: its SHA-256 is wrong")
    return content


def extract_bootstrap(blob: Seekable, size: int) -> bytes:
    """The bootstrap inside a layer blob of `size` bytes, by table of contents or by tar headers.

    Raises FormatError when there is none, CodecError or DigestMismatch when it is damaged.
    """
    for entry in read_toc(blob, size):
        if entry.name == toc.IMAGE_BOOT:
            if entry.compressed_offset + entry.compressed_size > size:
                raise FormatError("table of contents", entry.compressed_offset, "image.boot lies outside the blob")
            return read_toc_entry(blob, entry, MAX_BOOTSTRAP)
    for header, at in sections(blob, size):
        if header.name == toc.IMAGE_BOOT:
            if header.size > MAX_BOOTSTRAP:
                raise FormatError("tar header", at, f"a bootstrap of {header.size} bytes")
            return _read(blob, at, header.size)
    raise FormatError("blob", 0, "no bootstrap inside")
