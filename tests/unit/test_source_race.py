"""Reads over several sources, in virtual time: who is asked, who wins, what it costs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
import trio
import trio.testing

from nydusfs.http import Response
from nydusfs.http.connection import Progress
from nydusfs.sources.base import Buffer, Priority
from nydusfs.sources.endpoint import Range, Refused, judge
from nydusfs.sources.limits import ExtraBudget, TokenBucket
from nydusfs.sources.probe import Prober
from nydusfs.sources.race import BULKY_HEDGE, ORIGIN_HEDGE, STALLED, UNKNOWN, Racer, ReadFailed
from nydusfs.sources.standing import PROVEN, State
from tests.lab.fleet import GOOD, FakeSource, answers, check, hangs, lies, read_many, refused

WANTED = Range("b", 0, 8)


def virtual(main: Callable[[], Awaitable[Any]]) -> Any:
    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def racer(*sources: FakeSource, bucket: TokenBucket | None = None) -> Racer:
    return Racer(sources, "lab", extras=ExtraBudget(), bucket=bucket)


def timed(race: Racer, wanted: Range = WANTED) -> tuple[float, Buffer]:
    async def main() -> tuple[float, Buffer]:
        started = trio.current_time()
        body = await race.read(wanted, check)
        return trio.current_time() - started, body

    return virtual(main)


def known(source: FakeSource, seconds: float) -> FakeSource:
    for _ in range(PROVEN + 4):
        source.standing.latency.observe(seconds, seconds, 8, 0.0)
        source.standing.success(0.0)
    return source


def test_a_late_request_is_doubled_and_the_loser_is_cancelled() -> None:
    slow = known(FakeSource("slow", hangs), 0.1)
    fast = known(FakeSource("fast", answers(0.05, spread=0), rank=1), 0.2)
    seconds, body = timed(racer(slow, fast))
    assert body == GOOD * 8
    assert seconds == pytest.approx(0.13 + 0.05, abs=0.02)  # 1.3 of its median, then the other one's time
    assert slow.running == fast.running == 0
    assert slow.standing.in_flight == fast.standing.in_flight == 0
    assert slow.standing.latency.estimate(8, 0.2) > 0.2  # it would have taken longer than it was given


def test_the_first_one_may_still_win() -> None:
    first = known(FakeSource("first", answers(0.2, spread=0)), 0.1)
    second = known(FakeSource("second", answers(0.2, spread=0), rank=1), 0.2)
    seconds, _ = timed(racer(first, second))
    assert seconds == pytest.approx(0.2)
    assert second.requests == 1 and second.running == 0
    assert second.standing.state is State.UP and second.standing.error_rate == 0  # being cancelled is no failure


def test_the_origin_is_given_more_time_before_it_is_asked_too() -> None:
    mirror = known(FakeSource("mirror", hangs), 0.1)
    origin = FakeSource("origin", answers(0.1, spread=0), rank=1, last=True)
    seconds, _ = timed(racer(mirror, origin))
    assert seconds == pytest.approx(ORIGIN_HEDGE + 0.1)


@pytest.mark.parametrize("history", [True, False])
@pytest.mark.parametrize("connects", [0.1, 0.7, 1e9])
def test_a_mirror_that_cannot_be_reached_is_not_given_that_time(connects: float, history: bool) -> None:
    """Packets to it are lost: that is not the answer of a mirror that has to fetch the bytes first."""

    async def moves(_: Range, progress: Progress | None) -> Buffer:
        assert progress is not None
        progress.reached = False
        await trio.sleep(connects)
        progress.reached = True
        await trio.sleep_forever()
        raise AssertionError

    mirror = FakeSource("mirror", hangs, moves=moves)
    if history:
        known(mirror, 0.1)
    origin = FakeSource("origin", answers(0.1, spread=0), rank=1, last=True)
    seconds, _ = timed(racer(mirror, origin))
    assert seconds == pytest.approx((ORIGIN_HEDGE if connects < UNKNOWN else UNKNOWN) + 0.1)


def test_a_mirror_without_any_blob_is_told_about_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    """And each change of a source's state at once."""

    async def lacks(wanted: Range) -> Buffer:
        raise Refused("status 404", blame=False)

    mirror = FakeSource("mirror", lacks)
    origin = FakeSource("origin", answers(0.05, spread=0), rank=1, last=True)
    race = racer(mirror, origin)

    async def main() -> None:
        for number in range(500):
            assert await race.read(Range(f"b{number}", 0, 8), check) == GOOD * 8

    virtual(main)
    assert mirror.requests == 500
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3, "25 seconds of reads"
    assert all(line.startswith("Request to all mirror server failed, fallback to original server.") for line in lines)
    left_out = [int(line.split("; ")[1].split()[0]) for line in lines[1:]]
    assert all(190 < count < 210 for count in left_out), lines
    caplog.clear()
    mirror.behave = refused
    virtual(main)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert sum("disable mirror" in line for line in said) == 1 and len(said) <= 4, said


