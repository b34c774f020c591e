"""Segments: runs of whole neighbouring chunks of a blob, the unit of fetching, verifying, caching and evicting.

A chunk belongs to segment `uncompressed_offset // SEGMENT_SIZE`. The borders follow from the chunk list alone, so every
node asks a peer-to-peer mirror for the same byte ranges (Dragonfly makes one task per exact range).

A segment's `key` is a hash over the digest, place and size of each of its chunks, so it names the plain bytes of the
segment file. That keeps images apart that claim the same blob with other chunk lists: a hostile bootstrap cannot put
its bytes where another image looks, and honest images that use different parts of a base layer share every segment
whose list is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from struct import Struct

from bootstrap.base import Blob
from bootstrap.chunkmap import Chunk, ChunkMap, decode_chunk
from bootstrap.errors import CodecError, DigestMismatch

# One constant for the whole node; part of every key. Larger: fewer requests and cache files, more bytes that nobody
# asked for. Measured over 40 Mbit/s and 20 ms, 2000 files of 10 kB, 69 of them read in 25 places one after the other:
# 1 MiB 1.86 s, 17 requests, 7.0 MB; 512 KiB 1.64 s, 5.1 MB; 256 KiB 1.24 s, 27 requests, 2.9 MB; 128 KiB 1.09 s,
# 1.5 MB. A cold sequential read is at the link's limit with each of them (read-ahead merges neighbours). A Python web
# program in a 144 MB image over the same link: 1 MiB 21.0 MB, 51 requests, 6.7 s; 512 KiB 17.0 MB, 62, 6.1 s; 256 KiB
# 14.4 MB, 78, 6.2 s; 128 KiB 12.6 MB, 96, 6.0 s. Below 256 KiB the gain is in the noise and the files get many.
SEGMENT_SIZE = 256 << 10

# Compressed gap that is read through rather than left out by a second request.
MAX_GAP = 128 * 1024
JOIN_GAP = 48 * 1024  # the same between two segments
# No request is longer than this and one chunk, whatever a bootstrap claims.
MAX_RUN = 32 << 20
KEY_SIZE = 12

_PLACE = Struct("<QI").pack


@dataclass(frozen=True, slots=True)
class Segment:
    """`start` is the uncompressed offset of the file's byte 0, `size` the file's length; `rows` index the chunk map."""

    blob: Blob
    number: int
    key: bytes
    rows: range
    size: int
    compressed_start: int
    compressed_end: int
    gappy: bool  # the compressed range holds much that is not this segment's: read chunk runs one by one

    @property
    def start(self) -> int:
        return self.number * SEGMENT_SIZE

    @property
    def name(self) -> str:
        return f"{self.number}-{self.key.hex()}"

    def adjoins(self, last: Segment) -> bool:
        """Whether one request for both reads little that is neither's. Numbers do not tell: a chunk of 1 MiB is the
        only one of its segment and those after it have none."""
        return (
            last.blob.id == self.blob.id
            and not last.gappy
            and not self.gappy
            and 0 <= self.compressed_start - last.compressed_end <= JOIN_GAP
        )


def make_segment(chunks: ChunkMap, blob: Blob, number: int) -> Segment:
    """Raises KeyError when no chunk of the blob lies there."""
    start = number * SEGMENT_SIZE
    rows = chunks.rows(blob.index, start, start + SEGMENT_SIZE)
    if not rows:
        raise KeyError((blob.id, number))
    hasher = blake2b(digest_size=KEY_SIZE, person=b"nydus segment")
    hasher.update(b"%d %d " % (SEGMENT_SIZE, blob.digester))
    low, high, total, size = 1 << 62, 0, 0, 0
    for row in rows:
        chunk = chunks.chunk(row)
        hasher.update(chunk.digest + _PLACE(chunk.uncompressed_offset, chunk.uncompressed_size))
        low = min(low, chunk.compressed_offset)
        high = max(high, chunk.compressed_offset + chunk.compressed_size)
        total += chunk.compressed_size
        size = chunk.uncompressed_offset + chunk.uncompressed_size - start
    return Segment(blob, number, hasher.digest(), rows, size, low, high, high - low > min(total + MAX_GAP, MAX_RUN))


def runs(chunks: ChunkMap, segment: Segment) -> Iterator[tuple[int, int, list[Chunk]]]:
    """Compressed ranges (start, end) that cover the segment, each with its chunks: one, unless it is `gappy`."""
    rows = [chunks.chunk(row) for row in segment.rows]
    if not segment.gappy:
        yield segment.compressed_start, segment.compressed_end, rows
        return
    rows.sort(key=lambda chunk: chunk.compressed_offset)
    run: list[Chunk] = []
    end = 0
    for chunk in rows:
        start = chunk.compressed_offset
        if run and (start > end + MAX_GAP or start - run[0].compressed_offset > MAX_RUN):
            yield run[0].compressed_offset, end, run
            run, end = [], 0
        end = max(end, start + chunk.compressed_size)
        run.append(chunk)
    yield run[0].compressed_offset, end, run


class BadChunk(Exception):
    """A chunk whose stored bytes are not what the image's digests promise; the message names chunk and blob."""

    def __init__(self, index: int, message: str) -> None:
        self.index = index
        super().__init__(message)


def decode(segment: Segment, chunks: list[Chunk], offset: int, stored: memoryview, plain: bytearray) -> None:
    """Decompress and verify `chunks` out of `stored` (which begins at compressed `offset`) into `plain`.

    Raises `BadChunk`. Pure computation, releases the GIL for most of its time: for worker threads.
    """
    blob, base = segment.blob, segment.start
    for chunk in chunks:
        begin = chunk.compressed_offset - offset
        try:
            data = decode_chunk(chunk, blob, stored[begin : begin + chunk.compressed_size])
        except (CodecError, DigestMismatch) as error:
            raise BadChunk(chunk.index, str(error)) from None
        place = chunk.uncompressed_offset - base
        plain[place : place + len(data)] = data
