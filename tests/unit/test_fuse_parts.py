"""Parts of the FUSE driver that need no mount: tree of mountpoints, operations, counters, mount table, log lines."""

from __future__ import annotations

import errno
import gzip
import logging
import os
import re
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import pytest
import trio

from nydusfs.daemon import process
from nydusfs.daemon.logs import ErrorRing, RotatingFile, UpstreamFormatter
from nydusfs.drivers import kernel
from nydusfs.drivers.connection import Connection
from nydusfs.drivers.fuse import FuseDriver
from nydusfs.drivers.fuse_abi import (
    DIRENT,
    ENTRY_OUT,
    GETXATTR_IN,
    IN_HEADER,
    INTERRUPT_IN,
    OUT_HEADER,
    READ_IN,
    Opcode,
)
from nydusfs.drivers.operations import FuseError, ImageOperations, RequestLoop
from nydusfs.drivers.stats import Fop, FsStats
from nydusfs.drivers.volume import (
    INDEX_SHIFT,
    MAX_INDEX,
    ImageVolume,
    MountExistsError,
    MountMissingError,
    PseudoTree,
    split_mountpoint,
)
from nydusfs.errors import ReadError
from nydusfs.hands import Hands
from tests.lab.process import wait_until


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
    dtype: int = 8


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
        return {b"user.a": b"one"}

    def lacks_xattrs(self, ino: int) -> bool:
        return ino == 9

    async def read_parts(self, ino: int, offset: int, size: int) -> list[bytes]:
        if self.letter == b"!":
            await trio.sleep_forever()
        return [self.letter * size]

    def read_now(self, ino: int, offset: int, size: int, pid: int, hands: Hands) -> None:
        return None


class Crowd(TinyImage):
    """A directory of 500 names of many lengths."""

    def __init__(self) -> None:
        super().__init__(b"c")

    def list_dir(self, ino: int, cookie: int = 0) -> Iterator[Entry]:
        for number in range(cookie, 500):
            yield Entry(b"n" * (number % 60 + 1) + b"%d" % number, 1000 + number, number + 1)


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
    assert [name for name, *_ in tree.list_dir(a, 0)] == [b"b", b"x"]
    assert tree.lookup(a, b"x") == two.root_node
    (_, _, cookie, _), *_ = tree.list_dir(a, 0)
    assert [name for name, *_ in tree.list_dir(a, cookie)] == [b"x"]
    image, change = tree.detach([b"a", b"x"])
    assert image is two
    assert change == (a, b"x")
    assert tree.lookup(a, b"x") == 0
    with pytest.raises(MountMissingError):
        tree.detach([b"a", b"x"])
    tree.detach([b"a", b"b", b"c"])
    tree.attach([], two)
    assert tree.root_image is two


@pytest.mark.trio
async def test_no_number_is_used_before_the_next_worker_knows_of_it() -> None:
    """A worker may die between the moment an image is shown and the one in which it is saved."""
    driver = FuseDriver("/nowhere")
    driver.numbering = MAX_INDEX - 100, 0  # the numbers begin anew meanwhile
    saved = [driver.numbering]
    driver.promise = lambda: saved.append(driver.numbering)
    used = set[tuple[int, int]]()
    for turn in range(200):
        image = TinyImage(b"a")
        shown = await driver.mount(f"/{turn}", image, image, FsStats("/x"), serve_xattrs=True)
        used.add((shown.generation, shown.index))
        after = FuseDriver("/nowhere")
        after.numbering = saved[-1]
        following = await after.mount("/x", image, image, FsStats("/x"), serve_xattrs=True)
        assert (following.generation, following.index) > max(used)
    assert len(used) == 200
    assert len(saved) < 6, "all of the state is written each time"


def test_directories_of_a_worker_that_died_give_their_numbers_to_no_others() -> None:
    tree = PseudoTree()
    tree.attach(split_mountpoint("/a"), volume(1))
    left = tree.numbers()
    tree.attach(split_mountpoint("/b/c"), volume(2))
    known = {number for _, number in tree.numbers()[0]}
    again = PseudoTree()
    again.restore_numbers(*left)
    again.attach(split_mountpoint("/x/y"), volume(2))
    assert known.isdisjoint({number for path, number in again.numbers()[0] if path != "/a"})


