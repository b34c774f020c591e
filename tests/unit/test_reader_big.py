"""A directory of 100,000 files: time and memory of opening, looking up, listing; and inodes of the compact kind."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bootstrap.chunktable import BlobInfo, ChunkTable
from bootstrap.flat import flatten
from bootstrap.layout import v6
from bootstrap.layout.common import BlobFeatures, ChunkFlags, Compressor, Digester, SuperFlags
from bootstrap.reader import open_bootstrap
from bootstrap.tree import Node
from bootstrap.write_v5 import write_v5
from bootstrap.write_v6 import write_v6

COUNT = 100_000
FLAGS = SuperFlags.COMPRESS_ZSTD | SuperFlags.HASH_BLAKE3 | SuperFlags.EXPLICIT_UIDGID


def big_tree() -> tuple[Node, ChunkTable, list[BlobInfo]]:
    blob = BlobInfo("b" * 64, 0x100000, Compressor.ZSTD, Digester.BLAKE3, BlobFeatures(0x4000_0001))
    blob.chunk_count, blob.uncompressed_size, blob.compressed_size = COUNT, COUNT * 4096, COUNT * 100
    blob.ci_offset, blob.ci_uncompressed_size = COUNT * 100, COUNT * 16
    table = ChunkTable()
    home = table.place_of(blob)
    root, directory = Node(b"/", stat.S_IFDIR | 0o755), Node(b"big", stat.S_IFDIR | 0o755)
    assert root.children is not None and directory.children is not None
    root.children[b"big"] = directory
    directory.parent = root
    for number in range(COUNT):
        node = Node(b"file-%06d" % number, stat.S_IFREG | 0o644)
        node.size, node.parent = 3000, directory
        place = number * 4096
        digest = number.to_bytes(32, "big")
        node.add_chunk(table.add(digest, home, ChunkFlags.COMPRESSED, 100, 3000, number * 100, place, number, 0))
        directory.children[node.name] = node
    return root, table, [blob]


@pytest.fixture(scope="module", params=[5, 6])
def big_image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = flatten(*big_tree(), 0x100000)
    path = tmp_path_factory.mktemp("big") / "image.boot"
    if request.param == 6:
        data = write_v6(tree, chunk_size=0x100000, flags=FLAGS | SuperFlags.ENCRYPT_NONE, prefetch=[])
    else:
        data = write_v5(tree, chunk_size=0x100000, flags=FLAGS, prefetch=[])
    path.write_bytes(data)
    return path


MEASURE = """
import gc, json, sys, time
from bootstrap.reader import open_bootstrap
from bootstrap.chunkmap import ChunkMap
def anonymous():
    gc.collect()
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
path, table = sys.argv[1:]
with open_bootstrap(path) as image:  # whatever first use costs
    ChunkMap.open(image, table).close()
    next(image.walk()), image.attr(image.root), image.extents(image.resolve(b"/big/file-000001"), 0, 1)
before = anonymous()
started = time.process_time()
images = [open_bootstrap(path) for _ in range(2)]
opened = time.process_time() - started
maps = [ChunkMap.open(image, table) for image in images]
for image, chunks in zip(images, maps):
    for _, entry in image.walk():
        image.attr(entry.ino)
        if entry.dtype == 8:
            extent = image.extents(entry.ino, 0, 4096)[0]
            chunks.find(extent.blob_index, extent.blob_offset)
print(json.dumps({"kb": (anonymous() - before) / 2, "open": opened / 2}))
"""


def test_memory_per_image_does_not_depend_on_its_size(big_image: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(big_image), str(tmp_path / "map")],
        capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["kb"] < 100, found
    assert found["open"] < 0.05, found


def test_resuming_deep_in_a_directory_costs_nothing(big_image: Path) -> None:
    with open_bootstrap(big_image) as image:
        directory = image.lookup(image.root, b"big")
        entries = list(image.list_dir(directory))
        assert [entry.name for entry in entries] == [b"file-%06d" % number for number in range(COUNT)]
        assert len({entry.ino for entry in entries}) == COUNT
        started = time.process_time()
        for number in range(0, COUNT - 1, 997):
            assert next(image.list_dir(directory, entries[number].cookie)) == entries[number + 1]
            assert image.lookup(directory, b"file-%06d" % number) == entries[number].ino
            assert image.lookup(directory, b"file-%06dx" % number) == 0
        assert time.process_time() - started < 1.0  # 0.02 s; a scan from the start would take 10 s
        assert list(image.list_dir(directory, entries[-1].cookie)) == []


def test_compact_inodes(tmp_path: Path) -> None:
    """Written by no current builder, but part of the format: made here from the inodes of a small image."""
    root = Node(b"/", stat.S_IFDIR | 0o755)
    device, link = Node(b"dev", stat.S_IFCHR | 0o600), Node(b"link", stat.S_IFLNK | 0o777)
    device.rdev, device.uid, device.gid, link.target = v6.encode_rdev(259, 300), 7, 8, b"dev"
    link.xattrs = {b"trusted.x": b"y"}
    assert root.children is not None
    for node in (device, link):
        node.parent = root
        root.children[node.name] = node
    flags = FLAGS | SuperFlags.ENCRYPT_NONE
    data = bytearray(write_v6(flatten(root, ChunkTable(), [], 0x100000), chunk_size=0x100000, flags=flags, prefetch=[]))
    path = tmp_path / "image.boot"
    path.write_bytes(data)
    with open_bootstrap(path) as image:
        old = {name: (image.resolve(name), image.attr(image.resolve(name))) for name in (b"dev", b"link")}
        offsets = {name: v6.NID_UNIT * ino for name, (ino, _) in old.items()}
    for at in offsets.values():
        form, icount, mode, _, size, union, number, uid, gid, _, _, nlink = v6.INODE_EXTENDED.unpack_from(data, at)
        rest = bytes(data[at + 64 : at + 128]) if icount else b""  # xattrs and target follow the shorter inode
        v6.INODE_COMPACT.pack_into(data, at, form & ~1, icount, mode, nlink, size, 0, union, number, uid, gid)
        data[at + 32 : at + 32 + len(rest)] = rest
    path.write_bytes(data)
    with open_bootstrap(path) as image:
        for name, (ino, attr) in old.items():
            assert image.attr(ino) == attr._replace(mtime=0, mtime_nsec=0), name
        assert image.attr(image.resolve(b"dev")).rdev == 0x11032C
        assert image.readlink(image.resolve(b"link")) == b"dev"
        assert image.xattrs(image.resolve(b"link")) == {b"trusted.x": b"y"}
