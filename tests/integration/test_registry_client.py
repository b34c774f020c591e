"""The distribution client against a real registry, a real token server, and servers that misbehave."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from nydusfs.errors import AuthError, NotFoundError, RegistryError, WrongBytesError
from nydusfs.registry.client import RegistryClient
from nydusfs.registry.credentials import Credentials
from nydusfs.registry.hosts import ClientOptions
from tests.lab.faulty import faulty_server
from tests.lab.httpd import Handler, reply, serve
from tests.lab.process import free_port
from tests.lab.registry import Registry, find_program
from tests.lab.tokens import TokenServer

pytestmark = pytest.mark.skipif(find_program() is None, reason="docker-registry is not installed")

QUICK = ClientOptions(retries=2, retry_delay=0.01, connect_timeout=30, read_timeout=60)
DATA = bytes(range(256)) * 40_000
DIGEST = f"sha256:{hashlib.sha256(DATA).hexdigest()}"


def _nobody() -> Credentials | None:
    return None


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


def _push(client: RegistryClient, repository: str, data: bytes = DATA, **options: int) -> str:
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    client.push_blob(repository, digest, len(data), lambda: io.BytesIO(data), **options)  # type: ignore[arg-type]
    return digest


def test_blobs_there_and_back(registry: Registry) -> None:
    with RegistryClient(registry.host, QUICK, _nobody) as client:
        assert not client.has_blob("lab/a", DIGEST)
        assert client.push_blob("lab/a", DIGEST, len(DATA), lambda: io.BytesIO(DATA))
        assert not client.push_blob("lab/a", DIGEST, len(DATA), lambda: io.BytesIO(DATA)), "it is there already"
        assert client.blob("lab/a", DIGEST, len(DATA)) == DATA
        with pytest.raises(RegistryError, match="larger"):
            client.blob("lab/a", DIGEST, len(DATA) - 1)
        mark = registry.mark()
        assert client.mount_blob("lab/b", DIGEST, "lab/a")
        assert client.has_blob("lab/b", DIGEST)
        assert not [one for one in registry.since(mark).requests if one.method in ("PUT", "PATCH")]
        chunked = _push(client, "lab/a", DATA[1:], chunk_size=3_000_000)
        assert client.blob("lab/a", chunked, len(DATA)) == DATA[1:]
        tail = client.open_blob_ranges("lab/a", DIGEST, len(DATA))
        tail.seek(-10, io.SEEK_END)
        assert tail.read() == DATA[-10:]


def test_manifests_keep_their_bytes(registry: Registry) -> None:
    with RegistryClient(registry.host, QUICK, _nobody) as client:
        config = _push(client, "lab/m", b"{}")
        body = json.dumps({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "layers": [],
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": 2},
        }, indent=2).encode()  # fmt: skip
        digest = client.push_manifest("lab/m", "tag", "application/vnd.oci.image.manifest.v1+json", body)
        for selector in ("tag", digest):
            found = client.manifest("lab/m", selector)
            assert (found.body, found.digest) == (body, digest)
        assert client.manifest_digest("lab/m", "tag") == digest
        assert client.manifest_digest("lab/m", "none") is None
        with pytest.raises(NotFoundError, match=r"image .*lab/m:none does not exist"):
            client.manifest("lab/m", "none")
        with pytest.raises(NotFoundError, match="lab/none"):
            client.manifest("lab/none", "tag")


def test_unreachable_is_said_in_bounded_time() -> None:
    host = f"127.0.0.1:{free_port()}"
    with (
        RegistryClient(host, QUICK, _nobody) as client,
        pytest.raises(RegistryError, match=f"{host} cannot be reached"),
    ):
        client.manifest("a", "b")


def test_token_authentication(tmp_path: Path) -> None:
    with (
        TokenServer(tmp_path / "tokens") as tokens,
        Registry(tmp_path / "registry", token_realm=tokens.realm) as registry,
    ):
        right = Credentials(tokens.user, tokens.password)
        with RegistryClient(registry.host, QUICK, lambda: right) as client:
            digest = _push(client, "lab/private")
            assert client.blob("lab/private", digest, len(DATA)) == DATA
            assert client.mount_blob("lab/other", digest, "lab/private")
        scopes = [scope for scope, _ in tokens.granted]
        assert scopes.count("repository:lab/private:pull,push") == 1, "one token per scope serves every request"
        with (
            RegistryClient(registry.host, QUICK, lambda: Credentials(tokens.user, "wrong")) as client,
            pytest.raises(AuthError, match="wrong credentials") as caught,
        ):
            client.manifest("lab/private", "x")
        assert "wrong" in str(caught.value) and tokens.password not in str(caught.value)
        with (
            RegistryClient(registry.host, QUICK, _nobody) as client,
            pytest.raises(AuthError, match="authentication required"),
        ):
            client.manifest("lab/private", "x")


# -- servers that misbehave


def test_broken_connections_are_taken_up_where_they_broke() -> None:
    ranges: list[str] = []

    def answer(handler: Handler) -> None:
        if "/blobs/" not in handler.path:
            return reply(handler, 200)
        wanted = handler.headers.get("Range", "")
        ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-") or 0)
        handler.send_response(206 if wanted else 200)
        handler.send_header("Content-Length", str(len(DATA) - start))
        handler.send_header("Content-Range", f"bytes {start}-{len(DATA) - 1}/{len(DATA)}")
        handler.end_headers()
        handler.wfile.write(DATA[start : start + 1_200_000])
        handler.close_connection = True
        return None

    with serve(answer) as server, RegistryClient(server.host, QUICK, _nobody) as client:
        assert client.blob("r", DIGEST, len(DATA)) == DATA
    assert len(ranges) == 9, "more breaks than retries, but each after a good stretch"
    assert ranges[0] == "" and ranges[1].startswith("bytes=")


def test_wrong_bytes_never_pass() -> None:
    def answer(handler: Handler) -> None:
        reply(handler, 200, DATA[:-1] + b"x" if "/blobs/" in handler.path else b"")

    with (
        serve(answer) as server,
        RegistryClient(server.host, QUICK, _nobody) as client,
        pytest.raises(RegistryError, match=DIGEST),
    ):
        client.blob("r", DIGEST, len(DATA))


def test_server_errors_are_retried_and_then_told() -> None:
    failures = 2

    def answer(handler: Handler) -> None:
        nonlocal failures
        if "/blobs/" in handler.path and failures:
            failures -= 1
            return reply(handler, 503, b'{"errors": [{"code": "BUSY", "message": "later"}]}')
        return reply(handler, 200, DATA)

    with serve(answer) as server, RegistryClient(server.host, QUICK, _nobody) as client:
        assert client.blob("r", DIGEST, len(DATA)) == DATA
        failures = 99
        with pytest.raises(RegistryError, match=r"answers 503 \(BUSY: later\)"):
            client.blob("r", DIGEST, len(DATA))


FAULTS = ["503", "429", "hang-headers", "hang-body", "early-close", "empty", "garbage", "short-body", "wrong-bytes"]


@pytest.mark.parametrize("mode", FAULTS)
def test_faults_of_a_while_are_lived_through_and_lasting_ones_end(mode: str) -> None:
    """The lab's fault server: two bad answers, then good ones; then nothing but bad ones."""
    blob = DATA[:3_000_000]
    digest = f"sha256:{hashlib.sha256(blob).hexdigest()}"
    answers = [mode, mode]
    silence = 1.0 if mode.startswith("hang") else 10.0
    patience = ClientOptions(retries=2, retry_delay=0.01, connect_timeout=5, read_timeout=silence)

    def choose(request: object) -> str:
        return answers.pop() if answers else "ok"

    with (
        faulty_server({digest[7:]: blob}, choose=choose) as server,
        RegistryClient(server.netloc, patience, lambda: None) as client,
    ):
        # a body that ends early and says so, or is wrong to its last byte, cannot be told before its end
        for _ in range(3 if mode in ("short-body", "wrong-bytes") else 1):
            try:
                assert client.blob("a/b", digest, len(blob)) == blob
            except WrongBytesError:
                assert mode in ("short-body", "wrong-bytes")
        assert not answers
        answers += [mode] * 50
        with pytest.raises(RegistryError, match=digest[7:] if mode in ("short-body", "wrong-bytes") else server.netloc):
            client.blob("a/b", digest, len(blob))


def test_redirects_lose_the_credentials_and_may_not_ask_for_them() -> None:
    secret = Credentials("u", "p")

    def store(handler: Handler) -> None:
        if "evil" in handler.path:
            return reply(handler, 401, WWW_Authenticate='Basic realm="give"')
        return reply(handler, 200, DATA)

    with serve(store) as storage:

        def answer(handler: Handler) -> None:
            if handler.path == "/v2/":
                return reply(handler, 200)
            if "Authorization" not in handler.headers:
                return reply(handler, 401, WWW_Authenticate="BASIC Realm=x")
            name = "evil" if "evil" in handler.path else "good"
            return reply(handler, 307, Location=f"http://{storage.host}/{name}?signature=s")

        with serve(answer) as server, RegistryClient(server.host, QUICK, lambda: secret) as client:
            assert client.blob("r", DIGEST, len(DATA)) == DATA
            with pytest.raises(RegistryError, match="401"):
                client.blob("evil", DIGEST, len(DATA))
    assert storage.seen
    assert not any("Authorization" in headers for _, _, headers in storage.seen)
