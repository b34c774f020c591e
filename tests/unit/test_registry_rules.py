"""References, challenges, token replies and docker's credentials: pure rules of the registry room."""

from __future__ import annotations

import base64
import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nydusfs.errors import AuthError, ConfigError, RegistryError
from nydusfs.registry.blobstream import BlobStream
from nydusfs.registry.challenge import Challenge, choose, parse_challenges, parse_token_reply
from nydusfs.registry.client import RegistryClient
from nydusfs.registry.credentials import Credentials, decode_auth, docker_credentials
from nydusfs.registry.hosts import ClientOptions, route
from nydusfs.registry.reference import Reference, ReferenceError, is_loopback
from nydusfs.registry.transport import Transport
from tests.lab.faulty import dead_port, faulty_server

SHA = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("python", "docker.io/library/python:latest"),
        ("python:3.12", "docker.io/library/python:3.12"),
        ("a/b", "docker.io/a/b:latest"),
        ("index.docker.io/x", "docker.io/library/x:latest"),
        ("registry-1.docker.io/x/y:1", "docker.io/x/y:1"),
        ("localhost/x", "localhost/x:latest"),
        ("127.0.0.1:5000/a/b:tag", "127.0.0.1:5000/a/b:tag"),
        (f"127.0.0.1:5000/a/b:tag@{SHA}", f"127.0.0.1:5000/a/b:tag@{SHA}"),
        (f"ghcr.io/a/b@{SHA}", f"ghcr.io/a/b@{SHA}"),
        ("[::1]:5000/x:1", "[::1]:5000/x:1"),
        ("UPPER/x", "UPPER/x:latest"),
    ],
)
def test_reference_is_read_as_docker_does(text: str, full: str) -> None:
    reference = Reference.parse(text)
    assert str(reference) == full
    assert Reference.parse(str(reference)) == reference


@pytest.mark.parametrize(
    "text", ["", "Foo", "a/b:", "a//b", "a/b@sha256:12", "a b", "host.io/", "x@y", "a/b:t@", "-/x:y"]
)
def test_bad_references_are_refused(text: str) -> None:
    with pytest.raises(ReferenceError):
        Reference.parse(text)


@given(st.text(max_size=60))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except ReferenceError:
        return
    assert reference.tag or reference.digest


def test_digest_wins_and_hub_has_its_own_endpoint() -> None:
    assert Reference.parse(f"a/b:t@{SHA}").selector == SHA
    assert Reference.parse("a/b").endpoint == "registry-1.docker.io"
    assert [is_loopback(x) for x in ("localhost:5000", "127.9.9.9", "[::1]:1", "127.evil.com", "10.0.0.1")] == [
        True, True, True, False, False]  # fmt: skip


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (
            'Bearer realm="https://a/t?x=1,2",service="s=1", scope="repository:a/b:pull,push"',
            [
                Challenge(
                    "bearer", {"realm": "https://a/t?x=1,2", "service": "s=1", "scope": "repository:a/b:pull,push"}
                )
            ],
        ),
        ("bEARER Realm=http://x/y", [Challenge("bearer", {"realm": "http://x/y"})]),
        (
            'Negotiate, Basic realm="a \\"b\\"", Bearer realm = "r"',
            [Challenge("negotiate"), Challenge("basic", {"realm": 'a "b"'}), Challenge("bearer", {"realm": "r"})],
        ),
        ("Negotiate YWJj==, BASIC", [Challenge("negotiate"), Challenge("basic")]),
        ("", []),
        ('"nonsense', []),
    ],
)
def test_challenges(header: str, expected: list[Challenge]) -> None:
    assert parse_challenges(header) == expected


@given(st.text(max_size=200))
def test_challenge_parser_survives_anything(text: str) -> None:
    for challenge in parse_challenges(text):
        assert challenge.scheme == challenge.scheme.lower()


def test_bearer_is_preferred_and_needs_a_realm() -> None:
    assert choose(parse_challenges(["Basic realm=x", 'Bearer realm="y"'])) == Challenge("bearer", {"realm": "y"})
    assert choose(parse_challenges(["Bearer service=x", "Basic"])) == Challenge("basic")
    assert choose(parse_challenges("Negotiate")) is None


