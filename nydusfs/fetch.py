"""The scheduler between caches and sources: who fetches what, when, and once.

- One fetch per segment per node at a time, whatever the number of mounts and readers (single flight). It runs in the
  scheduler's own nursery: a reader that is cancelled leaves it running for the others.
- Demand reads wait for nobody but other demand reads. Prefetch has slots of its own and leaves them the link
  (`courtesy`); a demand read that meets a prefetch of its segment makes it urgent.
- What an image's profile says (LEARNED) is on its way to a reader: it is not held up by demand reads.
- Missing neighbours of one read are one request, unless other nodes would not find what was fetched so (`by_range`):
  then small segments come in pairs, the same ones on every node.
- Decompression, digests and the write to the cache file happen in one worker-thread call per request; small segments
  are decoded in place, where the two switches (about 100 us) would cost more than the work.
- A reader goes on as soon as its segment is verified: the cache file is written meanwhile. Where the file is what the
  reader waits for (`stored`), each segment is written before the next one of its request is decoded.
- Failure is never remembered: the next read tries again.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import partial

import trio

from nydusfs.cache import BlobCache
from nydusfs.cache.blob import NotSureError
from nydusfs.courtesy import Courtesy, ReplayPace, RequestPace
from nydusfs.errors import SourceError
from nydusfs.flights import (
    MERGE,
    Flight,
    Identity,
    Job,
    Part,
    SegmentError,
    decode_parts,
    evenly,
    joinable,
    serve,
    store_parts,
    take_foreign,
    together,
)
from nydusfs.http.pacing import PACE
from nydusfs.lane import Lane
from nydusfs.segments import Plain, Segment, runs
from nydusfs.sources import Buffer, Check, Priority, Source

log = logging.getLogger("nydusfs.fetch")

DEMAND_REQUESTS = 16  # at the same time and source; more would only share the same link
# What is read ahead of a sequential reader: so many seconds of the link, at most. A request costs a registry (Debian's
# docker-registry on loopback) 5 ms of processor time and each MiB 1.2: with 1 MiB a request it is the limit.
MERGE_SECONDS = 0.06  # and `MOST_MERGE`
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


class FetchScheduler:
    """Give it a nursery that outlives all readers; it starts its fetches there."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._flights: dict[Identity, Flight] = {}
        self._ahead = 0  # bytes that `start` began to fetch
        self._token = trio.lowlevel.current_trio_token()
        self._begun = trio.Event()  # a fetch, since `settled` looked
        self._demand_slots: dict[str, trio.Semaphore] = {}
        self.lane = Lane(self._flights, self._aside, self._remember)
        self.courtesy = Courtesy(self.lane.used)
        self._doubts = Courtesy()  # readers that do something else than their image's profile says
        self._threads = trio.CapacityLimiter(DECODE_THREADS)
        self._prefetch_threads = trio.CapacityLimiter(PREFETCH_THREADS)
        self._recent: OrderedDict[Identity, tuple[Segment, BlobCache | None, Plain]] = OrderedDict()
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
            self._keep_again = math.inf  # one at a time: the disk may be slow still
            self._nursery.start_soon(self._keep, [job.identity, *self._recent])
        return found[2]

    async def _keep(self, identities: list[Identity]) -> None:
        """Give the disk what it did not take before, in this order, until it refuses again."""
        try:
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
        finally:
            self._keep_again = trio.current_time() + KEEP_PAUSE

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

    def _aside(self, had: Iterable[tuple[int, float]]) -> None:
        """The lane fetched something."""
        self._begun.set()
        for size, seconds in had:
            self.courtesy.fetched(size, seconds)

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
    ) -> list[Flight]:
        """A flight for each job: one that is under way, or new ones started in merged groups."""
        flights: list[Flight] = []
        group: list[Flight] = []
        for job in jobs:
            flight = self._flights.get(job.identity)
            if flight is None:
                self._begun.set()
                if group and not joinable([joined.job for joined in group], job, merge):
                    self._nursery.start_soon(self._run, group, priority, behind, doubtful)
                    group = []
                cut = together(job)
                span = cut[0].segment.compressed_start, max(one.segment.compressed_end for one in cut)
                for one in cut:
                    if one is not job and not self._lacks(one):
                        continue
                    begun = self._flights[one.identity] = Flight(one, span)
                    if behind:
                        begun.ahead = one.segment.size
                        self._ahead += begun.ahead
                    if group:
                        begun.urgent = group[0].urgent
                    group.append(begun)
                flight = self._flights[job.identity]
            elif priority is Priority.DEMAND:
                flight.urgent.set()
            flights.append(flight)
        if group:
            self._nursery.start_soon(self._run, group, priority, behind, doubtful)
        return flights

    def _lacks(self, job: Job) -> bool:
        kept = job.cache is not None and job.segment.key in job.cache
        return not kept and job.identity not in self._flights and job.identity not in self._recent

    def _slots_of(self, source: Source) -> trio.Semaphore:
        """Per source: readers of a registry that answers must not queue behind those of one that hangs."""
        slots = self._demand_slots.get(source.name)
        if slots is None:
            slots = self._demand_slots[source.name] = trio.Semaphore(DEMAND_REQUESTS)
        return slots

    async def _run(self, group: list[Flight], priority: Priority, behind: bool, doubtful: bool) -> None:
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

    async def _run_now(self, group: list[Flight], priority: Priority) -> None:
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

    async def _run_prefetch(self, group: list[Flight]) -> None:
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

    async def _fetch_group(self, group: list[Flight], priority: Priority) -> None:
        missing = [flight for flight in group if not await self._adopt(flight)]
        if len(missing) < len(group):  # what is left is no run of neighbours any more
            for flight in missing:
                await self._fetch_group_from_source([flight], priority)
        else:
            await self._fetch_group_from_source(group, priority)

    async def _adopt(self, flight: Flight) -> bool:
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
        found = await trio.to_thread.run_sync(take_foreign, cache, cache.foreign, flight.job, limiter=self._threads)
        if found is None:
            return False
        self._finish(flight, *found)
        return True

    async def _fetch_group_from_source(self, group: list[Flight], priority: Priority) -> None:
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

    async def _fetch_one(self, flight: Flight, priority: Priority) -> None:
        job = flight.job
        plain: Plain | None = None
        ranges = list(runs(job.chunks, job.segment))
        if not job.segment.gappy:
            ranges = [(*flight.span, ranges[0][2])]
        for number, (start, end, units) in enumerate(ranges):
            last = number == len(ranges) - 1
            part = Part(job, units, plain, flight if last else None)
            check = partial(self._verify, [part], start, last, self._decoders(priority))
            try:
                await self._read(flight, start, end - start, priority, check)
            finally:
                if last and part.decoded is not None:
                    self._finish(flight, part.decoded, part.kept)
                    flight.complete = True
            plain = part.decoded

    async def _fetch_merged(self, group: list[Flight], priority: Priority) -> None:
        jobs = [flight.job for flight in group]
        start, end = group[0].span[0], max(flight.span[1] for flight in group)
        parts = [
            Part(job, next(runs(job.chunks, job.segment))[2], None, flight)
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

    async def _read(self, flight: Flight, start: int, size: int, priority: Priority, check: Check) -> None:
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
        parts: list[Part],
        start: int,
        store: bool,
        limiter: trio.CapacityLimiter,
        stored: Buffer,
    ) -> None:
        """The check of a source's bytes: verify the parts, and write them if `store`. Raises `WrongBytes`."""
        view = memoryview(stored)
        small = len(stored) <= INLINE or len(self._flights) <= 1
        small = small and sum(part.job.segment.size for part in parts) <= INLINE_PLAIN
        if not small or any(part.waits() for part in parts):
            await trio.to_thread.run_sync(self._decode_and_store, parts, start, view, store, limiter=limiter)
            return
        served: list[Part] = []
        try:
            decode_parts(parts, start, view, store, serve, served)
        finally:
            if served and store:
                try:
                    await trio.lowlevel.checkpoint()  # readers are woken in this turn
                    await trio.lowlevel.checkpoint()  # and have answered now
                finally:
                    store_parts(served)  # also at the daemon's end

    def _decode_and_store(self, parts: list[Part], start: int, stored: memoryview, store: bool) -> None:
        def tell(flight: Flight, plain: Plain) -> None:
            try:
                self._token.run_sync_soon(serve, flight, plain)
            except trio.RunFinishedError:
                pass

        served: list[Part] = []
        try:
            decode_parts(parts, start, stored, store, tell, served)
        finally:
            if store:
                store_parts(served)

    def _finish(self, flight: Flight, plain: Plain, kept: bool) -> None:
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
