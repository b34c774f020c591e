"""What the doctor says of registries, mirrors and proxies."""

from __future__ import annotations

import json
import ssl
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from snapshotter.doctor import remote
from snapshotter.doctor.finding import Finding, Level
from snapshotter.nydusd_config import load_template
from tests.lab.authority import Authority
from tests.lab.faulty import dead_port
from tests.lab.httpd import Handler, reply, serve


def examined(work: Path, image: str, **backend: Any) -> list[Finding]:
    path = work / "nydusd.json"
    path.write_text(json.dumps({"device": {"backend": {"type": "registry", "config": backend}}}))
    node: Any = SimpleNamespace(
        need=lambda: None, daemons=list, instances=list, template=load_template(path), unreachable=set()
    )
    return [*remote.reachability(node, (image,)), *remote.credentials(node, (image,))]


def test_the_registry_is_asked_as_nydusd_asks_it(tmp_path: Path) -> None:
    """By the server of hosts.toml where the registry is out of reach, with certificates of both sides."""
    authority = Authority(tmp_path / "ca")
    context, (certificate, key) = authority.server_context(), authority.issue("client")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(authority.certificate)

    def answer(handler: Handler) -> None:
        reply(handler, 200, Docker_Content_Digest="sha256:" + "a" * 64)

    with serve(answer, context) as server, dead_port() as host:
        folder = tmp_path / "certs.d" / host
        folder.mkdir(parents=True)
        (folder / "hosts.toml").write_text(
            f'server = "https://{server.host}"\nca = "{authority.certificate}"\nclient = [["{certificate}", "{key}"]]\n'
        )
        found = examined(tmp_path, f"{host}/a/b:1", scheme="https", hosts_dir=str(tmp_path / "certs.d"))
    assert [(one.check, one.level) for one in found] == [
        ("registry.reach", Level.OK), ("registry.credentials", Level.OK)], found  # fmt: skip
    assert server.host in found[0].text


def test_a_proxys_password_is_shown_to_nobody(tmp_path: Path) -> None:
    with dead_port() as host:
        proxy = {"url": f"http://me:pw-Zq@{host}"}
        found = examined(tmp_path, f"{host}/a/b:1", scheme="http", hosts_dir="", proxy=proxy)
    assert [one.check for one in found] == ["proxy.reach", "registry.reach"]
    assert "pw-Zq" not in str(found) and host in found[0].text
