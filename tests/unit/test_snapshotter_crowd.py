"""Threads of many calls at once share a core; those of few, and what they start, do not."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from snapshotter import crowd

ANYWHERE = os.sched_getaffinity(0)
pytestmark = pytest.mark.skipif(len(ANYWHERE) < 2, reason="this machine has one core")
TOLD = [sys.executable, "-c", "import os; print(len(os.sched_getaffinity(0)))"]


class Caller:
    """A thread with calls to answer, one step after the other."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []
        self._wake, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while True:
            self._wake.acquire()
            step = self._steps.pop()
            self.result = step()
            self._done.release()
            if step is crowd.leave:
                return

    def do(self, step: Callable[[], object]) -> object:
        self._steps.append(step)
        self._wake.release()
        assert self._done.acquire(timeout=20)
        return self.result

    def cores(self) -> object:
        return self.do(lambda: os.sched_getaffinity(0))


@pytest.fixture
def callers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Caller]]:
    made = [Caller() for _ in range(crowd.MANY)]
    yield made
    for one in made:
        one.do(crowd.leave)
    monkeypatch.setattr(crowd, "LASTS", 0.0)
    crowd.enter()  # ends the crowd
    crowd.leave()
    assert os.sched_getaffinity(0) == ANYWHERE


def test_many_share_a_core_and_few_do_not(callers: list[Caller], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowd, "LASTS", 1e6)
    for one in callers[:-1]:
        one.do(crowd.enter)
        assert one.cores() == ANYWHERE
    callers[-1].do(crowd.enter)
    core = callers[-1].cores()
    assert isinstance(core, set) and len(core) == 1
    callers[0].do(crowd.enter)  # its next call
    assert callers[0].cores() == core
    for one in callers[1:]:
        one.do(lambda: crowd.leave())
    callers[0].do(crowd.enter)
    assert callers[0].cores() == core  # all were answered at once, which does not end it
    monkeypatch.setattr(crowd, "LASTS", 0.0)
    callers[0].do(crowd.enter)
    assert callers[0].cores() == ANYWHERE


def test_who_hands_the_calls_out_goes_along(callers: list[Caller], monkeypatch: pytest.MonkeyPatch) -> None:
    """And a thread that it makes meanwhile does not stay behind when the crowd is over."""
    monkeypatch.setattr(crowd, "LASTS", 1e6)
    server = Caller()
    crowd.handed_out_by([server.thread])
    try:
        for one in callers:
            one.do(crowd.enter)
        assert server.cores() == callers[-1].cores()
        made = server.do(Caller)
        assert isinstance(made, Caller)
        for one in callers[1:]:
            one.do(lambda: crowd.leave())
        monkeypatch.setattr(crowd, "LASTS", 0.0)
        made.do(crowd.enter)
        assert made.cores() == server.cores() == ANYWHERE
        made.do(crowd.leave)
    finally:
        crowd.handed_out_by([])
        server.do(crowd.leave)


def test_programs_may_run_anywhere(callers: list[Caller]) -> None:
    for one in callers:
        one.do(crowd.enter)
    last = callers[-1]
    assert len(last.cores()) == 1  # type: ignore[arg-type]
    last.do(crowd.apart)
    told = last.do(lambda: subprocess.run(TOLD, capture_output=True, text=True, timeout=60, check=True).stdout)
    assert told == f"{len(ANYWHERE)}\n"
    last.do(crowd.enter)
    assert len(last.cores()) == 1  # type: ignore[arg-type]
