"""A crowd of calls is kept on one processor.

The interpreter runs one thread at a time. Where its lock goes from core to core with each system call, the cores spend
more on waking each other than on the calls: 64 clients on two cores had 1,600 Commit a second answered with the threads
anywhere and 3,600 with them on one core, 1,900 and 4,600 Remove, 830 and 940 Prepare (medians). What works outside of
the interpreter for long is no part of a crowd: see `apart`.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterable

MANY = 8  # calls at once
LASTS = 0.5  # seconds behind the last time that there were so many: a shared commit answers all of a crowd at once

_anywhere = os.sched_getaffinity(0)  # as this program was started
_inside: set[int] = set()  # threads with a call
_mine = threading.local()
_core = -1  # that of the crowd; -1: there is none
_seen = 0.0  # when there were many
_servers: list[int] = []  # threads that hand out the calls


def enter() -> None:
    """This thread begins to answer a call."""
    global _seen
    _inside.add(threading.get_ident())
    if len(_inside) >= MANY:
        _seen = time.monotonic()
        if _core < 0 and len(_anywhere) > 1:
            _gather(_current())
    elif _core >= 0 and time.monotonic() - _seen > LASTS:
        _gather(-1)
    if getattr(_mine, "core", None) != _core:  # a thread begins where the one is that made it
        _move(_core)


def handed_out_by(threads: Iterable[threading.Thread]) -> None:
    """Calls come from these."""
    _servers[:] = [thread.native_id for thread in threads if thread.native_id is not None]


def leave() -> None:
    _inside.discard(threading.get_ident())


def apart() -> None:
    """What this thread does now takes long, or starts a program, which would stay where its thread is."""
    leave()
    _move(-1)


def _gather(core: int) -> None:
    global _core
    _core = core
    for thread in _servers:
        _put(thread, core)


def _move(core: int) -> None:
    _put(0, core)
    _mine.core = core


def _put(thread: int, core: int) -> None:
    try:
        os.sched_setaffinity(thread, {core} if core >= 0 else _anywhere)
    except OSError:
        pass  # the core went away, and the kernel has moved its threads itself; or the thread did


def _current() -> int:
    core = ctypes.CDLL(None).sched_getcpu()
    return core if core in _anywhere else -1
