"""What to fetch ahead, in which order, how fast.

Order: blobs that `optimize` made for this, then as upstream's (`nydusd.md` 5.6): the given files, else the bootstrap's
table (directories stand for all files below, "/" for everything), then with `prefetch_all` every blob front to back.
Different from upstream: a demand read never waits for prefetch (see `fetch.FetchScheduler`), and `bandwidth_rate` is
obeyed as written.
"""

from __future__ import annotations

import logging
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import trio

from bootstrap.base import HOLE, Blob
from bootstrap.errors import RafsError
from bootstrap.layout.common import BlobFeatures
from nydusfs.errors import CacheError, SourceError
from nydusfs.foresight import programs
from nydusfs.segments import SEGMENT_SIZE, Segment
from nydusfs.sources import Priority

if TYPE_CHECKING:
    from nydusfs.fetch import FetchScheduler
    from nydusfs.flights import Job
    from nydusfs.image_reader import ImageReader

log = logging.getLogger("nydusfs.prefetch")

MAX_MERGE = 16 << 20  # one request is held in memory twice; upstream's cap of 2.1
MAX_FAILURES = 32  # in a row: the sources are down, demand reads will find out when they are back
# Everything that nobody named is fetched when the image's start is over: nothing new was read for GRACE seconds, or
# PATIENCE went by. A start of 17 s over 40 Mbit/s gave a fifth of the link away to what it did not read. An image that
# nobody has read is about to be started, for UNREAD seconds: else its prefetch had the link when a container began more
# than GRACE after the mount (33 requests to the registry beside reads that a peer on the same node answered).
GRACE, PATIENCE, UNREAD = 2.0, 30.0, 10.0
_LOOKS = 10  # in a second, whether readers are busy
_SLICE = 200  # inodes looked at between two turns of the loop
_EXTENTS = 16 << 20  # bytes of a file whose extents are listed at once


