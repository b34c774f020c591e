"""What prefetch knows of its link, and takes of it beside readers, where bytes come in smaller pieces than wanted."""

from __future__ import annotations

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
    for rate in (5e6, 50e6):
        courtesy = Courtesy()
        await receive(courtesy, 3.0, record, rate)
        assert 0.95 * rate < courtesy.rate < 1.1 * rate


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
