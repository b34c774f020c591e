"""Both configuration languages, against the scenario's file and the reference's example."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from nydusfs.config import (
    HttpProxyBackend,
    LocalDiskBackend,
    LocalFsBackend,
    ObjectBackend,
    RegistryBackend,
    connection_debug,
    load_config,
    public_config,
)
from nydusfs.errors import ConfigError

SCENARIO: dict[str, Any] = {
    "device": {
        "backend": {
            "type": "registry",
            "config": {
                "mirrors": [
                    {
                        "host": "http://127.0.0.1:65001",
                        "auth_through": False,
                        "headers": {"X-Dragonfly-Registry": "https://index.docker.io"},
                    }
                ],
                "scheme": "https",
                "skip_verify": False,
                "timeout": 10,
                "connect_timeout": 10,
                "retry_limit": 2,
            },
        },
        "cache": {"type": "blobcache", "config": {"work_dir": "/var/lib/nydus/cache/"}},
    },
    "mode": "direct",
    "digest_validate": False,
    "iostats_files": False,
    "enable_xattr": True,
    "fs_prefetch": {"enable": True, "threads_count": 10, "merging_size": 131072, "bandwidth_rate": 1048576},
}

# The line people grep for, word for word.
LINE = (
    'backend config: ConnectionConfig { proxy: ProxyConfig { url: "", ping_url: "", fallback: false, '
    'check_interval: 5, use_http: false }, mirrors: [MirrorConfig { host: "http://127.0.0.1:65001", '
    'headers: {"X-Dragonfly-Registry": "https://index.docker.io"}, auth_through: false }], '
    "skip_verify: false, timeout: 10, connect_timeout: 10, retry_limit: 2 }"
)

V2 = """
version = 2
id = "my_id"
[backend]
type = "registry"
[backend.registry]
host = "registry.example.com"
repo = "library/nginx"
auth = "dXNlcjpwYXNz"
[backend.registry.proxy]
url = "http://127.0.0.1:65001"
[cache]
type = "filecache"
[cache.filecache]
work_dir = "/var/lib/nydus/cache"
[rafs]
mode = "direct"
batch_size = 65536
enable_xattr = true
[rafs.prefetch]
enable = true
threads = 4
bandwidth_limit = 77
"""


def changed(**changes: Any) -> dict[str, Any]:
    """The scenario's document, filled in, with values at dotted keys (`__` for a dot) replaced."""
    document: dict[str, Any] = json.loads(json.dumps(SCENARIO))
    document["device"]["backend"]["config"].update(host="r.example", repo="a/b")
    for path, value in changes.items():
        *way, last = path.split("__")
        place = document
        for key in way:
            place = place[key]
        place[last] = value
    return document


def load(document: dict[str, Any], **options: bool) -> Any:
    return load_config(json.dumps(document), "config.json", **options)


def test_the_scenario() -> None:
    config = load(SCENARIO, template=True)
    assert connection_debug(config) == LINE
    assert isinstance(config.backend, RegistryBackend)
    assert config.cache.work_dir == "/var/lib/nydus/cache/"
    assert config.enable_xattr
    prefetch = config.prefetch
    assert (prefetch.enable, prefetch.threads, prefetch.merging_size) == (True, 10, 131072)
    assert prefetch.bandwidth_rate == 1 << 20  # not raised to 16 MiB/s as upstream does
    assert prefetch.prefetch_all
    with pytest.raises(ConfigError, match=r"config\.json: device\.backend\.config\.host"):
        load(SCENARIO)


def test_version_2_in_both_syntaxes() -> None:
    import tomllib

    from_toml = load_config(V2, "config.toml")
    assert from_toml == load_config(json.dumps(tomllib.loads(V2)), "config.json")
    assert (from_toml.id, from_toml.amplify_io, from_toml.version) == ("my_id", 65536, 2)
    assert isinstance(from_toml.backend, RegistryBackend)
    assert from_toml.backend.connection.proxy.fallback
    assert (from_toml.prefetch.threads, from_toml.prefetch.bandwidth_rate) == (4, 77)
    assert not from_toml.prefetch.prefetch_all  # the default differs from version 1
    shown = json.dumps(public_config(from_toml)) + repr(from_toml)
    assert "dXNlcjpwYXNz" not in shown


def test_other_backends() -> None:
    local = load(changed(device__backend={"type": "localfs", "config": {"dir": "/blobs", "alt_dirs": ["/more"]}}))
    assert local.backend == LocalFsBackend("", "/blobs", ("/more",))
    options = {
        "endpoint": "oss-cn.example", "bucket_name": "b", "access_key_id": "KEYID", "access_key_secret": "SECRET",
        "object_prefix": "p/",
    }  # fmt: skip
    oss = load(changed(device__backend={"type": "oss", "config": options}))
    assert isinstance(oss.backend, ObjectBackend)
    assert (oss.backend.type, oss.backend.endpoint) == ("oss", "oss-cn.example")
    assert oss.backend.access_key_secret == "SECRET"
    disk = load(changed(device__backend={"type": "localdisk", "config": {"device_path": "/dev/vdb"}}))
    assert disk.backend == LocalDiskBackend("/dev/vdb")
    text = '{"version": 2, "backend": {"type": "http-proxy", "http-proxy": {"addr": "http://h:1", "path": "/x/"}}}'
    proxy = load_config(text, "config.json")
    assert proxy.backend == HttpProxyBackend("http://h:1", "/x/")
    shown = "".join(json.dumps(public_config(one)) + repr(one) + connection_debug(one) for one in (oss, disk, proxy))
    assert "KEYID" not in shown and "SECRET" not in shown


