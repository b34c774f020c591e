"""Parts of the FUSE driver that need no mount: tree of mountpoints, operations, counters, mount table, log lines."""

from __future__ import annotations

import errno
import logging
import re
import stat
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import trio
import trio.testing
from pyfuse3 import FUSEError

from nydusfs.daemon import process
from nydusfs.daemon.logs import ErrorRing, RotatingFile, UpstreamFormatter
from nydusfs.drivers import kernel
from nydusfs.drivers.fuse import FuseDriver
from nydusfs.drivers.operations import ImageOperations
from nydusfs.drivers.stats import Fop, FsStats
from nydusfs.drivers.volume import (
    INDEX_SHIFT,
    ImageVolume,
    MountExistsError,
    MountMissingError,
    PseudoTree,
    split_mountpoint,
)
from nydusfs.errors import ReadError


class Attr(NamedTuple):
    mode: int
    uid: int = 1
    gid: int = 2
    size: int = 3
    nlink: int = 1
    rdev: int = 0
    mtime: int = -1
    mtime_nsec: int = 500_000_000
    blocks: int = 8


class Entry(NamedTuple):
    name: bytes
    ino: int
    cookie: int


class TinyImage:
    """Root 7 with file `f` (8); content is the image's letter."""

    root = 7
    inode_count = 2

    def __init__(self, letter: bytes) -> None:
        self.letter = letter

    def attr(self, ino: int) -> Attr:
        return Attr(stat.S_IFDIR | 0o755 if ino == 7 else stat.S_IFREG | 0o644)

    def lookup(self, parent: int, name: bytes) -> int:
        return 8 if (parent, name) == (7, b"f") else 0

    def list_dir(self, ino: int, cookie: int = 0) -> Iterator[Entry]:
        if cookie < 5:
            yield Entry(b"f", 8, 5)

    def readlink(self, ino: int) -> bytes:
        raise ReadError("no link", errno.EINVAL)

    def xattrs(self, ino: int) -> dict[bytes, bytes]:
        return {b"user.a": b"1"}

    async def read(self, ino: int, offset: int, size: int) -> bytes:
        if self.letter == b"!":
            await trio.sleep_forever()
        return self.letter * size


def volume(index: int, letter: bytes = b"a") -> ImageVolume:
    image = TinyImage(letter)
    return ImageVolume(index, 0, image, image, FsStats("/x"), True)


def test_tree_of_mountpoints() -> None:
    tree = PseudoTree()
    one, two = volume(1), volume(2)
    change = tree.attach(split_mountpoint("/a/b/c"), one)
    assert change == (1, b"a"), "the topmost new name is what the kernel may remember as absent"
    with pytest.raises(MountExistsError):
        tree.check_free([b"a", b"b", b"c"])
    with pytest.raises(MountExistsError, match="/a/b/c"):
        tree.check_free([b"a", b"b", b"c", b"d"])
    with pytest.raises(MountExistsError):
        tree.check_free([b"a"])
    with pytest.raises(MountExistsError):
        tree.check_free([])
    tree.attach(split_mountpoint("/a/x"), two)
    a = tree.lookup(1, b"a")
    assert a < 1 << INDEX_SHIFT
    assert [name for name, _, _ in tree.list_dir(a, 0)] == [b"b", b"x"]
    assert tree.lookup(a, b"x") == two.root_node
    (_, _, cookie), *_ = tree.list_dir(a, 0)
    assert [name for name, _, _ in tree.list_dir(a, cookie)] == [b"x"]
    image, change = tree.detach([b"a", b"x"])
    assert image is two
    assert change == (a, b"x")
    assert tree.lookup(a, b"x") == 0
    with pytest.raises(MountMissingError):
        tree.detach([b"a", b"x"])
    tree.detach([b"a", b"b", b"c"])
    tree.attach([], two)
    assert tree.root_image is two


@pytest.mark.parametrize("path", ["", "a", "a/b", "/a/../b", "/./a", "/\0", "/" + "n" * 256])
def test_mountpoints_that_are_none(path: str) -> None:
    with pytest.raises(ValueError, match="mountpoint"):
        split_mountpoint(path)


@pytest.mark.trio
async def test_operations_route_by_number_and_stale_numbers_meet_nobody() -> None:
    operations = ImageOperations()
    one = volume(3)
    operations.images[3] = one
    operations.tree.attach([b"x"], one)
    context = object()
    root = await operations.lookup(1, b"x", context)  # type: ignore[arg-type]
    assert root.st_ino == 3 << INDEX_SHIFT | 7
    assert root.entry_timeout == 2**32
    file = await operations.lookup(root.st_ino, b"f", context)  # type: ignore[arg-type]
    assert (file.st_mode, file.st_uid, file.st_gid, file.st_size, file.st_blocks) == (0o100644, 1, 2, 3, 8)
    assert file.st_mtime_ns == -500_000_000, "half a second before the epoch"
    absent = await operations.lookup(root.st_ino, b"nope", context)  # type: ignore[arg-type]
    assert absent.st_ino == 0
    assert absent.entry_timeout == 2**32
    info = await operations.open(file.st_ino, 0, context)  # type: ignore[arg-type]
    assert info.keep_cache
    assert await operations.read(info.fh, 0, 4) == b"aaaa"
    assert one.stats.public()["data_read"] == 4
    assert one.stats.hits[Fop.READ] == 1
    with pytest.raises(FUSEError) as caught:
        await operations.readlink(file.st_ino, context)  # type: ignore[arg-type]
    assert caught.value.errno == errno.EINVAL
    assert one.stats.errors[Fop.READLINK] == 1
    del operations.images[3]
    operations.images[4] = volume(4, b"b")
    for call in (operations.getattr(file.st_ino, context), operations.read(info.fh, 0, 4)):  # type: ignore[arg-type]
        with pytest.raises(FUSEError) as caught:
            await call
        assert caught.value.errno == errno.ESTALE


