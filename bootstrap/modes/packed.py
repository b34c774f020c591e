"""The usual mode: chunks are compressed into a data blob of their own. Reference: RAFS format 4.1 - 4.7."""

from __future__ import annotations

from typing import NamedTuple

from crc32c import crc32c

from bootstrap.codec import compress
from bootstrap.digest import digest
from bootstrap.errors import BuildError
from bootstrap.layout import batch, blobmeta
from bootstrap.layout.common import BlobFeatures, ChunkFlags, Compressor
from bootstrap.modes import Content, Context, Mode
from bootstrap.packing import Packer
from bootstrap.tree import Node

_COMPRESSED = int(ChunkFlags.COMPRESSED)
_HAS_CRC = int(ChunkFlags.HAS_CRC)


class Piece(NamedTuple):
    """A chunk on its way: its row goes to the end of `sink`."""

    sink: list[int]
    data: bytes
    batched: bool


Packed = tuple[bytes, int, "bytes | None"]


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
        self._align = 4095 if options.aligned else 0
        self._keep_digests = options.blob_toc
        self._batch: list[_Member] = []
        self._batch_size = 0
        self._out: list[bytes] = []

    def close(self) -> None:
        self._packer.close()

    def features(self) -> BlobFeatures:
        found = super().features()
        if self.options.batch_size:
            found |= BlobFeatures.CHUNK_INFO_V2 | BlobFeatures.BATCH
        return found

    def add_file(self, node: Node, content: Content) -> None:
        sink = node.chunks
        assert sink is not None
        left, chunk_size, add = node.size, self.options.chunk_size, self._packer.add
        if left < self._small:
            add(Piece(sink, content.read(left), True), left)
            return
        while left > chunk_size:
            add(Piece(sink, content.read(chunk_size), False), chunk_size)
            left -= chunk_size
        add(Piece(sink, content.read(left), False), left)

    def flush(self) -> None:
        self._packer.flush()
        self._end_batch()
        self._write_out()

    # -- in threads

    def _pack(self, pieces: list[Piece]) -> list[Packed]:
        digester, compressor, known = self.options.digester, self.options.compressor, self.index.known
        done: list[Packed] = []
        for _, data, batched in pieces:
            name = digest(digester, data)
            if known(name):
                done.append((name, 0, b""))
            else:
                done.append((name, crc32c(data), None if batched else compress(compressor, data)))
        return done

    # -- in order

    def _store(self, pieces: list[Piece], packed: list[Packed]) -> None:
        find = self.index.find
        taken = 0
        for (sink, data, batched), (name, crc, stored) in zip(pieces, packed, strict=True):
            taken += len(data)
            row = find(name, len(data))
            if row < 0:
                if batched:
                    row = self._add_member(name, crc, data)
                else:
                    if self._batch:
                        self._end_batch()
                    row = self._add_chunk(name, crc, data, stored)
                self.index.add(name, row)
            sink.append(row)
        self._write_out()
        if self.progress is not None:
            self.progress(taken)

    def _write_out(self) -> None:
        if self._out:
            out, self._out = self._out, []
            self.file.write(out[0] if len(out) == 1 else b"".join(out))

    def _add_chunk(self, name: bytes, crc: int, data: bytes, stored: bytes | None) -> int:
        info = self.info
        size = len(data)
        flags = _HAS_CRC if crc else 0  # readers refuse the flag together with 0
        if stored is None:
            stored = data
        else:
            flags |= _COMPRESSED
        at, plain_at = info.compressed_size, info.uncompressed_size
        index = self.next_index()
        row = self.table.add(name, self.place, flags, len(stored), size, at, plain_at, index, crc)
        if self._v1:
            self.entries += blobmeta.pack_v1(at, len(stored), plain_at, size)
        elif self._v2:
            self.entries += self._entry_v2(flags, at, len(stored), plain_at, size, crc)
        if self._keep_digests:
            self.digests += name
        self._out.append(stored)
        info.compressed_size = at + len(stored)
        info.uncompressed_size = plain_at + (size + self._align & ~self._align)
        return row

    @staticmethod
    def _entry_v2(flags: int, at: int, stored_size: int, plain_at: int, size: int, crc: int) -> bytes:
        if stored_size > blobmeta.MAX_V2_SIZE:
            raise BuildError(
                f"a chunk of {size} bytes does not compress and blobs with batches or encryption have no room for its "
                f"size: use a chunk size of 0x800000 or less"
            )
        return blobmeta.pack_v2(blobmeta.EntryV2(at, stored_size, plain_at, size, flags & 0x11 | flags << 1 & 8, crc))

    # -- batches

    def _add_member(self, name: bytes, crc: int, data: bytes) -> int:
        """One more small chunk of the open batch; what is only known at its end is filled in there."""
        info = self.info
        size = len(data)
        if self._batch_size + size >= self.options.batch_size:
            self._end_batch()
        index = self.next_index()
        plain_at = info.uncompressed_size
        row = self.table.add(name, self.place, _HAS_CRC if crc else 0, 0, size, 0, plain_at, index, crc)
        self.entries += bytes(blobmeta.ENTRY_V2.size)
        if self._keep_digests:
            self.digests += name
        self._batch.append(_Member(index, plain_at, data))
        self._batch_size += size
        info.uncompressed_size = plain_at + (size + self._align & ~self._align)
        return row

    def _end_batch(self) -> None:
        members, size = self._batch, self._batch_size
        if not members:
            return
        self._batch, self._batch_size = [], 0
        info = self.info
        plain = b"".join([member.data for member in members])
        stored = compress(self.options.compressor, plain)
        if stored is None:
            stored = plain
        at, inner = info.compressed_size, 0
        for number, plain_at, data in members:
            blobmeta.ENTRY_V2.pack_into(
                self.entries,
                number * blobmeta.ENTRY_V2.size,
                *_batch_entry(at, plain_at, len(data), blobmeta.V2_COMPRESSED, self.context_count, inner),
            )
            inner += len(data)
        self.contexts += batch.pack_context(batch.BatchContext(len(stored), size))
        self.context_count += 1
        self._out.append(stored)
        info.compressed_size = at + len(stored)


class _Member(NamedTuple):
    number: int
    plain_at: int
    data: bytes


def _batch_entry(at: int, plain_at: int, size: int, flags: int, number: int, inner: int) -> tuple[int, int, int]:
    u = plain_at >> 12 | (size - 1) << 32 | (flags | blobmeta.V2_BATCH) << 56
    return u, at, blobmeta.pack_position(number, inner)
