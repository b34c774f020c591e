"""Misses from a registry that readers' threads ask by themselves: one request whoever wants it, and whatever is not as
it should be ends as in the ordinary way."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from nydusfs.config import load_config
from nydusfs.errors import ReadError
from nydusfs.hands import Hands
from nydusfs.http import direct
from nydusfs.image_reader import ImageReader
from nydusfs.segments import pair_of
from nydusfs.services import Services, open_services
from nydusfs.sources import RegistrySource, athand, registry
from nydusfs.sources.standing import State
from tests.lab.faulty import FaultyServer, Request, faulty_server, self_signed
from tests.lab.tiny import TinyImage, noise, tiny_image

MIB = 1 << 20
CHUNKS = 24
WARM = 9  # misses until the registry is known
SLACK = 20.0
RIGHT = ("whole-200", "chunked", "chunked-200")  # for the loop
WRONG = [
    "500", "503", "429", "404", "short-body", "early-close", "empty", "wrong-bytes", "whole-200", "whole-206",
    "chunked", "chunked-200", "no-range-header", "wrong-range", "garbage", "hang-headers", "hang-body", "trickle",
    "endless-headers",
]  # fmt: skip


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> TinyImage:
    return tiny_image(tmp_path_factory.mktemp("image"), {"a": noise(CHUNKS * MIB, 1)})


@pytest.fixture
def server(image: TinyImage) -> Iterator[FaultyServer]:
    with faulty_server({image.blob_id: image.blob}) as opened:
        yield opened


@pytest.fixture(autouse=True)
def busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(athand, "QUICK", 1000.0)
    monkeypatch.setattr(athand, "LIFE", 1000.0)
    monkeypatch.setattr(registry, "SOON_HERE", 1000.0)
    monkeypatch.setattr(registry, "LATE_HERE", 1000.0)
    monkeypatch.setattr(direct, "PATIENCE", 15.0)


Scenario = Callable[["Case"], Awaitable[None]]


class Case:
    def __init__(self, image: TinyImage, reader: ImageReader, services: Services) -> None:
        self.image, self.reader, self.services = image, reader, services
        self.ino = reader.bootstrap.resolve(b"a")

    def expected(self, chunk: int) -> bytes:
        return self.image.files["a"][chunk * MIB + 5 : chunk * MIB + 4101]

    async def here(self, chunk: int, hands: Hands | None = None) -> bytes | None:
        """4 KiB of a chunk, as far as a thread gets."""
        call = self.reader.read_now
        parts = await trio.to_thread.run_sync(call, self.ino, chunk * MIB + 5, 4096, 0, hands)
        return None if parts is None else b"".join(parts)

    async def loop(self, chunk: int) -> bytes:
        return await self.reader.read(self.ino, chunk * MIB + 5, 4096)

    async def warm(self) -> None:
        """In no order: nothing is to be fetched ahead."""
        for chunk in list(range(0, 2 * WARM, 2)):
            assert await self.here(chunk) is None
            assert await self.loop(chunk) == self.expected(chunk)
        await self.services.scheduler.idle()


def run(image: TinyImage, server: FaultyServer, folder: Path, scenario: Scenario, **backend: Any) -> None:
    settings = {"scheme": "http", "host": server.netloc, "repo": "a/b", "timeout": 30, "retry_limit": 2, **backend}
    cache = {"type": "blobcache", "config": {"work_dir": str(folder / "cache")}}
    device = {"backend": {"type": "registry", "config": settings}, "cache": cache}
    config = load_config(json.dumps({"device": device, "mode": "direct"}), "test")

    async def main() -> None:
        with trio.fail_after(100):
            async with open_services() as services:
                reader = await services.open_image(str(image.bootstrap), config, name="/i")
                case = Case(image, reader, services)
                await case.warm()
                await scenario(case)
                reader.close()

    trio.run(main)


def test_a_miss_is_one_request_over_the_connection_that_is_there(
    image: TinyImage, server: FaultyServer, tmp_path: Path
) -> None:
    async def scenario(case: Case) -> None:
        source = case.reader.source
        assert isinstance(source, RegistrySource)
        (endpoint,) = source.racer.endpoints
        before, samples, tally = len(server.data_requests), endpoint.standing.latency.samples, endpoint.standing.tally
        connections, requests, had = server.connections, tally.requests, tally.bytes
        for chunk in (1, 5, 3):
            assert await case.here(chunk) == case.expected(chunk)
            assert await case.here(chunk) == case.expected(chunk)  # from the cache
        assert len(server.data_requests) == before + 3 == case.reader.backend_counters.read_count
        assert server.connections == connections
        assert tally.requests == requests + 3 and tally.bytes > had + 2 * MIB
        assert source.counters.sources[endpoint.address].requests == tally.requests
        with trio.fail_after(SLACK):
            while endpoint.standing.latency.samples == samples:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert case.services.scheduler.courtesy.known

    run(image, server, tmp_path, scenario)


@pytest.mark.parametrize("mode", WRONG)
def test_what_is_not_right_is_asked_for_again_in_the_ordinary_way(
    image: TinyImage, server: FaultyServer, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within bounded time, and for a while everything is."""
    monkeypatch.setattr(direct, "PATIENCE", 0.5)
    monkeypatch.setattr(athand, "PAUSE", 1000.0)

    async def scenario(case: Case) -> None:
        answers = [mode]

        def choose(request: Request) -> str:
            return answers.pop() if answers else "ok"

        server.choose = choose
        began = time.monotonic()
        assert await case.here(1) is None
        assert not answers and time.monotonic() < began + SLACK
        assert await case.loop(1) == case.expected(1)
        count = len(server.data_requests)
        assert await case.here(3) is None
        assert len(server.data_requests) == count
        assert await case.loop(3) == case.expected(3)
        assert case.reader.backend_counters.read_errors == 0

    run(image, server, tmp_path, scenario)


