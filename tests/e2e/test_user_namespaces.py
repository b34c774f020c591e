"""Containers whose root is nobody on the machine: containerd 2.x with `remap-ids`, on Nydus images and plain ones."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import containerd_of, load_image, require_programs
from tests.e2e.test_commit import commit
from tests.lab.operated import CTL
from tests.lab.process import mounts_below, run, wait_until
from tests.lab.stack import Stack, StackOptions

pytestmark = pytest.mark.timeout(240)

HOST = 100_000
SHOW = (
    "cat /proc/self/uid_map; ls -lnd / /marker; echo new >/written; ls -ln /written; sha256sum </payload; cat /*.sha256"
)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    require_programs()
    with Stack(StackOptions(prefetch=False, containerd=containerd_of("2.x"))) as made:
        load_image(made)
        for path in (made.work, made.node, made.node / "c"):  # as /run/containerd is: runc comes as another user
            path.chmod(0o711)
        yield made
    assert made.leftovers == []


@pytest.mark.parametrize("form", ["nydus", "oci"])
def test_root_of_the_container_owns_its_files(stack: Stack, form: str) -> None:
    ctr = stack.containerd.ctr
    ref = f"{stack.host}/lab/small:{form}"
    stack.rpull(ref)
    name = f"u{time.monotonic_ns()}"
    mapping = f"0:{HOST}:65536"
    options = ["--snapshotter", "nydus", "--uidmap", mapping, "--gidmap", mapping, "--remap-labels"]
    said = stack.containerd.ctr_run(*options, ref, name, "sh", "-c", SHOW)
    words = said.split()
    assert words[:3] == ["0", str(HOST), "65536"]
    assert [line.split()[2:4] for line in said.splitlines() if line[:1] in "d-"] == [["0", "0"]] * 3
    assert words[-3] == words[-1]
    # outside they are of a user that nobody is
    (upper,) = [
        path
        for path in (stack.snapshotter.root / "snapshots").glob("*/fs/written")
        if path.read_text() == "new\n" and path.parent.parent.joinpath("work").exists()
    ]
    assert os.stat(upper).st_uid == os.stat(upper.parent).st_uid == HOST
    # no file of the image was copied to change its owner
    assert not (upper.parent / "payload").exists() and not (upper.parent / "marker").exists()
    if form == "nydus":
        command = [*CTL, "explain", name, "--json", "--root", stack.snapshotter.root, "-a", stack.containerd.socket]
        found = json.loads(run(command, timeout=60).stdout)
        assert (found["lazy"], found["why"]) == (True, [])
        assert Path(found["mountpoint"]).name.endswith(f"-userns-{HOST}")
        assert found["reads"]["bytes"] > 0
    ctr("containers", "rm", name)
    ctr("content", "prune", "references", check=False)
    wait_until(lambda: not upper.exists(), 60, "the removal of the container's snapshot")
    no_mapping_is_left(stack)
    assert stack.ctr_run(ref, "cat", "/marker").strip() == "hello"


def test_an_image_made_of_a_container_of_a_nydus_image(stack: Stack, nerdctl: Path) -> None:
    """Its own layer is unpacked, the ones below are lazy: root of the container owns the files of both."""
    ref, made = f"{stack.host}/lab/small:nydus", f"{stack.host}/lab/made:{time.monotonic_ns()}"
    stack.rpull(ref)
    ctl, ctr = stack.containerd.nerdctl, stack.containerd.ctr
    name = f"w{time.monotonic_ns()}"
    ctl(nerdctl, "run", "-d", "-q", "--name", name, "--net", "host", ref, "sleep", "600")
    try:
        ctl(nerdctl, "exec", name, "sh", "-c", "echo changed >/marker; mkdir -m 700 /closed; echo in >/closed/file")
        ctl(nerdctl, "commit", name, made)
    finally:
        ctl(nerdctl, "rm", "-f", name)
    name, mapping = f"u{time.monotonic_ns()}", f"0:{HOST}:65536"
    options = ["--snapshotter", "nydus", "--uidmap", mapping, "--gidmap", mapping, "--remap-labels"]
    script = "cat /marker /closed/file; ls -lnd /marker /closed /closed/file /payload; echo more >>/closed/file"
    said = stack.containerd.ctr_run(*options, made, name, "sh", "-c", script).splitlines()
    assert said[:2] == ["changed", "in"]
    assert [line.split()[2:4] for line in said[2:]] == [["0", "0"]] * 4
    found = list((stack.snapshotter.root / "snapshots").glob("*/fs/closed/file"))
    assert {path.read_text(): os.stat(path).st_uid for path in found} == {"in\n": 0, "in\nmore\n": HOST}
    ctr("containers", "rm", name)
    ctr("content", "prune", "references", check=False)
    no_mapping_is_left(stack)


def test_commit_names_owners_as_the_container_does(stack: Stack) -> None:
    ref, target = f"{stack.host}/lab/small:nydus", f"{stack.host}/lab/small:committed"
    stack.rpull(ref)
    ctr = stack.containerd.ctr
    name, mapping = f"u{time.monotonic_ns()}", f"0:{HOST}:65536"
    options = ["--snapshotter", "nydus", "--uidmap", mapping, "--gidmap", mapping, "--remap-labels"]
    ctr("run", "-d", *options, ref, name, "sh", "-c", "echo changed >/marker; mkdir /made; sleep 600")
    try:
        upper = stack.snapshotter.root / "snapshots"
        wait_until(lambda: bool(list(upper.glob("*/fs/made"))), 60, "what the container does")
        commit(stack, name, target)
    finally:
        ctr("tasks", "rm", "-f", name)
        ctr("containers", "rm", name)
    stack.rpull(target)
    for more in (options[:2], options):
        words = ("--rm", *more, target, f"{name}-{len(more)}", "ls", "-ln", "/marker", "/payload")
        said = stack.containerd.ctr_run(*words)
        assert [line.split()[2:4] for line in said.splitlines()] == [["0", "0"]] * 2


def no_mapping_is_left(stack: Stack) -> None:
    root = stack.snapshotter.root
    wait_until(lambda: not [path for path in mounts_below(root) if "-userns-" in path], 60, "the unmount")
    wait_until(lambda: not [*root.glob("mnt/*-userns-*"), *root.glob("idmapped/*")], 60, "the unmount")
