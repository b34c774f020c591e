"""The one extent map: from a place in an uncompressed blob to the chunk that fills it and the bytes that store it.

Rows are the chunk records of a bootstrap by blob and uncompressed offset (`chunkindex`). Each lies in a `Unit` of
stored bytes that decodes as a whole: by itself (plain, encrypted, external, inside a plain tar), in a batch, or in a
slice of a gzip layer. Only the last two need the blob's own table, its `BlobMeta`: `attach` it when `lacks_meta`.
Tarfs images have no records: their rows are made here, see `TarMap`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from bootstrap.base import Blob, Bootstrap, Chunk
from bootstrap.blobmeta import BlobMeta, Unit, alone, needs_meta
from bootstrap.chunkindex import ChunkIndex
from bootstrap.decode import decode_chunk, decode_together, verify, where
from bootstrap.errors import CodecError, FormatError, RafsError
from bootstrap.layout.common import CHUNK_RECORD, MAX_CHUNK_SIZE, MAX_CHUNKS_PER_BLOB, SuperFlags

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Chunk", "ChunkMap", "Member", "MissingMeta", "Unit", "iter_chunks"]

MAX_SPAN = 16 << 20
"""Uncompressed bytes that the members of one unit may spread over before they are taken apart."""

_row = CHUNK_RECORD.unpack_from
_span = Struct("<44xI8xQ").unpack_from  # of a row: uncompressed size and offset


Facts: TypeAlias = tuple[bytes, int, int, int, int, int, int]
"""Digest, index and CRC of a chunk, its uncompressed offset and size, where its unit begins and ends."""


class MissingMeta(RafsError):
    """The blob's own table is needed first (`blob`)."""

    def __init__(self, blob: Blob) -> None:
        super().__init__(f"blob {blob.id}: its blob meta was not read yet")
        self.blob = blob


class Member(NamedTuple):
    """A chunk, the unit that holds it and its offset in the decoded unit."""

    chunk: Chunk
    unit: Unit
    offset: int


