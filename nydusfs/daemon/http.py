"""A small HTTP/1.1 server for the API: unix socket, bounded requests, each connection in a task of its own."""

from __future__ import annotations

import logging
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote

import h11
import trio

from nydusfs.errors import NydusError

log = logging.getLogger("nydusfs.api")

MAX_BODY = 4 << 20  # a configuration of 1 MiB, escaped into a JSON string, with room
MAX_HEADERS = 64 << 10
MAX_CONNECTIONS = 256
IDLE_TIMEOUT = 60.0  # seconds between requests and for a request to arrive
WRITE_TIMEOUT = 30.0


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    query: dict[str, str] = field(default_factory=dict)  # the first occurrence of a key counts
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Response:
    """`then` runs after the answer was sent, or found nobody who takes it."""

    status: int = 204
    body: bytes = b""
    then: Callable[[], None] | None = None


Handler = Callable[[Request], Awaitable[Response]]


class SocketInUseError(NydusError):
    """A living instance answers on the socket."""


def _peer_pid(sock: socket.socket) -> int:
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[0])


def check_socket_path(path: str) -> None:
    """Raise `SocketInUseError` when somebody listens at `path`, `NydusError` when something else is in the way."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise NydusError(f"API socket {path}: a file that is not a socket is in the way, remove it")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(2)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return  # left behind by a dead one
        except OSError as error:
            raise NydusError(f"API socket {path}: {error.strerror or error}") from None
        raise SocketInUseError(f"API socket {path} is already served by a living instance (pid {_peer_pid(probe)})")


def bind_socket(path: str) -> socket.socket:
    """Listen at `path`, replacing a dead socket file. Only the owner may connect. Raises `NydusError`."""
    check_socket_path(path)
    if len(os.fsencode(path)) > 107:
        raise NydusError(f"API socket {path}: the path is longer than 107 bytes, the limit for unix sockets")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    before = os.umask(0o177)
    try:
        remove_socket(path)
        listener.bind(path)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise NydusError(f"API socket {path}: {error.strerror}") from None
    finally:
        os.umask(before)
    listener.setblocking(False)
    return listener


def remove_socket(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


async def serve(listener: socket.socket, handler: Handler) -> None:
    """Answer requests until cancelled."""
    limit = trio.CapacityLimiter(MAX_CONNECTIONS)

    async def connection(stream: trio.SocketStream) -> None:
        async with limit:
            try:
                await _Connection(stream, handler).run()
            except (trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError, OSError):
                pass  # the client went away
            finally:
                with trio.move_on_after(1) as scope:
                    scope.shield = True
                    await trio.aclose_forcefully(stream)

    await trio.serve_listeners(connection, [trio.SocketListener(trio.socket.from_stdlib_socket(listener))])


class _Connection:
    def __init__(self, stream: trio.SocketStream, handler: Handler) -> None:
        self.stream = stream
        self.handler = handler
        self.http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEADERS)
        self.bodiless = False  # HEAD: the answer's headers alone

    async def run(self) -> None:
        while True:
            response: Response | None = None
            self.bodiless = False
            try:
                with trio.move_on_after(IDLE_TIMEOUT) as waiting:
                    request = await self._request()
                if waiting.cancelled_caught or request is None:
                    return
                response = await self.handler(request)
            except h11.RemoteProtocolError as error:
                if self.http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                    await self._send(Response(error.error_status_hint, b'{"code":"UNDEFINED","message":"BadRequest"}'))
                return
            sent = await self._send(response)
            if response.then is not None:
                response.then()
            if not sent or self.http.our_state is h11.MUST_CLOSE or self.http.their_state is not h11.DONE:
                return
            self.http.start_next_cycle()

    async def _event(self) -> object:
        while True:
            event = self.http.next_event()
            if event is not h11.NEED_DATA:
                return event
            if self.http.they_are_waiting_for_100_continue:
                go_on = self.http.send(h11.InformationalResponse(status_code=100, headers=[]))
                await self.stream.send_all(go_on or b"")
            self.http.receive_data(await self.stream.receive_some(65536))

    async def _request(self) -> Request | None:
        head = await self._event()
        if not isinstance(head, h11.Request):
            return None
        self.bodiless = head.method == b"HEAD"
        body = bytearray()
        while isinstance(event := await self._event(), h11.Data):
            body += event.data
            if len(body) > MAX_BODY:
                raise h11.RemoteProtocolError("body too large", error_status_hint=413)
        path, _, query = head.target.decode("latin-1").partition("?")
        if path.startswith("http://"):  # absolute form, any host
            path = "/" + path[7:].partition("/")[2]
        values: dict[str, str] = {}
        try:
            for key, value in parse_qsl(query, keep_blank_values=True, max_num_fields=64):
                values.setdefault(key, value)
        except ValueError:
            raise h11.RemoteProtocolError("too many query fields", error_status_hint=400) from None
        return Request(head.method.decode("latin-1"), unquote(path), values, bytes(body))

    async def _send(self, response: Response) -> bool:
        """False: the client went away, or takes nothing."""
        headers = [("Server", "Nydus API"), ("Connection", "keep-alive")]
        if response.status != 204:
            headers += [("Content-Type", "application/json"), ("Content-Length", str(len(response.body)))]
        data = self.http.send(h11.Response(status_code=response.status, headers=headers, reason=b"")) or b""
        if response.status != 204 and not self.bodiless:
            data += self.http.send(h11.Data(data=response.body)) or b""
        data += self.http.send(h11.EndOfMessage()) or b""
        try:
            with trio.fail_after(WRITE_TIMEOUT):
                await self.stream.send_all(data)
        except (trio.BrokenResourceError, trio.TooSlowError):
            return False
        return True
