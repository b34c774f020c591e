"""Pull secrets of a cluster: list, watch, Gone, lost connections, and who may read them."""

from __future__ import annotations

import base64
import http.server
import os
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from nydusfs.registry.reference import Reference
from snapshotter.auth.base import Answer, Question
from snapshotter.auth.kubernetes import access, secrets
from snapshotter.auth.kubernetes.secrets import SecretsSource
from snapshotter.errors import SettingsError
from tests.lab.kubeapi import KubeApi
from tests.lab.process import wait_until

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(autouse=True)
def the_first_list_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "FIRST_SECONDS", 60.0)


def soon(ready: Callable[[], bool], timeout: float = 60.0) -> None:
    wait_until(ready, timeout, "the watch")


def entry(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def asked(source: SecretsSource, image: str) -> Answer:
    return source.ask(Question(Reference.parse(image)))


def password(source: SecretsSource, image: str) -> str:
    found = asked(source, image).credentials
    return found.password if found else ""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[KubeApi]:
    with KubeApi(tmp_path / "kube", page=2, bookmark_seconds=0.2) as server:
        yield server


@pytest.fixture
def source(cluster: KubeApi, tmp_path: Path) -> Iterator[SecretsSource]:
    config = cluster.kubeconfig(tmp_path / "config", token="admin-token")
    made = SecretsSource(access.find(str(config)))
    try:
        yield made
    finally:
        made.close()


def test_list_in_pages_then_every_change(cluster: KubeApi, source: SecretsSource) -> None:
    for number in range(5):
        cluster.put("team", f"s{number}", {f"r{number}.example": entry("u", f"p{number}")})
    cluster.put("team", "other", {"r9.example": entry("u", "p")}, type_="Opaque")
    changes: list[int] = []
    source.on_change = lambda: changes.append(1)
    source.start()
    assert [password(source, f"r{number}.example/a") for number in range(5)] == [f"p{n}" for n in range(5)]
    assert password(source, "r9.example/a") == ""
    assert len([one for one in cluster.asked if one.query.get("limit")]) == 3
    cluster.put("team", "new", {"r9.example": entry("u", "fresh")})
    soon(lambda: password(source, "r9.example/a") == "fresh")
    cluster.put("team", "new", {"r9.example": entry("u", "fresher")})
    soon(lambda: password(source, "r9.example/a") == "fresher")
    cluster.put("team", "new", None)
    soon(lambda: password(source, "r9.example/a") == "")
    soon(lambda: len(changes) >= 4)  # told behind it
    assert len(changes) == 4
    # a damaged one is left out, the others stay
    cluster.put("team", "s1", {"r1.example": "no entry"})
    soon(lambda: password(source, "r1.example/a") == "")
    assert password(source, "r0.example/a") == "p0"


def test_what_was_missed_comes_after_gone_and_after_lost_connections(cluster: KubeApi, source: SecretsSource) -> None:
    cluster.put("a", "one", {"r.example": entry("u", "1")})
    source.start()
    assert password(source, "r.example/x") == "1"

    def watches() -> list[str]:
        return [one.query["resourceVersion"] for one in cluster.asked if one.watch]

    soon(lambda: bool(watches()))
    before = len(watches())
    cluster.cut()
    cluster.put("a", "one", {"r.example": entry("u", "2")})
    soon(lambda: password(source, "r.example/x") == "2")
    assert len(watches()) > before
    lists = [one for one in cluster.asked if not one.watch]
    assert len(lists) == 1  # taken up where it was, not begun anew
    # the server is away, things happen, and it has forgotten what happened before it comes back
    cluster.stop()
    cluster.put("a", "one", {"r.example": entry("u", "3")})
    cluster.compact()
    soon(lambda: "out of date" in asked(source, "r.example/x").reason)
    assert password(source, "r.example/x") == "2"  # better than nothing, and said
    cluster.start()
    soon(lambda: password(source, "r.example/x") == "3")
    assert len([one for one in cluster.asked if not one.watch]) == 2
    assert "out of date" not in asked(source, "r.example/x").reason


def test_bookmarks_move_a_quiet_watch_past_a_compaction(
    cluster: KubeApi, source: SecretsSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.put("a", "one", {"r.example": entry("u", "1")})
    came, watch = list[str](), source._watch

    def watched(client: httpx.Client, version: str) -> Iterator[str]:
        for seen in watch(client, version):
            came.append(seen)
            yield seen

    monkeypatch.setattr(source, "_watch", watched)
    source.start()
    assert password(source, "r.example/x") == "1"
    cluster.put("b", "unseen", {"x.example": entry("u", "1")}, type_="Opaque")  # raises the version, gives no event
    soon(lambda: cluster.watching == 1)
    cluster.compact()  # what the list said is too old now
    soon(lambda: bool(came) and int(came[-1]) >= cluster._oldest)  # and it is here, not only sent
    cluster.cut()
    cluster.put("a", "one", {"r.example": entry("u", "2")})
    soon(lambda: password(source, "r.example/x") == "2")
    assert len([one for one in cluster.asked if not one.watch]) == 1


def test_client_certificates_and_tokens_of_files(cluster: KubeApi, tmp_path: Path) -> None:
    cluster.put("a", "one", {"r.example": entry("u", "1")})
    token = tmp_path / "token"
    token.write_text("admin-token\n")
    by_file = cluster.kubeconfig(tmp_path / "by-file", token="x", data=False)
    by_file.write_text(by_file.read_text().replace("token: x", "tokenFile: token"))
    plugin = tmp_path / "plugin"
    plugin.write_text(
        '#!/bin/sh\ncase "$KUBERNETES_EXEC_INFO" in *ExecCredential*) ;; *) exit 1;; esac\n'
        """echo '{"kind": "ExecCredential", "apiVersion": "client.authentication.k8s.io/v1", """
        """"status": {"token": "admin-token"}}'\n"""
    )
    plugin.chmod(0o755)
    by_plugin = cluster.kubeconfig(tmp_path / "by-plugin", token="x")
    by_plugin.write_text(
        by_plugin.read_text().replace(
            "token: x", "exec: {apiVersion: client.authentication.k8s.io/v1, command: ./plugin}"
        )
    )
    for config in (
        cluster.kubeconfig(tmp_path / "inside", certificate=True),
        cluster.kubeconfig(tmp_path / "beside", certificate=True, data=False),
        by_file,
        by_plugin,
    ):
        source = SecretsSource(access.find(str(config)))
        source.start()
        try:
            assert password(source, "r.example/x") == "1", config
        finally:
            source.close()


def test_in_a_pod(cluster: KubeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.put("a", "one", {"r.example": entry("u", "1")})
    folder = tmp_path / "serviceaccount"
    folder.mkdir()
    shutil.copy(cluster.authority.certificate, folder / "ca.crt")
    (folder / "token").write_text("admin-token")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(cluster.port))
    source = SecretsSource(access.in_cluster(folder))
    source.start()
    try:
        assert password(source, "r.example/x") == "1"
    finally:
        source.close()


def test_refusals_say_what_to_change(cluster: KubeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for token, words in (("nobody-token", "ClusterRole"), ("no-such-token", "is not accepted")):
        source = SecretsSource(access.find(str(cluster.kubeconfig(tmp_path / "config", token=token))))
        source.start()
        try:
            answer = asked(source, "r.example/x")
            assert (answer.failed, answer.credentials) == (True, None)
            assert words in answer.reason
        finally:
            source.close()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(SettingsError, match="no cluster to be found"):
        access.find("")
    with pytest.raises(SettingsError, match="cannot be read"):
        access.find(str(tmp_path / "missing"))
    (tmp_path / "bad").write_text("current-context: x\ncontexts: [{name: x, context: {cluster: y}}]\n")
    with pytest.raises(SettingsError, match="clusters holds no 'y'"):
        access.find(str(tmp_path / "bad"))


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "http://u:pw-Zq#@127.0.0.1", "ftp://127.0.0.1:1"])
def test_a_proxy_that_cannot_be_used_is_told_and_no_mount_waits_for_it(proxy: str, tmp_path: Path) -> None:
    reach = access.Access("https://127.0.0.1:1", "", ssl.create_default_context, lambda: "", proxy=proxy)
    source = SecretsSource(reach)
    source.start()
    try:
        answer = asked(source, "r.example/x")
        assert answer.failed and "no answer yet" not in answer.reason and "pw-Zq" not in answer.reason
    finally:
        source.close()


def test_keys_of_secrets_as_kubelet_reads_them(cluster: KubeApi, source: SecretsSource) -> None:
    cluster.put("a", "wide", {"*.example:5000": entry("u", "wide"), "https://index.docker.io/v1/": entry("u", "hub")})
    cluster.put("a", "path", {"r.example:5000/team": entry("u", "team")})
    source.start()
    assert password(source, "r.example:5000/team/app:1") == "team"
    assert password(source, "r.example:5000/other/app:1") == "wide"
    assert password(source, "r.example/team/app:1") == ""
    assert password(source, "busybox") == "hub"


@pytest.mark.interop
def test_kubectl_finds_the_lab_server_real(cluster: KubeApi, source: SecretsSource, tmp_path: Path) -> None:
    """The server of these tests is held against a client of the other side."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("interop: no kubectl here")
    config = cluster.kubeconfig(tmp_path / "kubectl", certificate=True)
    env = {**os.environ, "KUBECONFIG": str(config), "HOME": str(tmp_path)}

    def run(*arguments: str, text: str = "") -> str:
        done = subprocess.run([kubectl, *arguments], env=env, input=text, capture_output=True, text=True, timeout=40)
        assert done.returncode == 0, done.stderr
        return done.stdout

    source.start()
    made = run("create", "secret", "docker-registry", "pull", "--docker-server=r.example", "--docker-username=u",
               "--docker-password=by-kubectl", "--dry-run=client", "-o", "json")  # fmt: skip
    run("create", "--raw", "/api/v1/namespaces/team/secrets", "-f", "-", text=made)
    soon(lambda: password(source, "r.example/x") == "by-kubectl")
    assert "team" in run(
        "get", "secrets", "-A", "--chunk-size=1", "--field-selector", "type=kubernetes.io/dockerconfigjson"
    )
    run("delete", "secret", "pull", "-n", "team")
    soon(lambda: password(source, "r.example/x") == "")


@pytest.mark.parametrize("answer", [b"", b'{"type":"BOOKMARK"}\n', b"[1]\n", b'{"type":"ADDED","object":{}}\n'])
def test_a_server_that_is_none_is_not_asked_all_the_time_and_not_given_up(answer: bytes) -> None:
    """As of a proxy between: whatever a watch gets, the next one begins, a moment later."""
    watches = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            watch = "watch=1" in self.path
            watches.extend([self.path] if watch else [])
            body = answer if watch else b'{"metadata":{"resourceVersion":"5"},"items":[]}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        reach = access.Access(f"http://127.0.0.1:{server.server_port}", "", ssl.create_default_context, lambda: "")
        source = SecretsSource(reach)
        source.start()
        try:
            soon(lambda: len(watches) > 1)
            before = len(watches)
            time.sleep(1)
            assert len(watches) - before < 10
            soon(lambda: len(watches) > before)
        finally:
            source.close()
            server.shutdown()
