"""Ranges of one URL for the thread that needs them, over connections that a client keeps: no event loop, no task.

Only what goes well is done here: an answer with exactly the range and its length, on a connection that is open already
and passes no proxy, within `PATIENCE`. For everything else the caller asks the client, which says what is wrong.
"""

from __future__ import annotations

import math
import socket
import ssl
import time
from collections.abc import Callable
from typing import NamedTuple

from nydusfs.hands import Hands
from nydusfs.http import wire
from nydusfs.http.connection import Connection
from nydusfs.http.errors import ProtocolViolation

# Seconds until an answer begins, and again until it is here. One that is late is asked for once more by the client: not
# too soon, for a server that is only slow.
PATIENCE = 1.0
_RECEIVE = 64 * 1024


class Direct:
    """`opening`: a request up to its Range. `patience`: in place of `PATIENCE`, if that is more. All methods from any
    thread."""

    def __init__(
        self,
        opening: bytes,
        take: Callable[[], Connection | None],
        give: Callable[[Connection], None],
        patience: float = math.inf,
    ) -> None:
        self._opening = opening
        self._patience = patience
        self._take = take
        self._give = give

    def get(self, offset: int, size: int, hands: Hands, meanwhile: Callable[[], None]) -> Got | None:
        """Bytes `offset` to `offset + size - 1`. Raises `HttpError` or OSError; None: no connection is free. `hands`
        may end the waiting; `meanwhile` is called when the request is sent."""
        connection = self._take()
        if connection is None or (own := connection.own) is None:
            return None
        keep = False
        try:
            patience = min(PATIENCE, self._patience)
            sock = own.lend(patience)
            hands.stop = own.abort
            if hands.stopped:
                raise OSError("given up")
            began = time.monotonic()
            sock.sendall(b"%bRange: bytes=%d-%d\r\n\r\n" % (self._opening, offset, offset + size - 1))
            meanwhile()
            head, body, first = _receive(sock, offset, size, began, patience)
            keep = head.keep_alive
            return Got(body, first, time.monotonic() - began)
        finally:
            hands.stop = None
            if keep:
                own.take_back()
                connection.park()
                self._give(connection)
            else:
                own.abandon()


class Got(NamedTuple):
    """Seconds from the request to the head of the answer, and to its end."""

    body: bytearray
    first: float
    total: float


def _receive(
    sock: socket.socket, offset: int, size: int, began: float, patience: float
) -> tuple[wire.Head, bytearray, float]:
    raw = b""
    while (end := wire.find_head_end(raw)) < 0:
        more = sock.recv(_RECEIVE)
        if not more or time.monotonic() > began + patience:
            raise ProtocolViolation("closed or late in the head of an answer")
        raw += more
    first = time.monotonic() - began
    head = wire.parse_head(raw[:end])
    have = len(raw) - end
    span = wire.parse_content_range(head.get("content-range"))
    if head.status != 206 or span != (offset, offset + size - 1) or head.chunked or head.length != size or have > size:
        raise ProtocolViolation(f"status {head.status}, or another range")
    body = bytearray(size)
    body[:have] = raw[end:]
    flags = 0 if isinstance(sock, ssl.SSLSocket) else socket.MSG_WAITALL
    until = time.monotonic() + patience
    with memoryview(body) as view:
        while have < size:
            got = sock.recv_into(view[have:], 0, flags)
            if not got or time.monotonic() > until:
                raise ProtocolViolation("closed or late in a body")
            have += got
    return head, body, first
