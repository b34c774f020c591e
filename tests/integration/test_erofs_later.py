"""An image that FUSE shows first, as the kernel's mount takes longer: who runs a container waits for that."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

import pytest

from tests.lab.cases import case as image_case
from tests.lab.daemon import Nydusd, localfs_config, wait_until
from tests.lab.erofs import cannot_mount_erofs, is_erofs, marked_devices
from tests.lab.mounted import check_mount
from tests.lab.served import CASE, IMAGE, snapshotter
from tests.lab.snapshots import Client, mounted, option, pull

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(180),
    pytest.mark.skipif(cannot_mount_erofs() != "", reason=cannot_mount_erofs()),
]


def body(case: Path, config: str) -> dict[str, str]:
    return {"source": str(case / "image.boot"), "fs_type": "rafs", "config": config}


def test_fuse_shows_it_at_once_and_the_kernel_when_it_is_asked_about(tmp_path: Path) -> None:
    case = image_case("v6-zstd-blake3-1m")
    with Nydusd("--fs-driver", "erofs") as daemon:
        config = localfs_config(case, work_dir=tmp_path)
        assert daemon.call("POST", "mount?mountpoint=/1&attach=later", body(case, config)).status == 204
        names = sorted(os.listdir(daemon.mnt / "1"))  # by whichever driver
        assert daemon.call("POST", "mount/attached?mountpoint=/1").status == 204
        assert is_erofs(daemon.mnt / "1")
        assert check_mount(case, daemon.mnt / "1") == []
        assert sorted(os.listdir(daemon.mnt / "1")) == names
        assert daemon.call("POST", "mount/attached?mountpoint=/1").status == 204
        assert daemon.umount("/1").status == 204
        for _ in range(3):  # in whatever state it is
            assert daemon.call("POST", "mount?mountpoint=/1&attach=later", body(case, config)).status == 204
            assert daemon.umount("/1").status == 204
        assert not is_erofs(daemon.mnt / "1")
        assert not (daemon.mnt / "1").exists()
        assert marked_devices(tmp_path) == []
        answer = daemon.call("POST", "mount/attached?mountpoint=/1")
        assert answer.status == 500 and "doesn't exist" in answer.message


def test_what_must_be_erofs_and_cannot_be_is_told_who_asks(tmp_path: Path) -> None:
    case = image_case("v6-zstd-blake3-1m")
    with Nydusd("--fs-driver", "erofs") as daemon:
        config = json.loads(localfs_config(case, work_dir=tmp_path))
        config["device"]["cache"] = {"type": "dummycache"}
        wanted = body(case, json.dumps(config))
        assert daemon.call("POST", "mount?mountpoint=/1&attach=later", wanted).status == 204
        answer = daemon.call("POST", "mount/attached?mountpoint=/1")
        assert answer.status == 500
        assert "fs_driver erofs is not possible for /1: it has no cache directory" in answer.message
        assert daemon.umount("/1").status == 204
        wanted = body(case, json.dumps({**config, "fs_driver": "auto"}))
        assert daemon.call("POST", "mount?mountpoint=/1&attach=later", wanted).status == 204
        assert daemon.call("POST", "mount/attached?mountpoint=/1").status == 204
        assert check_mount(case, daemon.mnt / "1") == []


def test_the_end_of_all_processes_within_a_mount_leaves_nobody_waiting(tmp_path: Path) -> None:
    """The mount is put at a path that the same process serves: who is killed in that call must end all the same."""
    case = image_case(CASE)
    rng = random.Random(7)
    for number in range(15):
        with Nydusd("--fs-driver", "erofs") as daemon, ThreadPoolExecutor(1) as pool:
            config = localfs_config(case, work_dir=tmp_path / f"cache{number}")
            known = len(daemon.log_text())
            asked = pool.submit(daemon.mount, "/a", case / "image.boot", config)
            wait_until(lambda: "devices for erofs" in daemon.log_text()[known:], 20, "the mount", longest_pause=0)  # noqa: B023
            time.sleep(rng.uniform(0, 0.001))
            daemon.kill_all()
            if (error := asked.exception(20)) is not None:
                assert isinstance(error, OSError | HTTPException)


def test_a_worker_that_dies_before_leaves_it_to_the_next(tmp_path: Path) -> None:
    case = image_case("v6-zstd-blake3-1m")
    with Nydusd("--fs-driver", "erofs") as daemon:
        config = localfs_config(case, work_dir=tmp_path)
        old = daemon.worker_pid
        assert daemon.call("POST", "mount?mountpoint=/1&attach=later", body(case, config)).status == 204
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: daemon.running() and daemon.worker_pid != old, 20, "the next worker")
        wait_until(lambda: is_erofs(daemon.mnt / "1"), 20, "the kernel's mount")
        assert daemon.call("POST", "mount/attached?mountpoint=/1").status == 204
        assert check_mount(case, daemon.mnt / "1") == []


@pytest.mark.parametrize("driver", ["erofs", "auto"])
def test_a_containers_mounts_are_the_kernels(driver: str) -> None:
    """Prepare and View answer when FUSE shows the image, Mounts when the kernel does."""
    with snapshotter("--daemon-mode", "shared", fs_driver=driver) as running, Client(running.socket) as client:
        for tag in ("a", "b"):
            meta = pull(client, image_case(CASE), running.work, IMAGE, tag=tag)
            client.view(f"v{tag}", meta)
            lower = Path(option(client.prepare(f"c{tag}", meta)[0], "lowerdir"))
            began = time.monotonic()
            found = client.mounts(f"c{tag}")
            assert is_erofs(lower), f"after {time.monotonic() - began:.3f} s"
            with mounted(found, running.work / "rootfs") as rootfs:
                assert check_mount(image_case(CASE), lower) == []
                assert rootfs.is_dir()
