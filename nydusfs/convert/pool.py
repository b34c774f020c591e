"""Work on layers in parallel processes: it is CPU-bound Python around C codecs, so threads alone would not scale."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from nydusfs.errors import ConvertError, NydusError

# Below this many compressed bytes the start of worker processes (0.6 s of CPU each) costs more than it wins.
_SMALL = 4 << 20
_PR_SET_PDEATHSIG = 1

R = TypeVar("R", covariant=True)


class Job(Protocol[R]):
    """A frozen dataclass of plain data, to be pickled: secrets are no part of it, a worker reads docker's configuration
    itself. `size`: bytes of input; `threads`: what it may use."""

    @property
    def number(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def threads(self) -> int: ...

    def run(self, report: Callable[[int], None]) -> R:
        """`report` gets numbers of input bytes done. Raises NydusError."""
        ...


J = TypeVar("J", bound="Job[Any]")


def cpu_count() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def run_jobs(jobs: Sequence[J], workers: int, report: Callable[[J, int], None]) -> Generator[tuple[J, Any], None, None]:
    """Yields jobs with their results as they get ready, the largest started first. Raises the first NydusError; closing
    the generator early ends the worker processes."""
    if not jobs:
        return
    total = sum(job.size for job in jobs)
    workers = 1 if total < _SMALL else max(1, min(workers, len(jobs)))
    cpus = cpu_count()

    def threads(job: J) -> int:
        """A job that will be at it when the others have ended uses the idle CPUs."""
        return max(1, cpus // workers) if job.size * workers <= total else cpus

    ordered: list[J] = [
        replace(job, threads=threads(job))  # type: ignore[type-var]
        for job in sorted(jobs, key=lambda job: -job.size)
    ]
    if workers == 1:
        for job in ordered:
            yield job, job.run(lambda count, job=job: report(job, count))  # type: ignore[misc]
        return
    # spawn: this process has threads (connections, progress), and forking those can deadlock
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    by_number = {job.number: job for job in ordered}

    def listen() -> None:
        with contextlib.suppress(EOFError, OSError):
            while (message := queue.get()) is not None:
                number, count = message
                report(by_number[number], count)

    listener = threading.Thread(target=listen, name="progress", daemon=True)
    listener.start()
    before = set(multiprocessing.active_children())
    level = logging.getLogger().getEffectiveLevel()
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(queue, level))
    finished = False
    try:
        futures = {executor.submit(_run, job): job for job in ordered}
        for future in as_completed(futures):
            result = future.result()
            if isinstance(result, NydusError):
                raise result
            yield futures[future], result
        finished = True
    except BrokenProcessPool as error:
        raise ConvertError("a conversion process was killed (out of memory?)") from error
    finally:
        if not finished:
            for child in set(multiprocessing.active_children()) - before:
                child.terminate()
        executor.shutdown(wait=True, cancel_futures=True)
        queue.put(None)
        listener.join(timeout=5)
        queue.close()


# -- in worker processes

_queue: Any = None


def _start_worker(queue: Any, level: int) -> None:
    """Initializer of a worker: it dies with its parent and leaves Ctrl-C to it."""
    global _queue
    _queue = queue
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=level, format="%(levelname)s %(message)s")
    for noisy in ("httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _run(job: Job[R]) -> R | NydusError:
    """Domain errors come back as values: exceptions with own constructors do not unpickle."""
    try:
        return job.run(lambda count: _queue.put((job.number, count)))
    except NydusError as error:
        return ConvertError(str(error))