@pytest.mark.parametrize(
    ("body", "token", "expires"),
    [
        ({"token": "t"}, "t", 60.0),
        ({"access_token": "a", "expires_in": 300}, "a", 300.0),
        ({"token": "", "access_token": "a", "expires_in": "12"}, "a", 12.0),
        ({"token": "t", "expires_in": -5}, "t", 60.0),
        ({"token": "t", "expires_in": 1e300}, "t", 60.0),
    ],
)
def test_token_replies(body: dict[str, object], token: str, expires: float) -> None:
    reply = parse_token_reply(json.dumps(body).encode())
    assert (reply.token, reply.expires_in) == (token, expires)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"token": 5}', b'{"token": "a\\nb"}', b"[" * 100000])
def test_bad_token_replies_name_the_server_and_not_the_body(body: bytes) -> None:
    with pytest.raises(AuthError, match="token server"):
        parse_token_reply(body, "token server")


# -- credentials


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    return tmp_path / "config.json"


def _auth(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def test_auths_and_hub_aliases(docker: Path) -> None:
    assert docker_credentials("x.io") is None
    docker.write_text(json.dumps({"auths": {
        "https://index.docker.io/v1/": {"auth": _auth("hub:p:w")},
        "x.io": {"username": "u", "password": "p"},
        "https://y.io/v2/": {"identitytoken": "id", "auth": _auth("u:")},
        "bad.io": {"auth": "!!"},
    }}))  # fmt: skip
    for name in ("docker.io", "index.docker.io", "registry-1.docker.io"):
        assert docker_credentials(name) == Credentials("hub", "p:w")
    assert docker_credentials("x.io") == Credentials("u", "p")
    assert docker_credentials("y.io") == Credentials("", "", "id")
    assert docker_credentials("bad.io") is None
    assert docker_credentials("x.io:5000") is None


def test_helpers_are_asked_and_secrets_are_never_shown(docker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bin_dir = docker.parent / "bin"
    bin_dir.mkdir()
    for name, body in {
        "one": '[ "$(cat)" = a.io ] || exit 1; echo \'{"Username": "u", "Secret": "hush"}\'',
        "two": 'cat >/dev/null; echo \'{"Username": "<token>", "Secret": "identity"}\'',
    }.items():
        program = bin_dir / f"docker-credential-{name}"
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_dir}:/usr/bin:/bin")
    auths = {"c.io": {"auth": _auth("c:c")}}
    docker.write_text(json.dumps({"credHelpers": {"a.io": "one", "g.io": "gone"}, "credsStore": "two", "auths": auths}))
    found = docker_credentials("a.io")
    assert found == Credentials("u", "hush")
    assert "hush" not in repr(found)
    assert docker_credentials("b.io") == Credentials("", "", "identity")
    assert docker_credentials("g.io") is None
    docker.write_text(json.dumps({"credsStore": "../evil", "auths": auths}))
    assert docker_credentials("c.io") == Credentials("c", "c")


@pytest.mark.parametrize("text", ["{", "[]", '"x"', '{"auths": []}', '{"auths": {"x.io": 5}}'])
def test_unusable_configuration_means_no_credentials(docker: Path, text: str) -> None:
    docker.write_text(text)
    assert docker_credentials("x.io") is None


@given(st.text(max_size=40))
def test_decode_auth_survives_anything(text: str) -> None:
    decode_auth(text)


# -- addresses


def test_plain_http_only_where_it_was_asked_for() -> None:
    def urls(host: str, **options: bool) -> list[str]:
        return [endpoint.url for endpoint in route(host, ClientOptions(**options)).server]

    assert urls("r.io") == ["https://r.io"]
    assert urls("r.io", insecure=True) == ["https://r.io", "http://r.io"]
    assert urls("r.io", plain_http=True) == ["http://r.io"]
    assert urls("127.0.0.1:5000") == ["http://127.0.0.1:5000", "https://127.0.0.1:5000"]


def test_hosts_toml(tmp_path: Path) -> None:
    folder = tmp_path / "r.io"
    folder.mkdir()
    (folder / "hosts.toml").write_text(
        'server = "https://r.io"\n[host."http://mirror:5000"]\ncapabilities = ["pull"]\n'
        '[host."https://push.only"]\ncapabilities = ["push"]\n[host."https://r.io"]\nskip_verify = true\nca = "x.pem"\n'
    )
    found = route("r.io", ClientOptions(hosts_dir=str(tmp_path)))
    assert [mirror.url for mirror in found.mirrors] == ["http://mirror:5000"]
    assert [(one.url, one.verify, one.ca_files) for one in found.server] == [
        ("https://r.io", False, (str(folder / "x.pem"),))]  # fmt: skip
    (folder / "hosts.toml").write_text("server = 5")
    with pytest.raises(ConfigError, match=r"hosts\.toml"):
        route("r.io", ClientOptions(hosts_dir=str(tmp_path)))


@pytest.mark.parametrize("host", ["docker.io", "index.docker.io", "registry-1.docker.io"])
def test_docker_hub_has_one_folder(tmp_path: Path, host: str) -> None:
    """What containerd's own documentation shows."""
    (tmp_path / "docker.io").mkdir()
    file = tmp_path / "docker.io" / "hosts.toml"
    file.write_text('server = "https://docker.io"\n[host."https://mirror.example"]\n')
    found = route(host, ClientOptions(hosts_dir=str(tmp_path)))
    assert [one.address("/v2/") for one in found.mirrors] == ["https://mirror.example/v2/?ns=docker.io"]
    assert [one.address("/v2/") for one in found.server] == ["https://registry-1.docker.io/v2/"]
    file.write_text('[host."https://mirror.example"]\n')
    found = route(host, ClientOptions(hosts_dir=str(tmp_path)))
    assert [one.host for one in found.server] == ["registry-1.docker.io" if host == "docker.io" else host]


def test_who_is_told_which_registry_is_meant(tmp_path: Path) -> None:
    (tmp_path / "r.io_5000_").mkdir()
    (tmp_path / "r.io:5000").mkdir()  # containerd looks there last
    (tmp_path / "r.io_5000_" / "hosts.toml").write_text(
        'server = "http://other:80/x"\nskip_verify = true\n[host."http://R.io:5000"]\n[host."https://r.io:5001"]\n'
        '[host."https://r.io:5000/api/v2"]\noverride_path = true\n'
    )
    found = route("r.io:5000", ClientOptions(hosts_dir=str(tmp_path)))
    assert [one.address("/v2/a/manifests/t?x=1") for one in (*found.mirrors, *found.server)] == [
        "http://R.io:5000/v2/a/manifests/t?x=1", "https://r.io:5001/v2/a/manifests/t?x=1&ns=r.io%3A5000",
        "https://r.io:5000/api/v2/a/manifests/t?x=1", "http://other:80/x/v2/a/manifests/t?x=1&ns=r.io%3A5000",
    ]  # fmt: skip


def test_settings_of_a_server_that_is_not_named(tmp_path: Path) -> None:
    (tmp_path / "_default").mkdir()
    (tmp_path / "_default" / "hosts.toml").write_text('ca = "x.pem"\nclient = "me.pem"\n[header]\nX-A = "b"\n')
    (one,) = route("r.io", ClientOptions(hosts_dir=str(tmp_path))).server
    assert (one.url, one.ca_files, one.headers, one.query) == (
        "https://r.io", (str(tmp_path / "_default" / "x.pem"),), (("X-A", "b"),), "")  # fmt: skip
    assert one.client == ((str(tmp_path / "_default" / "me.pem"), ""),)


def test_a_mirrors_password_is_shown_to_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "nydusfs")
    with dead_port() as host, faulty_server({}, auth="basic") as asking, dead_port() as silent:
        (tmp_path / host).mkdir()
        mirrors = [f"http://user:pw-Zq@{silent}", f"http://user:pw-Zq@{asking.netloc}"]
        text = "".join(f'[host."{mirror}"]\n' for mirror in mirrors)
        (tmp_path / host / "hosts.toml").write_text(f'server = "http://{host}"\n{text}')
        with Transport(host, ClientOptions(hosts_dir=str(tmp_path), retries=0)) as transport:
            with pytest.raises(RegistryError) as caught:
                BlobStream(transport, "a/b", SHA, 10).read(1)
            transport.distrust(transport.mirrors()[0])
    assert "pw-Zq" not in caplog.text + str(caught.value) + str(caught.value.url)
    assert asking.netloc in caplog.text and silent in caplog.text
    assert "gave wrong bytes" in caplog.text and asking.requests


@pytest.mark.parametrize("proxy", ["socks5://u:pw-Zq@127.0.0.1:1", "ftp://u:pw-Zq@127.0.0.1:1", "http://u:pw-Zq#@127.0.0.1"])
def test_a_proxy_of_the_environment_that_cannot_be_used_is_named(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with (
        RegistryClient("r.invalid", ClientOptions(retries=0), lambda: None) as client,
        pytest.raises(RegistryError, match=r"r\.invalid.*(ALL_PROXY|cannot be reached)") as caught,
    ):
        client.manifest("a", "b")
    assert "pw-Zq" not in str(caught.value)
