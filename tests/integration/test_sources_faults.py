"""Faults of mirrors, registries and redirect targets: passed over in bounded time, and every byte right.

A read goes the whole way (extents, cache, scheduler, source, verification) against servers that misbehave on purpose.
"""

from __future__ import annotations

import base64
import json
import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from bootstrap.layout.common import Compressor
from bootstrap.options import BuildOptions
from nydusfs.config import load_config
from nydusfs.errors import ReadError
from nydusfs.image_reader import ImageReader
from nydusfs.services import Services, open_services
from nydusfs.sources import probe, race, registry, tokens
from nydusfs.sources.limits import Seldom
from tests.lab.daemon import Nydusd, can_mount_fuse, reader
from tests.lab.faulty import FaultyServer, dead_port, faulty_server, self_signed
from tests.lab.tiny import TinyImage, noise, tiny_image

FILES = {
    "small": b"hello, world\n",
    "data.bin": noise(3 << 20),
    **{f"lib/m{number:03}.py": noise(3000 + number, number) for number in range(200)},
}
BAD_ANSWERS = [
    "503", "429", "404", "short-body", "early-close", "empty", "wrong-bytes", "whole-206", "no-range-header",
    "wrong-range", "garbage",
]  # fmt: skip
RIGHT_ANSWERS = ["ok", "wrong-total", "chunked", "whole-200", "chunked-200"]
SLACK = 20.0  # seconds a loaded machine may lose
SLOW_ANSWERS = ["hang-headers", "hang-body", "trickle", "endless-headers"]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> TinyImage:
    return tiny_image(tmp_path_factory.mktemp("image"), FILES)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test machines stall for seconds; only the tests about hanging peers are about time."""
    monkeypatch.setattr(registry, "MIRROR_PATIENCE", 20.0)
    monkeypatch.setattr(probe, "PATIENCE", 20.0)
    monkeypatch.setattr(race, "UNKNOWN", 20.0)
    monkeypatch.setattr(race, "ORIGIN_HEDGE", 20.0)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def server(stack: ExitStack, image: TinyImage, **settings: Any) -> FaultyServer:
    return stack.enter_context(faulty_server({image.blob_id: image.blob}, **settings))


def config_text(work: Path, origin: str, mirrors: list[dict[str, Any]] | None = None, **backend: Any) -> str:
    settings: dict[str, Any] = {
        "host": origin, "repo": "a/b", "scheme": "http", "timeout": 30, "connect_timeout": 20, "mirrors": mirrors or [],
        **backend,
    }  # fmt: skip
    cache = {"type": "blobcache", "config": {"work_dir": str(work)}}
    return json.dumps(
        {"device": {"backend": {"type": "registry", "config": settings}, "cache": cache}, "mode": "direct"}
    )


Scenario = Callable[[ImageReader, Services], Awaitable[None]]


def run(image: TinyImage, text: str, scenario: Scenario) -> None:
    async def main() -> None:
        with trio.fail_after(100):
            async with open_services() as services:
                reader = await services.open_image(str(image.bootstrap), load_config(text, "test"), name="img")
                await scenario(reader, services)
                reader.close()

    trio.run(main)


async def read_file(reader: ImageReader, name: str, step: int = 131072) -> bytes:
    ino = reader.bootstrap.resolve(name.encode())
    size = reader.bootstrap.attr(ino).size
    return b"".join([await reader.read(ino, offset, step) for offset in range(0, size, step)])


async def check_all(reader: ImageReader) -> None:
    for name, data in FILES.items():
        assert await read_file(reader, name) == data, name


@pytest.mark.parametrize("mode", BAD_ANSWERS)
def test_a_mirror_that_answers_wrong_is_passed_over(
    mode: str, image: TinyImage, stack: ExitStack, tmp_path: Path
) -> None:
    origin, mirror = server(stack, image), server(stack, image, mode=mode)

    async def scenario(reader: ImageReader, _: Services) -> None:
        started = time.monotonic()
        await check_all(reader)
        assert mirror.data_requests
        # left alone after its failures and tried once a second, not asked for every segment for ever
        assert len(mirror.data_requests) <= 8 + (time.monotonic() - started)
        assert origin.data_requests

    run(image, config_text(tmp_path, origin.netloc, [{"host": mirror.url}]), scenario)


@pytest.mark.parametrize("mode", RIGHT_ANSWERS)
def test_odd_but_right_answers_are_used(mode: str, image: TinyImage, stack: ExitStack, tmp_path: Path) -> None:
    """The mirror alone serves everything: Dragonfly's invented totals, chunked bodies, 200 with the whole blob."""
    origin, mirror = server(stack, image), server(stack, image, mode=mode)

    async def scenario(reader: ImageReader, _: Services) -> None:
        await check_all(reader)
        assert not origin.data_requests
        for request in mirror.data_requests:
            assert request.span is not None
            assert request.headers["accept-encoding"] == "identity"
            assert request.headers["x-dragonfly-registry"] == "https://index.docker.io"

    headers = {"X-Dragonfly-Registry": "https://index.docker.io"}
    run(image, config_text(tmp_path, origin.netloc, [{"host": mirror.url, "headers": headers}]), scenario)


