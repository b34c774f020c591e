"""Misses from files of this machine: one fetch whoever asks, the ordinary way wherever there is a doubt."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from nydusfs.config import load_config
from nydusfs.errors import ReadError
from nydusfs.hands import Hands
from nydusfs.image_reader import ImageReader
from nydusfs.services import Services, open_services
from nydusfs.sources import FileSource, Priority
from tests.lab.tiny import TinyImage, noise, tiny_image

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> TinyImage:
    made = tiny_image(tmp_path, {"a": noise(3 * MIB + 5000, 1), "b": noise(100, 2)})
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / made.blob_id).write_bytes(made.blob)
    return made


async def open_reader(services: Services, image: TinyImage, folder: Path, **cache: object) -> ImageReader:
    device = {
        "backend": {"type": "localfs", "config": {"dir": str(folder / "blobs")}},
        "cache": {"type": "blobcache", "config": {"work_dir": str(folder / "cache")}, **cache},
    }
    config = load_config(json.dumps({"device": device, "mode": "direct"}), "test")
    return await services.open_image(str(image.bootstrap), config, name="/i")


class Gate:
    """Opening the blob waits for it: from threads, and from the event loop's threads."""

    def __init__(self, source: object, monkeypatch: pytest.MonkeyPatch) -> None:
        assert isinstance(source, FileSource)
        self.open, self.reached, self.reads = threading.Event(), threading.Event(), 0
        real_open, real_read = source.open_blob, source._pread  # type: ignore[attr-defined]
        monkeypatch.setattr(source, "open_blob", partial(self._pass, real_open))
        monkeypatch.setattr(source, "_pread", partial(self._pass, real_read))

    def _pass(self, call: Callable[..., object], *args: object) -> object:
        self.reads += 1
        self.reached.set()
        assert self.open.wait(20)
        return call(*args)


async def reached(gate: Gate) -> None:
    assert await trio.to_thread.run_sync(gate.reached.wait, 20)


