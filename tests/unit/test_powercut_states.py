"""The states that the power-cut harness makes of a log: every one that the rules allow, none that they forbid."""

from __future__ import annotations

from pathlib import Path
from random import Random

from tests.lab.powercut import DiskStates, FileStates
from tests.lab.recordfs import Entry, Step, Sync, Write

GOOD = b"G" * 5000


def _segment(*, synced: bool) -> list[Step]:
    steps: list[Step] = [Entry(1, "x.part", 2), Write(2, 0, GOOD)]
    return [*steps, *([Sync(2)] if synced else []), Entry(1, "x.part", 0), Entry(1, "x", 2)]


def _contents(steps: list[Step], folder: Path) -> set[bytes | None]:
    """What `x` may hold after a cut."""
    states, found = FileStates(steps), set[bytes | None]()
    for number, state in enumerate(states.choose(Random(1), 600)):
        where = folder / str(number)
        states.write(where, state)
        found.add((where / "x").read_bytes() if (where / "x").exists() else None)
    return found


def test_a_file_renamed_after_its_sync_is_whole_or_not_there(tmp_path: Path) -> None:
    assert _contents(_segment(synced=True), tmp_path) == {None, GOOD}


def test_a_file_renamed_without_sync_may_be_anything(tmp_path: Path) -> None:
    found = _contents(_segment(synced=False), tmp_path)
    assert {None, GOOD, b"", bytes(5000)} <= found
    assert any(data and data != GOOD and any(data) for data in found), "torn"


def test_a_disk_reorders_between_flushes_only(tmp_path: Path) -> None:
    steps: list[Step] = [Write(2, 0, b"1" * 512), Write(2, 512, b"2" * 512), Sync(2), Write(2, 1024, b"3" * 512)]
    states, found = DiskStates(bytes(1536), steps), set[str]()
    for state in states.choose(Random(1), 400):
        states.write(tmp_path / "disk", state)
        data = (tmp_path / "disk").read_bytes()
        found.add("".join(chr(data[at] or ord("-")) for at in (0, 512, 1024)))
    assert found == {"---", "1--", "-2-", "12-", "123"}
