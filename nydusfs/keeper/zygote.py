"""The zygote: imports all that a worker needs, then forks one whenever the keeper asks.

It runs no event loop and no thread, so that a fork of it is a clean start; what it imported is shared with the worker.
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from nydusfs.keeper.haste import hurry, take_time
from nydusfs.keeper.protocol import receive, send

# What not every node needs, and the first worker imports where it does; the next ones find it here.
LATER = ("tomllib", "nydusfs.sources.plain", "nydusfs.sources.localdisk")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LATER_SECONDS = 5.0  # until then somebody may be waiting for the first container


def load() -> tuple[str, Callable[..., int]]:
    """Import what a worker needs. The version line, and what a worker does."""
    # Collections while everything is imported take 20 ms, one behind it 15; what they free, 1 MB, is shared by workers.
    gc.disable()
    from nydusfs.lean import import_trio

    import_trio()
    from nydusfs.daemon import version, worker

    gc.freeze()
    return version.version_line(), worker.main


def main(sock: socket.socket) -> int:
    """Serve one keeper until it is gone."""
    # Ctrl-C in a terminal reaches every process of the group: the worker stops by it, this one with the keeper.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    version, work = load()
    receiving, sending = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
    send(sock, "hello", version=version)
    hurry(children=True)
    later: float | None = LATER_SECONDS
    while True:
        readable = select.select([sock.fileno(), receiving], [], [], later)[0]
        if not readable:
            later = None
            take_time()
            for name in LATER:
                importlib.import_module(name)
            gc.freeze()
            hurry(children=True)
        if receiving in readable:
            os.read(receiving, 4096)
            _reap(sock)
        if sock.fileno() in readable:
            try:
                message, fds = receive(sock)
            except EOFError:
                return 0
            if message["op"] == "start":
                _fork(sock, message, fds, work)
            for fd in fds:
                os.close(fd)


def _reap(sock: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        try:
            send(sock, "exited", pid=pid, status=status)
        except OSError:
            return


def _fork(sock: socket.socket, message: dict[str, Any], fds: list[int], work: Any) -> None:
    # A worker that is told to stop before it listens (`Daemon.run`) is to do so then: what its default action leaves
    # behind is a dead mount where it follows another worker.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        send(sock, "started", pid=pid)
        return
    status = 1
    try:
        gc.enable()
        signal.set_wakeup_fd(-1)
        for number in (*SIGNALS, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        sock.close()
        control, *rest = fds
        held = dict(zip(message["held"], rest, strict=False))
        state = rest[-1] if message["state"] else -1
        status = work(message["spec"], socket.socket(fileno=control), held, state, message["last"])
    finally:
        # A worker ends here whatever it raised: above are the zygote's own frames.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main(socket.socket(fileno=int(sys.argv[1]))))
