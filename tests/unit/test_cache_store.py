"""The cache after kills, power cuts, damage and full disks: absent is fine, wrong bytes never."""

from __future__ import annotations

import logging
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio

from bootstrap.base import Blob
from bootstrap.layout.common import BlobFeatures, Compressor, Digester
from nydusfs.cache import CacheStore
from nydusfs.cache.blob import NotSureError
from nydusfs.cache.devices import device_key
from nydusfs.cache.durability import resident
from nydusfs.cache.fresh import Fresh
from nydusfs.errors import CacheError
from nydusfs.hands import Hands
from nydusfs.segments import Segment

BLOB = Blob(0, "b" * 64, 1 << 20, 99, Compressor.ZSTD, Digester.BLAKE3, BlobFeatures(0), 0, 0, 0)


def segment(number: int, content: bytes) -> Segment:
    key = number.to_bytes(4, "big") + len(content).to_bytes(8, "big")
    return Segment(BLOB, number, key, range(1), len(content), 0, 1, False)


def content(number: int) -> bytes:
    return random.Random(number).randbytes(5000 + number)


def keep(store: CacheStore, number: int) -> Segment:
    data = content(number)
    part = segment(number, data)
    cache = store.blob(BLOB.id)
    assert cache.write(part, bytearray(data))
    cache.add(part)
    return part


def found(store: CacheStore, number: int) -> bytes | None:
    async def main() -> bytes | None:
        part = segment(number, content(number))
        cache = store.blob(BLOB.id)
        # `sure`: others on this machine drop the page cache
        data = await cache.read(part, 0, part.size, sure=True) if part.key in cache else None
        return None if data is None else bytes(data)

    return trio.run(main)


def test_ready_at_once_and_after_a_restart(tmp_path: Path) -> None:
    store = CacheStore(tmp_path)
    keep(store, 1)
    assert found(store, 1) == content(1)
    store.sync()
    keep(store, 2)  # complete, not yet synced
    os.close(store.claim)  # the process dies here
    again = CacheStore(tmp_path)
    assert found(again, 1) == content(1)
    assert found(again, 2) == content(2)  # same boot: the page cache is still there
    again.close()


_HOLDS = """
import socket, sys
from nydusfs.cache import CacheStore
ours = socket.socket(fileno=int(sys.argv[1]))
store = CacheStore(sys.argv[2])
socket.send_fds(ours, [b"x"], [store.claim])
ours.recv(1)
"""


