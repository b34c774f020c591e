"""One read over several sources: who is asked first, who next, when two at once, and whose answer counts.

A demand read that is late (behind the rolling p95 of the source that has it) is given to a second source as well; the
first answer that verifies wins and the other requests are cancelled. Everything that decides is in `choice`,
`standing`, `latency` and `limits`, without clock or I/O; here is the loop that acts on it.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import trio

from nydusfs.counters import SourceTally
from nydusfs.http.connection import Progress
from nydusfs.sources.base import Buffer, Check, Priority, WrongBytes
from nydusfs.sources.choice import choose
from nydusfs.sources.endpoint import Endpoint, Range, Refused
from nydusfs.sources.limits import ExtraBudget, TokenBucket
from nydusfs.sources.patience import Waiting, ask_on, ask_once, longest_silence
from nydusfs.sources.standing import State

log = logging.getLogger("nydusfs.sources")

UNKNOWN = 0.5  # seconds until a request to a source without history counts as late
# A registry behind mirrors is not asked twice for what a mirror is about to deliver: a cold peer-to-peer mirror takes
# ten times as long as a warm one. That is about answers: who cannot even be reached within `UNKNOWN` is not cold.
ORIGIN_HEDGE = 1.0
# Nor soon for what is much more than was wanted: a piece of 4 MiB takes 0.9 s over 40 Mbit/s, and a second request
# makes it later. All of a blob of 50 MB, piece by piece: 16 s and 51 MB; with 1 s here 19 s and 62 MB.
BULKY_HEDGE = 1.4
STALLED = 0.3  # an answer that has begun is given at least this from one byte to the next
MAX_RUNNING = 3
RETRY_PAUSE = 0.2  # doubles per attempt at the origin, plus jitter
MAX_RETRY_PAUSE = 5.0
SAMPLE_SIZE = 4096
SAMPLE_AGE = 60.0


_Running: TypeAlias = dict[Endpoint, Progress]  # in the order in which they were started


class ReadFailed(Exception):
    """No source had it. `tried`: (source, reason) in order; `damaged`: see `SourceError`."""

    def __init__(self, tried: Sequence[tuple[str, str]], damaged: bool) -> None:
        self.tried = list(tried)
        self.damaged = damaged
        super().__init__("; ".join(f"{name}: {reason}" for name, reason in tried))


@dataclass(frozen=True, slots=True)
class Sample:
    """A verified piece of a blob, by which a source is probed with a real request."""

    wanted: Range
    data: bytes
    taken: float


class Watcher(Protocol):
    """Who probes sources that are down."""

    def watch(self, endpoint: Endpoint, racer: Racer) -> None: ...


@dataclass(slots=True)
class Tally:
    """Requests of all reads, for metrics and measurements."""

    reads: int = 0
    requests: int = 0
    hedges: int = 0
    hedges_won: int = 0
    retries: int = 0


class Racer:
    """The sources of one repository's blobs. `scope` tells the blobs of repositories apart that share a source."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        scope: str,
        *,
        extras: ExtraBudget,
        bucket: TokenBucket | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        """`bucket` protects the origin when it stands behind others; its retries always."""
        self.endpoints = list(endpoints)
        self.scope = scope
        self.tally = Tally()
        self.sources: dict[str, SourceTally] = {}  # by address, for this repository alone
        self.sample: Sample | None = None
        self.last_read = -math.inf
        self._extras = extras
        self._bucket = bucket
        self._watcher = watcher
        self._silence = longest_silence(endpoints)

    async def read(self, wanted: Range, check: Check | None) -> Buffer:
        """The bytes of the range, verified by `check`. Raises `ReadFailed`."""
        self.tally.reads += 1
        self._extras.earn()
        self.last_read = trio.current_time()
        if self._watcher is not None and len(self.endpoints) > 1:
            for endpoint in self.endpoints:
                if endpoint.standing.state is State.DOWN:
                    self._watcher.watch(endpoint, self)
        turns = _Turns(self, wanted, Waiting(self._silence))
        turns.hurried = len(self.endpoints) > 1 and wanted.demanded and self._extras.hurried(self.last_read)
        if len(self.endpoints) == 1 or (wanted.priority is Priority.PREFETCH and wanted.urgent is None):
            return await self._in_turn(turns, check)
        return await self._raced(turns, check)

    async def _in_turn(self, turns: _Turns, check: Check | None) -> Buffer:
        while (endpoint := turns.next()) is not None:
            try:
                await self._wait(turns, endpoint)
                return await self._attempt(endpoint, turns, check, None, self._begin(endpoint, turns))
            except Refused as reason:
                turns.note(endpoint, reason)
        raise turns.failure()

    async def _raced(self, turns: _Turns, check: Check | None) -> Buffer:
        lock = trio.Lock()
        wanted = turns.wanted
        running: _Running = {}
        outcomes: list[tuple[Endpoint, Buffer | Refused]] = []
        news = trio.Event()
        body: Buffer | None = None
        async with trio.open_nursery() as nursery:

            async def run(endpoint: Endpoint) -> None:
                try:
                    outcomes.append((endpoint, await self._attempt(endpoint, turns, check, lock, running[endpoint])))
                except Refused as reason:
                    outcomes.append((endpoint, reason))
                news.set()

            def launch(endpoint: Endpoint) -> None:
                running[endpoint] = self._begin(endpoint, turns)
                nursery.start_soon(run, endpoint)

            async def wake(urgent: trio.Event) -> None:
                await urgent.wait()
                news.set()

            if wanted.urgent is not None and not wanted.awaited:
                nursery.start_soon(wake, wanted.urgent)

            while body is None:
                if not running:
                    following = turns.next()
                    if following is None:
                        break
                    await self._wait(turns, following)
                    launch(following)
                if not outcomes:
                    news = trio.Event()
                    with trio.CancelScope(deadline=self._late_at(turns, running)):
                        await news.wait()
                if not outcomes:
                    hedge = self._hedge(turns, running)
                    if hedge is not None:
                        self.tally.hedges += 1
                        launch(hedge)
                    continue
                endpoint, result = outcomes.pop(0)
                del running[endpoint]
                if isinstance(result, Refused):
                    turns.note(endpoint, result)
                    continue
                body = result
                for other, progress in running.items():
                    elapsed = trio.current_time() - turns.started[other]
                    if turns.started[other] < turns.started[endpoint]:
                        self.tally.hedges_won += 1
                        if not progress.excused and not turns.hurried:
                            self._overtaken(other, elapsed, wanted)
            nursery.cancel_scope.cancel()
        if body is None:
            raise turns.failure()
        return body

    # -- lateness

    def _late_at(self, turns: _Turns, running: _Running) -> float:
        """When the request that was started last counts as late; never when nobody waits or could help."""
        if len(running) >= MAX_RUNNING or not turns.wanted.awaited:
            return math.inf
        helper = turns.helper(running)
        if helper is None:
            return math.inf
        # At `UNKNOWN` it is looked once whether there is a connection: now the request has not even begun.
        first = running[next(reversed(running))].moved + UNKNOWN if not turns.no_hedge_before else math.inf
        return max(min(self._patience(turns, running, helper), first), turns.no_hedge_before)

    def _patience(self, turns: _Turns, running: _Running, helper: Endpoint) -> float:
        latest = next(reversed(running))
        progress = running[latest]
        if turns.hurried and len(running) == 1:
            return progress.moved
        delay = latest.standing.latency.hedge_after()
        delay = UNKNOWN if delay is None else delay
        if progress.begun:
            delay = max(delay, STALLED)
        if helper.last:
            delay = max(delay, UNKNOWN if not progress.reached else BULKY_HEDGE if progress.excused else ORIGIN_HEDGE)
        return progress.moved + delay

    def _hedge(self, turns: _Turns, running: _Running) -> Endpoint | None:
        """Who shall have a go at a late request too. None: nobody now, see `no_hedge_before`."""
        if not turns.wanted.awaited:
            return None
        now = trio.current_time()
        latest = next(reversed(running))
        helper = choose(self.endpoints, turns.blob, turns.wanted.size, now, {**running, **turns.attempts}, proven=True)
        if helper is None:
            turns.no_hedge_before = now + UNKNOWN
            return None
        turns.no_hedge_before = self._patience(turns, running, helper)
        if turns.no_hedge_before > now:  # it has moved meanwhile, or only the origin is left: wait for its time
            return None
        bucket = self._bucket if helper.last else None
        if bucket is not None and (delay := bucket.delay(now)) > 0:
            turns.no_hedge_before = now + max(0.1, delay)
            return None
        if latest.standing.state is State.DOWN or running[latest].excused:
            self._extras.spend()  # others have found out that it hangs: no hedge but a retry
        elif not self._extras.take():
            turns.no_hedge_before = now + 0.05
            return None
        if bucket is not None:
            bucket.take(now)
        turns.helpers.add(helper)
        return helper

    def _overtaken(self, endpoint: Endpoint, elapsed: float, wanted: Range) -> None:
        if endpoint.standing.slow(elapsed, wanted.size, trio.current_time()):
            self._log_down(endpoint)

    # -- one attempt

    async def _wait(self, turns: _Turns, endpoint: Endpoint) -> None:
        """Before an attempt that was not the first: pauses between retries, and the origin's bucket."""
        attempt = turns.attempts.get(endpoint, 0)
        if attempt:
            pause = turns.pause(endpoint)
            await trio.sleep(pause)
            turns.waiting.note(pause, trio.current_time(), endpoint)
        if turns.asked and not attempt and endpoint.last:
            more = next(iter(turns.attempts)).standing.passed_over.say(trio.current_time())
            if more is not None:
                log.warning(
                    "Request to all mirror server failed, fallback to original server. blob %s, %s%s",
                    turns.wanted.blob_id,
                    "; ".join(f"{name}: {reason}" for name, reason in turns.told()),
                    more,
                )
        if not endpoint.last or self._bucket is None or not (attempt or len(self.endpoints) > 1):
            return
        while not turns.wanted.demanded:
            if self._bucket.take(trio.current_time()):
                return
            await trio.sleep(min(0.1, self._bucket.delay(trio.current_time())))
        await trio.sleep(self._bucket.reserve(trio.current_time(), endpoint.patience))

    def _begin(self, endpoint: Endpoint, turns: _Turns) -> Progress:
        self.tally.requests += 1
        if turns.asked and endpoint not in turns.helpers:
            self.tally.retries += 1
            self._extras.spend()
        turns.asked += 1
        turns.attempts[endpoint] = turns.attempts.get(endpoint, 0) + 1
        now = turns.started[endpoint] = trio.current_time()
        progress = Progress(now)
        endpoint.standing.begin(now, progress)
        return progress

    async def _attempt(
        self,
        endpoint: Endpoint,
        turns: _Turns,
        check: Check | None,
        lock: trio.Lock | None,
        progress: Progress,
    ) -> Buffer:
        """Records how it went; `lock`: over `check`, where others may be at it. Raises `Refused`."""
        standing, wanted = endpoint.standing, turns.wanted
        started = progress.moved
        tallies = standing.tally, self.sources.setdefault(endpoint.address, SourceTally())
        for tally in tallies:
            tally.requests += 1
        try:
            ask = ask_on if wanted.demanded and turns.attempts[endpoint] > 1 else ask_once
            answer = await ask(endpoint, wanted, turns.waiting, progress)
            total = trio.current_time() - started
            if check is not None and lock is None:
                await check(answer.body)
            elif check is not None and lock is not None:
                try:
                    lock.acquire_nowait()  # `acquire` goes through the loop in any case
                except trio.WouldBlock:
                    await lock.acquire()
                try:
                    await check(answer.body)
                finally:
                    lock.release()
        except WrongBytes as error:
            for tally in tallies:
                tally.failures += 1
            endpoint.forget(wanted.blob_id)
            standing.wrong(turns.blob, trio.current_time(), errors=True)
            raise Refused(str(error), blame=False, damaged=True) from None
        except Refused as reason:
            for tally in tallies:
                tally.failures += 1
            now = trio.current_time()
            if not reason.blame:
                standing.wrong(turns.blob, now, errors=False)
            elif standing.failure(now, str(reason), hung=reason.hung):
                self._log_down(endpoint)
            raise
        finally:
            standing.end(progress)
        for tally in tallies:
            tally.bytes += len(answer.body)
        now = trio.current_time()
        standing.latency.observe(answer.first, total, wanted.size, now)
        if standing.success(now):
            log.info("Mirror server %s recovered", endpoint.address)
        if check is not None and (self.sample is None or now - self.sample.taken > SAMPLE_AGE):
            size = min(wanted.size, SAMPLE_SIZE)
            self.sample = Sample(Range(wanted.blob_id, wanted.offset, size), bytes(answer.body[:size]), now)
        return answer.body

    def _log_down(self, endpoint: Endpoint) -> None:
        standing = endpoint.standing
        if len(self.endpoints) == 1:
            return
        if endpoint.last:
            log.warning("%s: %s; left alone where another source serves", endpoint.name, standing.reason)
        else:
            limit = standing.failure_limit
            log.warning("%s: %s; reach to failure limit %d, disable mirror", endpoint.name, standing.reason, limit)
        if self._watcher is not None:
            self._watcher.watch(endpoint, self)


