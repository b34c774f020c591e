"""What the kernel says of inodes at the edges of what their short form can hold."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest

from bootstrap.chunktable import BlobInfo
from bootstrap.erofs_devices import Device
from bootstrap.flat import INODE, FlatTree
from bootstrap.layout.common import BlobFeatures, Compressor, Digester, super_flags
from bootstrap.layout.tables import CHUNK
from bootstrap.reader import open_bootstrap
from bootstrap.write_erofs import ErofsImage
from bootstrap.write_v5 import write_v5
from bootstrap.write_v6 import write_v6
from nydusfs.drivers.erofs import mount
from tests.lab.erofs import cannot_mount_erofs

pytestmark = [pytest.mark.root, pytest.mark.skipif(cannot_mount_erofs() != "", reason=cannot_mount_erofs())]
CHUNK_SIZE = 1 << 20
EDGES: list[dict[str, int]] = [
    {},
    {"uid": 0xFFFF, "gid": 0xFFFF},
    {"uid": 0x10000},
    {"gid": 0xFFFF_FFFE},
    {"mtime": 0xFFFF_FFFF},
    {"mtime": 1 << 32},
    {"mtime": -1},
    {"mtime": 1_700_000_000, "mtime_nsec": 5},
    {"size": 0},
    {"size": 4096},
    {"size": 1 << 32},
    {"size": (1 << 32) - 1, "mode": stat.S_IFREG | 0o4711},
    {"size": 0, "mode": stat.S_IFIFO | 0o600},
    {"size": 0, "mode": stat.S_IFCHR | 0o600, "rdev": 0x11032C},
]
XATTRS = {b"user.a": b"1", b"security.capability": bytes.fromhex("00000002") + bytes(16)}


@pytest.mark.parametrize("version", [5, 6])
@pytest.mark.parametrize("with_xattrs", [False, True])
def test_attributes_at_the_edges(tmp_path: Path, version: int, with_xattrs: bool) -> None:
    inodes = np.zeros(1 + len(EDGES), INODE)
    inodes["xattrs"] = 0 if with_xattrs else -1
    inodes["mode"], inodes["size"], inodes["mtime"] = stat.S_IFREG | 0o644, 100, 1_600_000_000
    inodes["mode"][0], inodes["size"][0] = stat.S_IFDIR | 0o755, 0
    inodes["first"][0], inodes["count"][0] = 1, len(EDGES)
    for row, edge in enumerate(EDGES, 1):
        for field, value in edge.items():
            inodes[field][row] = value
    counts = -(-inodes["size"] // CHUNK_SIZE)
    inodes["count"][1:], inodes["first"][1:] = counts[1:], (np.cumsum(counts) - counts)[1:]
    refs = np.zeros(int(counts.sum()), np.int64)  # one chunk is everything
    chunks = np.zeros(1, CHUNK)
    chunks["uncompressed_size"] = chunks["compressed_size"] = CHUNK_SIZE
    blob = BlobInfo(
        id="ab" * 32, chunk_size=CHUNK_SIZE, compressor=Compressor.NONE, digester=Digester.BLAKE3,
        features=BlobFeatures(0), chunk_count=1, compressed_size=CHUNK_SIZE, uncompressed_size=CHUNK_SIZE,
        ci_uncompressed_size=16,
    )  # fmt: skip
    names = [b"/" if version == 5 else b"", *(b"f%02d" % row for row in range(len(EDGES)))]
    tree = FlatTree(names, inodes, refs, chunks, [blob], [XATTRS] if with_xattrs else [])
    flags = super_flags(Compressor.NONE, Digester.BLAKE3)
    write = write_v5 if version == 5 else write_v6
    (tmp_path / "boot").write_bytes(write(tree, chunk_size=CHUNK_SIZE, flags=flags, prefetch=()))
    data = os.urandom(CHUNK_SIZE)
    (tmp_path / "device").write_bytes(data)

    image = open_bootstrap(str(tmp_path / "boot"))
    with (tmp_path / "a").open("w+b") as one, (tmp_path / "b").open("w+b") as other:
        writer = ErofsImage(image, one, other, xattrs=True)
        writer.scan()
        made = bytearray(writer.size(1))
        devices = [Device("d", CHUNK_SIZE // 4096)]
        writer.write(memoryview(made), devices, lambda found: (0 * found.blobs, found.offsets))
    image.close()
    (tmp_path / "image").write_bytes(made)

    mounted = mount.open_erofs(str(tmp_path / "image"), [str(tmp_path / "device")])
    try:
        root = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=mounted)
        assert sorted(os.listdir(root)) == [name.decode() for name in names[1:]]
        for row, name in enumerate(names[1:], 1):
            info, want = os.stat(name, dir_fd=mounted, follow_symlinks=False), inodes[row]
            assert (info.st_uid, info.st_gid, info.st_mode) == (want["uid"], want["gid"], want["mode"]), name
            assert info.st_mtime_ns == int(want["mtime"]) * 10**9 + int(want["mtime_nsec"]), name
            assert (info.st_size, info.st_nlink) == (want["size"], 1), name
            if stat.S_ISCHR(info.st_mode):
                assert (os.major(info.st_rdev), os.minor(info.st_rdev)) == (259, 300)
            if stat.S_ISREG(info.st_mode):
                file = os.open(name, os.O_RDONLY, dir_fd=mounted)
                try:
                    assert os.pread(file, 100, 0) == data[:100][: info.st_size]
                    end = max(info.st_size - 10, 0)
                    assert os.pread(file, 10, end) == data[end % CHUNK_SIZE :][: min(10, info.st_size)]
                    found = {one: os.getxattr(file, one) for one in os.listxattr(file)}
                    assert found == ({key.decode(): value for key, value in XATTRS.items()} if with_xattrs else {})
                finally:
                    os.close(file)
        assert os.fstat(root).st_nlink == 2
        os.close(root)
    finally:
        os.close(mounted)
