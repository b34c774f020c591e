"""`nydusctl node` on a node with real containerds: everything the installation does, and nothing left of it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.lab.paths import ref_bin
from tests.lab.process import remove_tree, run, work_dir

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]


@pytest.mark.parametrize("kind", ["debian", "newer", "k3s"])
def test_a_node_is_installed_used_and_left_as_it_was(kind: str) -> None:
    """`k3s`: a service that, like it, brings a containerd 2.x and writes its configuration at each start."""
    newer = kind != "debian"
    containerd = ref_bin("containerd") if newer else Path(shutil.which("containerd") or "")
    if containerd is None or not containerd.is_file():
        pytest.skip("interop: no containerd 2.x here" if newer else "containerd is not installed")
    work = work_dir()
    try:
        apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = [*apart, sys.executable, "-m", "tests.lab.installing", work, containerd, kind]
        done = run(command, timeout=840, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        seen = json.loads(done.stdout)
    finally:
        remove_tree(work)

    def said(step: str, code: int, *texts: str) -> None:
        status, output = seen[step]
        assert status == code, (step, output)
        for text in texts:
            assert text in output, (step, output)

    said("dry", 0, "+[proxy_plugins.nydus]", "+++ /etc/systemd/system/containerd-nydus-grpc.service")
    assert not seen["dry changed"]
    said("other", 1, "containerd-nydus-grpc.sock is served by another process", "(pid ")
    assert not seen["other changed"]
    said("install", 0, "containerd-nydus-grpc.service: started", "its plugin for this snapshotter is loaded")
    assert [line[-1] for line in seen["plugins"]] == ["ok"]
    said("again", 0)
    assert not seen["again changed"]
    assert not seen["again restarted"]
    assert "3 left to nydus" in seen["rpull"][0]
    said("refused", 1, "1 containers use it: default/app.")
    assert not seen["refused changed"]
    assert seen["still reads"].startswith("hello")
    assert seen["nydusd before"] > 0
    edited = "nydus.toml" if kind == "k3s" else "config.toml"
    said("uninstall", 0, f"{edited}: as it was before", "images and cache stay in /var/lib/containerd-nydus")
    assert (seen["uninstall left"], seen["uninstall lost"]) == ({}, [])
    assert (seen["nydusd after"], seen["mounts after"], seen["plugins after"]) == ([], [], [])
    assert seen["data kept"]
    assert seen["containerd after"]
    said("broken", 1, f"{edited} is as it was, and it runs again as before")
    assert kind != "k3s" or "systemctl restart k3s.service" in seen["broken"][1]
    assert seen["broken config"]
    assert seen["broken alive"]
    if newer:
        said("runtime", 0)
        assert seen["runtime pod"] == [0, "hello"]
        assert seen["runtime snapshots"] > 3
    said("install 2", 0)
    assert seen["second life"].startswith("hello")
    said("purge", 0, "snapshots removed from containerd", "/var/lib/containerd-nydus: removed")
    assert seen["purge left"] == []
    assert seen["purge state"]
