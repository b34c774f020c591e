"""The pack stage's file: a data blob front to back, its sections, their tar trailers and the table of contents.

Reference: RAFS format 4.7 - 4.10. What the sections hold is the mode's business (`bootstrap.modes`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from bootstrap.chunktable import BlobInfo
from bootstrap.codec import compress, zstd_stream
from bootstrap.layout import blobmeta, toc
from bootstrap.layout.common import Compressor
from bootstrap.spool import Spool

Seal = Callable[[bytes], bytes]

IN_ONE_PIECE = 64 << 20
"""Larger regions are compressed as a stream: the restart points of a layer of 4 GB take 256 MB."""


@dataclass(frozen=True, slots=True)
class Region:
    """Chunk entries, batch or zran contexts, dictionaries of the latter: what is compressed as a whole (4.7)."""

    entries: bytes
    contexts: bytes = b""
    context_count: int = 0
    dictionaries: Spool | None = None

    def __len__(self) -> int:
        tail = 0 if self.dictionaries is None else len(self.dictionaries)
        return len(self.entries) + len(self.contexts) + tail

    def _pieces(self) -> Iterator[bytes]:
        yield self.entries
        yield self.contexts
        if self.dictionaries is not None:
            yield from self.dictionaries.pieces()

    def pack(self, kind: Compressor) -> tuple[Compressor, Iterable[bytes], int, bytes]:
        """How it is stored, the stored bytes and their number, and the SHA-256 of the plain ones."""
        if len(self) <= IN_ONE_PIECE or kind != Compressor.ZSTD:
            plain = b"".join(self._pieces())
            digest = hashlib.sha256(plain).digest()
            stored = compress(kind, plain)
            if stored is None:
                return Compressor.NONE, [plain], len(plain), digest
            return kind, [stored], len(stored), digest
        packed, sha256 = Spool(), hashlib.sha256()
        packer = zstd_stream(len(self))
        for piece in self._pieces():
            sha256.update(piece)
            packed.append(packer.compress(piece))
        packed.append(packer.flush())
        if len(packed) >= len(self):
            return Compressor.NONE, self._pieces(), len(self), sha256.digest()
        return kind, packed.pieces(), len(packed), sha256.digest()


class BlobFile:
    """Appends to `out`, hashing as it goes. `framed`: a tar header follows each section (inline metadata or ToC)."""

    def __init__(self, out: BinaryIO, *, framed: bool) -> None:
        self._out = out.write
        self._framed = framed
        self.sha256: Any = hashlib.sha256()
        """Of every byte written so far."""
        self.size = 0
        """Bytes written so far."""
        self.meta_header = b""
        """The plain header of the blob meta, once there is one."""
        self._hash_for_id: Any = self.sha256
        self._toc: list[toc.TocEntry] = []

    def write(self, data: bytes | bytearray) -> None:
        self._out(data)
        self.sha256.update(data)
        if self._hash_for_id is not self.sha256:
            self._hash_for_id.update(data)
        self.size += len(data)

    def id_hash(self) -> str:
        """SHA-256 in hex of everything written but the digest array (4.10)."""
        return cast(str, self._hash_for_id.hexdigest())

    def _frame(self, name: str, size: int) -> None:
        if self._framed:
            self.write(toc.pack_tar_header(name, size))

    def _entry(self, name: str, kind: Compressor, digest: bytes, at: int, stored: int, plain: int) -> None:
        self._toc.append(toc.TocEntry(name, kind, digest, at, stored, plain))

    def end_data(self, uncompressed_size: int) -> None:
        """Close the section of chunk data: everything written so far."""
        size = self.size
        self._frame(toc.IMAGE_BLOB, size)
        self._entry(toc.IMAGE_BLOB, Compressor.NONE, self.sha256.digest(), 0, size, uncompressed_size)

    def add_meta(self, info: BlobInfo, region: Region, kind: Compressor, seal: Seal | None) -> None:
        """The blob meta (4.7): the region, compressed with `kind` where that makes it smaller, then the header.

        Fills in the ci_ fields of `info`. `seal` encrypts region and header each; such regions have no dictionaries.
        """
        kind, pieces, stored_size, digest = region.pack(kind)
        if seal is not None:
            sealed = seal(b"".join(pieces))
            pieces, stored_size = [sealed], len(sealed)
        at = self.size
        info.ci_compressor, info.ci_offset = kind, at
        info.ci_compressed_size, info.ci_uncompressed_size = stored_size, len(region)
        header = blobmeta.HEADER.pack(
            *blobmeta.Header(
                blobmeta.MAGIC,
                int(info.features),
                kind,
                info.chunk_count,
                at,
                stored_size,
                len(region),
                ci_zran_offset=len(region.entries) if region.context_count else 0,
                ci_zran_size=len(region) - len(region.entries),
                ci_zran_count=region.context_count,
            )
        )
        self.meta_header = header
        for piece in pieces:
            self.write(piece)
        self.write(header if seal is None else seal(header))
        size = len(header)
        self._frame(toc.BLOB_META, stored_size + size)
        self._entry(toc.BLOB_META, kind, digest, at, stored_size, len(region))
        digest = hashlib.sha256(header).digest()
        self._entry(toc.BLOB_META_HEADER, Compressor.NONE, digest, at + stored_size, size, size)

    def add_digests(self, digests: bytes | bytearray) -> None:
        """The array of chunk digests; the blob's id does not depend on these bytes (4.10)."""
        self._hash_for_id = self.sha256.copy()
        at, size = self.size, len(digests)
        self._out(digests)
        self.sha256.update(digests)
        self.size += size
        self._frame(toc.BLOB_DIGEST, size)
        self._entry(toc.BLOB_DIGEST, Compressor.NONE, hashlib.sha256(digests).digest(), at, size, size)

    def add_bootstrap(self, bootstrap: bytes | bytearray, *, packed: bool) -> None:
        """The inlined bootstrap, zstd if `packed` (and smaller)."""
        smaller = compress(Compressor.ZSTD, bootstrap) if packed else None
        kind, stored = (Compressor.NONE, bootstrap) if smaller is None else (Compressor.ZSTD, smaller)
        at = self.size
        self.write(stored)
        self._frame(toc.IMAGE_BOOT, len(stored))
        self._entry(toc.IMAGE_BOOT, kind, hashlib.sha256(bootstrap).digest(), at, len(stored), len(bootstrap))

    def add_toc(self) -> bytes:
        """The table of contents, with its tar header; returns what was written."""
        entries: Sequence[toc.TocEntry] = self._toc
        table = b"".join(map(toc.pack_toc_entry, entries))
        table += toc.pack_tar_header(toc.BLOB_TOC, len(table))
        self.write(table)
        return table
