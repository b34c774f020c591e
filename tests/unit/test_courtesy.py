"""What prefetch knows of its link, and takes of it beside readers, where bytes come in smaller pieces than wanted."""

from __future__ import annotations

import math
import time

import pytest
import trio
import trio.testing

from nydusfs.courtesy import SHARE, Courtesy, RequestPace


async def receive(courtesy: Courtesy, seconds: float, record: int, rate: float) -> int:
    """As a connection does, over a link of this rate that gives one record at a time; the bytes that came."""
    pace, came = RequestPace(courtesy, trio.Event()), 0
    end = trio.current_time() + seconds
    while trio.current_time() < end:
        size = max(16 << 10, pace.window // 4)
        await pace.permit(size)
        got = min(record, size)
        await trio.sleep(got / rate)
        pace.received(got)
        came += got
    return came


@pytest.mark.trio
@pytest.mark.parametrize("record", [1208, 16 << 10, 64 << 10])
async def test_the_rate_is_that_of_the_bytes_that_came(record: int, autojump_clock: trio.testing.MockClock) -> None:
    courtesy = Courtesy()
    await receive(courtesy, 1.0, record, 5e6)
    assert 0.95 * 5e6 < courtesy.rate < 1.1 * 5e6


@pytest.mark.trio
@pytest.mark.parametrize("record", [1208, 16 << 10])
async def test_a_share_of_the_link_is_taken_beside_readers_in_small_records_too(
    record: int, autojump_clock: trio.testing.MockClock
) -> None:
    courtesy = Courtesy()
    courtesy.rate = 5e6
    courtesy.reader_comes()  # and stays
    came = await receive(courtesy, 3.0, record, 5e6)
    assert 0.9 * SHARE < came / 3.0 / 5e6 < 1.1 * SHARE


@pytest.mark.trio
async def test_rest_begins_when_the_last_reader_has_its_data(autojump_clock: trio.testing.MockClock) -> None:
    aside = -math.inf
    courtesy = Courtesy(lambda: aside)
    assert courtesy.rested() == math.inf
    courtesy.reader_comes()
    await trio.sleep(5)
    assert courtesy.rested() == 0
    courtesy.reader_goes()
    await trio.sleep(0.5)
    assert courtesy.rested() == pytest.approx(0.5)
    aside = time.monotonic() - 0.2  # a thread that fetched by itself
    assert 0.2 <= courtesy.rested() <= time.monotonic() - aside


RATE, TRIP, PIECE = 5e6, 0.02, 16 << 10  # 40 Mbit/s, 20 ms


class Link:
    """One direction of a link that everybody shares: first in, first out."""

    def __init__(self) -> None:
        self._free_at = 0.0

    async def carry(self, size: int) -> None:
        self._free_at = max(self._free_at, trio.current_time()) + size / RATE
        await trio.sleep_until(self._free_at + TRIP / 2)

    async def answer(self, size: int, pace: RequestPace | None) -> None:
        """One request: its sender may have a window under way; what was received makes room half a trip later."""
        began = trio.current_time()
        await trio.sleep(TRIP / 2)
        here, room = trio.open_memory_channel[int](1000)[::-1], trio.Condition()
        under_way = 0

        async def send(nursery: trio.Nursery) -> None:
            nonlocal under_way
            for _ in range(size // PIECE):
                async with room:
                    while pace is not None and under_way + PIECE > pace.window:
                        await room.wait()
                under_way += PIECE
                nursery.start_soon(arrive)
                await trio.lowlevel.checkpoint()

        async def arrive() -> None:
            await self.carry(PIECE)
            await here[1].send(PIECE)

        async def acknowledge() -> None:
            nonlocal under_way
            await trio.sleep(TRIP / 2)
            under_way -= PIECE
            async with room:
                room.notify_all()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, nursery)
            for number in range(size // PIECE):
                if pace is not None and number:
                    await pace.permit(PIECE)
                await here[0].receive()
                if pace is not None:
                    if not number:  # its head
                        pace.begun(trio.current_time() - began)
                        await pace.permit(PIECE)
                    pace.received(PIECE)
                nursery.start_soon(acknowledge)


async def demand_reads(reads: int, burst: int, pause: float, prefetch: bool) -> tuple[float, float]:
    """p95 of reads of 128 KiB, `burst` one after the other and then a pause; prefetch's share of the link."""
    link, courtesy = Link(), Courtesy()
    taken, fetched = [], 0

    async def fetch_ahead() -> None:
        nonlocal fetched
        while True:
            while not courtesy.admit():  # noqa: ASYNC110 - as the scheduler does
                await trio.sleep(0.02)
            size = max(128 << 10, min(1 << 20, courtesy.request_size // PIECE * PIECE))
            await link.answer(size, RequestPace(courtesy, trio.Event()))
            courtesy.ended()
            fetched += size

    async with trio.open_nursery() as nursery:
        for _ in range(8 if prefetch else 0):
            nursery.start_soon(fetch_ahead)
        await trio.sleep(2)
        begin, before = trio.current_time(), fetched
        for number in range(reads):
            courtesy.reader_comes()
            began = trio.current_time()
            await link.answer(128 << 10, None)
            taken.append(trio.current_time() - began)
            courtesy.fetched(128 << 10, taken[-1])
            courtesy.reader_goes()
            if number % burst == burst - 1:
                await trio.sleep(pause)
        share = (fetched - before) / (trio.current_time() - begin) / RATE
        nursery.cancel_scope.cancel()
    return sorted(taken)[int(reads * 0.95)], share


@pytest.mark.parametrize(
    ("reads", "burst", "pause", "least"),
    [(100, 100, 0.0, 0.04), (80, 10, 0.7, 0.4), (60, 1, 0.2, 0.5), (40, 1, 0.8, 0.7)],
)
def test_the_p95_of_demand_reads_beside_full_prefetch(reads: int, burst: int, pause: float, least: float) -> None:
    def run(prefetch: bool) -> tuple[float, float]:
        clock = trio.testing.MockClock(autojump_threshold=0)
        return trio.run(demand_reads, reads, burst, pause, prefetch, clock=clock)

    without, beside = run(False), sorted(run(True) for _ in range(3))[1]  # trio takes tasks in any order
    assert beside[0] <= 1.2 * without[0], (without, beside)
    assert beside[1] >= least, "and prefetch has what they leave"
