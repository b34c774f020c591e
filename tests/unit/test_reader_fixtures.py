"""Bootstraps and blobs written by upstream, read entry by entry and byte by byte."""

from __future__ import annotations

import hashlib
import json
import os
import random
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crc32c import crc32c

from bootstrap.base import Blob, Chunk
from bootstrap.blobmeta import open_cache_form
from bootstrap.blobsource import open_blobs
from bootstrap.check import check_bootstrap
from bootstrap.checkblob import check_blobs
from bootstrap.chunkmap import ChunkMap, iter_chunks
from bootstrap.decode import decode_chunk
from bootstrap.errors import CodecError, DigestMismatch, FormatError, RafsError
from bootstrap.layout import blobmeta, zran
from bootstrap.layout.common import BlobFeatures, Compressor, Digester
from bootstrap.reader import Bootstrap, open_bootstrap
from bootstrap.tarwrite import HARD_LINK
from bootstrap.unpack import members
from nydusfs.drivers.stats import FsStats
from nydusfs.drivers.volume import ImageVolume
from tests.lab.manifest import FolderReader, check_image, load_manifest
from tests.lab.paths import ref_bin, reference_cases, shared_dir

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(shared_dir() is None, reason="interop: no reference fixtures here"),
]
FIXTURES = (shared_dir() or Path("/nonexistent")) / "fixtures"
REFERENCE = FIXTURES / "reference"
CASES = reference_cases()


def bootstrap_of(case: str) -> Path:
    path = REFERENCE / case / "image.boot"
    return path if path.exists() else REFERENCE / case / "layer"


@pytest.mark.parametrize("case", CASES)
def test_image_is_what_its_manifest_says(case: str) -> None:
    manifest = load_manifest(REFERENCE / case)
    with open_bootstrap(bootstrap_of(case)) as image:
        assert check_image(image, FolderReader(image, REFERENCE / case), manifest) == []
        assert image.prefetch_inodes() == manifest["prefetch_table"]
        assert image.version == manifest["fs_version"] and image.chunk_size == manifest["chunk_size"]
        assert int(image.flags) == int(manifest["flags"], 16)
        assert [(b.compressed_size, b.uncompressed_size, b.chunk_count) for b in image.blobs] == [
            (b["compressed_size"], b["uncompressed_size"], b["chunks"]) for b in manifest["blobs"]
        ]
        check_bootstrap(image)
        check_blobs(image, str(REFERENCE / case))


