"""One nydusd process: started so that it outlives this program, watched, started again when it dies."""

from __future__ import annotations

import logging
import os
import secrets
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from snapshotter.cgroup import MemoryGroup
from snapshotter.directories import make_private
from snapshotter.errors import SnapshotterError, Unavailable
from snapshotter.nydusd_api import NydusdApi
from snapshotter.records import DaemonRecord, Records
from snapshotter.system import cpu_seconds, detach, mountpoints, proportional_kb, start_time
from snapshotter.tally import tally

log = logging.getLogger(__name__)

ADOPT_SECONDS = 30.0
START_SECONDS = 30.0  # normal: 0.03 s upstream's, 0.5 s ours on a busy machine
STOP_SECONDS = 10.0
KEEPER_SECONDS = 3.0  # for a worker to start a new keeper
# Others may be starting this nydusd or mounting with it, each bounded; who waits longer is told to try again.
LOCK_SECONDS = 60.0
BACKOFF = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
STEADY_SECONDS = 60.0  # a life this long makes the next restart immediate again
EVENTS = "nydusd_lifetime_event_counts"
_ALPHABET = "0123456789abcdefghijklmnopqrstuv"


@dataclass(frozen=True)
class DaemonSettings:
    program: str
    root: Path
    log_dir: Path
    log_level: str = "info"
    log_rotation_size: int = 100  # MB
    threads: int = 0  # 0: nydusd's choice
    restart: bool = True  # recover_policy
    failover_policy: str = "resend"
    cpu_seconds: int = 0  # window after a start in which CPU time is measured, 0: not
    log_format: str = "text"
    group: MemoryGroup | None = None


def new_id() -> str:
    """20 characters like upstream's, sorted by time of creation."""
    number = (int(time.time()) << 68) | secrets.randbits(68)
    return "".join(_ALPHABET[(number >> shift) & 31] for shift in range(95, -1, -5))


