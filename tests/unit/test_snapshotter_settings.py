"""Flags of three generations, the TOML file, and the nydusd JSON derived for an image."""

from __future__ import annotations

import base64
import json
import logging
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from nydusfs.registry.credentials import Credentials
from snapshotter import settings
from snapshotter.cli import _command, go_arguments, settings_of
from snapshotter.errors import InvalidArgument, NotFound, SettingsError
from snapshotter.labels import GID_MAPPING, IMAGE_REF, UID_MAPPING, id_mapping, image_ref
from snapshotter.nydusd_config import credentials_of, derive, load_template, loopback_scheme

SCENARIO: dict[str, Any] = {
    "device": {
        "backend": {
            "type": "registry",
            "config": {
                "mirrors": [{"host": "http://127.0.0.1:65001", "auth_through": False, "headers": {"X": "y"}}],
                "scheme": "https",
                "retry_limit": 2,
            },
        },
        "cache": {"type": "blobcache", "config": {"work_dir": "/var/lib/nydus/cache/"}},
    },
    "mode": "direct",
    "fs_prefetch": {"enable": True},
    "future_key": {"kept": 1},
}


def parse(*arguments: str) -> dict[str, Any]:
    with _command().make_context("containerd-nydus-grpc", go_arguments(arguments)) as context:
        return settings_of(context.params)


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SCENARIO))
    return path


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config-path", "/e.json"], {"config-path": "/e.json"}),
        (["-config-path=/e.json", "-log-to-stdout"], {"config-path": "/e.json", "log.log_to_stdout": True}),
        (["--log-to-stdout=false", "--root", "/r"], {"log.log_to_stdout": False, "root": "/r"}),
        (
            [
                "--shared-daemon",
                "--daemon-mode",
                "multiple",
                "--nydusd-path",
                "/n",
                "--nydusimg-path",
                "/i",
                "-C",
                "/c",
            ],
            {
                "daemon_mode": "shared",
                "daemon.nydusd_path": "/n",
                "daemon.nydusimage_path": "/i",
                "cache_manager.cache_dir": "/c",
            },
        ),
        (
            ["--async-remove", "-l", "debug", "-R", "/r"],
            {"snapshot.sync_remove": False, "log.level": "debug", "root": "/r"},
        ),
        (
            ["--nydusd-thread-num", "8", "--daemon-backend", "fusedev"],
            {"daemon.threads_number": 8, "daemon.fs_driver": "fusedev"},
        ),
    ],
)
def test_flags_of_every_generation(arguments: list[str], expected: dict[str, Any]) -> None:
    assert parse(*arguments) == expected


def test_config_is_told_apart_by_content(tmp_path: Path, template: Path) -> None:
    old = settings.load({"config": str(template)})
    assert (old.template, str(old.root)) == (template, settings.OLD_ROOT)
    assert old.shared
    toml = tmp_path / "config.toml"
    toml.write_text(
        f'version = 1\nroot = "/r"\ndaemon_mode = "dedicated"\n[daemon]\nnydusd_config = "{template}"\n'
        '[log]\nlevel = "debug"\nlog_rotation_max_backups = 0\n'
    )
    new = settings.load({"config": str(toml), "log.level": "warn"})
    assert (str(new.root), new.shared, new.template, new.log_level) == ("/r", False, template, "warn")
    assert (new.log_rotation_backups, str(new.cache_dir), str(new.log_dir)) == (0, "/r/cache", "/r/logs")


