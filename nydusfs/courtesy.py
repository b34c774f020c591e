"""Prefetch beside readers: how much of it is under way, and when its bytes are received.

While nobody reads, prefetch fills the link and no more: requests, each with a small TCP window (`http.pacing`), are
added as long as answers begin as soon as ever, so hardly anything queues in front of a reader that comes. While
somebody reads, one request is begun at a time and received at a small share of the link's rate: prefetch under constant
reading goes on, and costs a reader of a 40 Mbit/s link 3 ms a request. A reader that wants what a request brings frees
it of all that.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

import trio

# After the last demand read. A program that goes on to compute leaves the link idle; one that reads on is back sooner.
BREATH = 0.03
SHARE = 0.06  # of the link, for prefetch beside readers
QUEUE = 0.008  # seconds of the link that one request may have under way
MIN_WINDOW, MAX_WINDOW = 32 * 1024, 256 * 1024
BUSY_WINDOW = 16 * 1024  # beside readers
UNKNOWN_WINDOW = 256 * 1024  # of a replay's first requests, which find out about the link
REQUESTS = 8  # in flight at most
UNKNOWN_RATE = 1e6  # bytes per second, until something was measured
_SLOWEST = 128 * 1024.0  # an open request gets this much in any case: its source has limits of time
_SLICE, _SLICE_BYTES = 0.25, 1 << 20  # a rate is measured over so many seconds or bytes
_READ_SLICE, _READ_DECAY = 0.1, 0.98  # the same from what readers get, who may not use all of the link
_CAME_SLICE, _CAME_BYTES, _CAME_DECAY = 0.02, 512 << 10, 0.8  # the same of a replay, which uses all of it
_LEAST_AHEAD, _AHEAD_SECONDS = 2 << 20, 0.4
_WAITS = 32  # of the last answers: the shortest is what an answer takes when nothing queues before it
# An answer that takes that much longer stood in a queue, as a reader would: with 1.5 and 2 ms a rare read over 40
# Mbit/s took 1.3 of its time (tests/unit/test_courtesy.py), with these 1.1, and prefetch had the same share.
_QUEUED, _QUEUED_SECONDS = 1.2, 0.001
_REQUEST_SECONDS = 0.5  # of the link that one request may be worth


class Courtesy:
    """One for the node. Times are trio's. `aside`: when a reader last got something that this was not told of, of
    time.monotonic()."""

    def __init__(self, aside: Callable[[], float] = lambda: -math.inf) -> None:
        self._aside = aside
        self.rate = UNKNOWN_RATE
        self.known = False  # whether it was measured
        self.running = 0
        self._readers = 0
        self._free_at = -math.inf
        self._next_at = -math.inf  # when the next piece beside readers is due
        self._slice_from = -math.inf
        self._slice_bytes = 0
        self._read_from, self._read_bytes = -math.inf, 0
        self._came_from, self._came_bytes = -math.inf, 0
        self._width = 1.0  # requests that fill the link
        self._waits: deque[float] = deque(maxlen=_WAITS)

    # -- readers

    def reader_comes(self) -> None:
        if not self._readers:
            self._read_from, self._read_bytes = trio.current_time(), 0
        self._readers += 1
        self._slice_from = -math.inf

    def reader_goes(self) -> None:
        self._readers -= 1
        self._free_at = trio.current_time() + BREATH

    def fetched(self, size: int, seconds: float) -> None:
        """What readers waited for came in this time: the link carries at least that, and what came beside it."""
        now = trio.current_time()
        if not self._readers:  # it came aside
            self._read_from, self._read_bytes = now, 0
        self._read_bytes += size
        elapsed = now - self._read_from
        if size >= MIN_WINDOW and seconds > 0:
            self.rate, self.known = max(self.rate, size / seconds), True
        if elapsed >= _READ_SLICE:
            self.rate = max(_READ_DECAY * self.rate, self._read_bytes / elapsed)
            self._read_from, self._read_bytes = now, 0

    def ahead(self, longest: int) -> int:
        """Bytes that may be fetched ahead of a sequential reader: a moment's worth, behind which others would wait."""
        return int(min(longest, max(_LEAST_AHEAD, self.rate * _AHEAD_SECONDS)))

    @property
    def busy(self) -> bool:
        if self._readers > 0 or trio.current_time() < self._free_at:
            return True
        return time.monotonic() < self._aside() + BREATH

    def rested(self) -> float:
        """Seconds since a reader last waited for data."""
        if self._readers > 0:
            return 0.0
        return max(0.0, min(trio.current_time() - self._free_at + BREATH, time.monotonic() - self._aside()))

    def arrived(self, size: int) -> None:
        """Of a replay, which has as much under way as it may: what comes is what the link carries, once it was as much
        as its windows hold a few times."""
        now = trio.current_time()
        elapsed = now - self._came_from
        if elapsed > 4 * _SLICE:
            self._came_from, self._came_bytes = now, 0
            return
        self._came_bytes += size
        if elapsed >= _CAME_SLICE and self._came_bytes >= _CAME_BYTES:
            self.rate = max(self._came_bytes / elapsed, self.rate * (_CAME_DECAY if elapsed >= _READ_SLICE else 1))
            self.known = True
            self._came_from, self._came_bytes = now, 0

    # -- prefetch

    @property
    def window(self) -> int:
        return BUSY_WINDOW if self.busy else int(min(max(self.rate * QUEUE, MIN_WINDOW), MAX_WINDOW))

    @property
    def request_size(self) -> int:
        """Bytes that one request should ask for."""
        return 0 if self.busy else int(self.rate * _REQUEST_SECONDS)

    def admit(self) -> bool:
        """Take a place for one more request, to be given back with `ended`."""
        if self.running >= (1 if self.busy else int(self._width)):
            return False
        self.running += 1
        return True

    def ended(self) -> None:
        self.running -= 1

    def waited(self, seconds: float) -> None:
        """For the begin of an answer."""
        self._waits.append(seconds)
        if seconds > min(self._waits) * _QUEUED + _QUEUED_SECONDS:
            self._width = max(1.0, self._width - 0.5)
        else:
            self._width = min(float(REQUESTS), self._width + 1 / self._width)

    async def permit(self, size: int, urgent: trio.Event) -> float:
        """Wait until a piece may be received; `urgent` ends the waiting."""
        began = now = trio.current_time()
        while not urgent.is_set():
            if not self.busy:
                break
            self._slice_from = -math.inf
            if now >= self._next_at:
                self._next_at = now + self._shared(size)
                break
            due = self._next_at if self._readers else min(self._next_at, self._free_at)
            with trio.move_on_after(min(max(due - now, 0.001), BREATH)):
                await urgent.wait()
            now = trio.current_time()
        return now - began

    def _shared(self, size: int) -> float:
        """Seconds that a piece of this size takes beside readers."""
        return size / max(self.rate * SHARE, _SLOWEST)

    def received(self, size: int, permitted: int) -> None:
        """Of a permitted piece so much came: over TLS one record, which some servers begin with 1 KiB. What comes while
        nobody reads is what the link carries."""
        if self.busy:
            self._next_at -= self._shared(permitted - size)
            return
        now = trio.current_time()
        elapsed = now - self._slice_from
        if elapsed > 4 * _SLICE:  # the first piece after a pause, however long that was
            self._slice_from, self._slice_bytes = now, 0
            return
        self._slice_bytes += size
        if elapsed >= _SLICE or (self._slice_bytes >= _SLICE_BYTES and elapsed > 0):
            self.rate = max(self._slice_bytes / elapsed, 0.8 * self.rate, _SLOWEST)
            self._slice_from, self._slice_bytes = now, 0


