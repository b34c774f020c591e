"""A new data blob out of chunks that other blobs hold: what compact and optimize have in common.

Every chunk is decoded and verified on its way: a wrong byte is found now and not at some container's start. What is
stored as the new blob wants it is then copied as it is, the rest (batches, gzip, encrypted chunks) stored anew.
Reference: RAFS format 4.1 - 4.7; blobs have neither tar headers nor a table of contents.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from bootstrap import crypt
from bootstrap.base import Chunk
from bootstrap.blobfile import BlobFile, Region
from bootstrap.blobsource import Blobs, Part
from bootstrap.chunktable import BlobInfo
from bootstrap.codec import compress
from bootstrap.digest import digest
from bootstrap.errors import BuildError
from bootstrap.layout import blobmeta
from bootstrap.layout.common import (
    MAX_CHUNKS_PER_BLOB,
    BlobFeatures,
    ChunkFlags,
    Cipher,
    Compressor,
    round_up,
)
from bootstrap.layout.tables import CHUNK
from bootstrap.packing import Packer

_MAX_V2_SIZE = 0xFFFFFF


@dataclass(frozen=True)
class NewBlob:
    """What was written: its entry, and a record per chunk in the order they were given (`blob` is left 0)."""

    info: BlobInfo
    records: NDArray[np.void]


@dataclass(slots=True)
class _Ready:
    """A chunk as it will lie in the new blob."""

    digest: bytes
    flags: int
    crc: int
    stored: bytes
    size: int


class _Item:
    """A chunk on its way: still to be decoded, or plain already."""

    __slots__ = ("chunk", "part")

    def __init__(self, chunk: Chunk, part: bytes | memoryview | Part) -> None:
        self.chunk = chunk
        self.part = part


class _Repacker:
    def __init__(self, blobs: Blobs, out: BinaryIO, features: int, threads: int) -> None:
        image = blobs.image
        self._blobs = blobs
        self._v6 = image.version == 6
        self._file = BlobFile(out, framed=False)
        secret = any(blob.features & BlobFeatures.ENCRYPTED for blob in image.blobs)
        self._secret = crypt.generate() if secret else None
        own = BlobFeatures(features) | BlobFeatures.CAP_TAR_TOC
        if self._v6:
            own |= BlobFeatures.ALIGNED
        if self._secret is not None:
            own |= BlobFeatures.ENCRYPTED | BlobFeatures.CHUNK_INFO_V2
        self.info = BlobInfo(
            id="",
            chunk_size=image.chunk_size,
            # Nobody writes gzip chunks: those of an original layer become zstd.
            compressor=Compressor.ZSTD if image.compressor == Compressor.GZIP else image.compressor,
            digester=image.digester,
            features=own,
        )
        if self._secret is not None:
            self.info.cipher = Cipher.AES_128_XTS
            self.info.meta_digest, self.info.meta_size, self.info.cipher_iv = crypt.to_table(self._secret)
        self._entries = bytearray()
        self._rows: list[tuple[bytes, int, int, int, int, int, int, int, int, int]] = []
        self._packer: Packer[_Item, _Ready] = Packer(self._pack, self._store, threads)

    def run(self, chunks: Iterable[Chunk], progress: Callable[[int], None] | None) -> NewBlob:
        with self._packer as packer:
            for chunk in chunks:
                packer.add(_Item(chunk, self._blobs.chunk_part(chunk)), chunk.uncompressed_size)
                if progress is not None:
                    progress(chunk.uncompressed_size)
            packer.flush()
        info = self.info
        if self._v6 and info.chunk_count:
            seal = None if self._secret is None else self._encrypt
            self._file.add_meta(info, Region(bytes(self._entries)), info.compressor, seal)
        info.compressed_size = self._file.size
        info.id = self._file.id_hash()
        return NewBlob(info, np.array(self._rows, CHUNK))

    def _encrypt(self, data: bytes) -> bytes:
        assert self._secret is not None
        return crypt.encrypt(self._secret, data)

    # -- in threads

    def _pack(self, items: list[_Item]) -> list[_Ready]:
        return [self._one(item) for item in items]

    def _one(self, item: _Item) -> _Ready:
        chunk, info = item.chunk, self.info
        source = self._blobs.image.blobs[chunk.blob_index]
        plain = self._blobs.decode(item.part)
        name = chunk.digest
        if source.digester != info.digester or not any(name):
            name = digest(info.digester, plain)
        flags = chunk.flags & ChunkFlags.HAS_CRC
        crc = chunk.crc32 if flags else crc32c(plain)
        packed = self._copied(item) or compress(info.compressor, plain)
        stored = bytes(plain)
        if packed is not None and len(packed) < len(plain):
            stored = packed
            flags |= ChunkFlags.COMPRESSED
        if self._secret is not None:
            stored = self._encrypt(stored)
            flags |= ChunkFlags.ENCRYPTED
        return _Ready(name, flags | (ChunkFlags.HAS_CRC if crc else 0), crc, stored, len(plain))

    def _copied(self, item: _Item) -> bytes | None:
        """The stored bytes, if they are compressed as the new blob's are."""
        part, flags = item.part, item.chunk.flags
        if not isinstance(part, Part) or flags & ChunkFlags.ENCRYPTED or not flags & ChunkFlags.COMPRESSED:
            return None
        same = self._blobs.image.blobs[item.chunk.blob_index].compressor == self.info.compressor
        return part.stored if same else None

    # -- in order

    def _store(self, _: list[_Item], ready: list[_Ready]) -> None:
        info = self.info
        for one in ready:
            at, plain_at, index = info.compressed_size, info.uncompressed_size, info.chunk_count
            if index >= MAX_CHUNKS_PER_BLOB - 1:
                raise BuildError(f"more than {MAX_CHUNKS_PER_BLOB - 1} chunks in one blob")
            size = len(one.stored)
            self._rows.append((one.digest, 0, one.flags, size, one.size, at, plain_at, 0, index, one.crc))
            if self._v6:
                self._entries += self._entry(one, at, plain_at)
            self._file.write(one.stored)
            info.chunk_count = index + 1
            info.compressed_size = at + size
            info.uncompressed_size = plain_at + (round_up(one.size, 4096) if self._v6 else one.size)

    def _entry(self, one: _Ready, at: int, plain_at: int) -> bytes:
        size = len(one.stored)
        if self._secret is None:
            return blobmeta.pack_v1(at, size, plain_at, one.size)
        if size > _MAX_V2_SIZE:
            raise BuildError("a chunk of 16 MiB that does not compress has no place in an encrypted blob")
        flags = blobmeta.V2_ENCRYPTED
        if one.flags & ChunkFlags.COMPRESSED:
            flags |= blobmeta.V2_COMPRESSED
        if one.flags & ChunkFlags.HAS_CRC:
            flags |= blobmeta.V2_HAS_CRC
        return blobmeta.pack_v2(blobmeta.EntryV2(at, size, plain_at, one.size, flags, one.crc))


def repack(
    blobs: Blobs,
    chunks: Iterable[Chunk],
    folder: Path,
    *,
    features: int = 0,
    threads: int = 2,
    progress: Callable[[int], None] | None = None,
) -> NewBlob:
    """Store these chunks of an image, in this order, as a new blob in `folder`, named by its id.

    Compressed like the image; encrypted, with a key of its own, if the image is. `features` are added to those of a
    plain blob. `progress` is called with uncompressed bytes. Nothing is left behind on failure. Raises RafsError for
    chunks that are damaged or not there, BuildError for a folder that cannot be written.
    """
    partial = folder / f".repack.{os.getpid()}.tmp"
    try:
        try:
            with open(partial, "wb") as out:
                made = _Repacker(blobs, out, features, threads).run(chunks, progress)
            partial.replace(folder / made.info.id)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise BuildError(f"cannot write a data blob to {folder}: {error.strerror}") from error
    return made
