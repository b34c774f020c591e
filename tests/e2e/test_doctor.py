"""`nydusctl doctor` on a node at work: one planted fault after the other, each found and nothing else."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from snapshotter.doctor import remote, services
from snapshotter.doctor.finding import Level
from snapshotter.nydusd_api import NydusdApi
from tests.lab.daemon import Nydusd
from tests.lab.operated import CTL, REPOSITORY, Lab
from tests.lab.process import remove_tree, run, unmount_below, wait_until

pytestmark = pytest.mark.timeout(240)
Fault = Callable[[Lab], "contextlib.AbstractContextManager[dict[str, Any]]"]


@contextlib.contextmanager
def edited(path: Path, change: Callable[[str], str]) -> Iterator[None]:
    before, times = path.read_text(), path.stat()
    after = change(before)
    assert after != before
    path.write_text(after)
    os.utime(path, (time.time() + 5, time.time() + 5))  # certainly after the start of who reads it
    try:
        yield
    finally:
        path.write_text(before)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@contextlib.contextmanager
def containerd_stopped(lab: Lab) -> Iterator[dict[str, Any]]:
    containerd = lab.stack.containerd
    os.kill(containerd.pid, signal.SIGTERM)
    assert containerd._child is not None
    containerd._child.stop()
    try:
        yield {"containerd_config": str(containerd.work / "config.toml")}
    finally:
        containerd.start()


@contextlib.contextmanager
def annotations_missing(lab: Lab) -> Iterator[dict[str, Any]]:
    line = "disable_snapshot_annotations = false\n"
    with edited(lab.stack.containerd.work / "config.toml", lambda text: text.replace(line, "")):
        yield {}


@contextlib.contextmanager
def plugin_missing(lab: Lab) -> Iterator[dict[str, Any]]:
    file = lab.stack.containerd.work / "config.toml"
    with edited(file, lambda text: text.replace("[proxy_plugins.nydus]", "[proxy_plugins.other]").replace(
        str(lab.stack.snapshotter.socket), "/run/other.sock")):  # fmt: skip
        yield {}


@contextlib.contextmanager
def plugin_elsewhere(lab: Lab) -> Iterator[dict[str, Any]]:
    file = lab.stack.containerd.work / "config.toml"
    with edited(file, lambda text: text.replace(str(lab.stack.snapshotter.socket), "/run/other.sock")):
        yield {}


@contextlib.contextmanager
def plugin_not_loaded(lab: Lab) -> Iterator[dict[str, Any]]:
    """containerd started before the plugin was put into its configuration."""
    containerd = lab.stack.containerd
    file = containerd.work / "config.toml"
    whole = file.read_text()
    assert containerd._child is not None
    containerd._child.stop()
    snapshotter_socket, containerd.snapshotter_socket = containerd.snapshotter_socket, None
    containerd.start()
    containerd.snapshotter_socket = snapshotter_socket
    file.write_text(whole)
    try:
        yield {}
    finally:
        containerd._child.stop()
        containerd.start()


@contextlib.contextmanager
def mirror_gone(lab: Lab) -> Iterator[dict[str, Any]]:
    assert lab.stack.mirror is not None
    lab.stack.mirror.stop()
    try:
        yield {}
    finally:
        lab.stack.mirror.start()


@contextlib.contextmanager
def registry_gone(lab: Lab) -> Iterator[dict[str, Any]]:
    lab.stack.registry.stop()
    try:
        yield {}
    finally:
        lab.stack.registry.start()


@contextlib.contextmanager
def wrong_password(lab: Lab) -> Iterator[dict[str, Any]]:
    def change(text: str) -> str:
        value = json.loads(text)
        value["device"]["backend"]["config"]["auth"] = base64.b64encode(b"robot:wrong").decode()
        return json.dumps(value)

    with edited(lab.config_file(), change):
        yield {}


@contextlib.contextmanager
def image_gone(lab: Lab) -> Iterator[dict[str, Any]]:
    link = lab.work / f"reg/data/docker/registry/v2/repositories/{REPOSITORY}/_manifests/tags/nydus"
    os.rename(link, lab.work / "tag")
    try:
        yield {}
    finally:
        os.rename(lab.work / "tag", link)


@contextlib.contextmanager
def disk_full(lab: Lab) -> Iterator[dict[str, Any]]:
    cache = lab.root / "cache"
    run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", cache])
    try:
        with contextlib.suppress(OSError), (cache / "fill").open("wb", buffering=0) as file:
            while file.write(bytes(1 << 16)):
                pass
        yield {}
    finally:
        run(["umount", "-l", cache])


@contextlib.contextmanager
def dead_mount(lab: Lab) -> Iterator[dict[str, Any]]:
    folder = lab.root / "crashed"
    folder.mkdir()
    daemon = Nydusd(directory=folder)
    with daemon:
        daemon.kill_all()
        yield {}


@contextlib.contextmanager
def orphan_process(lab: Lab) -> Iterator[dict[str, Any]]:
    """A nydusd that works for this root and is in no record."""
    folder = lab.root / "socket" / "orphan"
    folder.mkdir()
    daemon = Nydusd(directory=folder)
    daemon.mnt = lab.work / "orphan"
    with daemon:
        yield {}
    unmount_below(lab.work / "orphan")


@contextlib.contextmanager
def dead_socket(lab: Lab) -> Iterator[dict[str, Any]]:
    folder = lab.root / "socket" / "dead"
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "api.sock"))
    try:
        yield {}
    finally:
        remove_tree(folder)


@contextlib.contextmanager
def directory_lost(lab: Lab) -> Iterator[dict[str, Any]]:
    """Of a data layer, which nobody uses at this moment."""
    lost = min((lab.root / "snapshots").iterdir(), key=lambda path: int(path.name))
    os.rename(lost, lab.root / "lost")
    try:
        yield {}
    finally:
        os.rename(lab.root / "lost", lost)


@contextlib.contextmanager
def snapshotter_stopped(lab: Lab) -> Iterator[dict[str, Any]]:
    lab.stack.snapshotter.kill()
    try:
        yield {}
    finally:
        lab.stack.snapshotter.start()


@contextlib.contextmanager
def everything_killed(lab: Lab) -> Iterator[dict[str, Any]]:
    lab.stack.snapshotter.kill()
    lab.stack.snapshotter.end_daemons()
    run(["umount", "-l", lab.root / "mnt"], check=False)
    try:
        yield {}
    finally:
        lab.stack.snapshotter.start()
        wait_until(lambda: any(lab.root.glob("mnt/*/marker")), 60, "the image mounted again")


@contextlib.contextmanager
def unit_ends_the_daemons(lab: Lab) -> Iterator[dict[str, Any]]:
    text = lab.unit.read_text()
    file = lab.work / "bad.service"
    file.write_text(text.replace("KillMode=process", "").replace("Before=", "#Before=").replace("Restart=always", ""))
    yield {"unit": str(file)}


@contextlib.contextmanager
def wrong_template(lab: Lab) -> Iterator[dict[str, Any]]:
    with edited(lab.stack.snapshotter.work / "nydusd.json", lambda text: text.replace('"device"', '"devise"')):
        yield {}


@contextlib.contextmanager
def reads_hang(lab: Lab) -> Iterator[dict[str, Any]]:
    """Registry and mirror take connections and say nothing, and somebody reads what is not cached."""
    assert lab.stack.mirror is not None
    pids = [one._child.pid for one in (lab.stack.registry, lab.stack.mirror) if one._child is not None]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    reader = subprocess.Popen(
        [sys.executable, "-c", f"open({str(lab.mountpoint() / 'payload')!r}, 'rb').read(10)"], stderr=subprocess.DEVNULL
    )
    before = services.HUNG_SECONDS, remote.SECONDS
    services.HUNG_SECONDS, remote.SECONDS = 0.5, 1.0
    try:
        socket_path = Path(lab.call("GET", "/api/v1/daemons")[1][0]["api_socket"])
        wait_until(lambda: bool(NydusdApi(socket_path).metrics("inflight")), 60, "a read that waits")
        time.sleep(1.6)  # inflight says when by whole seconds
        yield {}
    finally:
        services.HUNG_SECONDS, remote.SECONDS = before
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        reader.wait(60)


FAULTS: list[tuple[Fault, dict[str, Level]]] = [
    (containerd_stopped, {"containerd.running": Level.ERROR}),
    (annotations_missing, {"containerd.annotations": Level.WARNING, "containerd.stale": Level.WARNING}),
    (plugin_missing, {"containerd.proxy": Level.ERROR}),
    (plugin_elsewhere, {"containerd.proxy": Level.ERROR}),
    (plugin_not_loaded, {"containerd.loaded": Level.ERROR}),
    (mirror_gone, {"mirror.reach": Level.WARNING}),
    (registry_gone, {"registry.reach": Level.ERROR}),
    (wrong_password, {"registry.credentials": Level.ERROR}),
    (image_gone, {"registry.image": Level.WARNING}),
    (disk_full, {"disk.space": Level.ERROR}),
    (dead_mount, {"leftover.mount": Level.ERROR}),
    (orphan_process, {"leftover.process": Level.WARNING}),
    (dead_socket, {"leftover.socket": Level.NOTE}),
    (directory_lost, {"root.directories": Level.ERROR}),
    (unit_ends_the_daemons, {"snapshotter.killmode": Level.ERROR, "snapshotter.order": Level.WARNING,
                             "snapshotter.restart": Level.WARNING}),
    (wrong_template, {"snapshotter.template": Level.ERROR}),
    (snapshotter_stopped, {"snapshotter.running": Level.ERROR}),
    (everything_killed, {"snapshotter.running": Level.ERROR, "nydusd.running": Level.ERROR}),
    (reads_hang, {"nydusd.hung": Level.ERROR, "registry.reach": Level.ERROR, "mirror.reach": Level.WARNING}),
]  # fmt: skip


def test_a_healthy_node(lab: Lab) -> None:
    assert lab.doctor() == {}, lab.texts


@pytest.mark.parametrize(("fault", "expected"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_a_planted_fault_is_found_and_nothing_else(lab: Lab, fault: Fault, expected: dict[str, Level]) -> None:
    with fault(lab) as options:
        found = lab.doctor(**options)
    assert found == expected, lab.texts


def test_no_fuse_device_and_the_program_itself(lab: Lab) -> None:
    """In a mount namespace of its own; exit status and JSON as scripts see them."""
    stack = lab.stack
    command = [*CTL, "doctor", "--json", "--root", lab.root, "-a", stack.containerd.socket,
               "--unit", lab.unit]  # fmt: skip
    healthy = run(command, timeout=60, check=False)
    assert healthy.returncode == 0, healthy.stdout
    assert all({"check", "level", "text", "remedy"} == set(one) for one in json.loads(healthy.stdout))
    hidden = ["unshare", "-m", "sh", "-c", 'mount --bind /dev/null /dev/fuse && exec "$@"', "sh", *command]
    broken = run(hidden, timeout=60, check=False)
    assert broken.returncode == 1
    (finding,) = [one for one in json.loads(broken.stdout) if one["level"] == "error"]
    assert finding["check"] == "machine.fuse"
    told = run([*CTL, "doctor", "--root", lab.root, "-a", stack.containerd.socket], timeout=60, check=False).stdout
    assert re.search(r"^ok +registry\.credentials +\S+ can be read with credentials$", told, re.M), told
    assert re.search(r"^ok +mirror\.reach +mirror http://127\.0\.0\.1:\d+ answers within \d+ ms$", told, re.M), told
    assert run([*CTL, "doctor", "--nonsense"], timeout=60, check=False).returncode == 2
