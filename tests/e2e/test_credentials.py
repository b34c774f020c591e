"""Private images whose credentials only the snapshotter's own sources have: CRI, a plugin, a cluster's secrets."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from snapshotter.doctor import remote
from snapshotter.doctor.finding import Level
from snapshotter.node import Choices
from snapshotter.node import Node as LookedAt
from tests.e2e.conftest import containerd_of, require_programs
from tests.lab.authority import Authority
from tests.lab.cri import Cri
from tests.lab.kubeapi import KubeApi
from tests.lab.process import remove_tree, run, wait_until, work_dir
from tests.lab.registry import Registry
from tests.lab.sample import pause_image, small_image
from tests.lab.stack import Stack, StackOptions, program
from tests.lab.tokens import TokenServer

pytestmark = pytest.mark.timeout(300)

PLUGIN = """#!/bin/sh
cat >/dev/null
test -e "$ANSWER" || exit 1
cat "$ANSWER"
"""


@dataclass
class Node:
    """A stack before a private registry; its snapshotter has every source, and docker's configuration is empty."""

    stack: Stack
    tokens: TokenServer
    cluster: KubeApi
    plugin_answer: Path
    env: dict[str, str]  # of clients that log in themselves

    def explain(self, ref: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "snapshotter.nydusctl", "auth", "explain", ref, "--json", "--address"]
        done = run([*command, self.stack.snapshotter.socket], timeout=60, env=dict(os.environ))
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def answer_plugin(self, password: str) -> None:
        answer = {
            "kind": "CredentialProviderResponse",
            "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
            "cacheKeyType": "Registry",
            "cacheDuration": "2s",
            "auth": {self.stack.host: {"username": self.tokens.user, "password": password}},
        }
        fresh = self.plugin_answer.with_suffix(".new")
        fresh.write_text(json.dumps(answer))
        fresh.rename(self.plugin_answer)

    def read(self, ref: str, *command: str) -> str:
        return self.stack.ctr_run(ref, "sh", "-c", " ".join(command))


@dataclass
class Private:
    """Registries and what is in them, for both generations of containerd."""

    work: Path
    tokens: TokenServer
    cluster: KubeApi
    public: Registry
    registry: Registry
    env: dict[str, str]


@pytest.fixture(scope="module")
def private() -> Iterator[Private]:
    require_programs()
    with contextlib.ExitStack() as exits:
        work = work_dir()
        exits.callback(remove_tree, work)
        tokens = exits.enter_context(TokenServer(work / "tokens"))
        tokens.life = 4
        cluster = exits.enter_context(KubeApi(work / "kube"))
        public = exits.enter_context(Registry(work / "open"))
        pause_image(work / "pause").push(public.host, "lab/pause", "1")
        with Registry(work / "reg") as open_door:
            for name in ("app", "plugin", "kube"):  # no two share a blob: reads are to need the registry
                small_image(work / name, name, payload=8 << 20).push(open_door.host, f"team/{name}", "oci")
        registry = exits.enter_context(Registry(work / "reg", token_realm=tokens.realm))
        env = {**os.environ, "DOCKER_CONFIG": str(tokens.docker_config(work / "login", registry.host))}
        convert = [program("nydusify"), "convert", "--nydus-image", program("nydus-image"), "--work-dir", work / "w"]
        for name in ("app", "plugin", "kube"):
            source, target = f"{registry.host}/team/{name}:oci", f"{registry.host}/team/{name}:nydus"
            run([*convert, "--source", source, "--target", target], timeout=120, env=env)
        yield Private(work, tokens, cluster, public, registry, env)


@pytest.fixture(scope="module", params=["1.6", "2.x"])
def node(request: pytest.FixtureRequest, private: Private) -> Iterator[Node]:
    containerd = containerd_of(request.param)
    work, registry = private.work, private.registry
    bin_dir = work / "bin"
    bin_dir.mkdir(exist_ok=True)
    (bin_dir / "lab").write_text(PLUGIN)
    (bin_dir / "lab").chmod(0o755)
    provider = {
        "name": "lab",
        "matchImages": [f"{registry.host}/team/plugin"],
        "defaultCacheDuration": "1h",
        "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
        "env": [{"name": "ANSWER", "value": str(work / "answer")}],
    }
    (work / "providers.yaml").write_text(
        f"apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n- {json.dumps(provider)}\n"
    )
    private.cluster.put("team", "pull", {})
    stack_work = work_dir()
    options = StackOptions(
        registry=registry,
        prefetch=False,
        containerd=containerd,
        pause_ref=f"{private.public.host}/lab/pause:1",
        snapshotter_arguments=(
            "--enable-cri-keychain",
            f"--image-service-address={stack_work}/n1/c/c.sock",
            "--enable-kubeconfig-keychain",
            f"--kubeconfig-path={private.cluster.kubeconfig(work / 'kubeconfig', certificate=True)}",
            "--enable-kubelet-credential-providers",
            f"--credential-provider-config={work / 'providers.yaml'}",
            f"--credential-provider-bin-dir={bin_dir}",
        ),
    )
    with Stack(options, stack_work) as stack:
        stack.containerd.add_host(private.public.host, private.public.url)
        yield Node(stack, private.tokens, private.cluster, work / "answer", private.env)
    assert stack.leftovers == []


