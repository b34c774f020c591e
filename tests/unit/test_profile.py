"""Profiles: how runs add up, and that a file from anywhere can do no harm."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from nydusfs.command import TRIES, FirstCommand, command_of
from nydusfs.profile import FADE, FORGET, MAX_COMMANDS, MAX_ENTRIES, Course, Profile, ProfileStore, Recorder, decode

Keys = list[tuple[str, int]]
keys = st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 40)), unique=True, max_size=30)


@given(st.lists(keys, min_size=1, max_size=6))
def test_the_last_cold_run_gives_the_order_and_what_is_not_read_fades(runs: list[Keys]) -> None:
    profile = Course()
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
    assert decode(Profile(profile).encode()).all.segments.keys() == profile.segments.keys()
    assert profile.runs == len(runs)


def test_what_is_not_read_any_more_is_forgotten() -> None:
    profile = Course().merged([("a", 1), ("a", 2), ("a", 3)], [7])
    for _ in range(4):
        profile = profile.merged([("a", 1), ("a", 2)], [])
    assert list(profile.segments) == [("a", 1), ("a", 2)]


good: dict[str, Any] = {"version": 1, "runs": 1, "segments": [["a", 1, 1.0]], "inodes": [5]}
bad: list[Any] = [
    b"", b"[]", b"{}", b"\xff", b"[" * 100_000, {**good, "version": 2}, {**good, "segments": [["a", -1, 1]]},
    {**good, "segments": [["a", 1 << 40, 1]]}, {**good, "segments": [[1, 1, 1]]}, {**good, "segments": [["a", 1]]},
    {**good, "commands": []}, {**good, "commands": {"x": 1}}, {**good, "commands": {"x": {**good, "inodes": 1}}},
    {**good, "inodes": ["x"]}, {**good, "inodes": None}, {**good, "segments": [["a", 1, "many"]]},
    {**good, "segments": [["a", 1, "nan"]]}, {**good, "segments": [["a", 1, float("nan")]]},
]  # fmt: skip


@pytest.mark.parametrize("value", bad, ids=range(len(bad)))
def test_what_is_no_profile_is_refused(value: Any, tmp_path: Path) -> None:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    with pytest.raises(ValueError, match=r"."):
        decode(data)
    store = ProfileStore(str(tmp_path / "cache"))
    store.save("x", Profile(Course(1, {("a", 1): 1.0})))
    (store.path / "x.json").write_bytes(data)
    assert store.load("x") is None
    assert not (store.path / "x.json").exists()


def test_commands_have_courses_of_their_own() -> None:
    one, two = [("a", n) for n in range(10)], [("a", n) for n in (3, 1, 20, 21)]
    profile = Profile().merged(one, [1], "one")
    assert profile.common() == one, "of a single one all is fetched at once"
    profile = profile.merged(two, [2], "two").merged([("a", 3)], [], "")
    profile = decode(profile.encode())
    assert profile.common() == [("a", 3), ("a", 1)], "what both read, as the later one did"
    assert (profile.of("one"), profile.of("two")) == (one, two)
    assert set(profile.of("three")) == {*one, *two}
    for number in range(MAX_COMMANDS):
        profile = profile.merged(one, [], f"c{number}").merged(two, [], "two")
    assert list(profile.commands) == [*(f"c{n}" for n in range(1, MAX_COMMANDS)), "two"]


def test_the_command_is_that_of_the_first_process_that_is_no_runtime() -> None:
    processes = [
        subprocess.Popen(["sleep", "300"]),
        subprocess.Popen(["sleep", "300.0"]),
        subprocess.Popen(["/proc/self/exe", "init"], executable="/bin/sh", stdin=subprocess.PIPE),
    ]

    async def watch(one: int, other: int, runtime: int) -> None:
        command = FirstCommand()
        command.seen(runtime)
        command.seen(0)
        assert command.open
        command.seen(one)
        command.seen(other)
        with trio.fail_after(60):
            assert await command.known() == command_of(one) != command_of(other)
        nobody = FirstCommand()
        for _ in range(TRIES):
            nobody.seen(0)
        with trio.fail_after(60):
            assert await nobody.known() == ""

    try:
        trio.run(watch, *(process.pid for process in processes))
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=30)


def test_a_reader_does_not_wait_for_what_proc_says_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may answer when the reader is answered: its arguments may lie in a file of the image."""
    answered = threading.Event()

    def hang(pid: int) -> str:
        assert answered.wait(60)
        return f"command of {pid}"

    monkeypatch.setattr("nydusfs.command.command_of", hang)

    async def main() -> None:
        command = FirstCommand()
        readers = [threading.Thread(target=command.seen, args=(pid,), daemon=True) for pid in (7, 8)]
        for reader in readers:
            reader.start()
            await trio.to_thread.run_sync(reader.join, 30)
            assert not reader.is_alive()
        answered.set()
        with trio.fail_after(60):
            assert await command.known() == "command of 7"

    trio.run(main)


def test_sizes_are_bounded() -> None:
    huge = {**good, "segments": [["a", n, 1e300] for n in range(MAX_ENTRIES + 5)], "runs": 1 << 80}
    profile = decode(json.dumps(huge).encode()).all
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


def test_what_is_saved_is_no_larger_than_what_is_loaded(tmp_path: Path) -> None:
    """A large image with several commands: those that ran last stay."""
    segments = [("ab" * 32, number) for number in range(20_000)]
    profile = Profile()
    for number in range(6):
        profile = profile.merged(segments, [1], f"command{number}")
    store = ProfileStore(str(tmp_path / "cache"))
    store.save("name", profile)
    loaded = store.load("name")
    assert loaded is not None and list(loaded.all.segments) == segments
    assert list(loaded.commands) == [f"command{number}" for number in range(2, 6)]


def test_profiles_of_images_that_are_not_started_any_more_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node sees new images every day, and nobody else knows what a profile is of."""
    monkeypatch.setattr("nydusfs.profile.MAX_PROFILES", 3)
    store = ProfileStore(str(tmp_path / "cache"))
    store.path.mkdir()
    (store.path / ".new-abc").write_bytes(b"a killed worker's")
    os.utime(store.path / ".new-abc", (1, 1))
    for number in range(3):
        store.save(str(number), Profile())
        os.utime(store.path / f"{number}.json", (number + 2, number + 2))
    assert store.load("0") == Profile(), "its image is started from the cache alone: nothing of it is recorded"
    store.save("3", Profile())
    assert sorted(path.name for path in store.path.iterdir()) == ["0.json", "2.json", "3.json"]


def test_a_damaged_profile_on_a_disk_that_turned_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ProfileStore(str(tmp_path / "cache"))
    store.save("x", Profile())
    (store.path / "x.json").write_bytes(b"{")

    def refuse(path: Path, **_: bool) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    assert store.load("x") is None, "neither the start of its image nor its prefetch ends by that"


def test_a_profile_that_cannot_be_kept_leaves_nothing(tmp_path: Path) -> None:
    store = ProfileStore(str(tmp_path / "cache"))
    (store.path / "name.json").mkdir(parents=True)
    store.save("name", Profile())
    assert [path.name for path in store.path.iterdir()] == ["name.json"]
