"""Child processes, ports, mounts and their removal, for tests, benchmarks and the quickstart.

Everything is ended by process id, never by name: other instances may run on the same machine.
"""

from __future__ import annotations

import glob
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from snapshotter.processes import Life, end


class LabError(Exception):
    """A part of the lab did not come up, or a command of it failed."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago, and is none that the kernel gives to connections: of those
    one could be in use before a server that starts has it."""
    end = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(1000):
        port = 10000 + secrets.randbelow(max(end, 20000) - 10000)  # also where tests run beside each other
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise LabError("no TCP port is free")


def work_dir(parent: str | Path | None = None) -> Path:
    """A new short directory: the snapshotter's root must stay below 70 bytes, socket paths below 108."""
    base = Path(parent or os.environ.get("NYDUS_LAB_DIR") or tempfile.gettempdir())
    if len(str(base)) > 30:
        base = Path("/tmp")
    path = base / f"ny-{secrets.token_hex(3)}"
    path.mkdir(mode=0o700, parents=True)
    if record := os.environ.get("NYDUS_LAB_RECORD"):
        # tests/run cleans up by this list when a test was killed before it could
        with open(record, "a") as file:
            file.write(f"{path}\n")
    return path


def wait_until(
    ready: Callable[[], bool],
    timeout: float,
    what: str,
    alive: Callable[[], bool] = lambda: True,
    longest_pause: float = 0.1,
) -> float:
    """Seconds until `ready()` was true; LabError after `timeout` seconds or as soon as `alive()` is false.

    Asked again after 5 ms, then ever more rarely: what is measured wants a short `longest_pause`.
    """
    begin = time.monotonic()
    pause = 0.005
    while True:
        if ready():
            return time.monotonic() - begin
        if not alive():
            raise LabError(f"{what} ended while it was waited for")
        if time.monotonic() - begin > timeout:
            raise LabError(f"{what} was not ready after {timeout:.0f} s")
        time.sleep(pause)
        pause = min(pause * 1.5, longest_pause)


def can_connect(address: str | Path | tuple[str, int]) -> bool:
    """Does anybody accept on this unix socket path or (host, port)? A socket *file* proves nothing."""
    family = socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX
    with socket.socket(family) as sock:
        sock.settimeout(2)
        try:
            sock.connect(address if isinstance(address, tuple) else str(address))
        except OSError:
            return False
        return True


def matching(folder: Path, pattern: str) -> list[Path]:
    """As `folder.glob(pattern)`, which fails where somebody removes a directory while it looks."""
    return [folder / name for name in glob.glob(pattern, root_dir=folder)]


class Child:
    """One background program in its own session, its output in a log file."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str | Path],
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.name, self.argv, self.log = name, [str(arg) for arg in argv], log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env=dict(env) if env is not None else None,
                cwd=cwd,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def alive(self) -> bool:
        return self.process.poll() is None

    def wait_ready(self, ready: Callable[[], bool], timeout: float = 60.0, longest_pause: float = 0.1) -> float:
        try:
            return wait_until(ready, timeout, self.name, self.alive, longest_pause)
        except LabError as error:
            raise LabError(f"{error}; the end of {self.log}:\n{tail(self.log)}") from None

    def stop(self, timeout: float = 10.0, sig: int = signal.SIGTERM) -> int:
        """Ends the program; SIGKILL when it ignores `sig` for `timeout` seconds. Its return code."""
        if self.alive():
            self.process.send_signal(sig)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(10)

    def kill(self) -> int:
        return self.stop(sig=signal.SIGKILL)


def tail(path: Path, size: int = 3000) -> str:
    try:
        return path.read_bytes()[-size:].decode(errors="replace")
    except OSError as error:
        return f"({error})"


def run(
    argv: Sequence[str | Path],
    *,
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
    check: bool = True,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """A command with its output captured; LabError with that output when it fails."""
    words = [str(arg) for arg in argv]
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            cwd=cwd,
            env=dict(env) if env is not None else None,
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(
            f"{' '.join(words)}: no end after {timeout:.0f} s; it said {error.stdout!r} {error.stderr!r}"
        ) from None
    if check and done.returncode:
        raise LabError(f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def parent_of(pid: int) -> int:
    """0 when the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def signal_all(pids: Iterable[int], number: int) -> None:
    """To those that are there still: of a nydusd some do one thing and end."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_together(pids: Sequence[int]) -> None:
    """SIGKILL to all at one moment: none of them sees another one die. Returns when they are dead."""
    lives = []
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
                lives.append(Life(pid))
    assert all(life.ended(20) for life in lives), pids


def processes_mentioning(text: str) -> list[int]:
    """Pids whose command line holds `text` (our work directory), except this process and its ancestors."""
    own = set()
    pid = os.getpid()
    while pid > 1:
        own.add(pid)
        pid = parent_of(pid)
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) in own:
            continue
        try:
            line = Path(f"/proc/{entry}/cmdline").read_bytes()
        except OSError:
            continue
        if text.encode() in line:
            found.append(int(entry))
    return sorted(found)


def end_processes(pids: Iterable[int], timeout: float = 5.0) -> None:
    """SIGTERM, then after `timeout` seconds SIGKILL, to processes that need not be our children."""
    end(pids, timeout)


def mounts_below(path: Path) -> list[str]:
    """Mount points at or below `path`, deepest first, as they stand in /proc/mounts."""
    prefix = str(path)
    points = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        point = line.split()[1].replace("\\040", " ").replace("\\134", "\\")
        if point == prefix or point.startswith(prefix + "/"):
            points.append(point)
    return sorted(points, key=len, reverse=True)


def unmount_below(path: Path) -> list[str]:
    """Lazily unmounts everything at or below `path`; what had been mounted."""
    points = mounts_below(path)
    for point in points:
        subprocess.run(["umount", "-l", point], capture_output=True, timeout=20, check=False)
    return points


def remove_tree(path: Path) -> None:
    """Deletes `path` unless something is still mounted below it: deleting through a live mount would lose data."""
    if mounts_below(path):
        raise LabError(f"{path}: still mounted: {', '.join(mounts_below(path))}")
    shutil.rmtree(path, ignore_errors=True)


def drop_caches() -> None:
    """Empties the kernel's page cache; without the right to do so nothing happens."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        pass
