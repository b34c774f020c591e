"""The client of blobs and its connections, against a real peer."""

from __future__ import annotations

import errno
import os
import ssl
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from nydusfs.http import ConnectFailed, HttpClient, Url, client, parse_url
from nydusfs.http.connection import Tls
from tests.lab.authority import Authority
from tests.lab.faulty import FaultyServer, faulty_server, self_signed
from tests.lab.tiny import noise

BLOB_ID, BLOB = "ab" * 32, noise(10_000)


def address(server: FaultyServer) -> Url:
    return parse_url(f"{server.url}/v2/a/b/blobs/sha256:{BLOB_ID}")


async def get(http: HttpClient, server: FaultyServer) -> bytes:
    answer = await http.get_range(address(server), 5, 100, (), connect_timeout=20, timeout=20)
    assert answer.body == BLOB[5:105]
    return bytes(answer.body)


class Closing(ssl.SSLContext):
    """Of a server that ends this many connections behind their handshakes."""

    ends = 0

    def wrap_socket(self, *given: Any, **named: Any) -> ssl.SSLSocket:
        made = super().wrap_socket(*given, **named)
        if self.ends:
            self.ends -= 1
            made.close()
            raise OSError("ended")
        return made


@pytest.mark.parametrize("ends", [0, 1])
def test_a_connection_made_ahead_is_used_with_tls_too(ends: int, tmp_path: Path) -> None:
    """The tickets that TLS 1.3 sends behind its handshake are waiting on it then, and perhaps its end."""
    context = Closing(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*self_signed(tmp_path))
    context.ends = ends

    async def main(server: FaultyServer) -> None:
        http = HttpClient(Tls(skip_verify=True))
        await http.prepare(address(server).origin, 20)
        await trio.sleep(0.3)
        await get(http, server)
        assert server.connections == 1 + ends
        http.close()

    with faulty_server({BLOB_ID: BLOB}, tls=context) as server:
        trio.run(main, server)


@pytest.mark.parametrize("tls", [False, True])
def test_no_descriptor_left_is_a_connection_that_failed(
    tls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*self_signed(tmp_path))

    def full(_: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def main(server: FaultyServer) -> None:
        http = HttpClient(Tls(skip_verify=True))
        with monkeypatch.context() as patched:
            patched.setattr(os, "dup", full)
            with pytest.raises(ConnectFailed, match="too many open files"):
                await get(http, server)
        await get(http, server)
        http.close()

    with faulty_server({BLOB_ID: BLOB}, tls=context if tls else None) as server:
        trio.run(main, server)


def test_connections_to_hosts_that_nobody_asks_any_more_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redirects may lead to another host each time."""
    monkeypatch.setattr(client, "IDLE_SECONDS", 0.0)

    async def main(servers: list[FaultyServer]) -> None:
        http = HttpClient()
        for server in servers:
            await get(http, server)
        with trio.fail_after(60):
            while [len(server._open) for server in servers] != [0, 0, 0, 1]:  # noqa: ASYNC110 - threads of their own
                await trio.sleep(0.01)
        http.close()

    with ExitStack() as stack:
        trio.run(main, [stack.enter_context(faulty_server({BLOB_ID: BLOB})) for _ in range(4)])


def test_certificates_that_are_replaced_count_for_the_next_connection(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    files = {name: tmp_path / name for name in ("ca.crt", "client.cert", "client.key")}

    def install(authority: Authority) -> None:
        for path, source in zip(files.values(), (authority.certificate, *authority.issue("client")), strict=True):
            other = path.with_suffix(".new")
            other.write_bytes(source.read_bytes())
            other.replace(path)

    async def main(first: FaultyServer, second: FaultyServer) -> None:
        tls = Tls((str(files["ca.crt"]),), client=((str(files["client.cert"]), str(files["client.key"])),))
        http = HttpClient(tls)
        await get(http, first)
        install(new)
        await get(http, second)
        await get(http, first)  # a connection that is there goes on
        assert (first.connections, second.connections) == (1, 1)
        files["client.key"].write_text("half a k")
        for _ in range(2):
            http.close()
            await get(http, second)
        assert caplog.text.count("going on with") == 1 and str(files["client.cert"]) in caplog.text
        http.close()

    with ExitStack() as stack:
        servers = []
        for authority in (old, new):
            context = authority.server_context()
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(authority.certificate)
            servers.append(stack.enter_context(faulty_server({BLOB_ID: BLOB}, tls=context)))
        install(old)
        trio.run(main, *servers)
