"""Control groups for tests, of either version: a limit of memory or processes, and the freezer."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from tests.lab.process import LabError, wait_until

ROOT = Path("/sys/fs/cgroup")


def _second() -> bool:
    return (ROOT / "cgroup.controllers").exists()


class Group:
    """A context manager: a group with one controller, `memory`, `pids` or `freezer`. What is in it at the end is moved
    out."""

    def __init__(self, controller: str) -> None:
        self._second = _second()
        top = ROOT if self._second else ROOT / controller
        self._top = top
        self.path = top / f"nydus-test-{os.getpid()}-{time.monotonic_ns()}"
        if self._second and controller != "freezer" and controller not in (ROOT / "cgroup.subtree_control").read_text():
            (ROOT / "cgroup.subtree_control").write_text(f"+{controller}")
        self.path.mkdir()

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        self.thaw()
        for pid in (self.path / "cgroup.procs").read_text().split():
            try:
                (self._top / "cgroup.procs").write_text(pid)
            except ProcessLookupError:
                pass
        wait_until(self._removed, 30, "an empty control group")

    def _removed(self) -> bool:
        try:
            self.path.rmdir()
        except OSError:
            return False
        return True

    def add(self, pids: Iterable[int]) -> None:
        for pid in pids:
            (self.path / "cgroup.procs").write_text(str(pid))

    def limit_memory(self, size: int) -> None:
        (self.path / ("memory.max" if self._second else "memory.limit_in_bytes")).write_text(str(size))

    def limit_processes(self, number: int | None) -> None:
        (self.path / "pids.max").write_text("max" if number is None else str(number))

    def memory_peak(self) -> int:
        return int((self.path / ("memory.peak" if self._second else "memory.max_usage_in_bytes")).read_text())

    def freeze(self) -> None:
        """Waits until every process of the group stands still. Raises LabError."""
        if self._second:
            (self.path / "cgroup.freeze").write_text("1")
            wait_until(lambda: "frozen 1" in (self.path / "cgroup.events").read_text(), 30, "a frozen group")
        else:
            (self.path / "freezer.state").write_text("FROZEN")
            wait_until(lambda: (self.path / "freezer.state").read_text().strip() == "FROZEN", 30, "a frozen group")

    def thaw(self) -> None:
        for name, value in (("cgroup.freeze", "0"), ("freezer.state", "THAWED")):
            if (self.path / name).exists():
                (self.path / name).write_text(value)


@cache
def no_groups(controller: str) -> str:
    """ "" when a test can make such a group, else the reason why not."""
    try:
        with Group(controller):
            return ""
    except (OSError, LabError) as error:
        return f"no control groups with {controller} here: {error}"
