"""A worker's end of its keeper: hand over descriptors and state, be told to retire, outlive the keeper."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import trio

from nydusfs.keeper.protocol import memory_file, name_tag, pair, receive, send

log = logging.getLogger("nydusfs.keeper")

KEEPERS = 5  # new keepers in `WITHIN` seconds; one that cannot live is not started for ever
WITHIN = 60.0
AGAIN = 2.0  # seconds until the next attempt, where this machine has no room for another process


class KeeperLink:
    def __init__(self, sock: socket.socket, spec: dict[str, Any], held: dict[str, int], state: int) -> None:
        self._sock = sock
        self._spec = spec
        self.held = held
        self._state = state
        self._keeper = _peer(sock)
        self._started: list[float] = []
        self._ends = False

    @property
    def keeper_pid(self) -> int:
        return self._keeper

    def hold(self, name: str, fd: int) -> None:
        """Have a copy of a descriptor kept for the next worker."""
        self.held[name] = fd
        self._send("hold", [fd], name=name)

    def keep(self, name: str, content: bytes) -> None:
        """Have a text kept for the next worker, in place of the last one of this name. It stays in memory."""
        last = self.held.get(name, -1)
        self.hold(name, memory_file(content))
        if last >= 0:
            os.close(last)

    def save(self, state: bytes) -> None:
        """What the next worker is to be given; replaces what was saved before. It stays in memory."""
        fd = memory_file(state)
        if self._state >= 0:
            os.close(self._state)
        self._state = fd
        self._send("state", [fd])

    def ready(self) -> None:
        self._send("ready")

    def stopping(self) -> None:
        """The end that follows is wanted: no next worker."""
        self._ends = True
        self._send("stopping")

    def upgrade(self) -> None:
        """Ask for a worker of the code that is installed now; the answer is a call of `watch`."""
        self._send("upgrade")

    def _send(self, op: str, fds: list[int] | None = None, **fields: Any) -> None:
        try:
            send(self._sock, op, fds or (), **fields)
        except OSError as error:
            log.debug("keeper does not take %s: %s", op, error)  # `watch` starts another one, which inherits all

    async def watch(self, retire: Callable[[], None], refused: Callable[[str], None]) -> None:
        """Serve the keeper's messages until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            try:
                message, fds = receive(self._sock)
            except BlockingIOError:
                continue
            except EOFError:
                if self._ends or not await self._replace_keeper():
                    return
                continue
            for fd in fds:
                os.close(fd)
            if message["op"] == "retire":
                retire()
            elif message["op"] == "refused":
                refused(str(message.get("why", "")))

    async def _replace_keeper(self) -> bool:
        now = time.monotonic()
        self._started = [when for when in self._started if now - when < WITHIN]
        if len(self._started) >= KEEPERS:
            log.error("keepers die as soon as they are started: going on without, the next crash ends the mounts")
            return False
        self._started.append(now)
        log.warning("the keeper (pid %d) died, starting another one", self._keeper)
        await trio.sleep(0.1 * (len(self._started) - 1))
        while not self._start_keeper():  # noqa: ASYNC110 - nobody tells when there is room for a process
            await trio.sleep(AGAIN)
        return True

    def _start_keeper(self) -> bool:
        ours, theirs = pair()
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "nydusfs.keeper.keeper", str(theirs.fileno()), *name_tag(self._spec)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            log.error("no new keeper can be started: %s", error.strerror)
            return False
        finally:
            theirs.close()
        fds = [*self.held.values(), *([self._state] if self._state >= 0 else [])]
        self._sock.close()
        self._sock = ours
        self._keeper = process.pid
        self._send("inherit", fds, spec=self._spec, pid=os.getpid(), held=list(self.held), state=self._state >= 0)
        return True


def _peer(sock: socket.socket) -> int:
    """The keeper made the socket pair, so its credentials are the peer's."""
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)
