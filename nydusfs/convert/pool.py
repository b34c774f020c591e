"""Work on layers in parallel processes: the pool of the builder (`bootstrap.parallel`), the errors of this package."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

from bootstrap import parallel
from bootstrap.parallel import Job, cpu_count
from nydusfs.errors import ConvertError, NydusError

__all__ = ["Job", "cpu_count", "run_jobs"]

_PRELOAD = (*parallel.PRELOAD, "nydusfs.convert.layers", "nydusfs.registry.client")

J = TypeVar("J", bound="Job[Any]")


def run_jobs(jobs: Sequence[J], workers: int, report: Callable[[J, int], None]) -> Generator[tuple[J, Any], None, None]:
    """Yields jobs with their results as they get ready, the largest started first. Raises the first NydusError; closing
    the generator early ends the worker processes. Registry credentials are no part of a job: a worker reads docker's
    configuration itself."""
    try:
        yield from parallel.run_jobs(jobs, workers, report, domain=NydusError, failed=ConvertError, preload=_PRELOAD)
    except parallel.WorkerDied as error:
        raise ConvertError(f"conversion: {error}") from error
