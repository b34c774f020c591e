"""The scheduler between caches and sources: who fetches what, when, and once.

- One fetch per segment per node at a time, whatever the number of mounts and readers (single flight). It runs in the
  scheduler's own nursery: a reader that is cancelled leaves it running for the others.
- Demand reads wait for nobody but other demand reads. Prefetch has slots of its own and leaves them the link
  (`courtesy`); a demand read that meets a prefetch of its segment makes it urgent.
- What an image's profile says (LEARNED) is on its way to a reader: it is not held up by demand reads.
- Missing neighbours of one read are one request, unless other nodes would not find what was fetched so (`by_range`).
- Decompression, digests and the write to the cache file happen in one worker-thread call per request; small segments
  are decoded in place, where the two switches (about 100 us) would cost more than the work.
- A reader goes on as soon as its segment is verified: the cache file is written meanwhile. Where the file is what the
  reader waits for (`stored`), each segment is written before the next one of its request is decoded.
- Failure is never remembered: the next read tries again.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import trio

from bootstrap.chunkmap import ChunkMap, Member
from bootstrap.errors import RafsError
from nydusfs.cache import BlobCache
from nydusfs.cache.blob import NotSureError
from nydusfs.cache.foreign import ForeignBlob
from nydusfs.counters import CacheCounters
from nydusfs.courtesy import Courtesy, ReplayPace, RequestPace
from nydusfs.errors import SourceError
from nydusfs.http.pacing import PACE
from nydusfs.lane import Lane
from nydusfs.segments import BadChunk, Plain, Segment, UnitMembers, decode, runs
from nydusfs.sources import Buffer, Check, Priority, Source, WrongBytes

log = logging.getLogger("nydusfs.fetch")

DEMAND_REQUESTS = 16  # at the same time and source; more would only share the same link
MERGE = 1 << 20  # compressed bytes of one merged request
# What is read ahead of a sequential reader: so many seconds of the link, at most. A request costs a registry (Debian's
# docker-registry on loopback) 5 ms of processor time and each MiB 1.2: with 1 MiB a request it is the limit.
MERGE_SECONDS, MOST_MERGE = 0.06, 8 << 20
# Uncompressed bytes that are fetched ahead at the same time, for all readers together: memory.
MOST_AHEAD = 64 << 20
# Compressed bytes decoded on the loop: about 0.2 ms. Where nothing else is fetched, any number: the reader is not to
# wait for two more switches, each of them milliseconds on a machine that is busy.
INLINE = 48 * 1024
INLINE_PLAIN = 1 << 20  # and to no more than this
DECODE_THREADS = 4
PREFETCH_THREADS = 1  # of them for prefetch: the others stay free for readers
KEEP_PAUSE = 1.0  # seconds between attempts to give the disk what it did not take
RECENT_BYTES = 16 << 20  # of segments that the disk did not take, so that 4 KiB reads do not fetch 1 MiB each


_Identity: TypeAlias = tuple[int, str, bytes]


@dataclass(frozen=True, slots=True)
class Job:
    """One segment to fetch, and all that is needed to do it. `cache` None: nothing is kept."""

    segment: Segment
    chunks: ChunkMap
    source: Source
    cache: BlobCache | None
    counters: CacheCounters

    @property
    def identity(self) -> _Identity:
        # By cache object too: two stores each need the bytes.
        return (id(self.cache), self.segment.blob.id, self.segment.key)


@dataclass(slots=True)
class _Flight:
    job: Job
    done: trio.Event = field(default_factory=trio.Event)  # verified, or failed
    stored: trio.Event = field(default_factory=trio.Event)  # and in the cache, if the disk takes it
    awaited: bool = False  # by a reader
    ahead: int = 0  # bytes that nobody had asked for
    urgent: trio.Event = field(default_factory=trio.Event)  # a reader waits; one for all flights of a request
    plain: Plain | None = None
    complete: bool = False  # nothing is left to do for it
    error: SourceError | None = None


@dataclass(slots=True)
class _Part:
    """Units of a segment to decode, and what has been so far."""

    job: Job
    units: list[UnitMembers]
    plain: Plain | None = None
    completes: _Flight | None = None
    decoded: Plain | None = None  # and verified; stays if what came in the same answer was wrong
    kept: bool = False


class SegmentError(SourceError):
    """A segment cannot be had."""

    def __init__(self, segment: Segment, error: SourceError) -> None:
        self.segment = segment
        super().__init__(error.what, error.tried, damaged=error.damaged)


class FetchScheduler:
    """Give it a nursery that outlives all readers; it starts its fetches there."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._flights: dict[_Identity, _Flight] = {}
        self._ahead = 0  # bytes that `start` began to fetch
        self._token = trio.lowlevel.current_trio_token()
        self._begun = trio.Event()  # a fetch, since `settled` looked
        self._demand_slots: dict[str, trio.Semaphore] = {}
        self.lane = Lane(self._flights, self._active, self._remember)
        self.courtesy = Courtesy(lambda: self.lane.used)
        self._doubts = Courtesy()  # readers that do something else than their image's profile says
        self._threads = trio.CapacityLimiter(DECODE_THREADS)
        self._prefetch_threads = trio.CapacityLimiter(PREFETCH_THREADS)
        self._recent: OrderedDict[_Identity, tuple[Segment, BlobCache | None, Plain]] = OrderedDict()
        self._recent_bytes = 0
        self._keep_again = 0.0

    def recent(self, job: Job) -> Plain | None:
        """A segment that was fetched lately and could not be kept on disk, which now and then is tried again."""
        if not self._recent:
            return None
        found = self._recent.get(job.identity)
        if found is None:
            return None
        now = trio.current_time()
        if now >= self._keep_again and job.cache is not None and job.cache.store.health.usable():
            self._keep_again = now + KEEP_PAUSE
            self._nursery.start_soon(self._keep, [job.identity, *self._recent])
        return found[2]

    async def _keep(self, identities: list[_Identity]) -> None:
        """Give the disk what it did not take before, in this order, until it refuses again."""
        for identity in dict.fromkeys(identities):
            if (found := self._recent.get(identity)) is None:
                continue
            segment, cache, plain = found
            if cache is not None and cache.current():
                if not await trio.to_thread.run_sync(cache.write, segment, plain):
                    return
                cache.add(segment)
            if self._recent.pop(identity, None) is not None:
                self._recent_bytes -= len(plain)

    async def fetch(
        self,
        jobs: Sequence[Job],
        priority: Priority,
        merge: int = MERGE,
        *,
        doubtful: bool = False,
        strange: bool = False,
        stored: bool = False,
    ) -> list[Plain]:
        """The plain bytes of each job's segment, verified; for readers (DEMAND) before they are written to the cache,
        unless `stored`, for all others afterwards.

        Jobs of one call that are neighbours in their blob share requests of up to `merge` compressed bytes. While
        a reader waits for something `strange`, that no profile told, what is `doubtful` has little of the link.
        Raises `SegmentError`.
        """
        flights = self._join(jobs, priority, merge, doubtful=doubtful)
        if priority is Priority.DEMAND:
            self.courtesy.reader_comes()
        if strange:
            self._doubts.reader_comes()
        early = priority is Priority.DEMAND and not stored
        for flight in flights:
            flight.awaited |= early
        try:
            for flight in flights:
                if not early or flight.plain is None:
                    await (flight.done if early else flight.stored).wait()
        finally:
            if priority is Priority.DEMAND:
                self.courtesy.reader_goes()
            if strange:
                self._doubts.reader_goes()
        found: list[Plain] = []
        for flight in flights:
            if flight.plain is None:
                assert flight.error is not None
                raise SegmentError(flight.job.segment, flight.error)
            found.append(flight.plain)
        return found

    def start(self, jobs: Sequence[Job]) -> None:
        """Begin to fetch without waiting, what a sequential reader will ask for next, behind what is asked for in this
        turn of the loop. Errors show when the reader comes."""
        self._join(jobs, Priority.DEMAND, evenly(jobs, self.courtesy.rate * MERGE_SECONDS), behind=True)

    def ahead(self, longest: int) -> int:
        """Uncompressed bytes that may be fetched ahead of a sequential reader."""
        return max(MERGE, min(self.courtesy.ahead(longest), MOST_AHEAD - self._ahead))

    async def idle(self) -> None:
        """Return when nothing is being fetched or written to the cache."""
        while self._flights or self.lane.busy():
            if self._flights:
                await next(iter(self._flights.values())).stored.wait()
            else:
                await trio.sleep(0.005)

    def _active(self) -> None:
        self._begun.set()

    async def settled(self, pause: float) -> None:
        """Return when there were fetches and, at two looks `pause` seconds apart, no more."""
        self._begun = trio.Event()
        await self._begun.wait()
        while self._begun.is_set():
            self._begun = trio.Event()
            await trio.sleep(pause)

    def in_flight(self, job: Job) -> bool:
        return job.identity in self._flights

    def _join(
        self, jobs: Sequence[Job], priority: Priority, merge: int, *, behind: bool = False, doubtful: bool = False
    ) -> list[_Flight]:
        """A flight for each job: one that is under way, or new ones started in merged groups."""
        flights: list[_Flight] = []
        group: list[_Flight] = []
        for job in jobs:
            flight = self._flights.get(job.identity)
            if flight is None:
                flight = self._flights[job.identity] = _Flight(job)
                if behind:
                    flight.ahead = job.segment.size
                    self._ahead += flight.ahead
                self._begun.set()
                if group and not joinable([joined.job for joined in group], job, merge):
                    self._nursery.start_soon(self._run, group, priority, behind, doubtful)
                    group = []
                if group:
                    flight.urgent = group[0].urgent
                group.append(flight)
            elif priority is Priority.DEMAND:
                flight.urgent.set()
            flights.append(flight)
        if group:
            self._nursery.start_soon(self._run, group, priority, behind, doubtful)
        return flights

    def _slots_of(self, source: Source) -> trio.Semaphore:
        """Per source: readers of a registry that answers must not queue behind those of one that hangs."""
        slots = self._demand_slots.get(source.name)
        if slots is None:
            slots = self._demand_slots[source.name] = trio.Semaphore(DEMAND_REQUESTS)
        return slots

    async def _run(self, group: list[_Flight], priority: Priority, behind: bool, doubtful: bool) -> None:
        try:
            if behind:
                await trio.lowlevel.checkpoint()
            if doubtful:
                PACE.set(ReplayPace(self._doubts, group[0].urgent, self.courtesy))
            if priority is not Priority.PREFETCH:
                # LEARNED too: its callers bound themselves, and a reader is about to wait for it.
                await self._run_now(group, priority)
            else:
                await self._run_prefetch(group)
        except Exception as error:  # a bug must cost one read, not the worker that serves every mount
            log.exception("fetching blob %s failed unexpectedly", group[0].job.segment.blob.id)
            for flight in group:
                flight.error = SourceError(f"internal error: {type(error).__name__}")
        finally:
            # Also when the nursery is cancelled: waiters must not hang.
            for flight in group:
                if flight.plain is None and flight.error is None:
                    flight.error = SourceError(f"blob {flight.job.segment.blob.id}: the daemon is stopping")
                elif flight.plain is not None and priority is not Priority.DEMAND:
                    flight.job.counters.fetched_ahead(flight.job.segment.key)
                if self._flights.get(flight.job.identity) is flight:
                    del self._flights[flight.job.identity]
                self._ahead -= flight.ahead
                flight.done.set()
                flight.stored.set()

    async def _run_now(self, group: list[_Flight], priority: Priority) -> None:
        self.courtesy.reader_comes()
        try:
            slots = self._slots_of(group[0].job.source)
            try:
                slots.acquire_nowait()  # `acquire` goes through the loop in any case
            except trio.WouldBlock:
                await slots.acquire()
            try:
                await self._fetch_group(group, priority)
            finally:
                slots.release()
        finally:
            self.courtesy.reader_goes()

    async def _run_prefetch(self, group: list[_Flight]) -> None:
        urgent = group[0].urgent
        while not self.courtesy.admit():
            # Few tasks wait here (prefetch threads of the config), so a poll is simple and costs nothing that shows.
            with trio.move_on_after(0.02):
                await urgent.wait()
            if urgent.is_set():
                await self._run_now(group, Priority.DEMAND)
                return
        try:
            PACE.set(RequestPace(self.courtesy, urgent))  # of this task and its children
            await self._fetch_group(group, Priority.PREFETCH)
        finally:
            self.courtesy.ended()

    async def _fetch_group(self, group: list[_Flight], priority: Priority) -> None:
        missing = [flight for flight in group if not await self._adopt(flight)]
        if len(missing) < len(group):  # what is left is no run of neighbours any more
            for flight in missing:
                await self._fetch_group_from_source([flight], priority)
        else:
            await self._fetch_group_from_source(group, priority)

    async def _adopt(self, flight: _Flight) -> bool:
        """Take a segment over from a thread that was at it, or from the cache files of another nydusd, where there are
        any."""
        cache = flight.job.cache
        claim = await self.lane.wait(flight.job.identity)
        if claim is not None and claim.kept:
            flight.plain = claim.plain
            return True
        if cache is not None and flight.job.segment.key in cache:  # it was done a moment before this began
            try:
                flight.plain = await cache.read(flight.job.segment, 0, flight.job.segment.size)
            except NotSureError:
                pass
            if flight.plain is not None:
                return True
        if cache is None or cache.foreign is None:
            return False
        found = await trio.to_thread.run_sync(_take, cache, cache.foreign, flight.job, limiter=self._threads)
        if found is None:
            return False
        self._finish(flight, *found)
        return True

    async def _fetch_group_from_source(self, group: list[_Flight], priority: Priority) -> None:
        try:
            if len(group) == 1:
                await self._fetch_one(group[0], priority)
            else:
                await self._fetch_merged(group, priority)
        except SourceError as error:
            if len(group) == 1 or not error.damaged:
                for flight in group:
                    if not flight.complete:
                        flight.error = error
                return
            # One bad segment must not take its neighbours along.
            for flight in group:
                try:
                    if not flight.complete:
                        await self._fetch_one(flight, priority)
                except SourceError as own:
                    flight.error = own

    async def _fetch_one(self, flight: _Flight, priority: Priority) -> None:
        job = flight.job
        plain: Plain | None = None
        ranges = list(runs(job.chunks, job.segment))
        for number, (start, end, units) in enumerate(ranges):
            last = number == len(ranges) - 1
            part = _Part(job, units, plain, flight if last else None)
            check = partial(self._verify, [part], start, last, self._decoders(priority))
            try:
                await self._read(flight, start, end - start, priority, check)
            finally:
                if last and part.decoded is not None:
                    self._finish(flight, part.decoded, part.kept)
                    flight.complete = True
            plain = part.decoded

    async def _fetch_merged(self, group: list[_Flight], priority: Priority) -> None:
        jobs = [flight.job for flight in group]
        start, end = jobs[0].segment.compressed_start, max(job.segment.compressed_end for job in jobs)
        parts = [
            _Part(job, next(runs(job.chunks, job.segment))[2], None, flight)
            for job, flight in zip(jobs, group, strict=True)
        ]
        check = partial(self._verify, parts, start, True, self._decoders(priority))
        try:
            await self._read(group[0], start, end - start, priority, check)
        finally:
            for flight, part in zip(group, parts, strict=True):
                if part.decoded is not None:
                    self._finish(flight, part.decoded, part.kept)
                    flight.complete = True

    def _decoders(self, priority: Priority) -> trio.CapacityLimiter:
        return self._prefetch_threads if priority is Priority.PREFETCH else self._threads

    async def _read(self, flight: _Flight, start: int, size: int, priority: Priority, check: Check) -> None:
        job = flight.job
        job.counters.buffered_backend_size += size
        began = trio.current_time()
        try:
            await job.source.read(job.segment.blob.id, start, size, priority, check, flight.urgent)
            if priority is not Priority.PREFETCH:
                self.courtesy.fetched(size, trio.current_time() - began)
        finally:
            job.counters.buffered_backend_size -= size

    async def _verify(
        self,
        parts: list[_Part],
        start: int,
        store: bool,
        limiter: trio.CapacityLimiter,
        stored: Buffer,
    ) -> None:
        """The check of a source's bytes: verify the parts, and write them if `store`. Raises `WrongBytes`."""
        view = memoryview(stored)
        small = len(stored) <= INLINE or len(self._flights) <= 1
        small = small and not any(part.job.cache is not None and part.job.cache.write_waits() for part in parts)
        if not small or sum(part.job.segment.size for part in parts) > INLINE_PLAIN:
            await trio.to_thread.run_sync(self._decode_and_store, parts, start, view, store, limiter=limiter)
            return
        served: list[_Part] = []
        try:
            _decode(parts, start, view, store, _serve, served)
        finally:
            if served and store:
                try:
                    await trio.lowlevel.checkpoint()  # readers are woken in this turn
                    await trio.lowlevel.checkpoint()  # and have answered now
                finally:
                    _store(served)  # also at the daemon's end

    def _decode_and_store(self, parts: list[_Part], start: int, stored: memoryview, store: bool) -> None:
        def tell(flight: _Flight, plain: Plain) -> None:
            try:
                self._token.run_sync_soon(_serve, flight, plain)
            except trio.RunFinishedError:
                pass

        served: list[_Part] = []
        try:
            _decode(parts, start, stored, store, tell, served)
        finally:
            if store:
                _store(served)

    def _finish(self, flight: _Flight, plain: Plain, kept: bool) -> None:
        job = flight.job
        flight.plain = plain
        job.counters.entries_count += len(job.segment.rows)
        if kept and job.cache is not None:
            job.cache.add(job.segment, plain)
        else:
            self._remember(job, plain)

    def _remember(self, job: Job, plain: Plain) -> None:
        """What the disk did not take."""
        if job.identity not in self._recent:
            self._recent[job.identity] = job.segment, job.cache, plain
            self._recent_bytes += len(plain)
        while self._recent_bytes > RECENT_BYTES:
            _, (_, _, old) = self._recent.popitem(last=False)
            self._recent_bytes -= len(old)


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


