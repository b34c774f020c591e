"""eStargz layers as they are: a bootstrap from the table, and every chunk where it says."""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bootstrap.base import Chunk
from bootstrap.build import BuildOptions
from bootstrap.decode import decode_chunk
from bootstrap.errors import DigestMismatch, FormatError, RafsError
from bootstrap.estargz import build_toc, layer_bootstrap, parse_toc, read_toc
from bootstrap.layout.estargz import pack_zstd_footer
from bootstrap.merge import MergeSource, merge_layers
from bootstrap.reader import open_bootstrap
from tests.lab.estargz import digest, file, write_estargz
from tests.lab.paths import shared_dir

SHARED = shared_dir()


def special(name: str, kind: bytes, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    entry, _ = file(name, b"", **fields)
    entry.type = kind
    return entry, b""


FILES = {
    "etc/passwd": b"root:x:0:0::/root:/bin/sh\n",
    "big": random.Random(1).randbytes(100_000) + bytes(170_000),
    "exact": random.Random(2).randbytes(0x20000),
    "empty": b"",
    "same": random.Random(2).randbytes(0x20000),
}
ENTRIES = [
    special("etc", tarfile.DIRTYPE, mode=0o750, mtime=1_600_000_000),
    *(file(name, data, mtime=1_700_000_000 + i, uid=i) for i, (name, data) in enumerate(FILES.items())),
    special("link", tarfile.SYMTYPE, linkname="etc/passwd", mode=0o777),
    special("hard", tarfile.LNKTYPE, linkname="big", mtime=1_700_000_001, uid=1),
    special("null", tarfile.CHRTYPE, devmajor=1, devminor=3),
    special("pipe", tarfile.FIFOTYPE),
    file("with-xattr", b"x", pax_headers={"SCHILY.xattr.user.a": "1"}),
]


def reader(layer: bytes, reads: list[tuple[int, int]] | None = None) -> Any:
    def read(offset: int, size: int) -> bytes:
        if reads is not None:
            reads.append((offset, size))
        return layer[offset : offset + size]

    return read


def contents(path: Path, layers: dict[str, bytes]) -> dict[str, bytes]:
    """What the image at `path` says its files are, from the layers by id."""
    found = {}
    with open_bootstrap(str(path)) as image:
        records = {(record[1], record[8]): record for record in image.chunk_records()}
        for name, entry in image.walk():
            pieces = []
            for blob, index, _ in image.chunk_refs(entry.ino) if entry.dtype == 8 else []:
                record = records[blob, index]
                layer = layers[image.blobs[blob].id]
                assert image.blobs[blob].compressed_size == len(layer)
                stored = layer[record[5] : record[5] + record[3]]
                data = decode_chunk(Chunk(*record), image.blobs[blob], stored)
                pieces.append(data)
            found[name.decode().lstrip("/")] = b"".join(pieces)
    return found


@pytest.mark.parametrize("form", ["estargz", "legacy", "zstd"])
def test_a_layer_runs_as_it_is(form: str, tmp_path: Path) -> None:
    layer, text = write_estargz(ENTRIES, 0x10000, legacy=form == "legacy", zstd=form == "zstd")
    reads: list[tuple[int, int]] = []
    path = tmp_path / "image.boot"
    path.write_bytes(layer_bootstrap(reader(layer, reads), len(layer), "ab" * 32, toc_digest=digest(text)))
    assert len(reads) == 2 and sum(size for _, size in reads) < 3000
    found = contents(path, {"ab" * 32: layer})
    assert {name: found[name] for name in FILES} == FILES
    assert found["hard"] == FILES["big"] and ".no.prefetch.landmark" not in found
    with open_bootstrap(str(path)) as image:
        assert image.chunk_size == 0x10000
        big = image.attr(image.resolve(b"/big"))
        assert (big.mtime, big.uid, big.nlink, oct(big.mode)) == (1_700_000_001, 1, 2, "0o100644")
        assert image.attr(image.resolve(b"/etc")).mtime == 1_600_000_000
        assert image.readlink(image.resolve(b"/link")) == b"etc/passwd"
        assert image.attr(image.resolve(b"/null")).rdev == 0x103
        assert oct(image.attr(image.resolve(b"/pipe")).mode) == "0o10644"
        assert image.xattrs(image.resolve(b"/with-xattr")) == {b"user.a": b"1"}


@pytest.mark.parametrize("zstd", [False, True], ids=["gzip", "zstd below gzip"])
def test_layers_merge_into_an_image(zstd: bool, tmp_path: Path) -> None:
    upper = [file("etc/passwd", b"nobody\n"), file(".wh.same", b""), file("new", b"n" * 5000)]
    layers = [write_estargz(ENTRIES, 0x10000, zstd=zstd)[0], write_estargz(upper, 0x10000)[0]]
    sources, by_id = [], {}
    for layer in layers:
        name = hashlib.sha256(layer).hexdigest()
        path = tmp_path / f"{name}.boot"
        path.write_bytes(layer_bootstrap(reader(layer), len(layer), name, chunk_size=0x10000))
        sources.append(MergeSource(path, original_blob_id=name))
        by_id[name] = layer
    merge_layers(sources, tmp_path / "image.boot")
    found = contents(tmp_path / "image.boot", by_id)
    assert found["etc/passwd"] == b"nobody\n" and found["new"] == b"n" * 5000 and "same" not in found
    assert found["big"] == FILES["big"]


def test_chunk_size_comes_from_the_archive() -> None:
    for entries, chunk_size, expected in (
        (ENTRIES, 0x8000, 0x8000),
        ([file("a", b"a")], 0x8000, 4 << 20),
        ([file("a", bytes(5 << 20))], 8 << 20, 8 << 20),
    ):
        layer, _ = write_estargz(entries, chunk_size)
        assert read_toc(reader(layer), len(layer)).fitting_chunk_size() == expected
    layer, _ = write_estargz([file("a", bytes(100_000))], 50_000)
    with pytest.raises(RafsError, match="50000 is not a power of two"):
        layer_bootstrap(reader(layer), len(layer), "a")


def test_what_cannot_run_says_why() -> None:
    layer, text = write_estargz(ENTRIES, 0x10000)
    with pytest.raises(FormatError, match="not that of an eStargz archive"):
        layer_bootstrap(reader(layer[:-1]), len(layer) - 1, "a")
    with pytest.raises(FormatError, match="not that of an eStargz archive"):
        layer_bootstrap(reader(b"x"), 1, "a")
    with pytest.raises(FormatError, match=r"zstd:chunked footer.*Podman's"):
        layer_bootstrap(reader(bytes(100) + b"GnUlInUx"), 108, "a")
    for offset, stored in ((0, 10), (9, 0), (9, 1 << 63), (60, 2)):
        with pytest.raises(FormatError, match="not before the footer"):
            layer_bootstrap(reader(bytes(60) + pack_zstd_footer(offset, stored, 1)), 108, "a")
    with pytest.raises(DigestMismatch, match="has not the digest"):
        layer_bootstrap(reader(layer), len(layer), "a", toc_digest=digest(b"other"))
    with pytest.raises(RafsError, match="chunk of 65536 bytes, the image has chunks of 4096"):
        layer_bootstrap(reader(layer), len(layer), "a", chunk_size=0x1000)
    table = json.loads(text)
    big = next(i for i, entry in enumerate(table["entries"]) if entry["name"] == "big")
    for changes, message in (
        ({"chunkDigest": ""}, "no digest of its content"),
        ({"chunkDigest": "md5:00"}, "is no sha256"),
        ({"offset": len(layer)}, "file data at"),
        ({"offset": 0}, "no offset of its data"),
        ({"size": 1 << 30}, "chunk of 1073479680 bytes, the image has"),
        ({"size": -1}, "size -1"),
        ({"chunkSize": 10}, "chunk of 10 bytes, the image has"),
        ({"innerOffset": 7}, "shares a gzip member"),
        ({"uid": 1 << 32}, "does not fit 32 bits"),
        ({"type": "door"}, "unknown type 'door'"),
        ({"type": "chunk"}, "chunk of 65536 bytes at 0, 26 of 26 are there"),
        ({"name": "../x"}, "contains '..'"),
        ({"modtime": "yesterday"}, "is no time"),
    ):
        changed = json.loads(text)
        changed["entries"][big].update(changes)
        if "name" in changes:
            del changed["entries"][big + 1 : big + 5]
            changed["entries"][big].update(size=0)
        with pytest.raises(RafsError, match=message):
            toc = parse_toc(json.dumps(changed).encode(), len(layer))
            build_toc(toc, io.BytesIO(), BuildOptions(chunk_size=0x10000), ("a", len(layer)))
    alone = b'{"version": 1, "entries": [{"name": "a", "type": "chunk"}]}'
    with pytest.raises(RafsError, match="a chunk of 'a', which does not come before it"):
        list(parse_toc(alone, 10).files())
    for wrong in (b"", b"[]", b'{"version": 2, "entries": []}', b'{"version": 1, "entries": [{"name": 1}]}', b"\xff"):
        with pytest.raises(RafsError, match="eStargz table of contents"):
            parse_toc(wrong, 10)


SMALL, _ = write_estargz(ENTRIES[:4], 0x10000)
ZSTD, _ = write_estargz(ENTRIES[:4], 0x10000, zstd=True)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([(SMALL, b"\x1f\x8b\x08"), (ZSTD, b"\x50\x2a\x4d\x18")]), st.data())
def test_nothing_but_a_domain_error(form: tuple[bytes, bytes], data: st.DataObject) -> None:
    small, begin = form
    toc_at = small.rindex(begin, 0, -51 if small is SMALL else -48)
    layer = bytearray(small)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.one_of(st.integers(toc_at, len(layer) - 1), st.integers(len(layer) - 51, len(layer) - 1)))
        layer[at] = data.draw(st.integers(0, 255))
    try:
        found = layer_bootstrap(reader(bytes(layer)), len(layer), "a")
    except RafsError:
        return
    assert len(found) >= 8192


@pytest.mark.interop
@pytest.mark.skipif(SHARED is None, reason="interop: the reference fixtures are not here")
def test_an_archive_of_the_reference_writer(tmp_path: Path) -> None:
    assert SHARED is not None
    case = SHARED / "fixtures" / "reference" / "v6-estargz-ref"
    manifest = json.loads((case / "manifest.json").read_bytes())
    name = manifest["blobs"][0]["id"]
    layer = (case / name).read_bytes()
    path = tmp_path / "image.boot"
    path.write_bytes(layer_bootstrap(reader(layer), len(layer), name))
    found = contents(path, {name: layer})
    checked = 0
    for entry in manifest["entries"]:
        if entry["type"] == "file":
            assert hashlib.sha256(found[entry["path"].lstrip("/")]).hexdigest() == entry["sha256"]
            checked += 1
    assert checked > 10
