"""nydusd as a process: whose socket it is, what it is called with, what it said last, which version is installed."""

from __future__ import annotations

import logging
import os
import re
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from snapshotter.system import start_time

log = logging.getLogger(__name__)

VERSION_SECONDS = 10.0
KILL_SECONDS = 2.0


@cache
def installed_version(program: str) -> tuple[str, str] | None:
    """(version, commit) that `nydusd --version` tells; None if it does not. Once: this program is of the same age."""
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=VERSION_SECONDS, cwd="/", check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.debug("%s: %s", program, error)
        return None
    version, commit = (re.search(rf"{name}:\s*(\S+)", done.stdout) for name in ("Version", "Git Commit"))
    return (version[1], commit[1]) if version and commit else None


class Life:
    """Whether one process has ended, whoever is its parent, whoever has its pid next. Raises OSError: it has."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._descriptor = os.pidfd_open(pid)

    def ended(self, wait: float | None = 0.0) -> bool:
        """`wait`: seconds for it to end, None: as long as it takes."""
        poll = select.poll()  # each caller's own: two threads cannot share one
        poll.register(self._descriptor, select.POLLIN)
        return bool(poll.poll(None if wait is None else wait * 1000))

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def peer_pid(path: Path) -> int:
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


def end(pids: Iterable[int], seconds: float, first: signal.Signals = signal.SIGTERM) -> set[int]:
    """The signal, then after `seconds` SIGKILL, to processes that need not be our children. Those that live on."""
    left = set(pids)
    for number, patience in ((first, seconds), (signal.SIGKILL, KILL_SECONDS)):
        for pid in left:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass
        deadline = time.monotonic() + patience
        while (left := {pid for pid in left if start_time(pid)}) and time.monotonic() < deadline:
            time.sleep(0.01)
        if not left:
            break
    return left


def last_line(path: Path, start: int) -> str:
    """Of what was printed behind `start` bytes."""
    try:
        with path.open("rb") as file:
            file.seek(max(start, path.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1].strip() if lines else "it printed nothing"
