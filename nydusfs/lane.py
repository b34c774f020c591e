"""The short way of a miss whose stored bytes a thread can have by itself (`ThreadSource`): from a file of this machine,
or from a registry, or the one mirror before it, that answers soon.

The thread that has a reader's question reads, decodes, verifies, writes and answers; the event loop hears of it only
where somebody there waits. Through the loop a miss of 1 MiB took 0.35 ms until its fetch began and 0.2 ms after it, as
long as the fetch itself. From a registry it took 0.95 ms until the request was sent (0.54 of that for the loop, which
was still writing the last miss to the cache) and 0.1 ms between the verified bytes and the answer, of 2.3 ms with a
server that takes no time. What lies in front of sequential readers stays the loop's, which decodes many segments in one
visit to a thread: with threads of this lane instead they got 490 MiB/s where that way gave 640.

Only what goes well is done here: bytes that are wrong or not there, a disk that is not well, a cache at its limit,
segments that the loop is fetching already are left to the ordinary way (`FetchScheduler`), which tries everything and
says what is wrong. A segment is fetched by one of them at a time: who wants it says so first and looks at the other's
list then, so that one of two who come at once steps back.
"""

from __future__ import annotations

import errno
import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import trio

from bootstrap.errors import RafsError
from nydusfs.cache import BlobCache
from nydusfs.flights import together
from nydusfs.hands import Hands
from nydusfs.http import HttpError
from nydusfs.segments import BadChunk, Plain, UnitMembers, decode, runs
from nydusfs.sources import Buffer, FileSource, ThreadSource

if TYPE_CHECKING:
    from nydusfs.flights import Job

log = logging.getLogger("nydusfs.fetch")

# Threads of both drivers that are here at the same time. Each driver has more, for what is cached: a directory may be
# on a network file system that hangs.
SLOTS = 2
TELL = 0.1  # seconds between two times that the event loop hears of it: for it to wake takes as long as a READ

_Identity: TypeAlias = tuple[int, str, bytes]


class _Gate:
    """`threading.Event` in a tenth of the time to make and open one."""

    __slots__ = ("_lock", "is_set")

    def __init__(self) -> None:
        self.is_set = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        if not self.is_set:
            self.is_set = True
            self._lock.release()

    def wait(self) -> None:
        if not self.is_set:
            with self._lock:
                pass


class Claim:
    """A segment that a thread of the lane fetches, with its `hands`. `plain`: its bytes, once `verified` is set; None:
    they could not be had so. `kept`: the cache has them, once it is `over`."""

    __slots__ = ("hands", "identity", "job", "kept", "listeners", "over", "plain", "stored", "verified")

    def __init__(self, job: Job, identity: _Identity, hands: Hands) -> None:
        self.job = job
        self.hands = hands
        self.identity = identity
        self.plain: Plain | None = None
        self.stored: tuple[int, Buffer] | None = None  # that hold it, and where they begin: of one that came beside
        self.kept = False
        self.verified = _Gate()
        self.over = _Gate()
        self.listeners: list[trio.Event] = []


