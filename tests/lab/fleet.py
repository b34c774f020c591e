"""Sources with scripted behaviour for tests in virtual time: no sockets, so 100,000 reads cost seconds."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from nydusfs.http.connection import Progress
from nydusfs.sources.base import Buffer, WrongBytes
from nydusfs.sources.endpoint import Answer, Range, Refused
from nydusfs.sources.limits import ExtraBudget, TokenBucket
from nydusfs.sources.probe import Prober
from nydusfs.sources.race import Racer, ReadFailed
from nydusfs.sources.standing import Standing

Behaviour = Callable[[Range], Awaitable[Buffer]]
GOOD, BAD = b"x", b"bad"


async def check(body: Buffer) -> None:
    await trio.lowlevel.checkpoint()
    if body == BAD:
        raise WrongBytes("its digest is wrong")


async def refused(_: Range) -> Buffer:
    raise Refused("connection refused")


async def hangs(_: Range) -> Buffer:
    await trio.sleep_forever()
    raise AssertionError


async def lies(_: Range) -> Buffer:
    return BAD


def answers(
    seconds: float, *, spread: float = 0.1, errors: float = 0.0, flips: float = 0.0, seed: int = 1
) -> Behaviour:
    rng = random.Random(seed)

    async def behave(wanted: Range) -> Buffer:
        await trio.sleep(seconds * rng.uniform(1 - spread, 1 + spread))
        luck = rng.random()
        if luck < errors:
            raise Refused("status 503")
        return BAD if luck < errors + flips else GOOD * wanted.size

    return behave


@dataclass(eq=False)
class FakeSource:
    """Implements `Endpoint`. `behave` may be changed while it runs."""

    name: str
    behave: Behaviour
    rank: int = 0
    last: bool = False
    attempts: int = 1
    patience: float = 3.0
    by_range: bool = False
    standing: Standing = field(default_factory=Standing)
    requests: int = 0
    pings: int = 0
    running: int = 0
    moves: Callable[[Range, Progress | None], Awaitable[Buffer]] | None = None

    @property
    def address(self) -> str:
        return self.name

    async def fetch(self, wanted: Range, patience: float, progress: Progress | None = None) -> Answer:
        self.requests += 1
        self.running += 1
        started = trio.current_time()
        try:
            with trio.move_on_after(patience):
                body = await (self.moves(wanted, progress) if self.moves else self.behave(wanted))
                return Answer(body, trio.current_time() - started)
            raise Refused("no progress", hung=True)
        finally:
            self.running -= 1

    async def ping(self) -> None:
        self.pings += 1
        if self.behave is refused:
            raise Refused("connection refused")

    def forget(self, blob_id: str) -> None:
        pass


@dataclass
class Figures:
    seconds: list[float] = field(default_factory=list)
    errors: int = 0

    def quantile(self, share: float) -> float:
        return sorted(self.seconds)[int(len(self.seconds) * share)]


async def read_many(
    sources: list[FakeSource], reads: int, readers: int, *, blobs: int = 8, at: Callable[[int], None] | None = None
) -> tuple[Figures, Racer]:
    """`readers` tasks share `reads` reads of 4 KiB; `at` is called with the number of each read before it starts."""
    figures = Figures()
    async with trio.open_nursery() as background:
        bucket = TokenBucket(1000, 2000)
        racer = Racer(sources, "lab", extras=ExtraBudget(), bucket=bucket, watcher=Prober(background))
        numbers = iter(range(reads))

        async def reader() -> None:
            for number in numbers:
                if at is not None:
                    at(number)
                started = trio.current_time()
                try:
                    body = await racer.read(Range(f"blob{number % blobs}", number * 4096, 4096), check)
                    assert body == GOOD * 4096
                except ReadFailed:
                    figures.errors += 1
                figures.seconds.append(trio.current_time() - started)

        async with trio.open_nursery() as nursery:
            for _ in range(readers):
                nursery.start_soon(reader)
        background.cancel_scope.cancel()
    return figures, racer
