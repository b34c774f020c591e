"""nydusify build (pack): directories as images in a backend, served by nydusd, compared with the directories."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bootstrap.reader import open_bootstrap
from nydusfs.convert.check import can_mount
from nydusfs.convert.compare import compare
from nydusfs.convert.nydusd import find_nydusd, mounted
from nydusfs.convert.pack import PackOptions, pack
from nydusfs.convert.progress import Progress
from nydusfs.convert.readerview import reader_view
from nydusfs.convert.views import MountView
from nydusfs.errors import ConvertError
from tests.lab.nydusify import nydusify
from tests.lab.objects import object_server
from tests.lab.paths import ref_bin


def noise(seed: str, size: int = 200_000) -> bytes:
    return hashlib.shake_128(seed.encode()).digest(size)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    (top / "etc").mkdir(parents=True)
    (top / "etc" / "conf").write_text("one")
    (top / "big").write_bytes(noise("big"))
    (top / "link").symlink_to("etc/conf")
    os.link(top / "big", top / "hard")
    (top / "empty").touch()
    (top / "gone").write_bytes(noise("gone"))
    return top


def build(tree: Path, out: Path, *flags: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return nydusify("build", "--source-dir", tree, "--name", "app", "-o", out, *flags, **options)


def config(backend: dict[str, Any], kind: str, cache: Path) -> dict[str, Any]:
    cache.mkdir(exist_ok=True)
    return {
        "device": {
            "backend": {"type": kind, "config": backend},
            "cache": {"type": "blobcache", "config": {"work_dir": str(cache)}},
        },
        "mode": "direct",
        "enable_xattr": True,
    }


@contextmanager
def served(meta: Path, settings: dict[str, Any], work: Path) -> Iterator[Any]:
    """By nydusd where that is possible, else by our reader."""
    if can_mount():
        with mounted(find_nydusd("nydusd"), meta, settings, work / "mnt", work):
            yield MountView(work / "mnt")
    else:
        with reader_view(meta, settings, "built") as view:
            yield view


def ids(meta: Path) -> list[str]:
    with open_bootstrap(str(meta)) as image:
        return [blob.id for blob in image.blobs]


@pytest.mark.parametrize(("version", "compressor"), [("5", "lz4_block"), ("6", "zstd")])
def test_a_directory_in_a_folder_served_by_nydusd(tree: Path, tmp_path: Path, version: str, compressor: str) -> None:
    store, out = tmp_path / "store", tmp_path / "out"
    backend = ["--backend-type", "localfs", "--backend-config", json.dumps({"dir": str(store)})]
    more = ["--fs-version", version, "--compressor", compressor, "--chunk-size", "0x10000"]
    done = build(tree, out, "--backend-push", *backend, *more)
    assert "successfully built Nydus image" in done.stderr
    blob = ids(out / "app.meta")[0]
    assert {path.name for path in store.iterdir()} == {blob, "app.meta"}
    assert json.loads((out / "output.json").read_text())["blobs"] == [blob]
    with served(store / "app.meta", config({"dir": str(store)}, "localfs", tmp_path / "cache"), tmp_path) as view:
        found = compare(MountView(tree), view)
    assert found.differences == []
    assert found.entries == 7


def test_on_a_parent_and_with_a_dictionary(tree: Path, tmp_path: Path) -> None:
    """The new blob holds only what neither has; whiteouts act on the parent."""
    out = tmp_path / "out"
    build(tree, out)
    assert (out / "app.blob").exists()
    base = ids(out / "app.meta")[0]
    (out / "app.blob").rename(out / base)
    upper = tmp_path / "upper"
    (upper / "etc").mkdir(parents=True)
    (upper / "again").write_bytes(noise("big"))
    (upper / ".wh.gone").touch()
    (upper / "etc" / "fresh").write_bytes(noise("fresh", 5000))
    done = nydusify(
        "pack", "--target-dir", upper, "--meta", "layered.boot", "-o", out, "--parent-bootstrap", out / "app.meta"
    )
    both = ids(out / "layered.boot")
    assert both[0] == base and len(both) == 2
    assert repr(str(out / both[1])) in done.stderr
    assert (out / both[1]).stat().st_size < 10_000
    done = nydusify(
        "build", "--source-dir", tree, "--name", "same", "-o", out, "--chunk-dict", f"bootstrap={out / 'app.meta'}"
    )
    assert "no data that is not there already" in done.stderr
    assert ids(out / "same.meta") == [base]
    settings = config({"dir": str(out)}, "localfs", tmp_path / "cache")
    with reader_view(out / "layered.boot", settings, "layered") as view:
        top = view.children(view.root())
        assert set(top) == {b"again", b"big", b"hard", b"empty", b"etc", b"link"}
        assert view.digest(top[b"again"]) == hashlib.sha256(noise("big")).hexdigest()
        assert set(view.children(top[b"etc"])) == {b"conf", b"fresh"}


@pytest.mark.parametrize("kind", ["oss", "s3"])
def test_into_a_bucket_and_compacted_later(tmp_path: Path, kind: str) -> None:
    """Four generations of a directory, of which each replaces most of the one before; then fewer blobs."""
    out = tmp_path / "out"
    tree = tmp_path / "tree"
    tree.mkdir()
    with object_server(kind) as store:
        settings = tmp_path / "backend.json"
        settings.write_text(json.dumps(store.config(blob_prefix="data/", meta_prefix="boot/")))
        backend = ["--backend-type", kind, "--backend-config-file", settings]
        parent: list[str | Path] = []
        for number in range(4):
            for name in ("a", "b"):
                (tree / name).write_bytes(noise(f"{name}{number}", 50_000))
            (tree / f"kept{number}").write_bytes(noise(f"kept{number}", 20_000))
            nydusify(
                "build", "--source-dir", tree, "--name", f"v{number}", "-o", out, "--backend-push", *backend, *parent
            )
            parent = ["--parent-bootstrap", out / f"v{number}.meta"]
        assert len(ids(out / "v3.meta")) == 4
        assert sorted(key for key in store.objects if key.startswith("boot/")) == [f"boot/v{n}.meta" for n in range(4)]
        for path in out.glob("?" * 64):
            path.unlink()  # another machine
        limits = tmp_path / "compact.json"
        limits.write_text(json.dumps({"min_used_ratio": "50", "CompactBlobSize": 1000000, "layers_to_compact": 2}))
        (tree / "last").write_bytes(noise("last", 1000))
        done = nydusify(
            "build", "--source-dir", tree, "--name", "v4", "-o", out, "--backend-push", *backend, *parent,
            "--compact", "--compact-config-file", limits,
        )  # fmt: skip
        assert "compacted parent" in done.stderr
        final = ids(out / "v4.meta")
        assert len(final) < 5
        assert {f"data/{blob}" for blob in final} <= set(store.objects)
        reading = config(store.config(object_prefix="data/"), kind, tmp_path / "cache")
        with reader_view(out / "v4.meta", reading, "v4") as view:
            found = compare(MountView(tree), view)
        assert found.differences == []
        del store.objects[f"data/{final[0]}"]
        (out / final[0]).unlink(missing_ok=True)
        done = build(tree, out, "--backend-push", *backend, "--parent-bootstrap", out / "v4.meta", check=False)
        assert done.returncode == 1
        assert f"blob {final[0]} of the parent is neither in" in done.stderr


@pytest.mark.interop
def test_the_same_image_as_upstreams(tree: Path, tmp_path: Path) -> None:
    """The same files, the same bytes of data; upstream's check accepts ours."""
    builder = ref_bin("nydus-image")
    if builder is None:
        pytest.skip("interop: no reference programs here")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    theirs.mkdir()
    nydusify(
        "build", "--source-dir", tree, "--name", "app", "--compressor", "none", "--chunk-size", "0x10000", "-o", ours
    )
    # upstream's nydusify 2.4.4 calls this without the type, which its own nydus-image refuses
    command = ["create", "-t", "dir-rafs", "--blob", theirs / "app.blob", "-B", theirs / "app.meta", "--compressor",
               "none", "--chunk-size", "0x10000", "-J", theirs / "output.json", tree]  # fmt: skip
    subprocess.run([builder, *command], check=True, timeout=60, capture_output=True)
    assert {path.name for path in ours.iterdir()} == {"app.blob", "app.meta", "output.json"}
    assert (ours / "app.blob").read_bytes() == (theirs / "app.blob").read_bytes()
    checked = subprocess.run([builder, "check", "-B", ours / "app.meta"], capture_output=True, timeout=60)
    assert checked.returncode == 0, checked.stderr


