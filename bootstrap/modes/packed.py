"""The usual mode: chunks are compressed into a data blob of their own, maybe in batches, maybe encrypted.

Reference: RAFS format 4.1 - 4.7.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from crc32c import crc32c

from bootstrap import crypt
from bootstrap.codec import compress
from bootstrap.digest import digest
from bootstrap.errors import BuildError
from bootstrap.layout import batch, blobmeta
from bootstrap.layout.common import BlobFeatures, ChunkFlags, Compressor, SuperFlags
from bootstrap.modes import Content, Context, Mode
from bootstrap.packing import Packer
from bootstrap.tree import Node

MAX_STORED_SIZE = 1 << 40
"""Entries of the blob meta have 40 bits for offsets (4.7.2, 4.7.3)."""

_COMPRESSED = int(ChunkFlags.COMPRESSED)
_ENCRYPTED = int(ChunkFlags.ENCRYPTED)
_HAS_CRC = int(ChunkFlags.HAS_CRC)

_V2_FLAGS = {
    flags: (blobmeta.V2_COMPRESSED if flags & _COMPRESSED else 0)
    | (blobmeta.V2_ENCRYPTED if flags & _ENCRYPTED else 0)
    | (blobmeta.V2_HAS_CRC if flags & _HAS_CRC else 0)
    for flags in range(0x20)
}

Piece = tuple[Node, bytes, bool]
"""A chunk on its way: the file it belongs to, its bytes, whether it may be put into a batch."""

Packed = tuple[bytes, int, int, bytes]
"""Digest, CRC-32C, flags and stored bytes; the last two are empty until it is certain that they are needed."""


class _Member(NamedTuple):
    """A chunk of the open batch: its row and number, its place in the uncompressed blob, its bytes."""

    row: int
    number: int
    plain_at: int
    data: bytes


class PackedMode(Mode):
    """Chunks one after the other, each compressed by itself; with a batch size small ones together (4.6)."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        options = self.options
        if options.compressor == Compressor.GZIP:
            raise BuildError("chunks cannot be written with gzip; use none, lz4_block or zstd")
        self._packer: Packer[Piece, Packed] = Packer(self._pack, self._store, options.threads)
        self._small = options.batch_size // 2
        self._v2 = bool(self.info.features & BlobFeatures.CHUNK_INFO_V2)
        self._v1 = options.fs_version == 6 and not self._v2
        self._keep_digests = options.blob_toc
        self._align = 4095 if options.aligned else 0
        self._base_flags = 0
        if options.secret is not None:
            self.seal = partial(crypt.encrypt, options.secret)
            self.info.cipher = options.secret.cipher
            self.info.meta_digest, self.info.meta_size, self.info.cipher_iv = crypt.to_table(options.secret)
            self._base_flags = _ENCRYPTED
        self._members: list[_Member] = []
        self._members_size = 0
        self._out: list[bytes] = []
        self._at = options.blob_offset

    def close(self) -> None:
        self._packer.close()

    def features(self) -> BlobFeatures:
        found = super().features()
        if self.options.batch_size:
            found |= BlobFeatures.CHUNK_INFO_V2 | BlobFeatures.BATCH
        if self.options.secret is not None:
            found |= BlobFeatures.CHUNK_INFO_V2 | BlobFeatures.ENCRYPTED
        return found

    @property
    def super_flags(self) -> SuperFlags:
        return SuperFlags.ENCRYPT_NONE if self.options.secret is None else SuperFlags.ENCRYPT_XTS

    def add_file(self, node: Node, content: Content) -> None:
        left, chunk_size, add = node.size, self.options.chunk_size, self._packer.add
        if left < self._small:
            add((node, content.read(left), True), left)
            return
        while left > chunk_size:
            add((node, content.read(chunk_size), False), chunk_size)
            left -= chunk_size
        add((node, content.read(left), False), left)

    def flush(self) -> None:
        self._packer.flush()
        self._end_batch()
        self._write_out()
        self.info.compressed_size = self._at

    # -- in threads

    def _pack(self, pieces: list[Piece]) -> list[Packed]:
        digester, known, pack = self.options.digester, self.index.known, self._pack_one
        done: list[Packed] = []
        for _, data, batched in pieces:
            name = digest(digester, data)
            if known(name):  # a miss here costs time, never a byte
                done.append((name, 0, 0, b""))
            elif batched:
                done.append((name, crc32c(data), 0, b""))
            else:
                done.append((name, crc32c(data), *pack(data)))
        return done

    def _pack_one(self, data: bytes) -> tuple[int, bytes]:
        """Flags and stored bytes of a chunk by itself."""
        stored = compress(self.options.compressor, data)
        flags = self._base_flags
        if stored is None:
            stored = data
        else:
            flags |= _COMPRESSED
        return flags, stored if self.seal is None else self.seal(stored)

    # -- in order

    def _store(self, pieces: list[Piece], packed: list[Packed]) -> None:
        find = self.index.find
        taken = 0
        for (node, data, batched), (name, crc, flags, stored) in zip(pieces, packed, strict=True):
            size = len(data)
            taken += size
            row = find(name, size)
            if row < 0:
                if batched:
                    row = self._add_member(name, crc or crc32c(data), data)
                else:
                    if not stored:  # another image's record of this digest is not what it seemed to be
                        crc = crc32c(data)
                        flags, stored = self._pack_one(data)
                    if self._members:
                        self._end_batch()
                    row = self._add_chunk(name, crc, data, flags, stored)
                self.index.add(name, row)
            node.add_chunk(row)
        self._write_out()
        if self.progress is not None:
            self.progress(taken)

    def _write_out(self) -> None:
        if self._out:
            out, self._out = self._out, []
            self.file.write(out[0] if len(out) == 1 else b"".join(out))

    def take_new(self, name: bytes, data: bytes) -> tuple[int, int]:
        """Number and place in the uncompressed blob of a chunk that is stored: called for each of them, in order."""
        number = self.next_index()
        plain_at = self.info.uncompressed_size
        self.info.uncompressed_size = plain_at + (len(data) + self._align & ~self._align)
        if self._keep_digests:
            self.digests += name
        return number, plain_at

    def _add_chunk(self, name: bytes, crc: int, data: bytes, flags: int, stored: bytes) -> int:
        number, plain_at = self.take_new(name, data)
        if crc:  # readers refuse the flag together with 0
            flags |= _HAS_CRC
        at, stored_size, size = self._at, len(stored), len(data)
        if at + stored_size > MAX_STORED_SIZE:
            raise BuildError(f"more than {MAX_STORED_SIZE} bytes of compressed data in one layer: split it")
        row = self.table.add(name, self.place, flags, stored_size, size, at, plain_at, number, crc)
        if self._v1:
            self.entries += blobmeta.pack_v1(at, stored_size, plain_at, size)
        elif self._v2:
            self.entries += _entry_v2(at, stored_size, plain_at, size, flags, crc)
        self._out.append(stored)
        self._at = at + stored_size
        return row

    # -- batches

    def _add_member(self, name: bytes, crc: int, data: bytes) -> int:
        """One more small chunk of the open batch; what is only known at its end is filled in there."""
        size = len(data)
        if self._members_size + size >= self.options.batch_size:
            self._end_batch()
        number, plain_at = self.take_new(name, data)
        flags = self._base_flags | (_HAS_CRC if crc else 0)
        row = self.table.add(name, self.place, flags, 0, size, 0, plain_at, number, crc)
        self.entries += bytes(blobmeta.ENTRY_V2.size)
        self._members.append(_Member(row, number, plain_at, data))
        self._members_size += size
        return row

    def _end_batch(self) -> None:
        members, size = self._members, self._members_size
        if not members:
            return
        self._members, self._members_size = [], 0
        _, stored = self._pack_one(b"".join([member.data for member in members]))
        if self.refused_by_readers(len(stored), size):
            for member in members:
                self._store_alone(member)
            return
        flags = blobmeta.V2_COMPRESSED | blobmeta.V2_BATCH | _V2_FLAGS[self._base_flags]
        inner = 0
        for _, number, plain_at, data in members:
            entry = blobmeta.EntryV2(
                self._at, 0, plain_at, len(data), flags, blobmeta.pack_position(self.context_count, inner)
            )
            self._set_entry(number, blobmeta.pack_v2(entry))
            inner += len(data)
        self.contexts += batch.pack_context(batch.BatchContext(len(stored), size))
        self.context_count += 1
        self._out.append(stored)
        self._at += len(stored)

    @staticmethod
    def refused_by_readers(stored: int, size: int) -> bool:
        """Upstream's take no batch that is stored in more bytes than it has: encryption makes 18 of less than 16."""
        return stored > size

    def _store_alone(self, member: _Member) -> None:
        """A member of a batch that cannot be: its row and entry become those of an ordinary chunk."""
        flags, stored = self._pack_one(member.data)
        name, place, had, _, size, _, plain_at, _, number, crc = self.table.get(member.row)
        flags |= had & _HAS_CRC
        self.table.replace(member.row, name, place, flags, len(stored), size, self._at, plain_at, number, crc)
        self._set_entry(number, _entry_v2(self._at, len(stored), plain_at, size, flags, crc))
        self._out.append(stored)
        self._at += len(stored)

    def _set_entry(self, number: int, entry: bytes) -> None:
        self.entries[number * len(entry) : (number + 1) * len(entry)] = entry


def _entry_v2(at: int, stored_size: int, plain_at: int, size: int, flags: int, crc: int) -> bytes:
    if stored_size > blobmeta.MAX_V2_SIZE:
        raise BuildError(
            f"a chunk of {size} bytes does not compress, and a blob with batches or encryption has no room for such a "
            f"size: use a chunk size of 0x800000 or less"
        )
    return blobmeta.pack_v2(blobmeta.EntryV2(at, stored_size, plain_at, size, _V2_FLAGS[flags], crc))
