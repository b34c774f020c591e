"""Being first in line for a processor while readers wait for the next worker: the kernel's real-time class.

On a node whose cores are busy, with programs that read from the dead worker's mounts above all, each of the some 60 ms
of work until the first answer takes four to five times as long otherwise, and the kernel's fair shares among sessions
and control groups make a nice value worth nothing. Keeper and zygote have it all the time: they do nothing but that. A
worker gives it back when those who waited are answered, or after a second. Where it cannot be had (CAP_SYS_NICE, a
group of cgroup v1 without real-time budget) everything goes on as ever.
"""

from __future__ import annotations

import os

PRIORITY = 1  # the least: before all that is ordinary, behind all else of the kind


def hurry(*, children: bool) -> None:
    """This thread, and those that it starts; `children`: forked processes too."""
    # The kernel knows one flag for both. Who has no threads and whose children are of another sort takes it.
    policy = os.SCHED_RR if children else os.SCHED_RR | os.SCHED_RESET_ON_FORK
    try:
        os.sched_setscheduler(0, policy, os.sched_param(PRIORITY))
    except OSError:
        pass


def take_time() -> None:
    """All threads of this process are like any other's again."""
    hurried = True
    while hurried:  # one that is hurried may have started another meanwhile
        hurried = False
        for thread in map(int, os.listdir("/proc/self/task")):
            try:
                if os.sched_getscheduler(thread) != os.SCHED_OTHER:
                    os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
                    hurried = True
            except ProcessLookupError:
                pass  # it ended
            except OSError:
                return
