"""The replay of a profile before a reader, over a modelled link and in virtual time: nothing real is waited for."""

from __future__ import annotations

import os
import random
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from nydusfs.command import command_of
from nydusfs.courtesy import UNKNOWN_WINDOW, Courtesy, ReplayPace
from nydusfs.learning import FIRST_REQUESTS, MERGE, REQUESTS, Learner
from nydusfs.profile import Course, Profile, Recorder
from nydusfs.segments import Segment

BLOB: Any = SimpleNamespace(id="b", index=0)
RTT, RATE = 0.02, 5e6  # 40 Mbit/s
COMPUTES = 0.001  # seconds of the program per segment


class Node:
    """An image of segments without gaps, its scheduler and the link to its registry."""

    def __init__(self, sizes: list[int], rate: float = RATE, *, known: bool = True) -> None:
        self.name, self.source, self.recorder = "image", None, None
        self.bootstrap: Any = SimpleNamespace(blobs=[BLOB], version=6, size=0, inode_count=0)
        self.courtesy = SimpleNamespace(rate=rate, known=known)
        self.segments: list[Segment] = []
        place = 0
        for number, size in enumerate(sizes):
            self.segments.append(Segment(BLOB, number, b"%d" % number, range(1), size, place, place + size, False))
            place += size
        self.here: dict[int, trio.Event] = {}
        self.demanded: list[int] = []
        self.in_flight = self.most_in_flight = 0
        self.largest = self.requests = 0
        self.first: list[int] = []  # segments of the first request
        self._free_at = 0.0

    def segment(self, index: int, number: int) -> Segment:
        return self.segments[number]

    def job(self, segment: Segment) -> Any:
        return SimpleNamespace(segment=segment)

    def is_ready(self, segment: Segment) -> bool:
        return segment.number in self.here and self.here[segment.number].is_set()

    async def fetch(self, jobs: list[Any], *_: Any, **__: Any) -> None:
        for job in jobs:
            self.here.setdefault(job.segment.number, trio.Event())
        size = sum(job.segment.size for job in jobs)
        self.first = self.first or [job.segment.number for job in jobs]
        self.requests += 1
        self.in_flight += 1
        self.most_in_flight, self.largest = max(self.most_in_flight, self.in_flight), max(self.largest, size)
        await trio.sleep(RTT / 2)
        self._free_at = max(self._free_at, trio.current_time()) + size / self.courtesy.rate
        await trio.sleep_until(self._free_at + RTT / 2)
        self.in_flight -= 1
        for job in jobs:
            self.here[job.segment.number].set()

    async def program(self, numbers: list[int]) -> float:
        """Reads segments one after the other; the time it took."""
        began = trio.current_time()
        for number in numbers:
            if number not in self.here:
                self.demanded.append(number)
                await self.fetch([self.job(self.segments[number])])
            await self.here[number].wait()
            await trio.sleep(COMPUTES)
        return trio.current_time() - began


