"""Starts after the worst: a reboot, a lost database, a broken image among fifty, no registry, a nydusd that hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from snapshotter.nydusd_api import NydusdApi
from tests.lab.cases import case as image_case
from tests.lab.daemon import can_mount_fuse
from tests.lab.drivers import both, fuse_only
from tests.lab.process import (
    kill_together,
    mounts_below,
    remove_tree,
    run,
    signal_all,
    unmount_below,
    wait_until,
    work_dir,
)
from tests.lab.served import CASE, IMAGE, snapshotter, some_file
from tests.lab.snapshots import Client, mounted, option, pull
from tests.lab.stack import Snapshotter, daemon_config, unit_environment

pytestmark = [
    both,
    pytest.mark.root,
    pytest.mark.timeout(240),
    pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse()),
]


@pytest.fixture(params=["shared", "dedicated"])
def ours(request: pytest.FixtureRequest, fs_driver: str) -> Iterator[Snapshotter]:
    with snapshotter("--daemon-mode", request.param) as running:
        yield running


def read(path: Path) -> bytes:
    """In a process of its own: a test must not hang with a mount."""
    return subprocess.run(["cat", path], capture_output=True, check=True, timeout=30).stdout


def lower(mounts: list[object]) -> Path:
    return Path(option(mounts[0], "lowerdir").split(":")[-1])


def reboot(ours: Snapshotter) -> None:
    """All processes and mounts gone, the files there."""
    ours.kill()
    kill_together(ours.daemons())
    wait_until(lambda: not ours.daemons(), 60, "the end of all daemons")
    unmount_below(ours.root)
    assert mounts_below(ours.root) == []


def test_a_lost_database_costs_one_command(ours: Snapshotter) -> None:
    with Client(ours.socket) as client:
        meta = pull(client, image_case(CASE), ours.work, IMAGE)
        mounts = client.prepare("default/4/c1", meta)
        client.prepare("plain")
        client.commit("layer", "plain", {"containerd.io/gc.root": "x"})
        before = client.list()
    with mounted(mounts, ours.work / "c1") as rootfs:
        content = read(rootfs / some_file())
        (rootfs / "written").write_text("kept")
        serving = ours.serving()
        ours.kill()
        path = ours.root / "metadata.sqlite"
        for name in ("metadata.sqlite-wal", "metadata.sqlite-shm"):
            (ours.root / name).unlink(missing_ok=True)
        path.write_bytes(os.urandom(path.stat().st_size))
        refused = run(ours.argv(), timeout=60, check=False)
        assert refused.returncode == 1
        assert "--repair" in refused.stderr and "Traceback" not in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
        repaired = run([*ours.argv(), "--repair"], timeout=60)
        assert f"{len(before)} snapshots, 1 nydusd and 1 mounted images" in repaired.stdout
        ours.start()
        with Client(ours.socket) as client:
            busy = run([*ours.argv(), "--repair"], timeout=60, check=False)
            assert busy.returncode == 1 and "stop it" in busy.stderr
            assert client.list() == before
            assert client.mounts("default/4/c1") == mounts
            assert read(rootfs / some_file()) == content
            assert ours.serving() == serving
            client.cleanup()
            assert read(rootfs / "written") == b"kept"
            (again,) = client.prepare("default/5/c2", meta)
            assert read(lower([again]) / some_file()) == content
            assert len(ours.services()) == 1


def test_after_a_reboot_containers_start_again(ours: Snapshotter) -> None:
    with Client(ours.socket) as client:
        meta = pull(client, image_case(CASE), ours.work, IMAGE)
        mounts = client.prepare("default/4/c1", meta)
        content = read(lower(mounts) / some_file())
        with mounted(mounts, ours.work / "c1") as rootfs:
            (rootfs / "written").write_text("kept")
    for _ in range(2):
        reboot(ours)
        ours.start()
        with Client(ours.socket) as client:
            assert client.mounts("default/4/c1") == mounts
            with mounted(mounts, ours.work / "c1") as rootfs:
                assert read(rootfs / some_file()) == content
                assert read(rootfs / "written") == b"kept"
        assert len(ours.services()) == 1


@pytest.mark.parametrize("ours", ["shared"], indirect=True)
def test_one_broken_image_among_fifty(ours: Snapshotter) -> None:
    with Client(ours.socket) as client:
        metas = [pull(client, image_case(CASE), ours.work, IMAGE, tag=f"i{number}-") for number in range(50)]
        with ThreadPoolExecutor(8) as pool:
            mounts = list(pool.map(lambda meta: client.prepare(f"c {meta}", meta), metas))
        content = read(lower(mounts[0]) / some_file())
        broken = lower(mounts[20]).name
        boot = ours.root / "snapshots" / broken / "fs" / "image" / "image.boot"
        reboot(ours)
        good = boot.read_bytes()
        boot.write_bytes(good[:5000] + os.urandom(len(good) - 5000))
        ours.start()
    with Client(ours.socket) as client:
        client.prepare("plain")
        for number, meta in enumerate(metas):
            if number == 20:
                continue
            assert client.mounts(f"c {meta}") == mounts[number]
            assert read(lower(mounts[number]) / some_file()) == content
        with pytest.raises(grpc.RpcError) as caught:
            client.mounts(f"c {metas[20]}")
        assert "image" in str(caught.value.details())
        assert len(ours.services()) == 1
        # pulled again, nothing else is needed
        boot.write_bytes(good)
        assert client.mounts(f"c {metas[20]}") == mounts[20]
        assert read(lower(mounts[20]) / some_file()) == content


def test_without_a_registry_starts_do_not_wait() -> None:
    """Its address swallows what is sent: nothing is refused, nothing answered."""
    work = work_dir()
    config = daemon_config(prefetch=True)
    try:
        with Snapshotter(work / "s", config) as ours:
            with Client(ours.socket) as client:
                image = "192.0.2.1:5000/lab/merged:v6"
                metas = [pull(client, image_case(CASE), ours.work, image, tag=f"i{number}-") for number in range(5)]
                mounts = [client.prepare(f"c {meta}", meta) for meta in metas]
            reboot(ours)
            ours.start()
            with Client(ours.socket) as client:
                client.prepare("plain")
                assert client.mounts("plain")
                assert [client.mounts(f"c {meta}") for meta in metas] == mounts
                for mount in mounts:  # metadata is here
                    assert os.path.exists(lower(mount) / some_file())
    finally:
        unmount_below(work)
        remove_tree(work)


@pytest.mark.parametrize("ours", ["shared"], indirect=True)
def test_two_hundred_containers_of_twenty_images_at_once(ours: Snapshotter, fs_driver: str) -> None:
    with Client(ours.socket) as client:
        metas = [pull(client, image_case(CASE), ours.work, IMAGE, tag=f"i{number}-") for number in range(20)]
        with ThreadPoolExecutor(200) as pool:
            mounts = list(pool.map(lambda number: client.prepare(f"c{number}", metas[number % 20]), range(200)))
        assert len({lower(mount) for mount in mounts}) == 20
        assert len(ours.services()) == 1
        log = (ours.root / "logs" / "nydus-snapshotter.log").read_text()
        assert log.count(" mounted at ") == 20
        assert [client.mounts(f"c{number}") for number in range(20)] == mounts[:20]  # with which containers start
        points = mounts_below(ours.root)
        # images are directories of the one mount, under EROFS mounts of their own
        assert len(points) == len(set(points)) == (1 if fs_driver == "fuse" else 21)
        for mount in mounts[:20]:
            assert read(lower(mount) / some_file())
        with ThreadPoolExecutor(64) as pool:
            list(pool.map(lambda number: client.remove(f"c{number}"), range(200)))
        client.cleanup()


@pytest.mark.parametrize("ours", ["dedicated"], indirect=True)
def test_a_hanging_nydusd_holds_up_its_own_image_only(ours: Snapshotter) -> None:
    with Client(ours.socket) as client:
        metas = [pull(client, image_case(CASE), ours.work, IMAGE, tag=f"i{number}-") for number in range(2)]
        mounts = []
        stopped: list[int] = []
        for meta in metas:
            before = set(ours.daemons())
            mounts.append(client.prepare(f"c {meta}", meta))
            stopped = sorted(set(ours.daemons()) - before)
    ours.kill()
    signal_all(stopped, signal.SIGSTOP)
    try:
        ours.start()
        with Client(ours.socket) as client:
            client.prepare("plain")
            client.list()
            assert client.mounts(f"c {metas[0]}") == mounts[0]
            assert read(lower(mounts[0]) / some_file())
            with ThreadPoolExecutor(150) as pool:
                waiting = [pool.submit(client.mounts, f"c {metas[1]}") for _ in range(150)]
                time.sleep(1)
                assert not any(one.done() for one in waiting)
                client.prepare("plain2")
                assert client.mounts(f"c {metas[0]}") == mounts[0]
                signal_all(stopped, signal.SIGCONT)
                assert all(one.result(60) == mounts[1] for one in waiting)
    finally:
        signal_all(stopped, signal.SIGCONT)


def test_an_upgrade_right_behind_a_start_is_one(ours: Snapshotter) -> None:
    """What is asked for while nydusd is being found again, or started, waits for that: 200 must not mean nothing."""
    with Client(ours.socket) as client:
        meta = pull(client, image_case(CASE), ours.work, IMAGE)
        (mount,) = client.prepare("c1", meta)
    (api,) = (NydusdApi(path) for path in (ours.root / "socket").glob("*/api.sock"))
    system = NydusdApi(ours.root / "system.sock")

    def upgrade() -> None:
        assert system.call("PUT", "/api/v1/daemons/upgrade", {"policy": "rolling"}, timeout=120) is None

    before = api.info()["worker_pid"]
    ours.stop()
    stopped = ours.daemons()
    signal_all(stopped, signal.SIGSTOP)
    try:
        ours.start()
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(upgrade)
            time.sleep(1)
            assert not asked.done()
            signal_all(stopped, signal.SIGCONT)
            asked.result(120)
    finally:
        signal_all(stopped, signal.SIGCONT)
    assert api.info()["worker_pid"] != before
    assert read(lower([mount]) / some_file())
    reboot(ours)
    ours.start()
    upgrade()
    assert read(lower([mount]) / some_file())


@fuse_only("it is about environment and limits")
def test_what_the_unit_sets_for_the_snapshotter_is_not_for_nydusd() -> None:
    work = work_dir()
    backend = {"type": "localfs", "config": {"dir": str(image_case(CASE))}}
    config = {"device": {"backend": backend, "cache": {"type": "blobcache"}}, "mode": "direct"}
    try:
        with Snapshotter(work / "s", config, env=unit_environment()) as running:
            wait_until(lambda: bool(running.services()), 60, "nydusd")
            assert b"GLIBC_TUNABLES=" in Path(f"/proc/{running.pid}/environ").read_bytes()
            for pid in running.services():
                assert b"GLIBC_TUNABLES=" not in Path(f"/proc/{pid}/environ").read_bytes()
    finally:
        unmount_below(work)
        remove_tree(work)