def test_a_source_nobody_knows_gets_half_a_second() -> None:
    seconds, _ = timed(racer(FakeSource("a", hangs), FakeSource("b", answers(0.1, spread=0), rank=1)))
    assert seconds == pytest.approx(UNKNOWN + 0.1)


def test_readers_who_waited_for_a_dead_worker_are_given_two_sources_at_once() -> None:
    """As many as are said, for a while, within the budget; and who loses such a race is no worse a source for it."""

    async def lies_later(wanted: Range) -> Buffer:
        await trio.sleep(0.1)
        return await lies(wanted)

    mirror = FakeSource("mirror", lies_later)
    origin = FakeSource("origin", answers(0.1, spread=0), rank=1, last=True)
    race = racer(mirror, origin)
    race._extras.hurry(2, 3.0)

    async def main() -> None:
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for offset in range(4):
                nursery.start_soon(race.read, Range(f"b{offset}", 0, 8), check)
        assert race.tally.hedges == 2 and trio.current_time() - began == pytest.approx(0.2, abs=0.02)
        assert await race.read(Range("c", 0, 8), check) == GOOD * 8
        assert race.tally.hedges == 2

    virtual(main)
    slow, quick = (
        FakeSource("slow", answers(0.3, spread=0)),
        FakeSource("origin", answers(0.1, spread=0), rank=1, last=True),
    )
    race = racer(slow, quick)
    race._extras.hurry(1, 1e12)
    assert timed(race)[0] == pytest.approx(0.1)
    assert slow.standing.state is State.UP and slow.standing.error_rate == 0
    race._extras.hurry(1, -1e12)
    assert timed(race)[0] == pytest.approx(0.3)


def test_a_body_that_moves_is_not_late() -> None:
    """Over a slow link a second request would only take the first one's bytes away. One that stops is late."""

    def trickle(stop: int) -> Callable[[Range, Progress | None], Awaitable[Buffer]]:
        async def moves(wanted: Range, progress: Progress | None) -> Buffer:
            assert progress is not None
            for piece in range(20):
                await trio.sleep(0.2)
                if piece == stop:
                    await trio.sleep_forever()
                progress.begun, progress.moved = True, trio.current_time()
            return GOOD * wanted.size

        return moves

    for stop, expected in ((99, 4.0), (10, 10 * 0.2 + STALLED + 0.1)):
        slow = known(FakeSource("slow", hangs, patience=9.0, moves=trickle(stop)), 0.2)
        other = known(FakeSource("other", answers(0.1, spread=0), rank=1), 0.5)
        seconds, _ = timed(racer(slow, other))
        assert seconds == pytest.approx(expected) and other.requests == (stop == 10)


def test_prefetch_is_never_doubled() -> None:
    mirror, origin = FakeSource("a", hangs, patience=2.0), FakeSource("o", answers(0.1), rank=1, last=True)
    race = racer(mirror, origin)
    seconds, _ = timed(race, Range("b", 0, 8, Priority.PREFETCH))
    assert seconds == pytest.approx(2.1, abs=0.02)
    assert race.tally.hedges == 0


def test_a_reader_who_meets_a_prefetch_that_hangs_is_helped() -> None:
    mirror = known(FakeSource("mirror", hangs), 0.1)
    origin = FakeSource("origin", answers(0.1, spread=0), rank=1, last=True)

    async def main() -> None:
        urgent = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(racer(mirror, origin).read, Range("b", 0, 8, Priority.PREFETCH, urgent), check)
            await trio.sleep(2)
            assert not origin.requests
            urgent.set()
        assert trio.current_time() - began == pytest.approx(2.1)

    began = 0.0

    async def timed_main() -> None:
        nonlocal began
        began = trio.current_time()
        await main()

    virtual(timed_main)


