"""The shipped unit under a real systemd, process 1 of a container: restarts, kills and a package update under a reader
whose root file system is a Nydus image.

The reader stands for a container: an overlay mount over the image, a process with its working directory and an open
file in it. The update puts another version of the package in the place of the one that runs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.errors import SnapshotterError
from snapshotter.nydusd_api import NydusdApi
from tests.lab.cases import case as image_case
from tests.lab.daemon import can_mount_fuse
from tests.lab.mounted import load_manifest
from tests.lab.paths import REPO
from tests.lab.process import can_connect, remove_tree, unmount_below, wait_until, work_dir
from tests.lab.snapshots import Client, pull
from tests.lab.systemd import Systemd, missing

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(480),
    pytest.mark.skipif(missing() != "", reason=missing()),
    pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse()),
]

IMAGE = "127.0.0.1:1/lab/merged:v6"
CASE = "v6-merged3"
UNIT = "containerd-nydus-grpc.service"
PROGRAMS = {"containerd-nydus-grpc": "snapshotter.cli", "nydusd": "nydusfs.daemon.cli"}
READER = """
import hashlib, os, subprocess, sys
mounts, held = sys.argv[1:3]
os.makedirs("/run/rootfs")
subprocess.run(["mount", "-t", "overlay", "overlay", "/run/rootfs", "-o", mounts], check=True)
os.chdir("/run/rootfs")
with open(held, "rb") as file:
    for line in sys.stdin:
        names = os.listdir(".")
        os.statvfs(".")
        file.seek(0)
        with open(line.rstrip("\\n"), "rb") as other:
            print(hashlib.sha256(other.read()).hexdigest(), hashlib.sha256(file.read()).hexdigest(), flush=True)
