"""Our nydusd and upstream's serve images that refer to layers as they are, some of which its builder fails on."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bootstrap.estargz import layer_bootstrap
from bootstrap.merge import MergeSource, merge_layers
from tests.lab.daemon import Nydusd, can_mount_fuse, localfs_config
from tests.lab.estargz import digest, file, write_estargz
from tests.lab.paths import ref_bin
from tests.unit.test_reference_layers import content, pack, tar_pieces

NYDUSD, NYDUS_IMAGE = ref_bin("nydusd"), ref_bin("nydus-image")
pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse()),
]
needs_upstream = [
    pytest.mark.interop,
    pytest.mark.skipif(NYDUSD is None or NYDUS_IMAGE is None, reason="interop: the reference programs are not here"),
]

FILES = {f"d/f{i}": content(i, size) for i, size in enumerate([10, 70_000, 1_300_000, 400, 900_000])}
UPPER = {"d/f1": b"other", "d/.wh.f3": b"", "new": random.Random(5).randbytes(5000)}
MERGED = {name: data for name, data in FILES.items() if name != "d/f3"} | {"d/f1": b"other", "new": UPPER["new"]}


OURS = [("fuse", "ours"), ("erofs", "ours")]


def nydusds(*kinds: object) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("fs_driver", "nydusd"), kinds, indirect=True)


every = nydusds(*OURS, pytest.param("fuse", "upstream", marks=needs_upstream))


@pytest.fixture(scope="module")
def nydusd(request: pytest.FixtureRequest, fs_driver: str) -> Iterator[Nydusd]:
    with Nydusd(binary=None if request.param == "ours" else NYDUSD) as daemon:
        yield daemon


def nydus_image(*arguments: str | Path) -> None:
    command = [sys.executable, "-c", "from bootstrap.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr


def serve(daemon: Nydusd, boot: Path, blobs: Path, expected: dict[str, bytes]) -> None:
    """The bootstrap passes the check of the daemon's side, the daemon shows these files."""
    if daemon.binary is None:
        nydus_image("check", "-l", "warn", boot)
    else:
        check = [str(NYDUS_IMAGE), "check", "-l", "warn", str(boot)]
        done = subprocess.run(check, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout
    at = "/" + boot.stem
    work = daemon.dir / "cache" / boot.stem
    work.mkdir(parents=True)
    assert daemon.mount(at, boot, localfs_config(blobs, config_id=at, work_dir=work)).status == 204
    try:
        seen = subprocess.run(
            ["find", "-type", "f", "-exec", "sha256sum", "{}", "+"],
            cwd=daemon.mnt / boot.stem, capture_output=True, text=True, timeout=60, check=True,
        ).stdout  # fmt: skip
    finally:
        assert daemon.umount(at).status == 204
    found = {line[66:].removeprefix("./"): line[:64] for line in seen.splitlines()}
    assert found == {name: hashlib.sha256(data).hexdigest() for name, data in expected.items()}


@every
@pytest.mark.parametrize("kind", ["one member", "members of 50 kB", "a member per piece", "flushed", "plain tar"])
def test_a_layer_as_it_is(nydusd: Nydusd, tmp_path: Path, kind: str) -> None:
    layer = pack(kind, tar_pieces(FILES))
    (tmp_path / hashlib.sha256(layer).hexdigest()).write_bytes(layer)
    source = tmp_path / "layer"
    source.write_bytes(layer)
    boot = tmp_path / f"{kind.replace(' ', '-')}.boot"
    nydus_image("create", "-l", "warn", "-t", "targz-ref", "--chunk-size", "0x8000", "-B", boot, "-D", tmp_path, source)
    serve(nydusd, boot, tmp_path, FILES)


@every
def test_layers_of_an_image(nydusd: Nydusd, tmp_path: Path) -> None:
    """The way of nydusify --oci-ref: layer blobs with everything but the data, merged under the original names."""
    lists: dict[str, list[str]] = {"--blob-digests": [], "--original-blob-ids": [], "--blob-sizes": []}
    boots: list[Path] = []
    for number, files in enumerate((FILES, UPPER)):
        layer = pack("one member", tar_pieces(files))
        original = hashlib.sha256(layer).hexdigest()
        (tmp_path / original).write_bytes(layer)
        made = tmp_path / f"blob-{number}"
        inline = ["--blob-inline-meta", "--features", "blob-toc", "--whiteout-spec", "none"]
        nydus_image("create", "-l", "warn", "-t", "targz-ref", *inline, "-b", made, tmp_path / original)
        digest = hashlib.sha256(made.read_bytes()).hexdigest()
        boots.append(tmp_path / "boots" / original)
        boots[-1].parent.mkdir(exist_ok=True)
        boots[-1].symlink_to(made.rename(tmp_path / digest))
        for name, value in zip(lists, (digest, original, str((tmp_path / digest).stat().st_size)), strict=True):
            lists[name].append(value)
    options = [part for name, values in lists.items() for part in (name, ",".join(values))]
    boot = tmp_path / "merged.boot"
    nydus_image("merge", "-l", "warn", "-B", boot, *options, *boots)
    serve(nydusd, boot, tmp_path, MERGED)


@every
def test_estargz_by_its_table(nydusd: Nydusd, tmp_path: Path) -> None:
    layer, text = write_estargz([file(name, data) for name, data in FILES.items()], 0x10000)
    name = hashlib.sha256(layer).hexdigest()
    (tmp_path / name).write_bytes(layer)
    table = tmp_path / "stargz.index.json"
    table.write_bytes(text)
    boot, report = tmp_path / "toc.boot", tmp_path / "report.json"
    options = ["--blob-id", name, "--blob-data-size", f"{len(layer):x}", "--chunk-size", "0x10000", "-J", report]
    nydus_image("create", "-l", "warn", "-t", "estargztoc-ref", *options, "-B", boot, "-D", tmp_path, table)
    assert json.loads(report.read_text())["blobs"] == [name]
    serve(nydusd, boot, tmp_path, FILES)


@nydusds(*OURS)
def test_estargz_that_nobody_converted(nydusd: Nydusd, tmp_path: Path) -> None:
    """Two layers as a registry has them: bootstraps from their tables, one image; chunks come with their digests."""
    sources = []
    for files in (FILES, UPPER):
        layer, text = write_estargz([file(name, data) for name, data in files.items()], 0x10000)
        name = hashlib.sha256(layer).hexdigest()
        (tmp_path / name).write_bytes(layer)
        boot = tmp_path / f"{name}.boot"
        with (tmp_path / name).open("rb") as stored:
            boot.write_bytes(
                layer_bootstrap(
                    lambda offset, size, stored=stored: os.pread(stored.fileno(), size, offset),
                    len(layer), name, chunk_size=0x10000, toc_digest=digest(text),
                )
            )  # fmt: skip
        sources.append(MergeSource(boot, original_blob_id=name))
    merge_layers(sources, tmp_path / "plain.boot")
    serve(nydusd, tmp_path / "plain.boot", tmp_path, MERGED)
    with (tmp_path / name).open("r+b") as stored:  # and a wrong byte is found out
        stored.seek(len(layer) // 3)
        stored.write(b"\xff\xff\xff")
    merge_layers(sources[1:], tmp_path / "damaged.boot")
    with pytest.raises(subprocess.CalledProcessError):
        serve(nydusd, tmp_path / "damaged.boot", tmp_path, UPPER)
