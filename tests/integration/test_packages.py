"""The bundle and the packages, built and used: installed, upgraded under a container, removed.

They are built with wheels from PyPI, 30 s each and more; `tests/run long`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.builder import Builder
from tests.lab.paths import REPO
from tests.lab.process import remove_tree, run, work_dir

pytestmark = [pytest.mark.root, pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    work = work_dir()
    yield work
    remove_tree(work)


@pytest.fixture(scope="module")
def wheel(place: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", place / "wheels", REPO]
    run(command, timeout=300)
    (found,) = (place / "wheels").glob("*.whl")
    return found


def seen(kind: str, what: Path) -> dict[str, Any]:
    containerd = shutil.which("containerd")
    if containerd is None:
        pytest.skip("containerd is not installed")
    work = work_dir()
    try:
        apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = [*apart, sys.executable, "-m", "tests.lab.packaged", work, containerd, kind, what]
        done = run(command, timeout=400, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found: dict[str, Any] = json.loads(done.stdout)
        return found
    finally:
        remove_tree(work)


def went_over(found: dict[str, Any]) -> None:
    """Another snapshotter and another worker, the same keeper; the container read on."""
    assert found["unit before"] != found["unit after"]
    assert set(found["nydusd before"]) != set(found["nydusd after"])
    assert set(found["nydusd before"]) & set(found["nydusd after"])
    assert found["reads after"].startswith("hello")


def lived(found: dict[str, Any]) -> None:
    """A package's life up to its removal, which it refuses while a container uses it."""
    for step in ("install", "node", "upgrade", "remove"):
        assert found[step][0] == 0, found[step]
    assert found["version"][0] == 0
    assert "/etc/nydus/config.json" in found["files"]
    assert found["runs"]
    went_over(found)
    assert found["busy"][0] != 0
    assert "1 containers use it: default/app." in found["busy"][1]
    assert found["reads busy"].startswith("hello")
    assert (found["remove nydusd"], found["containerd"]) == ([], True)


def test_a_bundle_runs_from_anywhere_and_installs_nodes_from_pods(place: Path, wheel: Path) -> None:
    made, moved = place / "made", place / "moved"
    run([sys.executable, REPO / "packaging" / "bundle.py", made, "--wheel", wheel], timeout=600)
    made.rename(moved)
    link = place / "a link"
    link.symlink_to(moved / "bin" / "nydusctl")
    run(["/bin/sh", moved / "bin" / "use-python", sys.executable], timeout=30)
    bare = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run([link, "--version"], env=bare, cwd="/", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    for program in ("containerd-nydus-grpc", "nydusd", "nydusify", "nydus-image", "ctr-remote"):
        done = subprocess.run([moved / "bin" / program, "--help"], env=bare, cwd="/", capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
    installs(moved)


def installs(bundle: Path) -> None:
    """A node, installed, upgraded and uninstalled by pods that have this bundle."""
    found = seen("pod", bundle)
    assert "its plugin for this snapshotter is loaded" in found["install"]
    assert (found["end"], found["runs"]) == (0, True)
    went_over(found)
    assert "1 containers use it: default/app." in found["busy"]
    assert found["reads busy"].startswith("hello")
    assert (found["left"], found["same"], found["nydusd gone"], found["containerd"]) == ([], True, [], True)


def test_the_image_of_the_dockerfile_is_built_and_installs_nodes(place: Path) -> None:
    """As docs/kubernetes.md says it is done, for all versions of Python that it names; with buildah for docker."""
    file, name = REPO / "packaging" / "Dockerfile", "registry.example/nydus-py:0.1.0"
    base = re.search(r"^ARG BASE=(\S+:(\w+)-slim)$", file.read_text(), re.MULTILINE)
    versions = re.search(r'PYTHONS="(.+)"', file.read_text())
    assert base is not None
    assert versions is not None
    buildah = Builder(place / "b")
    buildah.debian(base[1], base[2])
    buildah.build(file, REPO, name)
    config = buildah.config(name)
    assert (config["Entrypoint"], config["Cmd"]) == (["/usr/local/bin/node.sh"], ["install"])
    root = buildah.root(name)
    entry = [*config["Entrypoint"], "frobnicate"]
    done = subprocess.run(["chroot", root, *entry], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("node.sh install|uninstall")
    for program in ("nsenter", "timeout", "cmp", "sed", "sort"):  # all that node.sh wants of the image
        run(["chroot", root, "sh", "-c", f"command -v {program}"], timeout=30)
    assert (root / "usr/local/bin/node.sh").read_bytes() == (REPO / "packaging" / "node.sh").read_bytes()
    assert {one.name for one in (root / "nydus-py/lib").iterdir()} == {f"python{one}" for one in versions[1].split()}
    assert not (root / "src").exists()
    assert not (root / "etc/pip.conf").exists()
    installs(root / "nydus-py")


def test_the_debian_package_is_installed_upgraded_and_removed(place: Path, wheel: Path) -> None:
    system = Path("/usr/bin/python3")
    version = run([system, "-c", "import sys; print(sys.version_info[1])"], timeout=30).stdout.strip()
    if shutil.which("dpkg-deb") is None or version != str(sys.version_info[1]):
        pytest.skip("not a Debian with this version of Python")
    env = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000", "DEBEMAIL": "packager@debian.org"}
    made = run([sys.executable, REPO / "packaging" / "deb.py", place, "--wheel", wheel], timeout=600, env=env)
    package = Path(made.stdout.strip())
    if lintian := shutil.which("lintian"):
        done = run([lintian, "--fail-on", "error,warning", package], timeout=400, check=False)
        assert (done.returncode, done.stdout) == (0, "")
    found = seen("deb", package)
    lived(found)
    assert found["remove left"] == ["/etc/nydus/config.json"]  # a conffile goes with purge
    assert (found["purge"][0], found["purge state"], found["purge left"]) == (0, True, [])


def test_the_rpm_is_installed_upgraded_and_removed(place: Path, wheel: Path) -> None:
    if shutil.which("rpmbuild") is None:
        pytest.skip("rpmbuild is not installed")
    system = f"/usr/bin/python3.{sys.version_info[1]}"
    if not os.access(system, os.X_OK):
        pytest.skip(f"the system has no {system}")
    env = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
    made = run([sys.executable, REPO / "packaging" / "rpm.py", place, "--wheel", wheel], timeout=600, env=env)
    package = Path(made.stdout.strip())
    asked = {query: run(["rpm", "-qp", query, package], timeout=60).stdout for query in ("--requires", "--configfiles")}
    assert {system, "systemd"} <= set(asked["--requires"].split())
    assert asked["--configfiles"].split() == ["/etc/nydus/config.json"]
    found = seen("rpm", package)
    lived(found)
    assert found["compiled"] > 300
    assert found["verify"] == [0, ""]
    assert (found["remove state"], found["remove left"]) == (True, [])
