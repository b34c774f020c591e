"""When a mirror is left out and taken back; times are given, nothing waits."""

from __future__ import annotations

from nydusfs.sources.health import Health


def test_failures_in_a_row_take_a_mirror_out_and_one_trial_brings_it_back() -> None:
    health = Health(failure_limit=5, interval=5)
    assert [health.failure(100 + step / 10) for step in range(5)] == [False] * 4 + [True]
    assert health.admit(101, "b", 3) == "no"
    assert health.admit(105.5, "b", 3) == "trial"
    assert health.admit(105.6, "b", 3) == "no"  # one request tries, the others pass by
    assert health.success()
    assert health.admit(106, "b", 3) == "yes"
    assert not health.success()


def test_failed_trials_wait_longer_each_time() -> None:
    health = Health(failure_limit=1, interval=5)
    now = 100.0
    health.failure(now)
    pauses = []
    for _ in range(7):
        start = now
        while health.admit(now, "b", 3) != "trial":
            now += 0.5
        pauses.append(now - start)
        health.failure(now)
    assert pauses == [5, 10, 20, 40, 80, 120, 120]


def test_a_trial_that_never_reports_is_given_again() -> None:
    health = Health(failure_limit=1, interval=5)
    health.failure(100)
    assert health.admit(106, "b", 3) == "trial"  # its reader was cancelled
    assert health.admit(108, "b", 3) == "no"
    assert health.admit(109.5, "b", 3) == "trial"


def test_old_failures_fade() -> None:
    health = Health(failure_limit=5)
    assert not any(health.failure(day * 3600.0) for day in range(100))


def test_two_hangs_are_enough() -> None:
    health = Health(failure_limit=5)
    assert not health.failure(100, hung=True)
    assert health.failure(103, hung=True)


def test_a_missing_blob_is_the_blobs_matter() -> None:
    health = Health()
    health.shun_blob("a", 100)
    assert health.admit(101, "a", 3) == "no"
    assert health.admit(101, "b", 3) == "yes"
    assert health.admit(131, "a", 3) == "yes"
