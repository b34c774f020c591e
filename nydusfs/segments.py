"""Segments: runs of whole neighbouring chunks of a blob, the unit of fetching, verifying, caching and evicting.

A chunk belongs to segment `anchor // SEGMENT_SIZE`; its anchor is the uncompressed offset at which the stored unit that
holds it begins: itself, or the first chunk of its batch or gzip slice. So the borders follow from the blob's metadata
alone, every node asks a peer-to-peer mirror for the same byte ranges (Dragonfly makes one task per exact range), and
no unit is fetched or decoded for two segments, unless its chunks spread over more than 16 MiB.

A segment's `key` is a hash over the digest, place and size of each of its chunks, so it names the plain bytes of the
segment file. That keeps images apart that claim the same blob with other chunk lists: a hostile bootstrap cannot put
its bytes where another image looks, and honest images that use different parts of a base layer share every segment
whose list is the same.

In the file each chunk begins at a multiple of 4096 bytes, so that a kernel file system can point to it. Blobs whose
chunks do so anyway (v6) keep their distances; others (v5) are laid out anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from struct import Struct
from typing import TYPE_CHECKING, TypeAlias

from bootstrap.base import Blob
from bootstrap.chunkmap import MAX_SPAN, ChunkMap, Member
from bootstrap.decode import NO_DIGEST
from bootstrap.errors import FormatError, RafsError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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
# Compressed bytes of two neighbours that are always asked for together where nodes share what they fetch by its exact
# range: there a request costs more than 100 KB do. Of a Python program with numpy, pandas and Django none made 240
# requests and 35.6 MB, 192 KiB 195 and 36.6, 224 KiB 187 and 37.0; four neighbours in 512 KiB would make 138 and 44.
PAIR = 192 * 1024
# No request is longer than this and one unit, whatever a bootstrap claims.
MAX_RUN = 32 << 20
KEY_SIZE = 12
BLOCK = 4096

_PLACE = Struct("<QI").pack

Plain: TypeAlias = bytes | bytearray | memoryview
UnitMembers: TypeAlias = list[Member]
"""Chunks that share one unit."""


@dataclass(frozen=True, slots=True)
class Segment:
    """`start` is the uncompressed offset where it begins, `size` the file's length, `padded` in whole blocks; `rows`
    index the chunk map. `places`: of each chunk in the file by its uncompressed offset; None: at its distance from
    `start`."""

    blob: Blob
    number: int
    key: bytes
    rows: range
    size: int
    compressed_start: int
    compressed_end: int
    gappy: bool  # the compressed range holds much that is not this segment's: read runs of units one by one
    places: dict[int, int] | None = None

    @property
    def start(self) -> int:
        return self.number * SEGMENT_SIZE

    @property
    def name(self) -> str:
        return f"{self.number}-{self.key.hex()}"

    @property
    def padded(self) -> int:
        return -(-self.size // BLOCK) * BLOCK

    def place(self, offset: int) -> int:
        """Where in the file the chunk of this uncompressed offset begins."""
        return offset - self.start if self.places is None else self.places[offset]

    def adjoins(self, last: Segment) -> bool:
        """Whether one request for both reads little that is neither's. Numbers do not tell: a chunk of 1 MiB is the
        only one of its segment and those after it have none. Slices of a gzip layer overlap a little."""
        return (
            last.blob.id == self.blob.id
            and not last.gappy
            and not self.gappy
            and last.compressed_start <= self.compressed_start
            and -JOIN_GAP <= self.compressed_start - last.compressed_end <= JOIN_GAP
        )


def make_segment(chunks: ChunkMap, blob: Blob, number: int) -> Segment:
    """Raises KeyError when no chunk of the blob lies there, `MissingMeta` or FormatError."""
    start = number * SEGMENT_SIZE
    rows = chunks.anchored(blob.index, start, start + SEGMENT_SIZE)
    if not rows:
        raise KeyError((blob.id, number))
    named = [b"%d %d " % (SEGMENT_SIZE, blob.digester)]
    low, high, total, size = 1 << 62, 0, 0, 0
    last = (0, 0)
    places: dict[int, int] = {}
    packed = 0
    for digest, index, crc, offset, length, begin, end in chunks.facts(blob.index, rows):
        named += digest, _PLACE(offset, length)
        if digest == NO_DIGEST:
            # Only a CRC vouches for it, which is easily forged: nothing is shared with images of other chunks.
            named += b"%d " % crc, chunks.identity
        if (begin, end) != last:
            low, high, total, last = min(low, begin), max(high, end), total + end - begin, (begin, end)
        place = offset - start
        if not 0 <= place < SEGMENT_SIZE + MAX_SPAN:
            raise FormatError("blob meta", 0, f"chunk {index} of blob {blob.id}: units are in no order")
        size = place + length
        places[offset] = packed
        packed = -(-(packed + length) // BLOCK) * BLOCK
    aligned = all(offset % BLOCK == 0 for offset in places)
    if aligned or packed > SEGMENT_SIZE + MAX_SPAN:  # tiny chunks in great number would fill the disk with padding
        places = {}
    else:
        named.append(b"packed")
        size = packed
    gappy = high - low > min(total + MAX_GAP, MAX_RUN)
    key = _key(b"".join(named))
    return Segment(blob, number, key, rows, size, low, high, gappy, places or None)


def pair_of(chunks: ChunkMap, segment: Segment) -> tuple[Segment, Segment] | None:
    """The two small neighbours, this one among them, that every node asks for at once: which they are follows from the
    blob's metadata alone, as the borders do."""
    if segment.gappy or segment.compressed_end - segment.compressed_start >= PAIR:
        return None
    try:
        other = make_segment(chunks, segment.blob, segment.number ^ 1)
    except (RafsError, KeyError, ValueError, IndexError):
        return None
    first, second = (segment, other) if segment.number < other.number else (other, segment)
    together = second.adjoins(first) and second.compressed_end - first.compressed_start <= PAIR
    return (first, second) if together else None