def test_unknown_keys_are_named_once_and_ignored(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    document = changed(iostat_files=True, fs_prefetch__thread_count=3)
    document["device"]["backend"]["config"]["mirrors"][0]["header"] = {}
    load(document)
    assert [record.getMessage() for record in caplog.records] == [
        "config.json: unknown key device.backend.config.mirrors[0].header is ignored; did you mean 'headers'?",
        "config.json: unknown key fs_prefetch.thread_count is ignored; did you mean 'threads_count'?",
        "config.json: unknown key iostat_files is ignored; did you mean 'iostats_files'?",
    ]


def test_keys_without_effect_are_named_once_by_a_process_and_why(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nydusfs.config.section._said", set())
    keys = {"device__cache__compressed": True, "device__cache__config__enable_encryption": True}
    for _ in range(2):
        assert load(changed(**keys)).cache.compressed
    load(changed(device__cache__compressed=False))
    plain = "has no effect: what is cached is plain data"
    assert [record.getMessage() for record in caplog.records] == [
        f"config.json: device.cache.compressed {plain}, so that no read has to decompress it",
        f"config.json: device.cache.config.enable_encryption {plain}; put work_dir on an encrypted disk",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enable_xattr": "yes"}, "enable_xattr: expected boolean (true or false), found string 'yes'"),
        ({"device__backend__config__timeout": "10"}, "device.backend.config.timeout: expected integer, found string"),
        ({"device__backend__config__timeout": True}, "device.backend.config.timeout: expected integer, found boolean"),
        ({"device__backend__config__timeout": -1}, "device.backend.config.timeout: -1 is outside 0.."),
        ({"device__backend__config__mirrors": {}}, "device.backend.config.mirrors: expected list of tables"),
        ({"device__backend__config__mirrors": [{"host": "127.0.0.1:65001"}]}, "mirrors[0].host: '127.0.0.1:65001'"),
        (
            {"device__backend__config__mirrors": [{"host": "http://m", "headers": {"A": "b\r\nC: d"}}]},
            "mirrors[0].headers.A: holds a line break",
        ),
        (
            {"device__backend__config__mirrors": [{"host": "http://m", "headers": {"A": "\u4e2d"}}]},
            "mirrors[0].headers.A: holds characters that no HTTP header can have",
        ),
        ({"device__backend__config__mirrors": [{"host": "http://a b:1"}]}, "mirrors[0].host: 'http://a b:1' is not"),
        ({"device__backend__config__registry_token": "abc\n"}, "config.registry_token: holds blanks, line breaks"),
        (
            {
                "device__backend__config__mirrors": None,
                "device__backend__config__proxy": {"url": "http://p", "ping_url": "p:4001/ping"},
            },
            "config.proxy.ping_url: 'p:4001/ping' is not a URL",
        ),
        ({"device__backend__config__proxy": {"url": "http://p"}}, "proxy and mirrors cannot be configured"),
        ({"device__backend__config__auth": "dXNlcg=="}, "device.backend.config.auth: has no colon"),
        ({"device__backend__config__auth": 5}, "device.backend.config.auth: expected string, found integer (hidden)"),
        ({"device__cache__config__work_dir": "/c\0"}, "device.cache.config.work_dir: has a NUL or half a character"),
        ({"device__backend__config__host": "h\ud800"}, "device.backend.config.host: has a NUL or half a character"),
        ({"device__backend__config__ca_cert_files": ["/c", "/\0"]}, "ca_cert_files: has a NUL or half a char"),
        (
            {"device__cache__config__work_dir": "/" + "c" * 300, "device__cache__config__limit": "80%"},
            "device.cache.config.limit: '80%' of a disk that cannot be looked at: /ccc",
        ),
        ({"device__cache__config__min_free": 10**400}, "0 is not a number of bytes"),
        ({"device__backend__type": "ftp"}, "device.backend.type: 'ftp' is not a backend type"),
        ({"device__cache__type": "dummy"}, "device.cache.type: 'dummy' is not a cache type"),
        ({"device": []}, "device: expected table, found list"),
        ({"mode": "lazy"}, "mode: 'lazy' is not a mode"),
        ({"mode": None}, "mode: is missing"),
        ({"fs_prefetch__threads_count": 0}, "fs_prefetch.threads_count: 0 is outside 1..1024"),
    ],
)
def test_wrong_values_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(changed(**change))
    assert str(caught.value).startswith("config.json: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("this = is = nothing", "is neither JSON"),
        ("[1]", "expected a table"),
        ("3", "expected a table"),
        ("", "device: is missing"),
        ("version = 3", "version: 3 is not supported"),
        ("version = 2", "backend: is missing"),
        ("x" * (1 << 20) + "x", "is larger than"),
    ],
)
def test_texts_that_are_no_configuration(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(text, "somewhere")
