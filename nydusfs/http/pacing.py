"""Bodies that are received no faster than somebody allows: how prefetch leaves a link to the readers.

A request that is on its way cannot be taken back, but its sender can be stopped: TCP lets it have as much under way as
the receiver's window. So the connections of such requests have a small one, and before each piece of a body its
receiver asks for permission. What a link still has to carry of them when a reader comes is then one small window each,
and nothing is thrown away.

The `Pace` of a request travels with the task that makes it; sources need not know of it.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Protocol


class Pace(Protocol):
    @property
    def window(self) -> int:
        """Bytes that the peer may have under way."""

    def begun(self, seconds: float) -> None:
        """The head of the answer is here, `seconds` after the request was sent."""

    async def permit(self, size: int) -> float:
        """Return when `size` bytes may be received; the seconds that took."""

    def received(self, size: int) -> None:
        """So many came."""


PACE: ContextVar[Pace | None] = ContextVar("nydus_pace", default=None)