@pytest.mark.parametrize("case", ["v5-bigdir-prefetch-fs", "v6-bigdir-prefetch-fs", "v6-none-sha256-4k"])
def test_names_are_found_and_listings_resume_anywhere(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bootstrap.reader_v6.MAX_ONLY_BLOCKS", 2)  # so that they are forgotten meanwhile
    with open_bootstrap(bootstrap_of(case)) as image:
        directories = [image.root] + [entry.ino for _, entry in image.walk() if entry.dtype == stat.S_IFDIR >> 12]
        for directory in directories:
            entries = list(image.list_dir(directory))
            names = [entry.name for entry in entries]
            assert names == sorted(set(names))
            for number, entry in enumerate(entries):
                assert image.lookup(directory, entry.name) == entry.ino
                assert image.lookup(directory, entry.name + b"\xff\xff") == 0
                assert entry.name[:-1] + b"\x02" in names or image.lookup(directory, entry.name[:-1] + b"\x02") == 0
                following = entries[number + 1] if number + 1 < len(entries) else None
                assert next(image.list_dir(directory, entry.cookie), None) == following
            assert image.lookup(directory, b".") == directory
        assert image.lookup(image.root, b"..") == image.root
        for _, entry in image.walk():
            if entry.dtype != stat.S_IFDIR >> 12:
                assert image.lookup(entry.ino, b"x") == 0
                break


def test_extents_cover_any_range_without_gaps() -> None:
    numbers = random.Random(7)
    for case in ("v5-none-sha256-4k", "v6-none-sha256-4k", "v6-lz4-blake3-64k-toc"):
        with open_bootstrap(bootstrap_of(case)) as image:
            chunks = ChunkMap.open(image, None)
            files = [entry.ino for _, entry in image.walk() if entry.dtype == stat.S_IFREG >> 12]
            for ino in files:
                size = image.attr(ino).size
                for _ in range(5):
                    offset, length = numbers.randrange(size + 2), numbers.randrange(size + 5000)
                    position = offset
                    for extent in image.extents(ino, offset, length):
                        assert extent.file_offset == position and extent.size > 0
                        chunks.find(extent.blob_index, extent.blob_offset, extent.size)
                        position += extent.size
                    assert position == max(offset, min(offset + length, size))


def test_hard_links_share_their_handle() -> None:
    for case in ("v5-none-sha256-4k", "v6-none-sha256-4k", "v5-tar-rafs", "v6-tar-rafs"):
        groups: dict[str, set[int]] = {}
        with open_bootstrap(bootstrap_of(case)) as image:
            for entry in load_manifest(REFERENCE / case)["entries"]:
                if "group" in entry:
                    groups.setdefault(entry["group"], set()).add(image.resolve(os.fsencode(entry["path"])))
        assert groups and all(len(handles) == 1 for handles in groups.values())
        assert len(set.union(*groups.values())) == len(groups)


def real_bootstraps(tmp: Path) -> Iterator[tuple[Path, int]]:
    for archive in sorted((FIXTURES / "upstream" / "nydus-snapshotter").glob("*.tar.gz")):
        with tarfile.open(archive) as tar:
            member = tar.extractfile("image/image.boot")
            assert member is not None
            path = tmp / archive.name
            path.write_bytes(member.read())
            yield path, 3517
    for name in ("sha256-nocompress-repeatable", "blake3-lz4_block-non_repeatable"):
        yield FIXTURES / "upstream" / "nydus" / "repeatable" / name, 54
    yield FIXTURES / "upstream" / "nydus" / "bootstrap" / "rafs-v6-2.2.boot", 3


def test_images_of_earlier_releases(tmp_path: Path) -> None:
    trees = []
    for path, count in real_bootstraps(tmp_path):
        with open_bootstrap(path) as image:
            assert check_bootstrap(image) == count
            trees.append({p: image.attr(e.ino)[:3] for p, e in image.walk()})
            for p, e in image.walk():
                assert image.resolve(p) == e.ino
    assert trees[0] == trees[1] and len(trees[0]) == 3516  # the same tree as v5 and as v6
    blobs = FIXTURES / "upstream" / "nydus"
    with open_bootstrap(blobs / "bootstrap" / "rafs-v6-2.2.boot") as image:
        assert check_blobs(image, str(blobs / "blobs")) == 2
    with open_bootstrap(blobs / "repeatable" / "sha256-nocompress-repeatable") as image:
        assert check_blobs(image, str(blobs / "repeatable" / "blobs")) == 23
    layer = next((blobs / "toc").iterdir())
    with open_bootstrap(layer) as image:
        assert image.blobs[0].id == layer.name  # its own id is of before 2.2
        assert check_blobs(image, str(blobs / "toc")) == 3


def test_trees_of_earlier_releases_are_those_their_listings_name() -> None:
    def paths(entries: list[dict[str, Any]], above: str = "") -> Iterator[tuple[str, str]]:
        for entry in entries:
            if entry["type"] != "report":
                if entry["name"]:
                    yield above + entry["name"], entry["type"]
                yield from paths(entry.get("contents", []), f"{above}{entry['name']}/".lstrip("/"))

    kinds = {"directory": 4, "file": 8, "link": 10}
    for name in ("sha256-nocompress-repeatable", "blake3-lz4_block-non_repeatable"):
        path = FIXTURES / "upstream" / "nydus" / "repeatable" / name
        text = path.with_name(f"{name}.result").read_text()
        listing, end = json.JSONDecoder().raw_decode(text)
        sums = dict(reversed(line.split("  ")) for line in text[end:].split("\n") if line)
        with open_bootstrap(path) as image, open_blobs(image, path.parent / "blobs") as blobs:
            found = {os.fsdecode(path): entry for path, entry in image.walk()}
            assert {path: entry.dtype for path, entry in found.items()} == {
                path: kinds[kind] for path, kind in paths(listing)
            }
            files = {f"/{path}": entry.ino for path, entry in found.items() if entry.dtype == 8}
            assert sums == {
                path: hashlib.md5(b"".join(blobs.read_file(ino))).hexdigest() for path, ino in files.items()
            }
            assert len(sums) == 23  # and 4 links


def test_a_cached_table_of_upstreams_nydusd() -> None:
    """The gzip layer is not here: entries, contexts and dictionaries must fit each other."""
    path = next((FIXTURES / "upstream" / "nydus" / "zran").glob("*.blob.meta"))
    data = path.read_bytes()
    header = blobmeta.unpack_header(data[-4096:], len(data) - 4096)
    contexts = [
        zran.unpack_context(data, header.ci_zran_offset + number * zran.CONTEXT.size)
        for number in range(header.ci_zran_count)
    ]
    end = max(context.in_offset + context.in_len for context in contexts)
    entries = [blobmeta.unpack_v2(data, 24 * number) for number in range(header.ci_entries)]
    last = entries[-1]
    blob = Blob(
        0, path.name, 1 << 20, header.ci_entries, Compressor.GZIP, Digester.SHA256, BlobFeatures(0x1D), end,
        last.uncompressed_offset + last.uncompressed_size, end, ci_compressor=header.ci_compressor,
        ci_offset=header.ci_offset, ci_compressed_size=header.ci_compressed_size,
        ci_uncompressed_size=header.ci_uncompressed_size,
    )  # fmt: skip
    meta = open_cache_form(blob, data)
    assert (len(meta), len(contexts)) == (163, 21)
    seen = set()
    for number, entry in enumerate(entries):
        chunk = Chunk(bytes(32), 0, 1, 1, entry.uncompressed_size, 0, entry.uncompressed_offset, 0, number, 0)
        unit, offset = meta.place(chunk)
        assert unit.kind == "slice" and 0 <= offset <= contexts[unit.number].out_len - entry.uncompressed_size
        assert meta.first_of(chunk, 0) == min(e.uncompressed_offset for e in entries if e.data >> 32 == unit.number)
        seen.add(unit.number)
    assert seen == set(range(21))


@pytest.mark.skipif(ref_bin("nydus-image") is None, reason="interop: no nydus-image of upstream")
def test_external_files_begin_anywhere(tmp_path: Path) -> None:
    """As a tar would hold them, behind a header of 512 bytes: the chunk addresses have only blocks of 4096."""
    program = ref_bin("nydus-image")
    assert program is not None
    content = random.Random(5).randbytes(100_000)
    crcs = ",".join(hex(crc32c(content[at : at + 0x8000])) for at in range(0, len(content), 0x8000))
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "big").write_bytes(content)
    blob = "e" * 64
    (tmp_path / blob).write_bytes(bytes(512) + content + bytes(300))
    (tmp_path / "attributes").write_text(
        f"/big type=external blob_index=0 blob_id={blob} chunk_size=32KiB chunk_0_compressed_offset=512 "
        f"compressed_size={512 + len(content) + 300} crcs={crcs}\n"
    )
    command = [program, "create", "--type", "dir-rafs", "--chunk-size", "0x8000", "--attributes", "attributes"]
    command += ["--bootstrap", "image.boot", "--blob-dir", ".", "--external-blob", "x", "src"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60, capture_output=True)
    with open_bootstrap(tmp_path / "image.external") as image, open_blobs(image, tmp_path) as blobs:
        ino = image.resolve(b"big")
        assert b"".join(blobs.read_file(ino)) == content
        assert image.extents(ino, 40_000, 10)[0].blob_offset == 40_512
        assert check_blobs(image, str(tmp_path)) == 4
        data = bytearray((tmp_path / blob).read_bytes())
        data[50_000] ^= 1
        (tmp_path / blob).write_bytes(data)
        with pytest.raises(DigestMismatch, match="CRC"):
            check_blobs(image, str(tmp_path))


