"""What one daemon needs under a thousand mounts, two hundred starts at once, hours of work, and no work at all."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.lab.crowd import many_mounts, many_starts, memory, ticks, until_idle
from tests.lab.daemon import Nydusd, can_mount_fuse, localfs_config
from tests.lab.drivers import both
from tests.lab.process import wait_until
from tests.lab.soak import soak
from tests.lab.tiny import noise, tiny_image

pytestmark = [pytest.mark.root, pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse())]


@pytest.mark.timeout(400)  # each time somebody else on this machine drops its caches, the daemon wakes
@both
def test_an_idle_daemon_sleeps_and_is_small(tmp_path: Path) -> None:
    """No thread of the three processes wakes up once in six seconds, with images mounted and read before."""
    image = tiny_image(tmp_path, {"f": noise(1 << 20)})
    (tmp_path / image.blob_id).write_bytes(image.blob)
    with Nydusd() as daemon:
        assert memory(daemon)["pss"] < 60
        for number in range(3):
            config = localfs_config(tmp_path, work_dir=tmp_path / f"cache{number}")
            assert daemon.mount(f"/{number}", image.bootstrap, config).status == 204
            assert (daemon.mnt / str(number) / "f").read_bytes() == image.files["f"]
        until_idle(daemon, 300)
        assert len(ticks(daemon)) == 3
        assert memory(daemon)["pss"] < 60


@both
def test_what_is_unmounted_is_let_go_of_at_once(tmp_path: Path) -> None:
    """Not when the cycle collector comes by, which an idle daemon does not call: the file of an image that was removed
    would take up its room on the disk meanwhile. Also by a worker that has followed another one."""
    images = [tiny_image(tmp_path, {f"f{n}": noise(300_000, n)}) for n in range(4)]
    for image in images:
        (tmp_path / image.blob_id).write_bytes(image.blob)
    bootstraps = {str(image.bootstrap) for image in images}

    def held(pid: int) -> set[str]:
        found = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}
        mapped = {line.split()[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()}
        return {path for path in found | mapped if path in bootstraps or "/.maps/" in path}

    with Nydusd() as daemon:
        for dies in (False, True):
            for number, image in enumerate(images):
                config = localfs_config(tmp_path, work_dir=tmp_path / "cache")
                assert daemon.mount(f"/{number}", image.bootstrap, config).status == 204
            if dies:
                old = daemon.worker_pid
                os.kill(old, signal.SIGKILL)
                wait_until(lambda: daemon.running() and daemon.worker_pid != old, 60, "the next worker")  # noqa: B023
            for number, image in enumerate(images):
                for name, content in image.files.items():
                    assert (daemon.mnt / str(number) / name).read_bytes() == content
            assert len(held(daemon.worker_pid)) >= 2 * len(images)
            pid = daemon.worker_pid
            for number in range(len(images)):
                assert daemon.umount(f"/{number}").status == 204
            # nobody asks it anything meanwhile, which might call the collector
            wait_until(lambda: not held(pid), 30, "the end of what a thread was still at")  # noqa: B023


def _check_starts(starts: int, images: int, latency: float, *, idle: bool = False) -> None:
    figures = many_starts(starts, images, latency, idle=idle)
    assert figures["wrong"] == []
    assert figures["processes"] == 3
    assert figures["requests"] <= 1.05 * figures["distinct ranges"]
    assert figures["token requests"] <= 4
    assert figures["worker's peak, MiB"] < 200
    assert figures.get("processor time of 10 s idle, ticks", 0) == 0


@pytest.mark.timeout(180)
@both
def test_sixty_starts_at_once_ask_for_each_range_once() -> None:
    _check_starts(60, 6, 0.3)


@pytest.mark.long
def test_two_hundred_starts_at_once_from_a_registry_of_five_seconds() -> None:
    _check_starts(200, 20, 5.0, idle=True)


@pytest.mark.long
def test_a_thousand_mounts() -> None:
    figures = many_mounts(1000)
    assert figures["wrong"] == []
    assert figures["with all, MiB"]["anon"] < 120
    assert figures["descriptors"] < 2100
    assert figures["descriptors after"] < 50
    assert figures["processor time of 10 s idle, ticks"] == 0


@pytest.mark.long
def test_minutes_of_mixed_load_leave_nothing_behind() -> None:
    """`python -m tests.lab.soak` runs for hours and judges memory too, for which minutes are too short."""
    report = soak(float(os.environ.get("NYDUS_SOAK_SECONDS", "240")), 5, None)
    assert (report["wrong"], report["errors"], report["stuck"], report["said"]) == (0, 0, 0, [])
    counted = ("threads", "mounts", "segments", "processes")
    assert [name for name in report["grew"] if name.rpartition(".")[2] in counted] == []
