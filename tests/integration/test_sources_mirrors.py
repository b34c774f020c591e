"""Mirrors, proxies and tokens as they are configured: several registries behind one mirror, containerd's hosts.toml,
Dragonfly's headers and refusals, tokens of many repositories."""

from __future__ import annotations

import base64
import json
import logging
import ssl
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from nydusfs.config import BackendConfig, load_backend, load_config
from nydusfs.config.model import RegistryBackend
from nydusfs.errors import SourceError
from nydusfs.sources import Priority, RegistrySource, SourceHub, WrongBytes, open_source, race, registry
from tests.lab.daemon import Nydusd, can_mount_fuse, reader, wait_until
from tests.lab.faulty import FaultyServer, dead_port, faulty_server
from tests.lab.tiny import noise, tiny_image

BLOB_ID, BLOB = "ab" * 32, noise(200_000)
AUTH = base64.b64encode(b"user:secret").decode()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines under test stall for seconds: no hedge shall be taken for a choice."""
    monkeypatch.setattr(registry, "MIRROR_PATIENCE", 20.0)
    monkeypatch.setattr(race, "UNKNOWN", 20.0)
    monkeypatch.setattr(race, "ORIGIN_HEDGE", 20.0)


@pytest.fixture
def server() -> Any:
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(faulty_server({BLOB_ID: BLOB}, **settings))


def backend(origin: FaultyServer, repo: str = "a/b", **more: Any) -> RegistryBackend:
    options = {
        "host": origin.netloc, "repo": repo, "scheme": "https" if origin.tls else "http", "timeout": 30,
        "connect_timeout": 20, **more,
    }  # fmt: skip
    text = json.dumps({"device": {"backend": {"type": "registry", "config": options}}, "mode": "direct"})
    found = load_config(text, "test").backend
    assert isinstance(found, RegistryBackend)
    return found


def run(scenario: Callable[[SourceHub], Awaitable[None]]) -> None:
    failures: list[BaseException] = []

    async def main() -> None:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                hub = SourceHub(nursery)
                try:
                    await scenario(hub)
                except Exception as error:  # not as a group
                    failures.append(error)
                nursery.cancel_scope.cancel()
                hub.close()

    trio.run(main)
    if failures:
        raise failures[0]


async def read(source: Any, offset: int = 0, priority: Priority = Priority.DEMAND) -> None:
    async def check(body: bytes | bytearray) -> None:
        if bytes(body) != BLOB[offset : offset + 4096]:
            raise WrongBytes("its digest is wrong")

    await source.read(BLOB_ID, offset, 4096, priority, check)


def test_several_registries_behind_one_mirror(server: Any) -> None:
    """By header or by query, each request says which registry is meant; a header's placeholder is filled in."""
    first, second, mirror = server(), server(), server()
    by_header = {"host": mirror.url, "headers": {"X-Dragonfly-Registry": "{registry}", "X-Host": "at {host}"}}
    by_query = {"host": mirror.url, "ns": True}

    async def scenario(hub: SourceHub) -> None:
        for origin in (first, second):
            await read(open_source(backend(origin, mirrors=[by_header]), hub))
            await read(open_source(backend(origin, mirrors=[by_query]), hub))

    run(scenario)
    assert not first.requests and not second.requests
    named = [request.headers.get("x-dragonfly-registry") for request in mirror.requests]
    assert named == [first.url, None, second.url, None]
    assert mirror.requests[0].headers["x-host"] == f"at {first.netloc}"
    target = f"/v2/a/b/blobs/sha256:{BLOB_ID}"
    assert [request.target for request in mirror.requests] == [
        target, f"{target}?ns=127.0.0.1%3A{first.port}", target, f"{target}?ns=127.0.0.1%3A{second.port}",
    ]  # fmt: skip


