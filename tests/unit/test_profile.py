"""Profiles: how runs add up, and that a file from anywhere can do no harm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nydusfs.profile import FADE, FORGET, MAX_ENTRIES, Profile, ProfileStore, Recorder, decode

Keys = list[tuple[str, int]]
keys = st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 40)), unique=True, max_size=30)


@given(st.lists(keys, min_size=1, max_size=6))
def test_the_last_cold_run_gives_the_order_and_what_is_not_read_fades(runs: list[Keys]) -> None:
    profile = Profile()
    for seen in runs:
        before = profile
        profile = before.merged(seen, [])
        assert set(seen) <= set(profile.segments), "what was read is known"
        read = [key for key in before.segments if key in seen]
        if not before.segments or len(read) * 2 >= len(before.segments):
            assert list(profile.segments)[: len(seen)] == seen
            for key, weight in before.segments.items():
                if key not in seen:
                    assert profile.segments.get(key, 0.0) == (weight * FADE if weight * FADE >= FORGET else 0.0)
        else:
            assert list(profile.segments)[: len(before.segments)] == list(before.segments), "a warm run forgets nothing"
    assert decode(profile.encode()).segments.keys() == profile.segments.keys()
    assert profile.runs == len(runs)


def test_what_is_not_read_any_more_is_forgotten() -> None:
    profile = Profile().merged([("a", 1), ("a", 2), ("a", 3)], [7])
    for _ in range(4):
        profile = profile.merged([("a", 1), ("a", 2)], [])
    assert list(profile.segments) == [("a", 1), ("a", 2)]


good: dict[str, Any] = {"version": 1, "runs": 1, "segments": [["a", 1, 1.0]], "inodes": [5]}
bad: list[Any] = [
    b"", b"[]", b"{}", b"\xff", b"[" * 100_000, {**good, "version": 2}, {**good, "segments": [["a", -1, 1]]},
    {**good, "segments": [["a", 1 << 40, 1]]}, {**good, "segments": [[1, 1, 1]]}, {**good, "segments": [["a", 1]]},
    {**good, "inodes": ["x"]}, {**good, "inodes": None}, {**good, "segments": [["a", 1, "many"]]},
]  # fmt: skip


@pytest.mark.parametrize("value", bad, ids=range(len(bad)))
def test_what_is_no_profile_is_refused(value: Any, tmp_path: Path) -> None:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    with pytest.raises(ValueError, match=r"."):
        decode(data)
    store = ProfileStore(str(tmp_path / "cache"))
    store.save("x", Profile(1, {("a", 1): 1.0}))
    (store.path / "x.json").write_bytes(data)
    assert store.load("x") is None
    assert not (store.path / "x.json").exists()


def test_sizes_are_bounded() -> None:
    huge = {**good, "segments": [["a", n, 1e300] for n in range(MAX_ENTRIES + 5)], "runs": 1 << 80}
    profile = decode(json.dumps(huge).encode())
    assert len(profile.segments) == MAX_ENTRIES
    assert max(profile.segments.values()) < 10
    assert profile.runs < 1 << 31


def test_a_run_that_goes_elsewhere_is_noticed() -> None:
    class Segment:
        def __init__(self, number: int) -> None:
            self.number = number
            self.blob = type("Blob", (), {"id": "a"})

    recorder = Recorder()
    recorder.planned.update(("a", number) for number in range(100))
    recorder.note(1, [Segment(n) for n in range(20)])  # type: ignore[misc]
    recorder.note(1, [Segment(n) for n in range(100, 119)])  # type: ignore[misc]
    assert not recorder.astray
    recorder.note(2, [Segment(n) for n in range(119, 130)])  # type: ignore[misc]
    assert recorder.astray
    assert list(recorder.inodes) == [1, 2]