@dataclass(slots=True)
class _Turns:
    """Whose turn it is within one read."""

    racer: Racer
    wanted: Range
    waiting: Waiting
    tried: list[tuple[str, str]] = field(default_factory=list)
    attempts: dict[Endpoint, int] = field(default_factory=dict)
    started: dict[Endpoint, float] = field(default_factory=dict)
    helpers: set[Endpoint] = field(default_factory=set)
    damaged: bool = False
    asked: int = 0
    no_hedge_before: float = 0.0
    hurried: bool = False  # late from its begin, see `ExtraBudget.hurry`
    _over: bool = False
    _refused: dict[Endpoint, Refused] = field(default_factory=dict)

    @property
    def blob(self) -> str:
        return f"{self.racer.scope} {self.wanted.blob_id}"

    def next(self) -> Endpoint | None:
        """The best of those not asked yet; then the origin, as often as configured; then, for a reader, those that were
        left out, and again those that had no time: better a long shot than an error."""
        if self._over:
            return None
        endpoints = self.racer.endpoints
        if not self.attempts and len(endpoints) == 1:
            return endpoints[0]
        best = choose(endpoints, self.blob, self.wanted.size, trio.current_time(), self.attempts)
        if best is not None:
            return best
        for endpoint in endpoints:
            if endpoint.last:
                refused = self._refused.get(endpoint)
                if refused is None or (self._again(refused) and self.attempts[endpoint] < endpoint.attempts):
                    return endpoint
        if not self.wanted.demanded:
            return None
        for endpoint in endpoints:
            if endpoint not in self.attempts:
                return endpoint
        busy = [endpoint for endpoint, refused in self._refused.items() if refused.busy and self._again(refused)]
        return min(busy, key=lambda endpoint: self.attempts[endpoint], default=None)

    def _again(self, refused: Refused) -> bool:
        return refused.retry and not (refused.busy and self.waiting.left() <= 0)

    def helper(self, running: _Running) -> Endpoint | None:
        """Whether somebody could take over a late request, mirrors first. Takes nothing."""
        now = trio.current_time()
        free = [
            endpoint
            for endpoint in self.racer.endpoints
            if endpoint not in running
            and endpoint not in self.attempts
            and endpoint.standing.state is State.UP
            and endpoint.standing.admits(self.blob, now)
        ]
        return min(free, key=lambda endpoint: endpoint.last, default=None)

    def note(self, endpoint: Endpoint, reason: Refused) -> None:
        self.tried.append((endpoint.name, str(reason)))
        self.damaged |= reason.damaged
        self._over |= reason.final
        self._refused[endpoint] = reason

    def pause(self, endpoint: Endpoint) -> float:
        """Seconds before the next attempt at the same source: doubling, or what it asks for."""
        pause: float = min(MAX_RETRY_PAUSE, RETRY_PAUSE * 2 ** (self.attempts[endpoint] - 1))
        asked = min(self._refused[endpoint].after, endpoint.patience)
        return max(asked, pause * (0.75 + random.random() / 2))

    def told(self) -> list[tuple[str, str]]:
        """What was tried; the same failure time after time once, with its count."""
        counts: list[tuple[tuple[str, str], int]] = []
        for one in self.tried:
            if counts and counts[-1][0] == one:
                counts[-1] = one, counts[-1][1] + 1
            else:
                counts.append((one, 1))
        return [(name, f"{reason} ({count} times)" if count > 1 else reason) for (name, reason), count in counts]

    def failure(self) -> ReadFailed:
        names = {name for name, _ in self.tried}
        others = [endpoint.name for endpoint in self.racer.endpoints if endpoint.name not in names]
        left_out = [(name, "left out after failures") for name in others]
        return ReadFailed([*left_out, *self.told()], self.damaged)