class ChunkMap:
    """All chunks of all blobs of one image, thread-safe. Rows are numbered from 0 over all blobs."""

    def __init__(self, bootstrap: Bootstrap, index: ChunkIndex) -> None:
        self.blobs = bootstrap.blobs
        self._data = memoryview(bootstrap.data)  # keeps the map open for fetches that outlive their mount
        self._index = index
        self._metas: dict[int, BlobMeta] = {}
        self._tables = [needs_meta(blob) for blob in self.blobs]
        self.identity = index.fingerprint
        """Changes with anything the rows are made of."""

    @staticmethod
    def open(bootstrap: Bootstrap, path: str | None) -> ChunkMap:
        """The map of an image; its index from the derived file at `path` if that is right, else built and put there.

        None keeps it in an unlinked temporary file. Raises FormatError when the image's chunks contradict each other,
        RafsError when the file cannot be written.
        """
        if bootstrap.flags & SuperFlags.TARFS:
            from bootstrap.tarmap import TarMap

            return TarMap(bootstrap)
        return ChunkMap(bootstrap, ChunkIndex.open(bootstrap, path))

    def __len__(self) -> int:
        return len(self._index)

    # ---- the blob's own tables

    def lacks_meta(self, blob_index: int) -> bool:
        """Whether `attach` must come before anything but `chunk` and `find`."""
        return self._tables[blob_index] and blob_index not in self._metas

    def attach(self, blob_index: int, meta: BlobMeta) -> None:
        """From now on the blob can be read, or is read by another table."""
        self._metas[blob_index] = meta

    def _meta(self, blob_index: int) -> BlobMeta | None:
        if not self._tables[blob_index]:
            return None
        meta = self._metas.get(blob_index)
        if meta is None:
            raise MissingMeta(self.blobs[blob_index])
        return meta

    # ---- rows

    def chunk(self, row: int) -> Chunk:
        """The chunk in a row. Raises FormatError for a record that cannot be."""
        at = 8 * self._index.places[row]
        fields = _row(self._data, at)
        self._check(at, fields[1], fields[3], fields[5], fields[8])
        return Chunk._make(fields)

    def _check(self, at: int, blob_index: int, stored: int, start: int, number: int) -> None:
        if stored > 2 * MAX_CHUNK_SIZE or start >> 40:
            raise FormatError("chunk record", at, f"{stored} stored bytes at {start:#x}")
        limit = self.blobs[blob_index].chunk_count or MAX_CHUNKS_PER_BLOB
        if number >= limit:
            raise FormatError("chunk record", at, f"chunk {number} of {limit}")

    def blob_rows(self, blob_index: int) -> range:
        """All rows of a blob, in the order of their uncompressed offsets."""
        return range(self._index.starts[blob_index], self._index.starts[blob_index + 1])

    def find(self, blob_index: int, offset: int, size: int = 1) -> int:
        """The row whose chunk holds the `size` bytes at this uncompressed offset; KeyError if no single chunk does."""
        starts, offsets = self._index.starts, self._index.offsets
        row = bisect_right(offsets, offset, starts[blob_index], starts[blob_index + 1]) - 1
        if row >= starts[blob_index]:
            length, start = _span(self._data, 8 * self._index.places[row])
            if offset + size <= start + length:
                return row
        raise KeyError((blob_index, offset))

    def find_starts(self, blob_index: int, offsets: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of the chunks that begin at these uncompressed offsets and hold so many bytes at least; KeyError if
        there is none for one of them."""
        import numpy as np

        first, last = self._index.starts[blob_index], self._index.starts[blob_index + 1]
        known = np.frombuffer(self._index.offsets, "<u8")[first:last].view(np.int64)
        rows = np.searchsorted(known, offsets)
        wrong = rows >= len(known)
        rows[wrong] = 0
        if not len(known) or wrong.any() or (known[rows] != offsets).any():
            raise KeyError((blob_index, "a chunk that begins elsewhere"))
        rows += first
        places = np.frombuffer(self._index.places, "<u4")[rows].astype(np.int64)
        held = np.frombuffer(self._data, "<u8", len(self._data) // 8)[places + 5] >> np.uint64(32)  # uncompressed_size
        if (held.astype(np.int64) < sizes).any():
            raise KeyError((blob_index, "a chunk that is shorter"))
        return rows

    def pieces(self, blob_index: int, offset: int, size: int) -> list[tuple[int, int, int]]:
        """(row, offset, size) of each chunk an extent touches: one, but for tarfs. KeyError if none holds it."""
        starts, offsets = self._index.starts, self._index.offsets  # as `find`: each read comes here
        row = bisect_right(offsets, offset, starts[blob_index], starts[blob_index + 1]) - 1
        if row >= starts[blob_index]:
            length, start = _span(self._data, 8 * self._index.places[row])
            if offset + size <= start + length:
                return [(row, offset, size)]
        raise KeyError((blob_index, offset))

    # ---- units

    def anchors_apart(self, blob_index: int) -> bool:
        """Whether chunks of this blob have other anchors than their own offsets."""
        return self._tables[blob_index]

    def anchor(self, blob_index: int, row: int) -> int:
        """The uncompressed offset by which a chunk is put together with others: where its unit begins.

        So whole units come together. One whose members spread over more than `MAX_SPAN` is cut at multiples of it.
        """
        offset = self._index.offsets[row]
        if not self._tables[blob_index]:
            return offset
        meta = self._meta(blob_index)
        assert meta is not None
        return meta.first_of(self.chunk(row), offset - offset % MAX_SPAN)

    def anchored(self, blob_index: int, start: int, end: int) -> range:
        """Rows whose anchor lies in [start, end)."""
        if self._meta(blob_index) is None:
            first, last = self._index.starts[blob_index], self._index.starts[blob_index + 1]
            low = bisect_left(self._index.offsets, start, first, last)
            return range(low, bisect_left(self._index.offsets, end, low, last))
        rows = self.blob_rows(blob_index)
        low = bisect_left(rows, start, key=lambda row: self.anchor(blob_index, row))
        high = bisect_left(rows, end, lo=low, key=lambda row: self.anchor(blob_index, row))
        return rows[low:high]

    def many_anchored(self, blob_index: int, starts: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        """First row and the one behind the last of `anchored(blob_index, start, start + size)` for each start, where
        chunks are their own anchors."""
        import numpy as np

        first, last = self._index.starts[blob_index], self._index.starts[blob_index + 1]
        offsets = np.frombuffer(self._index.offsets, "<u8")[first:last]
        found: NDArray[np.int64] = first + np.searchsorted(offsets, np.stack((starts, starts + size)).astype(np.uint64))
        return found

    def member(self, row: int) -> Member:
        """The chunk of a row with its unit. Raises MissingMeta, or FormatError when the blob meta contradicts it."""
        chunk = self.chunk(row)
        meta = self._meta(chunk.blob_index)
        if meta is None:
            if not chunk.compressed_size:
                raise FormatError("chunk record", 8 * self._index.places[row], "no stored bytes")
            return Member(chunk, alone(chunk), 0)
        return Member(chunk, *meta.place(chunk))

    def facts(self, blob_index: int, rows: range) -> Iterator[Facts]:
        """`member` for rows of one blob, without what only decoding needs: in a quarter of the time."""
        if self._tables[blob_index]:
            yield from map(facts_of, map(self.member, rows))
            return
        data, places = self._data, self._index.places
        for row in rows:
            at = 8 * places[row]
            digest, _, _, stored, size, start, offset, _, number, crc = _row(data, at)
            self._check(at, blob_index, stored, start, number)
            if not stored:
                raise FormatError("chunk record", at, "no stored bytes")
            yield digest, number, crc, offset, size, start, start + stored

    def many_facts(self, blob_index: int, rows: NDArray[np.int64]) -> NDArray[np.void]:
        """The chunk records (`layout.tables.CHUNK`) of rows of a blob that has no table of its own, where `facts` would
        raise nothing: records that it would refuse have no `compressed_size`."""
        import numpy as np

        from bootstrap.layout.tables import CHUNK

        words = np.frombuffer(self._data, "<u8", len(self._data) // 8)
        places = np.frombuffer(self._index.places, "<u4")[rows].astype(np.int64)
        found: NDArray[np.void] = words[places[:, None] + np.arange(CHUNK.itemsize // 8)].view(CHUNK).reshape(-1)
        limit = self.blobs[blob_index].chunk_count or MAX_CHUNKS_PER_BLOB
        bad = (found["compressed_size"] > 2 * MAX_CHUNK_SIZE) | (found["compressed_offset"] >> np.uint64(40) != 0)
        found["compressed_size"][bad | (found["index"] >= limit)] = 0
        return found

    def decode(self, members: list[Member], stored: bytes | memoryview) -> list[bytes | memoryview]:
        """The plain bytes of chunks that share one unit, each verified; `stored` are all bytes of the unit.

        Thread-safe. Raises CodecError or DigestMismatch, which name the chunk.
        """
        chunk, unit, _ = members[0]
        blob = self.blobs[chunk.blob_index]
        if unit.kind == "chunk":
            return [decode_chunk(chunk, blob, stored)]
        meta = self._meta(chunk.blob_index)
        assert meta is not None
        try:
            plain = memoryview(meta.decode(unit, stored, max(m.offset + m.chunk.uncompressed_size for m in members)))
        except CodecError as error:
            raise CodecError(f"{where(chunk, blob)}: {error}") from error
        found: list[bytes | memoryview] = []
        for member, _, offset in members:
            data = plain[offset : offset + member.uncompressed_size]
            verify(member, blob, data)
            found.append(data)
        return found

    def decode_together(
        self, units: Sequence[list[Member]], offset: int, stored: memoryview, most: int
    ) -> list[memoryview] | None:
        """`decode` of many units of one blob out of `stored`, which begins at `offset` of the blob, by one call, into
        `most` bytes or fewer; None: `decode` them one by one."""
        chunks = [members[0].chunk for members in units if len(members) == 1 and members[0].unit.kind == "chunk"]
        if len(chunks) < len(units) or sum(chunk.uncompressed_size for chunk in chunks) > most:
            return None
        return decode_together(chunks, self.blobs[chunks[0].blob_index], offset, stored)

    def close(self) -> None:
        """Give the maps back; nothing may use this any more."""
        self._index.close()
        self._metas.clear()
        self._data.release()


def facts_of(member: Member) -> Facts:
    """What `ChunkMap.facts` says of it."""
    chunk, unit, _ = member
    place, size = chunk.uncompressed_offset, chunk.uncompressed_size
    return chunk.digest, chunk.index, chunk.crc32, place, size, unit.start, unit.end


def iter_chunks(chunks: ChunkMap, blob_index: int) -> Iterator[Chunk]:
    """All chunks of a blob."""
    return map(chunks.chunk, chunks.blob_rows(blob_index))