def test_a_source_asked_for_more_than_is_wanted_may_take_its_time() -> None:
    """Who is late with 4 MiB is overtaken, again and again, and stays in use."""

    async def bulky(_: Range, progress: Progress | None) -> Buffer:
        assert progress is not None
        progress.excused = True
        await trio.sleep_forever()
        raise AssertionError

    mirror = known(FakeSource("mirror", hangs, patience=10, moves=bulky), 0.1)
    origin = FakeSource("origin", answers(0.1, spread=0), rank=1, last=True)
    race = racer(mirror, origin)

    async def main() -> None:
        for _ in range(40):  # more than the budget of doubled requests
            before = trio.current_time()
            await race.read(WANTED, check)
            assert trio.current_time() - before == pytest.approx(BULKY_HEDGE + 0.1)

    virtual(main)
    assert mirror.standing.state is State.UP and mirror.requests == 40


def test_a_source_that_lies_is_left_alone_for_that_blob_only() -> None:
    liar, origin = FakeSource("liar", lies), FakeSource("origin", answers(0.01), rank=1, last=True)
    race = racer(liar, origin)

    async def main() -> None:
        for _ in range(3):
            assert await race.read(WANTED, check) == GOOD * 8
        assert (liar.requests, origin.requests) == (1, 3)
        liar.behave = answers(0.01)
        assert await race.read(Range("other", 0, 8), check) == GOOD * 8
        assert (liar.requests, origin.requests) == (2, 3)

    virtual(main)


def test_all_that_was_tried_is_told() -> None:
    sources = [FakeSource("m1", lies), FakeSource("m2", refused, rank=1), FakeSource("o", refused, 2, True, attempts=2)]
    with pytest.raises(ReadFailed) as caught:
        timed(racer(*sources))
    assert caught.value.damaged
    assert caught.value.tried == [
        ("m1", "its digest is wrong"),
        ("m2", "connection refused"),
        ("o", "connection refused (2 times)"),
    ]


def slow_to(seconds: float) -> Callable[[Range], Awaitable[Buffer]]:
    return answers(seconds, spread=0)


@pytest.mark.parametrize("attempts", [1, 3])
@pytest.mark.parametrize(("patience", "needs", "most"), [(10.0, 25.0, 60.0), (5.0, 12.0, 30.0), (1.0, 2.2, 6.0)])
def test_a_registry_that_takes_its_time_costs_time_and_one_that_hangs_an_error(
    patience: float, needs: float, most: float, attempts: int
) -> None:
    """However few attempts are configured: the second one waits, and a third is made beside it."""
    origin = FakeSource("origin", slow_to(needs), last=True, patience=patience, attempts=attempts)
    seconds, body = timed(racer(origin))
    assert body == GOOD * 8 and origin.requests == 3
    assert seconds == pytest.approx(patience + needs, abs=0.5)
    assert origin.standing.in_flight == origin.running == 0
    assert timed(racer(origin))[0] == pytest.approx(needs)  # it was given the time that it took before
    origin = FakeSource("origin", hangs, last=True, patience=patience, attempts=attempts)
    ended: list[float] = []

    async def main() -> None:
        with pytest.raises(ReadFailed) as caught:
            await racer(origin).read(WANTED, check)
        assert [reason.partition(" within")[0] for _, reason in caught.value.tried] == ["no progress", "nothing"]
        ended.append(trio.current_time())

    virtual(main)
    assert ended[0] == pytest.approx(most, abs=1.5)


def test_a_registry_that_answers_others_is_not_given_up() -> None:
    """It serves one request after the other; only who waits for what it never gives gets an error, at last."""
    turn = trio.Lock()

    async def one_by_one(wanted: Range) -> Buffer:
        if wanted.blob_id == "never":
            await trio.sleep_forever()
        async with turn:
            await trio.sleep(9.0)
        return GOOD * wanted.size

    origin = FakeSource("origin", one_by_one, last=True, patience=10.0)
    ended: list[float] = []

    async def one(number: int) -> None:
        await racer(origin).read(Range(f"b{number}", 0, 8), check)

    async def never() -> None:
        with pytest.raises(ReadFailed):
            await racer(origin).read(Range("never", 0, 8), check)
        ended.append(trio.current_time())

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(never)
            for number in range(16):
                nursery.start_soon(one, number)
            await trio.sleep(600)
            assert origin.running == 0
        assert 100 < ended[0] < 400

    virtual(main)