class Daemon:
    """A process that serves one FUSE mount. All methods may be called from any thread.

    `arguments` gives what the command line needs beyond the common part, fresh at each start; `on_start` runs after
    each start of a new process, before others may use it: it mounts again what the dead one served.
    """

    def __init__(
        self,
        settings: DaemonSettings,
        records: Records,
        record: DaemonRecord,
        arguments: Callable[[], Sequence[str]],
        on_start: Callable[[], None],
    ) -> None:
        self.api = NydusdApi(record.socket)
        self.id = record.id
        self.mountpoint = record.mountpoint
        self.lock = threading.RLock()
        self._settings = settings
        self._records = records
        self._record = record
        self._arguments = arguments
        self._on_start = on_start
        self._alive = False
        self._closing = threading.Event()
        self._born = 0.0
        self._said = 0  # length of the output file before this process
        self._deaths = 0
        self.startup_cpu = 0.0  # percent of one CPU, see `cpu_seconds`

    @property
    def alive(self) -> bool:
        return self._alive

    @property
    def record(self) -> DaemonRecord:
        return self._record

    @property
    def shared(self) -> bool:
        return self._record.shared

    @property
    def pid(self) -> int:
        return self._record.pid

    def adopt(self) -> bool:
        """Takes over a process that an earlier run of this program started. False: it is dead, or useless.

        One that lives but does not answer is waited for: containers run on it, and its API answers nothing while it
        mounts an image.
        """
        with self.lock:
            deadline = time.monotonic() + ADOPT_SECONDS
            state, pid = "", 0
            while state != "RUNNING" and time.monotonic() < deadline:
                try:
                    info = self.api.info(timeout=10)
                    state = info.get("state", "")
                    pid = info.get("keeper_pid") or _peer_pid(self._record.socket)
                except (SnapshotterError, OSError):
                    if not self._processes():
                        return False
                if state != "RUNNING":
                    time.sleep(0.1)
            if state != "RUNNING" or str(self.mountpoint) not in mountpoints():
                log.warning("nydusd %s (pid %d, state %s) has no mount or no answer: replacing it", self.id, pid, state)
                return False
            self._record = replace(self._record, pid=pid, started=start_time(pid))
            self._records.save_daemon(self._record)
            self._live(None)
            return True

    @contextmanager
    def held(self) -> Iterator[None]:
        """The lock, in bounded time: a crowd behind a nydusd that hangs must not wait for each other for ever.

        Raises Unavailable.
        """
        if not self.lock.acquire(timeout=LOCK_SECONDS):
            raise Unavailable(f"nydusd {self.id} (pid {self.pid}) is busy for more than {LOCK_SECONDS:.0f} s")
        try:
            yield
        finally:
            self.lock.release()

    def ensure(self) -> None:
        """Returns with the process running. Raises Unavailable saying why it does not."""
        with self.held():
            if self._closing.is_set():
                raise Unavailable(f"nydusd {self.id} is being stopped")
            if not self._alive:
                self._start()

    def memory_kb(self) -> int:
        """Of all its processes, pages they share counted once."""
        return sum(proportional_kb(pid) for pid in self._processes())

    def stop(self) -> None:
        """Ends the process and its mount, forgets the record; bounded by STOP_SECONDS."""
        self._closing.set()
        with self.lock:
            self._alive = False
            self._end_processes()
            detach(str(self.mountpoint))
            self._records.forget_daemon(self.id)
        tally.count(EVENTS, "DESTROYED")

    def unwatch(self) -> None:
        """The process stays, nobody restarts it any more: this program is about to end."""
        self._closing.set()

    # ---- starting

    def _start(self) -> None:
        record, settings = self._record, self._settings
        if not os.path.exists("/dev/fuse"):
            raise Unavailable("Nydus images need FUSE: /dev/fuse is missing (modprobe fuse)")
        self._end_processes()
        # nydusd takes a stale socket beside a mount for a crash it should fail over from, and waits for ever
        detach(str(record.mountpoint))
        record.socket.unlink(missing_ok=True)
        make_private(record.socket.parent)
        record.mountpoint.mkdir(mode=0o750, parents=True, exist_ok=True)
        log_dir = settings.log_dir / record.id
        log_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
        self._records.save_daemon(replace(record, pid=0, started=0))
        command = [settings.program, "fuse"]
        if settings.threads:
            command += ["--thread-num", str(settings.threads)]
        command += self._arguments()
        command += ["--mountpoint", str(record.mountpoint), "--apisock", str(record.socket)]
        command += ["--log-level", settings.log_level]
        if settings.log_rotation_size > 0:
            command += ["--log-rotation-size", str(settings.log_rotation_size)]
        command += ["--log-file", str(log_dir / "nydusd.log")]
        if settings.failover_policy != "resend":
            command += ["--failover-policy", settings.failover_policy]
        if settings.log_format != "text":
            command += ["--log-format", settings.log_format]
        output = log_dir / "nydusd.out"
        try:
            with open(os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640), "ab") as out:
                self._said = out.tell()
                # No preexec_fn: subprocess then uses vfork, which is safe beside gRPC's threads. Its own session:
                # signals to this program's group, and its death, pass it by.
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, cwd="/"
                )
        except OSError as error:
            raise Unavailable(f"nydusd cannot be started: {settings.program}: {error.strerror}") from None
        self._record = replace(record, pid=process.pid, started=start_time(process.pid))
        self._records.save_daemon(self._record)
        try:
            self._wait_running(process, output)
        except BaseException:
            process.kill()
            process.wait()
            detach(str(record.mountpoint))
            raise
        self._live(process)
        tally.count(EVENTS, "RUNNING")
        if settings.cpu_seconds:
            threading.Thread(target=self._measure, args=(process.pid,), name=f"cpu-{self.id}", daemon=True).start()
        log.info("nydusd %s started, pid %d, serving %s", record.id, process.pid, record.mountpoint)
        self._on_start()

    def _wait_running(self, process: subprocess.Popen[bytes], output: Path) -> None:
        deadline = time.monotonic() + START_SECONDS
        delay = 0.01
        while True:
            if process.poll() is not None:
                said = f"status {process.returncode}: {_last_line(output, self._said)} (see {output.parent})"
                raise Unavailable(f"nydusd {self.id} ended at its start with {said}")
            try:
                if self.api.info(timeout=5).get("state") == "RUNNING":
                    return
            except SnapshotterError:
                pass
            if self._closing.is_set():
                raise Unavailable(f"nydusd {self.id} is being stopped")
            if time.monotonic() > deadline:
                raise Unavailable(f"nydusd {self.id} is not running after {START_SECONDS:.0f} s (see {output.parent})")
            time.sleep(delay)
            delay = min(delay * 1.5, 0.1)

    def _live(self, process: subprocess.Popen[bytes] | None) -> None:
        self._alive = True
        self._born = time.monotonic()
        if self._settings.group is not None:
            self._settings.group.add(self._processes())
        descriptor = os.pidfd_open(self._record.pid)
        threading.Thread(
            target=self._watch, args=(self._record.pid, descriptor, process), name=f"watch-{self.id}", daemon=True
        ).start()

    def _measure(self, pid: int) -> None:
        self._closing.wait(self._settings.cpu_seconds)
        if self._record.pid == pid:
            used = sum(cpu_seconds(one) for one in self._processes())
            self.startup_cpu = round(100 * used / self._settings.cpu_seconds, 2)

    # ---- death

    def _watch(self, pid: int, descriptor: int, process: subprocess.Popen[bytes] | None) -> None:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll()
        os.close(descriptor)
        if process is not None:
            process.wait()
        with self.lock:
            if self._record.pid != pid or self._closing.is_set():
                return
            if self._has_another_keeper(pid):
                return
            self._alive = False
            tally.count(EVENTS, "DIED")
            self._deaths = self._deaths + 1 if time.monotonic() - self._born < STEADY_SECONDS else 0
        consequence = "starting it again" if self._settings.restart else "recover_policy is none"
        output = self._settings.log_dir / self.id / "nydusd.out"
        log.error("nydusd %s (pid %d) died, its last words: %s; %s", self.id, pid, _last_line(output, 0), consequence)
        if self._settings.restart:
            self._bring_back()

    def _has_another_keeper(self, pid: int) -> bool:
        """A keeper that dies is replaced by its worker: nothing happened to the mount. Watches the new one then."""
        deadline = time.monotonic() + KEEPER_SECONDS
        while time.monotonic() < deadline:
            try:
                info = self.api.info(timeout=2)
            except SnapshotterError:
                return False
            keeper = info.get("keeper_pid")
            if not keeper:
                return False
            if keeper != pid and info.get("state") == "RUNNING":
                self._record = replace(self._record, pid=keeper, started=start_time(keeper))
                self._records.save_daemon(self._record)
                log.warning("the keeper of nydusd %s (pid %d) died, it has another one: pid %d", self.id, pid, keeper)
                self._live(None)
                return True
            time.sleep(0.05)
        return False

    def _bring_back(self) -> None:
        while not self._closing.wait(BACKOFF[min(self._deaths, len(BACKOFF) - 1)]):
            with self.lock:
                if self._alive or self._closing.is_set():
                    return
                try:
                    self._start()
                    return
                except (SnapshotterError, OSError) as error:
                    self._deaths += 1
                    log.error("nydusd %s cannot be started again: %s", self.id, error)

    def _processes(self) -> set[int]:
        pids = set(serving(self._record.socket))
        if self._record.pid and self._record.started and start_time(self._record.pid) == self._record.started:
            pids.add(self._record.pid)
        return pids

    def _end_processes(self) -> None:
        """SIGTERM, then SIGKILL, to every process of ours that was started for this socket."""
        pids = self._processes()
        for number, patience in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 2.0)):
            for pid in pids:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    pass
            deadline = time.monotonic() + patience
            while (pids := {pid for pid in pids if start_time(pid)}) and time.monotonic() < deadline:
                time.sleep(0.01)
            if not pids:
                return


def _peer_pid(path: Path) -> int:
    """Pid of the process that listens on a unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(5)
        client.connect(str(path))
        pid: int
        pid, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid


def serving(path: Path) -> list[int]:
    """Processes whose command line names this API socket: also those whose pid could not be recorded any more."""
    found = []
    wanted = [b"--apisock", os.fsencode(path)]
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    words = file.read().split(b"\0")
            except OSError:
                continue
            if any(words[at : at + 2] == wanted for at in range(len(words))):
                found.append(int(name))
    return found


def _last_line(path: Path, start: int) -> str:
    """Of what was printed behind `start` bytes."""
    try:
        with path.open("rb") as file:
            file.seek(max(start, path.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1].strip() if lines else "it printed nothing"