def test_unknown_keys_are_named_with_the_nearest_known(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert settings.parse_toml('version = 1\n[daemon]\nnydusd_pth = "/x"\n[nonsense]\na = 1', "f.toml") == {
            "version": 1
        }
    assert "daemon.nydusd_pth is ignored (did you mean daemon.nydusd_path?)" in caplog.text
    assert "nonsense" in caplog.text


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("version = 2", "version 2"),
        ("uid = 'root'", "uid: expected a number"),
        ("cleanup_on_close = 1", "expected true or false"),
        ("daemon = 'x'", "daemon: expected a table"),
        ("= broken", "neither a JSON object nor valid TOML"),
        ("root = '/" + "x" * 80 + "'", "longer than 70 bytes"),
        ("root = '/a:b'", "overlay options"),
        ("daemon_mode = 'never'", "daemon_mode"),
        ("[daemon]\nfs_driver = 'fscache'", "fs_driver"),
        ("[image]\nvalidate_signature = true", "validate_signature"),
        ("[log]\nlevel = 'loud'", "loud"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(tmp_path: Path, text: str, names: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=names):
        settings.load({"config": str(path)})


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", '"device" is missing'),
        ('{"device": {"backend": {"type": "registry", "config": {"timeout": "x"}}}}', "timeout"),
        ('{"device": {"backend": {"type": "teleport", "config": {}}}}', "teleport"),
    ],
)
def test_bad_templates_are_refused_by_file_and_key(tmp_path: Path, text: str, names: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(SettingsError, match=names) as caught:
        load_template(path)
    assert str(path) in str(caught.value)
    with pytest.raises(SettingsError, match="cannot be read"):
        load_template(tmp_path / "missing.json")


def test_derived_config(template: Path) -> None:
    def derived(image: str, credentials: Credentials | None) -> str:
        loaded = load_template(template)
        return derive(loaded, image=image, instance="7", cache_dir=Path("/c"), credentials=credentials)

    auth = base64.b64encode(b"me:secret").decode()
    text = derived("nginx", Credentials("me", "secret"))
    assert credentials_of(text) == Credentials("me", "secret")
    made = json.loads(text)
    backend = made["device"]["backend"]["config"]
    assert (backend["host"], backend["repo"], backend["auth"]) == ("index.docker.io", "library/nginx", auth)
    assert backend["scheme"] == "https"
    assert backend["mirrors"] == SCENARIO["device"]["backend"]["config"]["mirrors"]
    assert backend["proxy"] == {"fallback": False}
    assert made["device"]["id"] == "/7"
    assert made["device"]["cache"]["config"]["work_dir"] == "/c"
    assert made["future_key"] == {"kept": 1}
    text = derived("ghcr.io/a/b@sha256:" + "0" * 64, Credentials(registry_token="t"))
    backend = json.loads(text)["device"]["backend"]["config"]
    assert (backend["host"], backend["repo"]) == ("ghcr.io", "a/b")
    assert backend["registry_token"] == "t"
    assert "auth" not in backend
    text = derived("ghcr.io/a/b", None)
    assert credentials_of(text) is None
    assert "auth" not in json.loads(text)["device"]["backend"]["config"]
    with pytest.raises(InvalidArgument):
        derived("Bad Name", None)


def test_only_loopback_registries_are_asked_for_their_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snapshotter.nydusd_config.PROBE_SECONDS", 20.0)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            for _ in range(2):  # the TLS hello, then the question
                peer, _ = server.accept()
                peer.recv(1024)
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                peer.close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        assert loopback_scheme(f"127.0.0.1:{server.getsockname()[1]}") == "http"
        thread.join(10)
    assert loopback_scheme("127.0.0.1:1") == ""
    assert loopback_scheme("registry.example:5000") == ""
    assert loopback_scheme("10.0.0.1:5000") == ""


def test_labels() -> None:
    assert image_ref({IMAGE_REF: "a/b"}, "1") == "a/b"
    with pytest.raises(NotFound, match="disable_snapshot_annotations = false"):
        image_ref({}, "1")
    assert id_mapping({}) is None
    assert id_mapping({UID_MAPPING: "0:1000:5", GID_MAPPING: "0:1000:5"}) == (0, 1000, 5)
    for bad in ("", "0:1000:0", "0:4294967295:2", "0:1:2,3:4:5", "a:b:c", "0:-1:5"):
        with pytest.raises(InvalidArgument):
            id_mapping({UID_MAPPING: bad, GID_MAPPING: bad or "0:1:2"})
