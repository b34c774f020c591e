"""Cache disks that are full, read-only or broken, under real mounts: right bytes, one warning, back by itself."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.daemon import Nydusd, all_durable, can_mount_fuse
from tests.lab.erofs import READ_ALL, cannot_mount_erofs
from tests.lab.faulty import FaultyServer, faulty_server
from tests.lab.process import drop_caches, run, wait_until
from tests.lab.recordfs import LoopDisk
from tests.lab.tiny import TinyImage, noise, tiny_image

pytestmark = [pytest.mark.root, pytest.mark.skipif(can_mount_fuse() != "", reason=can_mount_fuse())]

MIB = 1 << 20
FILES = {f"{name}{size}": noise(size, seed) for seed, name in enumerate("abcd") for size in (3 * MIB, 40_000)}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> TinyImage:
    return tiny_image(tmp_path_factory.mktemp("image"), FILES)


@pytest.fixture
def server(image: TinyImage) -> Iterator[FaultyServer]:
    with faulty_server({image.blob_id: image.blob}) as server:
        yield server


@contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder])
    try:
        yield folder
    finally:
        run(["umount", "-l", folder])


def remount(folder: Path, options: str) -> None:
    """To "ro" not before the last file is closed, which is a moment after it has its name."""
    words = ["mount", "-o", f"remount,{options}", folder]
    wait_until(lambda: run(words, check=False).returncode == 0, 30, f"the disk to be {options}")


def mount(daemon: Nydusd, image: TinyImage, server: FaultyServer, work: Path, at: str = "/i") -> None:
    backend = {"scheme": "http", "host": server.netloc, "repo": "a/b"}
    device = {
        "backend": {"type": "registry", "config": backend},
        "cache": {"type": "blobcache", "config": {"work_dir": str(work)}},
    }
    answer = daemon.mount(at, image.bootstrap, json.dumps({"device": device, "mode": "direct"}))
    assert answer.status == 204, (answer, daemon.log_text())


def wrong(daemon: Nydusd, image: TinyImage, at: str = "i", *, drop: bool = True) -> dict[str, str]:
    """Files that are not what they should be, with what their reader got. `drop`: without help of the page cache."""
    import hashlib

    if drop:
        drop_caches()
    found = json.loads(run([sys.executable, "-c", READ_ALL, daemon.mnt / at], timeout=60).stdout)
    return {
        name: found.get(name, "EIO")  # not even listed
        for name, data in image.files.items()
        if found.get(name) != hashlib.sha256(data).hexdigest()
    }


def said(daemon: Nydusd, text: str) -> list[str]:
    lines = daemon.log_text().splitlines()
    return [line for line in lines if re.search(text, line) and "rlimit-nofile" not in line]


def kept(daemon: Nydusd, image: TinyImage, server: FaultyServer) -> bool:
    """Whether a read of everything needs the registry no more."""
    assert wrong(daemon, image) == {}
    before = len(server.data_requests)
    assert wrong(daemon, image) == {}
    return len(server.data_requests) == before


def written_again(daemon: Nydusd) -> bool:
    return len(said(daemon, " INFO .*can be written again")) == 1


def test_a_full_disk_and_room_again(image: TinyImage, server: FaultyServer, tmp_path: Path) -> None:
    """12 MiB of data, room for 8: small segments would still fit now and then, and say each time that all is well."""
    with tmpfs(tmp_path / "disk", "8m") as disk, Nydusd() as daemon:
        mount(daemon, image, server, disk / "cache")
        for _ in range(3):
            assert wrong(daemon, image) == {}
            time.sleep(1.1)  # attempts go on
        assert len(said(daemon, " WARN .*is full")) == 1
        assert len(said(daemon, " WARN ")) == 1, "nothing else is warned about"
        filler = disk / "filler"
        with pytest.raises(OSError, match="No space"):
            filler.write_bytes(bytes(8 * MIB))
        remount(disk, "size=32m")
        filler.unlink()
        wait_until(lambda: kept(daemon, image, server) and written_again(daemon), 80, "the cache")
        assert len(said(daemon, " WARN ")) == 1


@pytest.mark.skipif(cannot_mount_erofs() != "", reason=cannot_mount_erofs())
def test_a_full_disk_below_an_erofs_mount(image: TinyImage, server: FaultyServer, tmp_path: Path) -> None:
    """12 MiB of data, room for 8, no limit: the kernel reads the disk alone, so what nobody reads makes room. First
    that of an image that is not mounted, then the mounted one's own."""
    (tmp_path / "image").mkdir()
    other = tiny_image(tmp_path / "image", {"e": noise(3 * MIB, 9)})
    with small_disk(tmp_path / "disk", 24 * MIB) as disk, Nydusd("--fs-driver", "erofs") as daemon:
        with faulty_server({other.blob_id: other.blob}) as second:
            mount(daemon, other, second, disk / "cache", "/other")
            assert wrong(daemon, other, "other") == {}
            assert daemon.umount("/other").status == 204
        before = set((disk / "cache" / other.blob_id).iterdir())
        mount(daemon, image, server, disk / "cache")
        fill(disk, 5 * MIB)
        for _ in range(3):
            assert wrong(daemon, image) == {}
        assert not before & set((disk / "cache" / other.blob_id).iterdir())
        assert len(said(daemon, " WARN ")) == 1
        assert said(daemon, " INFO .*went for what a kernel mount waits for")
        assert said(daemon, " ERROR ") == []


