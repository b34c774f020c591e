"""Prefetch behind demand, its order and rate; a full disk; what a restart finds."""

from __future__ import annotations

import itertools
import json
import logging
import marshal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import MAGIC_NUMBER
from pathlib import Path
from typing import Any

import pytest
import trio

from bootstrap.options import BuildOptions
from nydusfs import elf, prefetch, pyc
from nydusfs.cache import BlobCache, Limit
from nydusfs.config import load_config
from nydusfs.flights import MERGE
from nydusfs.foresight import Foresight
from nydusfs.image_reader import ImageReader
from nydusfs.segments import SEGMENT_SIZE, Plain, Segment
from nydusfs.services import Services, open_services
from nydusfs.sources import Priority, remote
from tests.lab.faulty import FaultyServer, faulty_server
from tests.lab.tiny import TinyImage, noise, tiny_image

MIB = 1 << 20
FILES = {f"{name}/data": noise(3 * MIB, seed) for seed, name in enumerate("abcd")}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> TinyImage:
    options = BuildOptions(prefetch_policy="fs", prefetch=[b"/c", b"/a"])
    return tiny_image(tmp_path_factory.mktemp("image"), FILES, options)


@pytest.fixture
def origin(image: TinyImage) -> Iterator[FaultyServer]:
    with faulty_server({image.blob_id: image.blob}) as server:
        yield server


def config_text(work: Path, origin: FaultyServer, **prefetch: Any) -> str:
    backend = {"host": origin.netloc, "repo": "a/b", "scheme": "http", "timeout": 30}
    cache = {"type": "blobcache", "config": {"work_dir": str(work)}}
    document = {"device": {"backend": {"type": "registry", "config": backend}, "cache": cache}, "mode": "direct"}
    return json.dumps({**document, "fs_prefetch": {"enable": True, **prefetch}})


async def open_reader(services: Services, image: TinyImage, text: str) -> ImageReader:
    return await services.open_image(str(image.bootstrap), load_config(text, "test"), name="img")


async def read_file(reader: ImageReader, name: str) -> bytes:
    ino = reader.bootstrap.resolve(name.encode())
    size = reader.bootstrap.attr(ino).size
    return b"".join([await reader.read(ino, offset, 131072) for offset in range(0, size, 131072)])


