"""Paths of an image as a program in it has them looked up: symbolic links followed, none of them out of the image."""

from __future__ import annotations

import stat
from collections import deque
from itertools import islice

from bootstrap.base import Bootstrap
from nydusfs.imports import Kind, Listing

MAX_LISTED = 10_000  # entries of a folder
MAX_LINKED = 200  # of them that are followed as symbolic links
MAX_LINKS = 16


class Paths:
    """Methods raise RafsError, KeyError or ValueError for bad metadata."""

    def __init__(self, image: Bootstrap) -> None:
        self._image = image

    def file(self, path: bytes) -> int:
        """The inode of a regular file; 0: none."""
        ino = self._walk(path)
        return ino if ino and stat.S_ISREG(self._image.attr(ino).mode) else 0

    def _walk(self, path: bytes) -> int:
        """The inode of anything; 0: none."""
        image = self._image
        todo = deque(path.split(b"/"))
        above: list[int] = [image.root]
        links = 0
        while todo:
            name = todo.popleft()
            if name in (b"", b"."):
                continue
            if name == b"..":
                if len(above) > 1:
                    above.pop()
                continue
            ino = image.lookup(above[-1], name)
            if not ino:
                return 0
            mode = image.attr(ino).mode
            if stat.S_ISLNK(mode):
                links += 1
                target = image.readlink(ino)
                if links > MAX_LINKS:
                    return 0
                if target.startswith(b"/"):
                    above = [image.root]
                todo.extendleft(reversed(target.split(b"/")))
                continue
            above.append(ino)
        return above[-1]

    def listing(self, path: bytes) -> Listing:
        """Of a folder by its absolute path, empty for none; at most `MAX_LISTED` entries."""
        image = self._image
        folder = self._walk(path)
        if not folder or not stat.S_ISDIR(image.attr(folder).mode):
            return {}
        found: dict[bytes, tuple[int, Kind]] = {}
        links = 0
        for entry in islice(image.list_dir(folder), MAX_LISTED):
            ino = entry.ino
            mode = entry.dtype << 12  # as the kernel has it
            if stat.S_ISLNK(mode) and links < MAX_LINKED:
                links += 1
                if ino := self._walk(path + b"/" + entry.name):
                    mode = image.attr(ino).mode
            if stat.S_ISREG(mode):
                found[entry.name] = ino, Kind.FILE
            elif stat.S_ISDIR(mode):
                found[entry.name] = ino, Kind.FOLDER
        return found
