"""nydusctl's commands for the whole node: how they are found, and what they make of containerd's configuration."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from nydusfs.daemon import ctl
from snapshotter.doctor import above, remote, services, storage
from snapshotter.doctor.finding import Level
from snapshotter.doctor.run import findings
from snapshotter.explain import facts
from snapshotter.install.containerd import platform
from snapshotter.node import Choices, Node
from snapshotter.nydusctl import COMMANDS
from snapshotter.top import WIDE, rates, render


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setattr(ctl.Group, "later", COMMANDS)
    return CliRunner()


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_commands_of_the_node_need_no_sock(commands: CliRunner, name: str) -> None:
    told = commands.invoke(ctl.cli, [name, "--help"])
    assert told.exit_code == 0
    assert "Usage:" in told.output


def test_upstreams_syntax_is_what_it_was(commands: CliRunner) -> None:
    for words in (["info"], ["metrics", "fsstats"], ["umount", "/x"], ["mount"]):
        told = commands.invoke(ctl.cli, words)
        assert (told.exit_code, "'--sock'" in told.output) == (2, True)
        told = commands.invoke(ctl.cli, ["--sock", "/nowhere", *words])
        assert told.exit_code == (2 if words == ["mount"] else 1)
    listed = commands.invoke(ctl.cli, ["--help"]).output
    assert all(f"  {name} " in listed for name in (*COMMANDS, "info", "set", "metrics", "mount", "umount"))


def test_what_is_no_utf8_ends_with_one_line(commands: CliRunner, tmp_path: Path) -> None:
    config = tmp_path / "nydusd.json"
    config.write_bytes(b"\xff\xfe{")
    sock = ["--sock", "/nowhere"]
    told = commands.invoke(ctl.cli, [*sock, "mount", "-s", "b", "-c", str(config), "-m", "/x", "-t", "rafs"])
    assert (told.exit_code, told.output) == (1, f"Error: configuration {config} is not UTF-8 text\n")
    for words in (["umount", "/\udcff"], ["metrics", "fsstats", "--id", "\udcff"]):
        told = commands.invoke(ctl.cli, [*sock, *words])
        assert (told.exit_code, told.output) == (1, "Error: no nydusd answers at /nowhere: No such file or directory\n")


def test_an_answer_that_finds_no_room_is_one_line() -> None:
    program = [sys.executable, "-c", "from snapshotter.nydusctl import main; main()", "--help"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "Error: No space left on device\n")


SOCKET = "/run/n/g.sock"
PROXY = f'[proxy_plugins.nydus]\ntype = "snapshot"\naddress = "{SOCKET}"\n'
EXPORTS = '[proxy_plugins.nydus.exports]\nenable_remote_snapshot_annotations = "true"\n'
UNPACK = "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nsnapshotter = \"nydus\"\n"
IMAGES = "[plugins.'io.containerd.cri.v1.images']\nsnapshotter = \"nydus\"\n"
ON = "disable_snapshot_annotations = false\n"
CRI_2 = '[plugins."io.containerd.grpc.v1.cri".containerd]\n'


@pytest.mark.parametrize(
    ("text", "version", "expected"),
    [
        (f"version = 3\n{PROXY}{EXPORTS}{IMAGES}{ON}{UNPACK}", "v2.3.4", {}),
        (f"version = 3\n{PROXY}{EXPORTS}{IMAGES}{UNPACK}", "2.3.4", {"containerd.annotations": Level.WARNING}),
        (f"version = 3\n{PROXY}{IMAGES}{ON}{UNPACK}", "2.3.4", {"containerd.transfer": Level.WARNING}),
        (f"version = 3\n{PROXY}{EXPORTS}{IMAGES}{ON}", "2.1.0", {"containerd.transfer": Level.WARNING}),
        (f"version = 3\n{PROXY}{EXPORTS}{IMAGES}{ON}{UNPACK}platform = '{platform()}'\n", "2.1.0", {}),
        (f"version = 3\n{PROXY}{EXPORTS}{IMAGES}{ON}{UNPACK}platform = 'linux/s390x'\n", "2.1.0",
         {"containerd.transfer": Level.WARNING}),
        (f"version = 3\n{PROXY}{IMAGES}{ON}", "2.0.3", {}),
        (f'version = 2\n{PROXY}{CRI_2}snapshotter = "nydus"\n{ON}', "1.7.20", {}),
        (f'version = 2\n{PROXY}{CRI_2}snapshotter = "nydus"\n', "1.7.20", {"containerd.annotations": Level.WARNING}),
        (f"version = 2\n{PROXY}{CRI_2}{ON}", "1.7.20", {"containerd.cri": Level.NOTE}),
        (f'version = 2\n{PROXY}{CRI_2[:-2]}.runtimes.kata]\nsnapshotter = "nydus"\n{CRI_2}{ON}', "1.7.20", {}),
        (f'{PROXY}[plugins.cri.containerd]\nsnapshotter = "nydus"\n{ON}', "1.6.20", {}),
        (f'{PROXY}[plugins.cri.containerd]\nsnapshotter = "nydus"\n{ON}discard_unpacked_layers = true\n', "1.6.20",
         {"containerd.discard": Level.WARNING}),
        (f'disabled_plugins = ["io.containerd.grpc.v1.cri"]\nversion = 2\n{PROXY}', "1.6.20",
         {"containerd.cri": Level.NOTE}),
    ],
)  # fmt: skip
def test_annotations_in_every_form_of_the_configuration(
    text: str, version: str, expected: dict[str, Level], tmp_path: Path
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    root = f"/tmp/nydus-nowhere-{os.getpid()}"
    node = Node(Choices(root=root, arguments=("--address", SOCKET), containerd_config=str(file)))
    found = {one.check: one.level for one in above._annotations(node, node.containerd, version)}
    assert {check: level for check, level in found.items() if level > Level.OK} == expected


def test_what_the_snapshotter_does_not_use_is_no_fault(tmp_path: Path) -> None:
    """A host in the template, whose place each image's own takes; template and nydusd with the proxy driver."""
    template = tmp_path / "nydusd.json"
    template.write_text('{"device": {"backend": {"type": "registry", "config": {"host": "https://nobody.invalid"}}}}')
    root = ("--root", f"/tmp/nydus-nowhere-{os.getpid()}")
    node = Node(Choices(arguments=(*root, "--config-path", str(template)), root=root[1]))
    assert [(one.check, one.level) for one in remote.reachability(node)] == [("registry.reach", Level.NOTE)]
    unread = ("--fs-driver", "proxy", "--config-path", str(tmp_path / "none.json"), "--nydusd", "/nowhere/nydusd")
    node = Node(Choices(arguments=(*root, *unread), root=root[1]))
    found = [*services.settings(node), *services.daemons(node)]
    assert [(one.check, one.level) for one in found] == [("snapshotter.template", Level.OK)]


