"""The API's HTTP server on a real unix socket: framing, bounds, and that nobody waits for anybody."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from nydusfs.daemon import http
from nydusfs.daemon.http import Request, Response
from nydusfs.errors import NydusError


async def with_server(
    path: Path, handler: Callable[[Request], Awaitable[Response]], client: Callable[[str], Awaitable[None]]
) -> None:
    listener = http.bind_socket(str(path))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(http.serve, listener, handler)
        with trio.fail_after(20):
            await client(str(path))
        nursery.cancel_scope.cancel()


async def talk(path: str, data: bytes, *, close: bool = True) -> bytes:
    stream = await trio.open_unix_socket(path)
    async with stream:
        try:
            await stream.send_all(data)
            if close:
                await stream.send_eof()
        except trio.BrokenResourceError:
            pass
        answer = b""
        try:
            async for part in stream:
                answer += part
        except trio.BrokenResourceError:
            pass
        return answer


async def echo(request: Request) -> Response:
    if request.path == "/none":
        return Response()
    return Response(200, f"{request.method} {request.path} {request.query} {len(request.body)}".encode())


@pytest.mark.trio
async def test_framing(tmp_path: Path) -> None:
    async def client(path: str) -> None:
        one = b"GET /a?id=%2F4&id=x HTTP/1.1\r\nHost: any\r\n\r\n"
        two = b"PUT /none HTTP/1.1\r\nHost: any\r\nContent-Length: 2\r\n\r\n{}"
        answer = await talk(path, one + two + one)
        assert answer.count(b"HTTP/1.1 200") == 2, "pipelined requests are all answered"
        assert answer.count(b"HTTP/1.1 204") == 1
        assert b"Server: Nydus API" in answer
        assert b"Content-Type: application/json" in answer
        assert b"GET /a {'id': '/4'} 0" in answer
        head, _, rest = answer.partition(b"HTTP/1.1 204")[2].partition(b"\r\n\r\n")
        assert b"Content-Length" not in head
        assert rest.startswith(b"HTTP/1.1 200")
        assert b"GET /old {} 0" in await talk(path, b"GET /old HTTP/1.0\r\n\r\n", close=False)
        expect = b"PUT /p HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n"
        stream = await trio.open_unix_socket(path)
        async with stream:
            await stream.send_all(expect)
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 100")
            await stream.send_all(b"abc")
            assert b"PUT /p {} 3" in await stream.receive_some()

    await with_server(tmp_path / "s", echo, client)


@pytest.mark.trio
async def test_bad_and_oversized_requests_are_refused(tmp_path: Path) -> None:
    async def client(path: str) -> None:
        assert b" 400 " in await talk(path, b"this is not http\r\n\r\n")
        assert (await talk(path, b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 4")
        big = b"PUT /p HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
        assert b" 413 " in await talk(path, big + chunk * 5)
        many = "&".join(f"k{n}=v" for n in range(500)).encode()
        assert b" 400 " in await talk(path, b"GET /a?" + many + b" HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b"GET /after {} 0" in await talk(path, b"GET /after HTTP/1.1\r\nHost: a\r\n\r\n"), "still serving"

    await with_server(tmp_path / "s", echo, client)


@pytest.mark.trio
async def test_a_slow_request_does_not_hold_up_another(tmp_path: Path) -> None:
    gate = trio.Event()

    async def handler(request: Request) -> Response:
        if request.path == "/slow":
            await gate.wait()
        return Response(200, request.path.encode())

    async def client(path: str) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk, path, b"POST /slow HTTP/1.1\r\nHost: a\r\n\r\n")
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert b"/quick" in await talk(path, b"GET /quick HTTP/1.1\r\nHost: a\r\n\r\n")
            gate.set()

    await with_server(tmp_path / "s", handler, client)


@pytest.mark.trio
async def test_what_follows_an_answer_follows_for_a_client_that_went_away_too(tmp_path: Path) -> None:
    gone, ended = trio.Event(), trio.Event()

    async def handler(request: Request) -> Response:
        await gone.wait()
        return Response(204, then=ended.set)

    async def client(path: str) -> None:
        stream = await trio.open_unix_socket(path)
        await stream.send_all(b"PUT /exit HTTP/1.1\r\nHost: a\r\n\r\n")
        await trio.testing.wait_all_tasks_blocked(0.01)
        await stream.aclose()
        gone.set()
        await ended.wait()

    await with_server(tmp_path / "s", handler, client)


def test_socket_path_rules(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with http.bind_socket(path):
        assert os.stat(path).st_mode & 0o777 == 0o600
        with pytest.raises(http.SocketInUseError, match=f"pid {os.getpid()}"):
            http.bind_socket(path)
    assert os.path.exists(path)
    http.bind_socket(path).close()  # the file of a dead instance is replaced
    (tmp_path / "file").write_text("keep me")
    with pytest.raises(NydusError, match="not a socket"):
        http.bind_socket(str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "keep me"
    with pytest.raises(NydusError, match="107"):
        http.bind_socket(str(tmp_path / ("x" * 120)))
    with pytest.raises(NydusError, match="No such file"):
        http.bind_socket(str(tmp_path / "no" / "s"))
