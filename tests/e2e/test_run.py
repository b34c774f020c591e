"""Pull and run through real containerd: Nydus lazily, plain images as under overlayfs, with ctr, nerdctl and CRI."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import PAYLOAD, fuse_nodes, nothing_stays
from tests.lab.cri import Cri
from tests.lab.process import run
from tests.lab.sample import pause_image, small_image
from tests.lab.stack import Stack

pytestmark = pytest.mark.timeout(180)


def check_content(stack: Stack, ref: str, snapshotter: str = "nydus") -> None:
    """What the layers of the small image add up to: whiteout, opaque directory, owner, hard link."""
    lines = stack.ctr_run(
        ref, "sh", "-c", "cat /marker; echo; ls /; ls /shadowed; stat -c '%u %h' /etc/hard", snapshotter=snapshotter
    ).split("\n")
    assert lines[0] == "hello"
    assert "payload" in lines
    assert "doomed" not in lines
    assert "above" in lines
    assert "below" not in lines
    assert "1000 2" in lines


def test_lazy_start_then_all_data(stack: Stack) -> None:
    """It starts with a small part of the image; what it reads later is right; a second container reads the cache."""
    ref = f"{stack.host}/lab/small:nydus"
    mark = stack.registry.mark()
    assert "3 left to nydus, 1 downloaded" in stack.rpull(ref)
    check_content(stack, ref)
    fetched = stack.registry.since(mark).blobs().bytes
    assert 0 < fetched < PAYLOAD // 2
    sums = stack.ctr_run(ref, "sh", "-c", "sha256sum < /payload; cat /payload.sha256").split()
    assert sums[0] == sums[2]
    assert stack.registry.since(mark).blobs().bytes >= PAYLOAD
    mark = stack.registry.mark()
    stack.ctr_run(ref, "sh", "-c", "sha256sum < /payload")
    assert stack.registry.since(mark).count == 0


def test_original_layers_run_lazily(stack: Stack, nerdctl: Path) -> None:
    """nydusify --oci-ref: the gzip layers stay in the registry as they are, and only the slices that are read move."""
    stack.convert("lab/small:oci", "lab/small:ref", "--oci-ref")
    ref = f"{stack.host}/lab/small:ref"
    mark = stack.registry.mark()
    assert "3 left to nydus, 1 downloaded" in stack.rpull(ref)
    check_content(stack, ref)
    assert 0 < stack.registry.since(mark).blobs().bytes < PAYLOAD // 2
    run_it = ("run", "--rm", "-q", "--net", "host", ref, "sh", "-c", "sha256sum < /payload; cat /payload.sha256")
    sums = stack.containerd.nerdctl(nerdctl, *run_it).stdout.split()
    assert sums[0] == sums[2]
    assert stack.registry.since(mark).blobs().bytes >= PAYLOAD
    mark = stack.registry.mark()
    stack.ctr_run(ref, "sh", "-c", "sha256sum < /payload")
    assert stack.registry.since(mark).count == 0


def test_data_came_through_the_mirror(stack: Stack) -> None:
    ref = f"{stack.host}/lab/small:nydus"
    stack.rpull(ref)
    stack.ctr_run(ref, "cat", "/marker")
    assert stack.mirror is not None
    assert any("/blobs/" in line and " 206 " in line for line in stack.mirror.requests())


@fuse_nodes
def test_log_line_people_grep(stack: Stack) -> None:
    ref = f"{stack.host}/lab/small:nydus"
    stack.rpull(ref)
    stack.ctr_run(ref, "cat", "/marker")
    logs = [path for path in (stack.snapshotter.root / "logs").rglob("*log") if path.is_file()]
    lines = [line for path in logs for line in path.read_text().splitlines() if "mirrors" in line]
    assert stack.mirror is not None
    wanted = (
        r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6} \+00:00\] INFO .*"
        r'backend config: ConnectionConfig \{ proxy: ProxyConfig \{ url: "", ping_url: "", fallback: false, '
        r"check_interval: 5, use_http: false \}, mirrors: \[MirrorConfig \{ host: "
        + re.escape(f'"{stack.mirror.url}"')
        + r', headers: \{"X-Dragonfly-Registry": "[^"]*"\}, auth_through: false \}\], skip_verify: false, timeout: 10, '
        r"connect_timeout: 10, retry_limit: 2 \}"
    )
    assert any(re.match(wanted, line) for line in lines), lines


@fuse_nodes
def test_plain_image_through_nydus_snapshotter(stack: Stack) -> None:
    ref = f"{stack.host}/lab/small:oci"
    assert "3 downloaded" in stack.rpull(ref)
    check_content(stack, ref)


@fuse_nodes
def test_plain_image_pulled_by_ctr(stack: Stack, tmp_path: Path) -> None:
    ref = f"{stack.host}/lab/ctr:oci"
    small_image(tmp_path, "hello", payload=1 << 20).push(stack.registry.host, "lab/ctr", "oci")
    stack.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "nydus", ref)
    check_content(stack, ref)


def test_writes_stay_in_the_container(stack: Stack) -> None:
    ref = f"{stack.host}/lab/small:nydus"
    stack.rpull(ref)
    changed = stack.ctr_run(ref, "sh", "-c", "echo new > /marker; rm /payload; mkdir /made; cat /marker; ls -d /made")
    assert changed.split() == ["new", "/made"]
    assert stack.ctr_run(ref, "cat", "/marker").strip() == "hello"


@fuse_nodes
def test_nydus_image_needs_a_lazy_snapshotter(stack: Stack) -> None:
    said = stack.rpull(f"{stack.host}/lab/small:nydus", snapshotter="overlayfs", check=False)
    assert "use --snapshotter nydus" in said
    assert "Traceback" not in said


@fuse_nodes
def test_pull_errors_are_one_line(stack: Stack) -> None:
    for ref, wanted in [(f"{stack.host}/lab/none:x", "does not exist"), ("127.0.0.1:1/x/y:z", "cannot be reached")]:
        said = stack.rpull(ref, check=False)
        assert wanted in said
        assert len(said.strip().splitlines()) == 1
    done = run([*stack.containerd.ctr_argv("leases", "ls", "-q")], timeout=30)
    assert done.stdout.split() == []


def test_nerdctl_run(stack: Stack, nerdctl: Path) -> None:
    ref = f"{stack.host}/lab/small:nydus"
    done = stack.containerd.nerdctl(
        nerdctl, "run", "--rm", "-q", "--net", "host", ref, "sh", "-c", "cat /marker; ls /shadowed"
    )
    assert done.stdout.split() == ["hello", "above"] or done.stdout == "helloabove\n"


def test_commit_over_a_nydus_image(stack: Stack, nerdctl: Path) -> None:
    """A writable layer committed over a Nydus image is an image of its own, run through the same snapshotter."""
    ref, made = f"{stack.host}/lab/small:nydus", f"{stack.host}/lab/changed:v1"
    ctl = stack.containerd.nerdctl
    name = f"w{time.monotonic_ns()}"
    ctl(nerdctl, "run", "-d", "-q", "--name", name, "--net", "host", ref, "sleep", "600")
    try:
        ctl(nerdctl, "exec", name, "sh", "-c", "echo changed > /marker; rm /payload; echo more > /added")
        ctl(nerdctl, "commit", name, made)
    finally:
        ctl(nerdctl, "rm", "-f", name)
    done = ctl(
        nerdctl, "run", "--rm", "-q", "--net", "host", made, "sh", "-c", "cat /marker /added; ls /; ls /shadowed"
    )
    lines = done.stdout.split()
    assert lines[:2] == ["changed", "more"]
    assert "payload" not in lines
    assert "above" in lines


def test_snapshot_committed_over_a_nydus_image(stack: Stack) -> None:
    """The same by snapshot calls alone: commit, then another container's layer over the committed one."""
    ref = f"{stack.host}/lab/small:nydus"
    stack.rpull(ref)
    ctr = stack.containerd.ctr
    name, committed = f"s{time.monotonic_ns()}", f"layer-{time.monotonic_ns()}"
    ctr("run", "--net-host", "--snapshotter", "nydus", ref, name, "sh", "-c", "echo changed > /marker")
    ctr("tasks", "rm", name, check=False)
    ctr("snapshots", "--snapshotter", "nydus", "commit", committed, name)
    upper = f"{committed}-upper"
    target = stack.work / upper
    target.mkdir()
    ctr("snapshots", "--snapshotter", "nydus", "prepare", upper, committed)
    command = ctr("snapshots", "--snapshotter", "nydus", "mounts", target, upper).stdout
    run(["sh", "-c", command], timeout=30)
    try:
        assert (target / "marker").read_text() == "changed\n"
        assert sorted(path.name for path in (target / "shadowed").iterdir()) == ["above"]
    finally:
        run(["umount", target], timeout=30)
    ctr("containers", "rm", name, check=False)
    ctr("snapshots", "--snapshotter", "nydus", "rm", upper)
    ctr("snapshots", "--snapshotter", "nydus", "rm", committed)


