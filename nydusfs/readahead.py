"""Who reads in sequence, and what will be asked for next: of a file, or of a blob by files that lie one after another.

The kernel reads ahead within one file only, two requests of up to 1 MiB; what it knows nothing of is a small file's
neighbour, which `tar`, `find -exec` or an import of many modules wants next. Blobs hold files in the order of their
tree, so that is a sequence too. A reader that goes on gets a window that doubles up to a moment's worth of the link, so
that a cold reader is bound by the link and not by its round trips; one that stops costs at most what it has read twice.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from bootstrap.chunkmap import ChunkMap
from nydusfs.segments import Segment

# A reader that has read this much of a file in sequence gets the next segments fetched ahead of it. The kernel reads on
# for 300 to 600 KiB behind a program's page faults: with 256 KiB each driver fetched what the other one had not asked
# for, and no peer had, and of what was fetched so half was read.
SEQUENTIAL = 1 << 20
APART = 256 * 1024  # bytes left out that end no sequence
LATE = 2 << 20  # the kernel's requests are 1 MiB at most, and two of a file are under way
WINDOW = 16 << 20  # uncompressed bytes at most
MAX_STREAMS = 64
# A sequence that was not gone on with for so long is another run of the program, say: what that reads from the cache
# tells nothing new. A miss begins it again.
STALE = 2.0
# Segments one after the other, and bytes, that make a sequence of small files; less is seen in any start of a program,
# and over a slow link what nobody reads delays what somebody does.
RUN, RUN_BYTES = 4, 1 << 20
GUESSED = 2  # times as much of both where some of it was here already: guesses go a few neighbours far
SMALL_FILE = 1 << 20


@dataclass(slots=True)
class _Stream:
    end: int
    run: int
    ahead: int  # up to where fetching was started
    here: int  # up to where the bytes come with those that were read
    at: float  # when it was looked at, time.monotonic


class FileStreams:
    """Places are file offsets. `due` from any thread, the rest from one."""

    def __init__(self, window: Callable[[int], int], chunk_size: int = 1) -> None:
        """`window`: how much of so many bytes may be fetched ahead now. Files are cut at multiples of `chunk_size`, and
        what is fetched of a chunk is all of it."""
        self._window = window
        self._chunk_size = chunk_size
        self._streams: OrderedDict[int, _Stream] = OrderedDict()

    def due(self, ino: int, end: int) -> bool:
        """Whether a reader that was answered from the cache has come close to where reading ahead ended."""
        stream = self._streams.get(ino)
        return (
            stream is not None
            and stream.end < end <= max(stream.ahead, stream.here) < end + self._least(self._window(WINDOW))
            and time.monotonic() < stream.at + STALE
        )

    def note(self, ino: int, offset: int, size: int, here: int = 0) -> tuple[int, int]:
        """Offset and size of what should be fetched now; size 0: nothing. `here`: the end of what comes with it anyway,
        of which a reader may read some without a note."""
        stream, now = self._streams.get(ino), time.monotonic()
        here = max(here, self._whole(offset + size))
        if stream is None:
            if len(self._streams) >= MAX_STREAMS:
                self._streams.popitem(last=False)
            self._streams[ino] = _Stream(offset + size, size if offset == 0 else 0, offset + size, here, now)
            return 0, 0
        self._streams.move_to_end(ino)
        # Requests that came at the same moment are begun in any order, and reads of what was here are told late where
        # the loop has much to do: that says nothing, and no sequence ends by it.
        if stream.end - LATE <= offset and offset + size <= stream.end:
            return 0, 0
        known = max(stream.end, stream.ahead)  # what was read ahead is read without a note
        gap = max(APART, size)
        if not stream.end - APART <= offset <= max(known, stream.here) + gap:
            self._streams[ino] = _Stream(offset + size, 0, offset + size, here, now)
            return 0, 0
        stream.at = now
        # What is left out was read by nobody, or from a segment that is here, which no sequence can be begun by: a
        # program's faults come to neighbouring chunks often.
        went_on = stream.run >= SEQUENTIAL and offset <= known + gap
        stream.run += max(size, offset + size - stream.end) if went_on else size
        stream.end = max(stream.end, offset + size)
        stream.here = max(stream.here, here)
        window = min(self._window(WINDOW), stream.run * 2)
        ahead = max(stream.ahead, stream.here)
        if stream.run < SEQUENTIAL or ahead >= stream.end + self._least(window):
            return 0, 0
        start = max(stream.end, ahead)
        stream.ahead = max(start, self._whole(stream.end + window))
        return start, stream.ahead - start

    def _least(self, window: int) -> int:
        """How much of a window is to be on its way: half, and half a chunk, of which a reader waits for all."""
        return (window + self._chunk_size) // 2

    def _whole(self, end: int) -> int:
        """Up to where there are bytes when there are some up to `end`."""
        return -(-end // self._chunk_size) * self._chunk_size


@dataclass(slots=True)
class _Run:
    begin: int  # rows of the chunk map
    end: int
    ahead: int
    ahead_at: int  # uncompressed offset
    count: int
    size: int
    at: float
    guessed: bool = False  # some of it was in the cache when its reader came

    def seen(self) -> bool:
        times = GUESSED if self.guessed else 1
        return self.count >= times * RUN and self.size >= times * RUN_BYTES


class BlobStreams:
    """Sequences of small files. Rows of the chunk map follow each other without gaps, segment numbers need not."""

    def __init__(
        self, segment_of: Callable[[int, int], Segment], chunks: ChunkMap, window: Callable[[int], int]
    ) -> None:
        self._window = window
        self._segment_of = segment_of
        self._chunks = chunks
        self._runs: dict[int, _Run] = {}

    def due(self, segment: Segment) -> bool:
        """Whether a reader that was answered from the cache goes on in a sequence, so that it should be noted: also in
        what somebody else fetched, or a sequence that is fetched ahead by guesses would never be seen."""
        run, rows = self._runs.get(segment.blob.index), segment.rows
        if run is None or rows.stop <= run.end or time.monotonic() > run.at + STALE:
            return False
        if run.begin <= rows.start <= run.end:
            return True
        here = segment.start + segment.size
        return rows.stop <= run.ahead and run.seen() and run.ahead_at < here + self._window(WINDOW) // 2

    def note(self, segment: Segment, *, cached: bool) -> list[Segment]:
        """What should be fetched now; `cached`: the segment was here. Raises KeyError or RafsError."""
        rows, blob_index, here = segment.rows, segment.blob.index, segment.start + segment.size
        run, now = self._runs.get(blob_index), time.monotonic()
        if run is None or not run.begin <= rows.start <= run.ahead:
            self._runs[blob_index] = _Run(rows.start, rows.stop, rows.stop, here, 1, segment.size, now)
            return []
        if rows.stop <= run.end:
            return []
        run.at = now
        run.end = rows.stop
        run.count += 1
        run.size += segment.size
        # What was fetched ahead of this very run says nothing.
        run.guessed |= cached and rows.start >= run.ahead
        if run.ahead < run.end:
            run.ahead, run.ahead_at = run.end, here
        found: list[Segment] = []
        window = min(self._window(WINDOW), run.size)
        if not run.seen() or run.ahead_at >= here + window // 2:
            return found
        last = self._chunks.blob_rows(blob_index).stop
        until = here + window
        while run.ahead < last and run.ahead_at < until:
            found.append(self._segment_of(blob_index, run.ahead))
            run.ahead, run.ahead_at = found[-1].rows.stop, found[-1].start + found[-1].size
        return found
