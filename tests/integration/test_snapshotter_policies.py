"""`recover_policy`: what running containers notice when all processes of their nydusd die at once."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.lab.cases import case as image_case
from tests.lab.daemon import can_mount_fuse
from tests.lab.drivers import both
from tests.lab.failover import survive
from tests.lab.mounted import check_mount
from tests.lab.paths import ref_bin
from tests.lab.process import kill_together, wait_until
from tests.lab.served import CASE, IMAGE, snapshotter
from tests.lab.snapshots import Client, clean, mounted, option, pull
from tests.lab.stack import Snapshotter

pytestmark = [
    both,
    pytest.mark.root,
    pytest.mark.interop,
    pytest.mark.timeout(180),
    pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse()),
]

ENOTCONN = "Transport endpoint is not connected"


@pytest.fixture(params=["none", "restart", "failover"])
def ours(request: pytest.FixtureRequest, mode: str, fs_driver: str) -> Iterator[Snapshotter]:
    real = ref_bin("nydusd") if mode == "upstream" else None
    if mode == "upstream" and real is None:
        pytest.skip("interop: upstream's nydusd is not here")
    words = ("--daemon-mode", "shared" if mode == "upstream" else mode, "--recover-policy", request.param)
    with snapshotter(*words, upstream=real) as running:
        yield running


def wrong(path: Path) -> list[str]:
    upstream_changes = (": mtime is ", "'/': ")
    lines = check_mount(image_case(CASE), path)
    return [line for line in lines if not any(text in line for text in upstream_changes)]


def right(path: Path) -> bool:
    return wrong(path) == []


def stat_of(path: Path) -> str:
    """What a program is told that asks the mount itself; "" for no error."""
    done = subprocess.run(["stat", "-f", path], capture_output=True, text=True, timeout=60, check=False)
    return done.stderr if done.returncode else ""


def two_images(client: Client, ours: Snapshotter) -> list[Path]:
    lower = []
    for tag in ("a", "b"):
        meta = pull(client, image_case(CASE), ours.work, IMAGE, tag=tag)
        lower.append(Path(option(client.prepare(f"c{tag}", meta)[0], "lowerdir")))
    return lower


@pytest.mark.parametrize("ours", ["failover"], indirect=True)
@pytest.mark.parametrize(
    ("mode", "fs_driver"),
    [(mode, driver) for driver in ("fuse", "erofs") for mode in ("shared", "dedicated")] + [("upstream", "fuse")],
    indirect=["fs_driver"],
)
def test_failover_keeps_the_mounts(ours: Snapshotter, mode: str) -> None:
    """Directories held open, the working directory of a process, a container's overlay: all go on, also after a restart
    of the snapshotter."""
    with Client(ours.socket) as client:
        lower = two_images(client, ours)
        held = [os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in lower]
        with (
            mounted(client.mounts("ca"), ours.work / "rootfs") as rootfs,
            subprocess.Popen(["sleep", "100"], cwd=lower[0]) as inside,
        ):
            try:
                names = sorted(os.listdir(lower[0]))
                for number in range(2):
                    if number == 1:
                        ours.kill()
                        ours.start()
                        with Client(ours.socket) as again:
                            again.mounts("ca")
                            again.mounts("cb")
                    old = ours.daemons()
                    kill_together(old)
                    for path in (*lower, rootfs, Path(f"/proc/{inside.pid}/cwd")):
                        assert stat_of(path) == ""
                    assert sorted(os.listdir(f"/proc/{inside.pid}/cwd/")) == names
                    assert [sorted(os.listdir(one)) for one in held] == [names, names]
                    assert [wrong(one) for one in lower] == [[], []]
                    assert set(names) <= set(os.listdir(rootfs))
            finally:
                inside.kill()
    # changes after a take-over are known to the one after it
    with Client(ours.socket) as client:
        meta = pull(client, image_case(CASE), ours.work, IMAGE, tag="c")
        third = Path(option(client.prepare("cc", meta)[0], "lowerdir"))
        client.remove("cb")
        client.remove("default/3/sha256:bmeta")
        clean(client, ours.root)
        wait_until(lambda: not (lower[1].is_dir() and os.listdir(lower[1])), 60, "the unmount")
        kill_together(ours.daemons())
        assert stat_of(third) == "" and right(third) and right(lower[0])
        assert not (lower[1].is_dir() and os.listdir(lower[1]))
        for descriptor in held:
            os.close(descriptor)


def test_readers_go_on_whatever_ends(fs_driver: str) -> None:
    """Of nydusd: all processes killed at one moment, its code replaced; of the snapshotter: a restart between two
    deaths. See `lab.failover`."""
    seen = survive("kill", "upgrade", "restart", "kill")
    assert (seen.wrong, seen.errors, seen.said) == (0, 0, [])
    assert seen.waited and seen.reads > 100


@pytest.mark.parametrize("ours", ["restart"], indirect=True)
@pytest.mark.parametrize("mode", ["shared"])
def test_restart_makes_new_mounts(ours: Snapshotter, mode: str, fs_driver: str) -> None:
    with Client(ours.socket) as client:
        lower = two_images(client, ours)
        with subprocess.Popen(["sleep", "100"], cwd=lower[0]) as inside:
            try:
                kill_together(ours.daemons())
                wait_until(lambda: all(stat_of(one) == "" and right(one) for one in lower), 60, "the new mounts")
                if fs_driver == "fuse":  # an EROFS mount shows its tree, and EIO for what is not here
                    assert ENOTCONN in stat_of(Path(f"/proc/{inside.pid}/cwd"))
            finally:
                inside.kill()


@pytest.mark.parametrize("ours", ["none"], indirect=True)
@pytest.mark.parametrize("mode", ["shared"])
def test_none_leaves_it_to_who_comes_next(ours: Snapshotter, mode: str) -> None:
    with Client(ours.socket) as client:
        lower = two_images(client, ours)
        kill_together(ours.daemons())
        time.sleep(2)  # longer than the others take
        assert ours.daemons() == []
        assert ENOTCONN in stat_of(lower[0])
        # a new container is not refused
        client.prepare("new", "default/3/sha256:ameta")
        wait_until(lambda: stat_of(lower[0]) == "", 60, "the new mount")
        assert right(lower[0])


@pytest.mark.parametrize("ours", ["failover"], indirect=True)
@pytest.mark.parametrize("mode", ["shared"])
def test_a_take_over_that_fails_is_a_restart(ours: Snapshotter, mode: str) -> None:
    """The image's bootstrap is gone: the next process cannot open it, the other image is served all the same."""
    with Client(ours.socket) as client:
        lower = two_images(client, ours)
        boots = sorted((ours.root / "snapshots").glob("*/fs/image/image.boot"), key=lambda path: int(path.parts[-4]))
        boots[0].unlink()
        kill_together(ours.daemons())
        wait_until(lambda: stat_of(lower[1]) == "" and right(lower[1]), 60, "the other image")
        assert len(ours.services()) == 1, "each attempt has ended, its worker and all"
        with pytest.raises(grpc.RpcError, match="holds no image"):
            ours.kill()
            kill_together(ours.daemons())
            ours.start()
            with Client(ours.socket) as again:
                again.mounts("ca")
