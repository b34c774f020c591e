"""What `fetch` deals in: segments to fetch, those under way, and what becomes of their stored bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import trio

from bootstrap.chunkmap import ChunkMap, Member
from bootstrap.errors import RafsError
from nydusfs.cache import BlobCache
from nydusfs.cache.foreign import ForeignBlob
from nydusfs.counters import CacheCounters
from nydusfs.errors import SourceError
from nydusfs.segments import BadChunk, Plain, Segment, UnitMembers, decode, pair_of
from nydusfs.sources import Buffer, Priority, Source, WrongBytes

MERGE = 1 << 20  # compressed bytes of one merged request
MOST_MERGE = 8 << 20

Identity: TypeAlias = tuple[int, str, bytes]


@dataclass(frozen=True, slots=True)
class Job:
    """One segment to fetch, and all that is needed to do it. `cache` None: nothing is kept."""

    segment: Segment
    chunks: ChunkMap
    source: Source
    cache: BlobCache | None
    counters: CacheCounters

    @property
    def identity(self) -> Identity:
        # By cache object too: two stores each need the bytes.
        return (id(self.cache), self.segment.blob.id, self.segment.key)


@dataclass(slots=True)
class Flight:
    """`span`: the compressed range that its request is for at least, more than its segment where nodes share ranges."""

    job: Job
    span: tuple[int, int]
    done: trio.Event = field(default_factory=trio.Event)  # verified, or failed
    stored: trio.Event = field(default_factory=trio.Event)  # and in the cache, if the disk takes it
    awaited: bool = False  # by a reader
    ahead: int = 0  # bytes that nobody had asked for
    urgent: trio.Event = field(default_factory=trio.Event)  # a reader waits; one for all flights of a request
    plain: Plain | None = None
    complete: bool = False  # nothing is left to do for it
    error: SourceError | None = None


@dataclass(slots=True)
class Part:
    """Units of a segment to decode, and what has been so far."""

    job: Job
    units: list[UnitMembers]
    plain: Plain | None = None
    completes: Flight | None = None
    decoded: Plain | None = None  # and verified; stays if what came in the same answer was wrong
    kept: bool = False

    def waits(self) -> bool:
        """Whether to keep it may be long."""
        return self.job.cache is not None and self.job.cache.write_waits(self.job.segment.padded)


class SegmentError(SourceError):
    """A segment cannot be had."""

    def __init__(self, segment: Segment, error: SourceError) -> None:
        self.segment = segment
        super().__init__(error.what, error.tried, damaged=error.damaged)


def evenly(jobs: Sequence[Job], merge: float) -> int:
    """How long the requests for all of these should be: of about `merge` bytes, and none for a small rest, which costs
    its source as much as all that goes before it. Over a slow link small requests are what keeps it busy: a reader who
    has one asks for another while the next is on its way."""
    merge = min(merge, MOST_MERGE)
    sizes = [job.segment.compressed_end - job.segment.compressed_start for job in jobs]
    total = sum(sizes)
    if merge <= MERGE or total <= merge or total % merge > merge / 2:
        return int(max(merge, MERGE))
    # A request that ends since the next segment would make it too long is not shorter than its share.
    return max(int(merge), int(total / (total // merge)) + max(sizes) - 1)


def together(job: Job) -> list[Job]:
    """This one and what every node asks for with it, in the order of the blob."""
    pair = pair_of(job.chunks, job.segment) if job.source.by_range else None
    return [job if one is job.segment else replace(job, segment=one) for one in pair or (job.segment,)]


def joinable(group: Sequence[Job], job: Job, merge: int) -> bool:
    """Whether `job` goes on where the group ends, in one request of at most `merge` bytes."""
    first, last = group[0].segment, group[-1].segment
    segment = job.segment
    if job.source.by_range or not segment.adjoins(last):
        return False
    return segment.compressed_end - first.compressed_start <= merge


def serve(flight: Flight, plain: Plain) -> None:
    """Let readers have what was verified."""
    flight.plain = plain
    flight.done.set()


def decode_parts(
    parts: list[Part],
    start: int,
    stored: memoryview,
    store: bool,
    ready: Callable[[Flight, Plain], None],
    served: list[Part],
) -> None:
    """Verify all parts. What a reader waits for is `ready` at once. It is to be stored after all (`served`), as is what
    readers may have from memory; the rest before the next one is decoded. Raises `WrongBytes`."""
    for part in parts:
        if part.decoded is not None:
            continue
        job = part.job
        try:
            part.decoded = decode(job.segment, job.chunks, part.units, start, stored, part.plain)
        except BadChunk as error:
            raise WrongBytes(str(error)) from None
        flight = part.completes
        if flight is None:
            if store:
                store_parts([part])
            continue
        # First this, then the look at `awaited`: a reader does it the other way round, and one of us sees the other.
        flight.plain = part.decoded
        offered = store and job.cache is not None and job.cache.offer(job.segment, part.decoded)
        if flight.awaited:
            ready(flight, part.decoded)
        if flight.awaited or offered:
            served.append(part)
        elif store:
            store_parts([part])


def store_parts(parts: list[Part]) -> None:
    for part in parts:
        assert part.decoded is not None
        cache = part.job.cache
        part.kept = cache is not None and cache.write(part.job.segment, part.decoded)


def take_foreign(cache: BlobCache, foreign: ForeignBlob, job: Job) -> tuple[Plain, bool] | None:
    """The segment's bytes and whether the cache keeps them."""
    plain = foreign.take(job.chunks, job.segment)
    return None if plain is None else (plain, cache.write(job.segment, plain))


async def fetch_chunk(job: Job, member: Member) -> bytes | memoryview:
    """One chunk alone, uncached: the way to good chunks whose segment holds a bad one. Raises `SourceError`."""
    found: list[bytes | memoryview] = []
    unit = member.unit

    async def check(stored: Buffer) -> None:
        try:
            found[:] = job.chunks.decode([member], memoryview(stored))
        except RafsError as error:
            raise WrongBytes(str(error)) from None

    await job.source.read(job.segment.blob.id, unit.start, unit.end - unit.start, Priority.DEMAND, check)
    return found[0]
