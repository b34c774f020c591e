"""Small questions to the kernel: mounts, processes."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import tempfile
from pathlib import Path

MNT_DETACH = 2
_OCTAL = re.compile(r"\\([0-7]{3})")
TRIAL = "overlay-check-"
_libc = ctypes.CDLL(None, use_errno=True)


def mountpoints() -> list[str]:
    """Mount points of this mount namespace, in order of mounting. No look at the mounts: never hangs on a dead one."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return [_OCTAL.sub(lambda match: chr(int(match[1], 8)), line.split(" ", 5)[4]) for line in file]


def detach(path: str) -> bool:
    """Lazily unmounts everything mounted on this very path, dead mounts too. True if there was something.

    Raises OSError.
    """
    found = False
    while path in mountpoints():
        if _libc.umount2(os.fsencode(path), MNT_DETACH) != 0:
            number = ctypes.get_errno()
            if number in (errno.EINVAL, errno.ENOENT):
                break
            raise OSError(number, os.strerror(number), path)
        found = True
    return found


def start_time(pid: int) -> int:
    """Start time of a process (clock ticks since boot, field 22 of its stat), 0 if there is none or it is a zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] in ("Z", "X") else int(fields[19])


def cpu_seconds(pid: int) -> float:
    """User and system time a process has used, 0 if there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def proportional_kb(pid: int) -> int:
    """Resident memory with shared pages divided among those who share them, 0 if there is no such process."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii", errors="replace") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("Pss:")), 0)
    except OSError:
        return 0


def mount(kind: str, source: str, target: str, flags: int, data: str) -> None:
    """mount(2). Raises OSError."""
    arguments = (os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), os.fsencode(data))
    if _libc.mount(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


def in_user_namespace() -> bool:
    """Whether this process is root of a user namespace other than the machine's."""
    try:
        with open("/proc/self/uid_map", encoding="ascii") as file:
            return file.read().split() != ["0", "0", "4294967295"]
    except OSError:
        return False  # a kernel without them


def overlay_works(directory: Path, more: str = "", lower: str = "") -> bool:
    """Whether an overlay with its upper directory here can be mounted; tried, as the module may load on demand.

    `more`: options besides the directories. `lower`: its lower directory, else an empty one. Takes away what a trial
    that was killed left.
    """
    for name in os.listdir(directory):
        if name.startswith(TRIAL):
            detach(f"{directory}/{name}/merged")
            shutil.rmtree(f"{directory}/{name}", ignore_errors=True)
    scratch = tempfile.mkdtemp(prefix=TRIAL, dir=directory)
    try:
        for name in ("lower", "upper", "work", "merged"):
            os.mkdir(f"{scratch}/{name}")
        try:
            options = f"lowerdir={lower or f'{scratch}/lower'},upperdir={scratch}/upper,workdir={scratch}/work"
            options += f",{more}" if more else ""
            mount("overlay", "overlay", f"{scratch}/merged", 0, options)
        except OSError:
            return False
        return detach(f"{scratch}/merged")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
