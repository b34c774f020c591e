"""Directory trees that somebody else may be changing, as a container changes its upper directory: measured and deleted.
And files of our own, waited for until they are on the disk.

Each directory is opened below the one that it was found in and never through a link, so what is swapped for a link
between a look and its use is not followed. Trees may be deeper than paths, descriptors or recursion reach: a container
makes such with `mkdir` and `chdir` alone.
"""

from __future__ import annotations

import errno
import math
import os
import stat
from pathlib import Path

_ENTER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FEW = 64  # inodes: 0.1 ms
_KEPT = 64  # descriptors of the directories nearest to where a walk is
_AWAY = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # it is gone, or no directory any more


class _Trail:
    """The way from the top of a tree to where a walk is: the top has depth 0. Raises OSError."""

    def __init__(self, path: str | bytes | Path, dir_fd: int | None) -> None:
        self._descriptors = [os.open(path, _ENTER, dir_fd=dir_fd)]
        self._names = [""]
        self._closed: dict[int, tuple[int, int]] = {}  # device and inode, by depth

    def __enter__(self) -> _Trail:
        return self

    def __exit__(self, *_: object) -> None:
        for depth, descriptor in enumerate(self._descriptors):
            if depth not in self._closed:
                os.close(descriptor)

    def at(self, depth: int) -> int:
        """A descriptor of the directory at `depth` of the trail, which ends there now."""
        while len(self._names) > depth + 1:
            self._step_back()
        nearest = depth
        while nearest in self._closed:
            nearest -= 1
        for below in range(nearest + 1, depth + 1):
            self._descriptors[below] = self._opened(below - 1, self._names[below])
            del self._closed[below]
        return self._descriptors[depth]

    def enter(self, depth: int, name: str) -> int:
        """One step down from `depth`."""
        self.at(depth)
        self._descriptors.append(self._opened(depth, name))
        self._names.append(name)
        return self._descriptors[-1]

    def _opened(self, depth: int, name: str) -> int:
        descriptor = os.open(name, _ENTER, dir_fd=self._descriptors[depth])
        far = depth + 1 - _KEPT
        if far > 0 and far not in self._closed:
            self._closed[far] = _identity(self._descriptors[far])
            os.close(self._descriptors[far])
        return descriptor

    def _step_back(self) -> None:
        """Up by `..` where the directory above was closed, if it is still the one above: else `at` looks for it from
        where the trail is open, which takes as long as the tree is deep."""
        depth = len(self._names) - 1
        self._names.pop()
        descriptor = self._descriptors.pop()
        if self._closed.pop(depth, None) is not None:
            return
        wanted = self._closed.get(depth - 1)
        try:
            if wanted is not None:
                above = os.open("..", _ENTER, dir_fd=descriptor)
                if _identity(above) == wanted:
                    self._descriptors[depth - 1] = above
                    del self._closed[depth - 1]
                else:
                    os.close(above)
        finally:
            os.close(descriptor)


def _identity(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino


def disk_usage(path: Path) -> tuple[int, int]:
    """(bytes on disk, inodes) of a tree, each inode once. What vanishes or stops to be a directory meanwhile is counted
    as far as it was seen. Raises OSError."""
    return _usage(path, math.inf) or (0, 0)


def small_usage(path: Path) -> tuple[int, int] | None:
    """`disk_usage` of a tree that is read in no time; None for a larger one."""
    return _usage(path, _FEW)


def _usage(path: Path, most: float) -> tuple[int, int] | None:
    try:
        top = os.lstat(path)
    except FileNotFoundError:
        return 0, 0
    size = top.st_blocks * 512
    seen = {(top.st_dev, top.st_ino)}
    if not stat.S_ISDIR(top.st_mode):
        return size, 1
    try:
        trail = _Trail(path, None)
    except OSError as error:
        if error.errno in _AWAY:
            return size, 1
        raise
    with trail:
        pending = [(-1, "")]
        while pending:
            depth, name = pending.pop()
            try:
                entries = os.scandir(trail.at(0) if depth < 0 else trail.enter(depth, name))
            except OSError as error:
                if error.errno in _AWAY:
                    continue
                raise
            with entries:
                for entry in entries:
                    try:
                        found = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    if stat.S_ISDIR(found.st_mode):
                        pending.append((depth + 1, entry.name))
                    if (found.st_dev, found.st_ino) not in seen:
                        seen.add((found.st_dev, found.st_ino))
                        size += found.st_blocks * 512
                        if len(seen) > most:
                            return None
    return size, len(seen)


def remove_tree(path: str | bytes | Path, *, dir_fd: int | None = None, ignore_errors: bool = False) -> None:
    """`shutil.rmtree` without its recursion. Raises OSError, unless `ignore_errors`: then it deletes what it can
    up to the first error. What others delete meanwhile is no error; a link in place of `path` is."""
    try:
        with _Trail(path, dir_fd) as trail:
            _emptied(trail)
        os.rmdir(path, dir_fd=dir_fd)
    except OSError:
        if not ignore_errors:
            raise


def _emptied(trail: _Trail) -> None:
    pending = [(-1, "", False)]  # depth of the directory it lies in, name, whether what it held was seen to
    while pending:
        depth, name, emptied = pending.pop()
        if emptied:
            _unlink(trail.at(depth), name)
            continue
        try:
            directory = trail.at(0) if depth < 0 else trail.enter(depth, name)
        except OSError as error:
            if error.errno not in _AWAY:
                raise
            _unlink(trail.at(depth), name)
            continue
        if depth >= 0:
            pending.append((depth, name, True))
        with os.scandir(directory) as entries:
            found = list(entries)
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                pending.append((depth + 1, entry.name, False))
            else:
                _unlink(directory, entry.name)


def _unlink(directory: int, name: str) -> None:
    """An empty directory, or what is none: what it was seen as may not be what it is."""
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        pass
    except IsADirectoryError:
        os.rmdir(name, dir_fd=directory)


def wait_for_disk(path: Path) -> None:
    """What this file, or the files right in this directory, hold is there after a power cut: for what is about to get a
    name that says so. Raises OSError."""
    for one in (*path.iterdir(), path) if path.is_dir() else (path,):
        descriptor = os.open(one, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
