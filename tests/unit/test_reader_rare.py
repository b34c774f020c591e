"""Parts of the format that no current builder writes but readers must know: v5 holes, shared xattrs of EROFS."""

from __future__ import annotations

import json
import stat
import struct
from pathlib import Path

import pytest
import trio

from bootstrap.base import HOLE, Extent
from bootstrap.blobsource import open_blobs
from bootstrap.check import check_bootstrap
from bootstrap.chunktable import ChunkTable
from bootstrap.errors import FormatError
from bootstrap.flat import flatten
from bootstrap.layout import v5, v6
from bootstrap.layout.common import CHUNK_RECORD, SuperFlags
from bootstrap.reader import open_bootstrap
from bootstrap.reader_v5 import BootstrapV5
from bootstrap.tree import Node
from bootstrap.write_v6 import write_v6
from nydusfs.config import load_config
from nydusfs.services import open_services
from tests.lab.handmade import CHUNK, make


def with_hole(folder: Path) -> tuple[bytes, bytes]:
    """An image whose file `f` has chunks for its first and third part only; the chunks' contents."""
    parts = [bytes([65 + number]) * CHUNK for number in range(4)]
    made = make("v5-gzip", folder, {b"f": b"".join(parts)})
    data = bytearray(made.boot.read_bytes())
    with open_bootstrap(made.boot) as image:
        assert isinstance(image, BootstrapV5)
        at = image._at(image.resolve(b"f"))
    record = list(v5.INODE.unpack_from(data, at))
    fields = v5.Inode._fields
    record[fields.index("flags")] |= v5.INODE_HAS_HOLE
    record[fields.index("child_count")] = 2
    v5.INODE.pack_into(data, at, *record)
    second = at + 128 + 8 + CHUNK_RECORD.size
    chunk = list(CHUNK_RECORD.unpack_from(data, second))
    assert chunk[7] == CHUNK
    chunk[7] = 2 * CHUNK
    CHUNK_RECORD.pack_into(data, second, *chunk)
    made.boot.write_bytes(data)
    return parts[0], parts[1]


def test_holes_of_v5_files_are_zeros(tmp_path: Path) -> None:
    first, third = with_hole(tmp_path / "image")
    whole = first + bytes(CHUNK) + third + bytes(CHUNK)
    with open_bootstrap(tmp_path / "image/image.boot") as image:
        ino = image.resolve(b"f")
        assert [e[0] for e in image.extents(ino, 0, 1 << 20)] == [0, HOLE, 0, HOLE]
        assert image.extents(ino, CHUNK + 5, 10) == [Extent(HOLE, 0, 10, CHUNK + 5)]
        for offset in range(0, 4 * CHUNK, CHUNK // 2 - 3):
            for size in (1, CHUNK, 3 * CHUNK):
                position = offset
                for extent in image.extents(ino, offset, size):
                    assert extent.file_offset == position and extent.size > 0
                    position += extent.size
                assert position == min(offset + size, len(whole))
        with open_blobs(image, tmp_path / "image") as blobs:
            assert b"".join(blobs.read_file(ino)) == whole

    async def main() -> None:
        backend = {"type": "localfs", "config": {"dir": str(tmp_path / "image")}}
        cache = {"type": "blobcache", "config": {"work_dir": str(tmp_path / "cache")}}
        config = load_config(json.dumps({"device": {"backend": backend, "cache": cache}, "mode": "direct"}), "test")
        async with open_services() as services:
            reader = await services.open_image(str(tmp_path / "image/image.boot"), config, name="holes")
            for step in (5000, 1 << 20):
                parts = [await reader.read(ino, at, step) for at in range(0, len(whole), step)]
                assert b"".join(parts) == whole
                await services.scheduler.idle()
                now = await trio.to_thread.run_sync(reader.read_now, ino, 100, 3 * CHUNK)
                assert now is not None and b"".join(now) == whole[100 : 100 + 3 * CHUNK]
            await reader.prefetch()
            reader.close()

    trio.run(main)


def test_holes_in_disorder_are_refused(tmp_path: Path) -> None:
    with_hole(tmp_path)
    data = bytearray((tmp_path / "image.boot").read_bytes())
    with open_bootstrap(tmp_path / "image.boot") as image:
        assert isinstance(image, BootstrapV5)
        at = image._at(image.resolve(b"f")) + 128 + 8
    struct.pack_into("<Q", data, at + 64, 3 * CHUNK)
    (tmp_path / "image.boot").write_bytes(data)
    with open_bootstrap(tmp_path / "image.boot") as image, pytest.raises(FormatError, match="into the next one"):
        image.extents(image.resolve(b"f"), 0, 4 * CHUNK)


def shared_xattrs(path: Path, number: int) -> None:
    """An image whose `d` has one inline attribute and shared one `number` of two."""
    root, node = Node(b"/", stat.S_IFDIR | 0o755), Node(b"d", stat.S_IFDIR | 0o755)
    assert root.children is not None
    root.children[b"d"], node.parent = node, root
    node.xattrs = {b"trusted.own": b"value of my own"}
    flags = SuperFlags.COMPRESS_ZSTD | SuperFlags.HASH_BLAKE3 | SuperFlags.ENCRYPT_NONE
    data = bytearray(write_v6(flatten(root, ChunkTable(), [], 0x100000), chunk_size=0x100000, flags=flags, prefetch=[]))
    path.write_bytes(data)
    with open_bootstrap(path) as image:
        area = image.inode_offset(image.resolve(b"d")) + 64  # type: ignore[attr-defined]
    # Instead of the inline attribute: a shared one and a shorter inline one in as many bytes.
    own = v6.XATTR_ENTRY.pack(1, 1, 15) + b"xhello and hello"
    body = v6.XATTR_HEADER.pack(0, 1) + v6.SHARED_XATTR.pack(number) + own
    assert v6.xattr_area_size(struct.unpack_from("<H", data, area - 62)[0]) == len(body)
    data[area : area + len(body)] = body
    entries = [v6.XATTR_ENTRY.pack(3, 1, 4) + b"onetwo!".ljust(8, b"\0"), v6.XATTR_ENTRY.pack(1, 6, 2) + b"y!!\0"]
    block = len(data) // 4096
    data += b"".join(entries).ljust(4096, b"\0")
    struct.pack_into("<I", data, 1024 + 44, block)
    path.write_bytes(data)


def test_shared_xattrs(tmp_path: Path) -> None:
    path = tmp_path / "image.boot"
    for number, expected in ((0, {b"user.one": b"two!"}), (3, {b"security.y": b"!!"})):
        shared_xattrs(path, number)
        with open_bootstrap(path) as image:
            assert image.xattrs(image.resolve(b"d")) == {**expected, b"user.x": b"hello and hello"}
            assert not image.lacks_xattrs(image.resolve(b"d"))
            with pytest.raises(FormatError, match="shared xattrs"):
                check_bootstrap(image)  # our builder and upstream's write none
    for number in (1 << 20, 1023):
        shared_xattrs(path, number)
        with open_bootstrap(path) as image, pytest.raises(FormatError, match=r"shared attribute|name index|reach"):
            image.xattrs(image.resolve(b"d"))