def test_a_registry_that_says_it_is_busy_is_asked_until_it_is_not() -> None:
    async def busy(wanted: Range) -> Buffer:
        if trio.current_time() < 20:
            raise Refused("status 503", busy=True)
        return GOOD * wanted.size

    origin = FakeSource("origin", busy, last=True, patience=10.0)
    seconds, body = timed(racer(origin))
    assert body == GOOD * 8 and seconds < 26 and origin.requests < 12
    for priority in (Priority.PREFETCH, Priority.LEARNED):  # nobody waits for it
        with pytest.raises(ReadFailed):
            timed(racer(origin), Range("b", 0, 8, priority))


def test_a_mirror_that_takes_its_time_is_better_than_no_registry() -> None:
    mirror = FakeSource("mirror", slow_to(7.0), patience=3.0)
    origin = FakeSource("origin", refused, rank=1, last=True, patience=10.0, attempts=3)
    seconds, body = timed(racer(mirror, origin))
    assert body == GOOD * 8 and mirror.requests == 3 and origin.requests == 3
    assert seconds < 20


def test_a_reader_whose_nydusd_stood_still_has_lost_no_time() -> None:
    """A minute passes in which this process is not run, once in each of two attempts: that is no minute's hang."""
    clock = trio.testing.MockClock(autojump_threshold=0)

    async def behave(wanted: Range) -> Buffer:
        if origin.requests < 3:
            clock.jump(60)
            await trio.sleep_forever()
        return GOOD * wanted.size

    origin = FakeSource("origin", behave, last=True, patience=10.0)

    async def main() -> None:
        assert await racer(origin).read(WANTED, check) == GOOD * 8

    trio.run(main, clock=clock)


def test_better_a_source_that_is_down_than_an_error() -> None:
    mirror, origin = FakeSource("mirror", answers(0.01)), FakeSource("origin", refused, rank=1, last=True)
    mirror.standing.failure_limit = 1
    mirror.standing.failure(0.0, "503")
    assert mirror.standing.state is State.DOWN
    body = timed(racer(mirror, origin))[1]
    assert body == GOOD * 8 and origin.requests == 1


def test_the_origin_is_left_alone_as_long_as_it_asks_for() -> None:
    async def busy(_: Range) -> Buffer:
        raise Refused("status 429", after=4.0)

    origin = FakeSource("origin", busy, last=True, attempts=2, patience=30.0)
    started: list[float] = []

    async def main() -> None:
        with pytest.raises(ReadFailed):
            await racer(origin).read(WANTED, check)
        started.append(trio.current_time())

    virtual(main)
    assert origin.requests == 2 and started[0] >= 4.0


@pytest.mark.parametrize(
    ("said", "least", "most"),
    [
        ("7", 7, 7),
        (lambda: format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True), 15, 20),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("Wed, 21 Oct 9999 07:28:00 GMT", 60, 60),
        ("Wed, 99 Oct 2015 07:28:00 GMT", 0, 0),
        ("nan", 0, 0),
        ("soon", 0, 0),
        ("", 0, 0),
    ],
)
def test_how_long_a_server_asks_to_be_left_alone(said: str | Callable[[], str], least: float, most: float) -> None:
    text = said if isinstance(said, str) else said()
    with pytest.raises(Refused) as caught:
        judge(Response(429, {"retry-after": text}, b""))
    assert least <= caught.value.after <= most


def test_the_bucket_protects_the_origin_and_starves_nobody() -> None:
    """Every mirror is dead and 100 readers come at once: what the bucket cannot give in time goes all the same."""
    mirror = FakeSource("mirror", refused)
    mirror.standing.failure_limit = 1
    origin = FakeSource("origin", answers(0.01), rank=1, last=True, patience=5.0)
    waits: list[float] = []
    race = racer(mirror, origin, bucket=TokenBucket(10, 10))

    async def one() -> None:
        started = trio.current_time()
        await race.read(WANTED, check)
        waits.append(trio.current_time() - started)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(one)

    virtual(main)
    assert max(waits) < 5.1
    assert sum(wait < 1.0 for wait in waits) <= 22  # burst and one second's worth
    alone = racer(FakeSource("only", answers(0.01), last=True), bucket=TokenBucket(1, 1))
    assert sum(timed(alone)[0] for _ in range(20)) < 1  # without mirrors nothing has failed: no limit


def test_checks_of_one_read_never_run_at_the_same_time() -> None:
    busy = 0

    async def slow_check(body: Buffer) -> None:
        nonlocal busy
        busy += 1
        assert busy == 1
        await trio.sleep(0.3)
        busy -= 1

    first = known(FakeSource("first", answers(0.1, spread=0)), 0.01)
    race = racer(first, known(FakeSource("second", answers(0.09, spread=0), rank=1), 0.5))

    async def main() -> None:
        await race.read(WANTED, slow_check)

    virtual(main)
    assert race.tally.hedges == 1


