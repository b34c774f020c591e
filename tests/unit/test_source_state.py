"""The state machines that choose sources: no clock, no network."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from nydusfs.sources.choice import choose
from nydusfs.sources.latency import MIN_HEDGE, Latency
from nydusfs.sources.limits import ExtraBudget, TokenBucket
from nydusfs.sources.redirects import expiry
from nydusfs.sources.standing import BLOB_PAUSE, MAX_BLOBS, MAX_PAUSE, TRIALS, WASTE, Standing, State


@dataclass(eq=False)
class Option:
    rank: int = 0
    last: bool = False
    standing: Standing = field(default_factory=Standing)


# -- the breaker


def test_failures_in_a_row_take_a_source_down_and_a_probe_brings_it_back() -> None:
    standing = Standing(failure_limit=3)
    assert [standing.failure(float(now), "503") for now in (1, 2)] == [False, False]
    assert not standing.success(3)
    assert [standing.failure(float(now), "503") for now in (4, 5, 6)] == [False, False, True]
    assert standing.state is State.DOWN and not standing.admits("b", 1000)
    standing.probed(standing.probe_at, True)
    assert standing.state is State.TRYING and standing.admits("b", 10)
    standing.begin(10)
    assert not standing.admits("b", 10)  # one at a time until it has shown something
    standing.end()
    assert [standing.success(11.0) for _ in range(TRIALS)] == [False] * (TRIALS - 1) + [True]
    assert standing.state is State.UP and standing.error_rate == 0


def test_failed_probes_wait_longer_but_never_long() -> None:
    standing = Standing(failure_limit=1)
    standing.failure(100, "refused")
    pauses = []
    for _ in range(6):
        now = standing.probe_at
        standing.probed(now, False, "refused")
        pauses.append(standing.probe_at - now)
    assert pauses == sorted(pauses) and pauses[-1] == MAX_PAUSE
    asked_for = Standing(failure_limit=1, interval=60.0)
    asked_for.failure(0, "refused")
    assert asked_for.probe_at == 60  # health_check_interval is obeyed


def test_a_failure_on_trial_is_enough() -> None:
    standing = Standing(failure_limit=1)
    standing.failure(0, "503")
    standing.probed(1, True)
    standing.failure(2, "503")
    assert standing.state is State.DOWN


def test_old_failures_fade_and_hangs_weigh_more() -> None:
    standing = Standing(failure_limit=5)
    assert not any(standing.failure(day * 86400.0, "503") for day in range(50))
    assert [Standing().failure(0, "t", hung=True), standing.state] == [False, State.UP]
    hanging = Standing(failure_limit=5)
    assert [hanging.failure(float(now), "t", hung=True) for now in (0, 3)] == [False, True]


def test_a_source_that_is_overtaken_is_down_soon_if_it_shows_nothing_else() -> None:
    assert Standing().slow(0.5, 4096, 1.0)  # it never answered anything
    known = Standing()
    known.latency.observe(0.01, 0.01, 4096, 0.0)
    for now in (1.0, 1.1, 1.2):
        assert not known.slow(0.5, 4096, now)
        assert known.latency.estimate(4096, now) > 0.5 > known.latency.estimate(4096, now + 3)
        known.success(now)
    assert [known.slow(0.5, 4096, now) for now in (2.0, 2.1)] == [False, True]


def test_a_missing_blob_is_the_blobs_matter() -> None:
    standing = Standing()
    standing.wrong("a", 0.0, errors=False)
    assert not standing.admits("a", 1.0) and standing.admits("b", 1.0) and standing.state is State.UP
    assert standing.admits("a", BLOB_PAUSE + 1)
    for number in range(2 * MAX_BLOBS):
        standing.wrong(str(number), 0.0, errors=False)
    assert standing.admits("0", 1.0) and not standing.admits(str(2 * MAX_BLOBS - 1), 1.0)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.05, 0.9), st.integers(0, 1000))
def test_what_an_unreliable_source_may_waste_is_bounded(errors: float, seed: int) -> None:
    """However it fails: of 5000 choices in which it is the fastest, about WASTE of all end in a failure."""
    rng = random.Random(seed)
    bad, good = Option(0), Option(1)
    bad.standing.failure_limit = 10**6  # the breaker stays out of it
    good.standing.latency.observe(0.2, 0.2, 4096, 0.0)
    failures = 0
    for number in range(5000):
        now = number / 100
        for option in (bad, good):
            option.standing.latency.observe(0.001 if option is bad else 0.2, 0.2, 0, now)
        chosen = choose([bad, good], "b", 4096, now, ())
        assert chosen is not None
        if chosen is bad and rng.random() < errors:
            failures += 1
            bad.standing.failure(now, "503")
        else:
            chosen.standing.success(now)
    assert failures <= 5000 * WASTE * 2 + 25


# -- choosing


def test_the_configured_order_counts_until_speed_tells_otherwise() -> None:
    first, second, origin = Option(0), Option(1), Option(2, last=True)
    every = [first, second, origin]
    assert choose(every, "b", 4096, 0.0, ()) is first
    for _ in range(20):
        first.standing.latency.observe(0.3, 0.3, 4096, 1.0)
        second.standing.latency.observe(0.02, 0.02, 4096, 1.0)
        origin.standing.latency.observe(0.01, 0.01, 4096, 1.0)
    assert choose(every, "b", 4096, 1.0, ()) is second
    assert choose(every, "b", 4096, 1.0, (second,)) is first  # the origin is spared though it is faster
    assert choose(every, "b", 4096, 1.0, (second, first)) is origin
    for _ in range(20):
        first.standing.latency.observe(4.0, 4.0, 4096, 1.0)
    assert choose(every, "b", 4096, 1.0, (second,)) is origin  # there are limits
    assert choose(every, "b", 4096, 1000.0, (second,)) is first  # and old grudges fade


def test_requests_in_flight_spread_over_equal_mirrors() -> None:
    options = [Option(0), Option(1)]
    for option in options:
        for _ in range(20):
            option.standing.latency.observe(0.1, 0.1, 4096, 0.0)
            option.standing.success(0.0)
    taken = [0, 0]
    for _ in range(60):
        chosen = choose(options, "b", 4096, 0.0, ())
        assert chosen is not None
        chosen.standing.begin(0.0)
        taken[chosen.rank] += 1
    assert min(taken) >= 20


def test_a_source_nobody_knows_gets_few_requests_at_once() -> None:
    unknown, known, origin = Option(0), Option(1), Option(2, last=True)
    for _ in range(20):
        known.standing.latency.observe(0.05, 0.05, 4096, 0.0)
        known.standing.success(0.0)
    taken: dict[Option, int] = {}
    for _ in range(30):
        chosen = choose([unknown, known, origin], "b", 4096, 0.0, ())
        assert chosen is not None
        chosen.standing.begin(0.0)
        taken[chosen] = taken.get(chosen, 0) + 1
    assert taken[unknown] <= 4 and origin not in taken


# -- latency


@given(st.floats(0.001, 2.0), st.floats(1e5, 1e9), st.lists(st.integers(1, 4 << 20), min_size=30, max_size=200))
def test_a_steady_source_is_late_only_above_its_steady_time(first: float, rate: float, sizes: list[int]) -> None:
    latency = Latency()
    for size in sizes:
        latency.observe(first, first + size / rate, size, 0.0)
    delay = latency.hedge_after()
    assert delay is not None and max(MIN_HEDGE, 1.2 * first) <= delay <= max(MIN_HEDGE, 1.5 * first)


def test_the_tail_decides_when_a_request_is_late() -> None:
    latency = Latency()
    for number in range(200):
        latency.observe(0.5 if number % 10 == 0 else 0.1, 0.5 if number % 10 == 0 else 0.1, 100, 0.0)
    delay = latency.hedge_after()
    assert delay is not None and 0.4 < delay < 0.8
    assert Latency().hedge_after() is None


def test_answers_that_busy_processors_made_late_do_not_hide_those_that_come_at_once() -> None:
    latency = Latency()
    assert latency.soonest == float("inf")
    for number in range(32):
        latency.observe(0.001 if number % 3 == 0 else 0.05, 0.06, 100, 0.0)
    assert latency.soonest == 0.001 < 0.02 < latency.first
    for number in range(32):
        latency.observe(0.001 if number % 8 == 0 else 0.05, 0.06, 100, 0.0)  # what a cold peer has by chance
    assert latency.soonest == 0.05


# -- limits


@given(st.floats(0.5, 200), st.integers(1, 50), st.lists(st.floats(0, 2), max_size=300))
def test_a_bucket_never_gives_more_than_it_holds(rate: float, burst: int, gaps: list[float]) -> None:
    bucket = TokenBucket(rate, burst)
    now, granted = 0.0, []
    for gap in gaps:
        now += gap
        if bucket.take(now):
            granted.append(now)
    for start in range(len(granted)):
        for end in range(start, len(granted)):
            span = granted[end] - granted[start]
            assert end - start + 1 <= burst + rate * span + 1 + 1e-6


@given(st.floats(0.5, 200), st.integers(1, 50), st.lists(st.floats(0, 0.1), max_size=300), st.floats(0, 5))
def test_no_reader_waits_longer_than_it_may(rate: float, burst: int, gaps: list[float], longest: float) -> None:
    bucket = TokenBucket(rate, burst)
    now = 0.0
    for gap in gaps:
        now += gap
        assert 0 <= bucket.reserve(now, longest) <= longest
    # and the debt of those that went all the same is over in bounded time
    assert bucket.delay(now + longest + burst / rate + 1 / rate + 1e-6) == 0


def test_rate_zero_is_no_limit() -> None:
    bucket = TokenBucket(0, 0)
    assert all(bucket.take(0.0) for _ in range(1000)) and bucket.reserve(0.0, 9.0) == 0


@given(st.lists(st.sampled_from(["earn", "take", "spend"]), max_size=500))
def test_hedges_stay_within_their_budget(events: list[str]) -> None:
    budget = ExtraBudget()
    reads = hedges = retries = 0
    for event in events:
        if event == "earn":
            budget.earn()
            reads += 1
        elif event == "take":
            hedges += budget.take()
        else:
            budget.spend()
            retries += 1
    assert hedges <= budget.ratio * reads + budget.burst


# -- signed redirect targets

WALL = 1_700_000_000.0  # 2023-11-14T22:13:20Z


def test_signed_targets_say_how_long_they_live() -> None:
    day = "2023-11-14T22:13:00Z".replace("-", "").replace(":", "")
    assert expiry(f"/b?X-Amz-Date={day}&X-Amz-Expires=1200&X-Amz-Signature=a", WALL) == 1180
    assert expiry(f"/b?X-Goog-Date={day}&X-Goog-Expires=60", WALL) == 40
    assert expiry("/b?Expires=1700000100&OSSAccessKeyId=k&Signature=s", WALL) == 100
    assert expiry("/b?sv=2020&se=2023-11-14T22%3A14%3A20Z&sig=x", WALL) == 60
    for silent in ("/b", "/b?sig=1", "/b?X-Amz-Date=99999999T999999Z&X-Amz-Expires=5", "/b?expires=soon"):
        assert expiry(silent, WALL) == float("inf")


def test_a_mirror_that_answers_is_not_passed_over_for_the_origin_because_it_is_asked_a_lot() -> None:
    mirror, origin = Option(), Option(last=True)
    mirror.standing.latency.observe(0.25, 0.25, 4096, 0.0)  # the first answers of a cold peer-to-peer mirror
    for _ in range(12):
        mirror.standing.begin(0.0)
    assert mirror.standing.crowded()
    assert choose([mirror, origin], "b", 4096, 0.0, ()) is mirror
    silent = Option()  # one that has shown nothing is not trusted with that many
    for _ in range(12):
        silent.standing.begin(0.0)
    assert choose([silent, origin], "b", 4096, 0.0, ()) is origin
