"""nydusify check and mount of every kind of image: upstream's fixtures in layouts, backends, archives; both ways."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nydusfs.convert import cmd_mount
from nydusfs.convert.bootstrap_layer import write_bootstrap_layer
from nydusfs.convert.check import can_mount
from nydusfs.registry import mediatypes as mt
from tests.lab.images import ImageLayout, entry
from tests.lab.nydusify import nydusify, upstream_nydusify
from tests.lab.objects import object_server
from tests.lab.paths import ref_bin, shared_dir
from tests.lab.process import mounts_below
from tests.lab.stack import program

HOWS = [pytest.param("--mount", marks=pytest.mark.root), "--no-mount"]


def fixtures() -> Path:
    shared = shared_dir()
    if shared is None:
        pytest.skip("interop: no reference fixtures here")
    return shared / "fixtures" / "reference"


def check(target: object, work: Path, *flags: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return nydusify("check", "--target", str(target), "--work-dir", work / "output", *flags, **options)


def needs_root(how: str) -> None:
    if how == "--mount" and not can_mount():
        pytest.skip("root: needs root and /dev/fuse")


@pytest.mark.interop
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", ["v5", "v6", "index", "zran"])
def test_images_of_upstream(tmp_path: Path, name: str, how: str) -> None:
    """As layouts on this machine; `index` is merged and batched, `zran` refers to the plain layers."""
    needs_root(how)
    oci = fixtures() / "oci"
    layout = oci / name
    if name == "zran":
        layout = tmp_path / "zran"
        shutil.copytree(oci / "zran", layout)
        alone = check(f"oci:{layout}", tmp_path, check=False)
        assert alone.returncode == 1
        assert "refers to, does not exist in" in alone.stdout
        shutil.copytree(oci / "oci" / "blobs", layout / "blobs", dirs_exist_ok=True)
    more = ["--multi-platform"] if name == "index" else []
    done = check(f"oci:{layout}", tmp_path, "--source", f"oci:{oci / 'oci'}", how, *more)
    assert "compared 31 entries" in done.stderr
    assert not mounts_below(tmp_path)
    left = {str(path.relative_to(tmp_path / "output")) for path in (tmp_path / "output").rglob("*") if path.is_file()}
    wanted = {f"source/oci_{one}.json" for one in ("manifest", "config")}
    wanted |= {f"target/nydus_{one}.json" for one in ("manifest", "config", "output")}
    wanted |= {"target/nydus_bootstrap/image/image.boot"}
    if name == "index":
        wanted |= {f"target/{one}.json" for one in ("oci_index", "nydus_index", "oci_manifest", "oci_config")}
    assert {one for one in left if not one.endswith((".blob.meta", "nydusd.log"))} == wanted
    output = json.loads((tmp_path / "output/target/nydus_output.json").read_text())
    assert output["fs_version"] == ("5" if name == "v5" else "6")
    assert len(output["blobs"]) == 3


def bare_image(folder: Path, case: Path) -> Path:
    """A layout with the fixture's bootstrap layer alone, as images with a storage backend have it."""
    oci = fixtures() / "oci" / "oci"
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def read(digest: str) -> dict[str, Any]:
        return json.loads((oci / "blobs" / "sha256" / digest[7:]).read_text())  # type: ignore[no-any-return]

    def put(document: dict[str, Any]) -> dict[str, Any]:
        body = json.dumps(document).encode()
        digest = hashlib.sha256(body).hexdigest()
        (blobs / digest).write_bytes(body)
        return {"digest": f"sha256:{digest}", "size": len(body)}

    packed = write_bootstrap_layer(case / "image.boot", [], folder / "layer")
    packed.path.rename(blobs / packed.digest[7:])
    manifest = read(json.loads((oci / "index.json").read_text())["manifests"][0]["digest"])
    config = read(manifest["config"]["digest"])
    config["rootfs"]["diff_ids"] = [packed.diff_id]
    manifest["config"].update(put(config))
    version = str(json.loads((case / "manifest.json").read_text())["fs_version"])
    notes = {mt.ANNOTATION_BOOTSTRAP: "true", mt.ANNOTATION_FS_VERSION: version}
    manifest["layers"] = [
        {"mediaType": mt.OCI_LAYER_GZIP, "digest": packed.digest, "size": packed.size, "annotations": notes}
    ]
    top = {"mediaType": manifest["mediaType"], **put(manifest)}
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return folder


