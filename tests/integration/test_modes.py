"""Who may open what the programs make: every directory, file and socket, under a umask that takes nothing away."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.daemon import Nydusd, can_mount_fuse, localfs_config, reader
from tests.lab.drivers import both
from tests.lab.process import remove_tree, unmount_below, wait_until, work_dir
from tests.lab.snapshots import Client, option, pull
from tests.lab.stack import Snapshotter
from tests.lab.tiny import noise, tiny_image

pytestmark = [both, pytest.mark.root, pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse())]

# What is not closed to everybody but root: a layer's own root and what overlayfs demands, mount points, and logs.
_OPEN = (
    (r"r/snapshots/\d+/fs", 0o755),
    (r"r/snapshots/\d+/fs/.*", None),  # a layer's files are as the layer says
    (r"r/snapshots/\d+/work", 0o711),
    (r"r/snapshots/\d+/work/.*", None),  # overlayfs' own
    (r"r/mnt|r/snapshots/\d+/mnt", 0o750),  # seen only while nothing is mounted there
    (r"logs(/[0-9a-v]{20})?", 0o750),
    (r"logs/(.*/)?[^/]+\.(log|out)", 0o640),
)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def paths(top: Path) -> Iterator[Path]:
    """Everything below, not looking into mounts."""
    try:
        device, entries = top.lstat().st_dev, sorted(top.iterdir())
    except FileNotFoundError:  # a folder of the cache that got its name meanwhile
        return
    for entry in entries:
        try:
            if entry.lstat().st_dev != device:
                continue
        except FileNotFoundError:
            continue
        yield entry
        if entry.is_dir() and not entry.is_symlink():
            yield from paths(entry)


def too_open(work: Path, ours: tuple[str, ...]) -> list[str]:
    """One line per path whose mode is not the one it should have; `ours`: what the programs made, below `work`."""
    wrong = []
    for path in paths(work):
        name = path.relative_to(work).as_posix()
        if not any(name == one or name.startswith(one + "/") for one in ours):
            continue
        try:
            facts = path.lstat()
        except FileNotFoundError:  # written, and got its name meanwhile
            continue
        wanted: int | None = 0o700 if stat.S_ISDIR(facts.st_mode) else 0o600
        for pattern, mode in _OPEN:
            if re.fullmatch(pattern, name):
                wanted = mode
        if wanted is not None and stat.S_IMODE(facts.st_mode) != wanted:
            wrong.append(f"{name}: {stat.filemode(facts.st_mode)}, expected {wanted:o}")
    return wrong


@pytest.mark.parametrize(("mode", "policy"), [("shared", "failover"), ("dedicated", "restart")])
def test_the_snapshotter_and_its_nydusd(mode: str, policy: str) -> None:
    work = work_dir()
    try:
        case = work / "case"
        case.mkdir()
        made = tiny_image(case, {"f": noise(300_000), "g": b"x"})
        os.rename(made.bootstrap, case / "image.boot")
        (case / made.blob_id).write_bytes(made.blob)
        (work / "s.toml").write_text(
            f'version = 1\n[system]\nenable = true\naddress = "{work}/sys/system.sock"\n[log]\ndir = "{work}/logs"\n'
            f'[daemon]\nrecover_policy = "{policy}"\n'
            f'[cache_manager]\ncache_dir = "{work}/cache"\n[remote.auth]\nenable_cri_keychain = true\n'
            f'image_service_address = "{work}/none.sock"\n'
        )
        config = {
            "device": {
                "backend": {"type": "localfs", "config": {"dir": str(case)}},
                "cache": {"type": "blobcache", "config": {"work_dir": "x"}},
            },
            "mode": "direct",
        }
        arguments = ("--config", str(work / "s.toml"), f"--daemon-mode={mode}", "--address", str(work / "run/g.sock"))
        running = Snapshotter(work, config, arguments=arguments)
        running.socket = work / "run" / "g.sock"
        try:
            with umask(0):
                running.start()
            with Client(running.socket) as client:
                label = {"containerd.io/snapshot/pullusername": "u", "containerd.io/snapshot/pullsecret": "p"}
                label |= {"containerd.io/snapshot/cri.image-ref": "127.0.0.1:1/lab/a:b"}
                with umask(0o22):  # what the test itself unpacks
                    meta = pull(client, case, work, "127.0.0.1:1/lab/a:b")
                (mount,) = client.prepare("default/4/c1", meta, label)
                lower = option(mount, "lowerdir")
                done = reader("import sys; print(len(open(sys.argv[1]+'/f','rb').read()))", lower)
                assert done.stdout.strip() == "300000", done.stderr
                client.view("default/5/v", meta)
                client.prepare("default/6/plain", "")
                client.remove("default/5/v")
                client.cleanup()
            # a reader has its bytes before the cache has them
            wait_until(lambda: any((work / "cache").glob("[0-9a-f]*/*-*")), 60, "a cached segment")
            names = {path.relative_to(work).as_posix() for path in paths(work)}
            sockets = {name for name in names if (work / name).is_socket()}
            assert {"run/g.sock", "sys/system.sock", "r/system.sock"} < sockets
            assert len([name for name in sockets if re.fullmatch(r"r/socket/[0-9a-v]{20}/api\.sock", name)]) == 1
            assert any(re.fullmatch(r"cache/[0-9a-f]{64}/\d+-[0-9a-f]+(\..*)?", name) for name in names), names
            assert any(re.fullmatch(r"r/config/.*/config\.json", name) for name in names)
            assert any(re.fullmatch(r"r/auth/.*\.json", name) for name in names)
            assert any(re.fullmatch(r"logs/[0-9a-v]{20}/nydusd\.log", name) for name in names), names
            assert (work / "r" / "supervisor").is_dir() == (policy == "failover")
            lines = too_open(work, ("r", "run", "sys", "logs", "cache", "cache.profiles"))
            assert not lines, "\n".join(lines)
            assert stat.S_IMODE(running.root.stat().st_mode) == 0o700
        finally:
            running.stop()
            running.end_daemons()
    finally:
        unmount_below(work)
        remove_tree(work)


def test_a_nydusd_by_itself() -> None:
    work = work_dir()
    try:
        made = tiny_image(work, {"f": noise(300_000)})
        (work / made.blob_id).write_bytes(made.blob)
        (work / "n.json").write_text(localfs_config(work, work_dir=work / "cache"))
        daemon = Nydusd("--bootstrap", made.bootstrap, "--config", work / "n.json", "--log-file", work / "logs/d.log",
                        directory=work)  # fmt: skip
        daemon.sock = work / "run" / "a.sock"
        daemon.sock.parent.mkdir(mode=0o700)
        try:
            with umask(0):
                daemon.start()
            done = reader("import sys; print(len(open(sys.argv[1]+'/f','rb').read()))", daemon.mnt)
            assert done.stdout.strip() == "300000", done.stderr
            before = daemon.worker_pid
            os.kill(before, 9)  # what its successor makes
            done = reader("import sys; print(len(open(sys.argv[1]+'/f','rb').read()))", daemon.mnt)
            assert done.stdout.strip() == "300000" and daemon.worker_pid != before
            wait_until(lambda: any((work / "cache").glob("[0-9a-f]*/*-*")), 60, "a cached segment")
            names = {path.name for path in paths(work)}
            assert {"a.sock", "d.log", made.blob_id, ".maps"} <= names, names
            assert not (lines := too_open(work, ("run", "logs", "cache", "cache.profiles"))), "\n".join(lines)
        finally:
            daemon.stop()
    finally:
        unmount_below(work)
        remove_tree(work)