def test_a_mountpoint_as_deep_as_a_path_can_be() -> None:
    """What is kept for the next worker, and where the next image may be, is found without recursion."""
    tree, path = PseudoTree(), split_mountpoint("/a" * 2000)
    tree.attach(path, volume(1))
    numbers, following = tree.numbers()
    assert len(numbers) == 2000
    with pytest.raises(MountExistsError, match="below"):
        tree.check_free([b"a"])
    again = PseudoTree()
    again.restore_numbers(numbers, following)
    assert again.numbers()[0] == numbers


@pytest.mark.parametrize("path", ["", "a", "a/b", "/a/../b", "/./a", "/\0", "/" + "n" * 256, "/a" * 2048])
def test_mountpoints_that_are_none(path: str) -> None:
    with pytest.raises(ValueError, match="mountpoint"):
        split_mountpoint(path)


def ask(opcode: Opcode, node: int, body: bytes = b"") -> bytes:
    """A request as the kernel sends it."""
    return IN_HEADER.pack(IN_HEADER.size + len(body), opcode, 1, node, 0, 0, 0, 0, 0) + body


def test_operations_route_by_number_and_stale_numbers_meet_nobody() -> None:
    operations = ImageOperations()
    one = volume(3)
    operations.images[3] = one
    operations.tree.attach([b"x"], one)

    def entry(parent: int, name: bytes) -> tuple[int, ...]:
        answer = operations.answer(Opcode.LOOKUP, parent, ask(Opcode.LOOKUP, parent, name + b"\0"))
        assert isinstance(answer, bytes)
        return ENTRY_OUT.unpack(answer)

    root, _, timeout, *_ = entry(1, b"x")
    assert (root, timeout) == (3 << INDEX_SHIFT | 7, 2**32)
    node, _, _, _, _, _, ino, size, blocks, _, mtime, _, _, nsec, _, mode, _, uid, gid, *_ = entry(root, b"f")
    assert (node, mode, uid, gid, size, blocks) == (ino, 0o100644, 1, 2, 3, 8)
    assert (mtime, nsec) == (2**64 - 1, 500_000_000), "half a second before the epoch"
    absent, _, timeout, *_ = entry(root, b"nope")
    assert (absent, timeout) == (0, 2**32)
    for opcode, code in ((Opcode.OPEN, errno.ENOSYS), (Opcode.READLINK, errno.EINVAL), (16, errno.EROFS)):
        with pytest.raises(FuseError) as caught:
            operations.answer(opcode, node, ask(opcode, node, bytes(16)))  # type: ignore[arg-type]
        assert caught.value.errno == code
    assert one.stats.errors[Fop.READLINK] == 1
    names = operations.answer(Opcode.LISTXATTR, node, ask(Opcode.LISTXATTR, node, GETXATTR_IN.pack(100, 0)))
    assert names == b"user.a\0"
    operations.answer(Opcode.STATFS, node, ask(Opcode.STATFS, node))

    def attribute(node: int, size: int, name: bytes) -> bytes | int:
        return operations.answer(Opcode.GETXATTR, node, ask(Opcode.GETXATTR, node, GETXATTR_IN.pack(size, 0) + name))

    assert attribute(node, 100, b"user.none\0") == errno.ENODATA
    assert attribute(node + 1, 100, b"user.a\0") == errno.ENODATA, "a file without any is asked for none"
    with pytest.raises(FuseError) as caught:
        attribute(node, 1, b"user.a\0")
    assert caught.value.errno == errno.ERANGE
    assert attribute(node, 100, b"user.a\0") == b"one"
    counted = [(one.stats.hits[fop], one.stats.errors[fop]) for fop in (Fop.STATFS, Fop.GETXATTR, Fop.LISTXATTR)]
    assert counted == [(0, 0), (4, 1), (1, 0)], "an attribute that is not there is no error, as upstream counts"
    del operations.images[3]
    operations.images[4] = volume(4, b"b")
    with pytest.raises(FuseError) as caught:
        operations.answer(Opcode.GETATTR, node, ask(Opcode.GETATTR, node, bytes(16)))
    assert caught.value.errno == errno.ESTALE


