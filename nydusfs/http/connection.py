"""One connection: connect (directly or through a proxy), send a request, read a head and a body into one buffer."""

from __future__ import annotations

import os
import ssl
import time
from base64 import b64encode
from typing import NamedTuple

import trio

from nydusfs.http import wire
from nydusfs.http.errors import ConnectFailed, ProtocolViolation, StaleConnection, TlsFailed
from nydusfs.http.pacing import Pace
from nydusfs.http.transport import IO_ERRORS, OwnSocket, PlainTransport, StreamTransport, TlsTransport, Transport
from nydusfs.http.url import Origin

_RECEIVE = 64 * 1024
MIN_PIECE = 16 * 1024  # of a body that is paced
# The stall clock is moved this often at most: setting a trio deadline costs 4 us.
_PROGRESS_STEP = 0.1


class Tls(NamedTuple):
    """`ca_files` are added to the system's roots; `client`: files of certificate and key (key "": in the same file)."""

    ca_files: tuple[str, ...] = ()
    skip_verify: bool = False
    client: tuple[tuple[str, str], ...] = ()


def tls_context(tls: Tls) -> ssl.SSLContext:
    """Raises `ConnectFailed` for files that cannot be used."""
    context = ssl.create_default_context()
    path = ""
    try:
        for path in tls.ca_files:
            context.load_verify_locations(cafile=path)
        for path, key in tls.client:
            context.load_cert_chain(path, key or None, password="")
    except (OSError, ssl.SSLError) as error:
        what = "ca_cert_files" if path in tls.ca_files else "client certificate"
        raise ConnectFailed(f"cannot load {what} {path}: {error}") from None
    if tls.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class Progress:
    """When an exchange last moved, by trio's clock, whether an answer has begun, and whether it is one with data
    (`gives`). For who waits for it; coarse. `reached`: there is a connection.
    `excused`: set by who asks for much more than is wanted; being late then says nothing about the peer."""

    __slots__ = ("begun", "excused", "gives", "moved", "reached")

    def __init__(self, now: float) -> None:
        self.moved = now
        self.begun = self.gives = False
        self.reached = True
        self.excused = False


