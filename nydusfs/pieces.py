"""Which segments of an image's blobs hold some bytes of a file."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from bootstrap.base import HOLE, Blob, Extent
from bootstrap.chunkmap import ChunkMap
from nydusfs.segments import SEGMENT_SIZE, Segment, make_segment

MAX_SEGMENTS = 4096  # descriptions kept per image; making one again costs 1 us per chunk in it


class Piece(NamedTuple):
    segment: Segment | None  # None: a hole
    offset: int  # in the segment file
    size: int


class Pieces:
    """From any thread."""

    def __init__(self, chunks: ChunkMap, blobs: Sequence[Blob]) -> None:
        self._chunks = chunks
        self._blobs = blobs
        self._segments: OrderedDict[tuple[int, int], Segment] = OrderedDict()
        self._describing = threading.Lock()  # over `_segments`

    def of(self, extents: Sequence[Extent]) -> list[Piece]:
        """What to copy out of which segment; neighbours in one segment are one piece."""
        pieces: list[Piece] = []
        anchor, known = self._chunks.anchor, self._segments
        for blob_index, blob_offset, length, _ in extents:
            if blob_index == HOLE:
                pieces.append(Piece(None, 0, length))
                continue
            for row, offset, size in self._chunks.pieces(blob_index, blob_offset, length):
                number = anchor(blob_index, row) // SEGMENT_SIZE  # as `segment_of`
                segment = known.get((blob_index, number)) or self.segment(blob_index, number)
                if row not in segment.rows:
                    raise KeyError((segment.blob.id, row))
                if segment.places is None:
                    place = offset - segment.number * SEGMENT_SIZE
                else:
                    chunk = self._chunks.chunk(row).uncompressed_offset
                    place = segment.place(chunk) + offset - chunk
                if pieces and (last := pieces[-1]).segment is segment and last.offset + last.size == place:
                    pieces[-1] = Piece(segment, last.offset, last.size + size)
                else:
                    pieces.append(Piece(segment, place, size))
        return pieces

    def segment_of(self, blob_index: int, row: int) -> Segment:
        """The segment that holds a chunk. Raises KeyError or RafsError, `MissingMeta` among them."""
        number = self._chunks.anchor(blob_index, row) // SEGMENT_SIZE
        segment = self._segments.get((blob_index, number)) or self.segment(blob_index, number)
        if row not in segment.rows:
            raise KeyError((segment.blob.id, row))  # its table puts units in no order
        return segment

    def segment(self, blob_index: int, number: int) -> Segment:
        """Raises KeyError when the blob has no chunk there."""
        slot = (blob_index, number)
        with self._describing:
            segment = self._segments.get(slot)
            if segment is None:
                segment = self._segments[slot] = make_segment(self._chunks, self._blobs[blob_index], number)
                if len(self._segments) > MAX_SEGMENTS:
                    self._segments.popitem(last=False)
            else:
                self._segments.move_to_end(slot)
            return segment

    def forget(self, blob_index: int) -> None:
        """The blob's table is another one."""
        with self._describing:
            for slot in [slot for slot in self._segments if slot[0] == blob_index]:
                del self._segments[slot]
