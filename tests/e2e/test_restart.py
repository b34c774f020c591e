"""The snapshotter dies or is restarted under running containers: nothing changes for them, nothing stays behind."""

from __future__ import annotations

import subprocess
import time

import pytest

from tests.e2e.conftest import NODES, either, load_image, nodes, nothing_stays
from tests.lab.process import LabError, can_connect, run, wait_until
from tests.lab.stack import Stack, program

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def stack(stack: Stack) -> Stack:
    """With a node that nothing happened to yet."""
    stack.new_node()
    return stack


def start_sleeper(stack: Stack, ref: str) -> str:
    name = f"k{time.monotonic_ns()}"
    stack.containerd.ctr("run", "-d", "--net-host", "--snapshotter", "nydus", ref, name, "sleep", "600")
    return name


def wait_for_snapshotter(stack: Stack) -> None:
    """containerd dials again with up to 3 s of back-off; calls made meanwhile fail at once."""

    def works() -> bool:
        key = f"probe-{time.monotonic_ns()}"
        if stack.containerd.ctr("snapshots", "--snapshotter", "nydus", "prepare", key, check=False).returncode:
            return False
        return stack.containerd.ctr("snapshots", "--snapshotter", "nydus", "rm", key, check=False).returncode == 0

    wait_until(works, 60, "containerd's connection to the snapshotter")


def remove_everything(stack: Stack) -> None:
    stack.containerd.end_containers()
    nothing_stays(stack)


@either
@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_snapshotter_dies_under_a_container(stack: Stack, how: str) -> None:
    ref = f"{stack.host}/lab/small:nydus"
    stack.rpull(ref)
    name = start_sleeper(stack, ref)
    services = stack.snapshotter.services()
    assert services
    if how == "SIGKILL":
        stack.snapshotter.kill()
    else:
        stack.snapshotter.stop()
    assert not can_connect(stack.snapshotter.socket)
    # Data that was never read before: the daemon still fetches it.
    sums = stack.containerd.ctr_exec(name, "sh", "-c", "sha256sum < /payload; cat /payload.sha256").split()
    assert sums[0] == sums[2]
    daemons = stack.snapshotter.daemons()  # not sooner: what makes a mount is among them, and ends
    assert set(services) <= set(daemons)

    stack.snapshotter.start()
    wait_for_snapshotter(stack)
    assert set(daemons) <= set(stack.snapshotter.daemons()), "the running nydusd must be adopted, not replaced"
    assert stack.containerd.ctr_exec(name, "cat", "/marker").strip() == "hello"
    assert stack.ctr_run(ref, "cat", "/marker").strip() == "hello"
    load_image(stack, "lab/second", "other")
    second = f"{stack.host}/lab/second:nydus"
    stack.rpull(second)
    assert stack.ctr_run(second, "cat", "/marker").strip() == "other"
    remove_everything(stack)


@nodes(NODES[0])  # nothing is read
def test_snapshotter_dies_during_a_pull(stack: Stack) -> None:
    """SIGKILL between Prepare and Commit of layers: the next pull of the same image works."""
    ref = f"{stack.host}/lab/small:nydus"
    for pause in (0.35, 0.5, 0.65):
        argv = [
            program("ctr-remote"),
            "-a",
            stack.containerd.socket,
            "-n",
            stack.containerd.namespace,
            "images",
            "rpull",
        ]
        pull = subprocess.Popen([*map(str, argv), ref], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(pause)
        stack.snapshotter.kill()
        try:
            pull.wait(60)
        finally:
            pull.kill()
        stack.snapshotter.start()
        wait_for_snapshotter(stack)
    stack.rpull(ref)
    assert stack.ctr_run(ref, "cat", "/marker").strip() == "hello"
    remove_everything(stack)


@either
def test_daemon_dies_without_containers(stack: Stack) -> None:
    """nydusd killed while no container runs: the next container of the image starts all the same."""
    ref = f"{stack.host}/lab/small:nydus"
    stack.rpull(ref)
    assert stack.ctr_run(ref, "cat", "/marker").strip() == "hello"
    for pid in stack.snapshotter.daemons():
        run(["kill", "-9", str(pid)], timeout=10)
    deadline = time.monotonic() + 60
    while True:
        try:
            assert stack.ctr_run(ref, "cat", "/marker").strip() == "hello"
            break
        except LabError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
    remove_everything(stack)


@nodes(NODES[0])  # nothing is read
@pytest.mark.parametrize("own_root", [False, True])
def test_second_snapshotter_is_refused(stack: Stack, own_root: bool) -> None:
    """The same root, or another root but a socket that somebody answers on: one line, and the first serves on."""
    argv = stack.snapshotter.argv() + (["--root", str(stack.work / "other")] if own_root else [])
    again = run(argv, timeout=60, check=False)
    assert again.returncode != 0
    said = again.stderr + again.stdout
    assert "Traceback" not in said
    assert str(stack.snapshotter.socket if own_root else stack.snapshotter.root) in said
    stack.containerd.ctr("snapshots", "--snapshotter", "nydus", "prepare", "after")
    stack.containerd.ctr("snapshots", "--snapshotter", "nydus", "rm", "after")
