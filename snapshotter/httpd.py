"""A small HTTP server for operators: unix or TCP socket, a thread for each connection, bounded requests."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import socketserver
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from snapshotter.errors import NotFound, SnapshotterError, StartError
from snapshotter.service import claim_address

log = logging.getLogger(__name__)

MAX_BODY = 4 << 20
IDLE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Request:
    """`found`: the parts of the path that the route's pattern names."""

    method: str
    path: str
    query: Mapping[str, str]
    body: bytes
    found: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reply:
    status: int = 200
    body: bytes = b""
    kind: str = "application/json"


def as_json(value: Any) -> Reply:
    return Reply(200, json.dumps(value, separators=(",", ":")).encode())


def as_text(text: str) -> Reply:
    return Reply(200, text.encode("utf-8", "replace"), "text/plain; charset=utf-8")


def failure(status: int, message: str) -> Reply:
    """As upstream's system controller words it, down to the type."""
    body = json.dumps({"code": "Unknown", "message": message}).encode()
    return Reply(status, body, "text/plain; charset=utf-8")


Route = Callable[[Request], Reply]
# pattern of the whole path -> method -> handler
Routes = Mapping[str, Mapping[str, Route]]


class Server:
    """Serves from its construction until `close`. `address`: a Path is a unix socket of mode 0600, a text HOST:PORT.

    Raises StartError.
    """

    def __init__(self, name: str, address: Path | str, routes: Routes, *, uid: int = 0, gid: int = 0) -> None:
        self.address = address
        self._inode = 0
        compiled = {re.compile(pattern): methods for pattern, methods in routes.items()}
        made = cache(lambda: _handler(compiled))

        def handler(*connection: Any) -> socketserver.BaseRequestHandler:
            return made()(*connection)

        try:
            if isinstance(address, Path):
                claim_address(address)
                umask = os.umask(0o177)
                try:
                    self._server: socketserver.BaseServer = _Unix(str(address), handler)
                finally:
                    os.umask(umask)
                os.chown(address, uid, gid)
                self._inode = address.lstat().st_ino
            else:
                host, _, port = address.rpartition(":")
                if not port.isdecimal() or int(port) > 65535:
                    raise StartError(f"{name}: {address!r} is not HOST:PORT")
                sixth = ":" in host or (not host and socket.has_dualstack_ipv6())
                self._server = (_Tcp6 if sixth else _Tcp)((host.strip("[]"), int(port)), handler)
        except OSError as error:
            raise StartError(f"{name}: cannot listen at {address}: {error.strerror or error}") from None
        threading.Thread(target=self._server.serve_forever, name=name, daemon=True).start()

    @property
    def port(self) -> int:
        """Of a TCP listener."""
        return int(self._server.server_address[1])  # type: ignore[index]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        if isinstance(self.address, Path):
            try:
                if self.address.lstat().st_ino == self._inode:
                    self.address.unlink()
            except FileNotFoundError:
                pass


class _Threads(socketserver.ThreadingMixIn):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a client of an operators' socket went away", exc_info=True)


class _Unix(_Threads, socketserver.UnixStreamServer):
    pass


class _Tcp(_Threads, socketserver.TCPServer):
    allow_reuse_address = True


class _Tcp6(_Tcp):
    """All addresses of both families for `:9110`, as Go listens; without IPv6 it takes those of IPv4."""

    address_family = socket.AF_INET6

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


def _handler(routes: Mapping[re.Pattern[str], Mapping[str, Route]]) -> type[socketserver.BaseRequestHandler]:
    # with the first client: it takes 1 MB, of which most is the names of HTML's characters
    from http.server import BaseHTTPRequestHandler

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = IDLE_SECONDS
        server_version = "nydus-snapshotter"

        def _answer(self) -> None:
            try:
                length = int(self.headers.get("Content-Length") or 0)
            except ValueError:
                length = -1
            if not 0 <= length <= MAX_BODY or self.headers.get("Transfer-Encoding"):
                self.close_connection = True
                self._send(failure(413, f"a body of at most {MAX_BODY} bytes, with Content-Length"))
                return
            body = self.rfile.read(length)
            target = urlsplit(self.path)
            query = dict(parse_qsl(target.query, keep_blank_values=True))
            self._send(_route(routes, Request(self.command, unquote(target.path), query, body)))

        do_GET = do_PUT = do_POST = do_DELETE = _answer

        def _send(self, reply: Reply) -> None:
            self.send_response(reply.status)
            self.send_header("Content-Type", reply.kind)
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            self.wfile.write(reply.body)

        def address_string(self) -> str:
            return "operator"

        def log_message(self, format: str, *args: Any) -> None:
            log.debug(format, *args)

    return Handler


def _route(routes: Mapping[re.Pattern[str], Mapping[str, Route]], request: Request) -> Reply:
    for pattern, methods in routes.items():
        match = pattern.fullmatch(request.path)
        if match is None:
            continue
        route = methods.get(request.method)
        if route is None:
            return failure(405, f"{request.method} is not for {request.path}")
        try:
            return route(Request(request.method, request.path, request.query, request.body, match.groupdict()))
        except NotFound as error:
            return failure(404, str(error))
        except (SnapshotterError, OSError) as error:
            return failure(500, str(error))
        except Exception as error:
            log.exception("%s %s failed", request.method, request.path)
            return failure(500, f"internal error: {type(error).__name__}")
    return failure(404, f"no such path: {request.path}")
