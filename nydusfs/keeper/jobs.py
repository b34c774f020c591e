"""A worker's way to have something computed in a process of its own, which its zygote forks.

What computes for tenths of a second would keep the interpreter's lock from the threads that answer readers and fetch:
each of their system calls gives it away and waits up to 5 ms to have it back.
"""

from __future__ import annotations

import socket
from typing import Any

from nydusfs.keeper.protocol import pair, send


class Jobs:
    """`sock`: to the zygote; None where there is none."""

    def __init__(self, sock: socket.socket | None = None) -> None:
        self._sock = sock

    def begin(self, module: str, **request: Any) -> socket.socket | None:
        """Have `module.job(request, socket)` called; the other end of that socket. To close it ends the process. None
        without a zygote, or one that is gone. What was begun may fail at any time: then the socket is at its end."""
        if self._sock is None:
            return None
        ours, theirs = pair()
        try:
            send(self._sock, "job", [theirs.fileno()], module=module, request=request)
        except OSError:
            ours.close()
            return None
        finally:
            theirs.close()
        return ours
