"""How long a source takes, and when a request to it is late. No clock and no I/O here: seconds and bytes come in.

A request's time is its wait for the first byte plus its size at the source's rate, so that requests of 4 KiB and of
4 MiB teach the same two numbers. The wait is also kept as a ratio (taken to expected), whose rolling quantiles say how
far this source strays from its own average. Only waiting makes a request late: a body that moves, however slowly, would
only move slower if it were asked for twice over the same link.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

# Seconds to the first byte of a source nobody has used: better than any, so that it is tried. `standing` sees to it
# that not many requests find out at once.
PRIOR_FIRST = 0.001
PRIOR_RATE = 20e6  # bytes per second
_WINDOW = 128  # ratios
_EVERY = 8  # samples between two sorts of them
_TRUSTED = 8  # samples before quantiles mean something
_RISE, _FALL = 0.3, 0.1  # weights of a sample above and below the average: bad news counts sooner
_FIRSTS = 16  # waits, of which the shortest quarter says what the source itself takes
_RATE_SIZE = 32 * 1024  # smaller bodies say nothing about the rate
_FORGET = 60.0  # seconds in which an unused source's estimate loses half of its distance to the prior
_FORGIVE = 1.5  # and in which one that was late is given half of its lateness: soon somebody looks again
# A request is late behind the 95th percentile, and never before this much above the median: else a steady source,
# whose p95 is a hair above its median, would see one request in twenty doubled for nothing.
_ABOVE_MEDIAN = 1.3
MIN_HEDGE = 0.02


@dataclass(slots=True)
class Latency:
    first: float = PRIOR_FIRST
    rate: float = PRIOR_RATE
    samples: int = 0
    _ratios: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    _firsts: deque[float] = field(default_factory=lambda: deque(maxlen=_FIRSTS))
    _median: float = 1.0
    _late: float = 1.0
    _touched: float = 0.0
    _lateness: float = 0.0

    def expected(self, size: int) -> float:
        """Seconds that a request for `size` bytes takes."""
        return self.first + size / self.rate

    @property
    def trusted(self) -> bool:
        """Whether enough is known for the numbers to mean something."""
        return self.samples >= _TRUSTED

    @property
    def soonest(self) -> float:
        """Seconds within which a quarter of the last answers began: busy processors, ours too, make the others late.
        Infinite while too little is known."""
        return sorted(self._firsts)[len(self._firsts) // 4] if self.trusted else math.inf

    def waits_longer_than(self, size: int) -> bool:
        """Whether an answer's first byte takes longer than `size` bytes do; False while too little is known."""
        return self.trusted and self.first > size / self.rate

    def estimate(self, size: int, now: float) -> float:
        """`expected`, drawn to the prior the longer the source was not used: an old grudge is looked into again."""
        unused = max(0.0, now - self._touched)
        late: float = self._lateness * 0.5 ** (unused / _FORGIVE)
        if not self.samples:
            return self.expected(size) + late
        faith: float = 0.5 ** (unused / _FORGET)
        prior = min(self.expected(size), PRIOR_FIRST + size / PRIOR_RATE)
        return faith * self.expected(size) + (1 - faith) * prior + late

    def observe(self, first: float, total: float, size: int, now: float) -> None:
        """A complete answer: seconds to its first byte and to its last."""
        self.samples += 1
        self._firsts.append(first)
        if self.samples == 1:
            self.first = first
        else:
            self._ratios.append(first / max(self.first, 1e-6))
            self.first += (_RISE if first > self.first else _FALL) * (first - self.first)
        if size >= _RATE_SIZE:
            rate = size / max(total - first, 1e-4)
            self.rate += 0.2 * (min(rate, 1e9) - self.rate)
        self._touched = now
        self._lateness = 0.0
        if self._ratios and (self.samples <= _TRUSTED or self.samples % _EVERY == 0):
            ordered = sorted(self._ratios)
            self._median = ordered[len(ordered) // 2]
            self._late = ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))]

    def exceed(self, elapsed: float, size: int, now: float) -> None:
        """A request that was given up after `elapsed` seconds: it would have taken at least that."""
        self._lateness = max(self._lateness, elapsed)
        self._touched = now

    def hedge_after(self) -> float | None:
        """Seconds without a byte after which a request is late; None while too little is known."""
        if not self.trusted:
            return None
        return max(MIN_HEDGE, self.first * max(self._late, _ABOVE_MEDIAN * self._median))
