"""A blob server that misbehaves on purpose: registry, mirror or redirect target, with faults one at a time.

Runs in a thread of its own with blocking sockets, so that the trio code under test meets a real peer. Modes may be
changed while it runs; every request is recorded.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

MODES = (
    "ok", "500", "503", "429", "404", "hang-headers", "hang-body", "trickle", "short-body", "early-close", "empty",
    "wrong-bytes", "whole-200", "whole-206", "chunked", "chunked-200", "wrong-total", "no-range-header", "wrong-range",
    "garbage", "endless-headers", "dragonfly-429", "dragonfly-403",
)  # fmt: skip


@dataclass
class Request:
    method: str
    target: str
    headers: dict[str, str]
    span: tuple[int, int] | None
    when: float
    body: bytes = b""


def self_signed(folder: Path) -> tuple[Path, Path]:
    """Certificate and key for 127.0.0.1."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=lab"
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        [*command.split(), *names, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True, timeout=30
    )
    return cert, key


@dataclass
class FaultyServer:
    """`blobs` by id. `auth`: None, "basic" or "bearer", for `login`. `redirect`: base URL to send blob GETs to."""

    blobs: dict[str, bytes]
    mode: str = "ok"
    auth: str | None = None
    redirect: str = ""
    redirect_query: str = "sig=1"
    ping_status: int = 200
    latency: float = 0.0
    rate: float = 0.0  # bytes per second of a body
    token_life: int = 300
    token_word: str = "token"  # what the tokens it gives begin with
    hang_tokens: bool = False
    token_status: int = 200
    realm: str = ""  # where its challenges send for a token, instead of to itself
    login: str = "user:secret"  # may be changed while serving
    tls: ssl.SSLContext | None = None
    choose: Callable[[Request], str] | None = None  # a mode per request
    said: list[tuple[str, str]] = field(default_factory=list)  # more headers of an answer with data
    requests: list[Request] = field(default_factory=list)
    tokens: list[Request] = field(default_factory=list)
    valid_tokens: set[str] = field(default_factory=set)
    connections: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def netloc(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.netloc}"

    @property
    def data_requests(self) -> list[Request]:
        return [request for request in self.requests if "/blobs/" in request.target]

    def close(self) -> None:
        if self._stop.is_set():
            return
        self._stop.set()
        # Closed under a thread that waits in accept, its number could be the next server's listener when that goes on.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()
        self.drop_connections()

    def drop_connections(self) -> None:
        """As a server does with those that are idle."""
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _serve(self) -> None:
        while not self._stop.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        raw, file = connection, None
        self._open.add(raw)
        try:
            if self.tls is not None:
                connection = self.tls.wrap_socket(connection, server_side=True)
            file = connection.makefile("rb")
            while (request := self._read(file)) is not None and self._answer(connection, request):
                pass
        except OSError:
            pass
        finally:
            self._open.discard(raw)
            if file is not None:
                file.close()  # it shares the descriptor
            connection.close()

    def _read(self, file: object) -> Request | None:
        line = file.readline(65536)  # type: ignore[attr-defined]
        if not line:
            return None
        try:
            method, target, version = line.decode("latin-1").split()
        except ValueError as error:
            raise OSError("no HTTP, perhaps TLS") from error
        if not version.startswith("HTTP/"):  # the random bytes of a TLS hello may well split into three words
            raise OSError("no HTTP, perhaps TLS")
        headers: dict[str, str] = {}
        while header := file.readline(65536).rstrip(b"\r\n"):  # type: ignore[attr-defined]
            name, _, value = header.decode("latin-1").partition(":")
            known = headers.get(name.lower())
            headers[name.lower()] = value.strip() if known is None else f"{known}, {value.strip()}"
        body = file.read(int(headers.get("content-length", 0)))  # type: ignore[attr-defined]
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("range", ""))
        span = (int(match[1]), int(match[2])) if match else None
        return Request(method, target, headers, span, time.monotonic(), body)

    def _pause(self, seconds: float) -> None:
        self._stop.wait(seconds)

    def _answer(self, out: socket.socket, request: Request) -> bool:
        """False: close the connection."""
        target = urlsplit(request.target)
        if target.path == "/token":
            return self._token(out, request, parse_qs(target.query))
        with self._lock:
            self.requests.append(request)
        if self.latency:
            self._pause(self.latency)
        if target.path == "/ping":
            return _send(out, self.ping_status, b"ok")
        if self.auth and not self._authorized(request):
            repo = target.path.removeprefix("/v2/").rpartition("/blobs/")[0]
            challenge = f'Bearer realm="{self.realm or self.url}/token",service="lab",scope="repository:{repo}:pull"'
            if self.auth == "basic":
                challenge = 'Basic realm="lab, with a comma"'
            return _send(out, 401, b"{}", [("WWW-Authenticate", challenge)])
        blob_id = target.path.rpartition("/")[2].removeprefix("sha256:")
        if self.redirect:
            return _send(out, 307, b"", [("Location", f"{self.redirect}/signed/blobs/{blob_id}?{self.redirect_query}")])
        if blob_id not in self.blobs:
            return _send(out, 404, b"no such blob")
        mode = self.choose(request) if self.choose else self.mode
        return self._blob(out, request, self.blobs[blob_id], mode)

    def _authorized(self, request: Request) -> bool:
        value = request.headers.get("authorization", "")
        if self.auth == "basic":
            return value == "Basic " + base64.b64encode(self.login.encode()).decode()
        return value.removeprefix("Bearer ") in self.valid_tokens

    def _token(self, out: socket.socket, request: Request, query: dict[str, list[str]]) -> bool:
        with self._lock:
            self.tokens.append(request)
            token = f"{self.token_word}-{len(self.tokens)}"
        if request.method == "POST":
            return _send(out, 405, b"GET, please")
        if request.headers.get("authorization") != "Basic " + base64.b64encode(self.login.encode()).decode():
            return _send(out, 401, b"who?")
        assert re.fullmatch("repository:[a-z0-9/]+:pull", query["scope"][0])
        if self.hang_tokens:
            self._pause(60)
        if self.token_status != 200:
            return _send(out, self.token_status, b"no")
        if self.latency:
            self._pause(self.latency)
        self.valid_tokens.add(token)
        return _send(out, 200, json.dumps({"token": token, "expires_in": self.token_life}).encode())

    def _blob(self, out: socket.socket, request: Request, blob: bytes, mode: str) -> bool:
        first, last = request.span or (0, len(blob) - 1)
        if first >= len(blob):
            return _send(out, 416, b"")
        last = min(last, len(blob) - 1)
        part = blob[first : last + 1]
        content_range = ("Content-Range", f"bytes {first}-{last}/{len(blob)}")
        if mode in ("500", "503", "429", "404"):
            return _send(out, int(mode), b"no")
        if mode.startswith("dragonfly-"):
            return _send(out, int(mode[10:]), b"", [("X-Dragonfly-Error-Type", "proxy")])
        if mode == "hang-headers":
            self._pause(60)
            return False
        if mode == "empty":
            return False
        if mode == "garbage":
            out.sendall(b"\x00\x01\x02 this is no HTTP\r\n\r\n")
            return False
        if mode == "endless-headers":
            out.sendall(b"HTTP/1.1 206 Partial Content\r\n")
            while not self._stop.is_set():
                out.sendall(b"X-More: " + b"a" * 4000 + b"\r\n")
        if mode == "hang-body":
            _head(out, 206, len(part), [content_range])
            out.sendall(part[: len(part) // 2])
            self._pause(60)
            return False
        if mode == "trickle":
            _head(out, 206, len(part), [content_range])
            for byte in part:
                out.sendall(bytes([byte]))
                self._pause(0.2)
                if self._stop.is_set():
                    return False
        if mode in ("short-body", "early-close"):
            cut = part[: len(part) * 2 // 3]
            _head(out, 206, len(part) if mode == "early-close" else len(cut), [content_range])
            out.sendall(cut)
            return mode == "short-body"
        if mode == "wrong-bytes":
            part = bytes(byte ^ 0x55 for byte in part)
        if mode == "whole-200":
            return _send(out, 200, blob, self.said)
        if mode == "whole-206":
            return _send(out, 206, blob, [content_range])
        if mode == "wrong-total":
            content_range = ("Content-Range", f"bytes {first}-{last}/{last + 1}")
        if mode == "wrong-range":
            content_range = ("Content-Range", f"bytes {first + 1}-{last + 1}/{len(blob)}")
        extra = [*self.said] if mode == "no-range-header" else [content_range, *self.said]
        if mode in ("chunked", "chunked-200"):
            status, body = (206, part) if mode == "chunked" else (200, blob)
            head = "".join(f"{name}: {value}\r\n" for name, value in (extra if status == 206 else []))
            out.sendall(f"HTTP/1.1 {status} X\r\nTransfer-Encoding: chunked\r\n{head}\r\n".encode())
            for start in range(0, len(body), 7000):
                piece = body[start : start + 7000]
                out.sendall(b"%x;ext=1\r\n%s\r\n" % (len(piece), piece))
            out.sendall(b"0\r\nTrailer: x\r\n\r\n")
            return True
        if self.rate:
            _head(out, 206, len(part), extra)
            step = max(1, int(self.rate / 50))
            for start in range(0, len(part), step):
                out.sendall(part[start : start + step])
                self._pause(1 / 50)
            return True
        return _send(out, 206, part, extra)


def _head(out: socket.socket, status: int, length: int, extra: list[tuple[str, str]]) -> None:
    lines = "".join(f"{name}: {value}\r\n" for name, value in extra)
    out.sendall(f"HTTP/1.1 {status} Lab\r\nContent-Length: {length}\r\n{lines}\r\n".encode("latin-1"))


def _send(out: socket.socket, status: int, body: bytes, extra: list[tuple[str, str]] | None = None) -> bool:
    _head(out, status, len(body), extra or [])
    out.sendall(body)
    return True


@contextmanager
def faulty_server(blobs: dict[str, bytes], **settings: object) -> Iterator[FaultyServer]:
    server = FaultyServer(blobs, **settings)  # type: ignore[arg-type]
    try:
        yield server
    finally:
        server.close()


@contextmanager
def dead_port() -> Iterator[str]:
    """host:port where nothing listens: connections are refused."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"
