"""An image that FUSE shows first, as the kernel's mount takes longer: who runs a container waits for that."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPException
from pathlib import Path

import pytest

from nydusfs.drivers import kernel
from tests.integration.test_erofs import bound
from tests.integration.test_fuse_lifecycle import silent_config, silent_registry, start_reader
from tests.lab.cases import case as image_case
from tests.lab.daemon import Nydusd, localfs_config, wait_until
from tests.lab.erofs import cannot_mount_erofs, is_erofs, marked_devices
from tests.lab.mounted import check_mount
from tests.lab.process import run
from tests.lab.served import CASE, IMAGE, snapshotter
from tests.lab.snapshots import Client, mounted, option, pull

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(300),
    pytest.mark.skipif(cannot_mount_erofs() != "", reason=cannot_mount_erofs()),
]


def body(case: Path, config: str) -> dict[str, str]:
    return {"source": str(case / "image.boot"), "fs_type": "rafs", "config": config}


@contextmanager
def somebody_waits(daemon: Nydusd, case: Path, folder: Path) -> Iterator[None]:
    """For data that does not come, of an image of his own: `auto` leaves all images to FUSE as long. How long the test
    itself takes for what it looks at meanwhile is of no matter then."""
    with silent_registry() as port:
        assert daemon.mount("/s", case / "image.boot", silent_config(port, folder)).status == 204
        files = [path for path in (daemon.mnt / "s").rglob("*") if path.is_file() and path.stat().st_size]
        asked = start_reader(files[0])
        try:
            wait_until(lambda: bool(daemon.get("metrics/inflight").body), 60, "the reader")
            yield
            assert asked.poll() is None
            assert daemon.umount("/s").status == 204
            assert asked.communicate(timeout=60)[0].strip() != "0"
        finally:
            asked.kill()
            asked.wait(20)


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
            wait_until(lambda: "devices for erofs" in daemon.log_text()[known:], 60, "the mount", longest_pause=0)  # noqa: B023
            time.sleep(rng.uniform(0, 0.001))
            daemon.kill_all()
            if (error := asked.exception(60)) is not None:
                assert isinstance(error, OSError | HTTPException)


def test_a_worker_that_dies_before_leaves_it_to_the_next(tmp_path: Path) -> None:
    case = image_case("v6-zstd-blake3-1m")
    with Nydusd("--fs-driver", "erofs") as daemon:
        config = localfs_config(case, work_dir=tmp_path)
        old = daemon.worker_pid
        assert daemon.call("POST", "mount?mountpoint=/1&attach=later", body(case, config)).status == 204
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: daemon.running() and daemon.worker_pid != old, 60, "the next worker")
        wait_until(lambda: is_erofs(daemon.mnt / "1"), 60, "the kernel's mount")
        assert daemon.call("POST", "mount/attached?mountpoint=/1").status == 204
        assert check_mount(case, daemon.mnt / "1") == []


def test_auto_has_fuse_show_it_until_nobody_waits(tmp_path: Path) -> None:
    """Who reads by FUSE when the kernel's mount is put over it goes on; who comes then, or mounts the image again,
    has the kernel's."""
    case = image_case("v6-zstd-blake3-1m")
    with Nydusd("--fs-driver", "auto") as daemon:
        config = localfs_config(case, work_dir=tmp_path / "cache")
        with ExitStack() as stack:
            with somebody_waits(daemon, case, tmp_path / "s"):
                assert daemon.call("POST", "mount?mountpoint=/1&attach=later", body(case, config)).status == 204
                assert daemon.call("POST", "mount/attached?mountpoint=/1").status == 204
                assert not is_erofs(daemon.mnt / "1")
                held = stack.enter_context(bound(daemon.mnt / "1", tmp_path / "held"))
                assert check_mount(case, held) == []
            wait_until(lambda: is_erofs(daemon.mnt / "1"), 60, "the kernel's mount")
            run(["sh", "-c", "echo 3 > /proc/sys/vm/drop_caches"])
            assert not is_erofs(held)
            for where in (held, daemon.mnt / "1"):
                assert check_mount(case, where) == []
        assert daemon.mount("/2", case / "image.boot", config).status == 204
        assert is_erofs(daemon.mnt / "2")
        for where in ("/1", "/2"):
            assert daemon.umount(where).status == 204
        assert daemon.mount("/1", case / "image.boot", config).status == 204
        assert is_erofs(daemon.mnt / "1")
        assert daemon.umount("/1").status == 204
        assert marked_devices(tmp_path / "cache") == []


