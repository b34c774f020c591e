"""nydusify optimize: a list of files becomes a blob that is fetched first, in our stack and upstream's."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nydusfs.convert.check import can_mount
from nydusfs.convert.nydusd import find_nydusd, mounted
from nydusfs.registry import mediatypes as mt
from nydusfs.registry.client import RegistryClient
from tests.lab.images import ImageLayout, entry, fetch_manifest
from tests.lab.nydusify import nydusify, upstream_nydusify
from tests.lab.paths import shared_dir
from tests.lab.process import wait_until
from tests.lab.registry import Registry, find_program

pytestmark = pytest.mark.skipif(find_program() is None, reason="docker-registry is not installed")

PLAIN = 3 << 20


def noise(seed: str, size: int) -> bytes:
    return hashlib.shake_128(seed.encode()).digest(size)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="module", params=["5", "6"])
def name(request: pytest.FixtureRequest, registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> str:
    """lab/vN:plain and :nydus; 6 MiB of cold data in two layers around 300 KiB that are hot."""
    layout = ImageLayout(tmp_path_factory.mktemp("image"))
    layers = [
        layout.add_layer([
            entry("cold", noise("cold", PLAIN)), entry("hot"), entry("hot/a", noise("a", 150_000)),
            entry("hot/link", kind=tarfile.LNKTYPE, link="hot/a", mode=0o644), entry("hot/empty", ""),
        ]),
        layout.add_layer([entry("colder", noise("colder", PLAIN)), entry("bin"), entry("bin/b", noise("b", 150_000))]),
    ]  # fmt: skip
    where = f"{registry.host}/lab/v{request.param}"
    layout.finish(layers, cmd=["x"]).push(registry.host, f"lab/v{request.param}", "plain")
    nydusify(
        "convert", "--source", f"{where}:plain", "--target", f"{where}:nydus", "--fs-version", request.param,
        "--chunk-size", "0x10000", "--work-dir", tmp_path_factory.mktemp("convert"),
    )  # fmt: skip
    return where


def optimize(source: str, target: str, files: Path, work: Path, *flags: str, **options: Any) -> Any:
    done = nydusify(
        "optimize", "--source", source, "--target", target, "--prefetch-files", files, "--work-dir", work / "work",
        *flags, **options,
    )  # fmt: skip
    assert not (work / "work").exists()
    return done


def test_hot_files_move_into_a_blob_that_comes_first(registry: Registry, name: str, tmp_path: Path) -> None:
    files = tmp_path / "list"
    files.write_text("/bin/b\n/hot\n/nothing\n")
    repository = name.partition("/")[2]
    other = repository.replace("lab", "fast")
    target = f"{registry.host}/{other}:1"
    mark = registry.mark()
    done = optimize(f"{name}:nydus", target, files, tmp_path)
    assert "has no /nothing: it is left out" in done.stderr
    traffic = registry.since(mark)
    assert 300_000 < traffic.blobs().bytes < 1_000_000, "the cold data is not fetched"

    _, base = fetch_manifest(registry.host, repository, "nydus")
    _, made = fetch_manifest(registry.host, other, "1")
    assert made["layers"][:-2] == base["layers"][:-1]
    blob, boot = made["layers"][-2:]
    assert blob["mediaType"] == mt.NYDUS_BLOB
    assert blob["annotations"] == {mt.ANNOTATION_BLOB: "true"}
    assert boot["annotations"][mt.ANNOTATION_PREFETCH_BLOB] == blob["digest"].removeprefix("sha256:")
    with RegistryClient(registry.host) as client:
        config = json.loads(client.blob(other, made["config"]["digest"], 1 << 20))
    assert len(config["rootfs"]["diff_ids"]) == 4 == len(config["history"])

    for how in ["--no-mount", *(["--mount"] if can_mount() else [])]:
        nydusify("check", "--source", f"{name}:plain", "--target", target, how, "--work-dir", tmp_path / "output")
    if can_mount():
        _prefetched(registry, other, blob["digest"], tmp_path)
    files.write_text(json.dumps({"version": "v1", "files": [{"path": "/cold", "ranges": [[0, 70_000]]}]}))
    again = optimize(target, f"{registry.host}/{other}:2", files, tmp_path)
    assert "2 chunks" in again.stderr
    nydusify("check", "--source", f"{name}:plain", "--target", f"{registry.host}/{other}:2", "--no-mount",
             "--work-dir", tmp_path / "output")  # fmt: skip


def _prefetched(registry: Registry, repository: str, digest: str, work: Path) -> None:
    """nydusd fetches the blob before anybody reads."""
    (work / "cache").mkdir()
    config = {
        "device": {
            "backend": {"type": "registry", "config": {"scheme": "http", "host": registry.host, "repo": repository}},
            "cache": {"type": "blobcache", "config": {"work_dir": str(work / "cache")}},
        },
        "mode": "direct",
        "fs_prefetch": {"enable": True, "threads_count": 2, "prefetch_all": False},
    }
    boot = work / "output" / "target" / "nydus_bootstrap" / "image" / "image.boot"
    mark = registry.mark()

    def fetched(hot: bool) -> int:
        return sum(one.size for one in registry.since(mark).blobs().requests if (digest in one.path) == hot)

    with mounted(find_nydusd("nydusd"), boot, config, work / "mnt", work):
        wait_until(lambda: fetched(True) >= 300_000, 30, "prefetch")
    assert fetched(False) < 50_000, "of other blobs only tables"


def test_a_list_that_can_be_read_once(tmp_path: Path) -> None:
    """A shell's <(command): the image keeps the list beside its bootstrap all the same."""
    layout = ImageLayout(tmp_path / "image")
    layout.finish([layout.add_layer([entry("hot", noise("a", 50_000)), entry("cold", noise("b", 50_000))])], cmd=["x"])
    source, target = f"oci:{tmp_path / 'nydus'}", tmp_path / "made"
    nydusify("convert", "--source", f"oci:{tmp_path / 'image'}", "--target", source, "--work-dir", tmp_path / "convert")
    files = tmp_path / "list"
    os.mkfifo(files)
    writer = threading.Thread(target=files.write_bytes, args=(b"/hot\n",), daemon=True)
    writer.start()
    optimize(source, f"oci:{target}", files, tmp_path)
    writer.join(10)
    blobs = target / "blobs" / "sha256"
    index = json.loads((target / "index.json").read_bytes())
    manifest = json.loads((blobs / index["manifests"][0]["digest"].removeprefix("sha256:")).read_bytes())
    with tarfile.open(blobs / manifest["layers"][-1]["digest"].removeprefix("sha256:")) as layer:
        kept = layer.extractfile("image/prefetch.files")
        assert kept is not None and kept.read() == b"/hot\n"


