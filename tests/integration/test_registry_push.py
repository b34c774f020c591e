"""Uploads that break, TLS with certificates of both sides, and subjects: what a push meets on its way."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from email.message import Message
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from nydusfs.config import load_config
from nydusfs.convert.endpoints import Connections, RegistryLocation
from nydusfs.convert.nydusd import daemon_config
from nydusfs.errors import AuthError, NotFoundError, RegistryError, WrongBytesError
from nydusfs.registry import referrers
from nydusfs.registry.client import RegistryClient
from nydusfs.registry.credentials import Credentials
from nydusfs.registry.hosts import ClientOptions
from nydusfs.registry.mediatypes import OCI_INDEX, OCI_MANIFEST
from nydusfs.registry.reference import Reference
from nydusfs.sources import Priority, SourceHub, open_source
from nydusfs.sources.base import Buffer
from tests.lab.authority import Authority
from tests.lab.httpd import Handler, body_of, reply, serve
from tests.lab.process import free_port
from tests.lab.registry import Registry, find_program

needs_registry = pytest.mark.skipif(find_program() is None, reason="docker-registry is not installed")

QUICK = ClientOptions(retries=3, retry_delay=0.01, connect_timeout=30, read_timeout=60)
DATA = bytes(range(256)) * 20_000
DIGEST = f"sha256:{hashlib.sha256(DATA).hexdigest()}"


class Uploads:
    """A registry's upload side that keeps what it got. `breaks`: sizes at which a request's body is cut off."""

    def __init__(self, breaks: list[int], *, remembers: bool = True) -> None:
        self.breaks, self.remembers = breaks, remembers
        self.sessions: list[bytearray] = []
        self.blob = b""

    def __call__(self, handler: Handler) -> None:
        path = handler.path.partition("?")[0]
        if handler.command == "HEAD":
            return reply(handler, 200 if self.blob else 404)
        if handler.command == "POST":
            self.sessions.append(bytearray())
            return reply(handler, 202, Location=f"/v2/r/blobs/uploads/{len(self.sessions) - 1}?state=a")
        if "/uploads/" not in path:
            return reply(handler, 200)
        session = self.sessions[int(path.rpartition("/")[2])]
        if handler.command == "GET":
            if not self.remembers:
                return reply(handler, 404, b'{"errors": [{"code": "BLOB_UPLOAD_UNKNOWN", "message": "gone"}]}')
            return reply(handler, 204, Range=f"0-{max(0, len(session) - 1)}", Location=handler.path)
        if handler.command == "PATCH" and int(handler.headers["Content-Range"].partition("-")[0]) != len(session):
            return reply(handler, 416)
        if self.breaks and int(handler.headers["Content-Length"]):
            session += body_of(handler, self.breaks.pop(0))
            handler.close_connection = True
            return None
        session += body_of(handler)
        if handler.command == "PATCH":
            return reply(handler, 202, Location=handler.path)
        good = f"sha256:{hashlib.sha256(session).hexdigest()}" == DIGEST
        self.blob = bytes(session) if good else b""
        return reply(handler, 201 if good else 400)


@pytest.mark.parametrize(("remembers", "chunk"), [(True, 0), (False, 0), (True, 1_000_000), (False, 1_000_000)])
def test_a_broken_upload_is_resumed_or_begun_again(remembers: bool, chunk: int) -> None:
    uploads = Uploads([700_000, 300_000], remembers=remembers)
    counted: list[int] = []
    with serve(uploads) as server, RegistryClient(server.host, QUICK, lambda: None) as client:
        client.push_blob("r", DIGEST, len(DATA), lambda: io.BytesIO(DATA), chunk_size=chunk, progress=counted.append)
        sent = [(method, headers.get("Content-Range")) for method, _, headers in server.seen if method == "PATCH"]
    assert uploads.blob == DATA
    assert sum(counted) == len(DATA), "progress counts each byte once"
    assert len(uploads.sessions) == (1 if remembers else 3)
    if remembers:
        assert ("PATCH", f"1000000-{2_000_000 - 1 if chunk else len(DATA) - 1}") in sent


def test_a_push_gives_up_in_the_end_and_says_why() -> None:
    with (
        serve(Uploads([10] * 99)) as server,
        RegistryClient(server.host, QUICK, lambda: None) as client,
        pytest.raises(RegistryError, match="cannot be reached"),
    ):
        client.push_blob("r", DIGEST, len(DATA), lambda: io.BytesIO(DATA))
    for data in (DATA[:-1], DATA + b"x"):
        uploads = Uploads([])
        with serve(uploads) as server, RegistryClient(server.host, QUICK, lambda: None) as client:
            with pytest.raises(RegistryError, match=r"data ends at byte|more data than"):
                client.push_blob("r", DIGEST, len(DATA), lambda data=data: io.BytesIO(data))  # type: ignore[misc]
            assert not uploads.blob and len(uploads.sessions) == 1, "not tried again: it would not help"


def test_a_busy_registry_is_given_the_time_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("nydusfs.registry.uploads.time.sleep", pauses.append)
    answers = [{"Retry_After": "7"}, {"Retry_After": formatdate(4_000_000_000, usegmt=True)}, {"Retry_After": "soon"}]
    uploads = Uploads([])

    def answer(handler: Handler) -> None:
        if handler.command == "PUT" and answers:
            body_of(handler)
            return reply(handler, 429, **answers.pop(0))
        return uploads(handler)

    with serve(answer) as server, RegistryClient(server.host, QUICK, lambda: None) as client:
        client.push_blob("r", DIGEST, len(DATA), lambda: io.BytesIO(DATA))
    assert uploads.blob == DATA
    assert pauses[:2] == [7.0, 30.0] and pauses[2] < 1, "seconds, a date (bounded), nonsense"


def test_redirected_uploads_and_plain_locations_of_a_tls_registry(tmp_path: Path) -> None:
    """A registry behind a TLS proxy names itself with http://; the upload stays on https. Elsewhere http is refused."""
    authority = Authority(tmp_path / "ca")
    certs = tmp_path / "certs"
    uploads = Uploads([])
    location = "http://{host}/v2/r/blobs/uploads/0?state=a"

    def answer(handler: Handler) -> None:
        if handler.command == "POST":
            uploads.sessions.append(bytearray())
            return reply(handler, 202, Location=location.format(host=handler.headers["Host"]))
        if handler.command == "PUT" and "moved" not in handler.path:
            body_of(handler)
            return reply(handler, 307, Location=handler.path + "&moved=1")
        return uploads(handler)

    with serve(answer, authority.server_context()) as server:
        (certs / server.host).mkdir(parents=True)
        shutil.copy(authority.certificate, certs / server.host / "ca.crt")
        options = ClientOptions(retries=1, retry_delay=0.01, hosts_dir=str(certs))
        with RegistryClient(server.host, options, lambda: None) as client:
            client.push_blob("r", DIGEST, len(DATA), lambda: io.BytesIO(DATA))
            assert uploads.blob == DATA
            uploads.blob, location = b"", "http://192.0.2.1/v2/r/blobs/uploads/0"
            with pytest.raises(RegistryError, match="from HTTPS to http://192"):
                client.push_blob("r", DIGEST, len(DATA), lambda: io.BytesIO(DATA))


