"""nydusify commit: a container that started lazily, changed, becomes an image that starts lazily."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nydusfs.containerd import pausing
from nydusfs.containerd.containers import Containers
from tests.e2e.conftest import fuse_nodes
from tests.lab.images import fetch_manifest
from tests.lab.nydusify import upstream_nydusify
from tests.lab.process import run, wait_until
from tests.lab.stack import Stack, program

pytestmark = pytest.mark.timeout(180)


@contextmanager
def container(stack: Stack, ref: str, *flags: str) -> Iterator[str]:
    name = f"c{time.monotonic_ns()}"
    ctr = stack.containerd.ctr
    ctr("run", "-d", "--net-host", "--snapshotter", "nydus", *flags, ref, name, "sleep", "600")
    try:
        yield name
    finally:
        ctr("tasks", "rm", "-f", name, check=False)
        ctr("containers", "rm", name, check=False)


def inside(stack: Stack, name: str, script: str) -> str:
    return stack.containerd.ctr_exec(name, "sh", "-c", script)


def status(stack: Stack, name: str) -> str:
    for line in stack.containerd.ctr("tasks", "ls").stdout.splitlines():
        if line.split()[:1] == [name]:
            return line.split()[2]
    return "none"


def commit_argv(stack: Stack, name: str, target: str, *flags: str | Path) -> list[str]:
    return [
        str(program("nydusify")), "commit", "--container", name, "--target", target, "--namespace",
        stack.containerd.namespace, "--containerd-address", f"unix://{stack.containerd.socket}", "--work-dir",
        str(stack.work / "commit"), *map(str, flags),
    ]  # fmt: skip


def commit(stack: Stack, name: str, target: str, *flags: str | Path, check: bool = True) -> str:
    done = run(commit_argv(stack, name, target, *flags), timeout=90, check=check)
    assert "Traceback" not in done.stderr
    assert not (stack.work / "commit").exists()
    return done.stderr


def test_commit_and_commit_again(stack: Stack, tmp_path: Path) -> None:
    base, once, twice = (f"{stack.host}/lab/{name}" for name in ("small:nydus", "committed:once", "committed:twice"))
    stack.rpull(base)
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "in-volume").write_text("of the volume\n")
    mount = f"type=bind,src={volume},dst=/data,options=rbind:rw"
    with container(stack, base, "--mount", mount) as name:
        inside(
            stack, name,
            "echo changed > /marker; rm /payload; mkdir -p /a/b; echo new > /a/b/c; ln /a/b/c /a/hard; "
            "rm -r /shadowed; mkdir /shadowed; echo fresh > /shadowed/fresh; echo no > /secret; touch /data/touched",
        )  # fmt: skip
        said = commit(stack, name[:-2], once, "--with-path", "/data", "--with-path", "!/secret")
        assert re.search(
            r"pausing container [\s\S]*packed what the container changed.*\n[\s\S]*packed /data.*\n[\s\S]*resumed", said
        )
        assert status(stack, name) == "RUNNING"
        assert inside(stack, name, "cat /secret").strip() == "no", "it runs on"
    mark = stack.registry.mark()
    assert "2 left to nydus, 3 already here, 1 downloaded" in stack.rpull(once)
    script = "cat /marker /a/b/c /shadowed/fresh /data/in-volume; ls / /shadowed /data; stat -c %h /a/hard"
    words = stack.ctr_run(once, "sh", "-c", script).split()
    assert words[:6] == ["changed", "new", "fresh", "of", "the", "volume"]
    assert {"touched", "in-volume", "etc"} < set(words)
    assert not {"payload", "secret", "above"} & set(words)
    assert words[-1] == "2"
    assert stack.registry.since(mark).blobs().bytes < 8 << 20, "the base's layers are read lazily"
    with container(stack, once) as name:
        inside(stack, name, "echo again >> /a/b/c; rm -r /data")
        commit(stack, name, twice)
        said = commit(stack, name, f"{stack.host}/lab/committed:thrice", "--maximum-times", "2", check=False)
        assert "has 2 committed layers, --maximum-times allows 2" in said
    stack.rpull(twice)
    assert stack.ctr_run(twice, "sh", "-c", "cat /a/b/c; ls /").split()[:2] == ["new", "again"]
    _, manifest = fetch_manifest(stack.registry.host, "lab/committed", "twice")
    blobs = manifest["layers"][-1]["annotations"]["containerd.io/snapshot/nydus-commit-blobs"].split(",")
    assert blobs == [layer["digest"] for layer in manifest["layers"][3:-1]]
    assert len(blobs) == 3
    check = [program("nydusify"), "check", "--target", twice, "--work-dir", tmp_path / "output"]
    assert run(check, timeout=60).returncode == 0


@pytest.mark.interop
@fuse_nodes
def test_upstreams_stack_takes_it(stack: Stack, tmp_path: Path) -> None:
    """Its check mounts the committed image with its nydusd and reads everything, twice."""
    base, target = f"{stack.host}/lab/small:nydus", f"{stack.host}/lab/committed:upstream"
    stack.rpull(base)
    with container(stack, base) as name:
        inside(stack, name, "echo changed > /marker; rm -r /shadowed; mkdir /made; ln /marker /made/link")
        commit(stack, name, target)
    done = upstream_nydusify(
        tmp_path, "check", "--source", target, "--target", target, "--source-insecure", "--target-insecure",
        "--work-dir", tmp_path / "up",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "verified image" in done.stderr


@fuse_nodes
def test_a_stopped_container_and_what_cannot_be_committed(stack: Stack) -> None:
    ref = f"{stack.host}/lab/small:nydus"
    stack.rpull(ref)
    name = f"s{time.monotonic_ns()}"
    ctr = stack.containerd.ctr
    flags = ["--net-host", "--snapshotter", "nydus", "--label", f"nerdctl/name=web-{name}"]
    nameless = f"sha256:{time.monotonic_ns():064x}"  # as Kubernetes also names images
    ctr("images", "tag", ref, nameless)
    ctr("run", *flags, nameless, name, "sh", "-c", "echo stopped > /marker")
    ctr("tasks", "rm", name, check=False)
    target = f"{stack.host}/lab/stopped:1"
    try:
        assert "--with-path has nothing to look into" in commit(
            stack, name, target, "--with-path", "/data", check=False
        )
        assert "pausing" not in commit(stack, f"web-{name}", target), "nerdctl's name for it"
    finally:
        ctr("containers", "rm", name)
    stack.rpull(target)
    assert stack.ctr_run(target, "cat", "/marker").strip() == "stopped"

    said = commit(stack, "nobody", target, check=False)
    assert f"no container nobody in namespace {stack.containerd.namespace}" in said
    plain = f"{stack.host}/lab/small:oci"
    stack.rpull(plain)
    with container(stack, plain) as name:
        said = commit(stack, name, target, check=False)
        assert "runs the plain image" in said
        assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
@fuse_nodes
def test_the_container_runs_on_whatever_ends_the_commit(stack: Stack, tmp_path: Path, end: signal.Signals) -> None:
    ref = f"{stack.host}/lab/small:nydus"
    stack.rpull(ref)
    with (tmp_path / "big").open("wb") as file:
        file.truncate(64 << 30)  # a hole: minutes of work, no disk
    mount = f"type=bind,src={tmp_path},dst=/data,options=rbind:ro"
    with container(stack, ref, "--mount", mount) as name:
        argv = commit_argv(stack, name, f"{stack.host}/lab/never:1", "--with-path", "/data")
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: status(stack, name) == "PAUSED", 60, "the pause")
            os.kill(process.pid, end)
            wait_until(lambda: status(stack, name) == "RUNNING", 60, "the container to go on")
        finally:
            process.kill()
            process.wait(30)
        assert inside(stack, name, "echo alive").strip() == "alive"
    with pytest.raises(OSError, match="404"):
        fetch_manifest(stack.registry.host, "lab/never", "1")


@fuse_nodes
def test_a_signal_that_takes_the_guards_answer_holds_nobody_up(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler may run when the answer was read and is nowhere yet. That one comes no second time."""
    ref = f"{stack.host}/lab/small:nydus"
    stack.rpull(ref)
    answer = pausing._Guard._answer

    def interrupted(guard: pausing._Guard, timeout: float) -> bytes:
        word = answer(guard, timeout)
        if word == b"paused\n":
            assert status(stack, name) == "PAUSED"
            raise KeyboardInterrupt
        return word

    monkeypatch.setattr(pausing._Guard, "_answer", interrupted)
    monkeypatch.setattr(pausing, "_PAUSE_SECONDS", 1000.0)  # beyond what this test has
    containers = Containers(str(stack.containerd.socket), stack.containerd.namespace, "t")
    with container(stack, ref) as name, containers as them:
        with pytest.raises(KeyboardInterrupt), pausing.paused(them, name):
            pytest.fail("it was not interrupted")
        assert status(stack, name) == "RUNNING"
