"""What a user reads when something is wrong: file, key and remedy in one line. The real-life side is in integration."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bootstrap.errors import BuildError
from bootstrap.merge import MergeSource, merge_layers
from nydusfs.errors import ConfigError, os_reason
from nydusfs.registry.hosts import ClientOptions, route
from snapshotter import logs, settings
from snapshotter.errors import SettingsError, StartError
from snapshotter.nydusd_api import ApiError
from snapshotter.nydusd_config import load_template
from tests.lab.tiny import tiny_image


def test_reasons_of_the_kernel_name_the_file() -> None:
    with pytest.raises(OSError) as caught:
        os.open("/nonexistent/file", os.O_RDONLY)
    assert os_reason(caught.value) == "/nonexistent/file: No such file or directory"
    assert os_reason(OSError()) == "OSError"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            'Mount(MountFilesystem(Other("RAFS failed to handle request, bootstrap /a\\"b: cut")))',
            'bootstrap /a"b: cut',
        ),
        ("DaemonInfo(NotReady)", "DaemonInfo(NotReady)"),
        ('Mount(Other("broken \\x"))', 'Mount(Other("broken \\x"))'),
        ("", ""),
    ],
)
def test_what_nydusd_wrapped_is_unwrapped(message: str, reason: str) -> None:
    assert ApiError("POST /api/v1/mount", 500, message).reason == reason


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a = = b", "is not TOML"),
        ("server = 5", "server: must be a string"),
        ("host = 5", "host: must be a table"),
        ('[host."ftp://x"]', "host: 'ftp://x' is not an http or https address"),
        ('[host."http://x"]\ncapabilities = 3', "host.http://x: capabilities, ca and header have the wrong type"),
    ],
)
def test_hosts_files_are_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "r.example" / "hosts.toml"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        route("r.example", ClientOptions(hosts_dir=str(tmp_path)))
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_a_misspelt_device_is_pointed_at(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"devise": {}}')
    with pytest.raises(SettingsError, match=r'c\.json: key "device" is missing \(there is "devise"\)'):
        load_template(path)


def test_a_merge_names_the_damaged_layer(tmp_path: Path) -> None:
    good = tiny_image(tmp_path, {"a": b"1"}).bootstrap
    cut = tmp_path / "cut.boot"
    cut.write_bytes(good.read_bytes()[:5000])
    with pytest.raises(BuildError, match=r"cut\.boot: v6 superblock .*truncated"):
        merge_layers([MergeSource(good), MergeSource(cut)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_named_by_the_builder(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(os.urandom(1 << 20))
    argv = [sys.executable, "-c", "from bootstrap.cli import main; main()", "create", "-B", str(tmp_path / "b")]
    done = subprocess.run([*argv, "--blob", "/dev/full", str(tmp_path)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "/dev/full: No space left on device" in done.stderr
    assert (done.stderr.count("\n"), "Traceback" in done.stderr) == (1, False)
    assert not (tmp_path / "b").exists()


@pytest.fixture
def chosen(tmp_path: Path) -> settings.Settings:
    return settings.load({"log.dir": str(tmp_path / "logs"), "root": "/r", "nydusd-config": "/none"})


@pytest.fixture(autouse=True)
def own_logging() -> object:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield None
    root.handlers[:], root.level = before, level


def test_a_log_on_a_full_disk_is_said_once(chosen: settings.Settings, capsys: pytest.CaptureFixture[str]) -> None:
    chosen.log_dir.mkdir()
    (chosen.log_dir / logs.FILE).symlink_to("/dev/full")
    logs._Lossy.said = False
    logs.configure(chosen, logs.buffer_until_known())
    for number in range(3):
        logging.getLogger("snapshotter").info("line %d", number)
    said = capsys.readouterr().err
    assert said.count("No space left on device; lines are lost") == 1
    assert "Traceback" not in said


def test_a_log_that_cannot_be_opened_names_the_flag(chosen: settings.Settings) -> None:
    chosen.log_dir.write_text("a file")
    with pytest.raises(StartError, match=r"nydus-snapshotter\.log: .*--log-dir"):
        logs.configure(chosen, logs.buffer_until_known())
