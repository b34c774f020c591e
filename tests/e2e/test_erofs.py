"""`fs_driver` auto in containerd: what is said of it, and what becomes of containers whose nydusd is killed. That they
run under EROFS mounts as under FUSE is shown by the other files of this layer."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import pytest

from nydusfs.drivers import kernel
from tests.e2e.conftest import load_image, require_programs
from tests.lab.erofs import cannot_mount_erofs
from tests.lab.process import kill_together, run, wait_until
from tests.lab.stack import Stack, StackOptions

pytestmark = [pytest.mark.timeout(180), pytest.mark.skipif(cannot_mount_erofs() != "", reason=cannot_mount_erofs())]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    require_programs()
    options = StackOptions(mirror=True, prefetch=False, fs_driver="auto")
    with Stack(options) as made:
        load_image(made)
        yield made
    assert made.leftovers == []


def erofs_mounts(stack: Stack) -> list[str]:
    below = f"{stack.snapshotter.root}/"
    return [one.mountpoint for one in kernel.mounts() if one.fstype == "erofs" and one.mountpoint.startswith(below)]


def test_the_log_and_doctor_say_which_driver_and_why(stack: Stack) -> None:
    said = [path.read_text() for path in (stack.snapshotter.root / "logs").rglob("*log") if path.is_file()]
    assert any("fs_driver auto: images are served by erofs: its self-test passed" in text for text in said)
    words = [sys.executable, "-m", "snapshotter.nydusctl", "doctor", "--json", "--root", str(stack.snapshotter.root)]
    found = run([*words, "-a", str(stack.containerd.socket)], timeout=60, check=False).stdout
    assert "EROFS, as its self-test passed" in found, found


def test_containers_live_on_when_every_nydusd_was_killed(stack: Stack) -> None:
    """What a container has is its mount: the next daemon heals it, where its program survived what was not here."""
    ref, ctr = f"{stack.host}/lab/small:nydus", stack.containerd.ctr
    stack.rpull(ref)
    stack.ctr_run(ref, "sh", "-c", "sleep 0; sha256sum < /marker; cat /marker")
    wait_until(lambda: len(erofs_mounts(stack)) == 1, 60, "the kernel's mount, which the first start does not wait for")
    ctr("run", "-d", "--net-host", "--snapshotter", "nydus", ref, "lives", "sleep", "600")
    try:
        before = stack.snapshotter.daemons()
        kill_together(before)
        wait_until(lambda: len(erofs_mounts(stack)) == 1 and bool(stack.snapshotter.services()), 60, "the next nydusd")

        def right() -> bool:
            command = ("sh", "-c", "sha256sum < /payload; cat /payload.sha256")
            done = ctr("tasks", "exec", "--exec-id", f"x{time.monotonic_ns()}", "lives", *command, check=False)
            words = done.stdout.split()
            return len(words) > 2 and words[0] == words[2]

        wait_until(right, 60, "the container's data")
    finally:
        ctr("tasks", "kill", "-s", "KILL", "lives", check=False)
        wait_until(lambda: "RUNNING" not in ctr("tasks", "ls").stdout, 60, "the end of the container")
        ctr("tasks", "rm", "lives", check=False)
        ctr("containers", "rm", "lives", check=False)
