"""Between a gRPC client and the unix socket it calls: counts the calls, and can do something before the Nth goes on."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

_PREFACE = 24  # bytes in front of a client's first HTTP/2 frame
_HEADERS = 1  # the frame that begins a call


class Interposer:
    """`before(n)` runs in front of the n-th call (from 1) and holds up the connection it came on.

    Use as a context manager; `reset` begins to count anew.
    """

    def __init__(self, socket_path: Path, target: Path, before: Callable[[int], None] = lambda number: None) -> None:
        self.socket, self._target, self.before = socket_path, target, before
        self.calls = 0
        self._lock = threading.Lock()
        self._server = socket.socket(socket.AF_UNIX)
        self._open: set[socket.socket] = set()

    def __enter__(self) -> Interposer:
        self._server.bind(str(self.socket))
        self._server.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()
        for one in list(self._open):
            _end(one)
        self.socket.unlink(missing_ok=True)

    def reset(self, before: Callable[[int], None] = lambda number: None) -> None:
        with self._lock:
            self.calls, self.before = 0, before

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:  # closed
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(str(self._target))
            self._open |= {client, server}
            threading.Thread(target=self._forward, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._forward, args=(server, client, False), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        skip, head = _PREFACE, b""
        try:
            while data := source.recv(1 << 16):
                at = 0
                while counted and at < len(data):
                    step = min(skip, len(data) - at) if skip else min(9 - len(head), len(data) - at)
                    if skip:
                        skip -= step
                    else:
                        head += data[at : at + step]
                        if len(head) == 9:
                            skip = int.from_bytes(head[:3], "big")
                            if head[3] == _HEADERS:
                                self._count()
                            head = b""
                    at += step
                sink.sendall(data)
        except OSError:
            pass
        finally:
            _end(source)
            _end(sink)
            self._open -= {source, sink}

    def _count(self) -> None:
        with self._lock:
            self.calls += 1
            number, before = self.calls, self.before
        before(number)


def _end(one: socket.socket) -> None:
    try:
        one.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    one.close()