@pytest.mark.skipif(cannot_mount_erofs() != "", reason=cannot_mount_erofs())
def test_a_full_disk_below_an_erofs_mount_where_nothing_can_go(
    image: TinyImage, server: FaultyServer, tmp_path: Path
) -> None:
    """A mount has what is here by its plain path, everything else on the disk is other people's: the reserve is given
    up, and what came there makes room for what is read next. It comes back with the room, and goes with the mount."""
    with small_disk(tmp_path / "disk", 64 * MIB) as disk, Nydusd("--fs-driver", "erofs") as daemon:
        reserve = disk / "cache" / ".erofs" / "reserve"
        mount(daemon, image, server, disk / "cache")
        assert (daemon.mnt / "i" / "a40000").read_bytes() == FILES["a40000"]
        wait_until(lambda: all_durable(disk / "cache"), 60, "a file on the disk")
        assert daemon.umount("/i").status == 204
        assert not reserve.exists()
        mount(daemon, image, server, disk / "cache")
        whole = reserve.stat().st_size
        assert list(disk.glob("cache/.erofs/files.*/.opened/*"))
        fill(disk, 64 << 10)
        for _ in range(3):
            assert wrong(daemon, image) == {}
        assert said(daemon, " INFO .*of the reserve went for what a kernel mount waits for")
        assert said(daemon, " ERROR ") == []
        assert reserve.stat().st_size < whole
        requests = len(server.data_requests)
        assert (daemon.mnt / "i" / "a40000").read_bytes() == FILES["a40000"]
        assert len(server.data_requests) == requests, "what a mount has by its plain path stays"
        (disk / "filler").unlink()
        wait_until(lambda: wrong(daemon, image) == {} and reserve.stat().st_size == whole, 60, "the reserve")
        assert daemon.umount("/i").status == 204
        assert not reserve.exists()


@pytest.mark.skipif(cannot_mount_erofs() != "", reason=cannot_mount_erofs())
def test_a_nearly_full_disk_keeps_an_image_with_fuse(image: TinyImage, server: FaultyServer, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64 * MIB) as disk, Nydusd("--fs-driver", "auto") as daemon:
        fill(disk, 6 * MIB)
        mount(daemon, image, server, disk / "cache")
        assert wrong(daemon, image) == {}
        wait_until(lambda: bool(said(daemon, "fs_driver fuse, as erofs is not possible: .*nearly full")), 60, "auto")
        assert wrong(daemon, image) == {}
        assert not (disk / "cache" / ".erofs" / "reserve").exists()
        (disk / "filler").unlink()
        assert daemon.umount("/i").status == 204
        mount(daemon, image, server, disk / "cache")
        wait_until(lambda: (disk / "cache" / ".erofs" / "reserve").exists(), 60, "the kernel's mount")


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """ext4, without blocks of the administrator's own."""
    folder.mkdir()
    with (folder.with_suffix(".img")).open("wb") as file:
        file.truncate(size)
    run(["mkfs.ext4", "-q", "-F", "-m", "0", folder.with_suffix(".img")])
    run(["mount", "-o", "loop", folder.with_suffix(".img"), folder])
    try:
        yield folder
    finally:
        run(["umount", "-l", folder])