class RequestPace:
    """The `Pace` of one request; `urgent`: a reader waits for it."""

    def __init__(self, courtesy: Courtesy, urgent: trio.Event) -> None:
        self._courtesy = courtesy
        self._urgent = urgent
        self._permitted = 0

    @property
    def window(self) -> int:
        return MAX_WINDOW if self._urgent.is_set() else self._courtesy.window

    def begun(self, seconds: float) -> None:
        self._courtesy.waited(seconds)

    async def permit(self, size: int) -> float:
        self._permitted = size
        return await self._courtesy.permit(size, self._urgent)

    def received(self, size: int) -> None:
        self._courtesy.received(size, self._permitted)


class ReplayPace(RequestPace):
    """Of what readers will want if they do what they did before: a few requests fill the link, until a reader waits for
    something else. `doubts` knows these readers, `link` the rate."""

    def __init__(self, doubts: Courtesy, urgent: trio.Event, link: Courtesy) -> None:
        super().__init__(doubts, urgent)
        self._link = link

    @property
    def window(self) -> int:
        if not self._link.known:
            return UNKNOWN_WINDOW
        return int(min(max(2 * self._link.rate * QUEUE, 2 * MIN_WINDOW), 2 * MAX_WINDOW))

    def begun(self, seconds: float) -> None:
        self._link.waited(seconds)

    def received(self, size: int) -> None:
        super().received(size)
        self._link.arrived(size)
