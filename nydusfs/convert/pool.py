"""Layers in parallel processes: conversion is CPU-bound Python around C codecs, so threads alone would not scale."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

from nydusfs.convert.layers import ConvertedLayer, LayerJob, convert_layer, run_job, start_worker
from nydusfs.errors import ConvertError, NydusError

# Below this many compressed bytes the start of worker processes (0.6 s of CPU each) costs more than it wins.
_SMALL = 4 << 20


def cpu_count() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def convert_layers(
    jobs: Sequence[LayerJob], workers: int, report: Callable[[LayerJob, int], None]
) -> Generator[tuple[LayerJob, ConvertedLayer], None, None]:
    """Yields layers as they get ready, the largest started first. Raises the first NydusError; closing the
    generator early ends the worker processes."""
    if not jobs:
        return
    workers = max(1, min(workers, len(jobs)))
    if sum(job.source.size for job in jobs) < _SMALL:
        workers = 1
    threads = max(1, cpu_count() // workers)
    ordered = [replace(job, threads=threads) for job in sorted(jobs, key=lambda job: -job.source.size)]
    if workers == 1:
        for job in ordered:
            yield job, convert_layer(job, lambda count, job=job: report(job, count))  # type: ignore[misc]
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
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(queue, level))
    finished = False
    try:
        futures = {executor.submit(run_job, job): job for job in ordered}
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
