"""`Source` over one or more endpoints: counts reads, and says what was tried when none had the bytes."""

from __future__ import annotations

import time

import trio

from nydusfs.counters import BackendCounters
from nydusfs.errors import SourceError
from nydusfs.sources.base import Buffer, Check, Priority
from nydusfs.sources.endpoint import Endpoint, Range
from nydusfs.sources.race import Racer, ReadFailed
from nydusfs.sources.standing import State

# Seconds, see `Source.instant`.
INSTANT = 0.003


class RemoteSource:
    def __init__(self, name: str, kind: str, racer: Racer) -> None:
        self.name = name
        self.counters = BackendCounters(kind)
        self.racer = racer
        self.counters.sources = racer.sources

    @property
    def by_range(self) -> bool:
        """So it is while such a mirror or proxy is in use; when it is down there is only the registry to ask."""
        return any(one.by_range and one.standing.state is not State.DOWN for one in self.racer.endpoints)

    def cheap(self, size: int) -> bool:
        asked = self._asked()
        return asked is not None and asked.standing.latency.waits_longer_than(2 * size)

    def instant(self) -> bool:
        asked = self._asked()
        return asked is not None and asked.standing.latency.soonest < INSTANT

    def _asked(self) -> Endpoint | None:
        return next((one for one in self.racer.endpoints if one.standing.state is not State.DOWN), None)

    async def greet(self) -> None:
        pass

    async def read(
        self,
        blob_id: str,
        offset: int,
        size: int,
        priority: Priority,
        check: Check | None = None,
        urgent: trio.Event | None = None,
    ) -> Buffer:
        started = time.monotonic()
        failed = True
        try:
            data = await self.racer.read(Range(blob_id, offset, size, priority, urgent), check)
            failed = False
            return data
        except ReadFailed as error:
            what = f"cannot read {size} bytes at {offset} of blob {blob_id} from {self.name}"
            raise SourceError(what, error.tried, damaged=error.damaged) from None
        finally:
            self.counters.record(size, started, failed)

    async def aclose(self) -> None:
        """Connections belong to the hub; nothing of its own to close."""
