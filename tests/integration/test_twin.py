"""Images without extended attributes are shown by a FUSE connection of their own, which the kernel asks for none."""

from __future__ import annotations

import errno
import os
import platform
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import pytest

from tests.lab.cases import case as image_case
from tests.lab.daemon import Nydusd, can_mount_fuse, localfs_config, wait_until
from tests.lab.mounted import check_mount
from tests.lab.process import mounts_below
from tests.lab.tiny import TinyImage, noise, tiny_image

LINUX = tuple(map(int, platform.release().split(".")[:2]))
pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(180),
    pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse()),
    pytest.mark.skipif(LINUX < (6, 15), reason="mounts that are nowhere can be cloned since Linux 6.15"),
]
GETXATTR = 6  # among the numbers of `fop_hits`


@pytest.fixture
def plain(tmp_path: Path) -> tuple[TinyImage, str]:
    """An image and its configuration."""
    image = tiny_image(tmp_path, {"a": noise(300_000), "d/b": b"two", "d/c": noise(5000, 2)})
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / image.blob_id).write_bytes(image.blob)
    return image, localfs_config(blobs, work_dir=tmp_path / "cache", enable_xattr=True)


@pytest.fixture
def marked() -> tuple[Path, str]:
    case = image_case("v6-zstd-blake3-1m")
    return case, localfs_config(case, enable_xattr=True)


def has_twin(daemon: Nydusd, at: str) -> bool:
    return os.stat(daemon.mnt / at).st_dev != os.stat(daemon.mnt).st_dev


def asked(daemon: Nydusd, at: str) -> int:
    return int(daemon.get(f"metrics?id=/{at}").body["fop_hits"][GETXATTR])


def check(image: TinyImage, root: Path) -> None:
    assert {name: (root / name).read_bytes() for name in image.files} == image.files


@contextmanager
def overlay(lower: Path, scratch: Path) -> Iterator[Path]:
    """On a file system of its own: not all can be an overlay's upper."""
    subprocess.run(["mount", "-t", "tmpfs", "none", scratch], check=True, timeout=20)
    try:
        for name in ("upper", "work", "root"):
            (scratch / name).mkdir()
        options = f"lowerdir={lower},upperdir={scratch}/upper,workdir={scratch}/work"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "none", scratch / "root"], check=True, timeout=20)
        yield scratch / "root"
    finally:
        subprocess.run(["umount", "-R", scratch], check=True, timeout=20)


def test_who_has_none_is_not_asked(plain: tuple[TinyImage, str], marked: tuple[Path, str], tmp_path: Path) -> None:
    image, config = plain
    with Nydusd("--fs-driver", "fuse") as daemon:
        assert daemon.mount("/m", marked[0] / "image.boot", marked[1]).status == 204
        assert mounts_below(daemon.mnt) == [str(daemon.mnt)]
        for at in ("/p", "/n/e/s"):
            assert daemon.mount(at, image.bootstrap, config).status == 204
            assert has_twin(daemon, at.lstrip("/"))
        assert not has_twin(daemon, "m") and not has_twin(daemon, "n")
        ahead = [
            Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").read_text()
            for device in (os.stat(daemon.mnt / at).st_dev for at in ("m", "p"))
        ]
        assert ahead[0] == ahead[1]
        for name in image.files:
            for root in (daemon.mnt / "p", daemon.mnt / "n/e/s"):
                with pytest.raises(OSError) as failed:
                    os.getxattr(root / name, "user.a")
                assert failed.value.errno == errno.EOPNOTSUPP
                assert os.listxattr(root / name) == []
        (tmp_path / "o").mkdir()
        with overlay(daemon.mnt / "p", tmp_path / "o") as root:
            check(image, root)
            with (root / "d/b").open("ab") as file:
                file.write(b" more")
            assert (root / "d/b").read_bytes() == b"two more"
        check(image, daemon.mnt / "p")
        assert asked(daemon, "p") + asked(daemon, "n/e/s") <= 1
        assert check_mount(marked[0], daemon.mnt / "m") == []
        assert asked(daemon, "m") > 1
        assert sorted(os.listdir(daemon.mnt)) == ["m", "n", "p"]
        for at in ("/p", "/n/e/s"):
            assert daemon.umount(at).status == 204
        assert mounts_below(daemon.mnt) == [str(daemon.mnt)]
        assert sorted(os.listdir(daemon.mnt)) == ["m", "n"] and os.listdir(daemon.mnt / "n/e") == []


def test_another_image_in_its_place(plain: tuple[TinyImage, str], marked: tuple[Path, str]) -> None:
    image, config = plain
    with Nydusd("--fs-driver", "fuse") as daemon:
        assert daemon.mount("/a", image.bootstrap, config).status == 204
        for _ in range(2):
            check(image, daemon.mnt / "a")
            assert daemon.remount("/a", marked[0] / "image.boot", marked[1]).status == 204
            assert check_mount(marked[0], daemon.mnt / "a") == [] and not has_twin(daemon, "a")
            assert daemon.remount("/a", image.bootstrap, config).status == 204
            assert has_twin(daemon, "a")