def test_nodes_cut_alike_what_a_classic_dragonfly_shares_by_range(stack: ExitStack, tmp_path: Path) -> None:
    """Whatever is read first, and how much at once; other mirrors get merged ranges."""
    data = noise(4 << 20)
    image = tiny_image(tmp_path, {"data.bin": data}, BuildOptions(chunk_size=64 * 1024))
    origin = server(stack, image)
    spans: list[list[tuple[int, int] | None]] = []
    for node, (says, step) in enumerate(
        [("X-Dragonfly-Task", 1 << 20), ("X-Dragonfly-Task", 96 * 1024), ("X", 1 << 20)]
    ):
        peer = server(stack, image, said=[(says, "t")])

        async def scenario(reader: ImageReader, _: Services, step: int = step) -> None:
            ino = reader.bootstrap.resolve(b"data.bin")
            await reader.read(ino, 0, 1)  # finds out with whom it talks
            for offset in reversed(range(0, len(data), step)):
                assert await reader.read(ino, offset, step) == data[offset : offset + step]

        run(image, config_text(tmp_path / str(node), origin.netloc, [{"host": peer.url}]), scenario)
        spans.append([request.span for request in peer.data_requests])
    assert len(spans[0]) == len(spans[1]) == len(set(spans[0])) > 10
    assert set(spans[0]) == set(spans[1])
    assert len(spans[2]) < 8


def test_small_neighbours_come_in_pairs_that_are_the_same_on_every_node(stack: ExitStack, tmp_path: Path) -> None:
    """From a classic Dragonfly, whatever is read first; also where a node has one of the two already."""
    data = b"".join(noise(2000, number) + bytes(6192) for number in range(1024))  # 64 KB stored of each 256 KiB
    image = tiny_image(tmp_path, {"data.bin": data}, BuildOptions(chunk_size=64 * 1024))
    origin = server(stack, image)
    spans: list[list[tuple[int, int] | None]] = []
    for node, order in enumerate([1, -1]):
        peer = server(stack, image, said=[("X-Dragonfly-Task", "t")])

        async def scenario(reader: ImageReader, services: Services, order: int = order) -> None:
            ino = reader.bootstrap.resolve(b"data.bin")
            await reader.read(ino, 0, 1)  # finds out with whom it talks
            for place in list(range(0, len(data), 512 * 1024))[::order]:
                # Some of the second one first, so that nobody reads in sequence.
                for offset in (place + 300 * 1024, place + 10):
                    assert await reader.read(ino, offset, 4096) == data[offset : offset + 4096]
            await services.scheduler.idle()
            assert all(reader.is_ready(segment) for segment in reader.segments_of(ino, 0, len(data)))
            if order > 0:
                first, second = reader.segments_of(ino, 0, 512 * 1024)
                for segment in (first, second):
                    cache = reader.cache(segment.blob)
                    assert cache is not None
                    cache.drop(segment)
                    await reader.read(ino, segment.start, 1)

        run(image, config_text(tmp_path / str(node), origin.netloc, [{"host": peer.url}]), scenario)
        spans.append([request.span for request in peer.data_requests])
    pairs = len(data) // (512 * 1024)
    assert len(spans[0]) == pairs + 2 and len(spans[1]) == pairs
    assert set(spans[0]) == set(spans[1]) and len(set(spans[1])) == pairs
    assert spans[0][0] == spans[0][-1] == spans[0][-2]
    assert not origin.data_requests


