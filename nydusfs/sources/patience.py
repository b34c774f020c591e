"""How long a reader waits for sources that have no time: slow is better than an error, and neither is for ever.

Where a registry gets a thousandth of a processor (a node with a load of 40, and it at low priority) an answer takes
10 s and more, and every request that is given up makes the next one later. So only the first one ends after the
source's patience: it may have met what is dead, behind a balancer, say. The next one waits as long as anybody has
anything of that source, and there are more than configured until nobody had for `GENEROUS` patiences.

Time in which this process itself did not run says nothing about a source, so waiting is counted in steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import trio

from nydusfs.http.connection import Progress
from nydusfs.sources.endpoint import Answer, Endpoint, Range, Refused

GENEROUS, MOST_GENEROUS = 6, 60.0  # patiences of the origin, and seconds, without anything for anybody
LONGEST = 5  # times as long for one who waits for what a source alone of all does not give
ANOTHER = 2  # patiences of waiting until the request is sent once more, on another connection
STEP, LEAST_STEP = 1.0, 0.01


@dataclass(slots=True)
class Waiting:
    """What one reader has waited for nothing: in all, and since anybody had something. Seconds."""

    most: float
    silence: float = 0.0
    total: float = 0.0

    @property
    def longest(self) -> float:
        return LONGEST * self.most

    def left(self) -> float:
        return min(self.most - self.silence, self.longest - self.total)

    def note(self, seconds: float, now: float, endpoint: Endpoint) -> None:
        self.total += seconds
        self.silence = max(0.0, min(self.silence + seconds, now - endpoint.standing.heard()))


def longest_silence(endpoints: Sequence[Endpoint]) -> float:
    """`Waiting.most` of a reader of any of these."""
    longest = max(endpoint.patience for endpoint in endpoints)
    configured = max(endpoint.patience * endpoint.attempts for endpoint in endpoints)
    return max(configured, min(GENEROUS * longest, MOST_GENEROUS))


async def ask_once(endpoint: Endpoint, wanted: Range, waiting: Waiting, progress: Progress) -> Answer:
    """Within the source's patience, or twice the time that an origin needs of late. Raises `Refused`."""
    given = endpoint.patience
    if endpoint.last:
        given = max(given, min(2 * endpoint.standing.latency.first, waiting.left()))
    started = progress.moved
    try:
        return await endpoint.fetch(wanted, given, progress)
    except Refused:
        now = trio.current_time()
        waiting.note(min(now - started, given), now, endpoint)
        raise


async def ask_on(endpoint: Endpoint, wanted: Range, waiting: Waiting, progress: Progress) -> Answer:
    """As long as the reader waits; what comes first counts. Raises `Refused`."""
    standing = endpoint.standing
    answers: list[Answer] = []
    refusals: list[Refused] = []
    running = 0
    news = trio.Event()

    async def ask(progress: Progress) -> None:
        nonlocal running
        try:
            answers.append(await endpoint.fetch(wanted, waiting.longest, progress))
        except Refused as reason:
            refusals.append(reason)
        running -= 1
        news.set()

    async with trio.open_nursery() as nursery:

        def start(progress: Progress) -> None:
            nonlocal running
            running += 1
            nursery.start_soon(ask, progress)

        start(progress)
        second: Progress | None = None
        waited, now = 0.0, trio.current_time()
        try:
            while running and not answers and waiting.left() > 0:
                news = trio.Event()
                with trio.move_on_after(max(LEAST_STEP, min(STEP, waiting.left()))):
                    await news.wait()
                before, now = now, trio.current_time()
                step = min(now - before, STEP)
                waited += step
                waiting.note(step, now, endpoint)
                if second is None and waited >= ANOTHER * endpoint.patience and not progress.gives:
                    second = Progress(now)
                    standing.begin(now, second)
                    start(second)
        finally:
            if second is not None:
                standing.end(second)
        nursery.cancel_scope.cancel()
    if answers:
        return answers[0]
    raise refusals[-1] if refusals else Refused(f"nothing within {waited:.3g} s", hung=True)
