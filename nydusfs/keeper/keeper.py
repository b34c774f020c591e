"""The keeper: holds the kernel's descriptors so that the worker may die.

It is the process that was started as `nydusd`. It never reads /dev/fuse, knows nothing of images or networks, and does
one thing: there is always one worker, and the next one only after the last is dead. Workers are forked from a
*zygote*, a process that has imported everything and waits, so that a new one serves some 50 ms after the death of the
old (a fresh interpreter takes 300 ms). The state a worker saved and the descriptors it gave go to the next.

When the keeper itself dies the worker goes on serving and starts a new keeper, which `inherits`.
"""

from __future__ import annotations

import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

from nydusfs.keeper import fdstore
from nydusfs.keeper.haste import hurry
from nydusfs.keeper.protocol import name_tag, pair, receive, say, send

PAUSES = (0.0, 0.05, 0.2, 0.5, 1.0, 2.0)  # before the next start, by deaths in a row before they were ready
CRASHES, CRASH_SECONDS = 60, 10.0  # more deaths of ready workers in this time, and the next waits a second
UPGRADE_SECONDS = 20.0  # for new code to import itself
FALL_BACK = 3  # deaths in a row of new code before the old is used again
STOP_SECONDS = 12.0  # a worker that was told to stop ends itself within 8
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Zygote:
    """A process that forks workers. `exec_new` starts it with the code that is installed now."""

    def __init__(self, sock: socket.socket, pid: int) -> None:
        self.sock = sock
        self.pid = pid
        self.version = ""

    @classmethod
    def fork(cls) -> Zygote:
        ours, theirs = pair()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                ours.close()
                from nydusfs.keeper import zygote

                status = zygote.main(theirs)
            finally:
                os._exit(status)
        theirs.close()
        return cls(ours, pid)

    @classmethod
    def exec_new(cls, spec: dict[str, Any]) -> Zygote:
        ours, theirs = pair()
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "nydusfs.keeper.zygote", str(theirs.fileno()), *name_tag(spec)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=False,
        )
        process.returncode = 0  # nobody asks for it; Popen must not complain about that
        theirs.close()
        return cls(ours, process.pid)

    def wait_hello(self, seconds: float) -> bool:
        readable, _, _ = select.select([self.sock], [], [], seconds)
        if not readable:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)  # it hangs and would not see its socket close
            return False
        try:
            message, _ = receive(self.sock)
        except (EOFError, ValueError):
            return False
        self.version = str(message.get("version", ""))
        return message.get("op") == "hello"

    def end(self) -> None:
        """It ends by itself when its socket closes, and leaves no zombie: see `Keeper.run`."""
        self.sock.close()


class Worker:
    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.pid = 0
        self.pidfd = -1
        self.status: int | None = None  # of waitpid, from the zygote
        self.ready = False
        self.stopping = False  # it ends because it wants to
        self.retiring = False  # it ends to make room for new code