@pytest.mark.interop
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", ["v5-merged3", "v6-merged3-encrypt-batch", "v6-zran-merged3"])
def test_images_with_blobs_in_a_directory(tmp_path: Path, name: str, how: str) -> None:
    needs_root(how)
    case = fixtures() / name
    layout = bare_image(tmp_path / "image", case)
    backend = ["--target-backend-type", "localfs", "--target-backend-config", json.dumps({"dir": str(case)})]
    done = check(f"oci:{layout}", tmp_path, "--source", f"oci:{fixtures() / 'oci' / 'oci'}", how, *backend)
    assert "compared 31 entries" in done.stderr
    assert not mounts_below(tmp_path)


@pytest.mark.interop
def test_an_image_with_blobs_in_a_bucket(tmp_path: Path) -> None:
    case = fixtures() / "v6-merged3"
    layout = bare_image(tmp_path / "image", case)
    source = f"oci:{fixtures() / 'oci' / 'oci'}"
    with object_server("s3") as store:
        store.objects.update({f"blobs/{path.name}": path.read_bytes() for path in case.glob("?" * 64)})
        config = tmp_path / "backend.json"
        config.write_text(json.dumps(store.config(object_prefix="blobs/")))
        backend = ["--target-backend-type", "s3", "--target-backend-config-file", config]
        assert (
            "compared 31 entries" in check(f"oci:{layout}", tmp_path, "--source", source, "--no-mount", *backend).stderr
        )
        store.objects.clear()
        done = check(f"oci:{layout}", tmp_path, "--source", source, "--no-mount", *backend, check=False)
        assert done.returncode == 1
        assert "cannot be read in the target" in done.stdout