def test_a_reader_that_goes_away_takes_its_requests_along() -> None:
    sources = [FakeSource("a", hangs), FakeSource("b", hangs, rank=1)]

    async def main() -> None:
        with trio.move_on_after(1.0):
            await racer(*sources).read(WANTED, check)
        assert [source.requests for source in sources] == [1, 1]
        assert all(source.running == source.standing.in_flight == 0 for source in sources)

    virtual(main)


@pytest.mark.parametrize("other", ["origin", "mirror"])
def test_probes_find_out_and_readers_do_not_pay(other: str) -> None:
    """A source that answers its ping and then hangs stays down; once it serves, it carries traffic within 5 s."""
    mirror, origin = FakeSource("mirror", hangs), FakeSource(other, answers(0.05), rank=1, last=other == "origin")

    async def main() -> None:
        async with trio.open_nursery() as background:
            race = Racer([mirror, origin], "lab", extras=ExtraBudget(), watcher=Prober(background))
            slow = 0
            for _ in range(600):  # 30 s
                started = trio.current_time()
                await race.read(WANTED, check)
                slow += trio.current_time() - started > 0.1
                assert trio.current_time() - started < 1.1
            assert mirror.standing.state is State.DOWN
            assert slow <= 3 and mirror.pings >= 8
            mirror.behave = answers(0.01)
            back, before = trio.current_time(), mirror.requests
            while mirror.requests - before < 20:
                await race.read(WANTED, check)
            assert trio.current_time() - back < 5
            assert mirror.standing.state is State.UP
            mirror.behave = refused
            for _ in range(200):
                await race.read(WANTED, check)
            probed = mirror.pings
            await trio.sleep(3600)
            assert mirror.pings - probed < 120  # nobody reads, nobody needs it
            background.cancel_scope.cancel()

    virtual(main)


def test_a_probe_that_gets_wrong_bytes_is_not_believed() -> None:
    mirror, origin = FakeSource("mirror", refused), FakeSource("origin", answers(0.05), rank=1, last=True)
    mirror.standing.failure_limit = 1

    async def main() -> None:
        async with trio.open_nursery() as background:
            race = Racer([mirror, origin], "lab", extras=ExtraBudget(), watcher=Prober(background))
            for _ in range(10):
                await race.read(WANTED, check)
            mirror.behave = lies
            before = mirror.requests
            for _ in range(400):  # 20 s
                await race.read(WANTED, check)
            assert mirror.standing.state is State.DOWN
            assert mirror.requests - before < 10
            background.cancel_scope.cancel()

    virtual(main)


def test_what_nobody_verified_is_not_held_against_a_source() -> None:
    """A whole tar is verified at its end: a part that a liar gave must not keep honest sources down."""
    liar, honest = FakeSource("liar", lies), FakeSource("honest", answers(0.05), rank=1)

    async def main() -> None:
        race = Racer([liar, honest], "lab", extras=ExtraBudget())
        assert await race.read(WANTED, None) != 8 * GOOD
        assert race.sample is None
        assert await race.read(WANTED, check) == 8 * GOOD
        assert race.sample is not None and race.sample.data == 8 * GOOD

    virtual(main)


@pytest.mark.parametrize("origin", ["healthy", "dead"])
def test_one_good_source_among_four(origin: str) -> None:
    """Dead, hanging, lying and failing sources beside a healthy one at 200 ms, which is the origin or a mirror."""
    healthy = FakeSource("healthy", answers(0.2), rank=3, last=origin == "healthy", patience=10.0)
    alone, _ = virtual(lambda: read_many([healthy], 500, 16))
    bad = [
        FakeSource("dead", refused),
        FakeSource("hangs", hangs, rank=1),
        FakeSource("sick", answers(0.1, errors=0.10, flips=0.01, seed=2), rank=2),
    ]
    sources = [*bad, healthy]
    if origin == "dead":
        sources.append(FakeSource("origin", refused, rank=4, last=True))
    healthy.requests = 0
    figures, race = virtual(lambda: read_many(sources, 10_000, 16))
    assert figures.errors == 0
    assert figures.quantile(0.99) <= 1.5 * alone.quantile(0.99)
    assert sum(source.requests for source in sources) <= 1.03 * 10_000
    assert race.tally.requests <= 1.03 * 10_000
