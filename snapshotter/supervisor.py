"""The state and the connection of one nydusd, kept here so that the mount outlives all of its processes.

Upstream's protocol (snapshotter.md 3.6): nydusd connects to the socket and sends its state with one descriptor, that of
/dev/fuse, or gets both back. Ours sends more of them (EROFS mounts: who asks and what was asked), and all come back in
their order. The text holds registry passwords: it stays in memory.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from snapshotter.directories import make_private
from snapshotter.errors import Unavailable

EXCHANGE_SECONDS = 10.0
GRACE_SECONDS = 2.0
MAX_STATE = 256 << 20
MAX_FDS = 16
_PIECE = 256 << 10


class Supervisor:
    """For one thread at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = b""
        self._fds: list[int] = []

    @property
    def has_state(self) -> bool:
        return bool(self._fds)

    def save(self, ask: Callable[[], None]) -> None:
        """`ask` has nydusd send its state. If that fails what was kept stays. Raises Unavailable, and as `ask`."""
        received: list[tuple[bytes, list[int]]] = []
        try:
            self._exchange(lambda client: received.append(_receive(client)), ask)
        except BaseException:
            # it came, and the answer that it was sent did not: kept open, it would keep a dead mount busy for ever
            for _, fds in received:
                for fd in fds:
                    os.close(fd)
            raise
        if not received:
            raise Unavailable(f"{self.path}: nydusd sent no state")
        self.forget()
        self._state, self._fds = received[0]

    def restore(self, ask: Callable[[], None]) -> None:
        """`ask` has another nydusd take the state, which stays here. Raises Unavailable, and as `ask`."""

        def give(client: socket.socket) -> None:
            sent = socket.send_fds(client, [self._state], self._fds)
            if rest := self._state[sent:]:  # else none: who has it all may have closed, a broken pipe
                client.sendall(rest)

        self._exchange(give, ask)

    def forget(self) -> None:
        fds, self._state, self._fds = self._fds, b"", []
        for fd in fds:
            os.close(fd)

    def close(self) -> None:
        self.forget()
        self.path.unlink(missing_ok=True)

    def _exchange(self, talk: Callable[[socket.socket], None], ask: Callable[[], None]) -> None:
        """Listens only as long as it takes: whoever else may open the socket would be given the mount."""
        make_private(self.path.parent)
        self.path.unlink(missing_ok=True)
        failed: list[OSError] = []

        def serve() -> None:
            try:
                client, _ = server.accept()
                with client:
                    client.settimeout(EXCHANGE_SECONDS)
                    talk(client)
            except OSError as error:
                failed.append(error)

        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
                server.bind(str(self.path))
                os.chmod(self.path, 0o600)
                server.listen(1)
                server.settimeout(EXCHANGE_SECONDS)
                thread = threading.Thread(target=serve, name="supervisor", daemon=True)
                thread.start()
                try:
                    ask()
                    thread.join(GRACE_SECONDS)  # old ones answer and never come
                finally:
                    server.shutdown(socket.SHUT_RDWR)
                    thread.join(2 * EXCHANGE_SECONDS)
        except OSError as error:
            raise Unavailable(f"{self.path}: {error.strerror or error}") from None
        finally:
            self.path.unlink(missing_ok=True)
        if failed:
            raise Unavailable(f"{self.path}: {failed[0].strerror or failed[0]}")


def _receive(client: socket.socket) -> tuple[bytes, list[int]]:
    """Raises OSError."""
    data, fds, _, _ = socket.recv_fds(client, _PIECE, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
    try:
        if not fds:
            raise OSError("no descriptor came with the state")
        parts = [data]
        size = len(data)
        while piece := client.recv(_PIECE):
            parts.append(piece)
            size += len(piece)
            if size > MAX_STATE:
                raise OSError(f"the state is larger than {MAX_STATE} bytes")
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return b"".join(parts), fds
