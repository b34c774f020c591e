"""A container stands still for the length of a block, and runs again whatever happens.

Errors and signals are what `finally` is for. For a SIGKILL, or the end of this program by lack of memory, a guard
process waits on a pipe that closes with this program, and then resumes the container. The guard also pauses it: who is
ended in the middle of that call takes it back, and containerd's shim then has a container that is frozen, is shown as
paused and is refused to be resumed, since for the shim it still runs.
"""

from __future__ import annotations

import logging
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from nydusfs.containerd.connection import CALL_TIMEOUT, ContainerdError

if TYPE_CHECKING:
    from nydusfs.containerd.containers import Containers

log = logging.getLogger(__name__)

_COMMAND = [sys.executable, "-P", "-m", "nydusfs.containerd.pausing"]
_GUARD_START = 30.0  # seconds; it imports grpc, on a busy machine
_PAUSE_SECONDS = CALL_TIMEOUT + 5.0
_RESUME_TRIES = 10
_RESUME_PAUSE = 3.0
_READY, _PAUSE, _PAUSED, _DONE = b"ready\n", b"pause\n", b"paused\n", b"resumed\n"
_ASK, _THERE = b"there?\n", b"there\n"


@contextmanager
def paused(containers: Containers, container: str) -> Iterator[None]:
    """For a running container. Raises ContainerdError if it cannot be paused, or not be resumed."""
    guard = _Guard(containers, container)
    try:
        try:
            guard.pause()
            yield
        finally:
            guard.settle()
            _resume(containers, container)
            guard.tell(_DONE)
    finally:
        guard.close()


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


class _Guard:
    """Our side of it. Raises ContainerdError when it does not start: nothing was paused then."""

    def __init__(self, containers: Containers, container: str) -> None:
        self._container = container
        self._asked = False  # and not answered yet
        self._process = subprocess.Popen(
            [*_COMMAND, containers.address, containers.namespace, container],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # what `select` does not see would be waited for
            start_new_session=True,  # Ctrl-C is for us
        )
        if self._answer(_GUARD_START) != _READY:
            self._process.kill()
            self._process.wait()
            raise ContainerdError(f"the guard of container {container} does not start: nothing was paused")

    def _answer(self, timeout: float) -> bytes:
        """A line of it; b"": it ended, or has not answered in time."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        return self._process.stdout.readline() if ready else b""

    def pause(self) -> None:
        """Raises ContainerdError."""
        self._asked = True
        self.tell(_PAUSE)
        said = self._answer(_PAUSE_SECONDS)
        self._asked = False
        if said != _PAUSED:
            why = said.decode(errors="replace").strip()
            raise ContainerdError(why or f"pausing container {self._container}: the guard has ended or hangs")

    def settle(self) -> None:
        """It is not in the middle of a call any more. Who was interrupted may have lost its answer to that one."""
        if self._asked:
            self.tell(_ASK)
            while self._answer(_PAUSE_SECONDS) not in (_THERE, b""):
                pass
            self._asked = False

    def tell(self, word: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(word)
        except BrokenPipeError:
            log.debug("the guard of the pause ended before it")

    def close(self) -> None:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(_RESUME_TRIES * _RESUME_PAUSE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _guard(address: str, namespace: str, container: str) -> int:
    """Says that it is there, and pauses the container when it is told to. At the end of its input the container is
    resumed, unless the last word came before it."""
    from nydusfs.containerd.containers import Containers

    def say(word: bytes) -> None:
        with suppress(BrokenPipeError):  # who asked is gone
            sys.stdout.buffer.write(word)
            sys.stdout.flush()

    with Containers(address, namespace, "nydusify-guard") as containers:
        say(_READY)
        stands = False
        while (word := sys.stdin.buffer.readline()) not in (_DONE, b""):
            if word != _PAUSE:
                say(_THERE)
                continue
            stands = True
            try:
                containers.pause(container)
                say(_PAUSED)
            except ContainerdError as error:
                say(" ".join(str(error).split()).encode() + b"\n")
        if stands and word != _DONE:
            _resume(containers, container)
    return 0


if __name__ == "__main__":
    raise SystemExit(_guard(*sys.argv[1:]))