def fill(disk: Path, left: int) -> None:
    """Leave so many bytes free."""
    run(["sync", "-f", disk])
    info = os.statvfs(disk)
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, info.f_bavail * info.f_frsize - left)


def test_a_disk_that_turns_read_only_and_back(image: TinyImage, server: FaultyServer, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "64m") as disk, Nydusd() as daemon:
        mount(daemon, image, server, disk / "cache")
        assert (daemon.mnt / "i" / "a40000").read_bytes() == FILES["a40000"]
        wait_until(lambda: all_durable(disk / "cache"), 60, "the cache to be on the disk")
        remount(disk, "ro")
        mount(daemon, image, server, disk / "cache", "/other")
        assert wrong(daemon, image) == {}
        assert wrong(daemon, image, "other") == {}
        assert len(said(daemon, " WARN .*cannot be written .read-only")) == 1
        assert len(said(daemon, " WARN ")) == 1
        remount(disk, "rw")
        wait_until(lambda: kept(daemon, image, server) and written_again(daemon), 80, "the cache")
        assert len(said(daemon, " WARN ")) == 1


def test_a_daemon_starts_on_a_read_only_cache(image: TinyImage, server: FaultyServer, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "64m") as disk:
        with Nydusd() as daemon:
            mount(daemon, image, server, disk / "cache")
            assert wrong(daemon, image) == {}
        remount(disk, "ro")
        before = len(server.data_requests)
        with Nydusd() as daemon:
            mount(daemon, image, server, disk / "cache")
            assert wrong(daemon, image) == {}
            assert len(server.data_requests) == before, "what is there is served"
            mount(daemon, image, server, disk / "new", "/new")
            assert wrong(daemon, image, "new") == {}
            assert len(said(daemon, "new cannot be used: read-only.*served without being kept")) == 1
        remount(disk, "rw")


@pytest.mark.parametrize("driver", ["fuse", "erofs"])
def test_a_disk_that_fails(driver: str, image: TinyImage, server: FaultyServer, tmp_path: Path) -> None:
    """EIO of the device below ext4: of writes, which shows only when the kernel writes out, then of reads as well."""
    if driver == "erofs" and (reason := cannot_mount_erofs()):
        pytest.skip(reason)
    # With FUSE nobody notices. With EROFS the kernel reads the disk itself: an error, but never other bytes.
    allowed: set[str] = set() if driver == "fuse" else {"EIO"}
    disk = LoopDisk(tmp_path, 64 * MIB)
    try:
        with Nydusd("--fs-driver", driver) as daemon:
            mount(daemon, image, server, disk.mountpoint / "cache")
            assert (daemon.mnt / "i" / "a40000").read_bytes() == FILES["a40000"]
            wait_until(lambda: all_durable(disk.mountpoint / "cache"), 60, "the cache to be on the disk")
            disk.fs.fail("write")
            # The file system takes it, until the kernel writes out: at once, if somebody on this machine calls sync.
            assert set(wrong(daemon, image, drop=False).values()) <= allowed
            for _ in range(3):
                assert set(wrong(daemon, image).values()) <= allowed
                time.sleep(1.2)
            disk.fs.fail("read")
            assert set(wrong(daemon, image).values()) <= allowed
            assert len(said(daemon, " WARN .*/cache cannot be (written|read)")) <= 2
            assert not said(daemon, "Traceback")
    finally:
        disk.close()