def test_a_claim_goes_to_the_successor_alone_and_only_once_its_process_is_dead(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    words = [sys.executable, "-c", _HOLDS, str(theirs.fileno()), str(tmp_path)]
    with subprocess.Popen(words, pass_fds=[theirs.fileno()]) as first:
        theirs.close()
        ours.settimeout(30)
        _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
        given = {device_key(tmp_path): fd}
        with closing(CacheStore(tmp_path, claims=given)) as early:
            assert early.path == tmp_path / ".worker-2"
        ours.close()
        assert first.wait(30) == 0
    with closing(CacheStore(tmp_path)) as stranger:
        assert stranger.path == tmp_path / ".worker-2"
    with closing(CacheStore(tmp_path, claims=given)) as heir:
        assert heir.path == tmp_path
    os.close(fd)


@pytest.mark.parametrize("seed", range(25))
def test_a_power_cut_at_any_point(seed: int, tmp_path: Path) -> None:
    """What was not synced is gone, torn or zero afterwards; whatever is served after the reboot is right."""
    choice = random.Random(seed)
    disk = tmp_path / "disk"
    store = CacheStore(disk, boot="11111111")
    synced: set[int] = set()
    written: list[int] = []
    for number in range(12):
        keep(store, number)
        written.append(number)
        if choice.random() < 0.3:
            store.sync()
            synced |= set(written)
    if choice.random() < 0.5:  # cut in the middle of a write
        (disk / BLOB.id / f"{segment(50, content(50)).name}.part").write_bytes(content(50)[:100])
    after = tmp_path / "after"
    shutil.copytree(disk, after)
    durable = {segment(number, content(number)).name for number in synced}
    for path in (after / BLOB.id).iterdir():
        if path.name in durable:
            continue
        fate = choice.choice(["lost", "empty", "zeros", "torn"])
        size = path.stat().st_size
        if fate == "lost":
            path.unlink()
        else:
            path.write_bytes({"empty": b"", "zeros": bytes(size), "torn": path.read_bytes()[: size // 2]}[fate])
    reborn = CacheStore(after, boot="22222222")
    for number in range(12):
        data = found(reborn, number)
        assert data == (content(number) if number in synced else None)
    assert sorted(path.name for path in (after / BLOB.id).iterdir()) == sorted(durable)
    reborn.close()
    store.close()


def test_damage_from_outside_means_absent(tmp_path: Path) -> None:
    store = CacheStore(tmp_path)
    for number in (1, 2, 3):
        keep(store, number)
    store.sync()
    store.close()
    store = CacheStore(tmp_path)
    folder = tmp_path / BLOB.id
    (folder / segment(1, content(1)).name).unlink()
    os.truncate(folder / segment(2, content(2)).name, 10)
    assert found(store, 1) is None
    assert found(store, 2) is None
    assert found(store, 3) == content(3)
    keep(store, 2)
    assert found(store, 2) == content(2)
    shutil.rmtree(folder)  # what a snapshotter does when no image uses the blob
    keep(store, 4)
    assert found(store, 4) == content(4)
    store.close()


def test_a_second_process_gets_its_own_directory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = CacheStore(tmp_path)
    keep(first, 1)
    code = (
        "import sys; from nydusfs.cache import CacheStore; s = CacheStore(sys.argv[1]);"
        "print(s.path, len(s.blob(sys.argv[2])))"
    )
    run = [sys.executable, "-c", code, str(tmp_path), BLOB.id]
    other = subprocess.run(run, capture_output=True, text=True, timeout=60, check=True)
    assert other.stdout.split() == [str(tmp_path / ".worker-2"), "0"]
    assert "in use by another process" in other.stderr
    first.close()
    mine = subprocess.run(run, capture_output=True, text=True, timeout=60, check=True)
    assert mine.stdout.split() == [str(tmp_path), "1"]


def test_few_descriptors_and_readers_that_overlap_evictions(tmp_path: Path) -> None:
    store = CacheStore(tmp_path)
    store.files.most = 4
    parts = [keep(store, number) for number in range(40)]
    store.sync()

    async def reader(number: int) -> None:
        for step in range(30):
            which = (number * 7 + step * 11) % 40
            data = await store.blob(BLOB.id).read(parts[which], 3, 1000)
            assert bytes(data or b"") == content(which)[3:1003]

    async def main() -> None:
        store.nowait = False  # always through a thread: evictions happen meanwhile
        store.disk.took(60.0)
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(reader, number)

    trio.run(main)
    assert len(store.files) <= 4
    store.close()


def test_what_is_cached_stays_so_where_no_more_files_can_be_opened(tmp_path: Path) -> None:
    """Many images share the process's descriptors. Those of segments that nobody reads make room."""
    numbers = range(40)
    with closing(CacheStore(tmp_path)) as store:
        for number in numbers:
            keep(store, number)
    store = CacheStore(tmp_path)
    store.files.most = 1000
    cache = store.blob(BLOB.id)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def main() -> list[bytes | None]:
        found: list[bytes | None] = []
        most = max(map(int, os.listdir("/proc/self/fd"))) + 8
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        taken = [os.open(os.devnull, os.O_RDONLY)]
        while taken[-1] < most - 8:
            taken.append(os.open(os.devnull, os.O_RDONLY))
        try:
            for number in numbers:
                part = segment(number, content(number))
                data = await cache.read(part, 0, part.size, sure=True)
                found.append(None if data is None else bytes(data))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in taken:
                os.close(fd)
        return found

    assert trio.run(main) == [content(number) for number in numbers]
    assert len(cache) == len(numbers)
    store.close()


def test_unusable_directories_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="file"):
        CacheStore(tmp_path / "file")


def test_a_disk_that_takes_nothing_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("nydusfs.cache.health.PAUSE", 0.0)
    store = CacheStore(tmp_path)
    cache = store.blob(BLOB.id)
    real = os.write

    def full(fd: int, data: memoryview) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    for number in range(3):
        assert not cache.write(segment(number, content(number)), bytearray(content(number)))
    monkeypatch.setattr(os, "write", real)
    keep(store, 5)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "is full" in caplog.text
    assert not list((tmp_path / BLOB.id).glob("*.part"))
    store.close()


def test_close_does_not_wait_for_a_disk_that_takes_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not made durable stays, under the name that is good until the next boot."""
    synced = []

    def slow(descriptor: int) -> None:  # the disk of this machine takes a time of its own
        time.sleep(0.1)
        synced.append(descriptor)

    monkeypatch.setattr(os, "fdatasync", slow)
    monkeypatch.setattr("nydusfs.cache.durability.CLOSE_SECONDS", 0.5)
    # else who writes syncs too
    monkeypatch.setattr("nydusfs.cache.durability.resource.getrlimit", lambda _: (1 << 20, 1 << 20))
    store = CacheStore(tmp_path)
    for number in range(200):
        keep(store, number)
    began, before = time.monotonic(), len(synced)
    store.close()
    assert time.monotonic() - began < 15, "200 files of 0.1 s each"
    assert synced
    assert len(synced) - before < 50
    again = CacheStore(tmp_path)
    assert [number for number in range(200) if found(again, number) != content(number)] == []
    again.close()


def test_what_was_verified_last_is_read_from_memory_within_bounds(tmp_path: Path) -> None:
    store = CacheStore(tmp_path)
    store.fresh = Fresh(20_000)
    cache = store.blob(BLOB.id)
    for number in range(10):
        part = keep(store, number)
        cache.add(part, content(number))
        os.truncate(tmp_path / BLOB.id / f"{part.name}.{store.boot}", 0)

    def read(number: int) -> bytes | None:
        data = cache.read_now(segment(number, content(number)), 7, 100, Hands())
        return None if data is None else bytes(data)

    assert [read(number) for number in (7, 8, 9)] == [content(number)[7:107] for number in (7, 8, 9)]
    assert store.fresh.size == sum(len(content(number)) for number in (7, 8, 9))
    assert [read(number) for number in range(7)] == [None] * 7  # their files, which are empty
    part = segment(8, content(8))
    cache.drop(part)
    assert read(8) is None  # what is not ready is not read from anywhere
    store.fresh.clear()
    assert store.fresh.size == 0
    assert read(9) is None
    cache.add(part, memoryview(content(8)))
    assert store.fresh.size == 0  # it may be a view of a lot
    store.close()


def test_what_left_the_page_cache_before_it_was_durable_is_not_believed(tmp_path: Path) -> None:
    """Its write-out may have failed, also for an earlier process: then the disk has zeros."""
    store = CacheStore(tmp_path)
    part = keep(store, 1)
    os.close(store.claim)  # the process dies
    path = tmp_path / BLOB.id / f"{part.name}.{store.boot}"
    fd = os.open(path, os.O_RDONLY)
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(fd):
        pytest.skip("no file system that forgets pages")
    os.close(fd)
    again = CacheStore(tmp_path)
    cache = again.blob(BLOB.id)
    again.sync()
    assert path.exists(), "no plain name for what nobody looked at"
    assert cache.read_now(part, 0, 100, Hands()) is None

    async def verify() -> None:
        with pytest.raises(NotSureError):
            await cache.read(part, 0, 100)
        assert await cache.read(part, 0, part.size, sure=True) == content(1)
        cache.verified(part)

    trio.run(verify)
    again.sync()
    assert not path.exists()
    assert found(again, 1) == content(1)
    again.close()


def test_who_writes_faster_than_the_disk_syncs_by_himself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CacheStore(tmp_path)
    monkeypatch.setattr(store.syncer, "_most", 3)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        keep(store, number)
    assert len(os.listdir("/proc/self/fd")) - before <= 4
    store.sync()
    assert sorted(path.suffix for path in (tmp_path / BLOB.id).iterdir()) == [""] * 20
    assert [number for number in range(20) if found(store, number) != content(number)] == []
    store.close()


def test_a_segment_evicted_and_written_again_gets_no_name_from_its_first_sync(tmp_path: Path) -> None:
    """The first file is synced, the second one is not: it must not be taken for durable."""
    store = CacheStore(tmp_path)
    part = keep(store, 1)
    written = []
    real = store.syncer._commit

    def slow(item: Any, fd: int) -> None:
        if not written:
            store._evict((BLOB.id, part.key), part.name)
            written.append(keep(store, 1))
        real(item, fd)

    store.syncer._commit = slow  # type: ignore[method-assign]
    store.sync()
    assert (tmp_path / BLOB.id / f"{part.name}.{store.boot}").exists()
    store.sync()
    assert (tmp_path / BLOB.id / part.name).exists()
    store.close()
