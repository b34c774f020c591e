"""A memory limit for all nydusd processes together: the control group `system.slice/nydusd`, as upstream names it.

A worker that the kernel kills for it is replaced under its mounts; the keeper hides from that kill. The group outlives
this program, as its processes do.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

from snapshotter.errors import SettingsError

log = logging.getLogger(__name__)

ROOT = Path("/sys/fs/cgroup")
NAME = "system.slice/nydusd"
_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("KMGT", 1)}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)


def parse_limit(text: str) -> int:
    """Bytes of `200MiB`, `200Mi`, `1.5GB`, `209715200`, or `10%` of this machine's memory; 0 for "".

    Raises SettingsError.
    """
    text = text.strip()
    if not text:
        return 0
    if text.endswith("%"):
        try:
            share = float(text[:-1])
        except ValueError:
            share = 0.0
        if not 0 < share <= 100:
            raise SettingsError(f"cgroup.memory_limit {text!r}: a percentage is above 0 and at most 100")
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * share / 100)
    found = _AMOUNT.fullmatch(text)
    if found is None or not float(found[1]):
        raise SettingsError(f"cgroup.memory_limit {text!r}: write bytes, 200MiB or 10%")
    unit = (found[2] or "").capitalize()
    return int(float(found[1]) * _UNITS[unit])


class MemoryGroup:
    """`limit` bytes, 0: none. What the machine does not allow is logged once, and nydusd runs without a limit."""

    def __init__(self, limit: int, root: Path = ROOT) -> None:
        self.path: Path | None = None
        self._limit, self._root = limit, root
        self._second = (root / "cgroup.controllers").exists()
        path = root / NAME if self._second else root / "memory" / NAME
        try:
            self._make(path)
        except OSError as error:
            log.warning("cgroup %s: %s: nydusd runs without a memory limit", path, error.strerror or error)
            return
        self.path = path
        log.info("nydusd runs in %s, limited to %s", path, f"{limit} bytes" if limit else "nothing")

    def _make(self, path: Path) -> None:
        if self._second:
            _delegate(self._root, path)
        elif not (self._root / "memory").is_dir():
            raise FileNotFoundError(f"{self._root}/memory does not exist")
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        if self._second:
            (path / "memory.max").write_text(str(self._limit) if self._limit else "max")
        else:
            (path / "memory.limit_in_bytes").write_text(str(self._limit or -1))

    def add(self, pids: Iterable[int]) -> None:
        """Moves processes there; their later children are born in it."""
        if self.path is None:
            return
        for pid in pids:
            try:
                try:
                    (self.path / "cgroup.procs").write_text(str(pid))
                except FileNotFoundError:  # as long as nobody is in it others may remove it
                    self._make(self.path)
                    (self.path / "cgroup.procs").write_text(str(pid))
            except ProcessLookupError:
                pass
            except OSError as error:
                log.warning("process %d cannot be moved to %s: %s", pid, self.path, error.strerror)


def _delegate(root: Path, path: Path) -> None:
    """Version 2: the memory controller must be enabled in each group above."""
    for above in [folder for folder in reversed(path.parents) if folder == root or root in folder.parents]:
        above.mkdir(mode=0o755, exist_ok=True)
        control = above / "cgroup.subtree_control"
        if "memory" not in control.read_text().split():
            control.write_text("+memory")
