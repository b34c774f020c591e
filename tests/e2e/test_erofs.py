"""The same containers where the kernel serves the images: containerd, nerdctl and CRI with `fs_driver` auto."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nydusfs.drivers import kernel
from tests.e2e.conftest import PAYLOAD, containerd_of, load_image, nothing_stays, require_programs
from tests.e2e.test_run import check_content
from tests.lab.cri import Cri
from tests.lab.erofs import cannot_mount_erofs
from tests.lab.process import kill_together, run, wait_until
from tests.lab.sample import pause_image
from tests.lab.stack import Stack, StackOptions

pytestmark = [pytest.mark.timeout(180), pytest.mark.skipif(cannot_mount_erofs() != "", reason=cannot_mount_erofs())]


@pytest.fixture(scope="module", params=["1.6", "2.x"])
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    require_programs()
    options = StackOptions(mirror=True, prefetch=False, fs_driver="auto", containerd=containerd_of(request.param))
    with Stack(options) as made:
        load_image(made)
        yield made
    assert made.leftovers == []


def erofs_mounts(stack: Stack) -> list[str]:
    below = f"{stack.snapshotter.root}/"
    return [one.mountpoint for one in kernel.mounts() if one.fstype == "erofs" and one.mountpoint.startswith(below)]


def test_lazy_start_then_all_data_then_nobody_is_needed(stack: Stack) -> None:
    ref = f"{stack.host}/lab/small:nydus"
    mark = stack.registry.mark()
    stack.rpull(ref)
    check_content(stack, ref)
    assert len(erofs_mounts(stack)) == 1
    assert 0 < stack.registry.since(mark).blobs().bytes < PAYLOAD // 2
    for _ in range(2):
        sums = stack.ctr_run(ref, "sh", "-c", "sha256sum < /payload; cat /payload.sha256").split()
        assert sums[0] == sums[2]
        mark = stack.registry.mark()
    assert stack.registry.since(mark).count == 0


def test_the_log_and_doctor_say_which_driver_and_why(stack: Stack) -> None:
    said = [path.read_text() for path in (stack.snapshotter.root / "logs").rglob("*log") if path.is_file()]
    assert any("fs_driver auto: images are served by erofs: its self-test passed" in text for text in said)
    words = [sys.executable, "-m", "snapshotter.nydusctl", "doctor", "--json", "--root", str(stack.snapshotter.root)]
    found = run([*words, "-a", str(stack.containerd.socket)], timeout=60, check=False).stdout
    assert "EROFS, as its self-test passed" in found, found


def test_containers_live_on_when_every_nydusd_was_killed(stack: Stack) -> None:
    """What a container has is its mount: the next daemon heals it."""
    ref, ctr = f"{stack.host}/lab/small:nydus", stack.containerd.ctr
    stack.rpull(ref)
    ctr("run", "-d", "--net-host", "--snapshotter", "nydus", ref, "lives", "sleep", "600")
    try:
        before = stack.snapshotter.daemons()
        kill_together(before)
        wait_until(lambda: len(erofs_mounts(stack)) == 1 and bool(stack.snapshotter.services()), 30, "the next nydusd")

        def right() -> bool:
            command = ("sh", "-c", "sha256sum < /payload; cat /payload.sha256")
            done = ctr("tasks", "exec", "--exec-id", f"x{time.monotonic_ns()}", "lives", *command, check=False)
            words = done.stdout.split()
            return len(words) > 2 and words[0] == words[2]

        wait_until(right, 30, "the container's data")
    finally:
        ctr("tasks", "kill", "-s", "KILL", "lives", check=False)
        wait_until(lambda: "RUNNING" not in ctr("tasks", "ls").stdout, 20, "the end of the container")
        ctr("tasks", "rm", "lives", check=False)
        ctr("containers", "rm", "lives", check=False)


def test_nerdctl(stack: Stack, nerdctl: Path) -> None:
    words = ("run", "--rm", "-q", "--net", "host", f"{stack.host}/lab/small:nydus")
    done = stack.containerd.nerdctl(nerdctl, *words, "sh", "-c", "cat /marker; ls /shadowed")
    assert done.stdout.split() == ["hello", "above"] or done.stdout == "helloabove\n"


def test_pod(stack: Stack, tmp_path: Path) -> None:
    pause_image(tmp_path).push(stack.registry.host, "lab/pause", "1")
    cri = Cri(stack.containerd.socket, stack.work)
    try:
        image = f"{stack.host}/lab/small:nydus"
        code, text = cri.pod_says(image, "sh", "-c", "cat /marker; echo; ls /shadowed; exit 3")
        assert (code, text.split()) == (3, ["hello", "above"])
    finally:
        cri.close()


def test_removed_images_leave_nothing(stack: Stack) -> None:
    """No snapshot, mount, device or metadata in use after the last container and image are gone; the last test here."""
    nothing_stays(stack)
