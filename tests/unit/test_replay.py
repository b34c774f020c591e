"""The replay of a profile before a reader, over a modelled link and in virtual time: nothing real is waited for."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from nydusfs.learning import MERGE, REQUESTS, Learner
from nydusfs.profile import Course, Profile, Recorder
from nydusfs.segments import Segment

BLOB: Any = SimpleNamespace(id="b", index=0)
RTT, RATE = 0.02, 5e6  # 40 Mbit/s
COMPUTES = 0.001  # seconds of the program per segment


class Node:
    """An image of segments without gaps, its scheduler and the link to its registry."""

    def __init__(self, sizes: list[int]) -> None:
        self.name, self.source, self.recorder = "image", None, None
        self.bootstrap: Any = SimpleNamespace(blobs=[BLOB], version=6, size=0, inode_count=0)
        self.courtesy = SimpleNamespace(rate=RATE)
        self.segments: list[Segment] = []
        place = 0
        for number, size in enumerate(sizes):
            self.segments.append(Segment(BLOB, number, b"%d" % number, range(1), size, place, place + size, False))
            place += size
        self.here: dict[int, trio.Event] = {}
        self.demanded: list[int] = []
        self.in_flight = self.most_in_flight = 0
        self.largest = 0
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
        self.in_flight += 1
        self.most_in_flight, self.largest = max(self.most_in_flight, self.in_flight), max(self.largest, size)
        await trio.sleep(RTT / 2)
        self._free_at = max(self._free_at, trio.current_time()) + size / RATE
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


@pytest.mark.parametrize("seed", range(4))
def test_a_reader_never_comes_to_what_was_not_asked_for(seed: int) -> None:
    rng = random.Random(seed)
    node = Node([rng.randrange(2_000, 180_000) for _ in range(60 * 12)])
    numbers = packages(rng, 60)
    seconds = 0.0

    async def start() -> None:
        nonlocal seconds
        recorder = Recorder()
        learner = Learner(node, node, None)  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            profile = Profile(Course(1, {("b", number): 1.0 for number in numbers}))
            nursery.start_soon(learner._follow, recorder, profile, nursery)
            await trio.testing.wait_all_tasks_blocked()  # it is begun at the mount, before a container is
            seconds = await node.program(numbers)

    trio.run(start, clock=trio.testing.MockClock(autojump_threshold=0))
    assert node.demanded == []
    assert node.here.keys() == set(numbers), "and nothing else was fetched"
    assert node.largest <= MERGE
    assert node.most_in_flight >= REQUESTS
    size = sum(node.segments[number].size for number in numbers)
    assert seconds <= 1.1 * (size / RATE + RTT), "the link was never idle"
