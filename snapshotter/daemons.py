"""One nydusd process: started so that it outlives this program, watched, started again when it dies."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from nydusfs.config import FsDriver
from snapshotter import crowd
from snapshotter.cgroup import MemoryGroup
from snapshotter.directories import make_private
from snapshotter.errors import SnapshotterError, Unavailable
from snapshotter.nydusd_api import ApiError, ApiUnreachable, NydusdApi
from snapshotter.processes import Life, end, installed_version, last_line, peer_pid, serving
from snapshotter.records import DaemonRecord, Records
from snapshotter.supervisor import EXCHANGE_SECONDS, Supervisor
from snapshotter.system import cpu_seconds, detach, mountpoints, proportional_kb, start_time
from snapshotter.tally import tally

log = logging.getLogger(__name__)

ADOPT_SECONDS = 30.0
START_SECONDS = 30.0  # normal: 0.03 s upstream's, 0.5 s ours on a busy machine
LONGEST_PAUSE = 0.03  # seconds between two looks at one that starts: containers wait for it
STOP_SECONDS = 10.0
DEATH_SECONDS = 5.0  # between the end of its connections and its own, or the answer of its next worker
KEEPER_SECONDS = 3.0  # for a worker to start a new keeper
# Others may be starting this nydusd or mounting with it, each bounded; who waits longer is told to try again.
LOCK_SECONDS = 60.0
BACKOFF = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
TAKE_OVERS = 3
UPGRADE_SECONDS = 30.0
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
    restart: bool = True  # recover_policy other than none
    failover: bool = False  # recover_policy failover: a dead one's mount goes on with the next
    failover_policy: str = "resend"
    cpu_seconds: int = 0  # window after a start in which CPU time is measured, 0: not
    log_format: str = "text"
    fs_driver: FsDriver | None = None  # None: upstream's nydusd is not to be given a flag that it does not know
    group: MemoryGroup | None = None


def new_id() -> str:
    """20 characters like upstream's, sorted by time of creation."""
    number = (int(time.time()) << 68) | secrets.randbits(68)
    return "".join(_ALPHABET[(number >> shift) & 31] for shift in range(95, -1, -5))


