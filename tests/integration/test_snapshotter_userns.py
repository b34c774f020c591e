"""Containers in user namespaces: an image is mounted once for each mapping, owners as the namespace has them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.lab.cases import case as image_case
from tests.lab.daemon import can_mount_fuse
from tests.lab.mounted import load_manifest
from tests.lab.paths import REPO
from tests.lab.process import kill_together, mounts_below, remove_tree, run, unmount_below, wait_until, work_dir
from tests.lab.served import CASE, IMAGE, snapshotter
from tests.lab.snapshots import PREFIX, Client, mounted, option, pull
from tests.lab.stack import Snapshotter

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(180),
    pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse()),
]

COUNT = 65536
IN_NAMESPACE = [sys.executable, "-m", "tests.lab.userns"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO)}


@pytest.fixture(params=["shared", "dedicated"])
def ours(request: pytest.FixtureRequest) -> Iterator[Snapshotter]:
    with snapshotter("--daemon-mode", request.param) as running:
        yield running


def labels(host: int) -> dict[str, str]:
    return {PREFIX + "uidmapping": f"0:{host}:{COUNT}", PREFIX + "gidmapping": f"0:{host}:{COUNT}"}


def owners_below(lower: Path, host: int) -> int:
    """How many entries were compared with what the image says, moved by `host`."""
    compared = 0
    for entry in load_manifest(image_case(CASE))["entries"]:
        path = os.fsencode(lower) + entry["path"].encode("utf-8", "surrogateescape")
        if entry["path"] == "/" or not os.path.lexists(path):
            continue
        found = os.lstat(path)
        expected = [one + host if one < COUNT else one for one in (entry["uid"], entry["gid"])]
        assert [found.st_uid, found.st_gid] == expected, entry["path"]
        compared += 1
    return compared


def test_the_life_of_an_image_in_user_namespaces(ours: Snapshotter) -> None:
    with Client(ours.socket) as client:
        meta = pull(client, image_case(CASE), ours.work, IMAGE)
        plain = client.prepare("default/4/plain", meta)
        mounts = {host: client.prepare(f"default/4/u{host}", meta, labels(host)) for host in (100_000, 300_000)}
        lower = {host: Path(option(found[0], "lowerdir")) for host, found in mounts.items()}
        assert len({option(plain[0], "lowerdir"), *map(str, lower.values())}) == 3
        for host, path in lower.items():
            assert path.name.endswith(f"-{host}")
            assert owners_below(path, host) > 20
            (mount,) = mounts[host]
            # nydusd shows the owners mapped: containerd must not map them again
            assert not option(mount, "uidmap")
            for name in ("upperdir", "workdir"):
                assert os.stat(option(mount, name)).st_uid == host
        assert owners_below(Path(option(plain[0], "lowerdir")), 0) > 20
        assert len(ours.services()) == (1 if ours.arguments[-1] == "shared" else 3)

        # root of the namespace may write to what is root's, and sees itself as the owner
        with mounted(mounts[100_000], ours.work / "u") as rootfs:
            script = "stat -c %u:%g . && touch new-file && stat -c %u new-file"
            asked = run([*IN_NAMESPACE, "100000", "sh", "-c", script], timeout=30, cwd=rootfs, env=ENVIRONMENT)
            assert asked.stdout.split() == ["0:0", "0"]
            assert os.stat(rootfs / "new-file").st_uid == 100_000

        # another container of the same pod, and what both leave when they go
        assert (
            client.prepare("default/4/second", meta, labels(100_000))[0].options[-1] == mounts[100_000][0].options[-1]
        )
        client.remove("default/4/u100000")
        client.cleanup()
        assert owners_below(lower[100_000], 100_000) > 20
        client.remove("default/4/second")
        client.cleanup()
        wait_until(lambda: not (lower[100_000].is_dir() and os.listdir(lower[100_000])), 60, "the unmount")
        assert owners_below(lower[300_000], 300_000) > 20

        # deaths of both programs
        kill_together(ours.daemons())
        ours.kill()
        ours.start()
    with Client(ours.socket) as client:
        assert client.mounts("default/4/u300000") == mounts[300_000]
        assert owners_below(lower[300_000], 300_000) > 20
        # and of the database
        ours.stop()
        for name in ours.root.glob("metadata.sqlite*"):
            name.unlink()
        assert "mounted images are on record again" in run([*ours.argv(), "--repair"], timeout=60).stdout
        ours.start()
    with Client(ours.socket) as client:
        assert client.mounts("default/4/u300000") == mounts[300_000]
        assert owners_below(lower[300_000], 300_000) > 20
        for key in ("default/4/u300000", "default/4/plain", meta):
            client.remove(key)
        client.cleanup()
        root = str(ours.root / "mnt")
        wait_until(lambda: [path for path in mounts_below(ours.root) if path != root] == [], 60, "the unmount")
        wait_until(lambda: os.listdir(root) == [], 60, "the unmount")


@pytest.mark.parametrize("ours", ["shared"], indirect=True)
def test_what_cannot_be_mapped_is_said(ours: Snapshotter) -> None:
    with Client(ours.socket) as client:
        meta = pull(client, image_case(CASE), ours.work, IMAGE)
        unequal = {**labels(1000), PREFIX + "gidmapping": "0:2000:65536"}
        with pytest.raises(grpc.RpcError, match="must be equal"):
            client.prepare("default/4/a", meta, unequal)
        assert [info.name for info in client.list("kind==active")] == []


def test_overlay_marks_where_trusted_ones_are_not_allowed() -> None:
    """The snapshotter itself in a user namespace: `userxattr` in every overlay, and the overlay mounts there."""
    work = work_dir()
    script = (
        "import sys, subprocess; from pathlib import Path\n"
        "from snapshotter.system import in_user_namespace, overlay_works\n"
        "from snapshotter.mounts import Layout\nfrom snapshotter.store import Kind, Snapshot\n"
        "folder = Path(sys.argv[1]); assert in_user_namespace() and overlay_works(folder, 'userxattr')\n"
        "for one in ('1/fs', '2/fs', '2/work', 'm'): (folder / one).mkdir(parents=True)\n"
        "(folder / '1/fs/gone').write_text('x')\n"
        "chain = [Snapshot(n, '', '', Kind.ACTIVE, 0, 0, 0, 0, {}) for n in (2, 1)]\n"
        "(mount,) = Layout(folder, userxattr=True).ordinary(chain)\n"
        "assert mount.options[0] == 'userxattr'\n"
        "command = ['mount', '-t', 'overlay', 'overlay', folder / 'm', '-o', ','.join(mount.options)]\n"
        "subprocess.run(command, check=True)\n"
        "(folder / 'm/gone').unlink(); (folder / 'm/new').write_text('y')\n"
        "print(sorted(path.name for path in (folder / 'm').iterdir()))\n"
    )
    try:
        command = [*IN_NAMESPACE, "0+mount", sys.executable, "-c", script, str(work)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout.strip()) == (0, "['new']"), done.stderr
    finally:
        unmount_below(work)
        remove_tree(work)
