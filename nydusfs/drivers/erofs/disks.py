"""Whether caches can have EROFS mounts of their files: tried once for each disk, beside what else a mount waits for."""

from __future__ import annotations

import logging
import os
import time
from math import inf

import trio

from nydusfs.cache import CacheStore
from nydusfs.config import FsDriver
from nydusfs.drivers.erofs import selftest
from nydusfs.drivers.erofs.image import UnsuitableError

log = logging.getLogger("nydusfs.erofs")

AGAIN = 600.0  # seconds until a self-test that failed is tried again: the disk may have been full


class DiskUnsuitableError(UnsuitableError):
    """Said once for each disk, not for each image."""


class Trial:
    def __init__(self) -> None:
        self._over = trio.Event()
        self._why_not = ""

    def end(self, why_not: str) -> None:
        self._why_not = why_not
        self._over.set()

    async def passed(self) -> None:
        """Returns when it has. Raises `DiskUnsuitableError`."""
        await self._over.wait()
        self.check()

    def check(self) -> None:
        """Raises `DiskUnsuitableError` if it has failed already."""
        if self._why_not:
            raise DiskUnsuitableError(self._why_not)


class Disks:
    """`choice` is only said."""

    def __init__(self, choice: FsDriver) -> None:
        self._choice = choice
        self._known: dict[int, tuple[str, float]] = {}  # why not, and until when that is believed

    def trial(self, store: CacheStore, nursery: trio.Nursery) -> Trial:
        """Begin it, if it is not known already. Raises OSError."""
        disk, trial = os.stat(store.path).st_dev, Trial()
        why_not, until = self._known.get(disk, ("", 0.0))
        if time.monotonic() < until:
            trial.end(why_not)
        else:
            nursery.start_soon(self._try, store, disk, trial)
        return trial

    async def _try(self, store: CacheStore, disk: int, trial: Trial) -> None:
        try:
            driver, reason = await trio.to_thread.run_sync(selftest.choose, "auto", store.path)
        except OSError as error:  # not of the test, which answers for its own
            driver, reason = "fuse", error.strerror or str(error)
        except BaseException:
            trial.end("nydusd ends")
            raise
        passed = driver == "erofs"
        log.info(
            "fs_driver %s: images with the cache %s are served by %s: %s", self._choice, store.path, driver, reason
        )
        why_not = "" if passed else reason
        self._known[disk] = why_not, inf if passed else time.monotonic() + AGAIN
        trial.end(why_not)