# ---- chunk maps and damage


def test_chunk_map_is_kept_and_rebuilt_when_stale_or_damaged(tmp_path: Path) -> None:
    path = str(tmp_path / "map")
    with open_bootstrap(bootstrap_of("v6-zstd-blake3-1m")) as image:
        rows = [ChunkMap.open(image, path).chunk(row) for row in range(110)]
        inode = os.stat(path).st_ino
        assert len(ChunkMap.open(image, path)) == 110
        assert os.stat(path).st_ino == inode, "a good map is used as it is"
        good = Path(path).read_bytes()
        for bad in (good[:-1], b"", good[:500] + b"\xff" + good[501:], good[:20] + b"\x01" + good[21:], good + b"\0"):
            Path(path).write_bytes(bad)
            again = ChunkMap.open(image, path)
            assert [again.chunk(row) for row in range(len(again))] == rows
            assert Path(path).read_bytes() == good
    with open_bootstrap(bootstrap_of("v5-lz4-blake3-1m")) as other:
        assert [c.index for c in iter_chunks(ChunkMap.open(other, path), 0)] == list(range(110))
    assert os.listdir(tmp_path) == ["map"]
    with open_bootstrap(bootstrap_of("v6-zstd-blake3-1m")) as image, pytest.raises(RafsError, match="chunk map"):
        ChunkMap.open(image, str(tmp_path / "missing" / "map"))


