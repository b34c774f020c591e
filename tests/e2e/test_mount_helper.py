"""Mounts of type `fuse.nydus-overlayfs` as containerd makes them: by mount.fuse, which runs our `nydus-overlayfs`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import either, load_image
from tests.lab.process import work_dir
from tests.lab.stack import REPO, Stack, StackOptions

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def stack(node: Path | None) -> Iterator[Stack]:
    if shutil.which("mount.fuse") is None:
        pytest.skip("end to end: not installed: fuse3")
    work = work_dir()
    helper, toml = work / "nydus-overlayfs", work / "snapshotter.toml"
    said = work / "helper.log"
    helper.write_text(
        f'#!/bin/sh\necho "$@" >>{said}\nPYTHONPATH={REPO} exec {sys.executable} -m snapshotter.overlayfs "$@"\n'
    )
    helper.chmod(0o755)
    toml.write_text(f'version = 1\n[snapshot]\nenable_nydus_overlayfs = true\nnydus_overlayfs_path = "{helper}"\n')
    options = StackOptions(prefetch=False, containerd=node, snapshotter_arguments=("--config", str(toml)))
    with Stack(options, work) as made:
        load_image(made)
        yield made
        assert "extraoption=" in said.read_text()
    assert made.leftovers == []


@either
def test_a_container_over_the_helper(stack: Stack) -> None:
    ref = f"{stack.host}/lab/small:nydus"
    stack.rpull(ref)
    said = stack.ctr_run(
        ref, "sh", "-c", "cat /marker; echo; echo written >/new; cat /new; sha256sum </payload; cat /*.sha256"
    )
    assert said.split()[:2] == ["hello", "written"]
    assert said.split()[2] == said.split()[-1]
