"""Container starts, measured: seconds to the first line of output, bytes and requests over the registry's link."""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab.process import LabError, drop_caches, tail
from tests.lab.stack import Stack, program


@dataclass(frozen=True, slots=True)
class Start:
    """`seconds` from the first command to the container's first line; `bytes` and `requests` as the registry sent them
    until the container ended, in answer bodies; `link_bytes` over the shaped link, headers included."""

    seconds: float
    pull_seconds: float
    bytes: int
    requests: int
    link_bytes: int
    line: str

    def figures(self) -> dict[str, float | int]:
        return {"seconds": round(self.seconds, 3), "bytes": self.bytes, "requests": self.requests}


def first_line(argv: Sequence[str], log: Path, timeout: float, env: dict[str, str] | None = None) -> tuple[str, float]:
    """Runs a command to its end; its first line of output and the seconds until that line."""
    begin = time.monotonic()
    with log.open("wb") as errors:
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=env)
        assert child.stdout is not None
        text, seconds = b"", 0.0
        try:
            while True:
                left = begin + timeout - time.monotonic()
                if left <= 0 or not select.select([child.stdout], [], [], left)[0]:
                    raise LabError(f"{' '.join(argv)}: no output after {timeout:.0f} s; {tail(log)}")
                piece = os.read(child.stdout.fileno(), 65536)
                if not piece:
                    break
                text += piece
                if not seconds and b"\n" in text:
                    seconds = time.monotonic() - begin
            code = child.wait(max(1.0, begin + timeout - time.monotonic()))
        except BaseException:
            child.kill()
            child.wait(10)
            raise
    if code or not seconds:
        raise LabError(f"{' '.join(argv)}: exit code {code}, output {text[:200]!r}; {tail(log)}")
    return text.split(b"\n")[0].decode(errors="replace"), seconds


def start(
    stack: Stack,
    repository: str,
    command: Sequence[str],
    *,
    snapshotter: str = "nydus",
    nerdctl: Path | None = None,
    cold: bool = True,
    timeout: float = 300.0,
) -> Start:
    """Pulls (if needed) and runs an image named by the stack's link; with `cold` the page cache is emptied first.

    With nerdctl this is one `nerdctl run`; without it `ctr-remote images rpull` and `ctr run`.
    """
    reference = f"{stack.host}/{repository}"
    log = stack.work / "client.log"
    containerd = stack.containerd
    path = f"{containerd.binary.parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    env = {"PATH": path, "HOME": str(stack.work), "DOCKER_CONFIG": str(stack.work)}
    if cold:
        drop_caches()
    mark, before = stack.registry.mark(), stack.link.count().down if stack.link else 0
    begin = time.monotonic()
    pull = 0.0
    if nerdctl is not None:
        argv = containerd.nerdctl_argv(
            nerdctl, "run", "--rm", "--quiet", "--net", "host", reference, *command, snapshotter=snapshotter
        )
        line, seconds = first_line(argv, log, timeout, env)
    else:
        known = containerd.ctr("images", "ls", "-q").stdout.split()
        if cold or reference not in known:
            rpull = [
                str(program("ctr-remote")),
                "-a",
                str(containerd.socket),
                "-n",
                containerd.namespace,
                "images",
                "rpull",
                "--plain-http",
                "--snapshotter",
                snapshotter,
                reference,
            ]
            with log.open("wb") as out:
                done = subprocess.run(
                    rpull, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=timeout, env=env, check=False
                )
            if done.returncode:
                raise LabError(f"ctr-remote images rpull {reference}: exit code {done.returncode}: {tail(log)}")
            pull = time.monotonic() - begin
        else:
            begin = time.monotonic()
        argv = containerd.ctr_argv(
            "run", "--rm", "--net-host", "--snapshotter", snapshotter, reference, f"c{time.monotonic_ns()}", *command
        )
        line, seconds = first_line(argv, log, timeout, env)
        seconds += pull
    traffic = stack.registry.since(mark)
    after = stack.link.count().down if stack.link else 0
    return Start(seconds, pull, traffic.bytes, traffic.count, after - before, line)
