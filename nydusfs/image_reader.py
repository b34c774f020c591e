"""Reading files of one image: extents from the bootstrap, segments from the cache, the rest through the scheduler."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Sequence

import trio

from bootstrap.base import HOLE, Blob, Bootstrap, Extent
from bootstrap.chunkmap import ChunkMap
from bootstrap.decode import verify
from bootstrap.errors import DigestMismatch, RafsError
from nydusfs.cache import BlobCache, CacheStore
from nydusfs.cache.blob import NotSureError
from nydusfs.config import Config
from nydusfs.counters import BackendCounters, CacheCounters
from nydusfs.errors import CacheError, ReadError, SourceError
from nydusfs.failures import Failures
from nydusfs.fetch import FetchScheduler
from nydusfs.flights import Job, SegmentError, fetch_chunk
from nydusfs.foresight import SMALL, Foresight
from nydusfs.hands import Hands
from nydusfs.learning import Learner
from nydusfs.pieces import Piece, Pieces
from nydusfs.prefetch import Prefetcher
from nydusfs.profile import ProfileStore, Recorder
from nydusfs.readahead import SMALL_FILE, BlobStreams, FileStreams
from nydusfs.segments import Plain, Segment
from nydusfs.sources import FileSource, Priority, Source, ThreadSource
from nydusfs.tables import Tables
from nydusfs.threadreads import ThreadReads

log = logging.getLogger("nydusfs.image")

JOINED_SECONDS = 20.0  # of waiting for somebody else's fetch: if it fails sooner, it is tried again


class ImageReader:
    """`store` None: nothing is kept on disk. The caller owns source, store and scheduler; `close` gives the maps back.

    All methods but `read_now` belong to the trio thread, unless they say else.
    """

    def __init__(
        self,
        name: str,
        bootstrap: Bootstrap,
        chunks: ChunkMap,
        source: Source,
        scheduler: FetchScheduler,
        store: CacheStore | None,
        config: Config,
        counters: CacheCounters | None = None,
    ) -> None:
        self.name = name
        self.bootstrap = bootstrap
        self.chunks = chunks
        self.source = source
        self.config = config
        self.cache_counters = counters or CacheCounters()
        if store is not None:
            self.cache_counters.store_path = str(store.path)
        self.cache_counters.underlying_files.update(blob.id for blob in bootstrap.blobs)
        self._scheduler = scheduler
        self._store = store
        self.validates = config.cache.validate
        self._caches: dict[int, BlobCache | None] = {}
        self.pieces = Pieces(chunks, bootstrap.blobs)
        self.segment, self.segment_of = self.pieces.segment, self.pieces.segment_of
        self._tables = Tables(name, bootstrap, chunks, source, store)
        # Who misses is served by the thread that has his question.
        self._lane = scheduler.lane if isinstance(source, ThreadSource) and store is not None else None
        self._threads = ThreadReads(self._caches, self._lane)
        self._files = FileStreams(scheduler.ahead, bootstrap.chunk_size)
        self._runs = BlobStreams(self.segment_of, chunks, scheduler.ahead)
        self._following = threading.Lock()  # over both
        try:
            self._token: trio.lowlevel.TrioToken | None = trio.lowlevel.current_trio_token()
        except RuntimeError:
            self._token = None  # read by `read` alone
        self.failures = Failures(name, bootstrap)
        self._closed = False
        self.profiles: ProfileStore | None = None
        self.recorder: Recorder | None = None
        self.foresight: Foresight | None = None

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def backend_counters(self) -> BackendCounters:
        return self.source.counters

    async def read(self, ino: int, offset: int, size: int) -> bytes:
        """Bytes of a regular file, fewer only at its end. Raises as `read_parts` does."""
        parts = await self.read_parts(ino, offset, size)
        return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)

    async def read_parts(self, ino: int, offset: int, size: int) -> list[Plain]:
        """The same in pieces, uncopied.

        Raises `ReadError`: EIO after every source failed, with a log line that names image, file, blob, chunk and the
        sources tried (see `Failures`).
        """
        try:
            extents = self.bootstrap.extents(ino, offset, size)
            await self._need_tables(extents)
            pieces = self.pieces.of(extents)
            if (recorder := self.recorder) is not None:
                recorder.note(ino, [piece[0] for piece in pieces])
        except SourceError as error:
            raise self.failures.failed(ino, str(error)) from None
        except (RafsError, KeyError, ValueError, IndexError) as error:
            raise self.failures.failed(ino, f"bad metadata: {error}") from None
        self.cache_counters.total += 1
        self.read_ahead(ino, offset, size, pieces)
        try:
            parts = await self._collect(pieces)
        except SourceError as error:
            if not error.damaged:
                raise self._unreadable(ino, pieces, error) from None
            await self._renew_tables(extents)
            parts = await self._chunk_by_chunk(ino, extents)
        if self.foresight is not None and offset == 0 and parts:
            self.foresight.opened(ino, parts[0])
        return parts

    async def peek(self, ino: int, offset: int, size: int) -> bytes:
        """Bytes of a regular file for somebody who looks ahead: fetched as LEARNED, and no reader's. Raises
        `SourceError`, `RafsError` or KeyError."""
        extents = self.bootstrap.extents(ino, offset, size)
        await self._need_tables(extents)
        return b"".join(await self._collect(self.pieces.of(extents), Priority.LEARNED))

    def read_now(
        self, ino: int, offset: int, size: int, pid: int = 0, hands: Hands | None = None
    ) -> list[Plain] | None:
        """The bytes of a regular file if all of them are cached or can be had by this thread, else None. For any thread
        but the trio thread; waits for the disk, and for a registry that answers soon. Whatever is wrong is left to
        `read`, which says what. `pid`: of the reader, where it is known. The bytes may lie in `hands`, whose thread
        this is; it calls `hands.finish`."""
        if hands is not None:
            return self._threads.read(self, ino, offset, size, pid, hands)
        hands = Hands()
        try:
            return self._threads.read(self, ino, offset, size, pid, hands)
        finally:
            hands.finish()

    def soon(self, call: Callable[..., object], *args: object) -> None:
        """On the event loop, from any thread."""
        try:
            if self._token is not None:
                self._token.run_sync_soon(call, *args)
        except trio.RunFinishedError:
            pass

    async def _need_tables(self, extents: Sequence[Extent]) -> None:
        for extent in extents:
            if extent.blob_index != HOLE and self.chunks.lacks_meta(extent.blob_index):
                await self._tables.load(extent.blob_index)

    async def _renew_tables(self, extents: Sequence[Extent]) -> None:
        """Wrong bytes: perhaps it is the blob's own table that is wrong."""
        for blob_index in {extent.blob_index for extent in extents} - {HOLE}:
            if await self._tables.renew(blob_index):
                self.pieces.forget(blob_index)

    async def load_tables(self) -> None:
        """All blobs' own tables, for who wants to look at every chunk; what cannot be had is logged and stays away."""
        for blob_index in self._tables.missing():
            try:
                await self._tables.load(blob_index)
            except SourceError as error:
                log.warning("image %s: %s", self.name, error)

    def cache(self, blob: Blob) -> BlobCache | None:
        if self._store is None:
            return None
        cache = self._caches.get(blob.index)
        if cache is None and blob.index not in self._caches:
            try:
                cache = self._store.blob(blob.id)
            except CacheError as error:
                log.warning("image %s: nothing is kept of this blob: %s", self.name, error)
                self._caches[blob.index] = None
                return None
            self._caches[blob.index] = cache
        return cache

    def is_durable(self, segment: Segment) -> bool:
        """Whether the cache has it on the disk. From any thread."""
        cache = self._caches.get(segment.blob.index)
        return cache is not None and cache.is_durable(segment.key)

    def job(self, segment: Segment) -> Job:
        return Job(segment, self.chunks, self.source, self.cache(segment.blob), self.cache_counters)

    def is_ready(self, segment: Segment) -> bool:
        cache = self.cache(segment.blob)
        return cache is not None and segment.key in cache

    async def _collect(
        self, pieces: Sequence[Piece], priority: Priority = Priority.DEMAND, *, stored: bool = False
    ) -> list[Plain]:
        """The pieces' bytes; `stored`: after they were written to the cache. A cached segment that turns out damaged is
        fetched like a missing one."""
        missing: dict[bytes, Segment] = {}
        for piece in pieces:
            if piece.segment is not None and not self.is_ready(piece.segment):
                missing.setdefault(piece.segment.key, piece.segment)
        if missing and self.foresight is not None and priority is Priority.DEMAND:
            self.foresight.missed(missing.values())
        plain = await self._fetch(list(missing.values()), priority, stored=stored) if missing else {}
        parts: list[Plain] = []
        for piece in pieces:
            segment = piece.segment
            if segment is None:
                parts.append(bytes(piece.size))
                continue
            if self.cache_counters.unused:
                self.cache_counters.used(segment.key)
            whole = plain.get(segment.key)
            if whole is None:
                data = await self._cached(segment, piece)
                if data is not None:
                    parts.append(data)
                    continue
                plain.update(await self._fetch([segment], priority, stored=stored))
                whole = plain[segment.key]
            parts.append(memoryview(whole)[piece.offset : piece.offset + piece.size])
        return parts

    async def _fetch(self, segments: list[Segment], priority: Priority, *, stored: bool) -> dict[bytes, Plain]:
        jobs: list[Job] = []
        found: dict[bytes, Plain] = {}
        for segment in segments:
            job = self.job(segment)
            recent = self._scheduler.recent(job)
            if recent is not None:
                found[segment.key] = recent
            else:
                jobs.append(job)
        if jobs:
            foreign = any(self._scheduler.in_flight(job) for job in jobs)
            strange = priority is Priority.DEMAND and self.recorder is not None and self.recorder.strange(segments)
            began = trio.current_time()
            try:
                buffers = await self._scheduler.fetch(jobs, priority, strange=strange, stored=stored)
            except SourceError:
                if not foreign or trio.current_time() - began > JOINED_SECONDS:
                    raise
                # It may have been another image's source that failed, or who did not wait for it: once more, our own.
                buffers = await self._scheduler.fetch(jobs, priority, strange=strange, stored=stored)
            found.update((job.segment.key, buffer) for job, buffer in zip(jobs, buffers, strict=True))
        return found

    async def _cached(self, segment: Segment, piece: Piece) -> Plain | None:
        cache = self.cache(segment.blob)
        if cache is None or segment.key not in cache:
            return None
        if self.validates:
            data = await self._validated(cache, segment, piece)
        else:
            try:
                data = await cache.read(segment, piece.offset, piece.size)
            except NotSureError:
                data = await self._validated(cache, segment, Piece(segment, 0, segment.size))
                if data is not None:
                    cache.verified(segment)
                    data = data[piece.offset : piece.offset + piece.size]
        if data is not None:
            self.cache_counters.partial_hits += 1
        return data

    async def _validated(self, cache: BlobCache, segment: Segment, piece: Piece) -> Plain | None:
        """`cache.validate`: hash the touched chunks again. None drops the segment, so that it is fetched anew."""
        whole = await cache.read(segment, 0, segment.size, sure=True)
        if whole is None:
            return None

        def judge() -> None:
            view = memoryview(whole)
            for row in segment.rows:
                chunk = self.chunks.chunk(row)
                begin = segment.place(chunk.uncompressed_offset)
                end = begin + chunk.uncompressed_size
                if begin < piece.offset + piece.size and piece.offset < end:
                    verify(chunk, segment.blob, view[begin:end])

        try:
            await trio.to_thread.run_sync(judge)
        except DigestMismatch as error:
            if cache.is_durable(segment.key):
                log.warning("image %s: damaged in the cache, it is fetched again: %s", self.name, error)
                cache.drop(segment)
            else:
                cache.lost(segment.name, segment.key, OSError(errno.EIO, "it lost what it had taken"))
            return None
        return whole[piece.offset : piece.offset + piece.size]

    async def _chunk_by_chunk(self, ino: int, extents: Sequence[Extent]) -> list[Plain]:
        """After a segment failed: the chunks this read needs may be good all the same."""
        parts: list[Plain] = []
        for piece in self.pieces.of(extents):
            segment = piece.segment
            if segment is None:
                parts.append(bytes(piece.size))
                continue
            data = await self._cached(segment, piece)
            if data is not None:
                parts.append(data)
                continue
            for row in segment.rows:
                chunk = self.chunks.chunk(row)
                begin = segment.place(chunk.uncompressed_offset)
                low = max(piece.offset, begin)
                high = min(piece.offset + piece.size, begin + chunk.uncompressed_size)
                if low >= high:
                    continue
                try:
                    plain = await fetch_chunk(self.job(segment), self.chunks.member(row))
                except SourceError as error:
                    raise self._unreadable(ino, [piece], error, f" chunk {chunk.index}") from None
                parts.append(memoryview(plain)[low - begin : high - begin])
        return parts

    def _unreadable(self, ino: int, pieces: Sequence[Piece], error: SourceError, chunk: str = "") -> ReadError:
        segment = next(piece.segment for piece in pieces if piece.segment is not None)
        if isinstance(error, SegmentError):
            segment = error.segment
        first, last = segment.rows[0], segment.rows[-1]
        chunk = chunk or f" chunks {self.chunks.chunk(first).index}..{self.chunks.chunk(last).index}"
        place = f"(stored at {segment.compressed_start}-{segment.compressed_end})"
        tried = "; ".join(f"{name}: {reason}" for name, reason in error.tried) or str(error)
        reason = f"blob {segment.blob.id}{chunk} {place} from {self.source.name}: {tried}"
        return self.failures.failed(ino, reason, segment.blob.id)

    # Sequential readers

    def read_ahead(self, ino: int, offset: int, size: int, pieces: Sequence[Piece], cached: bool = False) -> None:
        """Fetch what comes behind this read, where it goes on in sequence. Behind the read itself: it is started, and
        nothing of it waits for this."""
        own = {piece.segment.key: piece.segment for piece in pieces if piece.segment is not None}
        here = 0
        if self._lane is not None and pieces and (last := pieces[-1]).segment is not None:
            here = offset + size + last.segment.size - last.offset - last.size  # the rest is read without a note
        wanted = self._behind(ino, offset, size, own, cached, here)
        if wanted and not self._closed:
            self.start(wanted)

    def _behind(
        self, ino: int, offset: int, size: int, own: dict[bytes, Segment], cached: bool, here: int = 0
    ) -> list[Segment]:
        wanted: list[Segment] = []
        try:
            with self._following:
                start, length = self._files.note(ino, offset, size, here)
            if length:
                ahead = self.pieces.of(self.bootstrap.extents(ino, start, length))
                wanted = [piece.segment for piece in ahead if piece.segment is not None]
            if ino and self.bootstrap.attr(ino).size <= SMALL_FILE:
                with self._following:
                    for segment in own.values():
                        wanted += self._runs.note(segment, cached=cached)
        except (RafsError, KeyError, ValueError, IndexError):
            pass  # the read itself will say so
        return [segment for segment in wanted if segment.key not in own]

    # Whole segments, for a driver whose files they are

    @property
    def store(self) -> CacheStore | None:
        return self._store

    def start(self, segments: Sequence[Segment]) -> None:
        """Begin to fetch those that are missing, without waiting. From any thread where `by_threads`."""
        jobs = [self.job(segment) for segment in segments if not self.is_ready(segment)]
        if jobs and self._lane is not None and not trio.lowlevel.in_trio_run():
            self.soon(self.start, segments)
            return
        jobs = [job for job in jobs if self._scheduler.recent(job) is None]
        if jobs:
            self._scheduler.start(jobs)

    def goes_on(self, ino: int, end: int, segment: Segment | None) -> bool:
        """Whether a read of what was here is to be told to `read_ahead` or `follow`. From any thread."""
        return self._files.due(ino, end) or (segment is not None and self._runs.due(segment))

    def follow(self, ino: int, offset: int, size: int, segment: Segment, here: int, *, cached: bool) -> list[Segment]:
        """Note a read of a file, and begin to fetch what comes behind it; the segments that were missing. `here`: up to
        where the file is complete after it."""
        if self._closed:
            return []
        behind = self._behind(ino, offset, size, {segment.key: segment}, cached, here)
        missing = [one for one in behind if not self.is_ready(one)]
        self.start(missing)
        return missing

    def fill(self, segment: Segment, hands: Hands, meanwhile: Callable[[], None]) -> bool:
        """Have a segment in the cache, by this thread; False: ask `whole`. For any thread but the trio thread; waits
        for the disk, and for a registry that answers soon, which `hands` may end. `meanwhile` is called while it
        waits."""
        if self._lane is None or self._closed:
            return False
        job = self.job(segment)
        if not self._lane.takes(job):
            return False
        if (recorder := self.recorder) is not None and recorder.planned and recorder.strange([segment]):
            return False  # the loop lets it have the link before what the profile told
        self.cache_counters.total += 1

        def follow() -> None:
            if self.foresight is not None and segment.compressed_end - segment.compressed_start <= SMALL:
                self.soon(self.foresight.missed, [segment])  # of small files: it looks for neighbours
            meanwhile()

        return self._lane.fill(job, hands, follow)

    def at_hand(self, segment: Segment) -> bool:
        """Whether `fill` may do something."""
        return self._lane is not None and self._lane.takes(self.job(segment))

    @property
    def from_files(self) -> bool:
        """Whether no link is between this machine and the data."""
        return self._lane is not None and isinstance(self.source, FileSource)

    @property
    def by_threads(self) -> bool:
        """Whether `start` and `follow` are for any thread."""
        return self._lane is not None

    async def need_table(self, blob_index: int) -> None:
        """Have the blob's own table, where it needs one. Raises `ReadError`."""
        try:
            if self.chunks.lacks_meta(blob_index):
                await self._tables.load(blob_index)
        except SourceError as error:
            raise self.failures.failed(0, str(error)) from None

    def segments_of(self, ino: int, offset: int, size: int) -> list[Segment]:
        """Where this part of a file lies. Raises KeyError, ValueError or RafsError."""
        pieces = self.pieces.of(self.bootstrap.extents(ino, offset, size)) if size > 0 else []
        return [piece.segment for piece in pieces if piece.segment is not None]

    async def whole(self, segment: Segment, ino: int = 0) -> Plain:
        """All bytes of a segment, which is in the cache afterwards if the disk takes it. `ino`: the file that is read,
        if known. Raises `ReadError`."""
        piece = Piece(segment, 0, segment.size)
        self.cache_counters.total += 1
        try:
            return (await self._collect([piece], stored=True))[0]
        except SourceError as error:
            if error.damaged:
                await self._tables.renew(segment.blob.index)
            raise self._unreadable(ino, [piece], error) from None

    # Prefetch

    async def prefetch(self, files: Sequence[bytes] | None = None, *, stop: Callable[[], bool] | None = None) -> None:
        """Fetch ahead as the configuration says, until done, cancelled or `stop()` is true. Never raises for bad data.

        `files`: absolute paths that replace the bootstrap's own table.
        """
        await Prefetcher(self, self._scheduler).run(files, stop)

    async def learn(self) -> None:
        """Fetch ahead what earlier starts of this image read, and record what this one does, for about a minute."""
        if self.profiles is not None:
            await Learner(self, self._scheduler, self.profiles).run()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            # The chunk map goes with its last user: a shared fetch may still be decoding with it.
            self.bootstrap.close()