def test_many_at_once_follow_when_there_is_time(plain: tuple[TinyImage, str], marked: tuple[Path, str]) -> None:
    image, config = plain
    wanted = [
        {"mountpoint": f"/{number}", "source": str(image.bootstrap), "fs_type": "rafs", "config": config}
        for number in range(20)
    ]
    wanted.append({**wanted[0], "mountpoint": "/m", "source": str(marked[0] / "image.boot"), "config": marked[1]})
    with Nydusd("--fs-driver", "fuse") as daemon:
        assert daemon.call("POST", "mounts", wanted).body == [None] * len(wanted)
        check(image, daemon.mnt / "19")
        for number in (3, 19):  # in whatever state they are
            assert daemon.umount(f"/{number}").status == 204
        left = [str(number) for number in range(20) if number not in (3, 19)]
        wait_until(lambda: all(has_twin(daemon, name) for name in left), 20, "the twin")
        assert sorted(mounts_below(daemon.mnt)) == sorted(map(str, [daemon.mnt, *(daemon.mnt / name for name in left)]))
        assert check_mount(marked[0], daemon.mnt / "m") == [] and not has_twin(daemon, "m")


def test_deaths_and_upgrades_leave_it_as_it_is(plain: tuple[TinyImage, str]) -> None:
    image, config = plain
    with Nydusd("--fs-driver", "fuse") as daemon:
        assert daemon.mount("/a", image.bootstrap, config).status == 204
        held = (daemon.mnt / "a/d/c").open("rb")
        number = 0

        def next_worker(old: int) -> None:
            wait_until(lambda: daemon.running() and daemon.worker_pid != old, 30, "the next worker")

        def works() -> None:
            nonlocal number
            number += 1
            drop = Path("/proc/sys/vm/drop_caches")
            drop.write_text("3")
            check(image, daemon.mnt / "a")
            assert os.pread(held.fileno(), 5000, 0) == image.files["d/c"]
            assert daemon.mount(f"/{number}", image.bootstrap, config).status == 204
            assert has_twin(daemon, str(number)) and has_twin(daemon, "a")
            check(image, daemon.mnt / str(number))
            if number > 1:
                assert daemon.umount(f"/{number - 1}").status == 204

        works()
        for victim in ("worker_pid", "keeper_pid", "worker_pid"):
            old, info = daemon.worker_pid, daemon.get("daemon").body
            os.kill(info[victim], signal.SIGKILL)
            if victim == "worker_pid":
                next_worker(old)
            else:
                before = info["keeper_pid"]
                wait_until(lambda: daemon.get("daemon").body["keeper_pid"] != before, 30, "a keeper")  # noqa: B023
            works()
        old = daemon.worker_pid
        assert daemon.call("PUT", "daemon/upgrade").status == 204
        next_worker(old)
        works()
        held.close()
        for at in ("/a", f"/{number}"):
            assert daemon.umount(at).status == 204
        assert mounts_below(daemon.mnt) == [str(daemon.mnt)]


def test_one_that_is_ended_from_outside_is_not_used_any_more(
    plain: tuple[TinyImage, str], marked: tuple[Path, str], tmp_path: Path
) -> None:
    image, config = plain
    control = tmp_path / "control"
    control.mkdir()
    with Nydusd("--fs-driver", "fuse") as daemon:
        assert daemon.mount("/m", marked[0] / "image.boot", marked[1]).status == 204
        assert daemon.mount("/a", image.bootstrap, config).status == 204
        connection = os.minor(os.stat(daemon.mnt / "a").st_dev)
        subprocess.run(["mount", "-t", "fusectl", "none", control], check=True, timeout=20)
        try:
            (control / str(connection) / "abort").write_text("1")
        finally:
            subprocess.run(["umount", control], check=True, timeout=20)
        with pytest.raises(OSError) as failed:
            (daemon.mnt / "a/a").read_bytes()
        assert failed.value.errno in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)
        wait_until(lambda: "was ended from outside" in daemon.log_text(), 20, "the log")
        assert check_mount(marked[0], daemon.mnt / "m") == []
        assert daemon.mount("/b", image.bootstrap, config).status == 204
        check(image, daemon.mnt / "b")
        assert not has_twin(daemon, "b")
        assert daemon.umount("/a").status == 204
        assert daemon.mount("/a", image.bootstrap, config).status == 204
        check(image, daemon.mnt / "a")


def test_the_end_of_all_processes_within_a_mount_leaves_nobody_waiting(plain: tuple[TinyImage, str]) -> None:
    """Its place is in a tree that the same process serves: who is killed on the way must end all the same."""
    image, config = plain
    rng = random.Random(7)
    for _ in range(15):
        with Nydusd("--fs-driver", "fuse") as daemon, ThreadPoolExecutor(1) as pool:
            known = len(daemon.log_text())
            pending = pool.submit(daemon.mount, "/a", image.bootstrap, config)
            wait_until(lambda: "filesystem imported" in daemon.log_text()[known:], 20, "the mount", longest_pause=0)  # noqa: B023
            time.sleep(rng.uniform(0, 0.004))
            daemon.kill_all()
            if (error := pending.exception(20)) is not None:
                assert isinstance(error, OSError | HTTPException)