def test_a_failed_build_leaves_the_image_of_an_earlier_one(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(PackOptions(tree, "app", out), Progress())
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (tree / "more").write_text("changed")
    with pytest.raises(ConvertError, match="chunk size"):
        pack(PackOptions(tree, "app", out, chunk_size=0x10000, chunk_dict=out / "app.meta"), Progress())
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_wrong_use_is_one_clear_line(tree: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"min_used": 5}')
    backend = ["--backend-type", "localfs", "--backend-config", '{"dir": "/nowhere"}']
    for flags, code, said in (
        (["--name", "x"], 2, "--source-dir is required"),
        (["--source-dir", tree / "empty", "--name", "x"], 1, "is not a directory"),
        (["--source-dir", tree, "--name", "a/b"], 2, "is a path"),
        (["--source-dir", tree, "--name", "x", "--backend-push"], 1, "needs --backend-config"),
        (["--source-dir", tree, "--name", "x", "--compact"], 2, "needs --parent-bootstrap"),
        (["--source-dir", tree, "--name", "x", "--chunk-size", "0x3000"], 2, "power of two"),
        (["--source-dir", tree, "--name", "x", "--chunk-dict", "db=x"], 1, "is not bootstrap=PATH"),
        (["--source-dir", tree, "--name", "x", "--parent-bootstrap", tree / "big"], 1, "building x"),
        (["--source-dir", tree, "--name", "x", "--parent-bootstrap", tree / "big", "--compact", *backend,
          "--compact-config-file", bad], 1, "min_used: is unknown"),
    ):  # fmt: skip
        done = nydusify("build", *flags, "-o", tmp_path / "o", check=False)
        assert done.returncode == code, done.stderr
        assert said in done.stderr
        assert len(done.stderr.strip().splitlines()) <= 4