def packages(rng: random.Random, count: int) -> list[int]:
    """What a program reads: packages in any order, some of the segments of each, more or less in sequence."""
    found: list[int] = []
    for package in rng.sample(range(count), count // 2):
        part = rng.sample(range(12), rng.randrange(1, 10))
        found += [package * 12 + number for number in (sorted(part) if rng.random() < 0.7 else part)]
    return found


def replay(node: Node, numbers: list[int], *, reads: bool = True) -> float:
    """Seconds of the program, which begins when the replay has begun."""
    seconds = 0.0

    async def start() -> None:
        nonlocal seconds
        learner = Learner(node, node, None)  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            profile = Profile(Course(1, {("b", number): 1.0 for number in numbers}))
            nursery.start_soon(learner._follow, Recorder(), profile, nursery)
            await trio.testing.wait_all_tasks_blocked()  # it is begun at the mount, before a container is
            if reads:
                seconds = await node.program(numbers)

    trio.run(start, clock=trio.testing.MockClock(autojump_threshold=0))
    return seconds


def test_a_profile_that_a_slow_disk_keeps_is_nobodys_wait() -> None:
    """It is saved when the start is over, or the image is unmounted: readers of all images go on meanwhile."""
    node, begun, go_on = Node([1000] * 4), threading.Event(), threading.Event()
    saved: list[Profile] = []

    def save(name: str, profile: Profile) -> None:
        begun.set()
        if go_on.wait(20):
            saved.append(profile)

    known = Profile(Course(1, {("b", 1): 1.0}))
    store: Any = SimpleNamespace(load=lambda name: known, save=save)

    async def main() -> None:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(Learner(node, node, store).run)  # type: ignore[arg-type]
                await trio.testing.wait_all_tasks_blocked()
                recorder: Any = node.recorder
                recorder.note(1, node.segments[:2])
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    assert await trio.to_thread.run_sync(begun.wait, 20)
                    await trio.sleep(0.01)  # this loop is nobody's
                    go_on.set()

    trio.run(main)
    assert [list(profile.all.segments) for profile in saved] == [[("b", 0), ("b", 1)]]


def test_what_is_read_while_the_profile_is_loaded_counts() -> None:
    """A disk may take longer for it than a container for its start. Nothing else tells which command runs."""
    node, mine = Node([1000] * 4), command_of(os.getpid())
    go, saved = threading.Event(), list[Profile]()
    commands = {name: Course(1, {("b", number): 1.0 for number in numbers}) for name, numbers in
                ((mine, (0, 1, 2)), ("another", (0, 3)))}  # fmt: skip
    known = Profile(Course(1, {("b", number): 1.0 for number in range(4)}), commands)

    def load(name: str) -> Profile:
        assert go.wait(30)
        return known

    async def start() -> None:
        store: Any = SimpleNamespace(load=load, save=lambda name, profile: saved.append(profile))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Learner(node, node, store).run)  # type: ignore[arg-type]
            await trio.testing.wait_all_tasks_blocked()
            recorder: Any = node.recorder
            recorder.command.seen(os.getpid())
            recorder.note(5, [node.segments[0]])
            go.set()
            with trio.fail_after(30):
                while node.here.keys() != {0, 1, 2}:  # noqa: ASYNC110 - the node tells nobody
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    trio.run(start)
    assert saved[-1].commands[mine].runs == 2


@pytest.mark.parametrize("seed", range(4))
def test_a_reader_never_comes_to_what_was_not_asked_for(seed: int) -> None:
    rng = random.Random(seed)
    node = Node([rng.randrange(2_000, 180_000) for _ in range(60 * 12)])
    numbers = packages(rng, 60)
    seconds = replay(node, numbers)
    assert node.demanded == []
    assert node.here.keys() == set(numbers), "and nothing else was fetched"
    assert node.largest <= MERGE
    assert node.most_in_flight >= REQUESTS
    size = sum(node.segments[number].size for number in numbers)
    assert seconds <= 1.1 * (size / RATE + RTT), "the link was never idle"


def test_requests_are_few_and_large_where_the_link_is_fast() -> None:
    numbers = list(range(0, 400, 2)) + list(range(1, 400, 2))
    slow, fast = Node([60_000] * 400), Node([60_000] * 400, 125e6)
    for node in (slow, fast):
        replay(node, numbers)
        assert node.demanded == []
        assert node.here.keys() == set(numbers)
    assert slow.largest <= MERGE < fast.largest
    assert fast.requests < slow.requests / 3


def test_few_are_under_way_until_the_link_is_known() -> None:
    node = Node([300_000] * 60, known=False)
    numbers = random.Random(1).sample(range(60), 30)
    replay(node, numbers, reads=False)
    assert node.most_in_flight == FIRST_REQUESTS
    assert numbers[0] in node.first, "what is needed first is asked for first"
    assert node.here.keys() == set(numbers)


def test_a_replay_tells_how_fast_the_link_is() -> None:
    """Also where it was thought to be faster."""

    async def main() -> None:
        link = Courtesy()
        pace = ReplayPace(Courtesy(), trio.Event(), link)
        assert pace.window == UNKNOWN_WINDOW
        for rate in (40e6, 125e6, 5e6):
            for _ in range(400):
                await trio.sleep(50_000 / rate)
                pace.received(50_000)
            assert link.known
            assert 0.8 * rate <= link.rate <= 1.2 * rate

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
