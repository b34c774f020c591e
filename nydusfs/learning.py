"""Replays an image's profile when it is mounted, and records the run that follows."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import trio

from bootstrap.errors import RafsError
from nydusfs.errors import CacheError, SourceError
from nydusfs.foresight import Foresight
from nydusfs.profile import Key, Profile, ProfileStore, Recorder, identity
from nydusfs.sources import Priority

if TYPE_CHECKING:
    from nydusfs.fetch import FetchScheduler, Job
    from nydusfs.image_reader import ImageReader
    from nydusfs.segments import Segment

log = logging.getLogger("nydusfs.profile")

REQUESTS = 4  # in flight: enough to keep a link of 200 ms full, few enough to let a stranger through
# More of them while they are small and the link is fast, so that it does not idle between them: so many seconds of it.
MORE_REQUESTS, UNDER_WAY = 12, 0.06
FIRST_WINDOW, WINDOW = 8, 32  # segments whose neighbours are looked for at once: few first, the first reader waits less
# Compressed bytes of one request: a reader waits for all of it that wants some of it.
MERGE = 512 * 1024
MAX_FAILURES = 8


class Learner:
    def __init__(self, reader: ImageReader, scheduler: FetchScheduler, store: ProfileStore) -> None:
        self._reader = reader
        self._scheduler = scheduler
        self._store = store
        self._name = identity(reader.bootstrap)
        self._failures = 0

    async def run(self) -> None:
        """Until the run is over or this is cancelled; what was learned is saved either way."""
        profile = await trio.to_thread.run_sync(self._store.load, self._name)
        recorder = self._reader.recorder = Recorder()
        try:
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
        room = _Room(self._scheduler)
        fetched = 0

        async def fetch(group: list[Job], size: int) -> None:
            try:
                await self._scheduler.fetch(group, Priority.LEARNED, MERGE, doubtful=True)
            except SourceError as error:
                self._failures += 1
                log.info("image %s: replay: %s", self._reader.name, error)
            finally:
                room.give_back(size)

        async with trio.open_nursery() as nursery:
            for planned in self._groups(recorder, keys):
                await room.wait()
                if recorder.astray or self._failures >= MAX_FAILURES:
                    log.info("image %s: this start does not follow its profile, replay given up", self._reader.name)
                    break
                # Readers were here while it waited for its turn: what they have had fetched is not fetched again.
                group = [job for job in planned if not self._reader.is_ready(job.segment)]
                if not group:
                    continue
                fetched += len(group)
                size = group[-1].segment.compressed_end - group[0].segment.compressed_start
                room.take(size)
                nursery.start_soon(fetch, group, size)
        if fetched:
            log.info("image %s: %d segments of its profile fetched ahead", self._reader.name, fetched)

    def _groups(self, recorder: Recorder, keys: list[Key]) -> Iterator[list[Job]]:
        """Requests: neighbours of one window together, each when the first of its segments is needed. A reader that
        does what was recorded never comes to one that was not asked for: all before it have been, and it waits for
        them. In the order of places it overtook a fifth of them over 40 Mbit/s."""
        begin, size = 0, FIRST_WINDOW
        while begin < len(keys):
            recorder.planned.update(keys[begin : begin + size])
            segments = list(self._segments(keys[begin : begin + size]))
            begin, size = begin + size, WINDOW
            needed = {segment.key: turn for turn, segment in enumerate(segments)}
            groups: list[list[Segment]] = []
            for segment in sorted(segments, key=lambda s: (s.blob.index, s.compressed_start)):
                group = groups[-1] if groups else []
                if group and segment.adjoins(group[-1]) and segment.compressed_end - group[0].compressed_start <= MERGE:
                    group.append(segment)
                else:
                    groups.append([segment])
            for group in sorted(groups, key=lambda group: min(needed[segment.key] for segment in group)):
                yield [self._reader.job(segment) for segment in group]

    def _segments(self, keys: list[Key]) -> Iterator[Segment]:
        indexes = {blob.id: blob.index for blob in self._reader.bootstrap.blobs}
        for blob_id, number in keys:
            index = indexes.get(blob_id)
            if index is None:
                continue
            try:
                segment = self._reader.segment(index, number)
                if not self._reader.is_ready(segment):
                    yield segment
            except (RafsError, CacheError, KeyError, ValueError):
                continue  # of another image, or of a table that is not here


class _Room:
    """For requests in flight."""

    def __init__(self, scheduler: FetchScheduler) -> None:
        self._scheduler = scheduler
        self._requests = self._bytes = 0
        self._less = trio.Event()

    def _full(self) -> bool:
        if self._requests < REQUESTS:
            return False
        return self._requests >= MORE_REQUESTS or self._bytes >= self._scheduler.courtesy.rate * UNDER_WAY

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
