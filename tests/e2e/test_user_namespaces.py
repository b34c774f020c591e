"""Containers whose root is nobody on the machine: containerd 2.x with `remap-ids`, on Nydus images and plain ones."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import containerd_of, load_image, require_programs
from tests.lab.process import mounts_below, wait_until
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
    said = ctr("run", *options, ref, name, "sh", "-c", SHOW).stdout
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
    ctr("containers", "rm", name)
    ctr("content", "prune", "references", check=False)
    wait_until(lambda: not upper.exists(), 30, "the removal of the container's snapshot")
    left = [path for path in mounts_below(stack.snapshotter.root) if "-userns-" in path]
    assert left == []
    wait_until(lambda: not list((stack.snapshotter.root / "mnt").glob("*-userns-*")), 20, "the unmount")
    assert stack.ctr_run(ref, "cat", "/marker").strip() == "hello"
