"""SIGKILL at any moment of Prepare, Commit and Remove: database and directories agree after the next start."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import subprocess
import threading
import time
from pathlib import Path

import grpc
import pytest

from tests.lab.process import can_connect, remove_tree, run, unmount_below, wait_until, work_dir
from tests.lab.snapshots import Client, clean
from tests.lab.stack import Snapshotter, daemon_config, program

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

ROUNDS = 6


def churn(socket: Path, number: int, stop: threading.Event) -> None:
    """Layers on layers, some removed again, until the server dies. Keys are never used twice."""
    with contextlib.suppress(grpc.RpcError), Client(socket) as client:
        step = 0
        while not stop.is_set():
            step += 1
            key, name = f"{number}-{step}-{os.urandom(4).hex()}", f"name-{os.urandom(6).hex()}"
            parents = [info.name for info in client.list("kind==committed")] if step % 3 == 0 else []
            client.prepare(key, random.choice(parents) if parents else "")
            if step % 2:
                client.commit(name, key)
            if step % 4 == 0:
                with contextlib.suppress(grpc.RpcError):
                    client.remove(key)
            if step % 10 == 0:
                client.cleanup()


def agree(root: Path) -> None:
    """Every row has its directory; every directory has a row or goes with the next Cleanup; nothing temporary."""
    database = sqlite3.connect(f"file:{root}/metadata.sqlite?mode=ro", uri=True)
    rows = dict(database.execute("SELECT id, kind FROM snapshots"))
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert database.execute("PRAGMA foreign_key_check").fetchall() == []
    database.close()
    names = os.listdir(root / "snapshots")
    assert all(name.isdecimal() for name in names)
    assert {int(name) for name in names} == set(rows)
    for identity, kind in rows.items():
        assert os.stat(root / "snapshots" / str(identity) / "fs").st_mode & 0o7777 == 0o755
        if kind == 2:
            assert (root / "snapshots" / str(identity) / "work").is_dir()


def test_database_and_directories_agree_after_sigkill() -> None:
    work = work_dir()
    ours = Snapshotter(work / "s", daemon_config(prefetch=False), arguments=("--daemon-mode", "dedicated"))
    try:
        for _ in range(ROUNDS):
            ours.start()
            stop = threading.Event()
            threads = [threading.Thread(target=churn, args=(ours.socket, number, stop)) for number in range(4)]
            for thread in threads:
                thread.start()
            time.sleep(random.uniform(0.3, 1.2))
            ours.kill()
            stop.set()
            for thread in threads:
                thread.join(30)
            ours.start()
            with Client(ours.socket) as client:
                clean(client, ours.root)
                for info in client.list():
                    assert client.stat(info.name) == info
                    if info.kind == 2:
                        assert client.mounts(info.name)
            agree(ours.root)
            ours.stop()
    finally:
        ours.kill()
        unmount_below(work)
        remove_tree(work)


def test_a_second_instance_is_told_so_and_stale_sockets_are_replaced() -> None:
    work = work_dir()
    try:
        with Snapshotter(work / "s", daemon_config(prefetch=False), arguments=("--daemon-mode", "dedicated")) as first:
            same_socket = [*first.argv(), "--root", str(work / "other")]
            same_root = [*first.argv(), "--address", str(work / "other.sock")]
            for argv, text in ((same_socket, "served by a living process"), (same_root, "in use by a living process")):
                done = run(argv, timeout=60, check=False)
                assert done.returncode == 1
                assert text in done.stderr
                assert "Traceback" not in done.stderr
                assert len(done.stderr.strip().splitlines()) == 1
            assert can_connect(first.socket)
            first.kill()
            assert first.socket.exists()
            argv = first.argv()
            child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            try:
                deadline = time.monotonic() + 60
                while not can_connect(first.socket):
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            finally:
                child.terminate()
                assert child.wait(60) == 0
            assert not first.socket.exists()
            first.socket.write_text("not a socket")
            done = run(argv, timeout=60, check=False)
            assert done.returncode == 1
            assert "not a socket" in done.stderr
            assert first.socket.read_text() == "not a socket"
    finally:
        unmount_below(work)
        remove_tree(work)


def test_without_root_or_overlayfs_one_line_says_so() -> None:
    work = work_dir()
    template = work / "t.json"
    template.write_text('{"device": {"backend": {"type": "registry", "config": {}}}}')
    work.chmod(0o755)
    argv = [str(program("containerd-nydus-grpc")), "--config-path", str(template), "--root", str(work / "r")]
    argv += ["--address", str(work / "g.sock")]
    try:
        # nobody by way of a user namespace: another real user could not read an environment below /root
        done = run(["unshare", "--user", *argv], timeout=60, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "must run as root" in done.stderr
        # an upper directory cannot lie on an overlay: the same answer as from a kernel without the file system
        script = 'mount -t overlay overlay -o "lowerdir=$1/l,upperdir=$1/u,workdir=$1/w" "$1/r" && shift && exec "$@"'
        for name in ("l", "u", "w", "r"):
            (work / name).mkdir()
        done = run(["unshare", "-m", "sh", "-c", script, "sh", work, *argv], timeout=60, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert "cannot mount overlayfs" in done.stderr
    finally:
        unmount_below(work)
        remove_tree(work)


def fill(folder: Path) -> None:
    for size in (1 << 20, 4096):
        with contextlib.suppress(OSError), (folder / f"filler-{size}-{time.monotonic_ns()}").open("wb", 0) as file:
            while True:
                file.write(b"x" * size)


def test_a_full_disk_is_said_so_and_nothing_is_lost() -> None:
    work = work_dir()
    root = work / "s" / "r"
    root.mkdir(parents=True)
    run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", root])
    try:
        arguments = ("--daemon-mode", "dedicated", "--log-dir", str(work / "logs"))
        with (
            Snapshotter(work / "s", daemon_config(prefetch=False), arguments=arguments) as ours,
            Client(ours.socket) as client,
        ):
            client.prepare("before")
            filler = root / "filler"
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)
            refused = 0
            for number in range(200):
                try:
                    client.prepare(f"full-{number}", "", {"containerd.io/snapshot/x": "y" * 4000})
                except grpc.RpcError as error:
                    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, error
                    refused += 1
            assert refused
            filler.unlink()
            client.prepare("after")
            assert {"before", "after"} <= {info.name for info in client.list()}
            clean(client, root)
            agree(root)
    finally:
        unmount_below(work)
        remove_tree(work)


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_full_disk_is_emptied_by_removing_snapshots(kind: str) -> None:
    """Else nothing that containerd or kubelet does makes room. Also by a snapshotter that was started meanwhile."""
    work = work_dir()
    root = work / "s" / "r"
    root.mkdir(parents=True)
    if kind == "tmpfs":
        run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", root])
    else:
        run(["truncate", "-s", "48M", work / "disk"])
        run(["mkfs.ext4", "-q", "-m", "0", "-b", "4096", work / "disk"])
        run(["mount", "-o", "loop", work / "disk", root])
    try:
        with (
            Snapshotter(work / "s", daemon_config(prefetch=False), arguments=("--log-dir", str(work / "logs"))) as ours,
            Client(ours.socket) as client,
        ):
            said = work / "logs" / "nydus-snapshotter.log"
            # the last of a start that writes to the disk, and removes it
            wait_until(lambda: "images are served by" in said.read_text(), 60, "the self-test of fs_driver")
            for number in range(10):
                layer = Path(client.prepare(f"k{number}")[0].source)
                (layer / "data").write_bytes(bytes(100_000))
                client.commit(f"n{number}", f"k{number}")
            fill(root)
            assert os.statvfs(root).f_bavail == 0
            for number in range(5):
                client.remove(f"n{number}")
            clean(client, root)
            ours.stop()  # and the database's log goes, which had room of its own
            fill(root)
            assert os.statvfs(root).f_bavail == 0
            ours.start()
            for number in range(5, 10):
                client.remove(f"n{number}")
            clean(client, root)
            assert os.statvfs(root).f_bavail * os.statvfs(root).f_frsize > 500_000
            client.prepare("after")
            agree(root)
    finally:
        unmount_below(work)
        remove_tree(work)


def test_without_dev_fuse_plain_images_work() -> None:
    work = work_dir()
    hidden = work / "dev"
    hidden.mkdir()
    ours = Snapshotter(work / "s", daemon_config(prefetch=False))
    script = (
        'mount -t tmpfs none "$1" && for f in null zero random urandom; do cp -a /dev/$f "$1"; done && '
        'mount --bind "$1" /dev && shift && exec "$@"'
    )
    plain = ours.argv
    ours.argv = lambda: ["unshare", "-m", "sh", "-c", script, "sh", str(hidden), *plain()]  # type: ignore[method-assign]
    try:
        (work / "s").mkdir()
        with ours, Client(ours.socket) as client:
            assert client.prepare("plain")
            client.commit("layer", "plain", {"containerd.io/snapshot/nydus-bootstrap": "1"})
            labels = {"containerd.io/snapshot/nydus-bootstrap": "1", "containerd.io/snapshot/cri.image-ref": "a.io/b/c"}
            client.prepare("meta", "", labels)
            (identity,) = [path for path in (ours.root / "snapshots").iterdir() if path.name == "2"]
            (identity / "fs" / "image.boot").write_bytes(b"SFAR\x00\x05\x00\x00" + b"\0" * 8192)
            client.commit("image", "meta", labels)
            with pytest.raises(grpc.RpcError, match="/dev/fuse is missing") as caught:
                client.prepare("container", "image")
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            with pytest.raises(grpc.RpcError, match="not found"):
                client.stat("container")
    finally:
        unmount_below(work)
        remove_tree(work)