def order(origin: FaultyServer) -> list[str]:
    """Which file each request began in; files lie in the blob in order of their names."""
    places = [request.span[0] for request in origin.data_requests if request.span]
    return [key for key, _ in itertools.groupby("abcd"[min(place // (3 * MIB), 3)] for place in places)]


def test_the_table_comes_first_then_the_rest(image: TinyImage, origin: FaultyServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with open_services() as services:
            reader = await open_reader(services, image, config_text(tmp_path, origin, threads_count=1))
            with trio.fail_after(60):
                await reader.prefetch()
            asked = len(origin.data_requests)
            assert order(origin)[:2] == ["c", "a"]
            for name, data in FILES.items():
                assert await read_file(reader, name) == data
            assert len(origin.data_requests) == asked  # everything was here
            counters = reader.cache_counters.as_json()
            assert counters["prefetch_requests_count"] == asked
            assert counters["prefetch_data_amount"] >= 12 * MIB
            reader.close()

    trio.run(main)


def test_a_given_list_replaces_the_table(image: TinyImage, origin: FaultyServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with open_services() as services:
            text = config_text(tmp_path, origin, threads_count=1, prefetch_all=False, merging_size=4 * MIB)
            reader = await open_reader(services, image, text)
            with trio.fail_after(60):
                await reader.prefetch([b"/d/data", b"/none", b"/b"])
            assert order(origin) == ["d", "b"]
            assert len(origin.data_requests) <= 8  # of 24 segments: merged, and the first ones small
            sizes = [last - first + 1 for first, last in (request.span or (0, -1) for request in origin.data_requests)]
            assert sizes[0] == MIB < max(sizes), sizes
            reader.close()
            off = await open_reader(services, image, config_text(tmp_path / "off", origin, enable=False))
            asked = len(origin.data_requests)
            await off.prefetch([b"/d/data"])
            assert len(origin.data_requests) == asked
            off.close()

    trio.run(main)


def test_a_file_of_one_chunk_many_times_over_holds_nobody_up(tmp_path: Path) -> None:
    """Nothing is to be fetched of it but once, and the loop has its turn while it is looked through."""
    options = BuildOptions(chunk_size=0x1000, prefetch_policy="fs", prefetch=[b"/zeros"])
    image = tiny_image(tmp_path, {"zeros": bytes(3 * prefetch._EXTENTS)}, options)
    (tmp_path / image.blob_id).write_bytes(image.blob)
    device = {"backend": {"type": "localfs", "config": {"dir": str(tmp_path)}}}

    async def main() -> None:
        async with open_services() as services:
            reader = await open_reader(services, image, json.dumps({"device": device, "mode": "direct"}))
            plan = list(prefetch.Prefetcher(reader, services.scheduler)._plan([b"/zeros"]))
            assert sum(segment is not None for segment in plan) <= 2 and plan.count(None) >= 2
            reader.close()

    trio.run(main)


def test_the_rest_waits_for_the_start_of_an_image_that_nobody_has_read(
    origin: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "GRACE", 0.2)
    image = tiny_image(tmp_path, FILES)
    origin.blobs[image.blob_id] = image.blob

    async def main() -> None:
        async with open_services() as services, trio.open_nursery() as nursery:
            reader = await open_reader(services, image, config_text(tmp_path / "cache", origin))
            nursery.start_soon(reader.learn)
            nursery.start_soon(reader.prefetch)
            await trio.sleep(1)
            assert not origin.data_requests
            await reader.read(reader.bootstrap.resolve(b"d/data"), 0, 4096)
            with trio.fail_after(60):
                while reader.cache_counters.prefetch_data_amount < 4 * MIB:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
            reader.close()

    trio.run(main)


def test_the_rest_lets_a_program_go_first_that_reads_what_is_here(
    origin: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "GRACE", 0.0)
    image = tiny_image(tmp_path, FILES)
    origin.blobs[image.blob_id] = image.blob

    async def main() -> None:
        async with open_services() as services, trio.open_nursery() as nursery:
            reader = await open_reader(services, image, config_text(tmp_path / "cache", origin, threads_count=1))
            ino = reader.bootstrap.resolve(b"d/data")
            await reader.read(ino, 0, 4096)
            await services.scheduler.idle()
            nursery.start_soon(reader.prefetch)
            begin = last = trio.current_time()
            rests = 0
            while (now := trio.current_time()) < begin + 1.5:
                rests, last = rests + (now - last > 0.05), now  # a machine that stalls: prefetch may take it for rest
                assert reader.read_now(ino, 0, 4096) is not None
                await trio.sleep(0.02)
            # one a second
            assert reader.cache_counters.prefetch_requests_count <= 2 + (now - begin) + rests
            with trio.fail_after(60):
                while reader.cache_counters.prefetch_data_amount < 8 * MIB:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
            reader.close()

    trio.run(main)


def test_the_bandwidth_is_obeyed_by_prefetch_alone(image: TinyImage, origin: FaultyServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with open_services() as services:
            text = config_text(tmp_path, origin, bandwidth_rate=2 * MIB)
            reader = await open_reader(services, image, text)
            started = time.monotonic()
            with trio.move_on_after(2):
                await reader.prefetch()
            fetched = reader.cache_counters.prefetch_data_amount
            # one second's worth at once, then 2 MiB/s, and the last request may overdraw
            assert fetched <= (time.monotonic() - started) * 2 * MIB + 2 * MIB + 2 * SEGMENT_SIZE
            for name, data in FILES.items():  # demand reads do not care
                assert await read_file(reader, name) == data
            reader.close()

    trio.run(main)


def test_demand_reads_do_not_wait_for_prefetch(image: TinyImage, origin: FaultyServer, tmp_path: Path) -> None:
    """Prefetch with many threads on a slow server; a demand read meets at most the requests on their way, and nothing
    new is prefetched while demand is in flight."""
    origin.latency = 0.3

    async def main() -> None:
        async with open_services() as services:
            reader = await open_reader(services, image, config_text(tmp_path, origin, threads_count=16))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reader.prefetch)
                # The first request to a source goes alone; then all that prefetch has begun is on its way.
                with trio.fail_after(60):
                    while len(origin.data_requests) < 8:  # noqa: ASYNC110
                        await trio.sleep(0.01)
                before = services.scheduler.courtesy.running  # maybe sent and not yet seen by the server
                ino = reader.bootstrap.resolve(b"d/data")
                names: list[int] = []
                for offset in range(0, 3 * MIB, 512 * 1024):
                    mark = len(origin.data_requests)
                    await reader.read(ino, offset, 4096)
                    names.append(len(origin.data_requests) - mark)
                # Each demand read caused its own request (and read-ahead none: the reads are not in sequence); beside
                # it at most one of prefetch was begun.
                assert names[0] <= 2 + before and all(count <= 2 for count in names[1:]), (before, names)
                nursery.cancel_scope.cancel()
            reader.close()

    trio.run(main)


def test_demand_makes_a_waiting_prefetch_urgent(image: TinyImage, origin: FaultyServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with open_services() as services:
            reader = await open_reader(services, image, config_text(tmp_path, origin))
            scheduler = services.scheduler
            scheduler.courtesy.running = 100  # as if other images had begun all that may be
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reader.prefetch)
                await trio.sleep(0.1)
                assert not origin.data_requests
                with trio.fail_after(60):
                    assert await read_file(reader, "c/data") == FILES["c/data"]
                nursery.cancel_scope.cancel()
            reader.close()

    trio.run(main)


def test_prefetch_goes_on_beside_a_reader(
    image: TinyImage, origin: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slowly; what it is at comes at full speed when somebody wants it."""

    async def main() -> None:
        async with open_services() as services:
            text = config_text(tmp_path, origin, prefetch_all=False, merging_size=4 * MIB)
            reader = await open_reader(services, image, text)
            courtesy = services.scheduler.courtesy
            courtesy.reader_comes()  # and stays
            courtesy.rate = 20e6
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reader.prefetch, [b"/d/data"])
                with trio.fail_after(60):
                    while reader.cache_counters.entries_count < 1:  # noqa: ASYNC110
                        await trio.sleep(0.01)
                before = reader.cache_counters.entries_count
                with trio.fail_after(60):
                    while reader.cache_counters.entries_count == before:  # noqa: ASYNC110
                        await trio.sleep(0.01)
                monkeypatch.setattr("nydusfs.courtesy._SLOWEST", 1024.0)
                courtesy.rate = 1.0  # from here on it would take a quarter of an hour a request
                await trio.sleep(0.2)
                with trio.fail_after(40):
                    assert await read_file(reader, "d/data") == FILES["d/data"]
                nursery.cancel_scope.cancel()
            reader.close()

    trio.run(main)


def test_a_sequential_reader_is_read_ahead_of(image: TinyImage, origin: FaultyServer, tmp_path: Path) -> None:
    origin.latency = 0.5

    async def main() -> None:
        async with open_services() as services:
            reader = await open_reader(services, image, config_text(tmp_path, origin))
            assert await read_file(reader, "b/data") == FILES["b/data"]
            times = [request.when for request in origin.data_requests]
            assert len(times) >= 3
            # overlapping round trips: no answer to the one was there yet
            assert any(second - first < origin.latency for first, second in itertools.pairwise(times))
            reader.close()

    trio.run(main)


def test_what_is_read_ahead_comes_in_few_requests_over_a_fast_link_only(tmp_path: Path) -> None:
    image = tiny_image(tmp_path, {"big": noise(16 * MIB, 9)})

    async def main(origin: FaultyServer) -> None:
        async with open_services() as services:
            for rate, most in ((200e6, 8 * MIB), (40e6, 2 * MIB), (1e6, MERGE)):
                reader = await open_reader(services, image, config_text(tmp_path / str(rate), origin))
                extents = reader.bootstrap.extents(reader.bootstrap.resolve(b"big"), 0, 16 * MIB)
                rows = [reader.chunks.find(extent.blob_index, extent.blob_offset) for extent in extents]
                origin.requests.clear()
                services.scheduler.courtesy.rate = rate
                segments = [reader.segment_of(0, row) for row in rows]
                reader.start(segments)
                for segment in segments:
                    await reader.whole(segment)
                sizes = [request.span[1] - request.span[0] + 1 for request in origin.data_requests if request.span]
                assert sizes == [most] * (16 * MIB // most)
                reader.close()

    with faulty_server({image.blob_id: image.blob}) as origin:
        trio.run(main, origin)


def test_small_files_in_sequence_come_in_few_requests_although_guesses_bring_some(tmp_path: Path) -> None:
    files = {f"d/{number:04}": noise(8 << 10, number) + bytes(8 << 10) for number in range(1000)}
    image = tiny_image(tmp_path, files)

    async def main(origin: FaultyServer) -> None:
        async with open_services() as services, trio.open_nursery() as nursery:
            reader = await open_reader(services, image, config_text(tmp_path / "cache", origin))
            nursery.start_soon(reader.learn)
            while reader.foresight is None:  # noqa: ASYNC110 - it says nothing when it begins
                await trio.sleep(0.01)
            for name, data in files.items():
                ino = reader.bootstrap.resolve(name.encode())
                parts = await trio.to_thread.run_sync(reader.read_now, ino, 0, len(data))  # as the driver does
                assert (await reader.read(ino, 0, len(data)) if parts is None else b"".join(parts)) == data
            await services.scheduler.idle()  # readers have their bytes before a slow disk has them
            segments = reader.cache_counters.entries_count * (16 << 10) // SEGMENT_SIZE
            assert segments >= 60
            assert len(origin.data_requests) < segments / 3
            nursery.cancel_scope.cancel()

    with faulty_server({image.blob_id: image.blob}, latency=0.01) as origin:
        trio.run(main, origin)


def test_modules_are_followed_where_an_answer_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lib, tag = "usr/lib/python3", sys.implementation.cache_tag

    def module(name: str, source: str, seed: int) -> tuple[str, bytes]:
        code = compile(f"{source}\nDATA = {noise(300_000, seed)!r}", f"/{lib}/{name}.py", "exec")
        return f"{lib}/__pycache__/{name}.{tag}.pyc", MAGIC_NUMBER + bytes(12) + marshal.dumps(code)

    modules = [("one", "import far", 1), ("far", "", 2), ("other", "import away", 3), ("away", "", 4)]
    files: dict[str, bytes] = {}
    for number, one in enumerate(modules):
        files |= {f"between{number}": noise(3 * MIB, 30 + number), **dict([module(*one)])}
    files |= {f"{number:03}": noise(600_000, 10 + number) for number in range(24)}
    if pyc.read(files[f"{lib}/__pycache__/one.{tag}.pyc"]) is None:
        pytest.skip(f"modules of {tag} are not understood")
    image = tiny_image(tmp_path, files)

    async def main(origin: FaultyServer) -> None:
        async with open_services() as services, trio.open_nursery() as nursery:
            reader = await open_reader(services, image, config_text(tmp_path / "cache", origin))
            nursery.start_soon(reader.learn)
            while reader.foresight is None:  # noqa: ASYNC110 - it says nothing when it begins
                await trio.sleep(0.01)

            async def read(name: str) -> None:
                assert await reader.read(reader.bootstrap.resolve(name.encode()), 0, 1 << 20) == files[name]

            def here(name: str) -> bool:
                ino = reader.bootstrap.resolve(f"{lib}/__pycache__/{name}.{tag}.pyc".encode())
                return all(map(reader.is_ready, reader.segments_of(ino, 0, 300_000)))

            for number in range(22, 0, -2):  # in no sequence: a request each
                await read(f"{number:03}")
            monkeypatch.setattr(remote, "INSTANT", 1000.0)
            await read(f"{lib}/__pycache__/one.{tag}.pyc")
            await trio.sleep(0.2)
            await services.scheduler.idle()
            assert here("one") and not here("far")
            monkeypatch.setattr(remote, "INSTANT", 0.0)
            await read(f"{lib}/__pycache__/other.{tag}.pyc")
            with trio.fail_after(60):
                while not here("away"):  # noqa: ASYNC110 - guesses tell nobody
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    with faulty_server({image.blob_id: image.blob}, latency=0.005) as origin:
        trio.run(main, origin)


def test_what_a_program_claims_of_itself_is_no_reason_to_hold_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loader, dynamic section and names of libraries as long as a file of one chunk many times over."""
    size = 96 * MIB
    head = elf._HEADER.pack(elf.MAGIC + b"\2\1", 3, 62, 1, 0, 64, 0, 0, 64, 56, 3, 0, 0, 0)
    for tag in (1, 2, 3):  # what is mapped, dynamic, loader
        head += elf._PROGRAM.pack(tag, 4, 0 if tag == 1 else 4096, 0, 0, size, size, 0)
    tags = ((elf.NEEDED, 1), (elf.NEEDED, size - 8192), (elf.STRTAB, 8192), (elf.STRSZ, size))
    dynamic = b"".join(elf._DYNAMIC.pack(*one) for one in tags)
    rest = b"".join(elf._DYNAMIC.pack(1, 1 + number) for number in range(MIB // 16))  # no end of it
    program = head.ljust(4096, b"\0") + dynamic + rest[4096 + len(dynamic) :]
    image = tiny_image(tmp_path, {"program": program + rest * (size // MIB - 1)})
    held: list[int] = []
    peek = ImageReader.peek

    async def look(reader: ImageReader, ino: int, offset: int, wanted: int) -> bytes:
        found = await peek(reader, ino, offset, wanted)
        held.append(len(found))
        return found

    monkeypatch.setattr(ImageReader, "peek", look)

    async def main(origin: FaultyServer) -> None:
        async with open_services() as services, trio.open_nursery() as nursery:
            reader = await open_reader(services, image, config_text(tmp_path / "cache", origin))
            foresight = Foresight(reader, services.scheduler)
            nursery.start_soon(foresight.run)
            monkeypatch.setattr(reader.source, "instant", lambda: False)
            foresight.opened(reader.bootstrap.resolve(b"program"), program[:4])
            with trio.fail_after(60):
                while len(held) < 4:  # noqa: ASYNC110 - head, loader, dynamic section, names
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    with faulty_server({image.blob_id: image.blob}, latency=0.005) as origin:
        trio.run(main, origin)
    assert max(held) <= 16 * MIB and sum(held) <= 17 * MIB


def test_a_reader_does_not_wait_for_the_cache_to_be_written(
    image: TinyImage, origin: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, go_on = BlobCache.write, threading.Event()

    def hang(cache: BlobCache, segment: Segment, plain: Plain) -> bool:
        assert go_on.wait(90)
        return write(cache, segment, plain)

    monkeypatch.setattr(BlobCache, "write", hang)

    async def main() -> None:
        async with open_services() as services:
            reader = await open_reader(services, image, config_text(tmp_path, origin))
            ino = reader.bootstrap.resolve(b"b/data")
            with trio.fail_after(40):
                assert await reader.read(ino, 0, 2 * MIB) == FILES["b/data"][: 2 * MIB]
                assert await reader.read(ino, 4096, 4096) == FILES["b/data"][4096:8192]  # not fetched again
            assert len({request.span for request in origin.data_requests}) == len(origin.data_requests)
            (extent,) = reader.bootstrap.extents(ino, 0, 4096)
            segment = reader.segment_of(extent.blob_index, reader.chunks.find(extent.blob_index, extent.blob_offset))
            assert not reader.is_ready(segment)
            with trio.move_on_after(0.2):
                await reader.whole(segment)  # a kernel mount's: it must be in the file
                pytest.fail("not in the cache, and said to be")
            go_on.set()
            with trio.fail_after(40):
                assert bytes(await reader.whole(segment)) == FILES["b/data"][: segment.size]
            assert reader.is_ready(segment)
            reader.close()

    trio.run(main)


def test_what_is_fetched_ahead_is_read_before_it_is_written(
    image: TinyImage, origin: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    write = BlobCache.write

    def hang(cache: BlobCache, segment: Segment, plain: Plain) -> bool:
        begun.set()
        assert go_on.wait(90)
        return write(cache, segment, plain)

    monkeypatch.setattr(BlobCache, "write", hang)

    async def main() -> None:
        async with open_services() as services, trio.open_nursery() as nursery:
            reader = await open_reader(services, image, config_text(tmp_path, origin))
            ino = reader.bootstrap.resolve(b"b/data")
            jobs = [reader.job(segment) for segment in dict.fromkeys(reader.segments_of(ino, 0, 2 * MIB))]
            assert len(jobs) == 2
            nursery.start_soon(partial(services.scheduler.fetch, jobs, Priority.LEARNED, 4 * MIB))
            with trio.fail_after(40):
                await trio.to_thread.run_sync(begun.wait, 40)
                parts = await trio.to_thread.run_sync(reader.read_now, ino, 4096, 4096)
                assert [bytes(part) for part in parts or ()] == [FILES["b/data"][4096:8192]], "by a thread of FUSE's"
                assert await reader.read(ino, 0, 4096) == FILES["b/data"][:4096], "by the event loop"
            assert not reader.is_ready(jobs[0].segment)
            assert len({request.span for request in origin.data_requests}) == len(origin.data_requests)
            go_on.set()
            with trio.fail_after(40):
                await services.scheduler.idle()
            assert all(reader.is_ready(job.segment) for job in jobs)
            reader.close()

    trio.run(main)


@pytest.mark.parametrize("why", ["well", "behind", "limit"])
def test_the_event_loop_writes_only_where_that_waits_for_nothing(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small segments are written in place; not if that takes an fdatasync, or something has to be chosen that goes."""
    files = {str(number): noise(20_000, number) for number in range(40)}
    image = tiny_image(tmp_path, files)
    writers: list[bool] = []
    write = BlobCache.write

    def note(cache: BlobCache, segment: Segment, plain: Plain) -> bool:
        writers.append(threading.current_thread() is threading.main_thread())
        return write(cache, segment, plain)

    async def main(origin: FaultyServer) -> None:
        async with open_services() as services:
            reader = await open_reader(services, image, config_text(tmp_path / "cache", origin))
            assert reader.store is not None
            if why == "limit":
                reader.store.set_limit(Limit(300_000))
            await read_file(reader, "0")
            await services.scheduler.idle()
            if why == "behind":
                monkeypatch.setattr(reader.store.syncer, "full", lambda: True)
            monkeypatch.setattr(BlobCache, "write", note)
            for name, data in files.items():
                assert await read_file(reader, name) == data
                await services.scheduler.idle()
            reader.close()

    with faulty_server({image.blob_id: image.blob}) as origin:
        trio.run(main, origin)
    assert set(writers) == {why == "well"}


def test_what_a_disk_did_not_take_is_given_to_it_once(
    image: TinyImage, origin: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is slow when it has room again: the next attempt is made when the last one is over, or both write the
    same segments, and who comes second finds the file gone that he was writing and takes the disk for broken."""
    write, go_on, lock = BlobCache.write, threading.Event(), threading.Lock()
    begun: list[str] = []

    def hang(cache: BlobCache, segment: Segment, plain: Plain) -> bool:
        with lock:
            begun.append(segment.name)
        assert go_on.wait(40)
        return write(cache, segment, plain)

    monkeypatch.setattr("nydusfs.fetch.KEEP_PAUSE", 0.0)

    async def main() -> None:
        async with open_services() as services:
            reader = await open_reader(services, image, config_text(tmp_path, origin))
            ino = reader.bootstrap.resolve(b"b/data")
            segments = list(dict.fromkeys(reader.segments_of(ino, 0, 2 * MIB)))
            monkeypatch.setattr(BlobCache, "write", lambda cache, segment, plain: False)
            with trio.fail_after(40):
                assert await reader.read(ino, 0, 2 * MIB) == FILES["b/data"][: 2 * MIB]
                await services.scheduler.idle()
                monkeypatch.setattr(BlobCache, "write", hang)
                for _ in range(10):
                    assert await reader.read(ino, 0, 2 * MIB) == FILES["b/data"][: 2 * MIB]
                    await trio.sleep(0.01)
                tries = len(begun)
                go_on.set()
                assert tries == 1
                while not all(map(reader.is_ready, segments)):
                    assert await reader.read(ino, 0, 2 * MIB) == FILES["b/data"][: 2 * MIB]
                    await trio.sleep(0.01)
                assert len(begun) == len(set(begun)) == len(segments)
            assert reader.store is not None and reader.store.health.well()
            reader.close()

    trio.run(main)


@pytest.mark.root
def test_a_full_disk_costs_speed_only(
    image: TinyImage, origin: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(small)], check=True, timeout=30)
    try:

        async def main() -> None:
            async with open_services() as services:
                reader = await open_reader(services, image, config_text(small / "cache", origin))
                for name, data in FILES.items():
                    assert await read_file(reader, name) == data
                warnings = [record for record in caplog.records if "is full" in record.getMessage()]
                assert len(warnings) == 1
                # Small reads of a segment that could not be kept do not fetch it again each time.
                asked = len(origin.data_requests)
                ino = reader.bootstrap.resolve(b"d/data")
                for offset in range(2 * MIB, 3 * MIB, 4096):
                    assert await reader.read(ino, offset, 4096) == FILES["d/data"][offset : offset + 4096]
                assert len(origin.data_requests) - asked <= 2
                await trio.run_process(["mount", "-o", "remount,size=40m", str(small)])
                await trio.sleep(1.1)
                services.scheduler._recent.clear()
                for name, data in FILES.items():
                    assert await read_file(reader, name) == data
                assert "can be written again" in caplog.text
                asked = len(origin.data_requests)
                for name, data in FILES.items():
                    assert await read_file(reader, name) == data
                assert len(origin.data_requests) == asked
                reader.close()

        trio.run(main)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True, timeout=30)


def test_validate_finds_damage_in_the_cache(
    image: TinyImage, origin: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = config_text(tmp_path, origin).replace('"blobcache"', '"blobcache", "validate": true')

    async def main() -> None:
        async with open_services() as services:
            reader = await open_reader(services, image, text)
            assert await read_file(reader, "a/data") == FILES["a/data"]
            reader.close()
        for path in (tmp_path / image.blob_id).iterdir():
            data = bytearray(path.read_bytes())
            data[100] ^= 1
            path.write_bytes(data)
        async with open_services() as services:
            reader = await open_reader(services, image, text)
            assert await read_file(reader, "a/data") == FILES["a/data"]
            assert "damaged in the cache" in caplog.text
            reader.close()

    trio.run(main)


def test_umount_during_prefetch(image: TinyImage, origin: FaultyServer, tmp_path: Path) -> None:
    origin.latency = 0.1

    async def main() -> None:
        async with open_services() as services:
            reader = await open_reader(services, image, config_text(tmp_path, origin))
            with trio.move_on_after(0.15):
                await reader.prefetch()
            reader.close()
            await trio.sleep(0.5)  # fetches on their way end without harm
            again = await open_reader(services, image, config_text(tmp_path, origin))
            assert await read_file(again, "a/data") == FILES["a/data"]
            again.close()

    trio.run(main)


def test_images_that_claim_one_blob_do_not_see_each_others_bytes(tmp_path: Path) -> None:
    """Same blob id, same places, other contents: a hostile bootstrap must not fill another image's cache. Segments that
    are the same in both are shared."""
    common = noise(2 * MIB, 77)
    one = tiny_image(tmp_path, {"a": common, "b": noise(5000, 1)}, BuildOptions(blob_id="claimed"))
    (tmp_path / "two").mkdir()
    two = tiny_image(tmp_path / "two", {"a": common, "b": noise(5000, 2)}, BuildOptions(blob_id="claimed"))
    with faulty_server({"claimed": one.blob}) as first, faulty_server({"claimed": two.blob}) as second:

        async def main() -> None:
            async with open_services() as services:
                for image, server in ((one, first), (two, second), (one, first)):
                    reader = await open_reader(services, image, config_text(tmp_path / "cache", server))
                    for name, data in image.files.items():
                        assert await read_file(reader, name) == data
                    reader.close()
            assert len(first.data_requests) == 3
            assert len(second.data_requests) == 1

        trio.run(main)
