"""`nydusctl node`: containerd's configurations edited by lines, and judged by containerd itself."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from snapshotter.containerdfile import release_of
from snapshotter.doctor.finding import Level
from snapshotter.doctor.installed import judge as judge_node
from snapshotter.errors import InstallError
from snapshotter.install.containerd import CRI, RUNTIMES, UNPACK, Wish, edited, judge
from snapshotter.install.ctl import command
from snapshotter.install.edit import Editor, restored
from snapshotter.install.host import Host
from snapshotter.install.parts import CONFIG, RECORD, UNIT, UNIT_FILE, Record
from snapshotter.install.tomlfile import lookup
from snapshotter.settings import ADDRESS, OLD_ROOT
from tests.lab.paths import ref_bin

OLD, NEW = (1, 6, 20), (2, 3, 4)
CONTAINERDS = {"debian": shutil.which("containerd"), "newer": ref_bin("containerd")}


def containerd(name: str) -> str:
    found = CONTAINERDS[name]
    if found is None:
        pytest.skip(f"interop: no {name} containerd here")
    return str(found)


def ask(program: str, *words: str) -> str:
    return subprocess.run([program, *words], capture_output=True, text=True, timeout=30, check=True).stdout


def written(name: str) -> dict[str, str]:
    """Configurations as people have them, by what they are like."""
    program = containerd(name)
    version = 2 if name == "debian" else 4
    files = {
        "nothing": "",
        "comments alone": "# nothing here\n\n",
        "the whole default": ask(program, "config", "default"),
        "no newline at the end": 'version = 2\nroot = "/x"',
        "Docker's package": '#   Copyright\ndisabled_plugins = ["cri"]\n#root = "/var/lib/containerd"\n',
        "carriage returns": 'version = 2\r\n[grpc]\r\n  address = "/run/x.sock" # here\r\n',
        "keys with dots": 'version = 2\nplugins."io.containerd.grpc.v1.cri".containerd.snapshotter = "overlayfs"\n',
        "many lines in a value": f"version = {version}\nrequired_plugins = [\n # [x]\n]\n[cgroup]\npath = '''\n'''\n",
        "a runtime alone": 'version = 2\n[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata]\n'
        '  runtime_type = "io.containerd.kata.v2"',
        "version 1": '[plugins.cri.containerd]\n  snapshotter = "overlayfs"\n',
        "its own address": f'version = 2\n[proxy_plugins.lazy]\ntype = "snapshot"\naddress = "{ADDRESS}"\n',
    }
    if name == "newer":
        files["its unpack list"] = (
            "version = 3\n[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n"
            "  platform = 'linux/amd64'\n  snapshotter = 'overlayfs'\n"
        )
        files["version 3"] = "version = 3\n[plugins.'io.containerd.cri.v1.images']\n\tsnapshotter = ''\n"
    return files


@pytest.mark.parametrize("name", sorted(CONTAINERDS))
@pytest.mark.parametrize("runtimes", [(), ("nydus",)], ids=["default", "runtime"])
def test_containerd_does_what_is_written_and_the_file_comes_back(
    name: str, runtimes: tuple[str, ...], tmp_path: Path
) -> None:
    program = containerd(name)
    release = release_of(ask(program, "--version"))
    wish = Wish(release=release, runtimes=runtimes)
    file = tmp_path / "config.toml"
    for kind, before in written(name).items():
        if runtimes and release < (1, 7):
            with pytest.raises(InstallError, match=r"1\.6\.\d+ has one snapshotter for all runtimes"):
                edited(before, file, wish)
            continue
        change = edited(before, file, wish)
        assert change.text != before
        assert restored(change.text, file) == before, kind
        assert edited(change.text, file, wish).text == change.text, kind
        file.write_bytes(change.text.encode())
        dump = ask(program, "-c", str(file), "config", "dump")
        notes = judge(dump, change, file, [])
        seen = tomllib.loads(dump)
        version = seen["version"]
        assert lookup(seen, ("proxy_plugins", change.name, "address")) == ADDRESS, kind
        assert (change.name == "lazy") == (kind == "its own address")
        if kind == "Docker's package":
            assert "switched off" in change.notes[-1]
            continue
        assert notes == []
        assert lookup(seen, (*CRI[version], "disable_snapshot_annotations")) is False, kind
        assert (lookup(seen, (*CRI[version], "snapshotter")) == change.name) == (not runtimes), kind
        for runtime in runtimes:
            assert lookup(seen, (*RUNTIMES[version], runtime, "snapshotter")) == change.name, kind
            assert lookup(seen, (*RUNTIMES[version], runtime, "runtime_type")) == "io.containerd.runc.v2", kind
        if release >= (2, 1):
            assert {one["snapshotter"] for one in lookup(seen, UNPACK)} == {change.name, "overlayfs"}, kind


def test_a_runtime_of_its_own_is_made_like_the_default_one() -> None:
    before = (
        'version = 2\n[plugins."io.containerd.grpc.v1.cri".containerd]\n  default_runtime_name = "crun"\n'
        '[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.crun]\n  runtime_type = "io.containerd.runc.v2"\n'
        '  snapshotter = "zfs"\n'
        '  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.crun.options]\n    SystemdCgroup = true\n'
    )
    change = edited(before, "f", Wish(release=(1, 7, 20), runtimes=("nydus",)))
    made = lookup(tomllib.loads(change.text), (*RUNTIMES[2], "nydus"))
    assert made == {"runtime_type": "io.containerd.runc.v2", "snapshotter": "nydus", "options": {"SystemdCgroup": True}}
    assert change.notes == []
    assert lookup(tomllib.loads(change.text), ("proxy_plugins", "nydus", "exports")) == {"root": OLD_ROOT}


@pytest.mark.parametrize(
    ("text", "release", "said"),
    [
        ("version = 2\n[proxy_plugins.nydus]\ntype = 'snapshot'\naddress = '/x'\n", OLD, 'f:4: address is "/x" there'),
        (
            "version = 3\n[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'zfs'\n",
            NEW,
            'f:3: snapshotter is "zfs"',
        ),
        ("version = 3\n", OLD, "f:1: containerd 1.6.20 reads versions 1 and 2 alone"),
        ("version = 9\n", NEW, "f:1: configuration version 9 is not known"),
        ("version = '2'\n", NEW, "f:1: configuration version '2' is not known"),
        ("version = \n", NEW, "f: not TOML"),
        ("version = 2\nproxy_plugins = {}\n", OLD, "not edited by lines"),
        (
            "version = 2\nplugins = { 'io.containerd.grpc.v1.cri' = { sandbox_image = 'x' } }\n",
            OLD,
            "not edited by lines",
        ),
        (
            "version = 2\n[plugins]\n'io.containerd.grpc.v1.cri'.containerd = { snapshotter = '', no_pivot = true }\n",
            OLD,
            "f:3: .* in one line with other keys",
        ),
        ("version = 2\nproxy_plugins = 3\n", OLD, "f:2: .*a part of it is no table"),
        ("# >>> nydusctl node install\nversion = 2\n", OLD, "f:1: `# <<< nydusctl node install` is missing"),
        ("version = 2\n# <<< nydusctl node install\n", OLD, "f:2: `# >>> nydusctl node install` is missing"),
    ],
)
def test_what_cannot_be_edited_safely_is_refused_by_line(text: str, release: tuple[int, ...], said: str) -> None:
    with pytest.raises(InstallError, match=said):
        edited(text, "f", Wish(release=release))


def test_replace_takes_what_somebody_set_and_gives_it_back() -> None:
    before = "version = 3\n[plugins.'io.containerd.cri.v1.images']\n  snapshotter = 'zfs' # fast\n"
    change = edited(before, "f", Wish(release=NEW, replace=True))
    assert lookup(tomllib.loads(change.text), (*CRI[3], "snapshotter")) == "nydus"
    assert restored(change.text, "f") == before


def test_lines_added_by_others_stay_when_ours_go() -> None:
    change = edited("version = 3\n", "f", Wish(release=NEW)).text
    later = f"# mine\n{change}[debug]\n  level = 'debug'\n"
    assert restored(later, "f") == "# mine\nversion = 3\n[debug]\n  level = 'debug'\n"


def test_an_import_that_wins_is_found_by_containerd_and_named(tmp_path: Path) -> None:
    for name in sorted(CONTAINERDS):
        program = containerd(name)
        imported = tmp_path / "gpu.toml"
        sections = ("version = 2", "io.containerd.grpc.v1.cri"), ("version = 3", "io.containerd.cri.v1.images")
        first, section = sections[name == "newer"]
        # 1.6 takes the section as a whole from there, 2.3 key by key
        line = 'snapshotter = "zfs"' if name == "newer" else "enable_selinux = false"
        imported.write_text(f'{first}\n[plugins."{section}"]\n{line}\n')
        file = tmp_path / "config.toml"
        change = edited(
            f'{first}\nimports = ["{imported}"]\n', file, Wish(release=release_of(ask(program, "--version")))
        )
        file.write_text(change.text)
        with pytest.raises(InstallError, match=rf"{imported}:2, which it imports, has"):
            judge(ask(program, "-c", str(file), "config", "dump"), change, file, [imported])


def test_an_editor_without_changes_changes_nothing() -> None:
    for text in ("", "a = 1", "a = 1\n", "[a]\r\nb = 1\r\n"):
        assert Editor(text, "f").text() == text


class Tree:
    """A machine that does not run: `--root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        program = root / "opt/bin/containerd-nydus-grpc"
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)

    def run(self, *words: str) -> tuple[int, str]:
        done = CliRunner().invoke(command, [words[0], "--root", str(self.root), *words[1:]])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, done.output

    def files(self) -> dict[str, str]:
        found = {}
        for path in sorted((self.root / "etc").rglob("*")):
            if path.is_symlink():
                found[f"/{path.relative_to(self.root)}"] = str(path.readlink())
            elif path.is_file():
                found[f"/{path.relative_to(self.root)}"] = path.read_text()
        return found


def test_another_root_is_installed_twice_and_left_as_it_was(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    config = tmp_path / "etc/containerd/config.toml"
    config.parent.mkdir(parents=True)
    config.write_text("version = 2\n")
    config.chmod(0o640)
    before = tree.files()
    code, said = tree.run("install", "--bin", "/opt/bin", "--dry-run")
    assert (code, tree.files()) == (0, before)
    assert '+  snapshotter = "nydus"' in said
    assert f"+++ {UNIT_FILE}" in said
    assert tree.run("install", "--bin", "/opt/bin")[0] == 0
    first = tree.files()
    assert set(first) == {*before, CONFIG, RECORD, UNIT_FILE, f"/etc/systemd/system/multi-user.target.wants/{UNIT}"}
    assert "ExecStart=/opt/bin/containerd-nydus-grpc --config-path" in first[UNIT_FILE]
    assert "mirrors" not in first[CONFIG]
    assert config.stat().st_mode & 0o777 == 0o640
    assert tree.run("install", "--bin", "/opt/bin") == (0, tree.run("install", "--bin", "/opt/bin")[1])
    assert tree.files() == first
    assert tree.run("uninstall")[0] == 0
    assert tree.files() == before
    assert tree.run("uninstall")[0] == 0


def test_what_somebody_changed_is_neither_overwritten_nor_removed(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    mine = tmp_path / "mine.json"
    mine.write_text('{"device": {}}')
    assert tree.run("install", "--bin", "/opt/bin", "--config", str(mine))[0] == 0
    assert tree.files()[CONFIG] == mine.read_text()
    mine.write_text('{"device": {"cache": {}}}')  # an upgrade brings a new one: nobody changed the old one
    assert tree.run("install", "--bin", "/opt/bin", "--config", str(mine))[0] == 0
    assert tree.files()[CONFIG] == mine.read_text()
    (tmp_path / CONFIG[1:]).write_text('{"device": {"changed": 1}}')
    code, said = tree.run("install", "--bin", "/opt/bin")
    assert (code, f"{CONFIG}: kept" in said) == (0, True)
    (tmp_path / UNIT_FILE[1:]).write_text("[Service]\n")
    code, said = tree.run("install", "--bin", "/opt/bin")
    assert (code, f"{UNIT_FILE} is there and was not written by this program" in said) == (1, True)
    code, said = tree.run("uninstall")
    assert code == 0
    assert tree.files() == {CONFIG: '{"device": {"changed": 1}}', UNIT_FILE: "[Service]\n"}
    assert tree.run("uninstall", "--purge")[0] == 0
    assert CONFIG not in tree.files()


def test_a_package_that_brings_the_unit_keeps_it(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    unit = tmp_path / "usr/lib/systemd/system" / UNIT
    unit.parent.mkdir(parents=True)
    unit.write_text("[Service]\nExecStart=/opt/bin/containerd-nydus-grpc --config-path /etc/nydus/config.json\n")
    assert tree.run("install", "--bin", "/opt/bin")[0] == 0
    assert UNIT_FILE not in tree.files()
    assert tree.run("uninstall")[0] == 0
    assert unit.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("install",), "name its directory with --bin"),
        (("install", "--bin", "/nowhere"), "containerd-nydus-grpc is not in /nowhere"),
        (("install", "--bin", "/opt/bin", "--config", "/none"), "/none: No such file"),
        (("install", "--bin", "/opt/bin", "--config", "/etc/hostname"), "/etc/hostname: not JSON"),
    ],
)
def test_wrong_words_are_one_line(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    code, output = Tree(tmp_path).run(*words)
    assert (code, output.count("\n")) == (1, 1)
    assert said in output


RANCHER = "var/lib/rancher/{}/agent/etc/containerd"
GENERATED = """# File generated by {0}. DO NOT EDIT. Use config-v3.toml.tmpl instead.
version = 3
imports = ["/var/lib/rancher/{0}/agent/etc/containerd/config-v3.toml.d/*.toml"]

[grpc]
  address = "/run/k3s/containerd/containerd.sock"

[plugins.'io.containerd.cri.v1.images']
  snapshotter = "overlayfs"
  disable_snapshot_annotations = true

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  SystemdCgroup = true
"""
OLDER = """# File generated by {0}. DO NOT EDIT. Use config.toml.tmpl instead.
version = 2

[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "overlayfs"
  disable_snapshot_annotations = true

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
"""


@pytest.mark.parametrize("name", ["k3s", "rke2"])
def test_a_node_that_writes_containerds_configuration_itself(name: str, tmp_path: Path) -> None:
    """k3s and rke2: what they write is theirs, what they import (2.x) or are told to start from (1.x) is edited."""
    tree = Tree(tmp_path)
    folder = tmp_path / RANCHER.format(name)
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(GENERATED.format(name))
    assert tree.run("install", "--bin", "/opt/bin", "--runtime", "lazy")[0] == 0
    (added,) = (folder / "config-v3.toml.d").iterdir()
    assert added.name == "nydus.toml"
    made = tomllib.loads(added.read_text())
    assert made["version"] == 3
    lazy = lookup(made, (*RUNTIMES[3], "lazy"))
    assert lazy == {"runtime_type": "io.containerd.runc.v2", "snapshotter": "nydus", "options": {"SystemdCgroup": True}}
    assert lookup(made, (*CRI[3], "disable_snapshot_annotations")) is False
    assert tree.run("uninstall")[0] == 0
    assert not added.exists()
    assert tree.run("install", "--bin", "/opt/bin")[0] == 0
    assert lookup(tomllib.loads(added.read_text()), (*CRI[3], "snapshotter")) == "nydus"
    first = added.read_text()
    assert tree.run("install", "--bin", "/opt/bin")[0] == 0
    assert added.read_text() == first
    assert tree.run("uninstall")[0] == 0
    assert not added.exists()
    assert (folder / "config.toml").read_text() == GENERATED.format(name)
    (folder / "config.toml").write_text(GENERATED.format(name).replace('"overlayfs"', '"stargz"'))
    code, said = tree.run("install", "--bin", "/opt/bin")
    assert (code, 'snapshotter is "stargz" in the configuration' in said, added.exists()) == (1, True, False)

    (folder / "config.toml").write_text(OLDER.format(name))
    template = folder / "config.toml.tmpl"
    code, said = tree.run("install", "--bin", "/opt/bin")
    assert (code, f"from now on {name} does not change it" in said) == (0, True)
    made = tomllib.loads(template.read_text())
    assert lookup(made, (*CRI[2], "snapshotter")) == "nydus"
    assert lookup(made, (*RUNTIMES[2], "runc", "runtime_type")) == "io.containerd.runc.v2"
    (folder / "config.toml").write_text(template.read_text())  # its next start
    assert tree.run("install", "--bin", "/opt/bin")[0] == 0
    assert tree.run("uninstall")[0] == 0
    assert not template.exists()
    assert tree.run("install", "--bin", "/opt/bin")[0] == 0
    template.write_text(template.read_text() + "# {{ of somebody }}\n")
    (folder / "config.toml").unlink()  # the distribution was taken away first
    assert tree.run("uninstall")[0] == 0
    assert template.read_text().endswith('runtime_type = "io.containerd.runc.v2"\n# {{ of somebody }}\n')
    (folder / "config.toml").write_text(OLDER.format(name))
    template.write_text('{{ template "base" . }}\n')
    code, said = tree.run("install", "--bin", "/opt/bin")
    assert (code, said.count("\n"), "add the lines of examples/containerd" in said) == (1, 1, True)
    assert template.read_text() == '{{ template "base" . }}\n'


def test_several_containerd_are_not_chosen_from(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    main = tmp_path / RANCHER.format("k3s") / "config.toml"
    other = tmp_path / "etc/containerd/config.toml"
    for path, text in ((main, GENERATED.format("k3s")), (other, "version = 2\n")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    code, said = tree.run("install", "--bin", "/opt/bin")
    assert (code, "choose one with --containerd-config" in said) == (1, True)
    chosen = f"/{main.relative_to(tmp_path)}"
    assert tree.run("install", "--bin", "/opt/bin", "--containerd-config", chosen)[0] == 0
    assert other.read_text() == "version = 2\n"
    assert (main.parent / "config-v3.toml.d/nydus.toml").exists()


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    (tmp_path / "etc/nydus").mkdir(parents=True)
    (tmp_path / RECORD[1:]).write_text("{}")
    code, said = tree.run("uninstall")
    assert (code, f"{RECORD} is damaged" in said) == (1, True)


def test_doctor_tells_of_an_installation_that_is_not_whole(tmp_path: Path) -> None:
    def found() -> dict[str, str]:
        return {one.check: one.text for one in judge_node(host, "/etc/containerd/config.toml") if one.level > Level.OK}

    tree = Tree(tmp_path)
    host = Host(tmp_path)
    assert list(judge_node(host, "/etc/containerd/config.toml")) == []
    assert tree.run("install", "--bin", "/opt/bin")[0] == 0
    assert found() == {}
    (tmp_path / f"{CONFIG[1:]}.nydus-new").touch()
    (tmp_path / f"etc/systemd/system/multi-user.target.wants/{UNIT}").unlink()
    config = tmp_path / "etc/containerd/config.toml"
    edited_text = config.read_text()
    config.write_text("version = 2\n")
    assert found().keys() == {"node.leftover", "node.enabled", "node.containerd"}
    (tmp_path / UNIT_FILE[1:]).unlink()
    (tmp_path / CONFIG[1:]).unlink()
    assert found().keys() == {"node.leftover", "node.unit", "node.config", "node.containerd"}
    record = Record.read(host)
    assert record is not None
    record.state = "uninstalling"
    record.write(host)
    assert found() == {"node.install": f"{RECORD}: uninstalling was begun and did not come to its end"}
    (tmp_path / RECORD[1:]).unlink()
    config.write_text(edited_text)
    assert "is gone" in found()["node.install"]
