"""HTTP over a unix socket, as clients of nydusd's API speak it."""

from __future__ import annotations

import socket
from http.client import HTTPConnection, HTTPResponse
from os import PathLike, fspath
from typing import Any


class UnixConnection(HTTPConnection):
    """One connection to the socket at `path`; times in seconds, `dial` for connecting alone.

    A request goes out in one piece, when its answer is asked for: to a head whose body is not there yet, nydusd 2.4.4
    answers 500 "Resource temporarily unavailable (os error 11)", and then does what was asked nevertheless.
    """

    def __init__(self, path: str | PathLike[str], timeout: float, dial: float | None = None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = fspath(path)
        self._dial = timeout if dial is None else min(dial, timeout)
        self._request = bytearray()

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(self._dial)
        self.sock.connect(self._path)
        self.sock.settimeout(self.timeout)

    def send(self, data: Any) -> None:
        self._request += data

    def getresponse(self) -> HTTPResponse:
        request, self._request = self._request, bytearray()
        super().send(request)
        return super().getresponse()