class Keeper:
    """`spec`: what a worker needs to know to start, passed on as it is."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.held: dict[str, int] = {}
        self.state = -1
        self.zygote: Zygote | None = None
        self.previous: Zygote | None = None  # of the code before an upgrade, until the new one is ready
        self.worker: Worker | None = None
        self.served = False  # a worker was ready once: from now on there is something to keep
        self.deaths = 0  # in a row, before they were ready
        self.crashes: list[float] = []
        self.last = ""  # how the last worker ended
        self.gone = -1  # its pid: a busy zygote may say so when the next one is on its way
        self.told_to_stop = 0.0
        self.last_one = False  # the worker that follows one which died before it stopped: it removes the mount
        self.start_at: float | None = None
        self.exit_status: int | None = None
        self.orphan_status = 0
        self.selector = selectors.DefaultSelector()

    # -- life

    def run(self) -> int:
        """The exit status for the process."""
        receiving, sending = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        # Of zygotes that ended nobody wants to know how: the kernel buries them.
        before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
        self.selector.register(receiving, selectors.EVENT_READ, self._signals)
        try:
            if self.zygote is None:
                try:
                    self._use(Zygote.fork())
                except OSError as error:
                    if not self.served:
                        raise
                    say(f"no process for workers can be started now: {error.strerror}")  # it is when one is needed
            if self.worker is None:
                self.start_at = time.monotonic()
            while self.exit_status is None:
                self._turn()
            return self.exit_status
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            for zygote in (self.zygote, self.previous):
                if zygote is not None:
                    zygote.end()

    def inherit(self, sock: socket.socket) -> None:
        """Take over from a keeper that died: the worker at the other end of `sock` says what there is."""
        select.select([sock], [], [], UPGRADE_SECONDS)
        message, fds = receive(sock)
        self.spec = message["spec"]
        for name, fd in zip(message["held"], fds, strict=False):
            self.held[name] = fd
        if message["state"]:
            self.state = fds[-1]
        worker = Worker(sock)
        worker.ready = self.served = True
        self.worker = worker
        self.selector.register(sock, selectors.EVENT_READ, self._from_worker)
        if not self._watch(worker, int(message["pid"])):  # it died meanwhile, nobody's child who would tell
            self._drain(sock, self._from_worker)
            self._worker_died(None)
        try:
            self._use(Zygote.exec_new(self.spec))
        except (SystemExit, OSError) as error:
            say(f"{error}: trying once more")  # in `run`

    def _turn(self) -> None:
        now = time.monotonic()
        if self.told_to_stop and now > self.told_to_stop + STOP_SECONDS and self.worker is not None:
            say("the worker does not end, killing it")
            self.told_to_stop = now
            self._kill(signal.SIGKILL)
        timeout = 1.0 if self.told_to_stop else None
        if self.start_at is not None:
            timeout = max(0.0, self.start_at - now)
        for key, _ in self.selector.select(timeout):
            if key not in self.selector.get_map().values():
                continue  # an earlier event of this turn ended it
            try:
                key.data(key.fileobj)
            except BlockingIOError:
                pass  # another event of this turn took the message already
        # Behind the signals: while the zygote imports, a keeper waits for it alone.
        if self.exit_status is None and self.start_at is not None and time.monotonic() >= self.start_at:
            self.start_at = None
            self._start_worker()

    def _use(self, zygote: Zygote) -> None:
        if not zygote.wait_hello(UPGRADE_SECONDS):
            raise SystemExit("nydusd: its process for workers does not start")
        self.zygote = zygote
        self.selector.register(zygote.sock, selectors.EVENT_READ, self._from_zygote)

    # -- signals

    def _signals(self, fd: int) -> None:
        for number in os.read(fd, 64):
            self.told_to_stop = self.told_to_stop or time.monotonic()
            if self.worker is not None:
                self._kill(signal.Signals(number))  # one that is just being started: once it is
            elif not self.served:
                self.exit_status = 0

    def _kill(self, number: signal.Signals) -> None:
        worker = self.worker
        if worker is not None and worker.pidfd >= 0:
            try:
                signal.pidfd_send_signal(worker.pidfd, number)
            except ProcessLookupError:
                pass

    # -- the zygote

    def _from_zygote(self, sock: socket.socket) -> None:
        try:
            message, _ = receive(sock)
        except EOFError:
            self._zygote_died(sock)
            return
        worker = self.worker
        if message["op"] == "started" and worker is not None:
            if self._watch(worker, int(message["pid"])) and self.told_to_stop:
                self._kill(signal.SIGTERM)
        elif message["op"] == "exited" and worker is not None and self._is_of(message["pid"], worker):
            worker.status = int(message["status"])
            if worker.pidfd < 0:  # gone before it could be watched
                self._worker_died(None)

    def _is_of(self, pid: int, worker: Worker) -> bool:
        return pid == worker.pid or (not worker.pid and pid != self.gone)

    def _zygote_died(self, sock: socket.socket) -> None:
        self.selector.unregister(sock)
        for zygote in (self.zygote, self.previous):
            if zygote is not None and zygote.sock is sock:
                zygote.end()
        if self.previous is not None and self.previous.sock is sock:
            self.previous = None
            return
        say("the zygote died, starting another one")
        self.zygote = None
        try:
            self._use(Zygote.exec_new(self.spec))
        except (SystemExit, OSError) as error:
            say(f"{error}: trying again when a worker is needed")
        if self.worker is not None and not self.worker.pid:
            self._close_control(self.worker)
            self.worker = None
            self.exit_status = 0 if self.told_to_stop and not self.served else None
            self.start_at = time.monotonic() + 0.1

    def _start_worker(self) -> None:
        if self.zygote is None:
            try:
                self._use(Zygote.exec_new(self.spec))
            except (SystemExit, OSError) as error:
                say(str(error))
                self.exit_status = 1 if self.told_to_stop else None
                self.start_at = time.monotonic() + PAUSES[-1]
                return
        assert self.zygote is not None
        ours, theirs = pair()
        worker = self.worker = Worker(ours)
        fds = [theirs.fileno(), *self.held.values()]
        if self.state >= 0:
            fds.append(self.state)
        try:
            send(
                self.zygote.sock, "start", fds,
                spec=self.spec, held=list(self.held), state=self.state >= 0, last=self.last,
            )  # fmt: skip
        except OSError:
            self.worker = None
            self.start_at = time.monotonic() + 0.1
            ours.close()
            return
        finally:
            theirs.close()
        self.selector.register(worker.control, selectors.EVENT_READ, self._from_worker)

    # -- the worker

    def _watch(self, worker: Worker, pid: int) -> bool:
        """False: it is gone already. Of its own workers the zygote says how they ended."""
        worker.pid = pid
        try:
            worker.pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        self.selector.register(worker.pidfd, selectors.EVENT_READ, self._worker_died)
        if worker.control not in self.selector.get_map():
            self.selector.register(worker.control, selectors.EVENT_READ, self._from_worker)
        return True

    def _from_worker(self, sock: socket.socket) -> None:
        try:
            message, fds = receive(sock)
        except EOFError:
            self.selector.unregister(sock)
            return
        worker = self.worker
        name = message["op"]
        if worker is None or worker.control is not sock:
            name = ""
        if name == "hold" and fds:
            self._replace(message["name"], fds.pop())
        elif name == "drop":
            self._replace(message["name"], -1)
        elif name == "state" and fds:
            if self.state >= 0:
                os.close(self.state)
            self.state = fds.pop()
            fdstore.push("state", self.state)
        elif name == "ready" and worker is not None:
            worker.ready = self.served = True
            if self.previous is not None:
                self._forget_previous()
        elif name == "stopping" and worker is not None:
            worker.stopping = True
        elif name == "upgrade" and worker is not None:
            self._upgrade(worker)
        for fd in fds:
            os.close(fd)

    def _replace(self, name: str, fd: int) -> None:
        old = self.held.pop(name, -1)
        if old >= 0:
            os.close(old)
        if fd >= 0:
            self.held[name] = fd
            fdstore.push(name, fd)

    def _worker_died(self, _: Any) -> None:
        worker = self.worker
        if worker is None:
            return
        if worker.pidfd >= 0:
            self.selector.unregister(worker.pidfd)
            os.close(worker.pidfd)
            # What it said last is still in the socket: its state, that it wants to stop, how it ended.
            self._drain(worker.control, self._from_worker)
            if worker.status is None and self.zygote is not None:
                self._await_status(worker)
        self._close_control(worker)
        self.worker = None
        self.gone = worker.pid or self.gone
        status = worker.status
        if worker.stopping or not self.served or (self.told_to_stop and self.last_one):
            self.exit_status = _exit_code(status)
            return
        self.last_one = bool(self.told_to_stop)
        how = _describe(status)
        if worker.retiring:
            self.deaths, how = 0, ""
        else:
            self.deaths = 0 if worker.ready else self.deaths + 1
            if worker.pid:  # else it was not started, as the zygote said
                say(f"worker {worker.pid} {how}, starting the next")
        if self.previous is not None and self.deaths >= FALL_BACK:
            say("the new code does not serve, going back to the old")
            self._swap_back()
        if worker.pid:
            self.last = how and f"worker {worker.pid} {how}"
        now = time.monotonic()
        self.crashes = [when for when in self.crashes if now - when < CRASH_SECONDS] + [now]
        pause = PAUSES[min(self.deaths, len(PAUSES) - 1)]
        self.start_at = now + max(pause, 1.0 if len(self.crashes) > CRASHES else 0.0)

    def _drain(self, sock: socket.socket, handle: Any) -> None:
        while sock in self.selector.get_map() and select.select([sock], [], [], 0)[0]:
            handle(sock)

    def _await_status(self, worker: Worker) -> None:
        """The zygote reaps the worker and tells; a moment later at most."""
        deadline = time.monotonic() + 1.0
        zygotes = [zygote for zygote in (self.zygote, self.previous) if zygote is not None]
        while worker.status is None and time.monotonic() < deadline:
            readable, _, _ = select.select([zygote.sock for zygote in zygotes], [], [], 0.2)
            for sock in readable:
                try:
                    message, _ = receive(sock)
                except EOFError:
                    return  # noticed again by the main loop
                if message["op"] == "exited" and message["pid"] == worker.pid:
                    worker.status = int(message["status"])
            if not readable and not worker.stopping and self.served:
                return  # an inherited worker is nobody's child here: how it ended stays unknown

    def _close_control(self, worker: Worker) -> None:
        if worker.control in self.selector.get_map():
            self.selector.unregister(worker.control)
        worker.control.close()

    # -- new code under a running mount

    def _upgrade(self, worker: Worker) -> None:
        try:
            fresh = Zygote.exec_new(self.spec)
        except OSError as error:
            send(worker.control, "refused", why=f"the installed code cannot be started: {error.strerror}")
            return
        try:
            if not fresh.wait_hello(UPGRADE_SECONDS):
                fresh.end()
                send(worker.control, "refused", why="the installed code does not start; see the log")
                return
            if self.previous is not None:
                self._forget_previous()
            self.previous, self.zygote = self.zygote, fresh
            self.selector.register(fresh.sock, selectors.EVENT_READ, self._from_zygote)
            worker.retiring = True
            send(worker.control, "retire", version=fresh.version)
        except OSError:
            pass  # it died meanwhile: the next worker has the new code

    def _forget_previous(self) -> None:
        previous, self.previous = self.previous, None
        if previous is not None:
            if previous.sock in self.selector.get_map():
                self.selector.unregister(previous.sock)
            previous.end()

    def _swap_back(self) -> None:
        bad, self.zygote, self.previous = self.zygote, self.previous, None
        self.deaths = 0
        if bad is not None:
            if bad.sock in self.selector.get_map():
                self.selector.unregister(bad.sock)
            bad.end()


def _describe(status: int | None) -> str:
    if status is None:
        return "died"
    if os.WIFSIGNALED(status):
        return f"died by signal {os.WTERMSIG(status)}"
    return f"ended with status {os.waitstatus_to_exitcode(status)}"


def _exit_code(status: int | None) -> int:
    if status is None:
        return 0
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _shield() -> None:
    """The descriptors it holds are worth more to the machine than its few pages."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("-999")
    except OSError:
        pass  # not ours to set
    hurry(children=False)


def run(spec: dict[str, Any]) -> int:
    """Keep a worker for `spec` until it wants to end; the exit status."""
    _shield()
    keeper = Keeper(spec)
    keeper.held, keeper.state = fdstore.take()
    keeper.served = "fuse" in keeper.held
    return keeper.run()


def main(argv: list[str]) -> int:
    """`python -m nydusfs.keeper.keeper FD`: started by a worker whose keeper died."""
    _shield()
    keeper = Keeper({})
    keeper.inherit(socket.socket(fileno=int(argv[1])))
    return keeper.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