class TokenBucket:
    """`rate` bytes per second (0: no limit), one second's worth at once at most. A request larger than that goes into
    debt, so the rate holds on average whatever the request size."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._tokens = float(rate)
        self._updated = trio.current_time()

    async def take(self, size: int) -> None:
        if not self._rate:
            return
        while True:
            now = trio.current_time()
            self._tokens = min(float(self._rate), self._tokens + (now - self._updated) * self._rate)
            self._updated = now
            if self._tokens > 0:
                self._tokens -= size
                return
            await trio.sleep(-self._tokens / self._rate + 0.001)


class Prefetcher:
    def __init__(self, reader: ImageReader, scheduler: FetchScheduler) -> None:
        self._reader = reader
        self._scheduler = scheduler
        self._config = reader.config.prefetch
        self._merge = min(self._config.merging_size, MAX_MERGE)
        self._bucket = TokenBucket(self._config.bandwidth_rate)
        self._failures = 0
        self._polite = False
        self._reads = 0  # of the image, as last looked
        self._seen: set[tuple[int, int]] = set()

    async def run(self, files: Sequence[bytes] | None, stop: Callable[[], bool] | None) -> None:
        """Workers that share one ordered list; returns when it is empty."""
        if not self._config.enable:
            return
        counters = self._reader.cache_counters
        counters.prefetch_begin = counters.prefetch_begin or time.time()
        await self._reader.load_tables()
        try:
            named = self._named(files)
        except RafsError as error:
            log.warning("image %s: nothing is prefetched, its metadata is bad: %s", self._reader.name, error)
            return
        if not named:
            await self._start_is_over()
            self._polite = True
        groups = self._groups(self._plan(files))
        lock = trio.Lock()

        async def worker() -> None:
            counters.prefetch_workers += 1
            try:
                while not (stop and stop()) and self._failures < MAX_FAILURES:
                    async with lock:
                        group = await self._next(groups)
                    if group is None:
                        return
                    await self._fetch(group)
            finally:
                counters.prefetch_workers -= 1

        try:
            async with trio.open_nursery() as nursery:
                for _ in range(self._config.threads):
                    nursery.start_soon(worker)
        finally:
            counters.prefetch_end = time.time()
        if self._failures >= MAX_FAILURES:
            log.warning("image %s: prefetch gives up after %d failures in a row", self._reader.name, self._failures)

    async def _next(self, groups: Iterator[list[Job] | None]) -> list[Job] | None:
        """The next request; the plan yields None now and then so that walking a big tree holds nobody up."""
        if self._polite:
            await self._readers_rest()
        while True:
            try:
                group = next(groups)
            except StopIteration:
                return None
            except (RafsError, KeyError, ValueError, CacheError) as error:
                log.warning("image %s: prefetch stops at bad metadata: %s", self._reader.name, error)
                return None
            if group is not None:
                return group
            await trio.lowlevel.checkpoint()

    async def _fetch(self, group: list[Job]) -> None:
        size = group[-1].segment.compressed_end - group[0].segment.compressed_start
        await self._bucket.take(max(size, 0))
        if all(self._reader.is_ready(job.segment) for job in group):
            return  # readers came first while this waited for its share of the bandwidth
        counters = self._reader.cache_counters
        counters.prefetch_requests_count += 1
        counters.prefetch_data_amount += max(size, 0)
        started = time.monotonic()
        try:
            await self._scheduler.fetch(group, Priority.PREFETCH, self._merge)
            self._failures = 0
        except SourceError as error:
            self._failures += 1
            log.info("image %s: prefetch: %s", self._reader.name, error)
            await trio.sleep(min(5.0, 0.1 * 2 ** min(self._failures, 6)))
        finally:
            counters.prefetch_cumulative_us += int((time.monotonic() - started) * 1e6)

    async def _start_is_over(self) -> None:
        until, quiet = trio.current_time() + UNREAD, 0.0
        read = False
        while trio.current_time() < until and quiet < GRACE:
            await trio.sleep(max(0.1, GRACE - quiet))
            recorder = self._reader.recorder
            quiet = recorder.quiet() if recorder is not None else GRACE
            if quiet and not read:
                until, read = trio.current_time() + PATIENCE, True

    async def _readers_rest(self) -> None:
        """Another program of the image starts, from the cache: what nobody asked for would take processor time from it.
        Who reads all the time is not waited for: a request a second goes on."""
        counters = self._reader.cache_counters
        for _ in range(_LOOKS):
            if counters.total == self._reads:
                return
            self._reads = counters.total
            await trio.sleep(1 / _LOOKS)

    # What

    def _named(self, files: Sequence[bytes] | None) -> bool:
        """Whether somebody chose what is fetched first."""
        image = self._reader.bootstrap
        chosen = any(blob.features & BlobFeatures.IS_SEPARATED_WITH_PREFETCH_FILES for blob in image.blobs)
        # Of programs the first bytes are on their way, by `foresight`.
        return chosen or bool(files) or bool(set(image.prefetch_inodes()) - {image.root, *programs(image)})

    def _groups(self, plan: Iterator[Segment | None]) -> Iterator[list[Job] | None]:
        """Neighbouring segments of the plan in one request of up to `merging_size` compressed bytes."""
        group: list[Job] = []
        for segment in plan:
            if segment is None:
                yield None
                continue
            if self._reader.is_ready(segment):
                continue
            if group:
                first, last = group[0].segment, group[-1].segment
                size = segment.compressed_end - first.compressed_start
                if not segment.adjoins(last) or size > min(self._merge, self._scheduler.courtesy.request_size):
                    yield group
                    group = []
            group.append(self._reader.job(segment))
        if group:
            yield group

    def _plan(self, files: Sequence[bytes] | None) -> Iterator[Segment | None]:
        bootstrap = self._reader.bootstrap
        if files is not None:
            inodes = []
            for path in files:
                ino = bootstrap.resolve(path)
                if ino:
                    inodes.append(ino)
                else:
                    log.warning("image %s: prefetch file %r is not in the image", self._reader.name, path)
        else:
            inodes = list(bootstrap.prefetch_inodes())
        for blob in bootstrap.blobs:
            if blob.features & BlobFeatures.IS_SEPARATED_WITH_PREFETCH_FILES:
                yield from self._blob(blob)
        everything = bool(inodes) and all(ino == bootstrap.root for ino in inodes)
        if not everything:
            for ino in inodes:
                yield from self._below(ino)
        if everything or (self._config.prefetch_all and bootstrap.root not in inodes):
            yield from self._all()

    def _below(self, ino: int) -> Iterator[Segment | None]:
        bootstrap = self._reader.bootstrap
        mode = bootstrap.attr(ino).mode
        if stat.S_ISREG(mode):
            yield from self._file(ino)
        elif stat.S_ISDIR(mode):
            for count, (_, entry) in enumerate(bootstrap.walk(ino)):
                if count % _SLICE == 0:
                    yield None
                if entry.dtype == 8:
                    yield from self._file(entry.ino)

    def _file(self, ino: int) -> Iterator[Segment | None]:
        bootstrap, chunks = self._reader.bootstrap, self._reader.chunks
        size = bootstrap.attr(ino).size
        for start in range(0, size, _EXTENTS):
            if start:
                yield None  # a file may be one chunk a million times
            for extent in bootstrap.extents(ino, start, min(_EXTENTS, size - start)):
                if extent.blob_index != HOLE and not chunks.lacks_meta(extent.blob_index):
                    for row, _, _ in chunks.pieces(extent.blob_index, extent.blob_offset, extent.size):
                        yield from self._once(extent.blob_index, row)

    def _all(self) -> Iterator[Segment | None]:
        for blob in self._reader.bootstrap.blobs:
            yield from self._blob(blob)

    def _blob(self, blob: Blob) -> Iterator[Segment | None]:
        chunks = self._reader.chunks
        rows = chunks.blob_rows(blob.index)
        row = rows.stop if chunks.lacks_meta(blob.index) else rows.start
        while row < rows.stop:
            yield from self._once(blob.index, row)
            yield None
            row = max(row + 1, self._reader.segment_of(blob.index, row).rows.stop)

    def _once(self, blob_index: int, row: int) -> Iterator[Segment]:
        number = self._reader.chunks.anchor(blob_index, row) // SEGMENT_SIZE
        if (blob_index, number) not in self._seen:
            self._seen.add((blob_index, number))
            yield self._reader.segment_of(blob_index, row)
