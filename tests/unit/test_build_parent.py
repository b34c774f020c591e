"""A layer tar on a parent image: as unpacking it over the parent would be."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from bootstrap.build import BuildOptions, build_layer
from bootstrap.chunkmap import ChunkMap
from bootstrap.cli import main
from bootstrap.errors import BuildError
from bootstrap.layout.common import Compressor
from bootstrap.merge import MergeSource, merge_layers
from bootstrap.reader import Bootstrap, open_bootstrap
from tests.unit.test_build_tar import member, pack

DIRECTORY = {"type": tarfile.DIRTYPE, "mode": 0o755}
LOWER = pack(
    member("usr", **DIRECTORY),
    member("usr/lib", **DIRECTORY, uid=7, mtime=9),
    member("usr/lib/a", b"a" * 9000, mode=0o640, mtime=5, uid=3),
    member("usr/lib/gone", b"gone"),
    member("usr/lib/same", b"same" * 2000),
    member("lib", type=tarfile.SYMTYPE, linkname="usr/lib"),
    member("old", **DIRECTORY),
    member("old/x", b"x"),
    member("fifo", type=tarfile.FIFOTYPE),
)
UPPER = pack(
    member("lib/b", b"b" * 100, mode=0o600),  # /lib is a link in the parent
    member("usr/lib/.wh.gone"),
    member("usr/lib/copy", b"same" * 2000),
    member("old/.wh..wh..opq"),
    member("old/y", b"y"),
    member("second", type=tarfile.LNKTYPE, linkname="usr/lib/a", mode=0o600, uid=4, mtime=6),
    member("pipe", type=tarfile.LNKTYPE, linkname="fifo"),
)


def build(data: bytes, out: io.BytesIO, parent: Path | None, **options: object) -> bytes:
    settings = BuildOptions(chunk_size=0x1000, **options)  # type: ignore[arg-type]
    return build_layer(io.BytesIO(data), out, settings, parent=str(parent) if parent else None).bootstrap


def content(image: Bootstrap, path: bytes) -> list[tuple[str, int]]:
    """Blob id and uncompressed offset of each chunk."""
    inode = image.resolve(path)
    assert inode, path
    refs = image.chunk_refs(inode)
    return [(image.blobs[ref.blob_index].id, ref.uncompressed_offset) for ref in refs]


@pytest.mark.parametrize("version", [5, 6])
def test_a_layer_on_its_parent(version: int, tmp_path: Path) -> None:
    blob = io.BytesIO()
    lower = tmp_path / "lower"
    lower.write_bytes(build(LOWER, io.BytesIO(), None, fs_version=version))
    path = tmp_path / "image"
    path.write_bytes(build(UPPER, blob, lower, fs_version=version))
    with open_bootstrap(path) as image, open_bootstrap(lower) as below:
        names = sorted(name for name, _ in image.walk())
        assert names == sorted(
            b"usr usr/lib usr/lib/a usr/lib/b usr/lib/copy usr/lib/same lib old old/y fifo pipe second".split()
        )
        directory = image.attr(image.resolve(b"/usr/lib"))
        assert (directory.uid, directory.mtime, directory.mtime_nsec) == (7, 9, 0)
        assert len(image.blobs) == 2 and image.blobs[0].id == below.blobs[0].id
        assert content(image, b"/usr/lib/copy") == content(below, b"/usr/lib/same")  # nothing stored twice
        assert content(image, b"/second") == content(image, b"/usr/lib/a") == content(below, b"/usr/lib/a")
        first, second = image.resolve(b"/usr/lib/a"), image.resolve(b"/second")
        assert first == second and image.attr(first).nlink == 2
        assert content(image, b"/usr/lib/b")[0][0] == image.blobs[1].id
        assert image.attr(image.resolve(b"/pipe")).nlink == 2
        ChunkMap.open(image, None).close()


def test_whiteout_specs_and_what_is_hidden(tmp_path: Path) -> None:
    lower = tmp_path / "lower"
    lower.write_bytes(build(LOWER, io.BytesIO(), None))
    removed = pack(member("usr/lib/.wh.a"), member("second", type=tarfile.LNKTYPE, linkname="usr/lib/a"))
    with pytest.raises(BuildError, match=r"second.*usr/lib/a"):
        build(removed, io.BytesIO(), lower)
    hidden = pack(member("old/.wh..wh..opq"), member("z", type=tarfile.LNKTYPE, linkname="old/x"))
    with pytest.raises(BuildError, match="old/x"):
        build(hidden, io.BytesIO(), lower)
    with pytest.raises(BuildError, match="is a directory"):
        build(pack(member("z", type=tarfile.LNKTYPE, linkname="old")), io.BytesIO(), lower)
    path = tmp_path / "image"
    device = pack(member("old", type=tarfile.CHRTYPE, devmajor=0, devminor=0), member("usr/.wh.lib"))
    for spec, expected in (
        ("oci", {b"old", b"usr"}),
        ("overlayfs", {b"usr", b"usr/.wh.lib", b"usr/lib"}),
        ("none", {b"old", b"usr", b"usr/.wh.lib", b"usr/lib"}),
    ):
        path.write_bytes(build(device, io.BytesIO(), lower, whiteout_spec=spec))
        with open_bootstrap(path) as image:
            found = {name for name, _ in image.walk()}
            wanted = {b"old", b"usr", b"usr/.wh.lib", b"usr/lib", b"old/x"}
            assert found & wanted == expected, spec


def test_the_same_as_a_merge_of_both(tmp_path: Path) -> None:
    """Where no link leads down, building on the parent and merging two layers are the same tree."""
    plain = pack(
        member("usr/lib/.wh.gone"), member("usr/lib/copy", b"same" * 2000), member("old/.wh..wh..opq"), member("old/y")
    )
    lower, upper = tmp_path / "lower", tmp_path / "upper"
    lower.write_bytes(build(LOWER, io.BytesIO(), None))
    upper.write_bytes(build(plain, io.BytesIO(), None, inline_meta=True))
    merge_layers([MergeSource(lower), MergeSource(upper)], tmp_path / "merged")
    path = tmp_path / "image"
    path.write_bytes(build(plain, io.BytesIO(), lower))
    with open_bootstrap(path) as one, open_bootstrap(tmp_path / "merged") as two:
        walked = [[(name, image.attr(entry.ino)) for name, entry in image.walk()] for image in (one, two)]
        assert walked[0] == walked[1]


def test_parents_that_do_not_fit(tmp_path: Path) -> None:
    lower, layer = tmp_path / "lower", tmp_path / "layer.tar"
    lower.write_bytes(build(LOWER, io.BytesIO(), None))
    layer.write_bytes(UPPER)
    (tmp_path / "text").write_bytes(b"no image\n" * 2000)
    base = ["create", "-t", "tar-rafs", "-B", str(tmp_path / "b"), "-D", str(tmp_path)]
    good = ["--parent-bootstrap", str(lower), "--chunk-size", "0x1000"]
    assert CliRunner().invoke(main, [*base, *good, str(layer)]).exit_code == 0
    for flags, word in (
        ([*good[:2]], "chunk size 0x1000 instead of 0x100000"),
        ([*good, "-v", "5"], "RAFS version 6 instead of 5"),
        ([*good, "--repeatable"], "explicit owners"),
        (["--parent-bootstrap", str(tmp_path / "nothing")], "nothing"),
        (["--parent-bootstrap", str(tmp_path / "text")], "text"),
    ):
        for option in ("--parent-bootstrap", "--chunk-dict"):
            done = CliRunner().invoke(
                main, [*base, *(option if f == "--parent-bootstrap" else f for f in flags), str(layer)]
            )
            assert done.exit_code == 1 and word in done.output and done.output.count("\n") == 1, (flags, done.output)


@pytest.mark.parametrize("version", [5, 6])
@pytest.mark.parametrize("theirs", [Compressor.ZSTD, Compressor.NONE])
def test_a_v5_image_has_one_compressor_beside_none(version: int, theirs: Compressor, tmp_path: Path) -> None:
    """Its superblock says it for all blobs: chunks of another one would be taken for what the new ones are."""
    base = tmp_path / "base"
    base.write_bytes(build(LOWER, io.BytesIO(), None, fs_version=version, compressor=theirs))
    ours = Compressor.NONE if theirs == Compressor.ZSTD else Compressor.ZSTD
    uses: tuple[tuple[Path | None, dict[str, object]], ...] = ((base, {}), (None, {"chunk_dict": base}))
    for parent, options in uses:
        options |= {"fs_version": version, "compressor": ours}
        if version == 5 and theirs != Compressor.NONE:
            with pytest.raises(BuildError, match="compressor zstd instead of none"):
                build(LOWER, io.BytesIO(), parent, **options)
        else:
            build(LOWER, io.BytesIO(), parent, **options)
