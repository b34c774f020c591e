"""Upstream's tools on what our builder writes, and our builder on directories against upstream's bytes. Needs root."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from bootstrap.build import BuildOptions, build_directory, build_layer
from bootstrap.layout.common import Compressor, Digester
from bootstrap.merge import MergeSource, merge_layers
from tests.lab.paths import ref_bin
from tests.unit.test_build_fixtures import REFERENCE, make_tree, rewrite, tree_tar

NYDUS_IMAGE = ref_bin("nydus-image")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.root,
    pytest.mark.skipif(
        REFERENCE is None or NYDUS_IMAGE is None, reason="interop: fixtures and reference nydus-image are not here"
    ),
]


def upstream(*arguments: str | Path) -> str:
    done = subprocess.run(
        [str(NYDUS_IMAGE), *map(str, arguments)], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def entries(data: bytes) -> dict[str, tuple[object, ...]]:
    """A tar as a map, hard links resolved to their content, times in whole seconds."""
    found: dict[str, tuple[object, ...]] = {}
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape", encoding="utf-8") as archive:
        for member in archive:
            path = os.path.normpath("/" + member.name)
            if path == "/":
                continue
            content: object = member.linkname if member.issym() else (member.devmajor, member.devminor)
            if member.islnk():
                content, kind = found["/" + member.linkname.lstrip("/")][-1], stat.S_IFREG
            elif member.isreg():
                file = archive.extractfile(member)
                assert file is not None
                content, kind = hashlib.sha256(file.read()).hexdigest(), stat.S_IFREG
            else:
                kind = int.from_bytes(member.type, "big")
                if not (member.ischr() or member.isblk() or member.issym()):
                    content = None
            # A link entry repeats its target's attributes; where unpack leaves some out, take those of the target.
            xattrs: object = sorted(item for item in member.pax_headers.items() if item[0].startswith("SCHILY.xattr."))
            if member.islnk():
                xattrs = found["/" + member.linkname.lstrip("/")][5]
            mode = None if member.issym() else member.mode
            found[path] = (kind, mode, member.uid, member.gid, int(member.mtime), xattrs, content)
    return found


@pytest.fixture(scope="module")
def source() -> bytes:
    """The nasty tree without what upstream's `unpack` cannot bear: it panics on fifos and devices."""
    module = make_tree()
    out = io.BytesIO()
    module.write_tar([n for n in module.nasty_tar(0x4000) if n.kind not in ("fifo", "char", "block")], out)
    return out.getvalue()


MATRIX = [
    *itertools.product(
        (5, 6),
        (Compressor.NONE, Compressor.LZ4_BLOCK, Compressor.ZSTD),
        (Digester.BLAKE3, Digester.SHA256),
        (0x4000,),
        ("plain", "inline", "merged"),
    ),
    *((6, Compressor.ZSTD, Digester.BLAKE3, size, "merged") for size in (0x1000, 0x100000, 0x1000000)),
    *((5, Compressor.ZSTD, Digester.SHA256, size, "plain") for size in (0x1000, 0x1000000)),
]


@pytest.mark.parametrize(
    ("version", "compressor", "digester", "chunk_size", "form"),
    MATRIX,
    ids=lambda v: v.label if isinstance(v, (Compressor, Digester)) else hex(v) if isinstance(v, int) and v > 6 else v,
)
def test_upstream_reads_what_we_write(
    version: int, compressor: Compressor, digester: Digester, chunk_size: int, form: str, source: bytes, tmp_path: Path
) -> None:
    inline = form != "plain"
    options = BuildOptions(
        fs_version=version,
        compressor=compressor,
        digester=digester,
        chunk_size=chunk_size,
        inline_meta=inline,
        blob_toc=inline and version == 6,
        aligned_chunk=version == 5 and digester == Digester.SHA256,
    )
    out = io.BytesIO()
    result = build_layer(io.BytesIO(source), out, options)
    blob = tmp_path / (result.blob_sha256 if inline else result.blob_id)
    blob.write_bytes(out.getvalue())
    boot = blob
    if form == "plain":
        boot = tmp_path / "image.boot"
        boot.write_bytes(result.bootstrap)
    elif form == "merged":
        boot = tmp_path / "image.boot"
        merge_layers([MergeSource(blob)], boot, prefetch=[b"/sizes", b"/names"])
    report = tmp_path / "check.json"
    if form == "inline":  # `check` finds the bootstrap inside by itself, `unpack` wants it apart
        boot = tmp_path / f"{blob.name}.image.boot"
        boot.write_bytes(result.bootstrap)
    upstream("check", "-l", "warn", "-B", boot, "-J", report)
    checked = json.loads(report.read_text())
    assert checked["fs_version"] == str(version)
    assert checked["blobs"] == [blob.name]
    unpacked = tmp_path / "out.tar"
    upstream("unpack", "-l", "warn", "--blob", blob, "--output", unpacked, boot)
    assert entries(unpacked.read_bytes()) == entries(source)


def test_merge_equals_upstream_on_five_layers(tmp_path: Path) -> None:
    sources = []
    for number in range(1, 6):
        out = io.BytesIO()
        result = build_layer(
            io.BytesIO(tree_tar(f"layer{number}", 0x8000)),
            out,
            BuildOptions(chunk_size=0x8000, inline_meta=True, blob_toc=True),
        )
        path = tmp_path / result.blob_sha256
        path.write_bytes(out.getvalue())
        boot = tmp_path / f"{result.blob_sha256}.image.boot"
        boot.write_bytes(result.bootstrap)
        sources.append(boot)
    merge_layers([MergeSource(path) for path in sources], tmp_path / "ours")
    upstream("merge", "-l", "warn", "-B", tmp_path / "theirs", *sources)
    assert rewrite(tmp_path / "theirs", [], sort_xattrs=True) == rewrite(tmp_path / "ours", [], sort_xattrs=True)
    upstream("check", "-l", "warn", "-B", tmp_path / "ours")


def test_a_real_tree_gives_upstream_s_bootstrap(tmp_path: Path) -> None:
    """Thousands of files: block edges of directories and freed space in all combinations."""
    source = Path(os.__file__).parent
    for version in ("5", "6"):
        theirs = tmp_path / version
        theirs.mkdir()
        out = io.BytesIO()
        result = build_directory(
            str(source), out, BuildOptions(fs_version=int(version), compressor=Compressor.LZ4_BLOCK)
        )
        flags = ["-l", "warn", "-v", version, "--compressor", "lz4_block"]
        upstream("create", *flags, "-B", theirs / "boot", "-D", theirs, source)
        assert result.bootstrap == (theirs / "boot").read_bytes()
        assert (theirs / result.blob_id).read_bytes() == out.getvalue()