@pytest.mark.parametrize("mode", SLOW_ANSWERS)
def test_a_mirror_that_hangs_is_left_in_time(
    mode: str, image: TinyImage, stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a patience of 1 s here. A trickle or an endless head moves on, so its size at 256 KiB/s cuts it."""
    monkeypatch.setattr(registry, "MIRROR_PATIENCE", 1.0)
    origin, mirror = server(stack, image), server(stack, image, mode=mode)

    async def scenario(reader: ImageReader, _: Services) -> None:
        started = time.monotonic()
        assert await read_file(reader, "small") == FILES["small"]
        assert time.monotonic() - started < 5 + SLACK
        await check_all(reader)
        assert time.monotonic() - started < 10 + SLACK
        assert len(mirror.data_requests) <= 5  # two or three hangs and it is left alone

    run(image, config_text(tmp_path, origin.netloc, [{"host": mirror.url}]), scenario)


def test_mirrors_are_asked_in_order_and_a_dead_one_is_left_out(
    image: TinyImage, stack: ExitStack, tmp_path: Path
) -> None:
    origin, second = server(stack, image), server(stack, image)
    refused = stack.enter_context(dead_port())

    async def scenario(reader: ImageReader, _: Services) -> None:
        await check_all(reader)
        assert second.data_requests
        assert not origin.data_requests

    run(image, config_text(tmp_path, origin.netloc, [{"host": f"http://{refused}"}, {"host": second.url}]), scenario)


def test_a_mirror_comes_back(
    image: TinyImage, stack: ExitStack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    origin, mirror = server(stack, image), server(stack, image, mode="503")
    settings = {"host": mirror.url, "failure_limit": 1, "health_check_interval": 1, "ping_url": f"{mirror.url}/ping"}

    async def scenario(reader: ImageReader, _: Services) -> None:
        assert await read_file(reader, "small") == FILES["small"]
        assert len(mirror.requests) == 1
        await read_file(reader, "data.bin")
        # down: not asked for a second, which a slow machine may need for that read
        assert all(request.when >= mirror.requests[0].when + 1 for request in mirror.requests[1:])
        mirror.mode = "ok"
        await trio.sleep(1.2)  # it is tried again by the first use after its pause
        await check_all(reader)
        while "recovered" not in caplog.text:  # noqa: ASYNC110 - it is said nowhere else
            await trio.sleep(0.05)
        assert any(request.target == "/ping" for request in mirror.requests)

    run(image, config_text(tmp_path, origin.netloc, [settings]), scenario)


def test_everything_wrong_is_eio_with_one_line(
    image: TinyImage,
    stack: ExitStack,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Seldom, "EVERY", 3600.0)
    origin, mirror = server(stack, image, mode="wrong-bytes"), server(stack, image, mode="wrong-bytes")

    async def scenario(reader: ImageReader, _: Services) -> None:
        ino = reader.bootstrap.resolve(b"/lib/m007.py")
        with pytest.raises(ReadError) as caught:
            await reader.read(ino, 0, 4096)
        assert caught.value.errno == 5
        lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
        assert len(lines) == 1
        for part in ("image img", "/lib/m007.py", image.blob_id, "chunk ", "mirror ", origin.netloc, "digest is wrong",
                     ": EIO"):  # fmt: skip
            assert part in lines[0], (part, lines[0])
        for other in range(8, 12):
            with pytest.raises(ReadError):
                await read_file(reader, f"lib/m{other:03}.py")
        lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
        assert len(lines) == 1, "more of one blob in a row are counted, and said with the next line"
        # Never sticky: the sources are well again, and so is the read.
        origin.mode = mirror.mode = "ok"
        assert await read_file(reader, "lib/m007.py") == FILES["lib/m007.py"]

    run(image, config_text(tmp_path, origin.netloc, [{"host": mirror.url}]), scenario)


def test_one_flipped_bit_costs_one_file(tmp_path: Path, stack: ExitStack) -> None:
    image = tiny_image(tmp_path, FILES, BuildOptions(compressor=Compressor.NONE))
    place = image.blob.index(FILES["lib/m100.py"])
    damaged = bytearray(image.blob)
    damaged[place + 5] ^= 1
    origin = stack.enter_context(faulty_server({image.blob_id: bytes(damaged)}))

    async def scenario(reader: ImageReader, _: Services) -> None:
        for name, data in FILES.items():
            if name == "lib/m100.py":
                with pytest.raises(ReadError):
                    await read_file(reader, name)
            else:
                assert await read_file(reader, name) == data

    run(image, config_text(tmp_path / "cache", origin.netloc), scenario)


def test_a_cut_blob_still_serves_its_head(tmp_path: Path, stack: ExitStack) -> None:
    image = tiny_image(tmp_path, FILES)
    cut = image.blob.index(FILES["lib/m100.py"]) + 10
    origin = stack.enter_context(faulty_server({image.blob_id: image.blob[:cut]}))

    async def scenario(reader: ImageReader, _: Services) -> None:
        assert await read_file(reader, "data.bin") == FILES["data.bin"]
        assert await read_file(reader, "lib/m099.py") == FILES["lib/m099.py"]
        for name in ("lib/m100.py", "lib/m150.py"):
            with pytest.raises(ReadError):
                await read_file(reader, name)

    run(image, config_text(tmp_path / "cache", origin.netloc), scenario)


def test_origin_down_is_an_error_in_bounded_time_and_retries_are_counted(
    image: TinyImage, stack: ExitStack, tmp_path: Path
) -> None:
    origin = server(stack, image, mode="500")

    async def scenario(reader: ImageReader, _: Services) -> None:
        started = time.monotonic()
        with pytest.raises(ReadError, match=r"status 500 \(3 times\)"):
            await read_file(reader, "small")
        assert time.monotonic() - started < 3 + SLACK
        assert len(origin.data_requests) == 3
        origin.choose = lambda request: "500" if len(origin.data_requests) == 4 else "ok"
        assert await read_file(reader, "small") == FILES["small"]

    run(image, config_text(tmp_path, origin.netloc, retry_limit=2), scenario)


AUTH = base64.b64encode(b"user:secret").decode()


@pytest.mark.parametrize("late", ["answers", "says it is busy", "tokens", "says it has no tokens"])
def test_a_registry_that_has_no_time_costs_its_reader_time(
    late: str, image: TinyImage, stack: ExitStack, tmp_path: Path
) -> None:
    """For twice as long as one request may take, and no second one is configured."""
    settings: dict[str, Any] = {"auth": "bearer", "hang_tokens": late == "tokens"}
    origin = server(stack, image, **settings)
    if late == "says it has no tokens":
        origin.token_status = 503
    elif late != "tokens":
        origin.mode = "hang-headers" if late == "answers" else "503"

    async def scenario(reader: ImageReader, _: Services) -> None:
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                assert await read_file(reader, "small") == FILES["small"]

            nursery.start_soon(read)
            await trio.sleep(4)
            assert origin.requests
            origin.mode, origin.hang_tokens, origin.token_status = "ok", False, 200

    run(image, config_text(tmp_path, origin.netloc, auth=AUTH, timeout=2, connect_timeout=2, retry_limit=0), scenario)


@pytest.mark.parametrize("kind", ["bearer", "basic"])
def test_authentication_through_a_mirror(kind: str, image: TinyImage, stack: ExitStack, tmp_path: Path) -> None:
    """The mirror passes 401 on like Dragonfly; challenge and token come from the registry's side, data from it."""
    origin, mirror = server(stack, image, auth=kind), server(stack, image, auth=kind)
    mirror.valid_tokens = origin.valid_tokens

    async def scenario(reader: ImageReader, _: Services) -> None:
        await check_all(reader)
        assert len(mirror.data_requests) > 3
        assert [request.span for request in origin.data_requests] == [(0, 0)]  # the one look for a challenge
        assert not mirror.tokens  # the mirror's own realm was not believed
        assert len([token for token in origin.tokens if token.method == "GET"]) == (kind == "bearer")

    run(image, config_text(tmp_path, origin.netloc, [{"host": mirror.url}], auth=AUTH), scenario)


def test_tokens_are_renewed_before_they_expire(
    image: TinyImage, stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = server(stack, image, auth="bearer", token_life=300)

    async def scenario(reader: ImageReader, _: Services) -> None:
        assert await read_file(reader, "small") == FILES["small"]
        monkeypatch.setattr(tokens, "now", lambda: trio.current_time() + 285)  # 15 s before the end
        before = len(origin.data_requests)
        async with trio.open_nursery() as nursery:
            for name in ("data.bin", "lib/m010.py", "lib/m199.py"):
                nursery.start_soon(read_file, reader, name)
        assert len([token for token in origin.tokens if token.method == "GET"]) == 2
        # Readers beside the one that renews go on with the old token: nobody meets a 401.
        sent = [request.headers["authorization"] for request in origin.data_requests[before:]]
        assert set(sent) <= {"Bearer token-2", "Bearer token-3"}
        assert "Bearer token-3" in sent

    run(image, config_text(tmp_path, origin.netloc, auth=AUTH), scenario)


@pytest.mark.parametrize("kind", ["bearer", "basic"])
@pytest.mark.parametrize("config_id", ["mine", ""], ids=["one", "all"])
def test_credentials_changed_while_running(
    image: TinyImage, stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, config_id: str
) -> None:
    """The registry's password changes: a token still good is used up, then new credentials count, nothing fails."""
    origin = server(stack, image, auth=kind, token_life=300)
    document = json.loads(config_text(tmp_path, origin.netloc, auth=AUTH))
    fresh = base64.b64encode(b"user:changed").decode()

    async def scenario(reader: ImageReader, services: Services) -> None:
        assert await read_file(reader, "small") == FILES["small"]
        services.set_registry_auth("another", base64.b64encode(b"some:one").decode())
        services.set_registry_auth(config_id, fresh)
        origin.login = "user:changed"
        asked = len(origin.tokens)
        assert await read_file(reader, "lib/m010.py") == FILES["lib/m010.py"]
        assert len(origin.tokens) == asked, "the token was still good"
        monkeypatch.setattr(tokens, "now", lambda: trio.current_time() + 285)
        origin.valid_tokens.clear()
        assert await read_file(reader, "data.bin") == FILES["data.bin"]
        used = [request.headers["authorization"] for request in origin.tokens[asked:]]
        assert set(used) == ({f"Basic {fresh}"} if kind == "bearer" else set())
        later = await services.open_image(str(image.bootstrap), reader.config, name="later")
        assert await read_file(later, "data.bin") == FILES["data.bin"]
        later.close()

    document["device"]["id"] = "mine"
    run(image, json.dumps(document), scenario)


def test_credentials_changed_through_the_api(image: TinyImage, stack: ExitStack, tmp_path: Path) -> None:
    """A mount whose password is wrong by now is healed by one call."""
    if reason := can_mount_fuse():
        pytest.skip(reason)
    origin = server(stack, image, auth="bearer", login="user:changed")
    document = json.loads(config_text(tmp_path / "cache", origin.netloc, auth=AUTH))
    document["device"]["id"] = "mine"
    code = "import sys; sys.stdout.write(open(sys.argv[1]).read())"
    with Nydusd() as daemon:
        assert daemon.mount("/x", image.bootstrap, json.dumps(document)).status == 204
        assert reader(code, daemon.mnt / "x" / "small").returncode != 0
        for bad in ("a b", "QQ==\r\nX: y", "\u00fc"):
            assert daemon.call("PUT", "config?id=mine", {"registry_auth": bad}).status == 500
        fresh = base64.b64encode(b"user:changed").decode()
        assert daemon.call("PUT", "config?id=other", {"registry_auth": fresh}).status == 204
        assert reader(code, daemon.mnt / "x" / "small").returncode != 0
        assert daemon.call("PUT", "config?id=mine", {"registry_auth": fresh}).status == 204
        assert reader(code, daemon.mnt / "x" / "small").stdout.encode() == FILES["small"]
        assert fresh not in json.dumps(daemon.get("config?id=mine").body)
        assert fresh not in daemon.log_text()


def test_wrong_credentials_are_named(image: TinyImage, stack: ExitStack, tmp_path: Path) -> None:
    origin = server(stack, image, auth="bearer")

    async def scenario(reader: ImageReader, _: Services) -> None:
        with pytest.raises(ReadError, match="credentials are not accepted"):
            await read_file(reader, "small")

    wrong = base64.b64encode(b"user:guess").decode()
    run(image, config_text(tmp_path, origin.netloc, auth=wrong, retry_limit=2), scenario)


def test_redirects_are_followed_without_credentials_and_remembered(
    image: TinyImage, stack: ExitStack, tmp_path: Path
) -> None:
    store = server(stack, image)
    origin = server(stack, image, auth="bearer", redirect=f"http://localhost:{store.port}")

    async def scenario(reader: ImageReader, _: Services) -> None:
        await read_file(reader, "small")
        asked = len(origin.data_requests)
        await check_all(reader)
        assert len(origin.data_requests) == asked  # the target is known
        assert all("authorization" not in request.headers for request in store.requests)
        assert all(request.target.endswith("?sig=1") for request in store.requests)

    run(image, config_text(tmp_path, origin.netloc, auth=AUTH), scenario)


def test_an_expired_redirect_is_renewed(image: TinyImage, stack: ExitStack, tmp_path: Path) -> None:
    first, second = server(stack, image), server(stack, image)
    origin = server(stack, image, redirect=first.url)

    async def scenario(reader: ImageReader, _: Services) -> None:
        await read_file(reader, "small")
        first.mode = "404"
        origin.redirect = second.url
        await check_all(reader)
        assert second.data_requests

    run(image, config_text(tmp_path, origin.netloc), scenario)


def test_connections_are_kept(image: TinyImage, stack: ExitStack, tmp_path: Path) -> None:
    origin = server(stack, image)

    async def scenario(reader: ImageReader, services: Services) -> None:
        for name in FILES:
            await read_file(reader, name, 1 << 20)
        assert origin.connections <= 4

    run(image, config_text(tmp_path, origin.netloc), scenario)


def test_fifty_readers_of_one_segment_are_one_request(image: TinyImage, stack: ExitStack, tmp_path: Path) -> None:
    origin = server(stack, image, latency=1)

    async def scenario(reader: ImageReader, services: Services) -> None:
        other = await services.open_image(str(image.bootstrap), reader.config, name="second mount")
        readers = [reader, other]
        results: list[bytes] = []

        async def one(number: int) -> None:
            results.append(await read_file(readers[number % 2], f"lib/m{number:03}.py"))

        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(one, number)
            with trio.move_on_after(0.2):  # a reader that is cancelled does not take the fetch along
                await read_file(reader, "lib/m001.py")
        assert sorted(results) == sorted(FILES[f"lib/m{number:03}.py"] for number in range(50))
        assert len(origin.data_requests) == 1
        other.close()

    run(image, config_text(tmp_path, origin.netloc), scenario)


def test_neighbours_of_one_read_are_one_request(tmp_path: Path, stack: ExitStack) -> None:
    image = tiny_image(tmp_path, {"zeros": bytes(3 << 20)})
    origin = stack.enter_context(faulty_server({image.blob_id: image.blob}))

    async def scenario(reader: ImageReader, _: Services) -> None:
        ino = reader.bootstrap.resolve(b"zeros")
        assert await reader.read(ino, 0, 3 << 20) == bytes(3 << 20)
        assert len(origin.data_requests) == 1

    run(image, config_text(tmp_path / "cache", origin.netloc), scenario)


def test_the_proxy_is_used_and_fallen_back_from(image: TinyImage, stack: ExitStack, tmp_path: Path) -> None:
    origin, proxy = server(stack, image), server(stack, image)

    async def scenario(reader: ImageReader, _: Services) -> None:
        assert await read_file(reader, "small") == FILES["small"]
        assert proxy.requests[0].target == f"{origin.url}/v2/a/b/blobs/sha256:{image.blob_id}"
        assert not origin.requests
        proxy.mode = "503"
        await check_all(reader)
        assert origin.requests

    run(image, config_text(tmp_path, origin.netloc, proxy={"url": proxy.url}), scenario)


def test_tls_and_its_settings(image: TinyImage, stack: ExitStack, tmp_path: Path) -> None:
    cert, key = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    secure, plain = server(stack, image, tls=context), server(stack, image)

    async def works(reader: ImageReader, _: Services) -> None:
        await check_all(reader)

    def fails(message: str) -> Scenario:
        async def scenario(reader: ImageReader, _: Services) -> None:
            with pytest.raises(ReadError, match=message):
                await read_file(reader, "small")

        return scenario

    def text(name: str, host: str, **settings: Any) -> str:
        return config_text(tmp_path / name, host, scheme="https", **settings)

    run(image, text("a", secure.netloc, ca_cert_files=[str(cert)]), works)
    assert secure.connections <= 5  # kept, as without TLS
    run(image, text("b", secure.netloc, skip_verify=True), works)
    run(image, text("c", secure.netloc), fails("certificate not accepted"))
    run(image, text("d", secure.netloc, ca_cert_files=["/none.pem"]), fails("cannot load ca_cert_files /none.pem"))
    run(image, text("e", plain.netloc), fails("TLS handshake failed"))
    run(image, text("f", plain.netloc, skip_verify=True), works)  # upstream's fall-back to plain HTTP