@pytest.mark.interop
@pytest.mark.root
def test_through_upstreams_nydusd(tmp_path: Path) -> None:
    needs_root("--mount")
    theirs = ref_bin("nydusd")
    if theirs is None:
        pytest.skip("interop: no reference programs here")
    wrapper = tmp_path / "nydusd"
    wrapper.write_text(f'#!/bin/sh\nexec {theirs} --rlimit-nofile 0 "$@"\n')
    wrapper.chmod(0o755)
    oci = fixtures() / "oci"
    done = check(f"oci:{oci / 'v6'}", tmp_path, "--source", f"oci:{oci / 'oci'}", "--nydusd", wrapper)
    assert "mounting image" in done.stderr
    assert "compared 31 entries" in done.stderr


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A plain layout and its conversion in an archive, both made here."""
    work = tmp_path_factory.mktemp("pair")
    layout = ImageLayout(work / "plain")
    lower = layout.add_layer([
        entry("etc", mode=0o750, uid=7), entry("etc/a", "1"), entry("etc/b", "2"), entry("gone"), entry("gone/x", "x"),
        entry("hard", "h" * 5000, mode=0o4755), entry("opaque"), entry("opaque/x", "x"), entry("kind", "file"),
    ])  # fmt: skip
    upper = layout.add_layer([
        entry("etc/c", "3"), entry("etc/.wh.a", ""), entry(".wh.gone", ""), entry("opaque"),
        entry("opaque/.wh..wh..opq", ""), entry("opaque/y", "y"), entry("kind"), entry("kind/now", "dir"),
        entry("again", "a", xattrs={"user.x": "1"}), entry("link", link="/opaque/../etc"),
        entry("link/inside", "in etc"),
    ])  # fmt: skip
    layout.finish([lower, upper], cmd=["x"])
    nydusify(
        "convert", "--source", f"oci:{layout.directory}", "--target", f"oci-archive:{work / 'nydus.tar'}",
        "--work-dir", work / "w",
    )  # fmt: skip
    return layout.directory, work / "nydus.tar"


@pytest.mark.parametrize("how", HOWS)
def test_whiteouts_and_implied_directories_either_way(pair: tuple[Path, Path], tmp_path: Path, how: str) -> None:
    """The upper layer only implies `etc`: it looks as it does below. The way to one file leads through a link."""
    needs_root(how)
    plain, archive = pair
    done = check(archive, tmp_path, "--source", f"oci:{plain}", how)
    assert "compared 11 entries" in done.stderr
    back = check(f"oci:{plain}", tmp_path, "--source", archive, how)
    assert "compared 11 entries" in back.stderr


@pytest.mark.root
def test_mount_of_an_archive_until_a_signal(pair: tuple[Path, Path], tmp_path: Path) -> None:
    needs_root("--mount")
    where = tmp_path / "mnt"
    flags = ["--target", f"file://{pair[1]}", "--mount-path", where, "--work-dir", tmp_path / "w"]
    process = subprocess.Popen([program("nydusify"), "view", *flags], stderr=subprocess.PIPE, text=True)
    said = ""
    try:
        assert process.stderr is not None
        while "is mounted at" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        assert (where / "etc" / "c").read_text() == "3"
    finally:
        process.send_signal(signal.SIGINT)
        said += process.communicate(timeout=40)[1]
    assert process.returncode == 0, said
    assert not mounts_below(tmp_path)
    assert not where.exists() and not (tmp_path / "w").exists()


def test_a_signal_right_after_the_announcement_ends_a_mount_well(monkeypatch: Any) -> None:
    def announce(text: str, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cmd_mount.click, "echo", announce)
    with subprocess.Popen(["sleep", "30"]) as daemon:
        try:
            cmd_mount._block(daemon, "it is mounted")
        finally:
            daemon.kill()


def test_without_privileges_nothing_is_mounted(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert not can_mount()
    from click.testing import CliRunner

    from nydusfs.convert.cli import cli

    flags = ["check", "--target", str(pair[1]), "--source", f"oci:{pair[0]}", "--work-dir", str(tmp_path / "o")]
    done = CliRunner().invoke(cli, flags)
    assert done.exit_code == 0, done.output
    assert "mounting" not in done.stderr
    done = CliRunner().invoke(cli, [*flags, "--mount"])
    assert done.exit_code == 1
    assert "--no-mount" in str(done.exception)


@pytest.mark.interop
def test_drivable_as_upstreams(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The flags of upstream's help are all there, command by command."""
    for name in ("check", "mount", "view", "copy", "build", "pack", "optimize", "commit", "chunkdict generate"):
        theirs = upstream_nydusify(tmp_path, *name.split(), "--help").stdout
        ours = nydusify(*name.split(), "--help").stdout
        for line in theirs.splitlines():
            for word in line.replace(",", " ").split():
                if word.startswith("--"):
                    assert word in ours, f"{name} {word}"


def test_everything_from_the_environment(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """As upstream's: the flag's name in capitals, one name for all backends, lists with commas."""
    env = {"TARGET": str(pair[1]), "SOURCE": f"oci:{pair[0]}", "WORK_DIR": str(tmp_path / "o")}
    assert "compared 11 entries" in nydusify("check", "--no-mount", env=env).stderr
    bad = nydusify("check", "--no-mount", env={**env, "BACKEND_TYPE": "nfs"}, check=False)
    assert "--target-backend-type 'nfs' is not one of" in bad.stderr
    env = {"CONTAINER": "c", "TARGET": "x:1", "WITH_PATH": "/a,relative", "CONTAINERD_ADDR": "/nowhere"}
    assert "'relative': give an absolute path" in nydusify("commit", env=env, check=False).stderr
    env["WITH_PATH"] = "/a,!/b"
    assert "/nowhere" in nydusify("commit", env=env, check=False).stderr or os.geteuid() != 0