@pytest.mark.parametrize("plus", [False, True])
def test_directories_are_cut_at_the_size_asked_for(plus: bool) -> None:
    operations = ImageOperations()
    image = Crowd()
    operations.images[1] = ImageVolume(1, 0, image, image, FsStats("/x"), True)
    opcode = Opcode.READDIRPLUS if plus else Opcode.READDIR
    found, position = [], 0
    while True:
        body = READ_IN.pack(0, position, 4096, 0, 0, 0, 0)
        data = operations.answer(opcode, 1 << INDEX_SHIFT | 7, ask(opcode, 1 << INDEX_SHIFT | 7, body))
        assert isinstance(data, bytes)
        assert len(data) <= 4096
        if not data:
            break
        at = 0
        while at < len(data):
            if plus:
                entry = ENTRY_OUT.unpack_from(data, at)
                at += ENTRY_OUT.size
            ino, position, length, dtype = DIRENT.unpack_from(data, at)
            at += DIRENT.size
            name = bytes(data[at : at + length])
            at += (length + 7) & ~7
            if name not in (b".", b".."):
                assert dtype == 8
                assert not plus or entry[0] == ino
            found.append(name)
    assert found == [b".", b"..", *(b"n" * (n % 60 + 1) + b"%d" % n for n in range(500))]


class Socket:
    """A connection whose device is a datagram socket pair: requests in, answers out, as the kernel frames them."""

    def __init__(self) -> None:
        self.kernel, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.kernel.settimeout(60)
        self.connection = Connection(ours.detach())

    def send(self, opcode: Opcode, unique: int, node: int, body: bytes = b"") -> None:
        head = IN_HEADER.pack(IN_HEADER.size + len(body), opcode, unique, node, 0, 0, 0, 0, 0)
        self.kernel.send(head + body)

    def answer(self) -> tuple[int, int, bytes]:
        data = self.kernel.recv(1 << 20)
        size, error, unique = OUT_HEADER.unpack_from(data)
        assert size == len(data)
        return unique, -error, data[OUT_HEADER.size :]


@pytest.mark.trio
async def test_reads_wait_apart_and_end_with_eio_or_eintr(caplog: pytest.LogCaptureFixture) -> None:
    """An EIO that no source gave cause for is told too, with the file and why."""
    device = Socket()
    operations = ImageOperations()
    stuck, fine = volume(1, b"!"), volume(2)
    operations.images |= {1: stuck, 2: fine}
    loop = RequestLoop(device.connection, operations, 2)
    read = READ_IN.pack(0, 0, 4, 0, 0, 0, 0)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(loop.run)
            for unique in (1, 2, 3):
                device.send(Opcode.READ, unique, stuck.base | 8, read)
            device.send(Opcode.READ, 4, fine.base | 8, read)
            assert await trio.to_thread.run_sync(device.answer) == (4, 0, b"aaaa")
            while len(loop.inflight) < 3:  # noqa: ASYNC110
                await trio.sleep(0.01)
            device.send(Opcode.INTERRUPT, 5, 0, INTERRUPT_IN.pack(2))
            assert await trio.to_thread.run_sync(device.answer) == (2, errno.EINTR, b"")
            assert loop.cancel_reads(fine) == 0
            assert loop.cancel_reads(stuck) == 2
            await loop.wait_idle(stuck)
            answers = {await trio.to_thread.run_sync(device.answer) for _ in range(2)}
            assert answers == {(1, errno.EIO, b""), (3, errno.EIO, b"")}
            loop.closing = True
            device.send(Opcode.READ, 6, fine.base | 8, read)
            assert await trio.to_thread.run_sync(device.answer) == (6, errno.EIO, b"")
            nursery.cancel_scope.cancel()
    read_of = "image /x: read of 4 bytes at 0 of inode 8: EIO, "
    said = [message for message in caplog.messages if message.startswith("image")]
    assert said == [*[f"{read_of}the image is unmounted"] * 2, f"{read_of}this daemon stops"]
    assert stuck.stats.errors[Fop.READ] == 3
    assert fine.stats.public()["data_read"] == 4
    device.kernel.close()