@pytest.mark.trio
async def test_cancelled_reads_answer_eio_and_the_waiter_sees_them_end() -> None:
    operations = ImageOperations()
    stuck, fine = volume(1, b"!"), volume(2)
    operations.images |= {1: stuck, 2: fine}
    outcome: list[int] = []

    async def read() -> None:
        try:
            await operations.read(stuck.base | 8, 0, 4)
        except FUSEError as error:
            outcome.append(error.errno)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            assert len(operations.inflight) == 2
            assert operations.cancel_reads(fine) == 0
            assert operations.cancel_reads(stuck) == 2
            await operations.wait_idle(stuck)
    assert outcome == [errno.EIO, errno.EIO]
    assert stuck.stats.errors[Fop.READ] == 2


@pytest.mark.trio
async def test_image_indexes_are_not_used_again_soon() -> None:
    driver = FuseDriver("/nowhere")
    image = TinyImage(b"a")
    seen: set[int] = set()
    for _ in range(1000):
        await driver.mount("/x", image, image, FsStats("/x"), serve_xattrs=True)
        seen |= driver.operations.images.keys()
        await driver.umount("/x")
    assert len(seen) == 1000
    assert not driver.operations.images


def test_latest_files_are_ranges_and_cleared_by_asking() -> None:
    stats = FsStats("/", files=True, access_pattern=True, latest_files=True)
    for ino in (5, 1, 2, 3, 12, 13, 8, 4):
        stats.count_read(ino, 4096, 100, 150_000)
    assert stats.take_latest() == [[1, 5], [8], [12, 13]]
    assert stats.take_latest() == []
    assert [entry["ino"] for entry in stats.pattern()] == [1, 2, 3, 4, 5, 8, 12, 13]
    assert stats.files()["5"]["data_read"] == 100
    public = stats.public()
    assert public["block_count_read"] == [0, 0, 8, 0, 0, 0, 0, 0]
    assert public["read_latency_dist"] == [8, 0, 0, 0, 0, 0, 0, 0]


def test_mountinfo_with_odd_paths() -> None:
    text = (
        "22 1 0:20 / /proc rw,nosuid shared:5 - proc proc rw\n"
        "90 1 0:55 / /a\\040b\\011c\\134d ro,relatime - fuse rafs ro,user_id=0\n"
        "garbage\n"
    )
    entries = kernel.parse_mountinfo(text)
    assert [entry.mountpoint for entry in entries] == ["/proc", "/a b\tc\\d"]
    assert entries[1] == ("/a b\tc\\d", "fuse", "rafs", 0, 55)


def test_missing_or_wrong_fuse_device(tmp_path: object) -> None:
    with pytest.raises(kernel.MountError, match="does not exist"):
        kernel.check_fuse_device(f"{tmp_path}/fuse")
    with pytest.raises(kernel.MountError, match="not a device"):
        kernel.check_fuse_device(str(tmp_path))


def test_refused_file_limit_is_clamped_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits = (1024, 4096)
    granted = []

    def set_limit(_: int, wanted: tuple[int, int]) -> None:
        if wanted[1] > 4096:
            raise ValueError("not allowed to raise maximum limit")
        granted.append(wanted)

    monkeypatch.setattr("resource.getrlimit", lambda _: limits)
    monkeypatch.setattr("resource.setrlimit", set_limit)
    with caplog.at_level(logging.INFO):
        process.raise_nofile_limit(1_000_000)
        process.raise_nofile_limit(0)
    assert granted == [(4096, 4096)]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert caplog.messages[1] == "Set rlimit-nofile to 4096, maximum 4096"


def record(message: str, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("n", level, "/x/file.py", 7, message, None, None)


def test_log_lines_look_like_upstreams() -> None:
    line = UpstreamFormatter().format(record("RAFS filesystem imported\nforged"))
    assert re.fullmatch(
        r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6} [+-]\d\d:\d\d\] INFO RAFS filesystem imported\\nforged", line
    )
    assert " WARN " in UpstreamFormatter().format(record("x", logging.WARNING))
    assert "] DEBUG [file.py:7] x" in UpstreamFormatter().format(record("x", logging.DEBUG))


def test_log_rotation_keeps_ten_compressed_files(tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "nydusd.log"
    handler = RotatingFile(path, 200)
    handler.setFormatter(UpstreamFormatter())
    for number in range(60):
        handler.emit(record(f"line {number} " + "x" * 100))
    packed = sorted(path.parent.glob("nydusd.log.*.gz"))
    assert len(packed) == 10
    assert path.stat().st_size < 400


def test_error_ring_is_bounded() -> None:
    ring = ErrorRing()
    for number in range(600):
        ring.emit(record(f"Failed in reading backend {number}", logging.ERROR))
    public = ring.public()
    assert public["total_errors"] == len(public["errors"]) == 500
    assert re.match(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT - Failed", public["errors"][0])
    ring.emit(record("y" * 60_000, logging.ERROR))
    assert ring.public()["total_size"] <= 51200
