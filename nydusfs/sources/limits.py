"""What keeps help from doing harm: a token bucket before the origin, and a budget for requests beyond one per read.

Pure state; times are seconds of whatever clock the caller has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(slots=True)
class TokenBucket:
    """`rate` requests a second on average, `burst` at once. Rate 0: no limit.

    Demand reserves: it is told how long to wait and its place is taken. Prefetch only takes what is free, so it never
    stands before a reader.
    """

    rate: float
    burst: float
    _free_at: float = float("-inf")  # when the bucket would be full again

    def _cost(self) -> float:
        return 1 / self.rate

    def delay(self, now: float) -> float:
        """Seconds until a token is free."""
        if not self.rate:
            return 0.0
        return max(0.0, self._free_at + self._cost() - self.burst * self._cost() - now)

    def take(self, now: float) -> bool:
        """A token if one is free."""
        if self.delay(now) > 0:
            return False
        self._charge(now)
        return True

    def reserve(self, now: float, longest: float) -> float:
        """Seconds to wait, at most `longest`: after that a reader goes whatever the bucket says. The debt that such
        readers leave is bounded too, so that one storm does not slow down the hour behind it."""
        wait = min(self.delay(now), longest)
        self._charge(now)
        if self.rate:
            self._free_at = min(self._free_at, now + self.burst * self._cost() + longest)
        return wait

    def _charge(self, now: float) -> None:
        if self.rate:
            self._free_at = max(self._free_at, now) + self._cost()


@dataclass(slots=True)
class ExtraBudget:
    """Requests beyond the one that each read needs: `ratio` of the reads, and `burst` saved up.

    Hedges are voluntary and need credit. Retries after a failure are not, but they are paid from the same purse: a time
    of many failures is no time for hedges. `reserve` of them are left even then: a source that hangs is found out by
    the first hedges that overtake it.
    """

    ratio: float = 0.02
    burst: float = 16.0  # the readers that may meet a source that hangs at the same time
    credit: float = 16.0
    reserve: float = 4.0
    _hurries: int = 0
    _hurried_until: float = float("-inf")

    def hurry(self, reads: int, until: float) -> None:
        """The next `reads` reads that begin before `until` have waited before, for a worker that died: each may be
        given to a second source at once, if it has the credit."""
        self._hurries, self._hurried_until = reads, until

    def hurried(self, now: float) -> bool:
        """Whether a read that begins now is one of those."""
        if not self._hurries or now >= self._hurried_until:
            return False
        self._hurries -= 1
        return True

    def earn(self) -> None:
        self.credit = min(self.burst, self.credit + self.ratio)

    def take(self) -> bool:
        if self.credit < 1:
            return False
        self.credit -= 1
        return True

    def spend(self) -> None:
        self.credit = max(min(self.credit, self.reserve), self.credit - 1)


@dataclass(slots=True)
class Seldom:
    """Lines of a log that say the same of one thing: the first at once, then one in `EVERY` seconds, with the count of
    those left out. A mirror that answers one request in ten wrongly has one for each otherwise."""

    EVERY: ClassVar[float] = 10.0
    _next: float = float("-inf")
    _left_out: int = 0

    def say(self, now: float) -> str | None:
        """What to add to the line; None: it is left out."""
        if now < self._next:
            self._left_out += 1
            return None
        left_out, self._left_out = self._left_out, 0
        self._next = now + self.EVERY
        return f"; {left_out} more since this was said last" if left_out else ""
