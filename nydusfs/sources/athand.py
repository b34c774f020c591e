"""When readers' threads may ask a registry by themselves (`http.direct`), and what became of it.

Everything that has to be known for it is found out by a read that goes the ordinary way: that the registry itself, or
where it leads to, gives the blob to what is sent now, and soon. It holds for `LIFE` seconds, or until anything goes
wrong; then another such read finds out. Of mirrors only one that is first in any case is asked so, and not for longer
than until it is late (`registry.LATE_HERE`): whom to ask then is the ordinary way's business. Who is slow is not asked
so: it would hold threads up, and what the event loop takes is nothing beside its answers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import trio

from nydusfs.http.direct import Direct, Got
from nydusfs.sources.standing import Standing, State

LIFE = 5.0  # tokens and credentials change, and names lead elsewhere
PAUSE = 2.0  # after anything that went wrong
QUICK, USUAL = 0.1, 1 << 20  # seconds for so many bytes


class AtHand:
    """Of one endpoint. `allow` and `learn` on the event loop, the rest from any thread."""

    def __init__(self, standing: Standing) -> None:
        self._standing = standing
        self._ways: dict[str, tuple[Direct, float]] = {}
        self._not_before = 0.0
        self._had: deque[tuple[int, float, float]] = deque()

    def allow(self, blob_id: str, make: Callable[[], Direct]) -> None:
        """A read of this blob went as well as it could."""
        now = time.monotonic()
        if blob_id in self._ways and now < self._ways[blob_id][1]:
            return
        latency = self._standing.latency
        if now >= self._not_before and latency.trusted and latency.expected(USUAL) < QUICK:
            self._ways = {name: way for name, way in self._ways.items() if now < way[1]}
            self._ways[blob_id] = make(), now + LIFE

    def forbid(self) -> None:
        self._not_before = time.monotonic() + PAUSE
        self._ways = {}

    def way(self, blob_id: str) -> Direct | None:
        found = self._ways.get(blob_id)
        return found[0] if found is not None and time.monotonic() < found[1] else None

    def had(self, got: Got) -> None:
        self._had.append((len(got.body), got.first, got.total))

    def learn(self) -> list[tuple[int, float]]:
        """Bytes and seconds of each answer since the last call."""
        now = trio.current_time()
        found: list[tuple[int, float]] = []
        while self._had:
            size, first, total = self._had.popleft()
            self._standing.latency.observe(first, total, size, now)
            if self._standing.state is not State.DOWN:
                self._standing.success(now)
            found.append((size, total))
        return found
