"""Bytes to and from a peer: TCP and TLS over it on a non-blocking socket, what passes proxies through trio's streams.

The first two have their own path because a trio stream passes through the event loop at every send and receive, ready
or not (about 30 us each on a small machine): a ranged GET over loopback took 220 us with streams and 90 us like this.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

import trio

# Wake up for this much of a body, not for every packet: on a 40 Mbit/s link that is 8 instead of 300 passes through
# the loop for 400 kB. Twice as much each time, so that a link that is fast costs few passes and one that is slow is not
# taken for one that has stopped.
LOW_WATER, MOST_WATER = 16 * 1024, 64 * 1024

MOST_RECORDS = 256 * 1024  # bytes of TLS records taken in one go

_T = TypeVar("_T")

IO_ERRORS = (trio.BrokenResourceError, trio.ClosedResourceError, OSError, ssl.SSLError)


class Transport(Protocol):
    """Errors of sending and receiving are those of `IO_ERRORS`."""

    async def send_all(self, data: bytes) -> None: ...
    async def receive_some(self, limit: int) -> bytes: ...
    async def receive_into(self, view: memoryview) -> int: ...
    def quiet(self) -> bool: ...
    def set_window(self, size: int) -> None: ...
    def close(self) -> None: ...


def _set_window(sock: socket.socket | trio.socket.SocketType, size: int) -> None:
    """Let the peer have at most `size` bytes under way. A window of less than a few packets (those of loopback have
    64 KiB) would make it wait for timers."""
    try:
        packet = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, max(size, 4 * packet) // 2)  # the kernel doubles it
    except OSError:
        pass  # a unix socket has none


class OwnSocket(ABC):
    """Over a socket that is ours alone: a thread may have it for a while, and wait for it by itself."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._patience = 0.0

    @abstractmethod
    def lend(self, patience: float) -> socket.socket:
        """The socket, blocking; a call that waits ends after so many seconds."""

    def take_back(self) -> None:
        self._sock.setblocking(False)

    def abort(self) -> None:
        """Let a thread that waits for the lent socket go on, with nothing."""
        try:
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)  # one of TLS would forget that it is
        except OSError:
            pass  # it is closed already

    def abandon(self) -> None:
        """`close` for a thread."""
        self._sock.close()

    def set_window(self, size: int) -> None:
        _set_window(self._sock, size)

    def close(self) -> None:
        trio.lowlevel.notify_closing(self._sock)
        self._sock.close()


def _taken(stream: trio.SocketStream) -> socket.socket:
    """A trio socket hides its non-blocking calls: a duplicate that is ours, the original is closed. Raises OSError."""
    try:
        sock = socket.socket(fileno=os.dup(stream.socket.fileno()))
    finally:
        stream.socket.close()
    sock.setblocking(False)
    return sock


class PlainTransport(OwnSocket):
    def __init__(self, stream: trio.SocketStream) -> None:
        super().__init__(_taken(stream))
        self._low_water = 1
        self._next_water = LOW_WATER

    async def send_all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self._sock.send(view) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._sock)

    def _expect(self, level: int) -> None:
        if level != self._low_water:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, level)
            self._low_water = level

    async def receive_some(self, limit: int) -> bytes:
        """Waits first: it is called for heads, whose bytes are not here yet."""
        self._expect(1)
        self._next_water = LOW_WATER
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            try:
                return self._sock.recv(limit)
            except BlockingIOError:
                continue

    async def receive_into(self, view: memoryview) -> int:
        """Tries first: bodies follow their heads."""
        while True:
            try:
                return self._sock.recv_into(view)
            except BlockingIOError:
                self._expect(min(len(view), self._next_water))
                await trio.lowlevel.wait_readable(self._sock)
                self._next_water = min(2 * self._next_water, MOST_WATER)

    def quiet(self) -> bool:
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def lend(self, patience: float) -> socket.socket:
        """The limit is the kernel's: with Python's own, each call would be two."""
        self._expect(1)
        if patience != self._patience:
            timeval = struct.pack("@ll", int(patience), int(patience % 1 * 1e6))
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                self._sock.setsockopt(socket.SOL_SOCKET, option, timeval)
            self._patience = patience
        self._sock.setblocking(True)
        return self._sock


class TlsTransport(OwnSocket):
    """TLS straight over TCP. An end of the stream without TLS's own good-bye is an end."""

    _sock: ssl.SSLSocket

    @classmethod
    async def open(cls, stream: trio.SocketStream, context: ssl.SSLContext, host: str) -> TlsTransport:
        """Raises `IO_ERRORS`."""
        raw = _taken(stream)
        try:
            made = cls(context.wrap_socket(raw, server_hostname=host, do_handshake_on_connect=False))
        except BaseException:
            raw.close()
            raise
        try:
            await made._when_ready(made._sock.do_handshake)
        except BaseException:
            made.close()
            raise
        return made

    async def _when_ready(self, call: Callable[[], _T]) -> _T:
        while True:
            try:
                return call()
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(self._sock)
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(self._sock)

    async def send_all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            sent = await self._when_ready(partial(self._sock.send, view))
            view = view[sent:]

    async def receive_some(self, limit: int) -> bytes:
        return await self._when_ready(partial(self._sock.recv, limit))

    async def receive_into(self, view: memoryview) -> int:
        """Records, of at most 16 KiB each, as long as there are whole ones."""
        have = await self._when_ready(partial(self._sock.recv_into, view))
        most = min(len(view), MOST_RECORDS)
        while 0 < have < most:
            try:
                got = self._sock.recv_into(view[have:])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                break
            if not got:
                break
            have += got
        return have

    def quiet(self) -> bool:
        try:
            if not self._sock.pending() and not readable(self._sock.fileno()):
                return True
            self._sock.recv(1)
            return False
        except ssl.SSLWantReadError:
            return True  # they were TLS's own, such as the tickets behind its handshake
        except (OSError, ValueError):
            return False

    def lend(self, patience: float) -> socket.socket:
        self._sock.settimeout(patience)
        return self._sock


def readable(fd: int) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN | select.POLLHUP)
    return bool(poller.poll(0))


class StreamTransport:
    """TLS to or inside a proxy."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        inner = stream
        while isinstance(inner, trio.SSLStream):
            inner = inner.transport_stream
        self._tcp = inner if isinstance(inner, trio.SocketStream) else None

    async def send_all(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def receive_some(self, limit: int) -> bytes:
        return bytes(await self._stream.receive_some(limit))

    async def receive_into(self, view: memoryview) -> int:
        data = await self._stream.receive_some(len(view))
        view[: len(data)] = data
        return len(data)

    def quiet(self) -> bool:
        if self._tcp is None:
            return False
        try:
            return not readable(self._tcp.socket.fileno())
        except (OSError, ValueError):
            return False

    def set_window(self, size: int) -> None:
        if self._tcp is not None:
            _set_window(self._tcp.socket, size)

    def close(self) -> None:
        """At once: a blob client owes the peer no TLS good-bye."""
        if self._tcp is not None:
            self._tcp.socket.close()
