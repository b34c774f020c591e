"""Random calls and deaths against the real service and against a model: no difference (`tests/lab/snapmodel.py`)."""

from __future__ import annotations

import random

import pytest

from tests.lab.process import remove_tree, unmount_below, work_dir
from tests.lab.snapmodel import Comparison
from tests.lab.stack import Snapshotter, daemon_config

pytestmark = [pytest.mark.root]


def compare(steps: int, seed: int, kill_every: int) -> Comparison:
    work = work_dir()
    try:
        with Snapshotter(work / "s", daemon_config(prefetch=False), arguments=("--daemon-mode", "dedicated")) as ours:
            comparison = Comparison(ours, seed, kill_every)
            comparison.run(steps)
            return comparison
    finally:
        unmount_below(work)
        remove_tree(work)


@pytest.mark.timeout(600)
def test_some_calls_and_deaths() -> None:
    done = compare(1500, random.randrange(1 << 32), 250)
    assert done.done == 1500


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_100_000_calls() -> None:
    done = compare(100_000, random.randrange(1 << 32), 500)
    print(f"seed {done.seed}: {done.done} calls, {done.refused} refused as they must be, {done.deaths} deaths")
