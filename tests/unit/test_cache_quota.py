"""The cache's limit: held at every moment, what is used stays; amounts; files of upstream's cache taken over."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from nydusfs.cache import CacheStore
from nydusfs.cache.quota import BLOCK, Limit, Quota
from nydusfs.config import load_config
from nydusfs.config.amount import parse_amount
from nydusfs.errors import ConfigError
from nydusfs.services import open_services
from tests.integration.test_sources_faults import config_text
from tests.lab.faulty import faulty_server
from tests.lab.tiny import noise, tiny_image
from tests.unit.test_cache_store import segment

Steps = list[tuple[str, int, int]]


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from(["write", "use", "gone"]), st.integers(0, 30), st.integers(1, 40_000))),
    st.integers(1, 40),
)
def test_the_limit_holds_after_every_step(steps: Steps, blocks: int) -> None:
    gone: list[bytes] = []
    quota = Quota(Path("/"), Limit(blocks * BLOCK), lambda slot, name: gone.append(slot[1]))
    there: dict[bytes, int] = {}
    for what, number, size in steps:
        key = b"%d" % number
        if what == "write":
            kept = quota.reserve(("b", key), "n", size)
            assert kept == (-(-size // BLOCK) <= blocks)
            for old in gone:  # before it was charged
                there.pop(old)
            gone.clear()
            quota.written(("b", key))
            if kept:
                there[key] = -(-size // BLOCK) * BLOCK
        elif what == "use":
            quota.used(("b", key))
        else:
            quota.gone(("b", key))
            there.pop(key, None)
        assert quota.total == sum(there.values()) <= blocks * BLOCK


def test_what_is_used_often_or_lately_stays() -> None:
    gone: list[bytes] = []
    quota = Quota(Path("/"), Limit(10 * BLOCK), lambda slot, name: gone.append(slot[1]))
    for number in range(10):
        quota.found(("b", b"%d" % number), "n", BLOCK, 1_000_000.0 + number)
    for _ in range(40):
        quota.used(("b", b"0"))
    quota.used(("b", b"1"))
    for number in range(20, 25):
        assert quota.reserve(("b", b"%d" % number), "n", BLOCK)
        quota.written(("b", b"%d" % number))
    assert gone == [b"2", b"3", b"4", b"5", b"6", b"7"], "five, and one in advance"


def test_who_misses_an_old_file_does_not_uncount_the_one_being_written() -> None:
    quota = Quota(Path("/"), Limit(10 * BLOCK), lambda slot, name: None)
    assert quota.reserve(("b", b"1"), "n", BLOCK)
    quota.gone(("b", b"1"))  # a reader who looked before
    assert quota.total == BLOCK
    quota.written(("b", b"1"))
    quota.gone(("b", b"1"))
    assert quota.total == 0
    assert quota.reserve(("b", b"1"), "n", BLOCK)
    quota.failed(("b", b"1"))
    quota.written(("b", b"1"))
    assert quota.total == 0


def test_what_is_being_read_stays_and_what_lies_beside_counts() -> None:
    gone: list[bytes] = []
    quota = Quota(
        Path("/"), Limit(10 * BLOCK), lambda slot, name: gone.append(slot[1]), held=lambda slot, name: slot[1] == b"0"
    )
    quota.beside = 4 * BLOCK
    for number in range(20):
        assert quota.reserve(("b", b"%d" % number), "n", BLOCK)
        quota.written(("b", b"%d" % number))
        assert quota.total <= 6 * BLOCK
    assert b"0" not in gone, "the oldest by far, but somebody reads it"
    assert b"1" in gone
    quota.beside = 40 * BLOCK
    quota.trim()
    assert quota.total <= 5 * BLOCK, "half of the limit is for segments in any case"


def test_threads_together_hold_the_limit() -> None:
    quota = Quota(Path("/"), Limit(50 * BLOCK), lambda slot, name: None)
    most = [0]

    def work(seed: int) -> None:
        for number in range(300):
            quota.reserve(("b", b"%d-%d" % (seed, number)), "n", 3000)
            most[0] = max(most[0], quota.total)
            quota.written(("b", b"%d-%d" % (seed, number)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most[0] <= 50 * BLOCK


def test_a_floor_of_free_space_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [100 * BLOCK]
    quota = Quota(Path("/"), Limit(0, 60 * BLOCK), lambda slot, name: free.__setitem__(0, free[0] + BLOCK))
    monkeypatch.setattr(quota, "_free", lambda: free[0])
    monkeypatch.setattr("nydusfs.cache.quota.FLOOR_EVERY", 1)
    for number in range(500):
        if quota.reserve(("b", b"%d" % number), "n", BLOCK):
            free[0] -= BLOCK
        quota.written(("b", b"%d" % number))
        assert free[0] >= 60 * BLOCK


def test_what_needs_notice_goes_together_and_stays_when_it_is_used() -> None:
    """Kernel mounts: `must` writes over the limit when all is in use, and that is made good later."""
    used: set[bytes] = set()
    notices: list[list[bytes]] = []

    def notice(names: dict[tuple[str, bytes], str]) -> set[tuple[str, bytes]]:
        notices.append([slot[1] for slot in names])
        total = quota.total
        quota.gone(("b", b"none"))  # the lock is open, and what was given notice still counts
        assert quota.total == total
        return {slot for slot in names if slot[1] not in used}

    quota = Quota(Path("/"), Limit(80 * BLOCK), lambda slot, name: True, notice)
    for number in range(80):
        quota.found(("b", b"%d" % number), "n", BLOCK, 1_000_000.0 + number)
    used.update(b"%d" % number for number in range(10))
    assert quota.reserve(("b", b"new"), "n", BLOCK)
    assert [len(notice) for notice in notices] == [20]
    assert quota.total == 71 * BLOCK
    used.update(b"%d" % number for number in range(80))
    assert not quota.reserve(("b", b"more"), "n", 20 * BLOCK)
    assert quota.reserve(("b", b"more"), "n", 20 * BLOCK, must=True)
    assert quota.total == 91 * BLOCK
    used.clear()
    quota.written(("b", b"more"))
    quota.trim()
    assert quota.total <= 80 * BLOCK


@pytest.mark.parametrize(
    ("text", "size"),
    [(5, 5), ("5", 5), ("1KiB", 1024), ("2k", 2048), ("1.5 GiB", 3 << 29), ("3MB", 3 << 20), ("1T", 1 << 40)],
)
def test_amounts(text: str | int, size: int) -> None:
    assert parse_amount(text, "/") == size


def test_percent_is_of_the_disk_and_nonsense_names_the_key(tmp_path: Path) -> None:
    half = parse_amount("50%", str(tmp_path / "not" / "yet"))
    assert half == pytest.approx(parse_amount("100%", str(tmp_path)) / 2, abs=1)
    for value in ('"many"', '"-5"', '"120%"', '"5 parsecs"', "true", "[]"):
        text = (
            '{"device": {"backend": {"type": "localfs", "config": {"dir": "/b"}}, "cache": {"type": "blobcache", '
            f'"config": {{"work_dir": "/c", "limit": {value}}}}}}}, "mode": "direct"}}'
        )
        with pytest.raises(ConfigError, match=r"device\.cache\.config\.limit"):
            load_config(text, "test")


FILES = {f"f{number}": noise(600_000, number) for number in range(6)}


def sizes(folder: Path) -> int:
    """A file is given its name, or goes, meanwhile: readers do not wait until it is written."""
    total = 0
    for path in folder.glob("*/*-*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total


def test_images_read_through_a_small_cache(tmp_path: Path) -> None:
    """Every byte right, the limit held on the disk, and again after a restart with a lower one."""
    image = tiny_image(tmp_path, FILES)
    work = tmp_path / "cache"
    limit = 1_500_000

    async def read_all(limit: int) -> None:
        text = config_text(work, server.netloc).replace('"work_dir"', f'"limit": {limit}, "work_dir"')
        async with open_services() as services:
            reader = await services.open_image(str(image.bootstrap), load_config(text, "t"), name="i")
            assert sizes(work) <= limit
            for _ in range(2):
                for name, data in FILES.items():
                    ino = reader.bootstrap.resolve(name.encode())
                    for offset in range(0, len(data), 131072):
                        assert await reader.read(ino, offset, 131072) == data[offset : offset + 131072]
                        assert sizes(work) <= limit
            reader.close()

    with faulty_server({image.blob_id: image.blob}) as server:
        trio.run(read_all, limit)
        assert sizes(work) > limit // 3
        trio.run(read_all, 700_000)


def test_upstreams_cache_files_are_taken_over(tmp_path: Path) -> None:
    """As upstream's nydusd leaves them: plain data at its place, holes elsewhere, and one chunk damaged."""
    image = tiny_image(tmp_path, FILES)
    work = tmp_path / "cache"
    work.mkdir()

    async def run() -> None:
        async with open_services() as services:
            config = load_config(config_text(work, server.netloc), "t")
            reader = await services.open_image(str(image.bootstrap), config, name="i")
            with (work / f"{image.blob_id}.blob.data").open("wb") as data:
                data.truncate(reader.bootstrap.blobs[0].uncompressed_size)
                places = {}
                for name, content in FILES.items():
                    (ref,) = reader.bootstrap.chunk_refs(reader.bootstrap.resolve(name.encode()))
                    chunk = reader.chunks.chunk(ref.chunk_index)
                    places[name] = range(chunk.compressed_offset, chunk.compressed_offset + chunk.compressed_size)
                    if name != "f3":
                        data.seek(ref.uncompressed_offset)
                        data.write(content if name != "f4" else b"\0" + content[1:])
            for name, content in FILES.items():
                ino = reader.bootstrap.resolve(name.encode())
                assert await reader.read(ino, 0, len(content)) == content
            # One request or two: they are neighbours, and what lies behind may come along.
            spans = [request.span or (0, -1) for request in server.data_requests]
            assert {at for first, last in spans for at in range(first, last + 1)} == {*places["f3"], *places["f4"]}
            reader.close()

    with faulty_server({image.blob_id: image.blob}) as server:
        trio.run(run)


