"""A container stands still for the length of a block, and runs again whatever happens.

Errors and signals are what `finally` is for. For a SIGKILL, or the end of this program by lack of memory, a guard
process waits on a pipe that closes with this program, and then resumes the container.
"""

from __future__ import annotations

import logging
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nydusfs.containerd.connection import ContainerdError

if TYPE_CHECKING:
    from nydusfs.containerd.containers import Containers

log = logging.getLogger(__name__)

_GUARD_START = 30.0  # seconds; it imports grpc, on a busy machine
_RESUME_TRIES = 10
_RESUME_PAUSE = 3.0
_DONE = b"resumed\n"


@contextmanager
def paused(containers: Containers, container: str) -> Iterator[None]:
    """For a running container. Raises ContainerdError if it cannot be paused, or not be resumed."""
    guard = _start_guard(containers, container)
    try:
        try:
            containers.pause(container)
            yield
        finally:
            _resume(containers, container)
            _tell(guard)
    finally:
        assert guard.stdin is not None and guard.stdout is not None
        guard.stdin.close()
        guard.stdout.close()
        try:
            guard.wait(_RESUME_TRIES * _RESUME_PAUSE)
        except subprocess.TimeoutExpired:
            guard.kill()
            guard.wait()


def _resume(containers: Containers, container: str) -> None:
    """Also after a Pause that failed: it may have done its work all the same."""
    for attempt in range(1, _RESUME_TRIES + 1):
        try:
            if not containers.task(container).paused:
                return
            containers.resume(container)
            return
        except ContainerdError as error:
            if attempt == _RESUME_TRIES:
                raise ContainerdError(
                    f"{error}; it is still paused: `ctr -n {containers.namespace} tasks resume {container}`"
                ) from None
            time.sleep(_RESUME_PAUSE)


def _start_guard(containers: Containers, container: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "nydusfs.containerd.pausing"]
    guard = subprocess.Popen(
        [*command, containers.address, containers.namespace, container],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for us
    )
    assert guard.stdout is not None
    ready, _, _ = select.select([guard.stdout], [], [], _GUARD_START)
    if not ready or guard.stdout.readline() != _DONE:
        guard.kill()
        guard.wait()
        raise ContainerdError(f"the guard of container {container} does not start: nothing was paused")
    return guard


def _tell(guard: subprocess.Popen[bytes]) -> None:
    assert guard.stdin is not None
    try:
        guard.stdin.write(_DONE)
        guard.stdin.flush()
    except BrokenPipeError:
        log.debug("the guard of the pause ended before it")


def _guard(address: str, namespace: str, container: str) -> int:
    """Says that it is there, then waits for the end of its input: without the word before it, the container is
    resumed."""
    from nydusfs.containerd.containers import Containers

    with Containers(address, namespace, "nydusify-guard") as containers:
        sys.stdout.buffer.write(_DONE)
        sys.stdout.flush()
        if sys.stdin.buffer.readline() != _DONE:
            _resume(containers, container)
    return 0


if __name__ == "__main__":
    raise SystemExit(_guard(*sys.argv[1:]))