def many_names(chunks: ChunkMap, blob: Blob, numbers: NDArray[np.int64]) -> dict[int, tuple[str, int]]:
    """`name` and `padded` of many segments, by number, in a quarter of the time of `make_segment`. Only those of chunks
    that begin at whole blocks and have digests, of blobs without a table: ask `make_segment` about the rest, which may
    be wrong."""
    import numpy as np

    if chunks.anchors_apart(blob.index):
        return {}
    rows, behind = chunks.many_anchored(blob.index, numbers * SEGMENT_SIZE, SEGMENT_SIZE)
    counts = behind - rows
    begins = np.cumsum(counts) - counts
    every = np.repeat(rows - begins, counts) + np.arange(int(counts.sum()))
    facts = chunks.many_facts(blob.index, every)
    offsets = facts["uncompressed_offset"].astype(np.int64)
    digested = np.ascontiguousarray(facts["digest"]).view("<u8").reshape(-1, 4).any(axis=1)
    odd = (facts["compressed_size"] == 0) | (offsets % BLOCK != 0) | ~digested
    named = np.empty(len(facts), np.dtype([("digest", "V32"), ("offset", "<u8"), ("size", "<u4")]))
    named["digest"], named["offset"], named["size"] = facts["digest"], offsets, facts["uncompressed_size"]
    text, step, head = named.tobytes(), named.itemsize, b"%d %d " % (SEGMENT_SIZE, blob.digester)
    ends = offsets + facts["uncompressed_size"]
    bad = np.concatenate(([0], np.cumsum(odd)))
    found = {}
    for number, begin, count in zip(numbers.tolist(), begins.tolist(), counts.tolist(), strict=True):
        if count and bad[begin + count] == bad[begin]:
            key = _key(head + text[begin * step : (begin + count) * step])
            size = int(ends[begin + count - 1]) - number * SEGMENT_SIZE
            found[number] = f"{number}-{key.hex()}", -(-size // BLOCK) * BLOCK
    return found


def _key(named: bytes) -> bytes:
    return blake2b(named, digest_size=KEY_SIZE, person=b"nydus segment").digest()


def runs(chunks: ChunkMap, segment: Segment) -> Iterator[tuple[int, int, list[UnitMembers]]]:
    """Compressed ranges (start, end) that cover the segment, each with its units: one, unless it is `gappy`."""
    units: dict[tuple[int, int], UnitMembers] = {}
    for row in segment.rows:
        member = chunks.member(row)
        units.setdefault((member.unit.start, member.unit.end), []).append(member)
    if not segment.gappy:
        yield segment.compressed_start, segment.compressed_end, list(units.values())
        return
    run: list[UnitMembers] = []
    first = last = 0
    for start, end in sorted(units):
        if run and (start > last + MAX_GAP or start - first > MAX_RUN):
            yield first, last, run
            run = []
        if not run:
            first = last = start
        last = max(last, end)
        run.append(units[start, end])
    yield first, last, run


class BadChunk(Exception):
    """A chunk whose stored bytes are not what the image's digests promise; the message names chunk and blob."""


def decode(
    segment: Segment,
    chunks: ChunkMap,
    units: list[UnitMembers],
    offset: int,
    stored: memoryview,
    plain: Plain | None = None,
) -> Plain:
    """Decode and verify `units` out of `stored` (which begins at compressed `offset`) into `plain`, which an earlier
    call for other units of the segment returned. A segment of one chunk is that chunk: nothing is copied.

    Raises `BadChunk`. Pure computation, releases the GIL for most of its time: for worker threads.
    """
    if plain is None and len(segment.rows) > 1:
        plain = bytearray(segment.size)
    if len(units) > 1 and (found := chunks.decode_together(units, offset, stored, segment.size)) is not None:
        assert isinstance(plain, bytearray)
        for (member,), part in zip(units, found, strict=True):
            place = segment.place(member.chunk.uncompressed_offset)
            plain[place : place + len(part)] = part
        return plain
    for members in units:
        unit = members[0].unit
        try:
            parts = chunks.decode(members, stored[unit.start - offset : unit.end - offset])
        except RafsError as error:
            raise BadChunk(str(error)) from None
        for member, data in zip(members, parts, strict=True):
            place = segment.place(member.chunk.uncompressed_offset)
            if plain is None:
                if place == 0 and len(data) == segment.size:
                    return data
                plain = bytearray(segment.size)
            assert isinstance(plain, bytearray)  # of more than one chunk, or with a gap
            plain[place : place + len(data)] = data
    return bytearray(segment.size) if plain is None else plain
