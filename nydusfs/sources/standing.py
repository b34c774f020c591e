"""What is known about one source (a mirror, proxy or origin), shared by all images of the node. Pure state.

Three judgements that answer three questions:
- the breaker: does it answer at all? Failures in a row or hangs take it DOWN; probes in the background, never a reader,
  find out when it is back; then it is TRYING, with few requests at once, and soon UP.
- the error rate: how often is an answer wrong? A source that fails one request in ten is never down for long, so the
  breaker alone would let it waste one request in ten. Its share of the requests is held so small that what fails is
  a third of a percent of all.
- the blobs: a blob that a source does not have, or has wrong, is asked for elsewhere for a while.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from nydusfs.counters import SourceTally
from nydusfs.http.connection import Progress
from nydusfs.sources.latency import Latency
from nydusfs.sources.limits import Seldom

# Five errors spread over days must not disable a mirror (upstream's do): old failures weigh half after this time.
HALF_LIFE = 30.0
FIRST_PAUSE = 1.0
MAX_PAUSE = 3.0  # a source that is back carries traffic within 5 s
BLOB_PAUSE = 30.0
MAX_BLOBS = 256
OVERTAKEN = 2  # requests in a row that others overtook
TRIALS = 3  # good answers that make a source UP again
PROVEN = 16  # good answers after which a source gets any number of requests at once
START = 2  # requests at once to a source that has shown nothing yet
WASTE = 0.003  # share of all requests that may be lost to one source's errors
GOOD = 0.02  # error rate below which a source is as good as any
_ERROR_WEIGHT = 1 / 50


class State(Enum):
    UP = "up"
    DOWN = "down"
    TRYING = "trying"


@dataclass(slots=True)
class Standing:
    failure_limit: int = 5
    interval: float = 0.0  # seconds between probes as configured, 0: ours
    idle: float = 300.0  # nobody has read for this long: no probes until somebody does
    latency: Latency = field(default_factory=Latency)
    tally: SourceTally = field(default_factory=SourceTally)
    state: State = State.UP
    in_flight: int = 0
    error_rate: float = 0.0
    last_used: float = float("-inf")
    probe_at: float = 0.0  # while DOWN
    reason: str = ""  # of the last failure
    passed_over: Seldom = field(default_factory=Seldom)  # the log's lines of reads that went on to the origin
    _weight: float = 0.0
    _updated: float = 0.0
    _pause: float = 0.0
    _proven: int = 0
    _overtaken: int = 0  # in a row
    _credit: float = 1.0
    _blobs: dict[str, float] = field(default_factory=dict)
    _answered: float = float("-inf")
    _under_way: set[Progress] = field(default_factory=set)

    # -- choosing

    def admits(self, blob: str, now: float) -> bool:
        """Whether a request may go there without need. Takes nothing: see `share`."""
        if self.state is State.DOWN or self._blobs.get(blob, 0.0) > now:
            return False
        return self.state is State.UP or self.in_flight <= self._proven

    def crowded(self) -> bool:
        """A source that has proven little has as many requests as it may be trusted with."""
        return self._proven < PROVEN and self.in_flight >= START + self._proven

    def share(self) -> bool:
        """Called once per choice in which this source could be meant: False when its errors have used up its share."""
        if self.error_rate <= GOOD:
            return True
        self._credit = min(1.0, self._credit + WASTE / self.error_rate)
        if self._credit < 1:
            return False
        self._credit -= 1
        return True

    def has(self, blob: str, now: float) -> bool:
        """False: it lacked this blob, or had it wrong, a moment ago."""
        return self._blobs.get(blob, 0.0) <= now

    # -- what happened

    def begin(self, now: float, progress: Progress | None = None) -> None:
        self.in_flight += 1
        self.last_used = now
        if progress is not None:
            self._under_way.add(progress)

    def end(self, progress: Progress | None = None) -> None:
        self.in_flight -= 1
        if progress is not None:
            self._under_way.discard(progress)

    def heard(self) -> float:
        """When anybody last had a good answer from it, or some of one that is still coming."""
        return max([self._answered, *(progress.moved for progress in self._under_way if progress.gives)])

    def success(self, now: float) -> bool:
        """True when the source was not UP and is now."""
        self._answered = now
        self._weight = 0.0
        self._overtaken = 0
        self._proven += 1
        self._count(0.0, now)
        if self.state is State.UP or (self.state is State.TRYING and self._proven < TRIALS):
            return False
        self.state = State.UP
        self._pause = 0.0
        self.error_rate = 0.0  # what it did before it was down says nothing about it now
        return True

    def failure(self, now: float, reason: str, *, hung: bool = False, error: float = 1.0) -> bool:
        """True when this failure takes the source down. A hang costs seconds, a refusal none: it weighs half a limit.
        `error`: what it counts in the error rate."""
        self.reason = reason
        self._proven //= 2
        self._weight *= 0.5 ** (max(0.0, now - self._updated) / HALF_LIFE)
        self._count(error, now)
        limit = max(1, self.failure_limit)
        self._weight += max(1.0, limit / 2) if hung else 1.0
        if self.state is State.DOWN:
            return False
        # The tolerance lets equal failures in a row count fully though each has decayed a little.
        if self.state is State.UP and self._weight <= limit - 0.5:
            return False
        was_up = self.state is State.UP
        self._down(now)
        return was_up

    def slow(self, elapsed: float, size: int, now: float) -> bool:
        """A request that another source overtook. True when this takes the source down, as it does one that never
        answered anything, or that this happens to time after time: probes are better than readers at finding out. Half
        an error: the tail of a good source, which is what hedges are for, must not look like one."""
        self._overtaken += 1
        hangs = self._overtaken >= OVERTAKEN or not self.latency.samples
        self.latency.exceed(elapsed, size, now)
        down = self.failure(now, f"no answer within {elapsed:.3g} s", error=0.5)
        if down or not hangs or self.state is State.DOWN:
            return down
        self._down(now)
        return True

    def wrong(self, blob: str, now: float, *, errors: bool) -> None:
        """It does not have this blob or, with `errors`, has it wrong."""
        if errors:
            self._count(1.0, now)
        while len(self._blobs) >= MAX_BLOBS:
            del self._blobs[next(iter(self._blobs))]
        self._blobs[blob] = now + BLOB_PAUSE

    def _count(self, error: float, now: float) -> None:
        self.error_rate *= 0.5 ** (max(0.0, now - self._updated) / HALF_LIFE)
        self.error_rate += _ERROR_WEIGHT * (error - self.error_rate)
        self._updated = now

    # -- probes

    def _down(self, now: float) -> None:
        self.state = State.DOWN
        self._proven = 0
        if self.interval:
            self._pause = self.interval
        else:
            self._pause = min(MAX_PAUSE, self._pause * 2 or FIRST_PAUSE)
        self.probe_at = now + self._pause

    def probed(self, now: float, passed: bool, reason: str = "") -> None:
        """The outcome of a probe. One that fails takes down a source that was up: proxies are checked all the time."""
        if passed:
            if self.state is State.DOWN:
                self.state = State.TRYING
                self.latency = Latency()  # how long it took before says nothing about it now
                self._proven = 0
                self._weight = 0.0
            return
        self.reason = reason
        self._down(now)
