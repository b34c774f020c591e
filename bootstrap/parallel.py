"""Jobs in worker processes: building layers is Python around C codecs, so threads alone would not fill two cores.

Workers are forked from a server process that has imported the builder once (0.15 s of processor time that each worker
would need, and its pages are shared); a process with threads of its own must not fork itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import os
import select
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any, Protocol, TypeVar

SMALL = 4 << 20
"""Below this many bytes of input in all, starting workers costs more than it wins."""

PRELOAD = ("bootstrap.build", "bootstrap.decompress")

_PR_SET_PDEATHSIG = 1

R = TypeVar("R", covariant=True)


class Job(Protocol[R]):
    """A frozen dataclass of plain data: it is pickled. `size`: bytes of input; `threads`: how many it may use."""

    @property
    def number(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def threads(self) -> int: ...

    def run(self, report: Callable[[int], None]) -> R:
        """`report` takes numbers of input bytes done."""


J = TypeVar("J", bound="Job[Any]")


class WorkerDied(Exception):
    """A worker process ended without an answer: killed, most likely for want of memory."""


def cpu_count() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def plan(jobs: Sequence[J], workers: int) -> tuple[list[J], int]:
    """The jobs in the order to start them, with their threads, and how many workers are worth it.

    The largest first. A job that is larger than its share of the whole will be at it when the others have ended: it
    gets as many threads as there are CPUs.
    """
    total = sum(job.size for job in jobs)
    cpus = cpu_count()
    workers = 1 if total < SMALL else max(1, min(workers, len(jobs)))
    share = max(1, cpus // workers)
    ordered = sorted(jobs, key=lambda job: -job.size)
    threads = [share if job.size * workers <= total else max(share, cpus) for job in ordered]
    return [replace(job, threads=count) for job, count in zip(ordered, threads, strict=True)], workers  # type: ignore[type-var]


def run_jobs(
    jobs: Sequence[J],
    workers: int,
    report: Callable[[J, int], None],
    *,
    domain: type[Exception],
    failed: Callable[[str], Exception],
    preload: Sequence[str] = PRELOAD,
) -> Generator[tuple[J, Any], None, None]:
    """Yields jobs with their results as they get ready. Closing the generator early ends the workers.

    `domain`: what jobs raise on purpose; the first such error ends all, as what `failed` makes of its text (exceptions
    with constructors of their own do not cross process borders). Raises WorkerDied. With one worker everything runs in
    this process.
    """
    if not jobs:
        return
    ordered, workers = plan(jobs, workers)
    if workers == 1:
        for job in ordered:
            yield job, job.run(lambda count, job=job: report(job, count))  # type: ignore[misc]
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    queue = context.SimpleQueue()
    by_number = {job.number: job for job in ordered}

    def listen() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                number, count = queue.get()
                report(by_number[number], count)

    listener = threading.Thread(target=listen, name="progress", daemon=True)
    listener.start()
    before = set(multiprocessing.active_children())
    level = logging.getLogger().getEffectiveLevel()
    arguments = (queue, level, domain, os.getpid())
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=arguments)
    finished = False
    try:
        futures = {executor.submit(_run, job): job for job in ordered}
        for future in as_completed(futures):
            result = future.result()
            if isinstance(result, _Failure):
                raise failed(result.text)
            yield futures[future], result
        finished = True
    except BrokenProcessPool as error:
        raise WorkerDied("a worker process was killed (out of memory?)") from error
    finally:
        if not finished:
            for child in set(multiprocessing.active_children()) - before:
                child.terminate()
            # One may have died in the middle of its result, which the executor then reads for ever: this process holds
            # the pipe's other end too. Without it that is an end of file.
            _close_writer(executor._result_queue)
        executor.shutdown(wait=True, cancel_futures=True)
        _close_writer(queue)  # ends the listener; to put something there could wait for a lock that a dead worker holds
        listener.join(timeout=5)
        queue.close()


def _close_writer(queue: Any) -> None:
    queue._writer.close()


# -- in worker processes

_queue: Any = None
_domain: type[Exception] = Exception


class _Failure:
    """An error of a job, in words."""

    def __init__(self, text: str) -> None:
        self.text = text


def _start_worker(queue: Any, level: int, domain: type[Exception], client: int) -> None:
    """Initializer of a worker: it dies with its client (the process that gave it work) and with the fork server, and
    leaves Ctrl-C to the client."""
    global _queue, _domain
    _queue, _domain = queue, domain
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    _end_with(client)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=level, format="%(levelname)s %(message)s")
    for noisy in ("httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _end_with(client: int) -> None:
    """A killed client closes no pipe that a worker waits for: workers hold the other ends too."""
    try:
        process = os.pidfd_open(client)
    except ProcessLookupError:
        os._exit(1)

    def wait() -> None:
        select.select([process], [], [])
        os._exit(1)

    threading.Thread(target=wait, name="client", daemon=True).start()


def _run(job: Job[R]) -> R | _Failure:
    try:
        return job.run(lambda count: _queue.put((job.number, count)))
    except _domain as error:
        return _Failure(str(error))
