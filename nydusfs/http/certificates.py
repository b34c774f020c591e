"""What TLS connections are made with. Files that were replaced, as short-lived certificates are, count for the next."""

from __future__ import annotations

import logging
import os
import ssl

import trio

from nydusfs.http.connection import Tls, tls_context
from nydusfs.http.errors import ConnectFailed

log = logging.getLogger("nydusfs.http")

_Stamp = tuple[int, int, int] | None


class Certificates:
    def __init__(self, tls: Tls) -> None:
        self._tls = tls
        self._files = [*tls.ca_files, *(name for pair in tls.client for name in pair if name)]
        self._context: ssl.SSLContext | None = None
        self._stamps: list[_Stamp] = []
        self._lock = trio.Lock()

    async def context(self) -> ssl.SSLContext:
        """Raises `ConnectFailed` for files that cannot be used and never could."""
        async with self._lock:
            stamps = [_stamp(path) for path in self._files]
            if self._context is None or stamps != self._stamps:
                try:
                    # 20 to 40 ms of CPU for the system's roots: away from the loop
                    self._context = await trio.to_thread.run_sync(tls_context, self._tls)
                except ConnectFailed as error:
                    if self._context is None:
                        raise
                    log.warning("%s; going on with what it held before", error)
                self._stamps = stamps
            return self._context


def _stamp(path: str) -> _Stamp:
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_mtime_ns, state.st_size, state.st_ino
