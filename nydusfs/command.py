"""Which command a container runs: the arguments of the first process that reads its image as itself.

The container runtime's own process enters the container, reads a little (users, the head of the program) and becomes
the program by execve; from then on /proc tells the program's arguments, and its loader reads. They may hold secrets, so
only a hash is kept.
"""

from __future__ import annotations

import os
import threading
from hashlib import blake2b

import trio

TRIES = 32  # reads that may come from a runtime, or from processes that cannot be seen
LENGTH = 4096
# Seconds for /proc to answer, mostly 0.1 ms. Where a process has a file of the image in the place of its arguments, or
# holds its memory's lock while it reads, it answers when the reader is answered, who must not wait for that.
PATIENCE = 0.01
_RUNTIMES = (b"runc", b"crun", b"youki", b"exe")  # runc runs itself as /proc/self/exe


class FirstCommand:
    """`seen` from any thread, for each read while `open`; `known` from the trio thread that made it."""

    def __init__(self) -> None:
        self.name = ""  # empty as well when it cannot be known
        self.open = True
        self._tries = 0
        self._looking = threading.Lock()
        self._known = trio.Event()
        try:
            self._token: trio.lowlevel.TrioToken | None = trio.lowlevel.current_trio_token()
        except RuntimeError:
            self._token = None

    def seen(self, pid: int) -> None:
        """A process reads the image; 0: one of another process namespace."""
        if not self.open or not self._looking.acquire(blocking=False):
            return
        looker = threading.Thread(target=self._look, args=(pid,), name="command", daemon=True)
        looker.start()
        looker.join(PATIENCE)

    async def known(self) -> str:
        """Waits for it."""
        await self._known.wait()
        return self.name

    def _look(self, pid: int) -> None:
        self._tries += 1
        try:
            name = command_of(pid) if pid else ""
            if name or self._tries >= TRIES:
                self._settle(name)
        finally:
            self._looking.release()

    def _settle(self, name: str) -> None:
        self.name, self.open = name, False
        try:
            if self._token is not None:
                self._token.run_sync_soon(self._known.set)
        except trio.RunFinishedError:
            pass


def command_of(pid: int) -> str:
    """A hash of a process's arguments; empty for a runtime's own process and for one that is gone."""
    try:
        fd = os.open(f"/proc/{pid}/cmdline", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        arguments = os.read(fd, LENGTH)
    except OSError:
        return ""
    finally:
        os.close(fd)
    words = arguments.split(b"\0")
    if not arguments or (os.path.basename(words[0]).startswith(_RUNTIMES) and words[1:2] == [b"init"]):
        return ""
    return blake2b(arguments, digest_size=8).hexdigest()
