"""containerd's configuration with imports: read as each release reads it, and as two of them say that they do."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snapshotter.containerdfile import Release, read_config, release_of, release_of_program
from snapshotter.install.tomlfile import lookup
from tests.lab.paths import ref_bin

CONTAINERDS = {"debian": shutil.which("containerd"), "newer": ref_bin("containerd")}
OLD, MIDDLE, NEW = (1, 6, 20), (1, 7, 16), (2, 3, 4)
CRI = {OLD: ("plugins", "io.containerd.grpc.v1.cri", "containerd"), NEW: ("plugins", "io.containerd.cri.v1.images")}
SECTION = {OLD: 'plugins."io.containerd.grpc.v1.cri"', NEW: "plugins.'io.containerd.cri.v1.images'"}
MAIN = """version = {version}
imports = ["{folder}/conf.d/*.toml", "beside.toml"]
root = "/a"
oom_score = 5
disabled_plugins = ["io.containerd.a.v1"]
[grpc]
  address = "/run/a"
  uid = 5
[proxy_plugins.one]
  type = "snapshot"
  address = "/1"
  [proxy_plugins.one.exports]
    root = "/r"
[proxy_plugins.two]
  type = "snapshot"
  address = "/2"
[{cri}]
  max_concurrent_downloads = 9
  snapshotter = "one"
  disable_snapshot_annotations = false
"""


def told(release: Release) -> Callable[[], Release]:
    return lambda: release


def written(folder: Path, release: Release) -> Path:
    (folder / "conf.d").mkdir()
    cri = f"{SECTION[OLD]}.containerd" if release < (2,) else SECTION[NEW]
    main = folder / "config.toml"
    text = MAIN.format(version=2 if release < (2,) else 3, folder=folder, cri=cri)
    main.write_text(text.replace("  max_concurrent_downloads = 9\n", "") if release < (2,) else text)
    version = text.partition("\n")[0]
    (folder / "conf.d" / ".1.toml").write_text(
        f'{version}\nimports = ["../config.toml"]\n[proxy_plugins.one]\ntype = "snapshot"\naddress = "/3"\n'
    )
    (folder / "conf.d" / "2.toml").write_text(
        f'{version}\noom_score = 0\n[grpc]\naddress = ""\nuid = 7\n[{cri}]\nsnapshotter = "two"\n'
    )
    (folder / "beside.toml").write_text(
        f'{version}\ndisabled_plugins = ["io.containerd.b.v1", "io.containerd.a.v1"]\nroot = ""\n'
    )
    return main


def test_what_an_import_does(tmp_path: Path) -> None:
    for release in (OLD, NEW):
        folder = tmp_path / str(release[0])
        folder.mkdir()
        config, problem = read_config(written(folder, release), told(release))
        assert problem == ""
        assert config["proxy_plugins"] == {
            "one": {"type": "snapshot", "address": "/3"},
            "two": {"type": "snapshot", "address": "/2"},
        }
        assert (config["root"], config["oom_score"], config["grpc"]) == ("/a", 5, {"address": "/run/a", "uid": 7})
        twice = ["io.containerd.a.v1"] if release < (2,) else []
        assert config["disabled_plugins"] == ["io.containerd.a.v1", "io.containerd.b.v1", *twice]
        kept = {"max_concurrent_downloads": 9, "disable_snapshot_annotations": False} if release == NEW else {}
        assert lookup(config, CRI[release]) == {"snapshotter": "two", **kept}
        assert "imports" not in config


@pytest.mark.parametrize("name", sorted(CONTAINERDS))
def test_containerd_itself_says_the_same(name: str, tmp_path: Path) -> None:
    program = str(CONTAINERDS[name])
    if CONTAINERDS[name] is None:
        pytest.skip(f"interop: no {name} containerd here")
    release = release_of_program(program)
    kind = OLD if release < (2,) else NEW
    main = written(tmp_path, kind)
    done = subprocess.run([program, "-c", main, "config", "dump"], capture_output=True, text=True, timeout=30, cwd="/")
    assert done.returncode == 0, done.stderr
    dump: dict[str, Any] = tomllib.loads(done.stdout)
    config, _ = read_config(main, told(release))
    for path in (("root",), ("oom_score",), ("disabled_plugins",), ("proxy_plugins", "one", "address"),
                 ("proxy_plugins", "two", "address"), (*CRI[kind], "snapshotter")):  # fmt: skip
        assert lookup(config, path) == lookup(dump, path), path
    grpc = dump.get("grpc") or dump["plugins"]["io.containerd.server.v1.grpc"]
    assert {key: grpc[key] for key in ("address", "uid")} == config["grpc"]
    assert "exports" not in dump["proxy_plugins"]["one"]
    said = lookup(config, (*CRI[kind], "disable_snapshot_annotations"))
    assert lookup(dump, (*CRI[kind], "disable_snapshot_annotations")) is (said is None)  # true by default


def test_patterns_without_a_folder(tmp_path: Path) -> None:
    here, there = tmp_path / "etc", tmp_path / "cwd"
    for folder, root in ((here, "/here"), (there, "/there")):
        (folder / "conf.d").mkdir(parents=True)
        (folder / "conf.d" / "1.toml").write_text(f'root = "{root}"\n')
    (here / "config.toml").write_text('imports = ["conf.d/*.toml"]\n')
    asked = []
    for release, root in (
        ((1, 6, 28), "/there"), ((1, 6, 29), "/here"), ((1, 7, 15), "/there"), (MIDDLE, "/here"), (NEW, "/here"),
        ((), "/here"),
    ):  # fmt: skip
        config, _ = read_config(here / "config.toml", told(release), str(there))
        assert config == {"root": root}, release
    read_config(here / "conf.d" / "1.toml", lambda: asked.append(1) or NEW)
    (here / "config.toml").write_text('imports = ["conf.d/1.toml"]\n')
    assert read_config(here / "config.toml", lambda: asked.append(1) or NEW) == ({"root": "/here"}, "")
    assert not asked  # all releases read these the same way


def test_imports_that_are_not_there_or_damaged(tmp_path: Path) -> None:
    main = tmp_path / "config.toml"
    assert "does not exist" in read_config(main)[1]
    main.write_text('imports = ["none.toml", "*.none"]\nroot = "/a"\n')
    assert read_config(main) == ({"root": "/a"}, f"{tmp_path}/none.toml does not exist")
    main.write_text('imports = ["*.toml"]\nroot = "/a"\nproxy_plugins = 3\n')
    (tmp_path / "x.toml").write_text("[broken")
    config, problem = read_config(main, told(NEW))
    assert config == {"root": "/a", "proxy_plugins": 3}
    assert problem.startswith(f"{tmp_path}/x.toml: ")


def test_releases(tmp_path: Path) -> None:
    assert release_of("containerd github.com/containerd/containerd/v2 v2.3.4 abc") == (2, 3, 4)
    assert release_of("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3") == OLD
    assert release_of_program("/bin/true") == release_of_program(str(tmp_path / "none")) == ()