class Daemon:
    """A process that serves one FUSE mount. All methods may be called from any thread.

    `arguments` gives what the command line needs beyond the common part, fresh at each start; `on_start` runs after
    each start of a new process, before others may use it: it mounts again what the dead one served; `on_take_over`
    where the new process has the mounts of the dead one; `meanwhile` while a process starts: what can be prepared for
    `on_start`. It raises nothing.
    """

    def __init__(
        self,
        settings: DaemonSettings,
        records: Records,
        record: DaemonRecord,
        arguments: Callable[[], Sequence[str]],
        on_start: Callable[[], None],
        on_take_over: Callable[[], None] = lambda: None,
        meanwhile: Callable[[], None] = lambda: None,
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
        self._on_take_over = on_take_over
        self._meanwhile = meanwhile
        self._supervisor: Supervisor | None = None
        if settings.failover:
            self._supervisor = Supervisor(settings.root / "supervisor" / f"{record.id}.sock")
        self._alive = False
        self._life: Life | None = None  # of the process that is watched
        self._gives_state = True
        self._closing = threading.Event()
        self._born = 0.0
        self._said = 0  # length of the output file before this process
        self._deaths = 0
        self.startup_cpu = 0.0  # percent of one CPU, see `cpu_seconds`

    @property
    def alive(self) -> bool:
        """As far as is known: who watches it may be about to notice its death."""
        return self._alive

    def lives(self) -> bool:
        """Alive, by a look at its process; False for a moment where only the keeper died."""
        life = self._life
        return self._alive and not (life is not None and life.ended())

    def died(self) -> bool:
        """Whether one that did not answer has ended."""
        return self._life is not None and self._life.ended()

    def back(self) -> bool:
        """Behind a connection that broke off: whether it has ended, or answers again, which is another worker. Its
        connections end before it does, by seconds where a thread of it waits for a disk."""
        deadline = time.monotonic() + DEATH_SECONDS
        while not self.died():
            try:
                self.api.info(timeout=DEATH_SECONDS)
                return True
            except SnapshotterError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.02)
        return True

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
                    pid = info.get("keeper_pid") or peer_pid(self._record.socket)
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
            self.save_state()
            return True

    def save_state(self) -> None:
        """After each change of what it serves. Raises nothing: without it a death of all processes is a restart."""
        with self.lock:
            if self._supervisor is None or not self._gives_state:
                return
            try:
                self._supervisor.save(lambda: self.api.send_state(EXCHANGE_SECONDS))
            except ApiUnreachable as error:
                log.warning("nydusd %s: its mount would not survive a death of it now: %s", self.id, error)
            except SnapshotterError as error:
                # started without a supervisor, or too old for one: asked again when it was started again
                self._gives_state = False
                log.warning("nydusd %s: its mount would not survive a death of it: %s", self.id, error)

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
        """Returns with the process running, also if it died this moment. Raises Unavailable saying why it does not."""
        with self.held():
            if self._closing.is_set():
                raise Unavailable(f"nydusd {self.id} is being stopped")
            if self._alive and not self.lives():
                self._noticed()
            if not self._alive:
                self._resume()

    def upgrade(self) -> bool:
        """The code that is installed now serves in place of the running one, under its mounts; returns when it does.

        False: none runs. Raises SnapshotterError; then what ran before serves on.
        """
        with self.held():  # one that is being started may have been of the code of before
            if not self._alive:
                return False
        try:
            before = self.api.info().get("worker_pid")
            self.api.upgrade()
        except ApiError as error:
            # upstream's has no such route: another process takes its mount over, as after a death
            if error.status not in (400, 404, 501) or self._supervisor is None:
                raise SnapshotterError(f"nydusd {self.id}: {error}") from None
            with self.held():
                self._supervisor.save(lambda: self.api.send_state(EXCHANGE_SECONDS))
                self._alive = False
                self._end_processes(signal.SIGKILL)
                self._resume()
            return True
        deadline = time.monotonic() + UPGRADE_SECONDS
        while time.monotonic() < deadline:
            try:
                info = self.api.info(timeout=5)
                if info.get("worker_pid") != before and info.get("state") == "RUNNING":
                    self.save_state()
                    return True
            except SnapshotterError:
                pass  # between two workers
            time.sleep(0.02)
        raise Unavailable(f"nydusd {self.id}: its new worker does not answer within {UPGRADE_SECONDS:.0f} s")

    def upgrade_if_older(self) -> None:
        """After an update of the package, when this program was started again. Raises nothing."""
        try:
            running = self.api.info().get("version") or {}
            installed = installed_version(self._settings.program)
            told = (running.get("package_ver"), running.get("git_commit"))
            if installed is None or told == installed:
                return
            log.info("nydusd %s is %s (%s), installed is %s (%s): it is upgraded", self.id, *told, *installed)
            self.upgrade()
        except (SnapshotterError, OSError) as error:
            log.warning("nydusd %s goes on as it is: %s", self.id, error)

    def memory_kb(self) -> int:
        """Of all its processes, pages they share counted once."""
        return sum(proportional_kb(pid) for pid in self._processes())

    def stop(self) -> None:
        """Ends the process and its mount, forgets the record; bounded by STOP_SECONDS."""
        self._closing.set()
        with self.lock:
            self._alive = False
            self._end_processes()
            if self._supervisor is not None:
                self._supervisor.close()
            detach(str(self.mountpoint))
            self._records.forget_daemon(self.id)
        tally.count(EVENTS, "DESTROYED")

    def unwatch(self) -> None:
        """The process stays, nobody restarts it any more: this program is about to end."""
        self._closing.set()

    # ---- starting

    def _start(self) -> None:
        record = self._record
        if not os.path.exists("/dev/fuse"):
            raise Unavailable("Nydus images need FUSE: /dev/fuse is missing (modprobe fuse)")
        self._end_processes()
        if self._supervisor is not None:
            self._supervisor.forget()  # a connection that is kept would keep the old mount busy
        # nydusd takes a stale socket beside a mount for a crash it should fail over from, and waits for ever
        detach(str(record.mountpoint))
        record.mountpoint.mkdir(mode=0o750, parents=True, exist_ok=True)
        process, output = self._spawn(self._arguments())
        try:
            self._meanwhile()
            self._wait_state(process, output, "RUNNING")
        except BaseException:
            self._give_up(process)
            detach(str(record.mountpoint))
            raise
        self._begun(process)
        log.info("nydusd %s started, pid %d, serving %s", record.id, process.pid, record.mountpoint)
        self._on_start()
        self.save_state()

    def _resume(self) -> None:
        if self._supervisor is not None and self._supervisor.has_state:
            # a new mount is none to containers that run: it comes last, also where the next one dies as it begins
            for _ in range(TAKE_OVERS):
                try:
                    self._take_over()
                    return
                except (SnapshotterError, OSError) as error:
                    log.error("nydusd %s: another process cannot go on with its mount: %s", self.id, error)
            log.error("nydusd %s: its mount is lost, a new one is made", self.id)
        self._start()

    def _take_over(self) -> None:
        """Another process goes on with the mount of the dead one. Raises SnapshotterError, OSError; then none runs."""
        assert self._supervisor is not None
        self._end_processes()
        process, output = self._spawn(["--upgrade"])
        try:
            self._wait_state(process, output, "INIT")
            self._supervisor.restore(lambda: self.api.take_over(EXCHANGE_SECONDS))
            self._wait_state(process, output, "READY")
            self.api.start()
            self._wait_state(process, output, "RUNNING")
        except BaseException:
            self._give_up(process)
            raise
        self._begun(process)
        log.info("nydusd %s: pid %d goes on with %s, readers waited", self.id, process.pid, self.mountpoint)
        self._on_take_over()
        self.save_state()

    def _begun(self, process: subprocess.Popen[bytes]) -> None:
        self._gives_state = True
        self._live(process)
        tally.count(EVENTS, "RUNNING")
        if self._settings.cpu_seconds:
            threading.Thread(target=self._measure, args=(process.pid,), name=f"cpu-{self.id}", daemon=True).start()

    def _spawn(self, arguments: Sequence[str]) -> tuple[subprocess.Popen[bytes], Path]:
        """The process, on record, and the file it prints to."""
        crowd.apart()
        record, settings = self._record, self._settings
        record.socket.unlink(missing_ok=True)
        make_private(record.socket.parent)
        log_dir = settings.log_dir / record.id
        log_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
        self._records.save_daemon(replace(record, pid=0, started=0))
        command = [settings.program, "fuse"]
        if settings.threads:
            command += ["--thread-num", str(settings.threads)]
        if self._supervisor is not None:
            command += ["--id", record.id, "--supervisor", str(self._supervisor.path)]
        command += arguments
        command += ["--mountpoint", str(record.mountpoint), "--apisock", str(record.socket)]
        command += ["--log-level", settings.log_level]
        if settings.log_rotation_size > 0:
            command += ["--log-rotation-size", str(settings.log_rotation_size)]
        command += ["--log-file", str(log_dir / "nydusd.log")]
        if settings.failover_policy != "resend":
            command += ["--failover-policy", settings.failover_policy]
        if settings.fs_driver not in (None, "fuse"):  # its images say so too; told before, it gets ready for them
            command += ["--fs-driver", settings.fs_driver]
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
        return process, output

    def _wait_state(self, process: subprocess.Popen[bytes], output: Path, state: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        delay = 0.01
        while True:
            if process.poll() is not None:
                said = f"status {process.returncode}: {last_line(output, self._said)} (see {output.parent})"
                raise Unavailable(f"nydusd {self.id} ended at its start with {said}")
            try:
                if self.api.info(timeout=5).get("state") == state:
                    return
            except SnapshotterError:
                pass
            if self._closing.is_set():
                raise Unavailable(f"nydusd {self.id} is being stopped")
            if time.monotonic() > deadline:
                raise Unavailable(f"nydusd {self.id} is not {state} after {START_SECONDS:.0f} s (see {output.parent})")
            time.sleep(delay)
            delay = min(delay * 1.5, LONGEST_PAUSE)

    def _live(self, process: subprocess.Popen[bytes] | None) -> None:
        """Raises OSError where it is dead again: nobody would watch it, so it must not count as alive."""
        life = self._life = Life(self._record.pid)
        self._alive = True
        self._born = time.monotonic()
        if self._settings.group is not None:
            self._settings.group.add(self._processes())
        threading.Thread(target=self._watch, args=(life, process), name=f"watch-{self.id}", daemon=True).start()

    def _measure(self, pid: int) -> None:
        self._closing.wait(self._settings.cpu_seconds)
        if self._record.pid == pid:
            used = sum(cpu_seconds(one) for one in self._processes())
            self.startup_cpu = round(100 * used / self._settings.cpu_seconds, 2)

    # ---- death

    def _watch(self, life: Life, process: subprocess.Popen[bytes] | None) -> None:
        life.ended(None)
        if process is not None:
            process.wait()
        with self.lock:
            if self._life is not life or self._closing.is_set():
                return  # whoever noticed it first has another one
            if self._alive and not self._noticed():
                return
        if self._settings.restart:
            self._bring_back()

    def _noticed(self) -> bool:
        """Under the lock: the process that is watched has ended. False: the mount has another keeper."""
        pid = self._record.pid
        if self._has_another_keeper(pid):
            return False
        self._alive = False
        tally.count(EVENTS, "DIED")
        self._deaths = self._deaths + 1 if time.monotonic() - self._born < STEADY_SECONDS else 0
        consequence = "starting it again" if self._settings.restart else "recover_policy is none"
        output = self._settings.log_dir / self.id / "nydusd.out"
        log.error("nydusd %s (pid %d) died, its last words: %s; %s", self.id, pid, last_line(output, 0), consequence)
        return True

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
            if keeper != pid and info.get("state") == "RUNNING" and start_time(keeper):
                self._record = replace(self._record, pid=keeper, started=start_time(keeper))
                self._records.save_daemon(self._record)
                log.warning("the keeper of nydusd %s (pid %d) died, it has another one: pid %d", self.id, pid, keeper)
                with suppress(ProcessLookupError):  # that one too
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
                    self._resume()
                    return
                except (SnapshotterError, OSError) as error:
                    self._deaths += 1
                    log.error("nydusd %s cannot be started again: %s", self.id, error)

    def _processes(self) -> set[int]:
        """All of them name its socket. What is on record may be another's number since the last boot."""
        return set(serving(self._record.socket))

    def _give_up(self, process: subprocess.Popen[bytes]) -> None:
        """All processes of a nydusd that did not start as it should: a worker alone would start another keeper."""
        self._end_processes(signal.SIGKILL)
        process.kill()
        process.wait()

    def _end_processes(self, first: signal.Signals = signal.SIGTERM) -> None:
        """SIGTERM, then SIGKILL, to every process of ours that was started for this socket."""
        end(self._processes(), STOP_SECONDS, first)