def test_what_a_kubelet_sends_is_what_reads_use(node: Node) -> None:
    stack, tokens = node.stack, node.tokens
    ref = f"{stack.host}/team/app:nydus"
    cri = Cri(stack.containerd.socket, stack.work, images=stack.snapshotter.socket)
    try:
        pod, config = cri.sandbox()
        try:
            with pytest.raises(grpc.RpcError) as refused:
                cri.pull(ref, config, tokens.user, "wr0ng-password")
            assert refused.value.code() is not grpc.StatusCode.UNAVAILABLE
            assert "401" in refused.value.details() or "authorization" in refused.value.details()
            assert node.explain(ref)["source"] is None  # what was refused is not kept
            pulled = cri.pull(ref, config, tokens.user, tokens.password)
            assert cri.pull_alpha(ref, tokens.user, tokens.password) == pulled
            assert stack.host.encode() in cri.image_call("ListImages")
            assert stack.host.encode() in cri.image_call("ListImages", package="runtime.v1alpha2")
            with pytest.raises(grpc.RpcError) as unknown:
                cri.image_call("NoSuchMethod")
            assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED
            told = node.explain(ref)
            assert (told["source"], told["username"]) == ("cri", tokens.user)
            assert cri.run(pod, config, pulled, "cat", "/marker") == (0, "app")
            # nobody sends them again: neither after a restart of the snapshotter nor when its nydusd had to go
            stack.snapshotter.kill()
            stack.snapshotter.end_daemons()
            stack.snapshotter.start()
            assert node.explain(ref)["source"] == "cri"
            done: list[tuple[int, str]] = []

            def runs() -> bool:
                """containerd keeps away from a snapshotter that was gone, for up to 3 s."""
                try:
                    done.append(cri.run(pod, config, pulled, "sh", "-c", "sha256sum < /payload; cat /payload.sha256"))
                except grpc.RpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise
                return bool(done)

            wait_until(runs, 60, "containerd, to ask the snapshotter again")
            ((code, text),) = done
            assert (code, text.split()[0]) == (0, text.split()[2])
        finally:
            cri.remove(pod)
        cri.remove_image(ref)
        assert node.explain(ref)["source"] is None
    finally:
        cri.close()


def test_a_plugins_credentials_are_renewed_in_running_images(node: Node) -> None:
    """The registry's password changes under a mounted image; a reader behind the change sees nothing of it."""
    stack, tokens = node.stack, node.tokens
    ref = f"{stack.host}/team/plugin:nydus"
    first = tokens.password
    node.answer_plugin(first)
    stack.rpull(ref, env=node.env)
    assert node.read(ref, "cat /marker").strip() == "plugin"
    assert node.explain(ref)["source"] == "kubelet"
    tokens.password = "changed-" + first
    try:
        node.answer_plugin(tokens.password)
        log = stack.snapshotter.root / "logs" / "nydus-snapshotter.log"
        said = f"credentials of image {ref} renewed from kubelet"
        wait_until(lambda: said in log.read_text(), 60, "the renewal")
        tokens.granted.clear()
        (payload,) = (
            path / "payload"
            for path in (stack.snapshotter.root / "mnt").iterdir()
            if (path / "marker").read_text() == "plugin"
        )
        for part in range(8):  # as long as its token lasts the password is not asked for
            read = f"f = open({str(payload)!r}, 'rb'); f.seek({part} << 20); f.read(4096)"
            run([sys.executable, "-c", read], timeout=30)  # not here: this process must not hang in a mount
            if asked := [known for scope, known in tokens.granted if "team/plugin" in scope]:  # not for other images
                break
            time.sleep(1)
        assert asked
        assert all(asked)
        sums = node.read(ref, "sha256sum < /payload; cat /payload.sha256").split()
        assert sums[0] == sums[2]
    finally:
        tokens.password = first


def test_a_clusters_secrets(node: Node) -> None:
    stack, tokens = node.stack, node.tokens
    ref = f"{stack.host}/team/kube:nydus"
    stack.rpull(ref, env=node.env)
    assert "secrets has a key for this image" in json.dumps(node.explain(ref))
    auth = base64.b64encode(f"{tokens.user}:{tokens.password}".encode()).decode()
    node.cluster.put("team", "pull", {f"{stack.host}/team/kube": {"auth": auth}})
    wait_until(lambda: node.explain(ref)["source"] == "kubernetes", 60, "the watch")
    sums = node.read(ref, "sha256sum < /payload; cat /payload.sha256").split()
    assert sums[0] == sums[2]
    told = subprocess.run(
        [sys.executable, "-m", "snapshotter.nydusctl", "auth", "explain", ref, "-a", stack.snapshotter.socket],
        capture_output=True, text=True, timeout=60,
    ).stdout  # fmt: skip
    assert f"user and password of '{tokens.user}' from kubernetes" in told
    assert "secret team/pull" in told
    assert auth not in told
    assert tokens.password not in told