@needs_registry
def test_certificates_of_both_sides(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    server, client = authority.issue("server"), authority.issue("client")
    with Registry(tmp_path / "registry", tls=(*server, authority.certificate)) as registry:
        docker, toml = tmp_path / "docker" / registry.host, tmp_path / "toml" / registry.host
        docker.mkdir(parents=True)
        toml.mkdir(parents=True)
        shutil.copy(authority.certificate, docker / "ca.crt")
        with RegistryClient(
            registry.host, ClientOptions(retries=0, hosts_dir=str(tmp_path / "docker")), lambda: None
        ) as one, pytest.raises(RegistryError, match=registry.host):  # fmt: skip
            one.has_blob("r", DIGEST)  # the registry wants a certificate
        for file in client:
            shutil.copy(file, docker / file.name)
        (toml / "hosts.toml").write_text(
            f'[host."https://{registry.host}/v2"]\noverride_path = true\nca = "{authority.certificate}"\n'
            f'client = [["{client[0]}", "{client[1]}"]]\n'
        )
        for name in ("docker", "toml"):
            options = ClientOptions(retries=0, hosts_dir=str(tmp_path / name))
            with RegistryClient(registry.host, options, lambda: None) as one:
                one.push_blob("r", DIGEST, len(DATA), lambda: io.BytesIO(DATA))
                assert one.blob("r", DIGEST, len(DATA)) == DATA
        options = ClientOptions(retries=0, hosts_dir=str(tmp_path))
        with RegistryClient(registry.host, options, lambda: None) as one, pytest.raises(RegistryError, match="VERIFY"):
            one.has_blob("r", DIGEST)
        (docker / "client.key").write_text("no key")
        options = ClientOptions(retries=0, hosts_dir=str(tmp_path / "docker"))
        with RegistryClient(registry.host, options, lambda: None) as one, pytest.raises(RegistryError, match=r"\.cert"):
            one.has_blob("r", DIGEST)


def test_headers_of_a_mirror_are_sent_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One Authorization, a header of several values, and what Latin-1 has."""
    monkeypatch.setattr("nydusfs.registry.transport.docker_credentials", lambda _: Credentials("user", "secret"))

    seen: list[Message] = []

    def answer(handler: Handler) -> None:
        seen.append(handler.headers)
        if "dXNlcj" not in handler.headers.get("Authorization", ""):  # user:secret
            return reply(handler, 401, WWW_Authenticate="Basic realm=x")
        return reply(handler, 200, DATA)

    with serve(answer) as server, serve(answer) as mirror:
        (tmp_path / server.host).mkdir()
        (tmp_path / server.host / "hosts.toml").write_text(
            f'server = "http://{server.host}"\n[host."http://{mirror.host}".header]\n'
            'authorization = "Basic other"\nx-many = ["one", "two"]\nx-name = "Andr\u00e9"\n',
            encoding="utf-8",
        )
        with RegistryClient(server.host, ClientOptions(retries=0, hosts_dir=str(tmp_path)), lambda: None) as client:
            assert client.blob("r", DIGEST, len(DATA)) == DATA
    sent = seen[-1]
    assert sent.get_all("authorization") == ["Basic dXNlcjpzZWNyZXQ="]
    assert sent.get_all("x-many") == ["one", "two"] and sent["x-name"] == "Andr\u00e9"


def test_a_server_in_place_of_the_registry_is_told_which_is_meant(tmp_path: Path) -> None:
    uploads = Uploads([])

    with serve(uploads) as server:
        (tmp_path / "docker.io").mkdir()
        (tmp_path / "docker.io" / "hosts.toml").write_text(f'server = "http://{server.host}"\n')
        options = ClientOptions(retries=0, hosts_dir=str(tmp_path))
        with RegistryClient("docker.io", options, lambda: None) as client:
            client.push_blob("r", DIGEST, len(DATA), lambda: io.BytesIO(DATA))
        assert uploads.blob == DATA
        assert [path for _, path, _ in server.seen][:2] == [
            f"/v2/r/blobs/{DIGEST}?ns=docker.io", "/v2/r/blobs/uploads/?ns=docker.io"]  # fmt: skip


def test_a_nydusd_of_nydusify_has_the_certificates_of_its_hosts_dir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for `nydusify mount` and `check`, whose own requests have them."""
    authority = Authority(tmp_path / "ca")

    def answer(handler: Handler) -> None:
        if "/blobs/" not in handler.path:
            return reply(handler, 200)
        return reply(handler, 206, DATA[:100], Content_Range=f"bytes 0-99/{len(DATA)}")

    with serve(answer, authority.server_context()) as server, Connections() as connections:
        (tmp_path / "certs" / server.host).mkdir(parents=True)
        shutil.copy(authority.certificate, tmp_path / "certs" / server.host / "ca.crt")
        monkeypatch.chdir(tmp_path)
        options = ClientOptions(hosts_dir="certs")
        endpoint = RegistryLocation(Reference.parse(f"{server.host}/r:1"), options).open(connections)
        nydus: Any = SimpleNamespace(image=SimpleNamespace(endpoint=endpoint))
        config = load_config(json.dumps(daemon_config(nydus, tmp_path / "work")), "test")
        monkeypatch.chdir("/")

        async def read() -> Buffer:
            async with trio.open_nursery() as nursery:
                source = open_source(config.backend, SourceHub(nursery))
                with trio.fail_after(60):
                    data = await source.read(DIGEST[7:], 0, 100, Priority.DEMAND)
                nursery.cancel_scope.cancel()
            return data

        assert trio.run(read) == DATA[:100]


def test_a_mirror_with_wrong_bytes_is_left_alone_afterwards(tmp_path: Path) -> None:
    def answer(handler: Handler) -> None:
        reply(handler, 200, DATA if "/blobs/" in handler.path else b"")

    def liar(handler: Handler) -> None:
        reply(handler, 200, DATA[:-1] + b"?")

    with serve(answer) as server, serve(liar) as mirror:
        folder = tmp_path / server.host
        folder.mkdir()
        (folder / "hosts.toml").write_text(f'server = "http://{server.host}"\n[host."http://{mirror.host}"]\n')
        options = ClientOptions(retries=1, retry_delay=0.01, hosts_dir=str(tmp_path))
        with RegistryClient(server.host, options, lambda: None) as client:
            with client.open_blob("r", DIGEST) as stream, pytest.raises(WrongBytesError, match=DIGEST):
                stream.readall()
            assert client.blob("r", DIGEST, len(DATA)) == DATA
        with Connections() as connections:  # what is read as a whole is had from the next address at once
            endpoint = RegistryLocation(Reference.parse(f"{server.host}/r:1"), options).open(connections)
            assert endpoint.blob(DIGEST, len(DATA)) == DATA
            server.answer = liar  # type: ignore[method-assign]
            with pytest.raises(WrongBytesError, match=DIGEST):
                endpoint.blob(DIGEST, len(DATA))


def _with_mirrors(folder: Path, host: str, *mirrors: str, server: str = "") -> ClientOptions:
    (folder / host).mkdir(parents=True)
    text = "".join(f'[host."http://{mirror}"]\n' for mirror in mirrors)
    (folder / host / "hosts.toml").write_text((f'server = "{server}"\n' if server else "") + text)
    return ClientOptions(retries=1, retry_delay=0.01, hosts_dir=str(folder))


@pytest.mark.parametrize("fault", ["breaks", "elsewhere", "nowhere"])
def test_a_mirror_that_fails_in_mid_blob_is_left_for_the_next_address(fault: str, tmp_path: Path) -> None:
    def whole(handler: Handler) -> None:
        start = int(handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        where = {"Content_Range": f"bytes {start}-{len(DATA) - 1}/{len(DATA)}"} if start else {}
        reply(handler, 206 if start else 200, DATA[start:], **where)

    def broken(handler: Handler) -> None:
        if (start := handler.headers.get("Range")) is None or fault == "breaks":
            handler.send_response(206 if start else 200)
            handler.send_header("Content-Length", str(len(DATA)))
            handler.send_header("Content-Range", f"bytes 100000-{len(DATA) - 1}/{len(DATA)}")
            handler.end_headers()
            handler.wfile.write(b"" if start else DATA[:100_000])
            handler.close_connection = True
        elif fault == "elsewhere":
            reply(handler, 206, DATA[-1:], Content_Range=f"bytes {len(DATA) - 1}-{len(DATA) - 1}/{len(DATA)}")
        else:
            reply(handler, 307, Location="http://[::1/")

    for number, second in enumerate((True, False)):
        with serve(whole) as server, serve(broken) as mirror:
            hosts = (mirror.host, server.host) if second else (mirror.host,)
            name = f"127.0.0.1:{free_port()}" if second else server.host
            options = _with_mirrors(tmp_path / str(number), name, *hosts, server="" if second else f"http://{name}")
            with RegistryClient(name, options, lambda: None) as client:
                assert client.blob("r", DIGEST, len(DATA)) == DATA
            assert len(mirror.seen) > 1
            assert server.seen[-1][2]["Range"] == "bytes=100000-"


def test_a_ranged_read_goes_on_where_its_connection_broke() -> None:
    def answer(handler: Handler) -> None:
        if "/blobs/" not in handler.path:
            return reply(handler, 200)
        first, last = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {first}-{last}/{len(DATA)}")
        handler.send_header("Content-Length", str(last + 1 - first))
        handler.end_headers()
        handler.wfile.write(DATA[first : min(last + 1, first + step)])
        handler.close_connection = True
        return None

    step = 100_000
    with (
        serve(answer) as server,
        RegistryClient(server.host, QUICK, lambda: None) as client,
        client.open_blob_ranges("r", DIGEST, len(DATA)) as blob,
    ):
        blob.seek(7)
        assert blob.read(350_000) == DATA[7:350_007], "three breaks"
        step = 10_000
        with pytest.raises(RegistryError, match=server.host):
            blob.read(350_000)


def test_a_registry_out_of_reach_is_not_looked_for_while_its_mirrors_serve(tmp_path: Path) -> None:
    body = _manifest("c")

    def mirror(handler: Handler) -> None:
        if "secret" in handler.path:
            return reply(handler, 403)
        if "/manifests/" in handler.path:
            return reply(handler, 200, body, Content_Type=OCI_MANIFEST)
        start, end = (handler.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")
        data = DATA[int(start) : int(end or len(DATA)) + 1]
        return reply(handler, 206, data, Content_Range=f"bytes {start}-{int(start) + len(data) - 1}/{len(DATA)}")

    host = f"127.0.0.1:{free_port()}"
    with serve(mirror) as one:
        options = _with_mirrors(tmp_path, host, one.host)
        with RegistryClient(host, options, lambda: None) as client:
            assert client.manifest("r", "tag").body == body
            assert client.blob("r", DIGEST, len(DATA)) == DATA
            with client.open_blob_ranges("r", DIGEST, len(DATA)) as blob:
                blob.seek(-100, io.SEEK_END)
                assert blob.read() == DATA[-100:]
            path = "/v2/secret/manifests/tag"
            with (
                client.transport.request("GET", path, scope="", endpoint=client.transport.mirrors()[0]) as answer,
                pytest.raises(AuthError, match=f"403.*docker login {one.host}"),
            ):
                client.transport.raise_for(answer, "image")
            with pytest.raises(RegistryError, match=f"{host} cannot be reached"):
                client.manifest("secret", "tag")


@pytest.mark.parametrize(
    "location",
    ["http://[::1/?signature=sEcReT", "ftp://127.0.0.1/x", "http://127.0.0.1:99999/", "http://xn--a/", "mailto:x"],
)
def test_odd_locations_are_errors_with_a_text(location: str) -> None:
    def answer(handler: Handler) -> None:
        if handler.command == "HEAD":
            return reply(handler, 404)
        if handler.path == "/v2/":
            return reply(handler, 200)
        if handler.path.startswith("/v2/realm/"):
            return reply(handler, 401, WWW_Authenticate=f'Bearer realm="{location}"')
        return reply(handler, 202 if handler.command == "POST" else 307, Location=location)

    with serve(answer) as server, RegistryClient(server.host, QUICK, lambda: None) as client:
        for what in (
            lambda: client.blob("r", DIGEST, len(DATA)),
            lambda: client.push_blob("r", DIGEST, len(DATA), lambda: io.BytesIO(DATA)),
            lambda: client.manifest("realm", "tag"),
        ):
            said = rf"{server.host}.*(no (http or https )?address|Invalid URL)"
            with pytest.raises(RegistryError, match=said) as caught:
                what()
            assert "sEcReT" not in str(caught.value)


@pytest.mark.parametrize("status", [401, 403, 500])
def test_what_a_mirror_lacks_and_the_registry_does_not_give_is_not_called_absent(status: int, tmp_path: Path) -> None:
    with serve(lambda handler: reply(handler, status)) as server, serve(lambda handler: reply(handler, 404)) as mirror:
        options = _with_mirrors(tmp_path, server.host, mirror.host, server=f"http://{server.host}")
        with RegistryClient(server.host, options, lambda: None) as client:
            with pytest.raises(RegistryError, match=str(status)) as caught:
                client.manifest("r", "tag")
            assert not isinstance(caught.value, NotFoundError)
            server.answer = lambda handler: reply(handler, 404)  # type: ignore[method-assign]
            mirror.answer = lambda handler: reply(handler, status)  # type: ignore[method-assign]
            with pytest.raises(NotFoundError, match=server.host):
                client.manifest("r", "tag")


def _manifest(config: str, subject: str = "") -> bytes:
    document: dict[str, Any] = {
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "layers": [],
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": 2},
    }  # fmt: skip
    if subject:
        document["subject"] = {"mediaType": OCI_MANIFEST, "digest": subject, "size": 2}
        document["annotations"] = {"made": "by a test"}
    return json.dumps(document).encode()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@needs_registry
def test_referrers_of_a_registry_without_the_api(registry: Registry) -> None:
    with RegistryClient(registry.host, QUICK, lambda: None) as client:
        config = f"sha256:{hashlib.sha256(b'{}').hexdigest()}"
        client.push_blob("lab/r", config, 2, lambda: io.BytesIO(b"{}"))
        subject = client.push_manifest("lab/r", "plain", OCI_MANIFEST, _manifest(config))
        assert client.referrers("lab/r", subject) == []
        body = _manifest(config, subject)
        for _ in range(2):  # the second push adds nothing
            digest = client.push_manifest("lab/r", "nydus", OCI_MANIFEST, body)
        client.push_manifest("lab/r", "other", OCI_MANIFEST, body + b"\n")
        found = client.referrers("lab/r", subject)
        assert found[0]["digest"] == digest and len(found) == 2
        assert found[0]["artifactType"] == "application/vnd.oci.image.config.v1+json"
        assert found[0]["annotations"] == {"made": "by a test"}
        tagged = client.manifest("lab/r", subject.replace(":", "-"))
        assert (tagged.media_type, json.loads(tagged.body)["manifests"]) == (OCI_INDEX, found)


@needs_registry
def test_the_list_of_referrers_is_the_registrys_and_not_an_old_one_of_a_mirror(
    registry: Registry, tmp_path: Path
) -> None:
    config = f"sha256:{hashlib.sha256(b'{}').hexdigest()}"
    old = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}).encode()
    with serve(lambda handler: reply(handler, 200, old, Content_Type=OCI_INDEX)) as mirror:
        options = _with_mirrors(tmp_path, registry.host, mirror.host, server=f"http://{registry.host}")
        with RegistryClient(registry.host, options, lambda: None) as client:
            client.push_blob("lab/m", config, 2, lambda: io.BytesIO(b"{}"))
            subject = client.push_manifest("lab/m", "plain", OCI_MANIFEST, _manifest(config))
            body = _manifest(config, subject)
            for one in (body, body + b"\n"):
                client.push_manifest("lab/m", "signature", OCI_MANIFEST, one)
            assert len(client.referrers("lab/m", subject)) == 2


def test_referrers_of_a_registry_with_the_api() -> None:
    entry = {"mediaType": OCI_MANIFEST, "digest": DIGEST, "size": 2}

    def answer(handler: Handler) -> None:
        if "/referrers/" in handler.path:
            return reply(handler, 200, json.dumps({"manifests": [entry]}).encode())
        body_of(handler)
        return reply(handler, 201 if handler.command == "PUT" else 200, OCI_Subject="yes")

    with serve(answer) as server, RegistryClient(server.host, QUICK, lambda: None) as client:
        assert client.referrers("r", DIGEST) == [entry]
        client.push_manifest("r", "x", OCI_MANIFEST, _manifest(DIGEST, DIGEST))
        assert [path for method, path, _ in server.seen if method == "PUT"] == ["/v2/r/manifests/x"], "no tag beside it"


def test_referrers_come_in_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(referrers, "_MAX_PAGES", 5)
    entries = [{"mediaType": OCI_MANIFEST, "digest": f"sha256:{number:064}", "size": 2} for number in range(5)]

    def answer(handler: Handler) -> None:
        if "/referrers/" not in handler.path:
            return reply(handler, 200)
        at = int(handler.path.partition("last=")[2] or 0)
        link = f'<{handler.path.partition("?")[0]}?last={at + 2}>; rel="next"'
        more = {"Link": link} if at < 4 or endless else {}
        return reply(handler, 200, json.dumps({"manifests": entries[at : at + 2]}).encode(), **more)

    endless = False
    with serve(answer) as server, RegistryClient(server.host, QUICK, lambda: None) as client:
        assert client.referrers("r", DIGEST) == entries
        endless = True
        with pytest.raises(RegistryError, match="more than 5 pages"):
            client.referrers("r", DIGEST)
