"""Fuzz the parsers: python -m tests.fuzz.run [--seconds N] [--jobs N] [--target NAME...] [--seed N]

Inputs are made by (target, number), so any of them can be made again. Each is run in a child process that allows it
2 seconds of processor time and 256 MiB beyond what the process had; nothing but a domain error may come out. A finding
is written to tests/fuzz/regressions/<target>/, which the test suite runs for ever after.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

from tests.fuzz.targets import TARGETS, Target

REGRESSIONS = Path(__file__).parent / "regressions"
SECONDS = 2.0
MEMORY = 256 << 20
BATCH = 200


class TooSlow(BaseException):
    pass


def _alarm(*_: object) -> None:
    raise TooSlow


def run_one(target: Target, data: bytes) -> str:
    """What is wrong with how the target takes this input, "" for nothing. In a process prepared by `prepare`."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        target.run(data)
    except target.allowed:
        return ""
    except TooSlow:
        return f"more than {SECONDS} s\n" + traceback.format_exc()
    except MemoryError:
        return f"more than {MEMORY >> 20} MiB\n" + traceback.format_exc()
    except BaseException as error:
        return f"{type(error).__name__}\n" + traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return ""


def prepare() -> None:
    """Bounds for this process, from what it has now."""
    signal.signal(signal.SIGPROF, _alarm)
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + MEMORY + (64 << 20)  # thread stacks are address space too
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def keep(target: Target, data: bytes, why: str) -> Path:
    folder = REGRESSIONS / target.name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hashlib.sha256(data).hexdigest()[:16]
    path.write_bytes(data)
    print(f"{target.name} {path.name}: {why}", flush=True)
    return path


def _batch(target: Target, first: int) -> None:
    """In a child."""
    import logging

    logging.disable(logging.CRITICAL)
    prepare()
    for number in range(first, first + BATCH):
        os.pwrite(PROGRESS, b"%020d" % number, 0)
        data = target.make(random.Random(f"{target.name} {number}"))
        if why := run_one(target, data):
            keep(target, data, why)


PROGRESS = os.memfd_create("progress")


def _job(names: list[str], until: float, seed: int) -> None:
    rng = random.Random(seed)
    weights = [TARGETS[name].weight for name in names]
    while time.monotonic() < until:
        target = TARGETS[rng.choices(names, weights)[0]]
        first = rng.randrange(1 << 60)
        pid = os.fork()
        if pid == 0:
            try:
                _batch(target, first)
            finally:
                sys.stdout.flush()
                os._exit(0)
        deadline = time.monotonic() + BATCH * SECONDS
        status: int | None = None
        while status is None:
            done, found = os.waitpid(pid, os.WNOHANG)
            if done:
                status = found
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
            else:
                time.sleep(0.01)
        COUNT[0] += BATCH
        if status:
            number = int(os.pread(PROGRESS, 20, 0))
            data = target.make(random.Random(f"{target.name} {number}"))
            keep(target, data, f"the process died, status {status}")


COUNT = [0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--target", action="append", choices=sorted(TARGETS))
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    names = options.target or sorted(TARGETS)
    until = time.monotonic() + options.seconds
    for name in names:  # seeds are made once, before the forks
        TARGETS[name].make(random.Random(0))
    children = []
    for number in range(options.jobs - 1):
        pid = os.fork()
        if pid == 0:
            globals()["PROGRESS"] = os.memfd_create("progress")
            _job(names, until, options.seed + number + 1)
            os._exit(0)
        children.append(pid)
    _job(names, until, options.seed)
    for pid in children:
        os.waitpid(pid, 0)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = used.ru_utime + used.ru_stime
    print(f"{COUNT[0]} inputs in the first job, {seconds:.0f} s of processor time, seed {options.seed}")


if __name__ == "__main__":
    main()