@pytest.mark.trio
async def test_a_read_that_its_thread_waits_for_is_in_flight() -> None:
    """A blob in a directory that hangs never comes to the event loop; who hands over does not begin anew."""
    device = Socket()
    hanging, going_on = threading.Event(), threading.Event()

    class Hanging(TinyImage):
        def read_now(self, ino: int, offset: int, size: int, pid: int, hands: Hands) -> None:
            hands.waits()
            hanging.set()
            going_on.wait(60)

    image = Hanging(b"!")
    operations = ImageOperations()
    operations.images[1] = ImageVolume(1, 0, image, image, FsStats("/x"), True)
    loop = RequestLoop(device.connection, operations, 2)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(loop.run)
            assert loop.waiting() == {}
            node = 1 << INDEX_SHIFT | 8
            device.send(Opcode.READ, 7, node, READ_IN.pack(0, 16, 4, 0, 0, 0, 0))
            await trio.to_thread.run_sync(hanging.wait, 60)
            waiting = loop.waiting()
            assert {unique: at for unique, (at, _) in waiting.items()} == {7: node}
            going_on.set()
            while not loop.inflight:  # noqa: ASYNC110
                await trio.sleep(0.01)
            assert loop.waiting() == waiting
            assert loop.cancel_reads() == 1
            assert await trio.to_thread.run_sync(device.answer) == (7, errno.EIO, b"")
            await loop.wait_idle()
            while loop.waiting():  # noqa: ASYNC110 - its thread may not have gone on yet
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    device.kernel.close()


@pytest.mark.trio
@pytest.mark.parametrize("cached", [True, False])
async def test_a_bug_costs_one_read_and_one_line(cached: bool, caplog: pytest.LogCaptureFixture) -> None:
    device = Socket()

    class Broken(TinyImage):
        def read_now(self, ino: int, offset: int, size: int, pid: int, hands: Hands) -> None:
            if cached:
                raise RuntimeError("dictionary changed")

        async def read_parts(self, ino: int, offset: int, size: int) -> list[bytes]:
            raise RuntimeError("dictionary changed")

    image = Broken(b"a")
    operations = ImageOperations()
    operations.images[1] = ImageVolume(1, 0, image, image, FsStats("/x"), True)
    loop = RequestLoop(device.connection, operations, 1)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(loop.run)
            device.send(Opcode.READ, 2, 1 << INDEX_SHIFT | 8, READ_IN.pack(0, 16, 4, 0, 0, 0, 0))
            assert await trio.to_thread.run_sync(device.answer) == (2, errno.EIO, b"")
            nursery.cancel_scope.cancel()
    (said,) = [message for message in caplog.messages if message.startswith("image")]
    wanted = r"image /x: read of 4 bytes at 16 of inode 8: unexpected RuntimeError at test_fuse_parts.py:\d+: dict"
    assert re.match(wanted, said)
    device.kernel.close()


@pytest.mark.trio
async def test_one_thread_takes_requests_until_it_waits_for_the_disk() -> None:
    device, before = Socket(), set(threading.enumerate())
    waiting, disk = threading.Event(), threading.Event()
    takers: set[str] = set()

    class Cached(TinyImage):
        def read_now(self, ino: int, offset: int, size: int, pid: int, hands: Hands) -> list[memoryview]:  # type: ignore[override]
            takers.add(threading.current_thread().name)
            hands.begin()
            data = hands.room(size)
            if offset:
                hands.waits()
                waiting.set()
                assert disk.wait(60)
            data[:] = self.letter * size
            return [data]

    image = Cached(b"a")
    operations = ImageOperations()
    operations.images[1] = ImageVolume(1, 0, image, image, FsStats("/x"), True)
    loop = RequestLoop(device.connection, operations, 3)

    def read(unique: int, offset: int) -> None:
        device.send(Opcode.READ, unique, 1 << INDEX_SHIFT | 8, READ_IN.pack(0, offset, 4, 0, 0, 0, 0))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(loop.run)
            for unique in range(20):
                read(unique, 0)
                assert await trio.to_thread.run_sync(device.answer) == (unique, 0, b"aaaa")
            assert len(takers) == 1
            read(50, 4096)
            assert await trio.to_thread.run_sync(waiting.wait, 60)
            for unique in range(20):
                read(unique, 0)
                assert await trio.to_thread.run_sync(device.answer) == (unique, 0, b"aaaa")
            assert len(takers) == 2
            disk.set()
            assert await trio.to_thread.run_sync(device.answer) == (50, 0, b"aaaa")
            loop.hand_over()
            read(60, 0)  # for the one that waits at the device
            nursery.cancel_scope.cancel()
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("fuse-"):
            thread.join(60)
            assert not thread.is_alive()
    device.kernel.close()


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