def test_usage_of_snapshots(stack: Stack) -> None:
    ref = f"{stack.host}/lab/small:nydus"
    stack.rpull(ref)
    names = [
        line.split()[0]
        for line in stack.containerd.ctr("snapshots", "--snapshotter", "nydus", "ls").stdout.splitlines()[1:]
    ]
    assert names
    for name in names:
        stack.containerd.ctr("snapshots", "--snapshotter", "nydus", "usage", name)


@pytest.mark.parametrize("tag", ["nydus", "oci"])
def test_pod(stack: Stack, tag: str, tmp_path: Path) -> None:
    """Sandbox (its pause image comes through the snapshotter too), pull and run as a kubelet does."""
    pause_image(tmp_path).push(stack.registry.host, "lab/pause", "1")
    cri = Cri(stack.containerd.socket, stack.work)
    try:
        image = f"{stack.host}/lab/small:{tag}"
        code, text = cri.pod_says(image, "sh", "-c", "cat /marker; echo; ls /shadowed; exit 3")
        assert (code, text.split()) == (3, ["hello", "above"])
    finally:
        cri.close()


def test_removed_image_leaves_nothing(stack: Stack) -> None:
    """After the last container and image are gone, so are snapshots and mounts (this module's last test)."""
    nothing_stays(stack)
