"""One place to ask for ranges of blobs: a mirror, a proxy, an origin. What it takes part in is in `race`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import trio

from nydusfs.http import HttpError, HttpTimeout, ProtocolViolation, Response
from nydusfs.http.connection import Progress
from nydusfs.sources.base import Buffer, Priority
from nydusfs.sources.standing import Standing


class Refused(Exception):
    """One attempt failed; the message is the reason, without the source's name.

    `retry`: the same source may do better later; `blame`: it counts against the source, not only against this blob;
    `damaged`: it answered with something that is not this range of the blob; `hung`: it cost a time limit; `busy`:
    that, or it says itself that it has no time now; `final`: no other source may be asked either; `after`: seconds that
    it asks to be left alone.
    """

    def __init__(
        self,
        reason: str,
        *,
        retry: bool = True,
        blame: bool = True,
        hung: bool = False,
        busy: bool = False,
        damaged: bool = False,
        final: bool = False,
        after: float = 0.0,
    ) -> None:
        self.retry = retry
        self.blame = blame
        self.hung = hung
        self.busy = busy or hung
        self.damaged = damaged
        self.final = final
        self.after = after
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class Range:
    """Part of a stored blob, and why it is wanted. `urgent`: set when a reader has come to wait for it."""

    blob_id: str
    offset: int
    size: int
    priority: Priority = Priority.DEMAND
    urgent: trio.Event | None = None

    @property
    def demanded(self) -> bool:
        """A reader waits for it."""
        return self.priority is Priority.DEMAND or (self.urgent is not None and self.urgent.is_set())

    @property
    def awaited(self) -> bool:
        """A reader waits for it, or will."""
        return self.priority is not Priority.PREFETCH or self.demanded


@dataclass(frozen=True, slots=True)
class Answer:
    """`first`: seconds from the request to its first byte."""

    body: Buffer
    first: float


class Endpoint(Protocol):
    """`rank` is its place in the configured order; `last` marks the origin, which is asked whatever is known of it.

    `attempts`: requests to it for one read, pauses between them. `patience`: seconds without progress, of the first of
    them. `by_range`: see `Source`.
    """

    name: str  # "mirror http://127.0.0.1:65001"
    address: str
    standing: Standing
    rank: int
    last: bool
    attempts: int
    patience: float

    @property
    def by_range(self) -> bool: ...

    async def fetch(self, wanted: Range, patience: float, progress: Progress | None = None) -> Answer:
        """One attempt, given `patience` seconds without progress and the rest of its limits in proportion; `progress`
        is kept up to date. Raises `Refused`."""

    async def ping(self) -> None:
        """A cheap look whether somebody answers. Raises `Refused`."""

    def forget(self, blob_id: str) -> None:
        """What it sent for this blob was wrong: do not go the same way again."""


BUSY = (408, 425, 429, 503, 504)


def is_temporary(status: int) -> bool:
    """Whether a server may answer otherwise soon."""
    return status >= 500 or status in BUSY


def refusal(error: HttpError) -> Refused:
    """What a failed exchange means."""
    if isinstance(error, HttpTimeout):
        return Refused(str(error), hung=True)
    return Refused(str(error), damaged=isinstance(error, ProtocolViolation))


def _asked_pause(text: str) -> float:
    """Seconds that a Retry-After asks for, which is a number of them or a date."""
    try:
        seconds = float(text)
    except ValueError:
        if not text:
            return 0.0
        from email.utils import parsedate_to_datetime  # what hardly any server says shall cost no start its import

        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return min(60.0, max(0.0, seconds))


def judge(response: Response, said: str = "") -> None:
    """Raises `Refused` for any status but 200 and 206; `said`: what the server gives as the reason."""
    status = response.status
    if status in (200, 206):
        return
    temporary = is_temporary(status)
    after = _asked_pause(response.get("retry-after")) if status in (429, 503) else 0.0
    text = f"status {status} ({said})" if said else f"status {status}"
    raise Refused(text, retry=temporary, blame=temporary, busy=status in BUSY, damaged=status == 416, after=after)
