"""Reads of one image's files that failed: the error, the log's line, and the names of files for people."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Collection

from bootstrap.base import Bootstrap
from bootstrap.errors import RafsError
from nydusfs.errors import ReadError
from nydusfs.sources.limits import Seldom

log = logging.getLogger("nydusfs.image")

MAX_PATHS = 64
SHORT_WALK, MAX_WALK = 20_000, 500_000  # entries, up to about 2 s


class Failures:
    """`name`: of the image. All of the trio thread, but for `paths_of`."""

    def __init__(self, name: str, bootstrap: Bootstrap) -> None:
        self._name = name
        self._bootstrap = bootstrap
        self._paths: dict[int, str] = {}
        self._lines: dict[str, Seldom] = {}

    def failed(self, ino: int, reason: str, blob: str = "") -> ReadError:
        """To be raised. The log has it unless it had one about this blob (or the image's metadata) a moment ago: with a
        dead source each of a thousand readers would write a line, and have its file's name looked for."""
        more = self._lines.setdefault(blob, Seldom()).say(time.monotonic())
        if more is not None:
            log.error(
                "Failed in reading backend: image %s: file %s: %s: EIO%s", self._name, self.path_of(ino), reason, more
            )
        else:
            log.debug("Failed in reading backend: image %s: inode %d: %s: EIO", self._name, ino, reason)
        return ReadError(f"image {self._name}: {reason}", errno.EIO)

    def path_of(self, ino: int) -> str:
        """The file's path if a short walk finds it, else its handle: only for error lines. 0: not known."""
        if not ino:
            return "(any)"
        if ino not in self._paths:
            if len(self._paths) >= MAX_PATHS:
                self._paths.clear()
            self._paths[ino] = self._walk_to({ino}, SHORT_WALK).get(ino, f"inode {ino}")
        return self._paths[ino]

    def paths_of(self, inodes: Collection[int]) -> dict[int, str]:
        """Those that a walk of bounded length finds, for people; for a worker thread."""
        found = self._walk_to(set(inodes), MAX_WALK)
        return {ino: found.get(ino, f"inode {ino}").encode("utf-8", "replace").decode() for ino in inodes}

    def _walk_to(self, wanted: set[int], longest: int) -> dict[int, str]:
        found: dict[int, str] = {}
        try:
            for steps, (path, entry) in enumerate(self._bootstrap.walk()):
                if entry.ino in wanted:
                    found.setdefault(entry.ino, "/" + os.fsdecode(path))
                if steps >= longest or len(found) == len(wanted):
                    break
        except (RafsError, ValueError):
            pass
        return found
