"""Where directories of removed snapshots wait to be deleted: out of sight soon, gone when there is time.

Deleting an unpacked image is hundreds of thousands of calls. Who asks for a clean-up waits a moment, so that small
ones are really gone; the rest goes on behind. Whatever lies here belongs to nobody, so a killed program's rest is
deleted by the next one.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from nydusfs.trees import remove_tree
from snapshotter.system import detach, mountpoints

log = logging.getLogger(__name__)


class Trash:
    """`folder` should be on the file system of what is put into it: else it is deleted at once, not moved.

    `gather` puts in what there is, before each emptying. All methods may be called from any thread.
    """

    def __init__(self, folder: Path, gather: Callable[[], None] = lambda: None) -> None:
        self._folder = folder
        self._gather = gather
        self._lock = threading.Lock()
        self._asked = False
        self._idle = threading.Event()
        self._idle.set()

    def put(self, path: Path) -> None:
        """One rename. Raises OSError; FileNotFoundError when another call was faster."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        try:
            os.rename(path, self._folder / f"{path.name}-{time.time_ns()}")
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            remove_tree(path)

    def empty(self, patience: float) -> None:
        """Has everything gathered and deleted; returns when that is done, or after `patience` seconds."""
        with self._lock:
            self._asked = True
            if self._idle.is_set():
                self._idle.clear()
                threading.Thread(target=self._work, name="trash", daemon=True).start()
        self._idle.wait(patience)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._asked:
                    self._idle.set()
                    return
                self._asked = False
            try:
                self._gather()
            except Exception:
                log.exception("what was removed is left for the next clean-up")
            try:
                paths = [entry.path for entry in os.scandir(self._folder)]
            except FileNotFoundError:
                continue
            except OSError as error:
                log.warning("%s cannot be emptied: %s", self._folder, error.strerror)
                continue
            for path in paths:
                try:
                    _delete(path)
                except OSError as error:
                    log.warning("%s is left for the next clean-up: %s", path, error.strerror or error)


def _delete(path: str) -> None:
    try:
        remove_tree(path)
    except OSError:
        # the mount of an image whose nydusd was lost went along with the rename: nobody's any more
        inside = [point for point in mountpoints() if point.startswith(f"{path}/")]
        if not inside:
            raise
        for point in reversed(inside):
            detach(point)
        remove_tree(path)