def test_a_blob_that_is_wrong_for_good_is_an_error_and_soon_right_again(
    image: TinyImage, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(athand, "PAUSE", 0.0)

    async def scenario(case: Case) -> None:
        server.mode = "wrong-bytes"
        for _ in range(2):
            assert await case.here(1) is None
            with pytest.raises(ReadError):
                await case.loop(1)
        server.mode = "ok"
        assert await case.loop(3) == case.expected(3)
        assert await case.here(1) == case.expected(1)

    run(image, server, tmp_path, scenario)


def test_a_token_that_ended_is_renewed_by_the_loop(
    image: TinyImage, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(athand, "PAUSE", 0.0)
    server.auth = "bearer"

    async def scenario(case: Case) -> None:
        assert await case.here(1) == case.expected(1)
        server.valid_tokens.clear()
        assert await case.here(3) is None
        assert await case.loop(3) == case.expected(3)
        assert await case.loop(5) == case.expected(5)
        assert await case.here(7) == case.expected(7)

    run(image, server, tmp_path, scenario, auth="dXNlcjpzZWNyZXQ=")


def test_connections_that_were_closed_meanwhile(image: TinyImage, server: FaultyServer, tmp_path: Path) -> None:
    async def scenario(case: Case) -> None:
        server.drop_connections()
        await trio.sleep(0.1)
        assert await case.here(1) is None
        assert await case.loop(1) == case.expected(1)
        assert await case.here(3) == case.expected(3)

    run(image, server, tmp_path, scenario)


@pytest.mark.parametrize("first", ["thread", "loop"])
def test_threads_and_loop_make_one_request(image: TinyImage, server: FaultyServer, tmp_path: Path, first: str) -> None:
    async def scenario(case: Case) -> None:
        count = len(server.data_requests)
        server.latency = 0.4
        found: list[bytes] = []

        async def thread() -> None:
            found.append(await case.here(1) or await case.loop(1))

        async def loop() -> None:
            found.append(await case.loop(1))

        async with trio.open_nursery() as nursery:
            for call in (thread, loop, thread) if first == "thread" else (loop, thread, loop):
                nursery.start_soon(call)
                await trio.sleep(0.1)
        assert found == [case.expected(1)] * 3
        assert len(server.data_requests) == count + 1

    run(image, server, tmp_path, scenario)


def test_who_waits_may_be_told_to_give_up(image: TinyImage, server: FaultyServer, tmp_path: Path) -> None:
    """A reader that was killed; and the end of the daemon."""

    async def scenario(case: Case) -> None:
        answers = ["hang-headers"]
        server.choose = lambda request: answers.pop() if answers else "ok"
        hands = Hands()
        async with trio.open_nursery() as nursery:
            began = time.monotonic()
            nursery.start_soon(case.here, 1, hands)
            while answers:  # noqa: ASYNC110 - a server in a thread of its own
                await trio.sleep(0.01)
            hands.give_up(4)
        hands.finish()
        assert time.monotonic() < began + SLACK
        assert await case.loop(1) == case.expected(1)  # over another connection
        assert await case.here(3) == case.expected(3)  # it said nothing of the registry
        answers.append("hang-body")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(case.here, 5)
            while answers:  # noqa: ASYNC110 - a server in a thread of its own
                await trio.sleep(0.01)
            await trio.to_thread.run_sync(case.services.scheduler.lane.close)
        assert not case.services.scheduler.lane.busy()

    patience = direct.PATIENCE
    try:
        direct.PATIENCE = 60.0
        run(image, server, tmp_path, scenario)
    finally:
        direct.PATIENCE = patience


def test_a_registry_that_hangs_holds_few_threads(
    image: TinyImage, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are told at once to ask the loop."""
    monkeypatch.setattr(direct, "PATIENCE", 0.5)

    async def scenario(case: Case) -> None:
        server.mode = "hang-headers"
        results: list[bytes | None] = []

        async def ask(chunk: int) -> None:
            results.append(await case.here(chunk))

        async with trio.open_nursery() as nursery:
            for chunk in (1, 3, 5, 7):
                nursery.start_soon(ask, chunk)
        assert results == [None] * 4
        server.mode = "ok"
        for chunk in (1, 3, 5, 7):
            assert await case.loop(chunk) == case.expected(chunk)

    run(image, server, tmp_path, scenario)


def test_a_mirror_before_the_registry_is_asked_so_while_it_is_well(
    image: TinyImage, server: FaultyServer, tmp_path: Path
) -> None:
    async def scenario(case: Case) -> None:
        source = case.reader.source
        assert isinstance(source, RegistrySource)
        had = len(mirror.data_requests)
        assert await case.here(1) == case.expected(1)
        assert len(mirror.data_requests) == had + 1 and not server.data_requests
        standing = source.racer.endpoints[0].standing
        standing.state = State.DOWN
        assert await case.here(3) is None
        standing.state, standing.error_rate = State.UP, 0.1  # one answer in ten is wrong
        assert await case.here(3) is None
        standing.error_rate = 0.0
        assert len(mirror.data_requests) == had + 1

    with faulty_server({image.blob_id: image.blob}) as mirror:
        run(image, server, tmp_path, scenario, mirrors=[{"host": mirror.url}])


@pytest.mark.parametrize("mode", WRONG)
def test_what_a_mirror_has_wrong_the_loop_finds_elsewhere(
    image: TinyImage, server: FaultyServer, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its answers are so from now on: it is asked again as always, which counts against it, then the registry."""
    monkeypatch.setattr(direct, "PATIENCE", 0.5)
    monkeypatch.setattr(athand, "PAUSE", 1000.0)

    async def scenario(case: Case) -> None:
        mirror.mode = mode
        began = time.monotonic()
        assert await case.here(1) is None
        assert time.monotonic() < began + SLACK
        assert await case.loop(1) == case.expected(1)
        assert bool(server.data_requests) == (mode not in RIGHT)
        assert await case.here(3) is None
        assert await case.loop(3) == case.expected(3)
        assert case.reader.backend_counters.read_errors == 0

    with faulty_server({image.blob_id: image.blob}) as mirror:
        run(image, server, tmp_path, scenario, mirrors=[{"host": mirror.url}])


def test_a_mirror_that_is_late_is_waited_for_by_the_loop(
    image: TinyImage, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "LATE_HERE", 0.5)
    monkeypatch.setattr(direct, "PATIENCE", 1000.0)

    async def scenario(case: Case) -> None:
        answers = ["hang-headers"]
        mirror.choose = lambda request: answers.pop() if answers else "ok"
        with trio.fail_after(SLACK):
            assert await case.here(1) is None
        assert not answers and await case.loop(1) == case.expected(1)

    with faulty_server({image.blob_id: image.blob}) as mirror:
        run(image, server, tmp_path, scenario, mirrors=[{"host": mirror.url}])


def test_not_from_a_mirror_that_takes_its_time(
    image: TinyImage, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "SOON_HERE", 0.015)

    async def scenario(case: Case) -> None:
        assert await case.here(1) is None

    with faulty_server({image.blob_id: image.blob}, latency=0.02) as mirror:
        run(image, server, tmp_path, scenario, mirrors=[{"host": mirror.url}])


def test_not_where_there_are_mirrors_to_choose_from(image: TinyImage, server: FaultyServer, tmp_path: Path) -> None:
    async def scenario(case: Case) -> None:
        assert await case.here(1) is None

    with faulty_server({image.blob_id: image.blob}) as one, faulty_server({image.blob_id: image.blob}) as other:
        run(image, server, tmp_path, scenario, mirrors=[{"host": one.url}, {"host": other.url}])


@pytest.mark.parametrize("bad", [None, "asked", "beside"])
def test_neighbours_that_nodes_share_as_one_range_come_as_one(
    server: FaultyServer, tmp_path: Path, bad: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The range that every other node asks the peer for; what is wrong in one of them is no harm to the other."""
    monkeypatch.setattr(athand, "PAUSE", 1000.0)
    names = [f"f{number:03}" for number in range(64)]  # 16 in a segment
    small = {name: noise(4096, number) + bytes(12288) for number, name in enumerate(names)}
    image = tiny_image(tmp_path, {"a": noise(CHUNKS * MIB, 1), **small})

    async def scenario(case: Case) -> None:
        reader = case.reader

        async def here(name: str) -> bytes | None:
            parts = await trio.to_thread.run_sync(reader.read_now, reader.bootstrap.resolve(name.encode()), 0, 16384)
            return None if parts is None else b"".join(parts)

        asked, pair = None, None
        for name in names:
            (asked,) = reader.segments_of(reader.bootstrap.resolve(name.encode()), 0, 1)
            if (pair := pair_of(reader.chunks, asked)) is not None:
                break
        assert asked is not None and pair is not None
        other = pair[0] if asked.number == pair[1].number else pair[1]
        inodes = {one: reader.bootstrap.resolve(one.encode()) for one in names}
        neighbour = next(one for one in names if reader.segments_of(inodes[one], 0, 1)[0].number == other.number)
        start, end = pair[0].compressed_start, pair[1].compressed_end
        had = len(peer.data_requests)
        if bad is not None:
            place = (asked if bad == "asked" else other).compressed_start + 100
            whole = peer.blobs[image.blob_id]
            peer.blobs[image.blob_id] = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        assert await here(name) == (None if bad == "asked" else small[name])
        assert [request.span for request in peer.data_requests[had:]] == [(start, end - 1)]
        assert reader.is_ready(asked) == (bad != "asked")
        assert reader.is_ready(other) == (bad != "beside")
        assert await here(neighbour) == (None if bad == "beside" else small[neighbour])
        if bad is None:
            assert not server.data_requests and len(peer.data_requests) == had + 1
        for one in (name, neighbour):
            assert await reader.read(reader.bootstrap.resolve(one.encode()), 0, 16384) == small[one]
        assert bool(server.data_requests) == (bad is not None)

    server.blobs = {image.blob_id: image.blob}
    with faulty_server({image.blob_id: image.blob}) as peer:
        peer.said = [("X-Dragonfly-Task", "1")]
        run(image, server, tmp_path, scenario, mirrors=[{"host": peer.url}])


def test_where_a_redirect_leads_to_is_asked_until_it_refuses(
    image: TinyImage, server: FaultyServer, tmp_path: Path
) -> None:
    with faulty_server({image.blob_id: image.blob}) as store:
        server.redirect = store.url

        async def scenario(case: Case) -> None:
            asked, had = len(server.data_requests), len(store.data_requests)
            assert await case.here(1) == case.expected(1)
            assert (len(server.data_requests), len(store.data_requests)) == (asked, had + 1)
            assert "authorization" not in store.data_requests[-1].headers
            answers = ["404", "404"]
            store.choose = lambda request: answers.pop() if answers else "ok"
            assert await case.here(3) is None
            assert await case.loop(3) == case.expected(3)
            assert len(server.data_requests) == asked + 1

        run(image, server, tmp_path, scenario)


@pytest.mark.parametrize("mode", ["ok", "early-close", "wrong-bytes", "hang-body", "503"])
def test_over_tls(image: TinyImage, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mode == "hang-body":
        monkeypatch.setattr(direct, "PATIENCE", 0.5)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*self_signed(tmp_path))

    async def scenario(case: Case) -> None:
        answers = [mode]
        server.choose = lambda request: answers.pop() if answers else "ok"
        found = await case.here(1)
        assert found == (case.expected(1) if mode == "ok" else None)
        assert await case.loop(1) == case.expected(1)
        assert server.connections < WARM

    with faulty_server({image.blob_id: image.blob}, tls=context) as server:
        run(image, server, tmp_path, scenario, scheme="https", skip_verify=True)


def test_not_from_a_registry_that_is_slow(
    image: TinyImage, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(athand, "QUICK", 0.1)
    server.latency = 0.12

    async def scenario(case: Case) -> None:
        assert await case.here(1) is None

    run(image, server, tmp_path, scenario)
