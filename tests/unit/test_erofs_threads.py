"""Devices of EROFS mounts that the thread which took the kernel's question fills from a registry by itself."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from nydusfs.cache.devices import DeviceFiles
from nydusfs.drivers.erofs import events, fanotify
from nydusfs.drivers.erofs.events import Events, Question
from nydusfs.drivers.erofs.filling import ErofsImage
from nydusfs.drivers.erofs.journal import Journal
from nydusfs.drivers.stats import FsStats
from nydusfs.http import direct
from nydusfs.sources import athand
from tests.lab.faulty import FaultyServer, faulty_server
from tests.lab.tiny import TinyImage, noise, tiny_image
from tests.unit.test_direct import CHUNKS, MIB, SLACK, Case, run
from tests.unit.test_erofs_parts import Told


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> TinyImage:
    return tiny_image(tmp_path_factory.mktemp("image"), {"a": noise(CHUNKS * MIB, 1)})


@pytest.fixture
def server(image: TinyImage) -> Iterator[FaultyServer]:
    with faulty_server({image.blob_id: image.blob}) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(athand, "QUICK", 1000.0)
    monkeypatch.setattr(athand, "LIFE", 1000.0)
    monkeypatch.setattr(direct, "PATIENCE", 60.0)


def test_a_fill_ends_with_the_mount_and_wrong_bytes_reach_no_device(
    image: TinyImage, server: FaultyServer, tmp_path: Path
) -> None:
    async def scenario(case: Case) -> None:
        reader = case.reader
        store = reader.store
        assert store is not None
        store.devices = devices = DeviceFiles(store.path, store.boot, Told())
        volume: Any = SimpleNamespace(stats=FsStats("x"), root_ino=1)
        mounted = ErofsImage("/", volume, reader, devices, [])
        blob = reader.bootstrap.blobs[0]

        def question(chunk: int) -> Question:
            (segment,) = reader.segments_of(case.ino, chunk * MIB, 1)
            devices.create(blob.id, segment.name)
            fd = devices.open(blob.id, segment.name, os.O_RDWR)
            return Question(devices.device(blob.id, segment.name), 0, 4096, 1, fd, time.time())

        def found(asked: Question) -> bytes:
            return os.pread(asked.fd, MIB, 0)

        async def fill(asked: Question) -> bool:
            assert mounted.at_hand(asked)
            return await trio.to_thread.run_sync(mounted.fill_now, asked)

        had = len(server.data_requests)
        first = question(1)
        assert await fill(first)
        assert found(first) == image.files["a"][MIB : 2 * MIB]
        assert len(server.data_requests) == had + 1
        await case.services.scheduler.idle()

        server.choose = lambda request: "hang-headers"
        asked, results = question(5), []
        began = time.monotonic()

        async def note() -> None:
            results.append(await fill(asked))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(note)
            while len(server.data_requests) < had + 2:  # noqa: ASYNC110 - a server in a thread of its own
                await trio.sleep(0.01)
            mounted.cancel()
        assert results == [False]
        assert time.monotonic() < began + SLACK
        assert found(asked) == b""
        server.choose = None
        assert await mounted.fill(asked)  # over another connection
        assert found(asked) == image.files["a"][5 * MIB : 6 * MIB]

        server.mode = "wrong-bytes"
        last = question(9)  # who ended the last one said nothing of the registry
        assert not await fill(last)
        assert found(last) == b""
        assert not mounted.at_hand(last)
        server.mode = "ok"
        assert await mounted.fill(last)
        assert found(last) == image.files["a"][9 * MIB : 10 * MIB]

        for one in (first, asked, last):
            os.close(one.fd)

    run(image, server, tmp_path, scenario)


class Slow:
    """A server whose disk takes its time."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    def ready(self, question: Question) -> bool:
        return False

    def simple(self, question: Question) -> bool:
        return True

    def fill_now(self, question: Question) -> bool:
        self.begun.set()
        return self.go_on.wait(60)

    async def fill(self, question: Question) -> bool:
        raise AssertionError("not asked")


def test_who_waits_for_a_thread_that_outlasts_its_worker_is_the_successors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group is not this worker's any more when the data is there; its reader must not be taken for answered."""
    kernel, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    journal, device, server = Journal.create(), os.open(tmp_path, os.O_RDONLY), Slow()
    monkeypatch.setattr(events, "_device", lambda fd: "0" * 8 + "/blob/0-00")
    before = set(threading.enumerate())

    async def main() -> None:
        taken = Events(ours.fileno(), Journal(journal), server)
        async with trio.open_nursery() as nursery:
            await nursery.start(taken.run)
            kernel.send(fanotify.EVENT_METADATA.pack(24, 3, 0, 24, fanotify.FAN_PRE_ACCESS, os.dup(device), 1))
            assert await trio.to_thread.run_sync(server.begun.wait, 60)
            taken.stop(successor=True)

    with kernel, ours:
        ours.setblocking(False)
        trio.run(main)
        server.go_on.set()
        for thread in set(threading.enumerate()) - before:
            if "_read" in thread.name:
                thread.join(60)
        kernel.setblocking(False)
        with pytest.raises(BlockingIOError):
            kernel.recv(100)
        assert [one.name for one in Journal(journal).left()] == ["0" * 8 + "/blob/0-00"]
    os.close(device)
    os.close(journal)
