"""Images that come, run and go while others do, with pulls that end halfway and a cache that is collected all the time:
what a container reads is right, whatever happens beside it."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from tests.lab.cases import case
from tests.lab.daemon import can_mount_fuse
from tests.lab.drivers import both
from tests.lab.mounted import load_manifest
from tests.lab.process import wait_until
from tests.lab.served import CASE, IMAGE, snapshotter
from tests.lab.snapshots import PREFIX, REF, Client, mounted, pull
from tests.lab.stack import Snapshotter

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(480),
    pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse()),
]


class Churn:
    def __init__(self, ours: Snapshotter) -> None:
        self.ours = ours
        entries = [one for one in load_manifest(case(CASE))["entries"] if one["path"].isascii()]
        self.folders = [one["path"].lstrip("/") or "." for one in entries if one["type"] == "dir"]
        files = {one["path"].lstrip("/"): one["sha256"] for one in entries if one.get("sha256")}
        self.files = {path: digest for path, digest in files.items() if "\\" not in path and "\n" not in path}

    def live(self, worker: int, lives: int) -> None:
        """The same three images again and again: their layers' names are those of images that were just removed."""
        dice = random.Random(worker)
        with Client(self.ours.socket) as client:
            for life in range(lives):
                mine = f"w{worker}i{life % 3}-"
                meta = pull(client, case(CASE), self.ours.work, IMAGE, tag=mine)
                if dice.random() < 0.5:
                    self.end_halfway(client, dice, mine)
                container = f"container {mine}"
                with mounted(client.prepare(container, meta), self.ours.work / mine) as rootfs:
                    self.check(rootfs, dice)
                client.remove(container)
                self.remove(client, mine)
                if dice.random() < 0.7:
                    client.cleanup()

    def end_halfway(self, client: Client, dice: random.Random, mine: str) -> None:
        """The bootstrap was written in part, or whole, or committed, and the client never came back."""
        ref = f"sha256:{mine}half"
        labels = {REF: ref, PREFIX + "cri.image-ref": IMAGE, PREFIX + "nydus-bootstrap": "true"}
        key, data = f"default/2/extract {ref}", (case(CASE) / "image.boot").read_bytes()
        with mounted(client.prepare(key, "", labels), self.ours.work / f"half {mine}") as target:
            (target / "image").mkdir()
            (target / "image" / "image.boot").write_bytes(data[: dice.choice([0, len(data) // 2, len(data)])])
        if dice.random() < 0.5:
            client.commit(f"default/3/{ref}", key, labels)

    def check(self, rootfs: Path, dice: random.Random) -> None:
        """In a process of its own: a test must not hang with a mount."""
        files, folders = dice.sample(sorted(self.files), 4), dice.sample(self.folders, 2)
        done = subprocess.run(
            ["sh", "-ec", 'ls -la "$1" "$2"; shift 2; sha256sum "$@"', "sh", *folders, *files],
            cwd=rootfs, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stderr}\n{self.ours.nydusd_log()}"
        sums = [line.split()[0] for line in done.stdout.splitlines()[-len(files) :]]
        assert sums == [self.files[path] for path in files]

    def remove(self, client: Client, mine: str) -> None:
        """As containerd's collector does: what has children is tried again."""
        left = [one.name for one in client.list() if mine in one.name]
        while left:
            before = len(left)
            for name in list(left):
                with contextlib.suppress(grpc.RpcError):
                    client.remove(name)
                    left.remove(name)
            assert len(left) < before, left

    def age(self, over: threading.Event) -> None:
        """What a minute does to blobs of the cache: they may be collected."""
        while not over.wait(0.02):
            for path in (self.ours.root / "cache").glob("*"):
                if len(path.name) == 64:
                    with contextlib.suppress(OSError):
                        os.utime(path, (0, 0))


def churn(workers: int, lives: int) -> str:
    """nydusd's log."""
    with snapshotter() as ours, ThreadPoolExecutor(workers + 1) as pool:
        it, over = Churn(ours), threading.Event()
        try:
            aging = pool.submit(it.age, over)
            for done in [pool.submit(it.live, worker, lives) for worker in range(workers)]:
                done.result()
        finally:
            over.set()
        aging.result()
        with Client(ours.socket) as client:
            client.cleanup()
            assert client.list() == []
            wait_until(lambda: os.listdir(ours.root / "mnt") == [], 60, "the unmount of images that nobody has")
        return ours.nydusd_log(100_000)


@both
def test_images_come_and_go() -> None:
    log = churn(4, 8)
    assert "ERROR" not in log
    assert log.count("Rafs filesystem mounted at") >= 32


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_images_come_and_go_for_long() -> None:
    assert "ERROR" not in churn(6, 300)
