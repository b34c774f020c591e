"""A worker from its first instruction to its exit status; see `nydusfs.keeper` for who starts it."""

from __future__ import annotations

import logging
import socket
import sys
from typing import Any

import trio

from nydusfs.daemon import logs, process
from nydusfs.daemon.options import Options
from nydusfs.daemon.service import Daemon
from nydusfs.errors import NydusError
from nydusfs.keeper.jobs import Jobs
from nydusfs.keeper.link import KeeperLink

log = logging.getLogger("nydusfs.daemon")


def main(
    spec: dict[str, Any], control: socket.socket, held: dict[str, int], state: int, last: str, jobs: Jobs
) -> int:
    """Called in a process of its own by the zygote."""
    process.like_any_other()
    return run(spec, KeeperLink(control, spec, held, state), state, last, jobs)


def run(
    spec: dict[str, Any], link: KeeperLink | None, state: int = -1, last: str = "", jobs: Jobs | None = None
) -> int:
    """`spec`: `options` of `Options`, and what `logs.set_up` takes: `log_level`, `log_file`, `log_rotation_size`,
    `log_format`."""
    try:
        # the keeper of an older release knows no format
        form = spec.get("log_format", "text")
        events = logs.set_up(spec["log_level"], spec["log_file"], spec["log_rotation_size"], form)
    except OSError as error:
        return _fail(f"log file {spec['log_file']}: {error.strerror}")
    if last:
        log.error("the last nydusd %s: this one goes on with its mounts", last)
    try:
        daemon = Daemon(Options(**spec["options"]), events, link, jobs)
        request = daemon.prepare(state)
        return trio.run(daemon.run, request)
    except NydusError as error:
        log.error("%s", error)
        return _fail(str(error), error.exit_code)
    except Exception as error:
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]  # type: ignore[assignment]
        log.error("internal error: %s", error, exc_info=error)
        return _fail(f"internal error: {type(error).__name__}: {error} (details are in the log)")


def _fail(message: str, status: int = 1) -> int:
    print(f"nydusd: {message}", file=sys.stderr)
    return status