def joinable(group: Sequence[Job], job: Job, merge: int) -> bool:
    """Whether `job` goes on where the group ends, in one request of at most `merge` bytes."""
    first, last = group[0].segment, group[-1].segment
    segment = job.segment
    if job.source.by_range or not segment.adjoins(last):
        return False
    return segment.compressed_end - first.compressed_start <= merge


def _serve(flight: _Flight, plain: Plain) -> None:
    """Let readers have what was verified."""
    flight.plain = plain
    flight.done.set()


def _decode(
    parts: list[_Part],
    start: int,
    stored: memoryview,
    store: bool,
    ready: Callable[[_Flight, Plain], None],
    served: list[_Part],
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
                _store([part])
            continue
        # First this, then the look at `awaited`: a reader does it the other way round, and one of us sees the other.
        flight.plain = part.decoded
        offered = store and job.cache is not None and job.cache.offer(job.segment, part.decoded)
        if flight.awaited:
            ready(flight, part.decoded)
        if flight.awaited or offered:
            served.append(part)
        elif store:
            _store([part])


def _store(parts: list[_Part]) -> None:
    for part in parts:
        assert part.decoded is not None
        cache = part.job.cache
        part.kept = cache is not None and cache.write(part.job.segment, part.decoded)


def _take(cache: BlobCache, foreign: ForeignBlob, job: Job) -> tuple[Plain, bool] | None:
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
