"""The parts of the EROFS driver that need no kernel: metadata images, device files, the journal."""

from __future__ import annotations

import errno
import logging
import os
import random
import resource
import shutil
import stat
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import numpy as np
import pytest
import trio

from bootstrap import write_erofs
from bootstrap.base import Bootstrap
from bootstrap.chunktable import BlobInfo
from bootstrap.erofs_devices import Device, read_devices
from bootstrap.errors import BuildError, FormatError
from bootstrap.flat import INODE, FlatTree
from bootstrap.layout.common import BlobFeatures, Compressor, Digester, super_flags
from bootstrap.layout.tables import CHUNK
from bootstrap.reader import open_bootstrap
from bootstrap.write_erofs import ErofsImage
from bootstrap.write_v5 import write_v5
from bootstrap.write_v6 import write_v6
from nydusfs.cache import CacheStore
from nydusfs.cache.devices import DeviceFiles, usable, write_whole
from nydusfs.cache.leaving import Leaving
from nydusfs.cache.quota import Limit
from nydusfs.config import load_config
from nydusfs.drivers.erofs import fanotify, selftest
from nydusfs.drivers.erofs.driver import ErofsDriver
from nydusfs.drivers.erofs.filemap import FileMap
from nydusfs.drivers.erofs.filling import ErofsImage as MountedImage
from nydusfs.drivers.erofs.image import (
    PARTIAL,
    DeviceFile,
    fingerprint,
    is_scattered,
    most_devices,
    open_file_map,
    open_image,
    write_and_open,
    write_image,
)
from nydusfs.drivers.erofs.journal import ENTRIES, MAX_THREADS, Journal
from nydusfs.drivers.erofs.metadata import MAX_IMAGES, prune
from nydusfs.drivers.erofs.prepared import PreparedMount
from nydusfs.drivers.volume import ImageVolume
from nydusfs.image_reader import ImageReader
from nydusfs.keeper.jobs import Jobs
from nydusfs.services import open_services
from tests.lab.cases import case as image_case
from tests.lab.daemon import localfs_config
from tests.lab.erofs import cannot_mount_erofs
from tests.lab.process import run
from tests.lab.tiny import tiny_image

BOOT = "0a1b2c3d"


@pytest.mark.parametrize(
    "name",
    ["v5-lz4-blake3-1m", "v6-zstd-blake3-1m", "v6-merged3", "v6-bigdir-prefetch-fs", "v6-batch-128k", "v6-zran-slices"],
)
def test_images_are_what_the_kernels_tools_accept(name: str, tmp_path: Path) -> None:
    """fsck.erofs reads every file through the devices, dump.erofs names them; the same image comes out twice."""
    if shutil.which("fsck.erofs") is None:
        pytest.skip("erofs: fsck.erofs (erofs-utils) is not installed")
    case = image_case(name)
    config = load_config(localfs_config(case, work_dir=tmp_path / "cache"), "test")

    async def make() -> list[Path]:
        async with open_services() as services:
            reader = await services.open_image(str(case / "image.boot"), config, name="/")
            await reader.load_tables()
            mark = fingerprint(reader.bootstrap, True)
            files = write_and_open(reader, tmp_path / "a", mark, True)
            check_file_map(reader, files, open_file_map(tmp_path / "a", mark, reader.bootstrap.chunk_size))
            assert write_and_open(reader, tmp_path / "b", mark, True) == files == open_image(tmp_path / "a", mark)
            assert open_image(tmp_path / "a", bytes(32)) is None
            assert is_scattered(tmp_path / "a") == most_in_small_files(reader.bootstrap)
            devices = []
            for number, file in enumerate(files):
                segment = reader.segment(file.blob_index, int(file.name.partition("-")[0]))
                assert (segment.name, segment.padded) == (file.name, file.size)
                devices.append(tmp_path / f"device{number}")
                with devices[-1].open("wb") as out:
                    write_whole(out.fileno(), await reader.whole(segment), segment.padded)
            reader.close()
            return devices

    devices = trio.run(make)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    words = [f"--device={device}" for device in devices]
    run(["fsck.erofs", *words, "--extract", tmp_path / "a"])
    said = run(["dump.erofs", *words, "-s", tmp_path / "a"]).stdout
    image = open_bootstrap(str(case / "image.boot"))
    assert f" {image.inode_count}\n" in said
    image.close()
    for path in (tmp_path / "a", tmp_path / "b"):
        data = bytearray(path.read_bytes())
        for at in random.Random(1).sample(range(len(data) - 4096), 20):
            damaged = bytearray(data)
            damaged[at] ^= 0x10
            path.write_bytes(damaged)
            assert open_image(path, fingerprint_of(case)) is None
        path.write_bytes(data[:-1])
        assert open_image(path, fingerprint_of(case)) is None


