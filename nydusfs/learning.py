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
FIRST_WINDOW, WINDOW = 8, 32  # segments ordered by place at once: small first, so that the first reader waits least
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
        groups = self._groups(recorder, keys)
        slots = trio.Semaphore(REQUESTS)
        fetched = 0

        async def fetch(group: list[Job]) -> None:
            try:
                await self._scheduler.fetch(group, Priority.LEARNED, MERGE, doubtful=True)
            except SourceError as error:
                self._failures += 1
                log.info("image %s: replay: %s", self._reader.name, error)
            finally:
                slots.release()

        async with trio.open_nursery() as nursery:
            for planned in groups:
                await slots.acquire()
                if recorder.astray or self._failures >= MAX_FAILURES:
                    slots.release()
                    log.info("image %s: this start does not follow its profile, replay given up", self._reader.name)
                    break
                # Readers were here while it waited for its turn: what they have had fetched is not fetched again.
                group = [job for job in planned if not self._reader.is_ready(job.segment)]
                if not group:
                    slots.release()
                    continue
                fetched += len(group)
                nursery.start_soon(fetch, group)
        if fetched:
            log.info("image %s: %d segments of its profile fetched ahead", self._reader.name, fetched)

    def _groups(self, recorder: Recorder, keys: list[Key]) -> Iterator[list[Job]]:
        """Requests, in the order of need by windows, in the order of places within one."""
        begin, size = 0, FIRST_WINDOW
        while begin < len(keys):
            recorder.planned.update(keys[begin : begin + size])
            segments = sorted(
                self._segments(keys[begin : begin + size]), key=lambda s: (s.blob.index, s.compressed_start)
            )
            begin, size = begin + size, WINDOW
            group: list[Job] = []
            for segment in segments:
                if group:
                    first, last = group[0].segment, group[-1].segment
                    if not segment.adjoins(last) or segment.compressed_end - first.compressed_start > MERGE:
                        yield group
                        group = []
                group.append(self._reader.job(segment))
            if group:
                yield group

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
