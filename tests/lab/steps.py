"""The snapshotter, dying at a chosen step: `python -m tests.lab.steps CONTROL ARGUMENTS...`.

A step is a change somebody else could see: a call to the file system, a process started or signalled, a request to
nydusd, a mount, and every write of SQLite to its files, those inside of a COMMIT too. SIGKILL comes right before the
step numbered in the control file (`Control`), or in the middle of it where it is a write of SQLite's.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sqlite3
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SIZE = 4096
_HEAD = struct.Struct("=qqq")  # step to die at, 0: none; steps seen; 1: die in the middle of it
_SEEN = struct.Struct("=q")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_EVENTS = {
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.chown", "os.link", "os.symlink", "os.truncate",
    "os.utime", "os.kill", "os.posix_spawn", "os.setxattr", "subprocess.Popen", "socket.connect", "socket.bind",
}  # fmt: skip


class Control:
    """A page shared by the test and the program."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(_SIZE))
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), _SIZE)

    def arm(self, step: int, *, torn: bool = False) -> None:
        """Counting starts anew."""
        self._page[:] = bytes(_SIZE)
        _HEAD.pack_into(self._page, 0, step, 0, int(torn))

    def disarm(self) -> int:
        """Steps seen since `arm`."""
        seen = int(_HEAD.unpack_from(self._page)[1])
        self.arm(0)
        return seen

    def last(self) -> str:
        """The step the program died at."""
        return self._page[_HEAD.size : 512].rstrip(b"\0").decode(errors="replace")

    def step(self, what: str, tear: Callable[[], object] | None = None) -> None:
        if not _HEAD.unpack_from(self._page)[0]:
            return
        with _lock:
            wanted, seen, torn = _HEAD.unpack_from(self._page)
            seen += 1
            _SEEN.pack_into(self._page, _SEEN.size, seen)  # that alone: it may have been disarmed by now
            if seen != wanted:
                return
            text = f"{seen} {what}".encode()[: 512 - _HEAD.size]
            self._page[_HEAD.size : _HEAD.size + len(text)] = text
            if torn and tear is not None:
                tear()
            os.kill(os.getpid(), signal.SIGKILL)
            threading.Event().wait()


_lock = threading.RLock()


def watch_python(control: Control) -> None:
    dying = os.kill

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS:
            if event == "os.kill" and arguments == (os.getpid(), signal.SIGKILL):
                return
            control.step(f"{event} {arguments[:2]!r}")
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES:
            control.step(f"open {arguments[0]!r}")

    sys.addaudithook(audit)
    for name in ("write", "fsync", "fdatasync"):
        real = getattr(os, name)

        def wrapped(*arguments: Any, _real: Any = real, _name: str = name) -> Any:
            control.step(f"os.{_name}")
            return _real(*arguments)

        setattr(os, name, wrapped)
    from snapshotter import daemons, system

    for module, name in ((system, "mount"), (system, "detach"), (daemons, "detach")):
        real = getattr(module, name)

        def called(*arguments: Any, _real: Any = real, _name: str = name) -> Any:
            control.step(f"{_name} {arguments[:3]!r}")
            return _real(*arguments)

        setattr(module, name, called)
    assert os.kill is dying


class _Vfs(ctypes.Structure):
    """sqlite3_vfs, version 3."""

    _fields_ = (
        ("version", ctypes.c_int),
        ("file_size", ctypes.c_int),
        ("path_size", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in (
            "open", "delete", "access", "full", "dlopen", "dlerror", "dlsym", "dlclose", "random", "sleep", "time",
            "error", "time64", "set_call", "get_call", "next_call",
        )),
    )  # fmt: skip


_hooks: list[Any] = []  # SQLite keeps the addresses


def watch_sqlite(control: Control) -> None:
    """SQLite's own system calls, by the door it has for that. Raises OSError where Python brings its own copy."""
    sqlite3.connect(":memory:").close()
    with open("/proc/self/maps") as maps:
        path = next((line.split()[-1] for line in maps if "libsqlite3" in line), "")
    if not path:
        raise OSError("Python's sqlite3 has no shared library: its steps cannot be seen")
    find = ctypes.CDLL(path).sqlite3_vfs_find
    find.restype = ctypes.POINTER(_Vfs)
    vfs = find(b"unix")
    set_call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(vfs.contents.set_call)
    libc = ctypes.CDLL(None, use_errno=True)
    size, long, number, pointer = ctypes.c_size_t, ctypes.c_long, ctypes.c_int, ctypes.c_void_p
    for name, result, parameters in (
        ("pwrite64", long, (number, pointer, size, long)),
        ("pwrite", long, (number, pointer, size, long)),
        ("write", long, (number, pointer, size)),
        ("ftruncate", number, (number, long)),
        ("unlink", number, (ctypes.c_char_p,)),
    ):
        real = getattr(libc, name)
        real.restype, real.argtypes = result, parameters

        def call(*arguments: Any, _real: Any = real, _name: str = name) -> int:
            def tear() -> None:
                if "write" in _name:
                    _real(arguments[0], arguments[1], arguments[2] // 2, *arguments[3:])

            control.step(f"sqlite {_name} {arguments[2:]!r}", tear)
            return int(_real(*arguments))

        hook = ctypes.CFUNCTYPE(result, *parameters)(call)
        _hooks.append(hook)
        set_call(ctypes.cast(vfs, pointer), name.encode(), ctypes.cast(hook, pointer))


def main() -> None:
    control = Control(Path(sys.argv[1]))
    watch_sqlite(control)
    watch_python(control)
    from snapshotter.cli import main as run

    run(sys.argv[2:])


if __name__ == "__main__":
    main()
