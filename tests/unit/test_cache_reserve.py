"""What a cache does for the day its disk is full: the reserve, and what is known of segments that cannot be emptied."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nydusfs.cache import CacheStore, reserve, store
from nydusfs.cache.devices import MOST_PLAIN, DeviceFiles
from nydusfs.cache.quota import Limit
from nydusfs.cache.reserve import RESERVE, Reserve, has_room

BOOT = "0123abcd"
MIB = 1 << 20


class Told:
    """A driver without a kernel."""

    def filled(self, device: str, fd: int, size: int) -> None: ...

    def durable(self, device: str, fd: int) -> None: ...

    def mounted(self, blob: str) -> bool:
        return True

    def ask(self, path: Path) -> int:
        return os.open(path, os.O_RDWR)

    def quiet(self, fd: int) -> None: ...


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How big the disk seems, and how much of it free."""
    facts = {"blocks": 2048 * MIB // 4096, "free": 1024 * MIB // 4096}
    real = os.statvfs

    def statvfs(path: Path) -> os.statvfs_result:
        found = list(real(path))
        found[1], found[2], found[4] = 4096, facts["blocks"], facts["free"]
        return os.statvfs_result(found)

    monkeypatch.setattr(reserve.os, "statvfs", statvfs)
    return facts


def test_it_is_there_while_it_is_needed_and_given_up_in_pieces(tmp_path: Path, disk: dict[str, int]) -> None:
    path = tmp_path / RESERVE
    path.parent.mkdir()
    kept = Reserve(tmp_path)
    kept.refill()
    assert not path.exists(), "nobody asked for it"
    assert kept.keep()
    assert path.stat().st_size == 32 * MIB
    assert path.stat().st_blocks * 512 >= 32 * MIB
    assert kept.give(4 * MIB) == 4 * MIB
    assert path.stat().st_size == 28 * MIB
    disk["free"] = 90 * MIB // 4096
    assert not kept.keep()
    kept.refill()
    assert path.stat().st_size == 28 * MIB
    another = Reserve(tmp_path)  # of the next process
    assert another.give(100 * MIB) == 28 * MIB
    assert another.give(4 * MIB) == 0
    disk["free"] = 1024 * MIB // 4096
    assert another.keep()
    assert path.stat().st_size == 32 * MIB
    another.let_go()
    another.refill()
    assert not path.exists()


def test_a_store_with_a_limit_or_without_kernel_mounts_has_none(tmp_path: Path, disk: dict[str, int]) -> None:
    cache = CacheStore(tmp_path, boot=BOOT)
    try:
        assert cache.keep_reserve()
        (tmp_path / RESERVE).parent.mkdir()
        (tmp_path / RESERVE).touch()  # of a process that was killed
        cache.sync()
        assert not (tmp_path / RESERVE).exists()
        cache.devices = DeviceFiles(tmp_path, BOOT, Told())
        assert cache.keep_reserve()
        assert (tmp_path / RESERVE).exists()
        cache.set_limit(Limit(64 * MIB))
        assert not (tmp_path / RESERVE).exists()
        assert cache.keep_reserve()
        assert not (tmp_path / RESERVE).exists()
    finally:
        cache.close()


def test_room_is_what_the_disk_takes(tmp_path: Path) -> None:
    assert has_room(tmp_path, 4096)
    assert list(tmp_path.iterdir()) == []


def test_what_is_noted_as_plain_is_known_to_the_next_process(tmp_path: Path) -> None:
    devices = DeviceFiles(tmp_path, BOOT, Told())
    names = [f"{number}-{number:024x}" for number in (0, 7, 8, 1000)]
    for name in names:
        devices.create("blob", name)
    assert all(devices.can_leave("blob", name) for name in names)
    devices.note_plain("blob", [7])
    devices.note_plain("blob", [1000])
    devices.note_plain("blob", [0])
    for one in (devices, DeviceFiles(tmp_path, BOOT, Told())):
        assert [one.can_leave("blob", name) for name in names] == [False, False, True, False]
        assert not one.can_leave("blob", "9-" + "0" * 24), "it is no device"
        assert not one.is_plain("blob", f"{MOST_PLAIN}-00")
        assert not one.is_plain("other", names[0])
    (devices.root / ".plain").touch()  # an older version noted no more than that
    assert not DeviceFiles(tmp_path, BOOT, Told()).can_leave("blob", names[2])


def test_what_a_mount_opens_by_its_plain_path_within_a_notice_is_not_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = CacheStore(tmp_path, boot=BOOT)
    try:
        cache.devices = devices = DeviceFiles(tmp_path, BOOT, Told())
        names = [f"{number}-{number:024x}" for number in range(2)]
        (tmp_path / "blob").mkdir(exist_ok=True)
        for name in names:
            devices.create("blob", name)
            (devices.files / "blob" / name).write_bytes(bytes(8192))
            os.link(devices.files / "blob" / name, tmp_path / "blob" / name)
        monkeypatch.setattr(store.time, "sleep", lambda _: devices.note_plain("blob", [1]))
        cache.set_limit(Limit(4096))
        assert [(devices.files / "blob" / name).stat().st_size for name in names] == [0, 8192]
        with devices.writing("blob", names[1]):
            pass  # nobody is left to wait for
    finally:
        cache.close()
