"""Reads of an image's files by the thread that has a reader's question, as far as they go without the event loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bootstrap.errors import RafsError
from nydusfs.foresight import SMALL
from nydusfs.hands import Hands
from nydusfs.lane import Lane
from nydusfs.pieces import Piece
from nydusfs.segments import Plain, Segment

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nydusfs.cache import BlobCache
    from nydusfs.image_reader import ImageReader


class ThreadReads:
    """Of one image, whose reader is not kept here: it goes, and its maps with it, when the last that uses it lets go,
    and not when the cycle collector comes by. `caches`: those that are open, by blob index. `lane` None: only what is
    cached. From any thread but the trio thread."""

    def __init__(self, caches: Mapping[int, BlobCache | None], lane: Lane | None) -> None:
        self._caches = caches
        self._lane = lane

    def read(
        self, reader: ImageReader, ino: int, offset: int, size: int, pid: int, hands: Hands
    ) -> list[Plain] | None:
        """See `ImageReader.read_now`."""
        hands.begin()
        if (recorder := reader.recorder) is not None and recorder.command.open:
            hands.waits()
            recorder.command.seen(pid)
        if reader.validates:
            return None
        counters = reader.cache_counters
        parts: list[Plain] = []
        missed = 0
        try:
            pieces = reader.pieces.of(reader.bootstrap.extents(ino, offset, size))  # `MissingMeta` is a RafsError
            if recorder is not None:
                recorder.note(ino, [piece[0] for piece in pieces])
            for segment, place, length in pieces:
                if segment is None:
                    parts.append(bytes(length))
                    continue
                if counters.unused:
                    counters.used(segment.key)
                cache = self._caches.get(segment.blob.index)
                data = cache.read_now(segment, place, length, hands) if cache is not None else None
                if data is None:
                    if self._lane is None:
                        return None
                    missed += 1
                    data = self._miss(reader, ino, offset, size, segment, pieces, hands, missed == 1)
                    if data is None:
                        return None
                    data = memoryview(data)[place : place + length]
                parts.append(data)
        except (RafsError, KeyError, ValueError, IndexError):
            return None
        counters.total += 1
        counters.partial_hits += len(parts) - missed
        last = pieces[-1][0] if pieces else None
        if missed:
            if reader.foresight is not None and offset == 0:
                reader.soon(reader.foresight.opened, ino, bytes(parts[0][:4]))
        elif reader.goes_on(ino, offset + size, last):
            if self._lane is None:
                reader.soon(reader.read_ahead, ino, offset, size, pieces, True)
            else:
                reader.read_ahead(ino, offset, size, pieces, True)
        return parts

    def _miss(
        self,
        reader: ImageReader,
        ino: int,
        offset: int,
        size: int,
        segment: Segment,
        pieces: list[Piece],
        hands: Hands,
        first: bool,
    ) -> Plain | None:
        """The bytes of a segment that is not cached, from its source in this thread; what else the read wants, and what
        comes behind it, is begun meanwhile."""
        assert self._lane is not None
        job = reader.job(segment)
        if not self._lane.takes(job):
            return None
        if (recorder := reader.recorder) is not None and recorder.planned and recorder.strange([segment]):
            return None  # the loop lets it have the link before what the profile told

        def follow() -> None:
            if reader.foresight is not None and segment.compressed_end - segment.compressed_start <= SMALL:
                reader.soon(reader.foresight.missed, [segment])  # of small files: it looks for neighbours
            if first:
                rest = [one.segment for one in pieces if one.segment is not None and one.segment is not segment]
                reader.start(rest)
                reader.read_ahead(ino, offset, size, pieces)

        return self._lane.read(job, hands, follow)