"""


class Installed:
    """The package as copied files, two programs that use them, and the unit."""

    def __init__(self, work: Path) -> None:
        self.work, self.root, self.socket = work, work / "r", work / "g.sock"
        self.copy("lib")
        (work / "bin").mkdir()
        for name, module in PROGRAMS.items():
            program = work / "bin" / name
            program.write_text(f"#!{sys.executable}\nfrom {module} import main\nmain()\n")
            program.chmod(0o755)
        backend = {"type": "localfs", "config": {"dir": str(image_case(CASE))}}
        config = {"device": {"backend": backend, "cache": {"type": "blobcache"}}, "mode": "direct"}
        (work / "config.json").write_text(json.dumps(config))

    def copy(self, name: str) -> Path:
        ignore = shutil.ignore_patterns("__pycache__")
        for package in ("bootstrap", "nydusfs", "snapshotter", "protos"):
            shutil.copytree(REPO / package, self.work / name / package, ignore=ignore)
        return self.work / name

    def update(self, version: str) -> None:
        """As a package manager does it: other files under the same names."""
        new = self.copy("new")
        file = new / "nydusfs" / "daemon" / "version.py"
        text, count = re.subn(r'^VERSION = "v.*"$', f'VERSION = "{version}"', file.read_text(), flags=re.MULTILINE)
        assert count == 1
        file.write_text(text)
        os.rename(self.work / "lib", self.work / "old")
        os.rename(new, self.work / "lib")
        shutil.rmtree(self.work / "old")

    def unit(self) -> str:
        """The shipped one, with paths of here."""
        text = (REPO / "systemd" / UNIT).read_text()
        start = next(line for line in text.splitlines() if line.startswith("ExecStart="))
        words = [self.work / "bin" / "containerd-nydus-grpc", "--config-path", self.work / "config.json"]
        words += ["--root", self.root, "--address", self.socket]
        here = f"ExecStart={' '.join(map(str, words))}\nEnvironment=PYTHONPATH={self.work / 'lib'}"
        return text.replace(start, here)

    def api(self) -> NydusdApi:
        (socket,) = (self.root / "socket").glob("*/api.sock")
        return NydusdApi(socket)


class Reader:
    def __init__(self, system: Systemd, mounts: str, files: list[str]) -> None:
        self.files, self._number = files, 0
        self._right = {
            entry["path"].lstrip("/"): entry["sha256"]
            for entry in load_manifest(image_case(CASE))["entries"]
            if entry.get("sha256")
        }
        command = system.command([sys.executable, "-c", READER, mounts, files[0]])
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def check(self) -> None:
        """The open file, and one that nobody read yet."""
        self._number += 1
        name = self.files[self._number]
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline().split() == [self._right[name], self._right[self.files[0]]]

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)


@pytest.fixture
def work() -> Iterator[Path]:
    made = work_dir()
    try:
        yield made
    finally:
        unmount_below(made)
        remove_tree(made)


def readable_files() -> list[str]:
    entries = load_manifest(image_case(CASE))["entries"]
    files = [entry for entry in entries if entry["type"] == "file" and entry.get("size", 0) > 10]
    return [entry["path"].lstrip("/") for entry in files if entry["path"].isascii() and "\n" not in entry["path"]]


def test_the_unit_under_a_running_container(work: Path) -> None:
    installed = Installed(work)
    with Systemd(work) as system:
        (system.units / UNIT).write_text(installed.unit())
        system.ctl("daemon-reload")
        system.ctl("start", UNIT)
        wait_until(lambda: can_connect(installed.socket), 60, "the snapshotter")
        with Client(installed.socket) as client:
            meta = pull(client, image_case(CASE), work, IMAGE)
            (mount,) = client.prepare("default/4/c", meta)
        reader = Reader(system, ",".join(mount.options), readable_files())
        try:
            follow(system, installed, reader, meta)
        finally:
            reader.close()


def test_what_is_in_the_way_at_the_start_is_not_for_ever(work: Path) -> None:
    """A disk that is full, a configuration that is late: systemd alone gives a unit up after a few tries."""
    installed = Installed(work)
    config, later = work / "config.json", work / "later.json"
    config.rename(later)
    with Systemd(work) as system:
        (system.units / UNIT).write_text(installed.unit())
        system.ctl("daemon-reload")
        system.ctl("start", UNIT)
        wait_until(lambda: int(system.ctl("show", "-p", "NRestarts", "--value", UNIT)) >= 4, 120, "four restarts")
        time.sleep(3)
        assert system.ctl("is-active", UNIT) in ("activating", "active")
        later.rename(config)
        wait_until(lambda: can_connect(installed.socket), 60, "the snapshotter")


def follow(system: Systemd, installed: Installed, reader: Reader, meta: str) -> None:
    reader.check()
    first = installed.api().info()

    def served(number: int, keeper: int = first["keeper_pid"]) -> None:
        """The reader goes on, the same nydusd serves it, another container starts."""
        wait_until(lambda: can_connect(installed.socket), 60, "the snapshotter")
        reader.check()
        with Client(installed.socket) as client:
            assert client.mounts("default/4/c")
            client.prepare(f"default/5/{number}", meta)
        assert installed.api().info()["keeper_pid"] == keeper

    before = system.main_pid(UNIT)
    system.ctl("restart", UNIT)
    served(1)
    assert system.main_pid(UNIT) not in (0, before)
    assert installed.api().info()["worker_pid"] == first["worker_pid"]

    # the package, and `systemctl restart`, is all that an update is
    installed.update("v9.9.9")
    system.ctl("restart", UNIT)
    reader.check()
    wait_until(lambda: version(installed) == "v9.9.9", 60, "the new nydusd")
    served(2)
    assert installed.api().info()["worker_pid"] != first["worker_pid"]

    before = system.main_pid(UNIT)
    system.ctl("kill", "--signal=KILL", "--kill-who=main", UNIT)
    wait_until(lambda: system.main_pid(UNIT) not in (0, before), 60, "the unit's restart")
    served(3)

    # stopped: nobody is there to talk to, and the container does not notice
    system.ctl("stop", UNIT)
    assert system.ctl("is-active", UNIT) == "inactive"
    assert not can_connect(installed.socket)
    reader.check()
    system.ctl("start", UNIT)
    served(4)


def version(installed: Installed) -> str:
    try:
        return str(installed.api().info()["version"]["package_ver"])
    except (SnapshotterError, ValueError):
        return ""