def test_a_cache_whose_images_come_together_has_one_set_of_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = image_case("v6-zstd-blake3-1m")
    config = load_config(localfs_config(case, work_dir=tmp_path / "cache"), "test")
    made: list[DeviceFiles] = []

    class Slow(DeviceFiles):
        def __init__(self, *args: Any) -> None:
            time.sleep(0.05)
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr("nydusfs.drivers.erofs.driver.DeviceFiles", Slow)
    found: list[bool] = []

    async def come() -> None:
        driver = ErofsDriver(str(tmp_path / "mnt"), None, "auto", Jobs())
        async with open_services() as services:
            reader = await services.open_image(str(case / "image.boot"), config, name="/")

            async def one() -> None:
                found.append(await driver.at_hand("/1", reader, None, xattrs=True))

            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(one)
            await reader.load_tables()
            mark = fingerprint(reader.bootstrap, True)
            write_and_open(reader, made[0].images / mark.hex(), mark, True)
            await one()
            reader.close()

    trio.run(come)
    assert len(made) == 1
    assert found == [False] * 8 + [True]


@pytest.mark.parametrize("how", ["given up", "stopped"])
def test_a_mount_that_is_given_up_in_the_making_leaves_nothing(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes it is a thread, which hears nothing of that: devices stayed for good, and a stop was an error."""

    async def go() -> None:
        driver = ErofsDriver(str(tmp_path / "mnt"), None, "auto", Jobs())
        reader, prepared = create_autospec(ImageReader, instance=True), create_autospec(PreparedMount, instance=True)
        prepared.store = create_autospec(CacheStore, instance=True)
        cleaned: list[object] = []

        async def end() -> None:
            if how == "stopped":
                await driver.stop(successor=False)
                assert cleaned == [prepared]
            else:
                scope.cancel()

        async def prepare(*_: object) -> None:
            driver._prepared[reader] = prepared
            nursery.start_soon(end)
            await trio.to_thread.run_sync(time.sleep, 0.2)

        monkeypatch.setattr(driver, "_prepare", prepare)
        monkeypatch.setattr(driver, "_clean", cleaned.append)
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                with trio.CancelScope() as scope:
                    await driver.attach("/1", create_autospec(ImageVolume), reader, None, xattrs=True)
        assert (cleaned, driver._prepared, driver._images) == ([prepared], {}, {})

    trio.run(go)


def test_auto_leaves_images_to_fuse_where_devices_take_much_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = image_case("v6-zstd-blake3-1m")
    config = load_config(localfs_config(case, work_dir=tmp_path / "cache"), "test")
    caplog.set_level(logging.INFO)

    async def come(held: int) -> bool:
        driver = ErofsDriver(str(tmp_path / "mnt"), None, "auto", Jobs())
        driver._images["/0"] = other = create_autospec(MountedImage, instance=True)
        other.files = [DeviceFile(0, "0-00", 4096)] * held
        async with open_services() as services:
            reader = await services.open_image(str(case / "image.boot"), config, name="/")
            try:
                hand = await driver.at_hand("/1", reader, None, xattrs=True)
                if hand:
                    await driver.attach("/1", create_autospec(ImageVolume), reader, None, xattrs=True)
                assert "/1" not in driver._images
            finally:
                reader.close()
        return hand

    assert not trio.run(come, most_devices() - 1)
    assert "fs_driver" not in caplog.text
    assert trio.run(come, most_devices()), "there is nothing to be patient for"
    assert f"kernel mounts have {most_devices()} devices" in caplog.text


def test_a_worker_starts_although_a_disk_of_the_last_ones_mounts_is_broken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies again with each start otherwise, and images on other disks are served by nobody."""
    image = tiny_image(tmp_path, {"f": b"data"})
    config = load_config(localfs_config(tmp_path, work_dir=tmp_path / "cache"), "test")
    listed = os.listdir

    def broken(path: Any = ".") -> list[str]:
        if Path(path).name == ".erofs":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return listed(path)

    async def come() -> None:
        driver = ErofsDriver(str(tmp_path / "mnt"), None, "auto", Jobs())
        driver._left = {str(tmp_path / "mnt/1")}
        async with open_services() as services:
            reader = await services.open_image(str(image.bootstrap), config, name="/")
            monkeypatch.setattr(os, "listdir", broken)
            await driver.restore("/1", create_autospec(ImageVolume), reader)
            monkeypatch.undo()
            assert "/1" not in driver._images, "`begin` detaches the mount, and FUSE below it serves"
            reader.close()

    trio.run(come)
    assert f"image /1: its kernel mount is lost: cache {tmp_path / 'cache'}: Input/output error" in caplog.text


def most_in_small_files(image: Bootstrap) -> bool:
    attrs = {entry.ino: image.attr(entry.ino) for _, entry in image.walk()}
    sizes = [attr.size for attr in attrs.values() if stat.S_ISREG(attr.mode)]
    return 2 * sum(size for size in sizes if size <= 64 << 10) >= sum(sizes) > 0


def check_file_map(reader: ImageReader, files: list[DeviceFile], found: FileMap | None) -> None:
    """Each place of each file is found again: as that file, or as another one that shares the chunk."""
    image = reader.bootstrap
    assert found is not None
    numbers = {(file.blob_index, file.name): number for number, file in enumerate(files)}
    for _, entry in image.walk():
        attr = image.attr(entry.ino)
        if not stat.S_ISREG(attr.mode):
            continue
        for offset in range(0, attr.size, 100_000):
            [piece] = reader.pieces.of(image.extents(entry.ino, offset, 1))
            assert piece.segment is not None
            device = numbers[piece.segment.blob.index, piece.segment.name]
            ino, at = found.find(device, piece.offset) or (0, 0)
            assert reader.pieces.of(image.extents(ino, at, 1)) == [piece]
    assert found.find(len(files), 0) is None


def synthetic(count: int, version: int) -> bytes:
    """The bootstrap of so many files of one chunk, 200 to a directory, in a blob that is nowhere."""
    folders = -(-count // 200)
    inodes, chunks = np.zeros(1 + folders + count, INODE), np.zeros(count, CHUNK)
    inodes["mode"][: 1 + folders], inodes["mode"][1 + folders :] = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644
    inodes["xattrs"] = -1
    inodes["first"][0], inodes["count"][0] = 1, folders
    first = np.arange(folders) * 200
    inodes["first"][1 : 1 + folders] = 1 + folders + first
    inodes["count"][1 : 1 + folders] = np.minimum(200, count - first)
    inodes["first"][1 + folders :], inodes["count"][1 + folders :] = np.arange(count), 1
    inodes["size"][1 + folders :] = 4000
    chunks["index"] = np.arange(count)
    chunks["uncompressed_offset"] = np.arange(count) * 4096
    chunks["compressed_offset"], chunks["compressed_size"] = np.arange(count) * 100, 100
    chunks["uncompressed_size"] = 4000
    names = [b"/", *(b"d%06d" % number for number in range(folders)), *(b"f%06d" % number for number in range(count))]
    blob = BlobInfo(
        id="ab" * 32, chunk_size=1 << 20, compressor=Compressor.ZSTD, digester=Digester.BLAKE3,
        features=BlobFeatures(0), chunk_count=count, compressed_size=count * 100, uncompressed_size=count * 4096,
        ci_uncompressed_size=count * 16,
    )  # fmt: skip
    tree = FlatTree(names, inodes, np.arange(count), chunks, [blob])
    flags = super_flags(Compressor.ZSTD, Digester.BLAKE3)
    write = write_v5 if version == 5 else write_v6
    return bytes(write(tree, chunk_size=1 << 20, flags=flags, prefetch=()))


@pytest.mark.parametrize("version", [5, 6])
def test_memory_does_not_grow_with_the_number_of_files(
    tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image of 40,000 files is written in what one of 10,000 takes, but for what is kept of the first walk; with
    nothing kept it is the same."""
    peaks = []
    monkeypatch.setattr(write_erofs, "KEPT", 1 << 20)
    config = load_config(localfs_config(tmp_path, work_dir=tmp_path / "cache"), "test")

    async def write(count: int) -> None:
        (tmp_path / "boot").write_bytes(synthetic(count, version))
        async with open_services() as services:
            reader = await services.open_image(str(tmp_path / "boot"), config, name="/")
            mark = fingerprint(reader.bootstrap, True)
            tracemalloc.start()
            try:
                files = write_and_open(reader, tmp_path / "image", mark, True)
                peaks.append(tracemalloc.get_traced_memory()[1])
            finally:
                tracemalloc.stop()
            written = (tmp_path / "image").read_bytes()
            with monkeypatch.context() as patched:
                for kept in (0, 1 << 30):
                    patched.setattr(write_erofs, "KEPT", kept)
                    write_image(reader, tmp_path / "image", mark, True)
                    assert (tmp_path / "image").read_bytes() == written
            found = open_file_map(tmp_path / "image", mark, 1 << 20)
            assert found is not None
            assert is_scattered(tmp_path / "image")
            ino, at = found.find(len(files) - 1, 4096 + 7) or (0, 0)
            assert at == 7
            assert reader.bootstrap.attr(ino).size == 4000
            reader.close()

    for count in (10_000, 40_000):
        trio.run(write, count)
    few, many = peaks
    assert many < few + (2 << 20), peaks


@pytest.mark.parametrize("name", ["v6-merged3", "v5-lz4-blake3-1m"])
def test_what_damaged_metadata_becomes_is_sound(tmp_path: Path, name: str) -> None:
    """What a bootstrap with flipped bits becomes has no error for fsck.erofs."""
    if shutil.which("fsck.erofs") is None:
        pytest.skip("erofs: fsck.erofs (erofs-utils) is not installed")
    good = (image_case(name) / "image.boot").read_bytes()
    rng, made, refused = random.Random(5), 0, 0
    (tmp_path / "device").touch()
    for _ in range(100):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(4096, len(data) - 4096)] ^= 1 << rng.randrange(8)
        (tmp_path / "boot").write_bytes(data)
        try:
            image = open_bootstrap(str(tmp_path / "boot"))
        except FormatError:
            continue
        try:
            with (tmp_path / "a").open("w+b") as one, (tmp_path / "b").open("w+b") as other:
                kind = ErofsImage(image, one, other, xattrs=True)
                kind.scan()
                out = bytearray(kind.size(1))
                kind.write(memoryview(out), [Device("d", 1 << 20)], lambda found: (0 * found.blobs, found.offsets))
        except (FormatError, BuildError):
            refused += 1
            continue
        finally:
            image.close()
        made += 1
        (tmp_path / "image").write_bytes(out)
        run(["fsck.erofs", f"--device={tmp_path}/device", tmp_path / "image"])
    assert made > 20, made
    assert refused > 1, refused


def fingerprint_of(case: Path) -> bytes:
    image = open_bootstrap(str(case / "image.boot"))
    try:
        return fingerprint(image, True)
    finally:
        image.close()


def test_device_tables_are_bounds_checked() -> None:
    with pytest.raises(FormatError, match="EROFS image"):
        read_devices(bytes(1000))
    with pytest.raises(FormatError, match="EROFS superblock"):
        read_devices(bytes(5000))


def test_the_image_of_the_self_test_is_what_our_writer_makes(tmp_path: Path) -> None:
    inodes, chunks = np.zeros(2, INODE), np.zeros(2, CHUNK)
    inodes["mode"] = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644
    inodes["first"], inodes["count"], inodes["size"] = (1, 0), (1, 2), (0, len(selftest.DATA))
    inodes["xattrs"], inodes["mtime"] = -1, selftest.MTIME
    chunks["uncompressed_offset"], chunks["uncompressed_size"] = (0, 4096), 4096
    blob = BlobInfo(
        id="ab" * 32, chunk_size=4096, compressor=Compressor.NONE, digester=Digester.BLAKE3, features=BlobFeatures(0),
        chunk_count=2, compressed_size=8192, uncompressed_size=8192, ci_uncompressed_size=32,
    )  # fmt: skip
    flags = super_flags(Compressor.NONE, Digester.BLAKE3)
    tree = FlatTree([b"", b"f"], inodes, np.array([0, 1]), chunks, [blob])
    (tmp_path / "boot").write_bytes(write_v6(tree, chunk_size=4096, flags=flags, prefetch=()))
    image = open_bootstrap(str(tmp_path / "boot"))
    with (tmp_path / "a").open("w+b") as one, (tmp_path / "b").open("w+b") as other:
        writer = ErofsImage(image, one, other, xattrs=True)
        writer.scan()
        made = bytearray(writer.size(1))
        writer.write(memoryview(made), [Device("d", 2)], lambda found: (0 * found.blobs, found.offsets))
    image.close()
    assert made == selftest.tiny_image()


@pytest.mark.root
@pytest.mark.skipif(cannot_mount_erofs() != "", reason=cannot_mount_erofs())
def test_a_worker_with_many_open_files_tries_its_disk_all_the_same(tmp_path: Path) -> None:
    """select(2) knows the first 1024 descriptors only, and a node that serves for a while has more segments open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert selftest.choose("auto", tmp_path) == ("erofs", "its self-test passed")
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_a_self_test_makes_is_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}

    def look() -> int:
        seen.update((path.name, stat.filemode(path.stat().st_mode)) for path in tmp_path.rglob("*/*"))
        raise OSError(errno.ENOSYS, "no such call")

    monkeypatch.setattr(fanotify, "init", look)
    for name, age in ((".selftest-dead", 600), (".selftest-busy", 0)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    before = os.umask(0)
    try:
        with pytest.raises(selftest.UnsupportedError, match="no such call"):
            selftest.run(tmp_path)
    finally:
        os.umask(before)
    assert seen == {"image": "-rw-------", "files": "drwx------", "d": "-rw-------"}
    assert [path.name for path in tmp_path.iterdir()] == [".selftest-busy"]


class Told:
    """A driver without a kernel: what it was told, and which files it is asked about."""

    def __init__(self) -> None:
        self.filleds: list[tuple[str, int, bool]] = []
        self.durables: list[str] = []
        self.silent: set[int] = set()

    def filled(self, device: str, fd: int, size: int) -> None:
        self.filleds.append((device, size, os.fstat(fd).st_size == size))

    def durable(self, device: str, fd: int) -> None:
        self.durables.append(device)

    def mounted(self, blob: str) -> bool:
        return True

    def ask(self, path: Path) -> int:
        fd = os.open(path, os.O_RDWR)
        self.silent.discard(os.fstat(fd).st_ino)
        return fd

    def quiet(self, fd: int) -> None:
        self.silent.add(os.fstat(fd).st_ino)


def test_a_device_is_emptied_unless_somebody_wants_it(tmp_path: Path) -> None:
    """Never while it is written, never when it was asked for since the notice, and never silent when it is empty."""
    told = Told()
    leaving, path = Leaving(told.ask, told.quiet), tmp_path / "device"
    path.write_bytes(bytes(8192))
    inode = path.stat().st_ino

    def notice_and(between: Callable[[], object]) -> bool:
        fd = leaving.leave("d", path)
        assert inode not in told.silent
        between()
        try:
            if not leaving.take("d"):
                return False
            assert not leaving.keep("d")
            assert not leaving.quiet("d", fd, 8192)
            leaving.empty("d", fd)
            return True
        finally:
            os.close(fd)

    with path.open("rb") as file:
        assert leaving.quiet("d", file.fileno(), 8192)
        assert not notice_and(lambda: leaving.keep("d"))
        assert not notice_and(lambda: leaving.quiet("d", file.fileno(), 8192))
        assert told.silent == {inode}
        with leaving.writing("d"):
            assert not leaving.quiet("d", file.fileno(), 8192)
            assert not notice_and(lambda: None)
        assert path.stat().st_size == 8192
        assert notice_and(lambda: None)
        assert leaving.keep("d")
        assert path.stat().st_size == 0
        assert not leaving.quiet("d", file.fileno(), 8192)
        assert told.silent == set()


def test_devices_of_another_boot_go_and_cached_segments_stay(tmp_path: Path) -> None:
    devices = DeviceFiles(tmp_path, BOOT, Told())
    assert devices.create("blob", "1-00")
    assert not devices.create("blob", "1-00")
    made = devices.files / "blob" / "1-00"
    made.write_bytes(bytes(4096))
    kept = tmp_path / "kept"
    os.link(made, kept)
    assert DeviceFiles(tmp_path, BOOT, Told()).files == devices.files
    assert made.exists()
    DeviceFiles(tmp_path, "ffffffff", Told())
    assert not made.exists()
    assert kept.stat().st_size == 4096


def test_what_a_dead_worker_wrote_and_did_not_link_counts_and_can_go(tmp_path: Path) -> None:
    store = CacheStore(tmp_path, boot=BOOT)
    try:
        store.devices = devices = DeviceFiles(store.path, BOOT, Told())
        names = [f"{number}-{number:024x}" for number in range(3)]
        paths = [devices.files / "blob" / name for name in names]
        for name in names:
            assert devices.create("blob", name)
        for path in paths[:2]:
            path.write_bytes(bytes(32768))
        (tmp_path / "blob").mkdir(exist_ok=True)
        os.link(paths[0], tmp_path / "blob" / names[0])
        store.set_limit(Limit(65536))
        assert store.quota is not None
        assert store.quota.total == 32768
        store.count_devices()
        store.count_devices()
        assert store.quota.total == 65536
        store.quota.used(("blob", bytes.fromhex(names[0].partition("-")[2])))
        assert store.quota.reserve(("blob", b"another"), "3-00", 4096)
        assert [path.stat().st_size for path in paths] == [32768, 0, 0]
    finally:
        store.close()


@pytest.mark.parametrize(("size", "good"), [(8192, True), (8191, True), (4097, True), (4096, False), (8193, False)])
def test_what_a_cached_file_must_be_to_serve_as_a_device(tmp_path: Path, size: int, good: bool) -> None:
    path = tmp_path / "segment"
    assert not usable(path, 8192)
    path.write_bytes(b"x" * size)
    assert usable(path, 8192) == good
    if good:
        assert path.read_bytes() == (b"x" * size).ljust(8192, b"\0")


def test_a_device_and_the_cache_are_one_file(tmp_path: Path) -> None:
    """Filled through the cache; damaged caches, leftovers and a removed directory make no difference."""
    case = image_case("v6-zstd-blake3-1m")
    config = load_config(localfs_config(case, work_dir=tmp_path), "test")
    told = Told()

    async def go() -> None:
        async with open_services() as services:
            reader = await services.open_image(str(case / "image.boot"), config, name="/")
            store = reader.store
            assert isinstance(store, CacheStore)
            store.devices = devices = DeviceFiles(store.path, store.boot, told)
            blob = reader.bootstrap.blobs[0]
            segment = reader.segment(0, 0)
            devices.create(blob.id, segment.name)
            plain = await reader.whole(segment)
            device = devices.files / blob.id / segment.name
            assert told.filleds == [(devices.device(blob.id, segment.name), segment.padded, True)]
            assert told.durables == [], "not before it is on the disk"
            assert device.stat().st_size == segment.padded
            cache = reader.cache(blob)
            assert cache is not None
            for _ in range(2):
                path = cache.ready_path(segment.name)
                assert path is not None
                assert path.samefile(device)
                assert path.read_bytes() == bytes(plain).ljust(segment.padded, b"\0")
                store.sync()
            assert path is not None
            assert path.name == segment.name
            assert told.durables == [devices.device(blob.id, segment.name)]
            shutil.rmtree(cache.path)
            cache.drop(segment)
            assert await reader.whole(segment) == plain
            path = cache.ready_path(segment.name)
            assert path is not None
            assert path.samefile(device)
            assert list(cache.path.glob("*.part")) == []
            reader.close()

    trio.run(go)


def test_journal_outlives_its_writer(tmp_path: Path) -> None:
    fd = Journal.create()
    first = Journal(fd)
    slots = [first.write(number, f"key/blob/{number}-00", number << 40, 4096) for number in range(20)]
    for slot in slots[::2]:
        first.clear(slot)
    second = Journal(fd)
    assert not second.take_gap()
    assert sorted(entry.number for entry in second.left()) == list(range(1, 20, 2))
    assert {entry.name for entry in second.left()} == {f"key/blob/{number}-00" for number in range(1, 20, 2)}
    assert all((entry.offset, entry.size) == (entry.number << 40, 4096) for entry in second.left())
    first.reading(MAX_THREADS - 1, True)
    assert second.take_gap()
    assert not second.take_gap()
    for entry in second.left():
        second.clear(entry.slot)
    assert second.left() == []
    for number in range(ENTRIES):
        second.write(number, "x" * 500)
    assert len(Journal(fd).left()) == ENTRIES
    other = os.memfd_create("other")
    os.truncate(other, os.fstat(fd).st_size)
    with pytest.raises(ValueError, match="journal"):
        Journal(other)
    os.close(other)
    os.close(fd)


def test_metadata_images_make_room_by_their_last_use_and_those_of_mounts_stay(tmp_path: Path) -> None:
    names = [f"{number:064x}" for number in range(MAX_IMAGES + 3)]
    for when, name in enumerate(names):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (when, when))
    old, new = (tmp_path / f"{PARTIAL}{name}" for name in ("old", "new"))
    new.touch()
    old.touch()
    os.utime(old, (0, 0))
    prune(tmp_path, lambda: {names[1]})
    assert {path.name for path in tmp_path.iterdir()} == {names[1], *names[3:], new.name}