def test_auto_is_patient_with_readers_and_umounts(tmp_path: Path) -> None:
    """No kernel's mount while somebody waits for data; one that is on its way when the image is umounted, or mounted
    anew, is given up, whatever it had come to."""
    case = image_case("v6-zstd-blake3-1m")
    with Nydusd("--fs-driver", "auto") as daemon:
        with somebody_waits(daemon, case, tmp_path / "s"):
            assert daemon.mount("/1", case / "image.boot", localfs_config(case, work_dir=tmp_path / "1")).status == 204
            time.sleep(2.5)
            assert not is_erofs(daemon.mnt / "1")
        wait_until(lambda: is_erofs(daemon.mnt / "1"), 60, "the kernel's mount")
        assert daemon.umount("/1").status == 204
        rng = random.Random(8)
        for number in range(8):
            config = localfs_config(case, work_dir=tmp_path / f"u{number}")
            assert daemon.mount("/1", case / "image.boot", config).status == 204
            time.sleep(rng.uniform(0.95, 1.3))
            if number % 2:
                assert daemon.remount("/1", case / "image.boot", config).status == 204
                assert check_mount(case, daemon.mnt / "1") == []
            assert daemon.umount("/1").status == 204
            assert not (daemon.mnt / "1").exists()
            assert marked_devices(tmp_path / f"u{number}") == []
        assert [one.mountpoint for one in kernel.mounts() if one.mountpoint.startswith(f"{daemon.mnt}/")] == []


def test_auto_outlives_the_worker_that_was_patient(tmp_path: Path) -> None:
    case = image_case("v6-zstd-blake3-1m")
    with Nydusd("--fs-driver", "auto") as daemon:
        config = localfs_config(case, work_dir=tmp_path / "cache")

        def mount(number: int) -> None:
            assert daemon.mount(f"/{number}", case / "image.boot", config).status == 204
            assert is_erofs(daemon.mnt / str(number)) == (number > 1)
            old = daemon.worker_pid
            os.kill(old, signal.SIGKILL)
            wait_until(lambda: daemon.running() and daemon.worker_pid != old, 60, "the next worker")
            assert check_mount(case, daemon.mnt / str(number)) == []

        with somebody_waits(daemon, case, tmp_path / "s"):
            for number in (0, 1):
                mount(number)
                assert not is_erofs(daemon.mnt / "0")
        for number in (2, 3):
            wait_until(lambda: is_erofs(daemon.mnt / "0"), 60, "the kernel's mount")
            mount(number)
        assert is_erofs(daemon.mnt / "0")


@pytest.mark.parametrize("driver", ["erofs", "auto"])
def test_a_containers_mounts_are_the_kernels(driver: str) -> None:
    """Prepare and View answer when FUSE shows the image, Mounts when the kernel does; with auto the first one has
    FUSE's, while the kernel's is made for those to come."""
    with snapshotter("--daemon-mode", "shared", fs_driver=driver) as running, Client(running.socket) as client:
        for tag in ("a", "b"):
            meta = pull(client, image_case(CASE), running.work, IMAGE, tag=tag)
            client.view(f"v{tag}", meta)
            lower = Path(option(client.prepare(f"c{tag}", meta)[0], "lowerdir"))
            began = time.monotonic()
            found = client.mounts(f"c{tag}")
            if (driver, tag) == ("auto", "a"):
                with mounted(found, running.work / "rootfs") as rootfs:
                    wait_until(lambda: is_erofs(lower), 60, "the kernel's mount")  # noqa: B023
                    assert rootfs.is_dir()
            assert is_erofs(lower), f"after {time.monotonic() - began:.3f} s"
            with mounted(found, running.work / "rootfs") as rootfs:
                assert check_mount(image_case(CASE), lower) == []
                assert rootfs.is_dir()