def test_secrets_lie_in_private_files_alone(node: Node) -> None:
    """After all of the above: not in the database, logs or command lines; where they are, only root can read."""
    root, password = node.stack.snapshotter.root, node.tokens.password.encode()
    basic = base64.b64encode(f"{node.tokens.user}:".encode() + password)
    for folder, folders, names in os.walk(root):  # programs work in it: what goes meanwhile is passed over
        if Path(folder) == root:
            folders[:] = set(folders) - {"mnt", "cache"}
        for path in (Path(folder, name) for name in names):
            with contextlib.suppress(FileNotFoundError):
                data = path.read_bytes() if path.is_file() else b""
                if password in data or basic in data:
                    assert oct(path.stat().st_mode)[-3:] == "600", path
                    assert path.suffix == ".json", path
    for log in (node.stack.snapshotter.log, node.stack.containerd.log):
        assert password not in log.read_bytes()
    for pid in (node.stack.snapshotter.pid, *node.stack.snapshotter.daemons()):
        assert password not in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_runtime_that_is_not_there(node: Node) -> None:
    """The same as kubelet would be told by the runtime's own socket: unavailable, and where it was looked for."""
    stack = node.stack
    socket = stack.containerd.socket
    moved = socket.with_suffix(".moved")
    shutil.move(socket, moved)
    cri = Cri(moved, stack.work, images=stack.snapshotter.socket)
    try:
        stack.snapshotter.kill()  # connections that are there already would go on
        stack.snapshotter.start()
        with pytest.raises(grpc.RpcError) as refused:
            cri.image_call("ListImages")
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "remote.auth.image_service_address" in refused.value.details()
        shutil.move(moved, socket)

        def answers() -> bool:
            try:
                cri.image_call("ListImages")
            except grpc.RpcError:
                return False
            return True

        wait_until(answers, 60, "the runtime")
    finally:
        if moved.exists():
            shutil.move(moved, socket)
        cri.close()


def test_a_registry_that_wants_certificates() -> None:
    """Its authority and the certificate to show are in a folder like certs.d: detection and reads go through it."""
    require_programs()
    with contextlib.ExitStack() as exits:
        work = work_dir()
        exits.callback(remove_tree, work)
        authority = Authority(work / "ca")
        with Registry(work / "reg") as door:
            port = door.port
            small_image(work / "image", payload=8 << 20).push(door.host, "team/app", "oci")
            convert = [
                program("nydusify"),
                "convert",
                "--nydus-image",
                program("nydus-image"),
                "--work-dir",
                work / "w",
            ]
            source, target = f"{door.host}/team/app:oci", f"{door.host}/team/app:nydus"
            run([*convert, "--source", source, "--target", target, "--with-referrer"], timeout=120)
        tls = (*authority.issue("server"), authority.certificate)
        registry = exits.enter_context(Registry(work / "reg", port, tls=tls))
        hosts = work / "certs.d" / registry.host
        hosts.mkdir(parents=True)
        certificate, key = authority.issue("client")
        text = (
            f'server = "{registry.url}"\n[host."{registry.url}"]\n  capabilities = ["pull", "resolve"]\n'
            f'  ca = "{authority.certificate}"\n  client = [["{certificate}", "{key}"]]\n'
        )
        (hosts / "hosts.toml").write_text(text)
        options = StackOptions(
            registry=registry,
            prefetch=False,
            backend={"scheme": "https"},
            snapshotter_arguments=("--enable-referrer-detect", f"--mirrors-config-dir={work / 'certs.d'}"),
        )
        stack = exits.enter_context(Stack(options))
        (stack.containerd.hosts_dir / registry.host / "hosts.toml").write_text(text)
        cri = Cri(stack.containerd.socket, stack.work)
        exits.callback(cri.close)
        ref = f"{registry.host}/team/app:oci"
        cri.images.PullImage(cri.messages.PullImageRequest(image=cri.messages.ImageSpec(image=ref)), timeout=120)
        mark = registry.mark()
        stack.containerd.namespace = "k8s.io"
        sums = stack.ctr_run(ref, "sh", "-c", "sha256sum < /payload; cat /payload.sha256").split()
        node = LookedAt(Choices(root=str(stack.snapshotter.root), containerd=str(stack.containerd.socket)))
        about = [one for check in remote.CHECKS for one in check(node)]
        assert {one.check: one.level for one in about} == dict.fromkeys(
            ("registry.reach", "registry.credentials"), Level.OK
        ), about
        assert sums[0] == sums[2]
        assert {one.status for one in registry.since(mark).blobs().requests} == {206}
