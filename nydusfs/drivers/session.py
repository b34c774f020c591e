"""pyfuse3's session loop, kept from ever waiting inside read(2) on /dev/fuse.

pyfuse3 waits until the device is readable and then reads it, on a blocking descriptor and with the GIL held. A request
can vanish in between: its process was killed, or an interrupt was answered. The read then waits for the next request
and takes the whole daemon along - API, downloads, time-outs, every image - although others may wait for answers that
are ready to be sent. So the descriptor is made non-blocking, and the EAGAIN that takes the place of that wait is not
an error.
"""

from __future__ import annotations

import os
from typing import Any

import pyfuse3
import trio

_READERS = "_session_loop"  # of pyfuse3's module: looked up by name whenever it starts one more reader
_original: Any = getattr(pyfuse3, _READERS)


def devices() -> set[int]:
    """This process's descriptors of /dev/fuse; pyfuse3 keeps its own to itself."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                found.add(int(name))
        except OSError:
            pass  # the descriptor of the listing itself
    return found


async def _reader(nursery: trio.Nursery, min_tasks: int, max_tasks: int) -> None:
    while True:
        try:
            await _original(nursery, min_tasks, max_tasks)
            return
        except BlockingIOError:
            # Its count of readers still holds this one, as it counts only those that end by returning. What is lost is
            # the reader's buffer, of which a page or two were ever touched.
            await trio.lowlevel.checkpoint()


def never_block(descriptors: set[int]) -> None:
    """For the session that `pyfuse3.init` just made, before `pyfuse3.main`."""
    for descriptor in descriptors:
        os.set_blocking(descriptor, False)
    setattr(pyfuse3, _READERS, _reader)