@pytest.mark.parametrize("first", ["thread", "loop"])
def test_readers_and_prefetch_on_one_chunk_make_one_fetch(
    image: TinyImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """In threads and on the loop, whichever comes first."""
    expected = image.files["a"][MIB + 100 : MIB + 5100]
    found: list[bytes] = []

    async def main() -> None:
        async with open_services() as services:
            reader = await open_reader(services, image, tmp_path)
            ino = reader.bootstrap.resolve(b"a")
            gate = Gate(reader.source, monkeypatch)

            async def by_loop() -> None:
                found.append(await reader.read(ino, MIB + 100, 5000))

            async def by_thread() -> None:
                # what a thread cannot do it hands on, as the drivers do
                parts = await trio.to_thread.run_sync(reader.read_now, ino, MIB + 100, 5000)
                found.append(b"".join(parts) if parts is not None else await reader.read(ino, MIB + 100, 5000))

            async def prefetch() -> None:
                job = reader.job(reader.segments_of(ino, MIB + 100, 1)[0])
                await services.scheduler.fetch([job], Priority.PREFETCH)

            ways = [by_thread, by_loop, prefetch, by_thread]
            if first == "loop":
                ways[:2] = by_loop, by_thread
            with trio.fail_after(30):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(ways[0])
                    await reached(gate)
                    for way in ways[1:]:
                        nursery.start_soon(way)
                    await trio.sleep(0.1)
                    gate.open.set()
                await services.scheduler.idle()
            assert gate.reads == 1
            assert reader.backend_counters.read_count == 1
            assert reader.cache_counters.entries_count == 1
            reader.close()

    trio.run(main)
    assert found == [expected] * 3


def test_what_a_thread_verified_is_answered_before_it_is_kept(image: TinyImage, tmp_path: Path) -> None:
    """And others may have it from then on."""

    async def main() -> None:
        async with open_services() as services:
            reader = await open_reader(services, image, tmp_path)
            ino = reader.bootstrap.resolve(b"a")
            hands = Hands()
            parts = await trio.to_thread.run_sync(reader.read_now, ino, 0, 5000, 0, hands)
            assert parts is not None and b"".join(parts) == image.files["a"][:5000]
            assert len(await trio.to_thread.run_sync(reader.read_now, ino, 10, 10) or []) == 1
            segment = reader.segments_of(ino, 0, 1)[0]
            assert not reader.is_ready(segment)
            with trio.fail_after(20):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(reader.read, ino, 0, 100)  # on the loop: waits for the thread to be done
                    await trio.testing.wait_all_tasks_blocked()
                    await trio.to_thread.run_sync(hands.finish)
            assert reader.is_ready(segment)
            assert reader.backend_counters.read_count == 1
            reader.close()

    trio.run(main)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_wrong_bytes_are_left_to_who_says_so(
    image: TinyImage, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A reader in a thread gets nothing, the ordinary way EIO and its line; the blob put right is read at once."""
    path = tmp_path / "blobs" / image.blob_id
    bad = bytearray(image.blob)
    bad[2 * MIB + 7] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(bad if damage == "flipped" else image.blob[: 2 * MIB])

    async def main() -> None:
        async with open_services() as services:
            reader = await open_reader(services, image, tmp_path)
            ino = reader.bootstrap.resolve(b"a")
            for _ in range(2):
                assert await trio.to_thread.run_sync(reader.read_now, ino, 2 * MIB + 1, 4096) is None
                with pytest.raises(ReadError):
                    await reader.read(ino, 2 * MIB + 1, 4096)
            assert "image /i: file /a: blob " + image.blob_id in caplog.text
            if damage != "gone":
                parts = await trio.to_thread.run_sync(reader.read_now, ino, 5, 100)
                assert parts is not None and b"".join(parts) == image.files["a"][5:105]
            path.write_bytes(image.blob)
            parts = await trio.to_thread.run_sync(reader.read_now, ino, 2 * MIB + 1, 4096)
            assert parts is not None and b"".join(parts) == image.files["a"][2 * MIB + 1 : 2 * MIB + 4097]
            reader.close()

    trio.run(main)


def test_a_cache_at_its_limit_or_one_that_validates_is_the_loops(image: TinyImage, tmp_path: Path) -> None:
    """A segment that something has to go for, and bytes that are hashed at every read."""

    async def main(limit: int, validate: bool) -> None:
        async with open_services() as services:
            reader = await open_reader(services, image, tmp_path, validate=validate)
            if limit:
                from nydusfs.cache import Limit

                assert reader.store is not None
                reader.store.set_limit(Limit(limit))
            ino = reader.bootstrap.resolve(b"a")
            found = [await trio.to_thread.run_sync(reader.read_now, ino, n * MIB, 10) is not None for n in range(3)]
            assert found == [bool(limit), bool(limit), False]
            assert await reader.read(ino, 2 * MIB, 10) == image.files["a"][2 * MIB : 2 * MIB + 10]
            reader.close()

    trio.run(main, 2 * MIB + 4096, False)
    trio.run(main, 0, True)


def test_a_sequence_is_fetched_ahead_and_everything_ends(image: TinyImage, tmp_path: Path) -> None:
    """All of the file is there although half of it was asked for; at the end no thread fetches any more."""

    async def main() -> None:
        async with open_services() as services:
            reader = await open_reader(services, image, tmp_path)
            ino = reader.bootstrap.resolve(b"a")
            for offset in range(0, 2 * MIB, 128 << 10):
                parts = await trio.to_thread.run_sync(reader.read_now, ino, offset, 128 << 10)
                if parts is None:  # the loop is still at what it fetches ahead
                    parts = await reader.read_parts(ino, offset, 128 << 10)
                assert b"".join(parts) == image.files["a"][offset : offset + (128 << 10)]
            with trio.fail_after(20):
                await services.scheduler.idle()
            segments = reader.segments_of(ino, 0, 3 * MIB + 5000)
            assert all(map(reader.is_ready, segments))
            assert reader.backend_counters.read_count == len({segment.key for segment in segments})
            reader.close()

    trio.run(main)


def test_filling_never_takes_all_threads_of_a_driver(
    image: TinyImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To write a device of a kernel mount may need an answer of that driver: who comes while one writes and another
    waits for him is told at once to ask the loop."""

    async def main() -> None:
        async with open_services() as services:
            reader = await open_reader(services, image, tmp_path)
            segment = reader.segments_of(reader.bootstrap.resolve(b"a"), 0, 1)[0]
            writing, go_on = threading.Event(), threading.Event()
            cache = reader.job(segment).cache
            assert cache is not None
            write = cache.write

            def slow(*args: Any, **kwargs: Any) -> bool:
                writing.set()
                assert go_on.wait(20)
                return write(*args, **kwargs)

            monkeypatch.setattr(cache, "write", slow)
            filled: list[bool] = []

            async def fill() -> None:
                filled.append(await trio.to_thread.run_sync(reader.fill, segment, Hands(), lambda: None))

            with trio.fail_after(30):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(fill)
                    assert await trio.to_thread.run_sync(writing.wait, 20)
                    came = threading.Event()
                    nursery.start_soon(trio.to_thread.run_sync, reader.fill, segment, Hands(), came.set)
                    assert await trio.to_thread.run_sync(came.wait, 20)
                    try:
                        with trio.fail_after(10):
                            await fill()
                        assert filled == [False]
                    finally:
                        go_on.set()
            assert filled == [False, True]
            reader.close()

    trio.run(main)
