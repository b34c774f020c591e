"""Power cuts at any moment of a daemon's run: never a wrong byte after it, at worst a segment that is fetched again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.lab.daemon import can_mount_fuse
from tests.lab.erofs import cannot_mount_erofs
from tests.lab.powercut import DISK_SIZE, mount_as_at_boot
from tests.lab.process import run
from tests.lab.recordfs import LoopDisk

pytestmark = [pytest.mark.root, pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse())]


def cut(folder: Path, *options: str, timeout: float = 280.0) -> dict[str, Any]:
    for seed in range(3):  # a slow disk has next to nothing when its power goes
        (at := folder / str(seed)).mkdir()
        words = [sys.executable, "-m", "tests.lab.powercut", *options, "--seed", str(seed), str(at)]
        report: dict[str, Any] = json.loads(run(words, timeout=timeout).stdout)
        assert (report["wrong"], report["failed"]) == (0, 0), report
        if report["segments_found"] > report["states"] / 4:
            break
    assert report["segments_found"] > report["states"] / 4, "nothing survived: nothing was looked at"
    assert report["segments_lost"] > report["states"], "everything survived: nothing was cut"
    return report


@pytest.mark.timeout(900)  # each state a file system: on a busy machine 2 s instead of 0.2, and up to three runs
def test_file_systems_that_promise_nothing_but_fsync(tmp_path: Path) -> None:
    cut(tmp_path, "--disk", "files", "--states", "80")


@pytest.mark.timeout(900)  # each state a file system: on a busy machine 2 s instead of 0.2, and up to three runs
def test_ext4_on_a_disk_that_reorders_its_writes(tmp_path: Path) -> None:
    if cannot_mount_erofs():
        cut(tmp_path, "--disk", "ext4", "--states", "20", "--daemons", "1")
    else:
        cut(tmp_path, "--disk", "ext4", "--driver", "erofs", "--states", "20", "--daemons", "1")


def test_a_superblock_of_which_one_sector_got_to_the_disk(tmp_path: Path) -> None:
    """Its checksum is in the other one. A boot's fsck mends that from the second superblock, which a disk as small as
    the harness's has only if made so: without, 6 of 1,500 states could never be mounted again."""
    disk = LoopDisk(tmp_path, DISK_SIZE)
    try:
        (disk.mountpoint / "file").write_bytes(b"there" * 1000)
        disk.write_out()
        run(["sync", "-f", disk.mountpoint])
        content = bytearray(disk.fs.content())
    finally:
        disk.close()
    place = 1024 + 0x88  # where it was mounted last
    content[place : place + 8] = b"/another"
    (tmp_path / "after").write_bytes(content)
    where = tmp_path / "where"
    where.mkdir()
    try:
        assert mount_as_at_boot("ext4", tmp_path / "after", where) is True
        assert (where / "file").read_bytes() == b"there" * 1000
    finally:
        run(["umount", where], check=False)


@pytest.mark.long
@pytest.mark.parametrize("seed", ["1", "2", "3"])  # each with other mount options
@pytest.mark.parametrize("driver", ["fuse", "erofs"])
def test_thousands_of_states(driver: str, seed: str, tmp_path: Path) -> None:
    if driver == "erofs" and (reason := cannot_mount_erofs()):
        pytest.skip(reason)
    options = ("--driver", driver, "--states", "1500", "--daemons", "40", "--seed", seed)
    cut(tmp_path, "--disk", "ext4", *options, timeout=1700)


@pytest.mark.long
def test_thousands_of_states_of_files(tmp_path: Path) -> None:
    cut(tmp_path, "--disk", "files", "--states", "5000", "--daemons", "20", timeout=1700)