@pytest.mark.parametrize(("mode", "said"), [("none", "daemon_mode none"), ("shared", "no container used it yet")])
def test_explain_says_who_has_not_mounted_an_image(mode: str, said: str) -> None:
    root = f"/tmp/nydus-nowhere-{os.getpid()}"
    node = Node(Choices(root=root, arguments=("--daemon-mode", mode)))
    found, meta = facts.Explanation("x", "image"), facts._Row(1, "default/1/sha256:0", None, 3, 10**18, 10**18, {})
    facts._image(node, found, {1: meta}, meta, None)
    assert [said in reason for reason in found.why] == [True]


@pytest.mark.parametrize("broken", ["database", "settings"])
def test_one_fault_is_one_finding(broken: str, tmp_path: Path) -> None:
    root, template, toml = tmp_path / "root", tmp_path / "nydusd.json", tmp_path / "snapshotter.toml"
    root.mkdir()
    (root / "metadata.sqlite").write_bytes(bytes(range(256)) * 64)
    template.write_text('{"device": {"backend": {"type": "registry", "config": {}}}}')
    toml.write_text("version = 1\n" + ("uid = true\n" if broken == "settings" else ""))
    node = Node(Choices(root=str(root), arguments=("--config", str(toml), "--config-path", str(template))))
    about = ("snapshotter.settings", "root.", "doctor.")
    found = [one for one in findings(node) if one.level is Level.ERROR and one.check.startswith(about)]
    assert [one.check for one in found] == ["root.database" if broken == "database" else "snapshotter.settings"]
    assert found[0].remedy