class Lane:
    """One for the node. `flights`: what the event loop fetches; `fetched` and `unkept` are called in its thread: things
    were fetched, with the bytes and seconds of those that say how fast a link is; the cache did not take one. All
    methods from any thread, unless they say else."""

    def __init__(
        self,
        flights: Collection[_Identity],
        fetched: Callable[[Iterable[tuple[int, float]]], None],
        unkept: Callable[[Job, Plain], None],
    ) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._flights = flights
        self._fetched = fetched
        self._unkept = unkept
        self._claims: dict[_Identity, Claim] = {}
        self._slots = threading.Semaphore(SLOTS)
        self._closed = False
        self._told = -math.inf
        self._used = -math.inf
        self._sources: set[ThreadSource] = set()  # that have something to learn

    @staticmethod
    def takes(job: Job) -> bool:
        """Whether this is the way for a job with a `ThreadSource`, as of now."""
        cache, source = job.cache, job.source
        if cache is None or cache.foreign is not None or not cache.write_hastens(job.segment.padded):
            return False
        return isinstance(source, ThreadSource) and source.at_hand(job.segment.blob.id)

    def read(self, job: Job, hands: Hands, meanwhile: Callable[[], None]) -> Plain | None:
        """The bytes of a segment for a reader: it goes to the cache `later`. None: ask the ordinary way. `meanwhile` is
        called while the source is busy, at most once."""
        if not self._slots.acquire(blocking=False):
            return None
        try:
            claim = self._run(job, hands, meanwhile)
            return None if claim is None else claim.plain
        finally:
            self._slots.release()

    def fill(self, job: Job, hands: Hands, meanwhile: Callable[[], None]) -> bool:
        """Have the cache take a segment; False: ask the ordinary way. `meanwhile`: as for `read`."""
        if not self._slots.acquire(blocking=False):
            return False
        try:
            try:
                claim = self._run(job, hands, meanwhile)
            finally:
                hands.finish()
            if claim is None:
                return False
            claim.over.wait()
            return claim.kept
        finally:  # not before: of the driver's threads one must be free, to write may need its answer
            self._slots.release()

    def _run(self, job: Job, hands: Hands, meanwhile: Callable[[], None]) -> Claim | None:
        if (found := self._claim(job, hands)) is None:
            return None
        claim, mine = found
        hands.waits()
        if mine:
            hands.later(lambda: self._keep(claim))
            self._fetch(claim, meanwhile)
        elif isinstance(job.source, FileSource):
            meanwhile()
            claim.verified.wait()
        elif not claim.verified.is_set:
            return None  # on the loop many can wait, and be told to give up
        return claim

    # -- between the lane and the event loop

    async def wait(self, identity: _Identity) -> Claim | None:
        """On the event loop: until no thread fetches this segment any more; what became of it if one did."""
        claim = self._claims.get(identity)
        if claim is not None:
            over = trio.Event()
            claim.listeners.append(over)
            if not claim.over.is_set:
                await over.wait()
        return claim

    def busy(self) -> bool:
        return bool(self._claims)

    def used(self) -> float:
        """When somebody fetched here last, of time.monotonic()."""
        return time.monotonic() if self._claims else self._used

    def close(self) -> None:
        """Nothing is fetched any more when this returns."""
        self._closed = True
        for claim in list(self._claims.values()):
            claim.hands.give_up(errno.EIO)
            claim.over.wait()

    # -- one segment

    def _claim(self, job: Job, hands: Hands) -> tuple[Claim, bool] | None:
        """Whoever fetches it, and whether that is the caller; None: the cache has it or the event loop is at it."""
        identity, cache = job.identity, job.cache
        assert cache is not None
        if (claim := self._claims.get(identity)) is not None:
            return claim, False
        if job.segment.key in cache:
            return None
        mine = Claim(job, identity, hands)
        claim = self._claims.setdefault(identity, mine)
        if claim is not mine:
            return claim, False
        if self._closed or identity in self._flights or job.segment.key in cache:
            self._end(mine)
            return None
        return mine, True

    def _fetch(self, claim: Claim, meanwhile: Callable[[], None]) -> None:
        """Have its verified bytes, or none, and the stored ones of what every node asks for with it."""
        job, segment = claim.job, claim.job.segment
        source, blob_id = job.source, segment.blob.id
        assert isinstance(source, ThreadSource)
        beside: list[Claim] = []
        try:
            asked = together(job)
            for other in asked:
                if other is not job and (found := self._claim(other, claim.hands)) is not None and found[1]:
                    beside.append(found[0])
                    claim.hands.later(partial(self._keep_beside, found[0]))
            plain: Plain | None = None
            for start, end, units in runs(job.chunks, segment):
                if len(asked) > 1:
                    start, end = asked[0].segment.compressed_start, asked[-1].segment.compressed_end
                began = time.monotonic()
                stored = source.read_here(blob_id, start, end - start, claim.hands, meanwhile)
                if stored is None:
                    return
                for one in beside:
                    one.stored = start, stored
                plain = self._decode(job, start, stored, units, plain)
                source.counters.record(end - start, began, False)
                meanwhile = _nothing
            claim.plain = plain
        except (BadChunk, RafsError, HttpError, OSError) as error:
            log.debug("segment %s of blob %s is left to the ordinary way: %s", segment.name, segment.blob.id, error)
        finally:
            claim.verified.set()

    def _decode(
        self, job: Job, start: int, stored: Buffer, units: list[UnitMembers], plain: Plain | None = None
    ) -> Plain:
        try:
            return decode(job.segment, job.chunks, units, start, memoryview(stored), plain)
        except BadChunk:
            assert isinstance(job.source, ThreadSource)
            self._tell(partial(job.source.doubt, job.segment.blob.id, len(stored)))  # before its reader asks the loop
            raise

    def _keep_beside(self, claim: Claim) -> None:
        """`_keep` what nobody has asked for yet."""
        job = claim.job
        try:
            if claim.stored is not None:
                ((_, _, units),) = runs(job.chunks, job.segment)
                claim.plain = self._decode(job, *claim.stored, units)
        except (BadChunk, RafsError) as error:
            log.debug("segment %s of blob %s is left to the ordinary way: %s", job.segment.name, claim.identity, error)
        finally:
            claim.stored = None
            self._keep(claim)

    def _keep(self, claim: Claim) -> None:
        """Give it to the cache, and end."""
        job, plain = claim.job, claim.plain
        cache: BlobCache | None = job.cache
        try:
            if plain is None or cache is None:
                return
            job.counters.entries_count += len(job.segment.rows)
            claim.kept = cache.write(job.segment, plain)
            if claim.kept:
                cache.add(job.segment, plain)
            else:
                self._tell(lambda: self._unkept(job, plain))
            now = self._used = time.monotonic()
            assert isinstance(job.source, ThreadSource)
            self._sources.add(job.source)
            if now > self._told + TELL:
                self._told = now
                self._tell(self._learn)
        except Exception:  # a bug must not leave others waiting
            log.exception("segment %s of blob %s", job.segment.name, job.segment.blob.id)
        finally:
            self._end(claim)

    def _end(self, claim: Claim) -> None:
        del self._claims[claim.identity]
        claim.verified.set()
        claim.over.set()
        for listener in claim.listeners:
            self._tell(listener.set)

    def _learn(self) -> None:
        had: list[tuple[int, float]] = []
        while self._sources:
            had += self._sources.pop().learn()
        self._fetched(had)

    def _tell(self, call: Callable[[], object]) -> None:
        try:
            self._token.run_sync_soon(call)
        except trio.RunFinishedError:
            pass


def _nothing() -> None:
    pass