def test_a_mirror_that_looks_in_another_registry_is_told_about(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    origin, mirror = server(), server(mode="404")
    headers = {"X-Dragonfly-Registry": "https://index.docker.io"}

    async def scenario(hub: SourceHub) -> None:
        source = open_source(backend(origin, mirrors=[{"host": mirror.url, "headers": headers}]), hub)
        await read(source)
        await read(source, 4096)

    run(scenario)
    lines = [record.getMessage() for record in caplog.records if "{registry}" in record.getMessage()]
    assert len(lines) == 1 and "in https://index.docker.io: write {registry} in its header" in lines[0]


@pytest.mark.root
def test_credentials_and_headers_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := can_mount_fuse():
        pytest.skip(reason)
    image = tiny_image(tmp_path, {"hello": b"hello, world\n"})
    monkeypatch.setenv("IMAGE_PULL_AUTH", AUTH)
    monkeypatch.setenv("NYDUS_HEADER_X-Tenant", "blue")
    monkeypatch.setenv("NYDUS_HEADER_Bad name", "not sent")
    with faulty_server({image.blob_id: image.blob}, auth="bearer") as origin:
        config = tmp_path / "config.json"
        options = {"host": origin.netloc, "repo": "a/b", "scheme": "http", "auth": base64.b64encode(b"o:ld").decode()}
        device = {"backend": {"type": "registry", "config": options}}
        config.write_text(json.dumps({"device": device, "mode": "direct"}))
        with Nydusd("--config", config, "--bootstrap", image.bootstrap) as daemon:
            code = "import sys; sys.stdout.write(open(sys.argv[1]).read())"
            assert reader(code, daemon.mnt / "hello").stdout == "hello, world\n"
            assert AUTH not in daemon.log_text()
            known = daemon.get("metrics/sources").body
            assert [(one["address"], one["state"]) for one in known] == [(origin.url, "up")]
            command = [sys.executable, "-m", "nydusfs.daemon.ctl", "--sock", str(daemon.sock), "metrics", "sources"]
            shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
            assert shown.startswith(f"{origin.url}  up, ")
        assert all(request.headers["x-tenant"] == "blue" for request in origin.data_requests)


def certificates(folder: Path) -> tuple[ssl.SSLContext, Path, Path]:
    """A server's context that wants a client certificate, and the files of its authority and of the client."""
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=lab"
    for name in ("server", "client"):
        files = ["-keyout", str(folder / f"{name}.key"), "-out", str(folder / f"{name}.pem")]
        more = ["-addext", "subjectAltName=IP:127.0.0.1"]
        subprocess.run([*command.split(), *more, *files], check=True, capture_output=True, timeout=30)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(folder / "client.pem")
    return context, folder / "server.pem", folder / "client.pem"


def test_containerds_hosts_are_mirrors_too(server: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context, authority, client = certificates(tmp_path)
    origin, first, second = server(), server(), server(tls=context)
    folder = tmp_path / "certs.d" / origin.netloc
    folder.mkdir(parents=True)
    (folder / "hosts.toml").write_text(
        f"""
        server = "{origin.url}"
        [host."{second.url}/proxy/v2"]
        capabilities = ["pull", "resolve"]
        override_path = true
        ca = "{authority}"
        client = [["{client}", "{client.with_suffix(".key")}"]]
        [host."{second.url}/proxy/v2".header]
        X-Registry = "{{registry}}"
        [host."http://127.0.0.1:1"]
        capabilities = ["push"]
        """
    )
    listed = str(tmp_path / "certs.d")

    async def scenario(hub: SourceHub) -> None:
        await read(open_source(backend(origin, hosts_dir=listed), hub))
        assert not origin.requests
        assert second.requests[0].target == f"/proxy/v2/a/b/blobs/sha256:{BLOB_ID}?ns=127.0.0.1%3A{origin.port}"
        assert second.requests[0].headers["x-registry"] == origin.url
        # The configuration's own mirrors come first.
        await read(open_source(backend(origin, hosts_dir=listed, mirrors=[{"host": first.url}]), hub), 8192)
        assert len(first.requests) == 1 and len(second.requests) == 1
        second.mode = "503"
        await read(open_source(backend(origin, hosts_dir=listed), hub), 4096)
        assert len(origin.requests) == 1
        (folder / "hosts.toml").write_text("server = [")
        await read(open_source(backend(origin, hosts_dir=listed), hub), 4096)
        assert "hosts.toml is not TOML" in caplog.text and "going on without it" in caplog.text

    run(scenario)


@pytest.mark.parametrize("folder", ["{host}", "_default"])
def test_containerds_server_is_asked_in_place_of_the_registry(server: Any, tmp_path: Path, folder: str) -> None:
    """Also where the registry itself is out of reach, for tokens too, and by plain HTTP if it says so."""
    other = server(auth="bearer")
    with dead_port() as host:
        (tmp_path / folder.format(host=host)).mkdir()
        (tmp_path / folder.format(host=host) / "hosts.toml").write_text(f'server = "{other.url}/sub"\n')

        async def scenario(hub: SourceHub) -> None:
            settings = {"host": host, "scheme": "https", "auth": AUTH, "hosts_dir": str(tmp_path)}
            source = open_source(backend(other, **settings), hub)
            await source.greet()
            await read(source)
            told = f"?ns={host.replace(':', '%3A')}"
            targets = [one.target for one in other.requests]
            assert targets == [f"/sub/v2/{told}", f"/sub/v2/a/b/blobs/sha256:{BLOB_ID}{told}"]
            with pytest.raises(SourceError, match=f"registry {other.url}/sub: status 404"):
                await source.read("cd" * 32, 0, 10, Priority.DEMAND)

        run(scenario)


def test_a_server_that_is_the_registry_itself_is_told_nothing(server: Any, tmp_path: Path) -> None:
    """Nor a mirror below another path of the same host, which is one all the same."""
    origin = server()
    folder = tmp_path / origin.netloc
    folder.mkdir()
    (folder / "hosts.toml").write_text(
        f'server = "{origin.url}"\n[host."{origin.url}/mirror/v2"]\noverride_path = true\n'
    )

    async def scenario(hub: SourceHub) -> None:
        origin.choose = lambda request: "404" if "/mirror/" in request.target else "ok"
        await read(open_source(backend(origin, hosts_dir=str(tmp_path)), hub))
        targets = [one.target for one in origin.requests]
        assert targets == [f"{path}/a/b/blobs/sha256:{BLOB_ID}" for path in ("/mirror/v2", "/v2")]

    run(scenario)


@pytest.mark.parametrize("where", ["configuration", "hosts.toml", "environment"])
def test_there_is_one_authorization(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Two of them are an illegal request, which nginx answers with 400. A mirror's own credentials win, then tokens."""
    origin, mirror = server(auth="bearer"), server(auth="basic", login="us:them")
    own = "Basic " + base64.b64encode(b"us:them").decode()
    settings: dict[str, Any] = {"auth": AUTH}
    if where == "configuration":
        settings["mirrors"] = [{"host": mirror.url, "headers": {"authorization": own}}]
    elif where == "hosts.toml":
        folder = tmp_path / origin.netloc
        folder.mkdir()
        (folder / "hosts.toml").write_text(f'[host."{mirror.url}".header]\nauthorization = "{own}"\n')
        settings["hosts_dir"] = str(tmp_path)
    else:
        monkeypatch.setenv("NYDUS_HEADER_Authorization", own)

    async def scenario(hub: SourceHub) -> None:
        await read(open_source(backend(origin, auth=AUTH), hub))  # there is a token now
        assert [one.headers["authorization"] for one in origin.data_requests[1:]] == ["Bearer token-2"]
        source = open_source(backend(origin, **settings), hub)
        await read(source)
        if where == "environment":
            return
        assert [one.headers["authorization"] for one in mirror.requests] == [own]
        assert len(origin.data_requests) == 2
        mirror.login = "us:others"  # it refuses: that is no reason to ask for a token again
        await read(source, 4096)
        assert [one.headers["authorization"] for one in mirror.requests] == [own, own]
        assert len(origin.data_requests) == 3 and len(origin.tokens) == 2

    run(scenario)


def test_a_peer_that_says_absurd_sizes_costs_no_read(server: Any) -> None:
    """More digits than Python takes for a number; of a 200 nobody else looks at the range."""
    said = [("X-Dragonfly-Task-Id", "t"), ("Content-Range", f"bytes 0-9/{'9' * 5000}")]
    origin, mirror = server(), server(mode="whole-200", said=said)

    async def scenario(hub: SourceHub) -> None:
        await read(open_source(backend(origin, mirrors=[{"host": mirror.url}]), hub))
        assert mirror.requests

    run(scenario)


def test_a_header_of_hosts_toml_that_cannot_be_sent_costs_no_read(
    server: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    origin, mirror = server(), server()
    folder = tmp_path / "certs.d" / origin.netloc
    folder.mkdir(parents=True)
    (folder / "hosts.toml").write_text(
        f'server = "{origin.url}"\n[host."{mirror.url}".header]\nX-Tenant = "\u4e2d"\n', encoding="utf-8"
    )

    async def scenario(hub: SourceHub) -> None:
        await read(open_source(backend(origin, hosts_dir=str(tmp_path / "certs.d")), hub))

    run(scenario)
    assert "header.X-Tenant: holds characters that no HTTP header can have: going on without it" in caplog.text


def test_a_registrys_own_certificates_come_from_certs_d(server: Any, tmp_path: Path) -> None:
    context, authority, client = certificates(tmp_path)
    origin = server(tls=context)
    folder = tmp_path / "certs.d" / f"127.0.0.1_{origin.port}_"  # docker's form
    folder.mkdir(parents=True)
    for name, source in (("ca.crt", authority), ("me.cert", client), ("me.key", client.with_suffix(".key"))):
        (folder / name).write_bytes(source.read_bytes())

    async def scenario(hub: SourceHub) -> None:
        await read(open_source(backend(origin, hosts_dir=str(tmp_path / "certs.d")), hub))
        with pytest.raises(SourceError, match="certificate not accepted"):
            await read(open_source(backend(origin, hosts_dir=""), hub))

    run(scenario)


def test_a_mirror_that_gives_tokens_itself(server: Any) -> None:
    """`auth_through`: the path of the realm counts, its host does not, and the registry hears of nothing."""
    origin, mirror = server(auth="bearer"), server(auth="bearer")
    mirror.realm = origin.url

    async def scenario(hub: SourceHub) -> None:
        through = {"host": mirror.url, "auth_through": True}
        await read(open_source(backend(origin, mirrors=[through], auth=AUTH), hub))
        assert len(mirror.data_requests) == 2 and [one for one in mirror.tokens if one.method == "GET"]
        assert not origin.requests and not origin.tokens

    run(scenario)


async def accepted(server: FaultyServer) -> None:
    """Its thread takes a connection a moment after the client has it."""
    while not server.connections:  # noqa: ASYNC110
        await trio.sleep(0.01)


def test_a_registry_is_greeted_before_the_first_read(server: Any, tmp_path: Path) -> None:
    """Connection, TLS and token are there when a reader comes: his first request brings data."""
    context, authority, _ = certificates(tmp_path)
    context.verify_mode = ssl.CERT_NONE
    bearer = {"auth": "bearer"}

    async def scenario(hub: SourceHub) -> None:
        for settings in ({}, {"auth": "basic"}, bearer, {**bearer, "tls": context}, {"tls": context}):
            origin = server(**settings)
            login = AUTH if origin.auth else ""
            source = open_source(backend(origin, auth=login, ca_cert_files=[str(authority)]), hub)
            await source.greet()
            fetched = len(origin.tokens)
            assert bool(fetched) == (origin.auth == "bearer")
            assert [one.target for one in origin.requests] == ["/v2/"] * bool(settings)
            await accepted(origin)
            connections = origin.connections
            await read(source)
            assert (len(origin.data_requests), origin.connections, len(origin.tokens)) == (1, connections, fetched)
            await source.greet()  # nothing is left to be found out
            assert (len(origin.requests), origin.connections) == (1 + bool(settings), connections)

    run(scenario)


@pytest.mark.root
@pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse())
def test_an_expected_image_has_its_token_before_it_is_mounted(tmp_path: Path) -> None:
    image = tiny_image(tmp_path, {"hello": b"hello, world\n"})
    with faulty_server({image.blob_id: image.blob}, auth="bearer") as origin, Nydusd() as daemon:
        registry_of = {"scheme": "http", "host": origin.netloc, "repo": "a/b", "auth": AUTH}
        cache = {"type": "blobcache", "config": {"work_dir": str(tmp_path / "cache")}}
        device = {"backend": {"type": "registry", "config": registry_of}, "cache": cache}
        config = json.dumps({"device": device, "mode": "direct"})
        body = json.dumps({"fs_type": "rafs", "source": str(image.bootstrap), "config": config})
        assert daemon.call("POST", "mount/expected?mountpoint=/a", body).status == 204
        wait_until(lambda: bool(origin.valid_tokens), 20, "the token")
        assert not origin.data_requests
        assert daemon.mount("/a", image.bootstrap, config).status == 204
        code = "import sys; print(open(sys.argv[1]).read(), end='')"
        assert reader(code, daemon.mnt / "a/hello").stdout == "hello, world\n"
        assert origin.data_requests and all("authorization" in one.headers for one in origin.data_requests)


def test_the_registry_behind_a_mirror_is_greeted_for_its_token(server: Any) -> None:
    """The mirror for its connection; not the registry where mirrors have tokens of their own."""
    origin, mirror, through = server(auth="bearer"), server(auth="bearer"), server(auth="bearer")
    mirror.valid_tokens = origin.valid_tokens
    through.realm = origin.url

    async def scenario(hub: SourceHub) -> None:
        own = open_source(backend(origin, mirrors=[{"host": through.url, "auth_through": True}], auth=AUTH), hub)
        await own.greet()
        await accepted(through)
        assert (origin.connections, through.connections, through.requests) == (0, 1, [])
        source = open_source(backend(origin, mirrors=[{"host": mirror.url}], auth=AUTH), hub)
        await source.greet()
        fetched = len(origin.tokens)
        assert fetched and not mirror.requests
        await read(source)
        assert (len(mirror.data_requests), mirror.connections) == (1, 1)
        assert (len(origin.tokens), origin.data_requests) == (fetched, [])

    run(scenario)


def test_a_greeting_that_fails_is_nobodys_failure(server: Any) -> None:
    closed = server()
    closed.close()
    strange, guarded = server(auth="bearer", realm="http://["), server(auth="bearer", token_status=503)

    async def scenario(hub: SourceHub) -> None:
        for origin in closed, strange, guarded:
            await open_source(backend(origin, auth=AUTH, connect_timeout=2), hub).greet()
        guarded.token_status = 200
        source = open_source(backend(guarded, auth=AUTH), hub)
        await read(source)
        assert source.counters.read_errors == 0

    run(scenario)


def test_a_mirror_is_looked_after_only_while_somebody_reads(server: Any) -> None:
    """`health_check_pause_elapsed`."""
    origin, mirror = server(), server(mode="503")
    settings = {
        "host": mirror.url, "failure_limit": 1, "health_check_interval": 1, "health_check_pause_elapsed": 1,
        "ping_url": f"{mirror.url}/ping",
    }  # fmt: skip

    def looks() -> int:
        return sum(request.target == "/ping" for request in mirror.requests)

    async def scenario(hub: SourceHub) -> None:
        source = open_source(backend(origin, mirrors=[settings]), hub)
        while looks() < 2:
            await read(source)
            await trio.sleep(0.05)
        known = -1
        while known != looks():  # never, if it went on: one a second
            known = looks()
            await trio.sleep(3)
        while looks() == known:
            await read(source)
            await trio.sleep(0.05)

    run(scenario)


def test_a_given_token_is_tried_before_any_other_credentials(server: Any) -> None:
    origin = server(auth="bearer")
    origin.valid_tokens.add("given")

    async def scenario(hub: SourceHub) -> None:
        source = open_source(backend(origin, auth=AUTH, registry_token="given"), hub)
        await read(source)
        assert [one.headers.get("authorization") for one in origin.requests] == ["Bearer given"] and not origin.tokens
        origin.valid_tokens.clear()
        await read(source, 4096)
        assert len([one for one in origin.tokens if one.method == "GET"]) == 1

    run(scenario)


# -- proxies


def test_a_proxy_that_is_to_see_paths_gets_plain_http(server: Any) -> None:
    """`use_http`, for a registry that is asked by TLS otherwise: through a tunnel nothing could be kept."""
    origin, proxy = server(), server()
    settings = {"scheme": "https", "proxy": {"url": proxy.url, "use_http": True, "fallback": False}}

    async def scenario(hub: SourceHub) -> None:
        await read(open_source(backend(origin, **settings), hub))
        assert proxy.requests[0].target == f"http://{origin.netloc}/v2/a/b/blobs/sha256:{BLOB_ID}"

    run(scenario)


def test_a_proxy_that_is_to_see_objects_gets_the_address_that_is_signed(server: Any) -> None:
    """`use_http`: the port of plain HTTP, if none is configured, and the Host that is in the signature."""
    proxy = server()
    keys = {"access_key_id": "a", "access_key_secret": "b", "region": "r", "bucket_name": "blobs"}
    settings = {"url": proxy.url, "use_http": True, "fallback": False}
    configured = load_backend("s3", json.dumps({"endpoint": "s3.example", "proxy": settings, **keys}), "test")

    async def scenario(hub: SourceHub) -> None:
        await read(open_source(configured, hub))
        assert proxy.requests[0].target == f"http://s3.example/blobs/{BLOB_ID}"
        assert proxy.requests[0].headers["host"] == "s3.example"

    run(scenario)


def test_a_proxy_is_told_what_dragonfly_wants_to_know(server: Any) -> None:
    origin, proxy = server(), server()

    async def scenario(hub: SourceHub) -> None:
        source = open_source(backend(origin, proxy={"url": proxy.url}), hub)
        await read(source)
        await read(source, 4096, Priority.PREFETCH)
        seen = [{k: v for k, v in request.headers.items() if k.startswith("x-dragonfly")} for request in proxy.requests]
        common = {"x-dragonfly-use-p2p": "true", "x-dragonfly-prefetch": "true"}
        pieces = {"x-dragonfly-piece-length": str((4 << 20) + 4096)}  # until it shows that it is no Dragonfly
        assert seen == [{**common, **pieces, "x-dragonfly-priority": "6"}, {**common, "x-dragonfly-priority": "3"}]
        # What Dragonfly does not want to prefetch now, the registry is not asked for instead. A reader is served.
        proxy.mode = "dragonfly-429"
        with pytest.raises(SourceError, match="Dragonfly is at its limit"):
            await read(source, 8192, Priority.PREFETCH)
        assert not origin.requests
        await read(source, 8192)
        assert len(origin.requests) == 1
        proxy.mode = "dragonfly-403"
        await read(source, 12288)
        assert "x-dragonfly-priority" not in origin.requests[-1].headers

    run(scenario)


def test_a_proxy_that_is_not_healthy_is_left_alone_until_it_is(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    origin, proxy = server(), server()
    settings = {"url": proxy.url, "ping_url": f"{proxy.url}/ping", "check_interval": 1}

    async def scenario(hub: SourceHub) -> None:
        source = open_source(backend(origin, proxy=settings), hub)
        await read(source)
        assert len(proxy.data_requests) == 1 and not origin.requests
        proxy.ping_status = 404  # healthy is 200 to 399
        while not origin.requests:
            await trio.sleep(0.05)
            await read(source, 4096)
        asked = len(proxy.data_requests)
        await read(source, 4096)
        assert len(proxy.data_requests) == asked and len(origin.requests) == 2
        proxy.ping_status = 200
        back = time.monotonic()
        while len(proxy.data_requests) < asked + 4:
            await read(source, 8192)
            await trio.sleep(0.05)
        assert time.monotonic() - back < 20  # 5 s and what a stalled machine adds
        alone = open_source(backend(origin, proxy={**settings, "fallback": False}), hub)
        proxy.mode = "404"
        asked = len(origin.requests)
        with pytest.raises(SourceError, match=r"proxy http://.*status 404"):
            await read(alone, 4096)
        assert len(origin.requests) == asked

    run(scenario)


def test_a_proxy_is_looked_after_whichever_image_is_read(server: Any) -> None:
    origin, proxy = server(), server()
    settings = {"url": proxy.url, "ping_url": f"{proxy.url}/ping", "check_interval": 1}

    async def scenario(hub: SourceHub) -> None:
        source = open_source(backend(origin, proxy=settings), hub)
        open_source(backend(origin, "never/read", proxy=settings), hub)
        proxy.ping_status = 503
        while not origin.requests:
            await read(source)
            await trio.sleep(0.05)

    run(scenario)


@pytest.mark.parametrize("kind", ["registry", "s3"])
def test_a_proxy_before_a_server_that_wants_credentials_comes_back(server: Any, kind: str) -> None:
    """Without a `ping_url` it is looked at through itself: the server answers 401, 403 or 404, and all is well."""
    auth = "bearer" if kind == "registry" else None
    origin, proxy = server(auth=auth), server(auth=auth)
    if kind == "registry":
        configured: BackendConfig = backend(origin, proxy={"url": proxy.url}, auth=AUTH)
    else:
        keys = {"access_key_id": "a", "access_key_secret": "b", "region": "r", "bucket_name": "blobs", "scheme": "http"}
        options = {"endpoint": origin.netloc, "proxy": {"url": proxy.url}, **keys}
        configured = load_backend("s3", json.dumps(options), "test")

    async def scenario(hub: SourceHub) -> None:
        source = open_source(configured, hub)
        for _ in range(5):
            hub.standing(f"proxy {proxy.url}").failure(trio.current_time(), "it was away")
        while len(proxy.data_requests) < 4:
            await read(source, 4096)
            await trio.sleep(0.05)

    run(scenario)


# -- tokens


def test_a_hundred_readers_are_one_refusal_and_one_token(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nydusfs.sources.auth._FIRST_ALONE", 60.0)  # a busy machine needs more than a second for one
    origin = server(auth="bearer", latency=0.2)

    async def scenario(hub: SourceHub) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(100):
                source = open_source(backend(origin, auth=AUTH), hub)
                nursery.start_soon(read, source, number * 1024)

    run(scenario)
    assert sum("authorization" not in request.headers for request in origin.requests) == 1
    assert len([request for request in origin.tokens if request.method == "GET"]) == 1


def test_tokens_of_many_repositories_are_no_burst(server: Any) -> None:
    origin = server(auth="bearer", latency=0.1)

    async def scenario(hub: SourceHub) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(16):
                for _ in range(3):
                    nursery.start_soon(read, open_source(backend(origin, f"r/{number}", auth=AUTH), hub), number * 64)

    run(scenario)
    granted = [request for request in origin.tokens if request.method == "GET"]
    assert len(granted) == 16 and len({request.target for request in granted}) == 16
    times = sorted(request.when for request in granted)
    assert all(late - early > 0.05 for early, late in zip(times, times[4:], strict=False))  # four at once


def test_tokens_are_renewed_before_they_end_and_only_while_used(server: Any) -> None:
    origin = server(auth="bearer", token_life=2)

    async def scenario(hub: SourceHub) -> None:
        used = open_source(backend(origin, auth=AUTH), hub)
        idle = open_source(backend(origin, "idle", auth=AUTH), hub)
        await read(idle)
        end = trio.current_time() + 4.5
        while trio.current_time() < end:
            await read(used)
            await trio.sleep(0.02)

    run(scenario)
    scopes = [request.target.rpartition("=")[2] for request in origin.tokens if request.method == "GET"]
    assert scopes.count("repository%3Aidle%3Apull") == 1
    assert 2 <= scopes.count("repository%3Aa%2Fb%3Apull") <= 5
    refused = [request for request in origin.data_requests if "authorization" not in request.headers]
    assert len(refused) == 2  # the first of each: no reader met the end of a token


def test_what_is_known_of_each_source_can_be_shown(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    origin, mirror = server(), server(mode="503")
    headers = {"X-Secret": "do not show"}

    async def scenario(hub: SourceHub) -> None:
        source = open_source(
            backend(origin, mirrors=[{"host": mirror.url, "failure_limit": 2, "headers": headers}]), hub
        )
        assert isinstance(source, RegistrySource)
        for number in range(4):
            await read(source, number * 4096)
        report = {entry["address"]: entry for entry in hub.report()}
        assert report[mirror.url]["state"] == "down" and report[mirror.url]["last_failure"] == "status 503"
        assert report[origin.url]["state"] == "up" and report[origin.url]["first_byte_millis"] > 0
        assert "do not show" not in json.dumps(hub.report()) + caplog.text

    run(scenario)


def test_a_token_server_that_hangs_holds_nobody_for_ever(server: Any) -> None:
    """Twenty repositories at once, four may ask, and nobody is answered: each read ends in its own time."""
    origin = server(auth="bearer", hang_tokens=True)

    async def one(hub: SourceHub, number: int) -> None:
        source = open_source(backend(origin, f"r/{number}", auth=AUTH, timeout=1, connect_timeout=1), hub)
        with pytest.raises(SourceError, match=r"no token within|no progress"):
            await read(source)

    async def scenario(hub: SourceHub) -> None:
        started = time.monotonic()
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(one, hub, number)
        assert time.monotonic() - started < 15 + 15  # a stalled machine

    run(scenario)