@pytest.mark.parametrize(
    ("total", "free", "level"),
    [
        (20 << 40, 350 << 30, Level.OK),
        (200 << 30, 3 << 30, Level.WARNING),
        (200 << 30, 900 << 20, Level.ERROR),
        (2 << 30, 200 << 20, Level.ERROR),
        (500 << 20, 60 << 20, Level.OK),
        (500 << 20, 5 << 20, Level.ERROR),
    ],
)
def test_a_disk_is_full_by_what_is_left(
    total: int, free: int, level: Level, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A fiftieth of a large disk is room for every image of a node."""
    template = tmp_path / "nydusd.json"
    template.write_text('{"device": {"backend": {"type": "registry", "config": {}}}}')
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(total, total - free, free))
    node = Node(Choices(root=f"/tmp/nydus-nowhere-{os.getpid()}", arguments=("--config-path", str(template))))
    (found,) = [one for one in storage.disk(node) if one.check == "disk.space"]
    assert found.level is level


def test_unit_files_with_continued_lines_and_comments(tmp_path: Path) -> None:
    file = tmp_path / "x.service"
    file.write_text(
        "[Unit]\nBefore=a.service \\\n  b.service\n#Before=no\n[Service]\nKillMode = process\nExecStart=-/bin/x y\n"
    )
    found = services.read_unit(file)
    assert found["Unit.Before"].split() == ["a.service", "b.service"]
    assert (found["Service.KillMode"], found["Service.ExecStart"]) == ("process", "-/bin/x y")


def test_rates_survive_counters_that_begin_again() -> None:
    names = ("reads", "read_bytes", "read_errors", "read_micros", "lookups", "cache_hits", "cache_asked",
             "fetched_bytes", "fetches", "fetch_errors")  # fmt: skip
    one = {"daemon": "d", "snapshot": 1, "mount": "1", **dict.fromkeys(names, 100)}
    two = {**one, "reads": 160, "read_bytes": 10}
    idle = {**one, "mount": "1-userns-65536", **dict.fromkeys(names, 0)}
    (found, other) = rates({"at": 10.0, "images": [one, idle]}, {"at": 12.0, "images": [two, idle]})
    assert (found["per_second"]["reads"], found["per_second"]["read_bytes"]) == (30.0, 0)
    assert set(other["per_second"].values()) == {0}


def test_top_cuts_nothing_off_where_the_terminal_is_narrow() -> None:
    from rich.console import Console

    counters = {"reads": 5, "read_bytes": 12_345_678, "read_errors": 0, "read_micros": 9_000_000, "lookups": 1,
                "cache_hits": 3, "cache_asked": 5, "prefetched": 10, "prefetch_used": 4, "fetched_bytes": 98_765_432,
                "fetches": 7, "fetch_errors": 0}  # fmt: skip
    name = "registry.example/some/long/team/application:1.2.3"
    now = {
        "at": 2.0,
        "daemons": [{"id": "x", "state": "RUNNING", "pid": 7, "waiting": 0, "memory_kb": 20_000}],
        "images": [{"image": name, "snapshot": 5, "mount": "5", "daemon": "x", **counters}],
        "sources": [{"address": "https://mirror.example:65001", "state": "up", "first_byte_millis": 369.2,
                     "bytes_per_second": 653_900, "error_rate": 0.0, "in_flight": 2, "bytes": 10_100_000,
                     "last_failure": "connection refused"}],
    }  # fmt: skip
    for width in (80, WIDE):
        console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(render({"at": 0.0, "images": []}, now, width))
        text = console.export_text()
        assert "…" not in text
        assert name in "".join(line[:40].split()[0] for line in text.splitlines() if line.split()) or name in text
        assert "10.1 MB" in text
        assert " 30 % " in text  # 3 pieces from the cache, 7 requests
        assert ("connection refused" in text) == (width == WIDE)
