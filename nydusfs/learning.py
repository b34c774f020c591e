"""Replays an image's profile when it is mounted, and records the run that follows."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from bootstrap.errors import RafsError
from nydusfs.errors import CacheError, SourceError
from nydusfs.foresight import Foresight
from nydusfs.profile import Key, Profile, ProfileStore, Recorder, identity
from nydusfs.sources import Priority

if TYPE_CHECKING:
    from nydusfs.courtesy import Courtesy
    from nydusfs.fetch import FetchScheduler
    from nydusfs.flights import Job
    from nydusfs.image_reader import ImageReader
    from nydusfs.segments import Segment

log = logging.getLogger("nydusfs.profile")

FIRST_REQUESTS = 2  # in flight until they have told how fast the link is
REQUESTS = 4  # then: enough to keep a link of 200 ms full, few enough to let a stranger through
# More of them while they are small and the link is fast, so that it does not idle between them: so many seconds of it.
MORE_REQUESTS, UNDER_WAY = 12, 0.06
FIRST_WINDOW, WINDOW = 8, 32  # segments whose neighbours are looked for: few first, the first reader waits less
# Compressed bytes of one request: a reader waits for all of it that wants some of it.
MERGE = 512 * 1024
# Where the link is fast, each request costs more than its bytes do: so many seconds of it, for both.
WINDOW_SECONDS, MERGE_SECONDS, MOST_MERGE = 0.1, 0.02, 4 << 20
MAX_FAILURES = 8
_keepers = trio.CapacityLimiter(1)  # threads: starts of an image may be over at once, and each counts


class Learner:
    def __init__(self, reader: ImageReader, scheduler: FetchScheduler, store: ProfileStore) -> None:
        self._reader = reader
        self._scheduler = scheduler
        self._store = store
        self._name = identity(reader.bootstrap)
        self._failures = 0

    async def run(self) -> None:
        """Until the run is over or this is cancelled; what was learned is saved either way."""
        # first: readers do not wait for a slow disk, and who reads before it is here says which command this is
        recorder = self._reader.recorder = Recorder()
        profile: Profile | None = None
        try:
            profile = await trio.to_thread.run_sync(self._store.load, self._name)
            async with trio.open_nursery() as nursery:
                if profile is not None and profile.all.segments:
                    nursery.start_soon(self._follow, recorder, profile, nursery)
                else:
                    nursery.start_soon(self._foresee)
                while (seconds := recorder.over()) > 0:  # noqa: ASYNC110 - readers' threads note, they must not wake us
                    await trio.sleep(seconds)
                nursery.cancel_scope.cancel()
        finally:
            self._reader.recorder = self._reader.foresight = None
            if recorder.segments:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(self._keep, recorder, profile, limiter=_keepers)

    def _keep(self, recorder: Recorder, profile: Profile | None) -> None:
        """Waits for the disk: for a worker thread."""
        # The file may have been replaced meanwhile: by an import, or by another mount of the image.
        base = self._store.load(self._name) or profile or Profile()
        merged = base.merged(list(recorder.segments), list(recorder.inodes), recorder.command.name)
        self._store.save(self._name, merged)

    async def _follow(self, recorder: Recorder, profile: Profile, nursery: trio.Nursery) -> None:
        """What all commands read at once, the rest when it is known which of them runs."""
        await self._replay(recorder, profile.common())
        if len(profile.commands) > 1 and not recorder.astray:
            name = await recorder.command.known()
            rest = [key for key in profile.of(name) if key not in recorder.planned]
            await self._replay(recorder, rest)
        if recorder.astray:
            nursery.start_soon(self._foresee)

    async def _foresee(self) -> None:
        foresight = self._reader.foresight = Foresight(self._reader, self._scheduler)
        try:
            await foresight.run()
        except Exception:  # a bug must cost the head start, not the image
            log.exception("image %s: looking ahead failed unexpectedly", self._reader.name)
            self._reader.foresight = None

    async def _replay(self, recorder: Recorder, keys: list[Key]) -> None:
        room = _Room(self._scheduler.courtesy)
        plan = _Plan(self._reader, self._scheduler.courtesy, recorder, keys)
        fetched = 0

        async def fetch(group: list[Job], size: int) -> None:
            try:
                await self._scheduler.fetch(group, Priority.LEARNED, MOST_MERGE, doubtful=True)
            except SourceError as error:
                self._failures += 1
                log.info("image %s: replay: %s", self._reader.name, error)
            finally:
                room.give_back(size)

        async with trio.open_nursery() as nursery:
            while True:
                await room.wait()
                planned = plan.take()
                if not planned:
                    break
                if recorder.astray or self._failures >= MAX_FAILURES:
                    log.info("image %s: this start does not follow its profile, replay given up", self._reader.name)
                    break
                # Readers were here while it waited for its turn: what they have had fetched is not fetched again.
                group = [self._reader.job(segment) for segment in planned if not self._reader.is_ready(segment)]
                if not group:
                    continue
                fetched += len(group)
                size = group[-1].segment.compressed_end - group[0].segment.compressed_start
                room.take(size)
                nursery.start_soon(fetch, group, size)
                await trio.lowlevel.checkpoint()  # tasks of one turn run in any order
        if fetched:
            log.info("image %s: %d segments of its profile fetched ahead", self._reader.name, fetched)


class _Plan:
    """What of a profile is left to ask for. Each request is for the segment that is needed first, and its neighbours
    among those that are needed soon: a reader that does what was recorded never comes to one that was not asked for,
    as all before it have been. In the order of places it overtook a fifth of them over 40 Mbit/s."""

    def __init__(self, reader: ImageReader, link: Courtesy, recorder: Recorder, keys: list[Key]) -> None:
        self._reader = reader
        self._link = link
        self._recorder = recorder
        self._left = iter(keys)
        self._soon: dict[bytes, Segment] = {}  # by key, in the order of need
        self._size = 0
        self._indexes = {blob.id: blob.index for blob in reader.bootstrap.blobs}

    def take(self) -> list[Segment]:
        """Those of the next request; none: nothing is left."""
        self._look_ahead()
        if not self._soon:
            return []
        merge = min(max(MERGE, self._link.rate * MERGE_SECONDS), MOST_MERGE)
        first = next(iter(self._soon.values()))
        places = sorted(self._soon.values(), key=lambda s: (s.blob.index, s.compressed_start))
        begin = at = places.index(first)
        while at + 1 < len(places) and _joins(places[begin], places[at], places[at + 1], merge):
            at += 1
        while begin and _joins(places[begin - 1], places[begin - 1], places[begin], merge, places[at]):
            begin -= 1
        for segment in places[begin : at + 1]:
            del self._soon[segment.key]
            self._size -= segment.compressed_end - segment.compressed_start
        return places[begin : at + 1]

    def _look_ahead(self) -> None:
        link = self._link
        count, size = (WINDOW, link.rate * WINDOW_SECONDS) if link.known else (FIRST_WINDOW, 0.0)
        while len(self._soon) < count or self._size < size:
            key = next(self._left, None)
            if key is None:
                return
            self._recorder.planned.add(key)
            if (segment := self._segment(*key)) is not None and segment.key not in self._soon:
                self._soon[segment.key] = segment
                self._size += segment.compressed_end - segment.compressed_start

    def _segment(self, blob_id: str, number: int) -> Segment | None:
        index = self._indexes.get(blob_id)
        if index is None:
            return None
        try:
            segment = self._reader.segment(index, number)
            return None if self._reader.is_ready(segment) else segment
        except (RafsError, CacheError, KeyError, ValueError):
            return None  # of another image, or of a table that is not here


def _joins(first: Segment, last: Segment, following: Segment, merge: float, end: Segment | None = None) -> bool:
    return following.adjoins(last) and (end or following).compressed_end - first.compressed_start <= merge


class _Room:
    """For requests in flight."""

    def __init__(self, link: Courtesy) -> None:
        self._link = link
        self._requests = self._bytes = 0
        self._less = trio.Event()

    def _full(self) -> bool:
        if self._requests < (REQUESTS if self._link.known else FIRST_REQUESTS):
            return False
        return self._requests >= MORE_REQUESTS or self._bytes >= self._link.rate * UNDER_WAY

    async def wait(self) -> None:
        while self._full():
            self._less = trio.Event()
            await self._less.wait()

    def take(self, size: int) -> None:
        self._requests += 1
        self._bytes += size

    def give_back(self, size: int) -> None:
        self._requests -= 1
        self._bytes -= size
        self._less.set()
