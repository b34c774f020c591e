"""Segment files kept open: opening one for each read would cost as much as a small read itself."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable

from nydusfs.hands import Hands

MOST = 8192


class OpenFile:
    """A descriptor with a count of readers: closing one that a thread reads from could hand it another file's bytes."""

    __slots__ = ("evicted", "fd", "users")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.users = 0
        self.evicted = False


class OpenFiles:
    """The files used last, an eighth of what the process may open. All methods from any thread."""

    def __init__(self) -> None:
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.most = max(8, min(MOST, soft // 8))
        self._lock = threading.Lock()
        self._files: OrderedDict[Hashable, OpenFile] = OrderedDict()

    def __len__(self) -> int:
        return len(self._files)

    def again(self, slot: Hashable) -> OpenFile | None:
        """`acquire` where it is open."""
        with self._lock:
            file = self._files.get(slot)
            if file is not None:
                self._files.move_to_end(slot)
                file.users += 1
            return file

    def acquire(
        self, slot: Hashable, paths: Callable[[], Iterable[str]], hands: Hands | None = None
    ) -> OpenFile | None:
        """The file of a slot, opened at the first of `paths()` that exists if it is not; None when there is none. To be
        given back by `release`."""
        with self._lock:
            file = self._files.get(slot)
            if file is None:
                if hands is not None:
                    hands.waits()
                fd = self._open(paths())
                if fd < 0:
                    return None
                file = self._files[slot] = OpenFile(fd)
                self._shrink(self.most)
            else:
                self._files.move_to_end(slot)
            file.users += 1
            return file

    def in_use(self, slot: Hashable) -> bool:
        """Whether somebody reads from it now. Without the lock: who comes a moment later finds it gone."""
        file = self._files.get(slot)
        return file is not None and file.users > 0

    def _open(self, paths: Iterable[str]) -> int:
        for path in paths:
            while True:
                try:
                    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    break
                except OSError as error:
                    if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._files:
                        return -1
                    self._shrink(len(self._files) // 2)
        return -1

    def release(self, file: OpenFile) -> None:
        with self._lock:
            file.users -= 1
            if file.evicted and not file.users:
                os.close(file.fd)

    def drop(self, slot: Hashable) -> None:
        """Close it, for readers who have it when they are done."""
        with self._lock:
            file = self._files.pop(slot, None)
            if file is not None:
                self._retire(file)

    def close(self) -> None:
        with self._lock:
            self._shrink(0)

    def _shrink(self, limit: int) -> None:
        while len(self._files) > limit:
            self._retire(self._files.popitem(last=False)[1])

    @staticmethod
    def _retire(file: OpenFile) -> None:
        file.evicted = True
        if not file.users:
            os.close(file.fd)
