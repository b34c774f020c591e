"""All chunks a build knows, as the 80-byte records they have in a bootstrap (1.12). A node's chunks are row numbers.

Records and not objects: a chunk costs 80 bytes here and 400 as an object, the chunk table of a v6 bootstrap is taken in
as it lies, and numpy can look at `records` where a table is large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct

import numpy as np
from numpy.typing import NDArray

from bootstrap.errors import BuildError
from bootstrap.layout.common import CHUNK_RECORD, BlobFeatures, Compressor, Digester
from bootstrap.layout.tables import CHUNK

ROW = CHUNK_RECORD.size
_PLACE = Struct("<I20xQ8xI")  # blob, uncompressed offset, index: what a chunk address needs
_SIZE = Struct("<I")


@dataclass(slots=True, eq=False)
class BlobInfo:
    """One data blob as the blob tables describe it (1.4, 2.4, 2.5)."""

    id: str
    chunk_size: int
    compressor: Compressor
    digester: Digester
    features: BlobFeatures
    chunk_count: int = 0
    compressed_size: int = 0
    uncompressed_size: int = 0
    toc_size: int = 0
    toc_digest: bytes = bytes(32)
    ci_compressor: int = 0
    ci_offset: int = 0
    ci_compressed_size: int = 0
    ci_uncompressed_size: int = 0
    meta_digest: bytes = bytes(32)
    meta_size: int = 0
    cipher: int = 0
    cipher_iv: bytes = bytes(8)
    readahead_offset: int = 0
    readahead_size: int = 0


class ChunkTable:
    """Rows of chunk records. In a row `blob_index` is a place in `blobs` (not in the blob table that will be written),
    and `file_offset` is 0: it follows from the node."""

    __slots__ = ("_places", "blobs", "records")

    def __init__(self) -> None:
        self.records = bytearray()
        self.blobs: list[BlobInfo] = []
        self._places: dict[BlobInfo, int] = {}

    def __len__(self) -> int:
        return len(self.records) // ROW

    def place_of(self, blob: BlobInfo) -> int:
        """Where `blob` is in `blobs`; it is appended when it is new."""
        place = self._places.get(blob)
        if place is None:
            place = self._places[blob] = len(self.blobs)
            self.blobs.append(blob)
        return place

    def add(
        self,
        digest: bytes,
        place: int,
        flags: int,
        compressed_size: int,
        uncompressed_size: int,
        compressed_offset: int,
        uncompressed_offset: int,
        index: int,
        crc32: int,
    ) -> int:
        """Append a chunk of the blob at `place`; its row number."""
        row = len(self.records) // ROW
        self.records += CHUNK_RECORD.pack(
            digest,
            place,
            flags,
            compressed_size,
            uncompressed_size,
            compressed_offset,
            uncompressed_offset,
            0,
            index,
            crc32,
        )
        return row

    def get(self, row: int) -> tuple[bytes, int, int, int, int, int, int, int, int, int]:
        """The fields of CHUNK_RECORD; the second is the place of the blob."""
        return CHUNK_RECORD.unpack_from(self.records, row * ROW)

    def replace(self, row: int, *fields: bytes | int) -> None:
        """New fields for a row, as `add` takes them."""
        digest, place, flags, stored, plain, stored_at, plain_at, index, crc = fields
        CHUNK_RECORD.pack_into(
            self.records, row * ROW, digest, place, flags, stored, plain, stored_at, plain_at, 0, index, crc
        )

    def extend(self, records: NDArray[np.void], blobs: Sequence[BlobInfo]) -> None:
        """Append the records of another image, whose `blob` counts in `blobs`. Raises BuildError if it counts on."""
        records = records.copy()
        if len(records):
            if (last := int(records["blob"].max())) >= len(blobs):
                raise BuildError(f"a chunk record refers to blob {last} of {len(blobs)}")
            places = np.array([self.place_of(blob) for blob in blobs], np.uint32)
            records["blob"], records["file_offset"] = places[records["blob"]], 0
        self.records += records.tobytes()

    def release(self) -> NDArray[np.void]:
        """All records, to be changed by the caller: the table is empty then."""
        records, self.records = self.records, bytearray()
        return np.frombuffer(records, CHUNK)

    def digest(self, row: int) -> bytes:
        return bytes(self.records[row * ROW : row * ROW + 32])

    def size(self, row: int) -> int:
        """Uncompressed bytes."""
        size: int = _SIZE.unpack_from(self.records, row * ROW + 44)[0]
        return size

    def address(self, row: int) -> tuple[int, int, int]:
        """Place of the blob, uncompressed offset, index in the blob."""
        return _PLACE.unpack_from(self.records, row * ROW + 32)
