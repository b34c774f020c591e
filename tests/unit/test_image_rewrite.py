"""nydus-image compact and optimize: data moves, trees and contents do not."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bootstrap.base import Blob
from bootstrap.blobsource import open_blobs
from bootstrap.cli import main
from bootstrap.compact import CompactOptions, Usage, plan
from bootstrap.flat import Ints
from bootstrap.layout.common import BlobFeatures, Compressor, Digester
from bootstrap.merge import MergeSource, merge_layers
from bootstrap.options import BuildOptions
from bootstrap.reader import open_bootstrap
from bootstrap.unpack import unpack
from tests.lab.paths import ref_bin, shared_dir
from tests.lab.tiny import noise, tiny_image

REFERENCE = (shared_dir() or Path("/nonexistent")) / "fixtures" / "reference"


def ours(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def content(boot: Path, blobs: Path) -> bytes:
    """Tree and data of an image in one: its tar."""
    out = io.BytesIO()
    with open_bootstrap(boot) as image, open_blobs(image, blobs) as data:
        unpack(data, out)
    return out.getvalue()


def upstream_accepts(boot: Path) -> None:
    program = ref_bin("nydus-image")
    if program is not None:
        done = subprocess.run([str(program), "check", str(boot)], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0 and "is valid" in done.stdout, done.stderr


def layers(folder: Path, version: int, *trees: dict[str, bytes]) -> Path:
    """An image of these layers, lowest first, its blobs beside it."""
    sources = []
    for number, files in enumerate(trees):
        (folder / f"layer{number}").mkdir()
        options = BuildOptions(fs_version=version, chunk_size=0x2000)
        layer = tiny_image(folder / f"layer{number}", files, options)
        if layer.blob:
            (folder / layer.blob_id).write_bytes(layer.blob)
        sources.append(MergeSource(layer.bootstrap, layer.blob_id))
    merge_layers(sources, folder / "image.boot", prefetch=[b"/b", b"/keep"])
    return folder / "image.boot"


@pytest.mark.parametrize("version", [5, 6])
class TestCompact:
    def test_what_upper_layers_removed_goes(self, version: int, tmp_path: Path) -> None:
        boot = layers(
            tmp_path, version,
            {"gone": noise(90_000, 1), "keep": noise(9_000, 2), "text": b"a" * 30_000},
            {".wh.gone": b"", "b": noise(9_000, 2) + noise(20_000, 3)},
            {"c": noise(40_000, 4)},
        )  # fmt: skip
        before, names = content(boot, tmp_path), {path.name for path in tmp_path.iterdir()}
        out, document = tmp_path / "out.boot", tmp_path / "json"
        done = ours("-l", "warn", "compact", "-B", boot, "-D", tmp_path, "--min-used-ratio", "50",
                    "--compact-blob-size", "0", "-O", out, "-J", document)  # fmt: skip
        assert done.exit_code == 0 and not done.output
        with open_bootstrap(boot) as old, open_bootstrap(out) as new:
            changed = [index for index, (a, b) in enumerate(zip(old.blobs, new.blobs, strict=True)) if a.id != b.id]
            (place,) = changed  # the new one takes the place of the old one
            assert new.blobs[place].data_size < 12_000 < 90_000 < old.blobs[place].data_size
            assert len(new.prefetch_inodes()) == 2
            assert json.loads(document.read_text())["blobs"] == [blob.id for blob in new.blobs]
            assert {path.name for path in tmp_path.iterdir()} == names | {new.blobs[place].id, "out.boot", "json"}
        assert content(out, tmp_path) == before
        assert ours("check", "-D", tmp_path, out).exit_code == 0
        upstream_accepts(out)

    def test_small_blobs_become_one(self, version: int, tmp_path: Path) -> None:
        trees = [{f"f{number}": noise(9_000, number), "same": noise(5_000, 99)} for number in range(6)]
        boot = layers(tmp_path, version, *trees, {"big": noise(60_000, 50)}, {"link/deep": noise(100, 7)})
        before = content(boot, tmp_path)
        out = tmp_path / "out.boot"
        done = ours("-l", "warn", "compact", "-B", boot, "-D", tmp_path, "--compact-blob-size", "40000",
                    "--max-compact-size", "30000", "-O", out)  # fmt: skip
        assert done.exit_code == 0, done.output
        with open_bootstrap(out) as new:
            sizes = [blob.data_size for blob in new.blobs]
        assert len(sizes) == 4 and max(sizes) >= 60_000 and all(size <= 30_000 for size in sizes if size < 60_000)
        assert content(out, tmp_path) == before
        again = tmp_path / "again.boot"
        assert ours("-l", "warn", "compact", "-B", boot, "-D", tmp_path, "--compact-blob-size", "40000",
                    "--max-compact-size", "30000", "-O", again).exit_code == 0  # fmt: skip
        assert again.read_bytes() == out.read_bytes()
        upstream_accepts(out)

    def test_nothing_to_do_gives_a_copy(self, version: int, tmp_path: Path) -> None:
        boot = layers(tmp_path, version, {"a": noise(30_000, 1)}, {"b": noise(30_000, 2)})
        with open_bootstrap(boot) as image:
            ids = [blob.id for blob in image.blobs]
        for options in (["--compact-blob-size", "0"], ["--layers-to-compact", "3"], ["--chunk-dict", boot]):
            done = ours("compact", "-B", boot, "-D", tmp_path, *options, "-J", tmp_path / "json")
            assert done.exit_code == 0 and "no chance to compact data blobs" in done.output
            assert (tmp_path / "image.bootstrap.compact").read_bytes() == boot.read_bytes()
            assert json.loads((tmp_path / "json").read_text())["blobs"] == ids


def test_which_blobs_become_one() -> None:
    def usage(index: int, size: int, stored: int, features: int = 0) -> Usage:
        blob = Blob(index, f"blob{index}", 4096, 9, Compressor.NONE, Digester.BLAKE3, BlobFeatures(features),
                    size, size, size)  # fmt: skip
        return Usage(blob, _rows(stored > 0), stored, stored)

    used = [usage(0, 1000, 900), usage(1, 100, 100), usage(2, 300, 20), usage(3, 200, 200, int(BlobFeatures.SEPARATE)),
            usage(4, 150, 150), usage(5, 500, 0), usage(6, 10, 10), usage(7, 160, 160)]  # fmt: skip
    assert plan(used, CompactOptions(compact_blob_size=0), set()) == {}
    assert plan(used, CompactOptions(10, 0), set()) == {2: [2]}
    # From the smallest on: 6 (10 bytes), 2 (20 left of 300), 1 (100).
    assert plan(used, CompactOptions(10, 200, 140), set()) == {6: [1, 2, 6]}
    assert plan(used, CompactOptions(10, 200, 140), {"blob1"}) == {6: [2, 6]}
    # 4 (150) would make them more than allowed; it begins the next, in which 7 finds no room.
    assert plan(used, CompactOptions(10, 170, 270), set()) == {6: [1, 2, 6]}
    assert plan(used, CompactOptions(0, 170, 320), set()) == {6: [1, 4, 6]}


def _rows(some: bool) -> Ints:
    import numpy as np

    return np.arange(1 if some else 0)


def test_compact_says_what_is_wrong(tmp_path: Path) -> None:
    boot = layers(tmp_path, 6, {"a": noise(30_000, 1)}, {"b": noise(3_000, 2)})
    with open_bootstrap(boot) as image:
        blob = tmp_path / image.blobs[0].id
    good, names = blob.read_bytes(), {path.name for path in tmp_path.iterdir()}
    blob.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    for arguments, text in (
        (["-D", tmp_path], "digest is wrong"),
        (["-D", tmp_path / "nowhere"], "is not a directory"),
        (["-D", tmp_path, "--min-used-ratio", "100"], "not a percentage"),
        (["-D", tmp_path, "--chunk-dict", "image=x"], "bootstrap=FILE is expected"),
        (["-D", tmp_path, "--chunk-dict", f"bootstrap={tmp_path}/nowhere"], "nowhere"),
    ):
        done = ours("-l", "error", "compact", "-B", boot, *arguments)
        assert done.exit_code == 1 and text in done.output and len(done.output.splitlines()) == 1, done.output
        assert {path.name for path in tmp_path.iterdir()} == names
    blob.unlink()
    assert blob.name in ours("-l", "error", "compact", "-B", boot, "-D", tmp_path).output


# -- optimize


@pytest.mark.parametrize("version", [5, 6])
def test_listed_ranges_get_a_blob_of_their_own(version: int, tmp_path: Path) -> None:
    boot = layers(
        tmp_path, version,
        {"a": noise(40_000, 1), "dir/x": noise(100, 2), "dir/sub/y": b"z" * 9_000, "empty": b""},
        {"b": noise(0x2000, 9) + noise(8_000, 3), "same": noise(0x2000, 9)},
    )  # fmt: skip
    before = content(boot, tmp_path)
    listed = {"version": "v1", "files": [
        {"path": "/b", "ranges": [[0, 1]]}, {"path": "/dir"}, {"path": "/nowhere"}, {"path": "/empty"},
        {"path": "/a", "ranges": [[0x1FFF, 2], [30_000, 1_000_000], [99_999, 5], [5, 0]]}, {"path": "/same"},
    ]}  # fmt: skip
    (tmp_path / "list").write_text(json.dumps(listed))
    out, blobs = tmp_path / "out.boot", tmp_path / "new"
    blobs.mkdir()
    done = ours("-l", "warn", "optimize", "-B", boot, "-D", tmp_path, "-p", tmp_path / "list", "-O", out,
                "--output-blob-dir", blobs, "-J", tmp_path / "json")  # fmt: skip
    assert done.exit_code == 0 and "prefetch file /nowhere is bad, skip it" in done.output
    (made,) = blobs.iterdir()
    assert json.loads((tmp_path / "json").read_text())["blobs"][-1] == made.name
    with open_bootstrap(out) as new:
        blob = new.blobs[-1]
        assert blob.id == made.name and blob.index == 2
        assert blob.features & BlobFeatures.IS_SEPARATED_WITH_PREFETCH_FILES
        places = {path: [ref.chunk_index for ref in new.chunk_refs(entry.ino) if ref.blob_index == 2]
                  for path, entry in new.walk() if entry.dtype == 8}  # fmt: skip
        # In the order of the list; "same" has the content of b's first chunk, which is stored once.
        assert places == {
            b"b": [0], b"dir/sub/y": [1, 2], b"dir/x": [3], b"a": [4, 5, 6, 7], b"same": [0], b"empty": [],
        }  # fmt: skip
        assert blob.chunk_count == 8
    made.rename(tmp_path / made.name)
    assert content(out, tmp_path) == before
    assert ours("check", "-D", tmp_path, out).exit_code == 0
    upstream_accepts(out)


def test_optimize_lists_that_are_plain_empty_or_wrong(tmp_path: Path) -> None:
    boot = layers(tmp_path, 6, {"a": noise(9_000, 1)})
    base = ["optimize", "-B", boot, "-D", tmp_path, "-O", tmp_path / "out.boot", "--output-blob-dir", tmp_path]

    def run(text: str | bytes) -> Result:
        (tmp_path / "list").write_bytes(text if isinstance(text, bytes) else text.encode())
        return ours("-l", "warn", *base, "-p", tmp_path / "list")

    assert run("/a\n\n").output == ""
    with open_bootstrap(tmp_path / "out.boot") as image:
        assert len(image.blobs) == 2
    for text in ("", '{"version": "v1", "files": []}', "/nowhere\n"):
        assert "names no data of this image" in run(text).output
        assert (tmp_path / "out.boot").read_bytes() == boot.read_bytes()
    wrong: tuple[tuple[Any, str], ...] = (
        ('{"version": "v2", "files": []}', "unsupported prefetch file version: v2"),
        ('{"version": "v1"', "failed to parse prefetch file as JSON"),
        ("[]", "failed to parse prefetch file as JSON"),
        ('{"version": "v1", "files": [{}]}', "files[0] has no path"),
        ('{"version": "v1", "files": [{"path": "a"}]}', "is not an absolute path"),
        ('{"version": "v1", "files": [{"path": "/a", "ranges": [[1]]}]}', "is not [offset, size]"),
        ('{"version": "v1", "files": [{"path": "/a", "ranges": [[-1, 5]]}]}', "is not [offset, size]"),
        ('{"version": "v1", "files": [{"path": "/a", "ranges": 5}]}', "is not [offset, size]"),
        (b"\xff\xfe", "is not an absolute path"),
        ("[" * 100_000, "failed to parse prefetch file as JSON"),
    )
    for text, message in wrong:
        done = run(text)
        assert done.exit_code == 1 and message in done.output and len(done.output.splitlines()) == 1, done.output
    assert "missing parameter `output-blob-dir`" in ours("optimize", "-B", boot, "-p", tmp_path / "list").output
    assert "missing parameter `prefetch-files`" in ours(*base).output
    assert "failed to read prefetch files" in ours(*base, "-p", tmp_path / "none").output
    assert not list(tmp_path.glob(".*"))


# -- images of every kind


@pytest.mark.interop
@pytest.mark.skipif(shared_dir() is None, reason="interop: no reference fixtures here")
@pytest.mark.parametrize(
    ("case", "moved"),
    [("v5-merged3", True), ("v5-zstd-sha256-64k-aligned", False), ("v5-inline", False), ("v6-merged3", True),
     ("v6-merged3-encrypt-batch", True), ("v6-batch-128k", True), ("v6-encrypt", False), ("v6-zran-merged3", False),
     ("v6-tar-ref", False), ("v6-chunk-dict", True), ("v6-no-data", False), ("v6-inline-notoc", False)],
)  # fmt: skip
def test_every_kind_of_image(case: str, moved: bool, tmp_path: Path) -> None:
    source = REFERENCE / case
    for path in source.iterdir():
        if len(path.name) == 64 or path.name in ("image.boot", "layer"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    boot = tmp_path / "image.boot"
    if not boot.exists():
        boot = tmp_path / "layer"
    before = content(boot, tmp_path)
    (tmp_path / "list").write_text("/links\n/big1\n/hl\n/usr\n")
    for name, arguments in (
        ("compact", ["-D", tmp_path, "--min-used-ratio", "99"]),
        ("optimize", ["-D", tmp_path, "--output-blob-dir", tmp_path, "-p", tmp_path / "list"]),
    ):
        out = tmp_path / f"{name}.boot"
        done = ours("-l", "error", name, "-B", boot, *arguments, "-O", out)
        assert done.exit_code == 0, done.output
        if name == "compact":
            with open_bootstrap(boot) as old, open_bootstrap(out) as new:
                assert ({b.id for b in new.blobs} - {b.id for b in old.blobs} != set()) == moved
                secret = {bool(blob.features & BlobFeatures.ENCRYPTED) for blob in new.blobs}
                assert secret <= {"encrypt" in case}
        assert content(out, tmp_path) == before
        assert ours("check", "-D", tmp_path, out).exit_code == 0
        upstream_accepts(out)