@pytest.mark.parametrize("case", ["v5-lz4-blake3-1m", "v6-none-sha256-4k", "v6-zstd-blake3-1m"])
def test_no_damaged_chunk_gets_through(case: str) -> None:
    numbers = random.Random(3)
    with open_bootstrap(bootstrap_of(case)) as image:
        data = (REFERENCE / case / image.blobs[0].id).read_bytes()
        for chunk in list(iter_chunks(ChunkMap.open(image, None), 0))[::5]:
            stored = data[chunk.compressed_offset : chunk.compressed_offset + chunk.compressed_size]
            plain = decode_chunk(chunk, image.blobs[0], memoryview(stored))
            assert len(plain) == chunk.uncompressed_size
            for _ in range(20):
                bad = bytearray(stored)
                bad[numbers.randrange(len(bad))] ^= 1 << numbers.randrange(8)
                try:
                    # A flipped bit may leave the decoded bytes as they were (unused bits of zstd): that is no damage.
                    assert decode_chunk(chunk, image.blobs[0], bytes(bad)) == plain
                except (CodecError, DigestMismatch) as error:
                    assert image.blobs[0].id in str(error)
            with pytest.raises(CodecError):
                decode_chunk(chunk, image.blobs[0], stored[:-1])


def exercise(image: Bootstrap) -> None:
    """Everything a mount does, on every entry."""
    chunks = ChunkMap.open(image, None)
    for path, entry in image.walk():
        attr = image.attr(entry.ino)
        assert not (image.xattrs(entry.ino) and image.lacks_xattrs(entry.ino))
        image.resolve(path)
        if stat.S_ISREG(attr.mode):
            image.extents(entry.ino, max(attr.size - 5000, 0), 1 << 17)
            image.chunk_refs(entry.ino)
        elif stat.S_ISLNK(attr.mode):
            image.readlink(entry.ino)
    image.prefetch_inodes()
    chunks.close()