def rotated(path: Path, limit: int = 200) -> RotatingFile:
    handler = RotatingFile(path, limit)
    handler.setFormatter(UpstreamFormatter())
    return handler


def fill(handler: RotatingFile, lines: int) -> None:
    for number in range(lines):
        handler.emit(record(f"line {number} " + "x" * 100))


def test_log_rotation_keeps_ten_compressed_files(tmp_path: Path) -> None:
    path = tmp_path / "nydusd.log"
    (tmp_path / "nydusd.log.1").write_text("of somebody else")
    fill(rotated(path), 60)
    wait_until(lambda: len(list(tmp_path.glob("nydusd.log.*T*"))) == 10, 30, "the end of the packing")
    assert all(gzip.decompress(packed.read_bytes()).endswith(b"x\n") for packed in tmp_path.glob("nydusd.log.*T*"))
    assert path.stat().st_size < 400
    assert (tmp_path / "nydusd.log.1").exists()


def test_who_logs_does_not_wait_for_a_full_file_to_be_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packers = set[threading.Thread]()

    def pack(*_: object, **_options: object) -> None:
        packers.add(threading.current_thread())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nydusfs.daemon.logs.gzip.open", pack)
    handler = rotated(tmp_path / "nydusd.log")
    fill(handler, 60)
    wait_until(lambda: packers and not any(packer.is_alive() for packer in packers), 30, "the end of the packing")
    assert threading.current_thread() not in packers
    wait_until(lambda: len(list(tmp_path.glob("nydusd.log.*"))) <= 10, 30, "the end of what is too old")
    monkeypatch.undo()
    fill(handler, 4)
    wait_until(lambda: {path.suffix for path in tmp_path.glob("nydusd.log.*")} == {".gz"}, 30, "the packing")


def test_a_log_file_that_cannot_be_made_anew_is_no_error_of_who_logs(tmp_path: Path) -> None:
    """A disk without room for one more file, when the full one was moved aside."""
    path = tmp_path / "nydusd.log"
    handler = rotated(path)
    make = handler._open

    def full() -> IO[str]:
        raise OSError(errno.ENOSPC, "No space left on device")

    handler._open = full  # type: ignore[method-assign]
    fill(handler, 5)
    handler._open = make  # type: ignore[method-assign]
    handler.emit(record("there is room again"))
    handler.emit(record("and it goes on"))
    assert "it goes on" in path.read_text()


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_file_name_of_any_bytes_can_be_logged_to_stdout(form: str) -> None:
    """A terminal's or a journal's locale, such as en_US.UTF-8, has no room for half a character."""
    code = (
        "import logging, os; from nydusfs.daemon import logs; logs.set_up('info', None, 0, sys.argv[1]); "
        "logging.error('Failed in reading backend: file %s', os.fsdecode(b'/caf\\xe9'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}", form], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )  # fmt: skip
    assert "backend: file /caf\\udce9" in done.stdout
    assert done.stderr == ""


def test_error_ring_is_bounded() -> None:
    ring = ErrorRing()
    for number in range(600):
        ring.emit(record(f"Failed in reading backend {number}", logging.ERROR))
    public = ring.public()
    assert public["total_errors"] == len(public["errors"]) == 500
    assert re.match(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT - Failed", public["errors"][0])
    ring.emit(record("y" * 60_000, logging.ERROR))
    assert ring.public()["total_size"] <= 51200
