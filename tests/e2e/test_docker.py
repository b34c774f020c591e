"""Docker with containerd's image store: `docker run` of a Nydus image through this snapshotter.

Debian 12's docker.io (20.10) has no such store, and neither CI nor most developers have a newer dockerd: a skip then.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import containerd_of, load_image, require_programs
from tests.lab.paths import REPO
from tests.lab.process import Child, run
from tests.lab.stack import Stack, StackOptions

pytestmark = pytest.mark.timeout(180)
PAYLOAD = 8 << 20


EXAMPLE = REPO / "examples" / "docker" / "daemon.json"


class Docker:
    """dockerd with a folder of its own, above a stack's containerd."""

    def __init__(self, dockerd: Path, stack: Stack) -> None:
        self.stack, self.dockerd = stack, dockerd
        self.folder = stack.node / "d"
        self.folder.mkdir()
        self.host = f"unix://{self.folder}/docker.sock"
        self.ref = f"{stack.host}/lab/small:nydus"
        self.child: Child | None = None

    def start(self) -> None:
        folder, containerd = self.folder, self.stack.containerd
        self.child = Child(
            "dockerd",
            [self.dockerd, "--config-file", EXAMPLE, "-H", self.host, "--containerd", containerd.socket,
             "--containerd-namespace", containerd.namespace, "--data-root", folder / "data",
             "--exec-root", folder / "exec", "--pidfile", folder / "pid", "--bridge=none", "--iptables=false",
             "--ip6tables=false", "--userland-proxy=false", "--exec-opt", "native.cgroupdriver=cgroupfs"],
            folder / "dockerd.log",
        )  # fmt: skip
        self.child.wait_ready(lambda: "Storage Driver: nydus" in self.run("info", check=False).stdout)

    def stop(self) -> None:
        if self.child is not None:
            self.child.stop()
            self.child = None

    def run(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        home = {"HOME": str(self.stack.work), "DOCKER_CONFIG": str(self.stack.work), "PATH": "/usr/bin:/bin"}
        return run([shutil.which("docker") or "docker", "-H", self.host, *arguments], timeout=90, check=check, env=home)

    def __call__(self, *arguments: str | Path) -> str:
        return self.run(*arguments).stdout

    def fetched(self, mark: int) -> int:
        """Bytes of blobs that the registry sent since."""
        return self.stack.registry.since(mark).blobs().bytes


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
def docker(fs_driver: str) -> Iterator[Docker]:
    require_programs()
    dockerd = programs()
    with Stack(StackOptions(prefetch=False, containerd=containerd_of("2.x"))) as stack:
        load_image(stack, payload=PAYLOAD)
        made = Docker(dockerd, stack)
        try:
            made.start()
            yield made
            for container in made("ps", "-aq").split():
                made("rm", "-f", container)
        finally:
            made.stop()
    assert stack.leftovers == []


def test_docker_runs_a_nydus_image(docker: Docker) -> None:
    mark = docker.stack.registry.mark()
    docker("pull", "-q", docker.ref)
    assert docker.fetched(mark) < PAYLOAD // 2
    run_it = ("run", "--rm", "--network=host", docker.ref, "sh", "-c")
    assert docker(*run_it, "cat /marker; echo; ls /shadowed").split() == ["hello", "above"]
    assert docker.fetched(mark) < PAYLOAD // 2
    words = docker(*run_it, "sha256sum < /payload; cat /payload.sha256").split()
    assert words[0] == words[2]
    plain = docker.ref.replace(":nydus", ":oci")
    assert docker("run", "--rm", "--network=host", plain, "cat", "/marker") == "hello"
    docker("rmi", docker.ref, plain)


def test_docker_keeps_what_a_container_wrote(docker: Docker) -> None:
    docker("run", "-d", "--name=writes", "--network=host", docker.ref, "sleep", "600")
    docker("exec", "writes", "sh", "-c", "echo new > /added; echo more >> /marker; rm -r /shadowed")
    changed = {tuple(line.split()) for line in docker("diff", "writes").splitlines()}
    assert {("A", "/added"), ("C", "/marker"), ("D", "/shadowed")} <= changed
    docker.stop()  # its containers end with it
    docker.start()
    docker("start", "writes")
    assert docker("exec", "writes", "sh", "-c", "cat /added /marker; ls /").split()[:2] == ["new", "hellomore"]
    committed = docker.ref.replace(":nydus", ":committed")
    docker("commit", "writes", committed)
    seen = docker("run", "--rm", "--network=host", committed, "sh", "-c", "cat /added /marker; ls /").split()
    assert seen[:2] == ["new", "hellomore"]
    assert "shadowed" not in seen
    docker("rm", "-f", "writes")
    docker("rmi", committed, docker.ref)
