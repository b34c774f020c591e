"""Docker with containerd's image store: `docker run` of a Nydus image through this snapshotter.

Debian 12's docker.io (20.10) has no such store, and neither CI nor most developers have a newer dockerd: a skip then.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.conftest import containerd_of, load_image, require_programs
from tests.lab.process import Child, run
from tests.lab.stack import Stack, StackOptions

pytestmark = pytest.mark.timeout(180)
PAYLOAD = 8 << 20


@dataclass
class Docker:
    stack: Stack
    host: str
    ref: str

    def __call__(self, *arguments: str | Path, check: bool = True) -> str:
        """Its output, errors too."""
        home = {"HOME": str(self.stack.work), "DOCKER_CONFIG": str(self.stack.work), "PATH": "/usr/bin:/bin"}
        done = run([shutil.which("docker") or "docker", "-H", self.host, *arguments], timeout=90, check=check, env=home)
        return done.stdout + done.stderr


def programs() -> Path:
    """dockerd; skips without it, without a client, or where it is older than its containerd image store."""
    dockerd = shutil.which("dockerd")
    if dockerd is None or shutil.which("docker") is None:
        pytest.skip(f"docker: no {'docker' if dockerd else 'dockerd'} here (Docker Engine 24 or newer is wanted)")
    version = re.search(r"version (\d+)\.", run([dockerd, "--version"], timeout=30).stdout)
    if version and 0 < int(version[1]) < 24:
        pytest.skip(f"docker: {dockerd} is version {version[1]}: the containerd image store came with 24")
    return Path(dockerd)


@pytest.fixture(scope="module")
def docker() -> Iterator[Docker]:
    require_programs()
    dockerd = programs()
    with Stack(StackOptions(prefetch=False, containerd=containerd_of("2.x"))) as stack:
        load_image(stack, payload=PAYLOAD)
        folder = stack.node / "d"
        folder.mkdir()
        config = folder / "daemon.json"
        config.write_text(json.dumps({"features": {"containerd-snapshotter": True}, "storage-driver": "nydus"}))
        host = f"unix://{folder}/docker.sock"
        child = Child(
            "dockerd",
            [dockerd, "--config-file", config, "-H", host, "--containerd", stack.containerd.socket,
             "--containerd-namespace", stack.containerd.namespace, "--data-root", folder / "data",
             "--exec-root", folder / "exec", "--pidfile", folder / "pid", "--bridge=none", "--iptables=false",
             "--ip6tables=false", "--exec-opt", "native.cgroupdriver=cgroupfs"],
            folder / "dockerd.log",
        )  # fmt: skip
        made = Docker(stack, host, f"{stack.host}/lab/small:nydus")
        try:
            child.wait_ready(lambda: "Server" in made("version", check=False) and "nydus" in made("info", check=False))
            yield made
            for container in made("ps", "-aq").split():
                made("rm", "-f", container)
        finally:
            child.stop()
    assert stack.leftovers == []


def test_docker_runs_a_nydus_image(docker: Docker) -> None:
    mark = docker.stack.registry.mark()
    assert "Storage Driver: nydus" in docker("info")
    docker("pull", "-q", docker.ref)
    assert docker.stack.registry.since(mark).blobs().bytes < PAYLOAD // 2
    run_it = ("run", "--rm", "--network=host", docker.ref, "sh", "-c")
    assert docker(*run_it, "cat /marker; echo; ls /shadowed").split() == ["hello", "above"]
    assert docker.stack.registry.since(mark).blobs().bytes < PAYLOAD // 2
    words = docker(*run_it, "sha256sum < /payload; cat /payload.sha256").split()
    assert words[0] == words[2]
    plain = docker.ref.replace(":nydus", ":oci")
    assert docker("run", "--rm", "--network=host", plain, "cat", "/marker").endswith("hello")
    docker("rmi", docker.ref, plain)