@pytest.mark.interop
@pytest.mark.parametrize("form", ["index", "zran"])
def test_batched_and_reference_images_of_upstream(tmp_path: Path, form: str) -> None:
    shared = shared_dir()
    if shared is None:
        pytest.skip("interop: no reference fixtures here")
    oci = shared / "fixtures" / "reference" / "oci"
    source = tmp_path / "source"
    shutil.copytree(oci / form, source)
    shutil.copytree(oci / "oci" / "blobs", source / "blobs", dirs_exist_ok=True)
    files = tmp_path / "list"
    files.write_text("/etc\n/big1\n")
    target = f"oci:{tmp_path / 'made'}"
    optimize(f"oci:{source}", target, files, tmp_path)
    done = nydusify(
        "check", "--source", f"oci:{oci / 'oci'}", "--target", target, "--no-mount", "--work-dir", tmp_path / "output"
    )
    assert "compared 31 entries" in done.stderr


@pytest.mark.interop
def test_upstream_takes_it(registry: Registry, name: str, tmp_path: Path) -> None:
    """Its nydusd serves what ours made (its own v6 ones cannot be opened)."""
    files = tmp_path / "list"
    files.write_text("/bin/b\n/hot/a\n")
    target = f"{name}:for-upstream"
    optimize(f"{name}:nydus", target, files, tmp_path)
    done = upstream_nydusify(
        tmp_path, "check", "--source", f"{name}:plain", "--target", target, "--source-insecure", "--target-insecure",
        "--work-dir", tmp_path / "up",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_wrong_use_is_one_clear_line(registry: Registry, name: str, tmp_path: Path) -> None:
    good, bad, none = tmp_path / "good", tmp_path / "bad", tmp_path / "none"
    good.write_text("/hot/a\n")
    bad.write_text("hot/a\n")
    none.write_text("/hot/empty\n")
    target = f"{name}:never"
    for source, files, more, code, said in (
        (f"{name}:nydus", tmp_path / "missing", [], 1, "missing: No such file"),
        (f"{name}:nydus", bad, [], 1, "is not an absolute path"),
        (f"{name}:nydus", none, [], 1, "nothing to optimize"),
        (f"{name}:plain", good, [], 1, "is not a Nydus image"),
        (f"{name}:nydus", good, ["--policy", "other"], 2, "'other' is not"),
    ):
        done = optimize(source, target, files, tmp_path, *more, check=False)
        assert done.returncode == code, done.stderr
        assert said in done.stderr
    with pytest.raises(OSError, match="404"):
        fetch_manifest(registry.host, name.partition("/")[2], "never")