def test_no_file_escapes_the_count_of_a_cache_that_evicts_while_it_writes(tmp_path: Path) -> None:
    """A soak found files nobody counted: evicted between their reservation and their appearance, or in a rename."""
    store = CacheStore(tmp_path)
    store.set_limit(Limit(24 * BLOCK))
    cache = store.blob("b")
    done = threading.Event()

    def write(seed: int) -> None:
        for number in range(150):
            data = noise(BLOCK, seed * 1000 + number)
            made = segment(seed * 1000 + number, data)
            if cache.write(made, bytearray(data)):
                cache.add(made)

    def sync() -> None:
        while not done.is_set():
            store.sync()

    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(6)]
    syncing = threading.Thread(target=sync)
    for thread in (syncing, *writers):
        thread.start()
    for thread in writers:
        thread.join(60)
    done.set()
    syncing.join(60)
    assert store.quota is not None
    assert store.quota.total == sum(path.stat().st_size for path in (tmp_path / "b").iterdir()) <= 24 * BLOCK
    store.close()


def test_files_that_get_their_name_or_go_while_they_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written last is renamed each second. Of a cache without a limit all files are counted when its disk is
    full and a kernel mount waits for room: a failure is its reader's error."""
    store = CacheStore(tmp_path)
    for blob_id in ("b", "c"):
        for number in range(3):
            data = noise(BLOCK, number)
            assert store.blob(blob_id).write(segment(number, data), data)
            store.blob(blob_id).add(segment(number, data))
    listed = os.scandir

    def look(path: Path) -> list[os.DirEntry[str]]:
        entries = list(listed(path))
        if Path(path) == tmp_path:
            store.remove_blob("c")
        elif Path(path).name == "b":
            store.sync()
            (tmp_path / "b" / segment(1, noise(BLOCK, 1)).name).unlink()
        return entries

    monkeypatch.setattr(os, "scandir", look)
    quota = store._counted(Limit(), lambda slot, _: False)
    assert quota.total == 2 * BLOCK
    monkeypatch.undo()
    store.close()


def test_two_images_at_once_have_one_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first two images with a limit; what the first writes meanwhile must not be unknown to the second's."""
    store, begun, go_on = CacheStore(tmp_path), threading.Event(), threading.Event()
    count = CacheStore._counted

    def slow(self: CacheStore, *args: Any) -> Quota:
        quota = count(self, *args)
        if threading.current_thread().name == "second":
            begun.set()
            assert go_on.wait(60)
        return quota

    monkeypatch.setattr(CacheStore, "_counted", slow)
    second = threading.Thread(target=store.set_limit, args=(Limit(24 * BLOCK),), name="second")
    first = threading.Thread(target=store.set_limit, args=(Limit(24 * BLOCK),), name="first")
    second.start()
    assert begun.wait(60)
    first.start()
    first.join(0.5)
    if first.is_alive():  # it waits for the other's count
        go_on.set()
        first.join(60)
    data = noise(BLOCK, 1)
    assert store.blob("b").write(segment(1, data), data)
    go_on.set()
    second.join(60)
    assert store.quota is not None
    assert store.quota.total == sum(path.stat().st_size for path in tmp_path.glob("b/*"))
    store.close()
