"""Requests over pooled connections, with the limits that keep one bad peer from holding a reader."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import trio

from nydusfs.http import wire
from nydusfs.http.certificates import Certificates
from nydusfs.http.connection import Connection, Progress, Tls
from nydusfs.http.direct import Direct
from nydusfs.http.errors import HttpError, HttpTimeout, ProtocolViolation, StaleConnection
from nydusfs.http.pacing import PACE
from nydusfs.http.url import Origin, Url

MAX_CONNECTIONS = 32  # per origin
MAX_IDLE = 16
IDLE_SECONDS = 30.0  # below the keep-alive limit of common servers (nginx 75 s, Go registries without limit)
SMALL_BODY = 1 << 20  # token replies and error texts
# A peer may be slow as long as it moves: the hard limit of a request is its stall limit plus its size at this rate.
SLOWEST = 64 * 1024
_AS_IT_IS = ("Accept-Encoding", "identity")


@dataclass(slots=True)
class Response:
    """`body` holds exactly the asked range when the status is 200 or 206 of `get_range`."""

    status: int
    headers: dict[str, str]
    body: bytearray | bytes
    length: int | None = None  # Content-Length as the peer stated it
    body_seconds: float = 0.0  # from the head to the end of the body
    sent: str = ""  # for who asked: what it had to say of itself

    @property
    def has_data(self) -> bool:
        return self.status in (200, 206)

    def get(self, name: str) -> str:
        return self.headers.get(name, "")


# Reads the body behind a head; second value: the connection is at the end of the message and can be kept.
_Receive: TypeAlias = Callable[[Connection, wire.Head], Awaitable[tuple[Response, bool]]]


@dataclass(slots=True)
class _Pool:
    idle: list[Connection] = field(default_factory=list)
    slots: trio.Semaphore = field(default_factory=lambda: trio.Semaphore(MAX_CONNECTIONS))


@dataclass(frozen=True, slots=True)
class Via:
    """An HTTP proxy; `auth` is the value of Proxy-Authorization."""

    origin: Origin
    auth: str = ""


class HttpClient:
    """One per set of TLS settings, shared by all sources of the process. Use it from one trio thread only.

    Files that cannot be used fail each https request with `ConnectFailed`.
    """

    def __init__(self, tls: Tls | None = None) -> None:
        self._certificates = Certificates(tls or Tls())
        self._pools: dict[tuple[Origin, Via | None, bool], _Pool] = {}

    async def get_range(
        self,
        url: Url,
        offset: int,
        size: int,
        headers: Iterable[tuple[str, str]],
        *,
        connect_timeout: float,
        timeout: float,
        slowest: int = SLOWEST,
        patient: bool = False,
        via: Via | None = None,
        on_status: Callable[[int], None] | None = None,
        sloppy: bool = False,
        around: tuple[int, int] | None = None,
        progress: Progress | None = None,
    ) -> Response:
        """GET bytes `offset` to `offset + size - 1`.

        Status 206 is accepted only with the right start, end and length (a total is never looked at: Dragonfly's
        classic daemon invents it, and turns an origin that ignores ranges into 206 with the whole blob). Status 200
        with the whole blob is read up to the end of the range and the connection closed. Any other status is returned
        with a small body for the caller to judge. `timeout` is seconds without progress; the whole request ends after
        `timeout` + `size / slowest` seconds (`slowest` in bytes per second). With `patient` (there is no other source)
        a peer that sends the whole blob gets the time to reach the range. `on_status` hears of the status before the
        body is here. `sloppy`: a 200 with just the range is taken as well (small servers on unix sockets do that).
        `around`: ask for bytes from the first to before the second of these instead; of an answer that may end early
        (with the blob) only what was wanted is read. `progress` is kept up to date. Raises `HttpError`.
        """
        first, behind = around or (offset, offset + size)

        async def receive(connection: Connection, head: wire.Head) -> tuple[Response, bool]:
            if on_status is not None:
                on_status(head.status)
            if progress is not None:
                progress.gives = head.status in (200, 206)
            if head.status == 206:
                if around is not None:
                    return await _cut_out(connection, head, offset, size, around)
                return await _partial(connection, head, offset, size)
            if head.status == 200:
                if sloppy and head.length == size and not head.chunked:
                    return Response(200, head.headers, await connection.read_exact(size), size), True
                if patient:
                    connection.allow(offset / slowest)
                return await _whole(connection, head, offset, size)
            return await _small(connection, head)

        request = [*headers, ("Range", f"bytes={first}-{behind - 1}"), _AS_IT_IS]
        hard = timeout + (behind - first) / slowest
        return await self._exchange("GET", url, request, b"", receive, connect_timeout, timeout, hard, via, progress)

    async def request(
        self,
        method: str,
        url: Url,
        headers: Iterable[tuple[str, str]] = (),
        body: bytes = b"",
        *,
        connect_timeout: float,
        timeout: float,
        via: Via | None = None,
    ) -> Response:
        """A small request whose answer is at most `SMALL_BODY` bytes (tokens, pings). Raises `HttpError`."""
        request = [*headers, _AS_IT_IS]
        return await self._exchange(method, url, request, body, _small, connect_timeout, timeout, timeout, via)

    async def _exchange(
        self,
        method: str,
        url: Url,
        headers: Iterable[tuple[str, str]],
        body: bytes,
        receive: _Receive,
        connect_timeout: float,
        timeout: float,
        hard: float,
        via: Via | None,
        progress: Progress | None = None,
    ) -> Response:
        target = url.target
        if via is not None and url.origin.scheme == "http":
            target = url.full
            if via.auth:
                headers = [*headers, ("Proxy-Authorization", via.auth)]
        message = wire.format_request(method, target, url.origin.netloc, headers, body)
        # Connections with small windows are kept apart: a window that was small once grows slowly.
        key = (url.origin, via, PACE.get() is not None)
        pool = self._pools.get(key)
        if pool is None:
            self._close_old()
            pool = self._pools[key] = _Pool()
        try:
            pool.slots.acquire_nowait()
        except trio.WouldBlock:
            with trio.CancelScope(deadline=trio.current_time() + hard) as waiting:
                await pool.slots.acquire()
            if waiting.cancelled_caught:
                raise HttpTimeout(f"no free connection within {hard:.3g} s") from None
        try:
            limits = (connect_timeout, timeout, hard, progress)
            try:
                return await self._attempt(pool, url.origin, message, receive, limits, via, reuse=True)
            except StaleConnection:
                return await self._attempt(pool, url.origin, message, receive, limits, via, reuse=False)
        finally:
            pool.slots.release()

    async def _attempt(
        self,
        pool: _Pool,
        origin: Origin,
        message: bytes,
        receive: _Receive,
        limits: tuple[float, float, float, Progress | None],
        via: Via | None,
        *,
        reuse: bool,
    ) -> Response:
        connect_timeout, timeout, hard, progress = limits
        pace = PACE.get()
        connection = self._take_idle(pool) if reuse else None
        if connection is None:
            if progress is not None:
                progress.reached = False
            connection = await self._connect(origin, connect_timeout, via)
        if progress is not None:
            progress.reached = True
        keep = False
        try:
            started = trio.current_time()
            with trio.CancelScope(deadline=started + min(timeout, hard)) as scope:
                connection.limit(scope, started, timeout, started + hard, progress, pace)
                await connection.send(message)
                head = await connection.read_head()
                begun = trio.current_time()
                if pace is not None:
                    pace.begun(begun - started)
                response, clean = await receive(connection, head)
                response.body_seconds = trio.current_time() - begun
                keep = clean and head.keep_alive
                return response
            raise HttpTimeout(f"no progress for {timeout:.3g} s or not done within {hard:.3g} s")
        finally:
            if keep and len(pool.idle) < MAX_IDLE:
                connection.park()
                pool.idle.append(connection)
            else:
                connection.close()

    def _take_idle(self, pool: _Pool) -> Connection | None:
        """The connection used last: it is the least likely to be closed."""
        now = time.monotonic()
        while True:
            try:
                connection = pool.idle.pop()  # a thread may take some too
            except IndexError:
                return None
            if now - connection.idle_since < IDLE_SECONDS and connection.alive():
                return connection
            connection.close()

    def _close_old(self) -> None:
        """What is closed when its turn comes, of hosts whose turn may never come."""
        limit = time.monotonic() - IDLE_SECONDS
        for pool in self._pools.values():
            for connection in [one for one in pool.idle if one.idle_since <= limit]:
                try:
                    pool.idle.remove(connection)
                except ValueError:
                    continue  # a thread has taken it
                connection.close()

    async def prepare(self, origin: Origin, connect_timeout: float, via: Via | None = None) -> None:
        """Have a connection ready for the next request. Raises `HttpError`."""
        pool = self._pools.setdefault((origin, via, False), _Pool())
        if not pool.idle:
            connection = await self._connect(origin, connect_timeout, via)
            connection.park()
            pool.idle.append(connection)

    def direct(self, url: Url, headers: Iterable[tuple[str, str]], patience: float = math.inf) -> Direct:
        """For threads that get ranges by themselves, over connections that are kept here. `patience`: see `Direct`."""
        message = wire.format_request("GET", url.target, url.origin.netloc, [*headers, _AS_IT_IS])
        pool = self._pools.setdefault((url.origin, None, False), _Pool())

        def take() -> Connection | None:
            try:
                connection = pool.idle.pop()
            except IndexError:
                return None
            fresh = connection.own is not None and time.monotonic() - connection.idle_since < IDLE_SECONDS
            if fresh and connection.alive():
                return connection
            pool.idle.append(connection)  # for the loop, to use or to close
            return None

        return Direct(message.removesuffix(b"\r\n"), take, pool.idle.append, patience)

    async def _connect(self, origin: Origin, timeout: float, via: Via | None) -> Connection:
        secure = origin.scheme == "https" or (via is not None and via.origin.scheme == "https")
        context = await self._certificates.context() if secure else None
        with trio.move_on_after(timeout):
            return await Connection.open(origin, context, via.origin if via else None, via.auth if via else "")
        raise HttpTimeout(f"no connection within {timeout:.3g} s")

    def close(self) -> None:
        for pool in self._pools.values():
            while pool.idle:
                pool.idle.pop().close()


async def _partial(connection: Connection, head: wire.Head, offset: int, size: int) -> tuple[Response, bool]:
    span = wire.parse_content_range(head.get("content-range"))
    if span is None:
        raise ProtocolViolation(f"206 without a usable Content-Range ({head.get('content-range')[:60]!r})")
    if span != (offset, offset + size - 1):
        raise ProtocolViolation(f"206 for bytes {span[0]}-{span[1]} instead of {offset}-{offset + size - 1}")
    if head.chunked:
        body, clean = await connection.read_chunked(0, size + 1, size + 1)
        if len(body) != size:
            raise ProtocolViolation(f"206 with {len(body)} bytes or more for a range of {size}")
        return Response(206, head.headers, body), clean
    if head.length is None:
        raw = await connection.read_to_end(size)
        if len(raw) != size:
            raise ProtocolViolation(f"206 with {len(raw)} bytes for a range of {size}")
        return Response(206, head.headers, raw), False
    if head.length != size:
        raise ProtocolViolation(f"206 with {head.length} bytes for a range of {size}")
    return Response(206, head.headers, await connection.read_exact(size), size), True


async def _cut_out(
    connection: Connection, head: wire.Head, offset: int, size: int, around: tuple[int, int]
) -> tuple[Response, bool]:
    first, behind = around
    span = wire.parse_content_range(head.get("content-range"))
    if span is None or span[0] != first or not offset + size <= span[1] + 1 <= behind:
        raise ProtocolViolation(f"206 with {head.get('content-range')[:60]!r} for bytes {first}-{behind - 1}")
    if head.chunked or head.length != span[1] - first + 1:
        raise ProtocolViolation(f"206 whose length is not that of bytes {span[0]}-{span[1]}")
    await connection.skip(offset - first)
    body = await connection.read_exact(size)
    return Response(206, head.headers, body, size), offset + size == span[1] + 1


async def _whole(connection: Connection, head: wire.Head, offset: int, size: int) -> tuple[Response, bool]:
    if head.chunked:
        body, clean = await connection.read_chunked(offset, size, size)
        if len(body) != size:
            raise ProtocolViolation(f"200 with a body that ends before byte {offset + size}")
        return Response(200, head.headers, body), clean
    if head.length is not None and head.length < offset + size:
        raise ProtocolViolation(f"200 with {head.length} bytes, byte {offset + size - 1} was asked for")
    await connection.skip(offset)
    body = await connection.read_exact(size)
    return Response(200, head.headers, body, head.length), head.length == offset + size


async def _small(connection: Connection, head: wire.Head) -> tuple[Response, bool]:
    """A body of at most `SMALL_BODY`; one without stated length is read to the end of the stream."""
    length = head.length
    if head.bodiless or length == 0:
        return Response(head.status, head.headers, b"", 0), True
    if head.chunked:
        body, clean = await connection.read_chunked(0, SMALL_BODY, SMALL_BODY)
        return Response(head.status, head.headers, body), clean
    if length is None:
        return Response(head.status, head.headers, await connection.read_to_end(SMALL_BODY)), False
    if length > SMALL_BODY:
        return Response(head.status, head.headers, b"", length), False
    return Response(head.status, head.headers, await connection.read_exact(length), length), True


__all__ = ["HttpClient", "HttpError", "Progress", "Response", "Tls", "Via"]