@pytest.mark.parametrize("case", ["v5-tar-rafs", "v6-none-sha256-4k", "v6-merged3", "v5-merged3", "v6-inline-notoc"])
def test_damaged_bootstraps_give_format_errors_only(case: str, tmp_path: Path) -> None:
    good = bootstrap_of(case).read_bytes()
    numbers = random.Random(case)
    path = tmp_path / "image.boot"
    seen = checked = 0
    for turn in range(150):
        bad = bytearray(good)
        if turn % 5 == 0:
            del bad[numbers.randrange(len(bad)) & ~0x7 :]
        elif turn % 5 == 1:  # a lie in the head or in a table: whole words of extremes
            at = numbers.randrange(0, min(len(bad), 20480), 4)
            bad[at : at + 4] = numbers.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80"])
        else:
            for _ in range(numbers.choice([1, 3, 40])):
                bad[numbers.randrange(len(bad))] ^= 1 << numbers.randrange(8)
        path.write_bytes(bad)
        for act in (exercise, check_bootstrap):
            try:
                with open_bootstrap(path) as image:
                    act(image)
            except RafsError as error:
                seen += 1
                assert str(error) and "\n" not in str(error)
            checked += 1
    assert 0 < seen < checked


def test_directories_that_loop_end(tmp_path: Path) -> None:
    good = bytearray(bootstrap_of("v6-merged3").read_bytes())
    with open_bootstrap(bootstrap_of("v6-merged3")) as image:
        child = image.resolve(b"/etc")
        raw = bytes(good)
        at = raw.index(child.to_bytes(8, "little"), 0x3000)
    good[at : at + 8] = (128).to_bytes(8, "little")  # /etc is the root
    path = tmp_path / "image.boot"
    path.write_bytes(good)
    with open_bootstrap(path) as image, pytest.raises(FormatError, match="reached twice"):
        list(image.walk())


def test_blob_ids_cannot_leave_their_directory(tmp_path: Path) -> None:
    good = bootstrap_of("v6-merged3").read_bytes()
    with open_bootstrap(bootstrap_of("v6-merged3")) as image:
        name = image.blobs[0].id.encode()
    for evil in (b"../../../etc/passwd", b"..", b"a\nb", b"a/b", b"\xff\xfe"):
        path = tmp_path / "image.boot"
        path.write_bytes(good.replace(name, evil.ljust(64, b"\0")))
        with pytest.raises(FormatError, match="blob id"):
            open_bootstrap(path)


@pytest.mark.interop
@pytest.mark.skipif(shared_dir() is None, reason="interop: no reference fixtures here")
def test_names_of_one_file_share_a_number_in_images_of_2022(tmp_path: Path) -> None:
    """Each name has an inode record of its own there; programs see one number all the same, nlink times."""
    shared = shared_dir()
    assert shared is not None
    packed = shared / "fixtures/upstream/nydus-snapshotter/v6-bootstrap-chunk-pos-438272.tar.gz"
    with tarfile.open(packed) as archive:
        data = next(archive.extractfile(one) for one in archive if one.name.endswith("image.boot"))
        assert data is not None
        (tmp_path / "image.boot").write_bytes(data.read())
    with open_bootstrap(tmp_path / "image.boot") as image:
        volume = ImageVolume(1, 0, image, image, FsStats("/"), True)  # type: ignore[arg-type]
        seen: dict[int, list[int]] = {}
        for _, entry in image.walk():
            attr = image.attr(entry.ino)
            number = volume.shown(volume.base | entry.ino, entry.ino)
            if attr.nlink > 1 and not stat.S_ISDIR(attr.mode):
                seen.setdefault(number, []).append(attr.nlink)
            else:
                assert number == volume.base | entry.ino
        assert seen
        assert all(links == [len(links)] * len(links) for links in seen.values())
        unpacked = [member for member, _ in members(image)]
        assert sum(member.kind == HARD_LINK for member in unpacked) == sum(len(links) - 1 for links in seen.values())
