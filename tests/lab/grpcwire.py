"""A gRPC client that costs next to nothing, for load: one connection, many calls under way, as containerd has it.

Python's own gRPC spends more on a call than the server it would measure. Only what unary calls and server streams over
a unix socket need of HTTP/2; a call that answers no message has failed.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

SERVICE = "/containerd.services.snapshots.v1.Snapshots/"
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_MOST = (1 << 31) - 1


class Failed(Exception):
    """The server refused a call, or closed the connection."""


class Timed(NamedTuple):
    seconds: float
    answer: bytes | None  # the messages of the answer, joined; None: the call failed


class Wire:
    """`metadata` goes with every call."""

    def __init__(self, path: Path, metadata: Mapping[str, str] | None = None, timeout: float = 120.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        self._socket.connect(str(path))
        self._metadata = b"".join(_literal(name, value) for name, value in (metadata or {}).items())
        self._heads: dict[str, bytes] = {}
        self._next = 1
        self._rest = b""
        settings = struct.pack("!HIHI", 1, 0, 4, _MOST)  # no header table to keep, windows that never close
        opening = _frame(_SETTINGS, 0, 0, settings) + _frame(_WINDOW, 0, 0, struct.pack("!I", _MOST - 65535))
        self._socket.sendall(_PREFACE + opening)

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, method: str, message: bytes) -> bytes:
        """Raises Failed."""
        (done,) = self.run([(method, message)])
        if done.answer is None:
            raise Failed(method)
        return done.answer

    def run(self, calls: Iterable[tuple[str, bytes]], clients: int = 1) -> list[Timed]:
        """All calls, `clients` of them under way at any time; in order of their answers."""
        pending: dict[int, tuple[float, list[bytes]]] = {}
        results: list[Timed] = []
        source: Iterator[tuple[str, bytes]] = iter(calls)
        more = True
        while True:
            out = []
            while more and len(pending) < clients:
                try:
                    method, message = next(source)
                except StopIteration:
                    more = False
                    break
                out.append(self._request(method, message))
                pending[self._next] = (time.perf_counter(), [])
                self._next += 2
            if out:
                self._socket.sendall(b"".join(out))
            if not pending:
                return results
            for kind, flags, stream, payload in self._frames():
                if kind == _DATA and stream in pending:
                    pending[stream][1].append(payload)
                elif kind == _GOAWAY:
                    raise Failed("the server ends the connection")
                if (kind == _RST or (flags & _END_STREAM and kind in (_DATA, _HEADERS))) and stream in pending:
                    begin, parts = pending.pop(stream)
                    results.append(Timed(time.perf_counter() - begin, _messages(b"".join(parts)) if parts else None))

    def _request(self, method: str, message: bytes) -> bytes:
        head = self._heads.get(method)
        if head is None:
            pairs = {":method": "POST", ":scheme": "http", ":path": SERVICE + method, ":authority": "localhost"}
            pairs |= {"content-type": "application/grpc", "te": "trailers"}
            head = self._heads[method] = b"".join(map(_literal, pairs, pairs.values())) + self._metadata
        body = b"\0" + struct.pack("!I", len(message)) + message
        return _frame(_HEADERS, _END_HEADERS, self._next, head) + _frame(_DATA, _END_STREAM, self._next, body)

    def _frames(self) -> Iterator[tuple[int, int, int, bytes]]:
        got = self._socket.recv(1 << 18)
        if not got:
            raise Failed("the server closed the connection")
        data, at = self._rest + got, 0
        while len(data) - at >= 9:
            size = int.from_bytes(data[at : at + 3], "big")
            if len(data) - at < 9 + size:
                break
            kind, flags = data[at + 3], data[at + 4]
            payload = data[at + 9 : at + 9 + size]
            if kind in (_SETTINGS, _PING) and not flags & _ACK:
                self._socket.sendall(_frame(kind, _ACK, 0, payload if kind == _PING else b""))
            yield kind, flags, int.from_bytes(data[at + 5 : at + 9], "big"), payload
            at += 9 + size
        self._rest = data[at:]


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def _literal(name: str, value: str) -> bytes:
    """HPACK: literal without indexing, new name, no Huffman."""
    return b"\0" + _text(name) + _text(value)


def _text(text: str) -> bytes:
    data = text.encode()
    if len(data) < 127:
        return bytes((len(data),)) + data
    rest, more = len(data) - 127, bytearray((127,))
    while rest >= 128:
        more.append(rest & 127 | 128)
        rest >>= 7
    more.append(rest)
    return bytes(more) + data


def _messages(body: bytes) -> bytes:
    """Messages of one stream joined: protobuf merges repeated fields that way."""
    parts, at = [], 0
    while at < len(body):
        size = int.from_bytes(body[at + 1 : at + 5], "big")
        parts.append(body[at + 5 : at + 5 + size])
        at += 5 + size
    return b"".join(parts)
