"""Calls on paths that this process serves itself.

Who waits for a FUSE request that was taken waits until it is answered or the connection aborted: not even SIGKILL ends
that (Linux 6.18), and the connection is aborted when nobody has its device open any more. A thread that asks its own
process for a path and is killed with it keeps the device open, by the table of descriptors that threads share, and so
waits for ever, and with it whoever looks at the mount. Seen once, in a thousand deaths of all processes, under
move_mount(2). So such a call is made by a thread with a table of its own, where no device of FUSE is.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

from nydusfs.drivers.mountapi import call

SYS_close_range = 436
CLOSE_RANGE_UNSHARE = 2
_LAST = 0xFFFFFFFF

_T = TypeVar("_T")


def apart(what: Callable[[], _T], keep: int) -> _T:
    """The result of `what`, which has no descriptor but `keep` of those that are open now, and leaves none. Raises what
    it raises, OSError besides."""
    results: list[_T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            _close(keep + 1, _LAST, CLOSE_RANGE_UNSHARE)
            if keep > 0:
                _close(0, keep - 1, 0)
            results.append(what())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="apart", daemon=True)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def _close(first: int, last: int, flags: int) -> None:
    numbers = ctypes.c_uint(first), ctypes.c_uint(last), ctypes.c_uint(flags)
    call("close_range", SYS_close_range, *numbers)