class Connection:
    __slots__ = (
        "_buffer", "_hard", "_moved", "_pace", "_progress", "_scope", "_stall", "_transport", "_window",
        "idle_since", "origin", "reused",
    )  # fmt: skip

    def __init__(self, origin: Origin, transport: Transport) -> None:
        self.origin = origin
        self._transport = transport
        self._buffer = bytearray()
        self._scope: trio.CancelScope | None = None
        self._stall = self._hard = float("inf")
        self._moved = 0.0
        self._progress: Progress | None = None
        self._pace: Pace | None = None
        self._window = 0  # as set; 0: the kernel's
        self.idle_since = 0.0
        self.reused = False

    @classmethod
    async def open(cls, origin: Origin, context: ssl.SSLContext | None, proxy: Origin | None, auth: str) -> Connection:
        """Raises `ConnectFailed`. `proxy` is used by CONNECT when the origin is https; otherwise the caller sends
        absolute-form targets over it."""
        first = proxy or origin
        try:
            if first.scheme == "unix":
                tcp = await trio.open_unix_socket(first.host)
            else:
                # bytes: for text the first look-up imports an encoding, 4 ms of processor time before the first request
                host = first.host.encode() if first.host.isascii() else first.host
                tcp = await trio.open_tcp_stream(host, first.port)
            if first.scheme != "https" and origin.scheme != "https":
                return cls(origin, PlainTransport(tcp))
        except OSError as error:
            raise ConnectFailed(_reason(error)) from None
        if proxy is None:
            context = context or ssl.create_default_context()
            try:
                return cls(origin, await TlsTransport.open(tcp, context, origin.host))
            except IO_ERRORS as error:
                raise TlsFailed(f"TLS handshake failed ({_reason(error)})") from None
        stream: trio.abc.Stream = tcp
        try:
            if proxy is not None and proxy.scheme == "https":
                stream = await _start_tls(stream, context, proxy.host)
            if origin.scheme == "https":
                if proxy is not None:
                    await _tunnel(stream, origin, auth)
                stream = await _start_tls(stream, context, origin.host)
        except BaseException:
            tcp.socket.close()
            raise
        return cls(origin, StreamTransport(stream))

    def alive(self) -> bool:
        """Whether an idle connection can be used: bytes or an end waiting on it mean that it cannot. About 2 us."""
        return not self._buffer and self._transport.quiet()

    def limit(
        self,
        scope: trio.CancelScope,
        now: float,
        stall: float,
        hard: float,
        progress: Progress | None = None,
        pace: Pace | None = None,
    ) -> None:
        """Let `scope`, whose deadline is set for now, end after `stall` seconds without progress and at the clock time
        `hard` in any case. The time that `pace` has bodies wait does not count."""
        self._scope = scope
        self._progress = progress
        self._pace = pace
        if pace is not None:
            self._use_window(pace.window)
        self._stall = stall
        self._hard = hard
        self._moved = now

    def _advance(self) -> None:
        now = trio.current_time()
        if self._progress is not None:
            self._progress.moved = now
        if self._scope is not None and now - self._moved > _PROGRESS_STEP:
            self._moved = now
            self._scope.deadline = min(now + self._stall, self._hard)

    def _use_window(self, size: int) -> None:
        if size != self._window:
            self._window = size
            self._transport.set_window(size)

    async def _receive_paced(self, pace: Pace, view: memoryview) -> int:
        self._use_window(pace.window)
        piece = view[: max(MIN_PIECE, self._window // 4)]
        waited = await pace.permit(len(piece))
        if waited > 0:
            self._hard += waited
            if self._scope is not None:
                self._moved = trio.current_time()
                self._scope.deadline = min(self._moved + self._stall, self._hard)
        got = await self._transport.receive_into(piece)
        pace.received(got)
        return got

    def allow(self, seconds: float) -> None:
        """Move the hard limit: the peer turned out to have more to send than was asked for."""
        self._hard += seconds

    async def send(self, request: bytes) -> None:
        try:
            await self._transport.send_all(request)
        except IO_ERRORS as error:
            if self.reused:
                raise StaleConnection from None
            raise ConnectFailed(_reason(error)) from None

    async def _more(self) -> bool:
        """Receive something into the buffer; False at the end of the stream."""
        try:
            data = await self._transport.receive_some(_RECEIVE)
        except IO_ERRORS as error:
            raise ProtocolViolation(f"connection lost ({_reason(error)})") from None
        self._advance()
        self._buffer += data
        return bool(data)

    async def read_head(self) -> wire.Head:
        """The next head that is not 1xx."""
        while True:
            while (end := wire.find_head_end(self._buffer)) < 0:
                fresh = not self._buffer
                try:
                    more = await self._more()
                except ProtocolViolation:
                    if fresh and self.reused:
                        raise StaleConnection from None
                    raise
                if not more:
                    if fresh and self.reused:
                        raise StaleConnection
                    raise ProtocolViolation("closed without an answer" if fresh else "answer ends in its head")
            head = wire.parse_head(bytes(self._buffer[:end]))
            del self._buffer[:end]
            if head.status >= 200:
                if self._progress is not None:
                    self._progress.begun = True
                return head
            if head.status == 101:
                raise ProtocolViolation("switches protocols without being asked")

    async def read_exact(self, size: int) -> bytearray:
        """Exactly `size` bytes of body. Raises `ProtocolViolation` at an early end."""
        body = bytearray(size)
        have = min(size, len(self._buffer))
        if have:
            body[:have] = self._buffer[:have]
            del self._buffer[:have]
        view = memoryview(body)
        pace = self._pace
        try:
            while have < size:
                if pace is None:
                    got = await self._transport.receive_into(view[have:])
                else:
                    got = await self._receive_paced(pace, view[have:])
                if not got:
                    raise ProtocolViolation(f"body ends after {have} of {size} bytes")
                have += got
                self._advance()
        except IO_ERRORS as error:
            raise ProtocolViolation(f"connection lost after {have} of {size} bytes ({_reason(error)})") from None
        return body

    async def skip(self, size: int) -> None:
        while size:
            if not self._buffer and not await self._more():
                raise ProtocolViolation(f"body ends {size} bytes before the range")
            drop = min(size, len(self._buffer))
            del self._buffer[:drop]
            size -= drop

    async def read_to_end(self, limit: int) -> bytes:
        """The rest of the stream, at most `limit` bytes."""
        while len(self._buffer) <= limit:
            if not await self._more():
                return bytes(self._buffer)
        raise ProtocolViolation(f"body is longer than {limit} bytes")

    async def _line(self) -> bytes:
        while (end := self._buffer.find(b"\n", 0, wire.MAX_CHUNK_LINE)) < 0:
            if len(self._buffer) >= wire.MAX_CHUNK_LINE:
                raise ProtocolViolation("chunk line is too long")
            if not await self._more():
                raise ProtocolViolation("chunked body ends early")
        line = bytes(self._buffer[:end]).rstrip(b"\r")
        del self._buffer[: end + 1]
        return line

    async def read_chunked(self, skip: int, want: int | None, limit: int) -> tuple[bytearray, bool]:
        """Decode a chunked body: drop `skip` bytes, then keep `want` (None: all, at most `limit`).

        Second value: whether the body was read to its end, so that the connection can be kept.
        """
        body = bytearray()
        while size := wire.parse_chunk_size(await self._line()):
            drop = min(skip, size)
            await self.skip(drop)
            skip -= drop
            size -= drop
            take = size if want is None else min(size, want - len(body))
            if len(body) + take > limit:
                raise ProtocolViolation(f"body is longer than {limit} bytes")
            body += await self.read_exact(take)
            if take < size:
                return body, False
            if await self._line():
                raise ProtocolViolation("chunk is longer than its size")
        for _ in range(wire.MAX_HEADERS):
            if not await self._line():
                return body, True
        raise ProtocolViolation("endless trailers")

    def park(self) -> None:
        self._scope = self._progress = self._pace = None
        self.reused = True
        self.idle_since = time.monotonic()

    @property
    def own(self) -> OwnSocket | None:
        """For a thread that waits by itself, while nobody else has this connection; None where more than a socket is
        between us and the peer."""
        return self._transport if isinstance(self._transport, OwnSocket) else None

    def close(self) -> None:
        self._scope = None
        self._transport.close()


async def _start_tls(
    stream: trio.abc.Stream, context: ssl.SSLContext | None, host: str
) -> trio.SSLStream[trio.abc.Stream]:
    context = context or ssl.create_default_context()
    secured = trio.SSLStream(stream, context, server_hostname=host, https_compatible=True)
    try:
        await secured.do_handshake()
    except IO_ERRORS as error:
        raise TlsFailed(f"TLS handshake failed ({_reason(error)})") from None
    return secured


async def _tunnel(stream: trio.abc.Stream, origin: Origin, auth: str) -> None:
    authority = f"[{origin.host}]:{origin.port}" if ":" in origin.host else f"{origin.host}:{origin.port}"
    headers = [("Proxy-Authorization", auth)] if auth else []
    opening = Connection(origin, StreamTransport(stream))
    await opening.send(wire.format_request("CONNECT", authority, authority, headers))
    head = await opening.read_head()
    if not 200 <= head.status < 300:
        raise ConnectFailed(f"proxy refuses the tunnel with status {head.status}")


def basic_auth(user: str, password: str) -> str:
    return "Basic " + b64encode(f"{user}:{password}".encode()).decode("ascii")


def _reason(error: BaseException) -> str:
    """One phrase for an OS or TLS error; trio wraps the telling one."""
    cause = error.__cause__ or error
    if isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"certificate not accepted: {cause.verify_message}"
    if isinstance(cause, ssl.SSLError):
        return (cause.reason or str(cause)).lower().replace("_", " ")
    if isinstance(cause, OSError):
        if cause.errno is not None and cause.errno > 0:
            # trio puts the address into strerror; the source's name says it already
            return os.strerror(cause.errno).lower()
        return (cause.strerror or str(cause)).lower()
    return str(cause) or type(cause).__name__
