"""The zygote: imports all that a worker needs, then forks one whenever the keeper asks.

It runs no event loop and no thread, so that a fork of it is a clean start; what it imported is shared with the worker.
Workers have jobs done by forks of it as well (`jobs`).
"""

from __future__ import annotations

import fcntl
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
from nydusfs.keeper.jobs import Jobs
from nydusfs.keeper.protocol import pair, receive, say, send

# What not every node needs, and the first worker imports where it does; the next ones find it here.
LATER = ("tomllib", "nydusfs.sources.plain", "nydusfs.sources.localdisk")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LATER_SECONDS = 5.0  # until then somebody may be waiting for the first container
EROFS = "nydusfs.drivers.erofs.making"  # with numpy, 0.1 s: the first image of a node waits for what it does
EROFS_SECONDS = 0.2


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
    _Zygote(sock, work, receiving, sending).run()
    return 0


class _Zygote:
    """`work`: what a worker does."""

    def __init__(self, sock: socket.socket, work: Callable[..., int], receiving: int, sending: int) -> None:
        self._sock = sock
        self._work = work
        self._receiving, self._sending = receiving, sending
        self._workers: list[socket.socket] = []  # by which they ask for jobs
        self._jobs = set[int]()
        self._later: list[tuple[float, tuple[str, ...]]] = [(LATER_SECONDS, LATER)]

    def run(self) -> None:
        hurry(children=True)
        while True:
            wait = self._later[0][0] if self._later else None
            sources: list[Any] = [self._sock, self._receiving, *self._workers]
            readable = select.select(sources, [], [], wait)[0]
            if not readable:
                take_time()
                for name in self._later.pop(0)[1]:
                    importlib.import_module(name)
                gc.freeze()
                hurry(children=True)
            for source in readable:
                if source is self._sock:
                    try:
                        message, fds = receive(self._sock)
                    except EOFError:
                        return
                    if message["op"] == "start":
                        self._start(message, fds)
                    for fd in fds:
                        os.close(fd)
                elif source == self._receiving:
                    os.read(self._receiving, 4096)
                    self._reap()
                else:
                    self._asked(source)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self._jobs:
                self._jobs.discard(pid)
                continue
            try:
                send(self._sock, "exited", pid=pid, status=status)
            except OSError:
                return

    def _start(self, message: dict[str, Any], fds: list[int]) -> None:
        ours, theirs = pair()
        # A worker that is told to stop before it listens (`Daemon.run`) is to do so then: what its default action
        # leaves behind is a dead mount where it follows another worker.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            pid = os.fork()
        except OSError as error:  # no more processes here, or no memory: the keeper tries again
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            ours.close()
            theirs.close()
            say(f"no worker can be started: {error.strerror}")
            send(self._sock, "exited", pid=0, status=1 << 8)
            return
        if pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            send(self._sock, "started", pid=pid)
            theirs.close()
            self._workers.append(ours)
            if message["spec"]["options"].get("fs_driver", "fuse") != "fuse" and EROFS not in sys.modules:
                self._later.insert(0, (EROFS_SECONDS, (EROFS,)))
            return
        status = 1
        try:
            gc.enable()
            for number in (*SIGNALS, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            ours.close()
            self._leave()
            control, *rest = fds
            held = dict(zip(message["held"], rest, strict=False))
            state = rest[-1] if message["state"] else -1
            own = socket.socket(fileno=control)
            status = self._work(message["spec"], own, held, state, message["last"], Jobs(theirs))
        finally:
            # A worker ends here whatever it raised: above are the zygote's own frames.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _asked(self, worker: socket.socket) -> None:
        try:
            message, fds = receive(worker)
        except EOFError:
            self._workers.remove(worker)
            worker.close()
            return
        if message["op"] == "job" and fds:
            self._job(message, socket.socket(fileno=fds.pop()))
        for fd in fds:
            os.close(fd)

    def _job(self, message: dict[str, Any], sock: socket.socket) -> None:
        try:
            pid = os.fork()
        except OSError:  # no more processes here: the worker does it
            sock.close()
            return
        if pid:
            self._jobs.add(pid)
            sock.close()
            return
        status = 1
        try:
            from nydusfs.daemon.process import like_any_other

            like_any_other()
            take_time()
            self._leave()
            _end_with(sock)
            importlib.import_module(message["module"]).job(message["request"], sock)
            status = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _leave(self) -> None:
        """What a fork has no use for, and others would wait for the end of."""
        signal.set_wakeup_fd(-1)
        for fd in (self._receiving, self._sending):
            os.close(fd)
        for sock in (self._sock, *self._workers):
            sock.close()


def _end_with(sock: socket.socket) -> None:
    """Have this process ended when nobody is at the other end of `sock` any more, from which nothing comes."""
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(sock, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(sock, fcntl.F_SETFL, fcntl.fcntl(sock, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([sock], [], [], 0)[0]:
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(socket.socket(fileno=int(sys.argv[1]))))
