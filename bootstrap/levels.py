"""What loading v5 and v6 has in common: growing a `FlatTree` level by level from bytes nobody trusts."""

from __future__ import annotations

import mmap
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable
from operator import lt

import numpy as np
from numpy.typing import NDArray

from bootstrap.chunktable import BlobInfo
from bootstrap.errors import FormatError
from bootstrap.flat import IMPLIED, INODE, S_IFMT, FlatTree, Ints
from bootstrap.layout.common import MAX_NAME
from bootstrap.tree import IMPLIED_NSEC

MAX_DEPTH = 4096
"""Directories inside each other. A path cannot be longer than 4096 bytes; without a limit a chain of directories as
long as the file takes seconds."""
MAX_NSEC = 999_999_999
_KNOWN_TYPES = np.zeros(16, np.bool_)
_KNOWN_TYPES[[1, 2, 4, 6, 8, 10, 12]] = True


def refuse(structure: str, wrong: NDArray[np.bool_], offsets: Ints, say: Callable[[int], str]) -> None:
    """Raise FormatError for the first row that is `wrong`; `offsets`: of all rows in the file, `say`: what is wrong."""
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise FormatError(structure, int(offsets[row]), say(row))


class Loader(ABC):
    """Grows the tree. `inodes` of each level come from the subclass, with `first` and `count` of directories unset."""

    def __init__(self, data: mmap.mmap, blobs: list[BlobInfo], budget: int) -> None:
        self._data = data
        self._blobs = blobs
        self._budget = budget
        """How many more paths there may be: no sane file has more; overlapping directories may."""
        self._levels: list[tuple[Ints, NDArray[np.void]]] = []
        self.xattrs: list[dict[bytes, bytes]] = []
        self._known_xattrs: dict[bytes, int] = {}
        self.targets: list[bytes] = []

    @abstractmethod
    def root(self) -> int:
        """Handle of the root inode."""

    @abstractmethod
    def level(self, handles: Ints) -> NDArray[np.void]:
        """INODE rows of these inodes, checked."""

    @abstractmethod
    def children(self, handles: Ints) -> tuple[list[bytes], Ints, Ints]:
        """Of these directories: all names and handles in them, and how many each has."""

    @abstractmethod
    def chunks(self, handles: Ints, inodes: NDArray[np.void]) -> tuple[Ints, NDArray[np.void]]:
        """For all rows: fills in `first` and `count` of regular files; returns `refs` and chunk records."""

    @abstractmethod
    def offset(self, handle: int) -> int:
        """Where an inode lies in the file, for messages."""

    def spend(self, names: int) -> None:
        """Note that so many more paths were found."""
        self._budget -= names
        if self._budget < 0:
            raise FormatError("directory tree", 0, "more names than fit the file: directories overlap")

    def load(self) -> FlatTree:
        handles = np.array([self.root()], np.int64)
        names = [b"/"]
        parts: list[NDArray[np.void]] = []
        all_handles = [handles]
        seen: set[int] = set()
        while len(handles):
            if len(parts) > MAX_DEPTH:
                raise FormatError("directory tree", self.offset(int(handles[0])), f"more than {MAX_DEPTH} levels deep")
            inodes = self.level(handles)
            parts.append(inodes)
            rows = np.flatnonzero(inodes["mode"] & S_IFMT == stat.S_IFDIR)
            directories = handles[rows]
            self._see(directories.tolist(), seen)
            found, handles, counts = self.children(directories)
            inodes["first"][rows] = len(names) + np.cumsum(counts) - counts
            inodes["count"][rows] = counts
            self._check_names(found, counts, directories)
            names += found
            all_handles.append(handles)
        inodes = np.concatenate(parts)
        implied = (inodes["mode"] == stat.S_IFDIR | 0o755) & (inodes["mtime_nsec"] == IMPLIED_NSEC)
        implied &= (inodes["mtime"] == 0) & (inodes["uid"] == 0) & (inodes["gid"] == 0) & (inodes["xattrs"] < 0)
        implied[0] = False
        inodes["flags"][implied] |= IMPLIED
        everything = np.concatenate(all_handles)
        refs, chunks = self.chunks(everything, inodes)
        self._check_links(everything, inodes)
        return FlatTree(names, inodes, refs, chunks, self._blobs, self.xattrs, self.targets)

    def _see(self, directories: list[int], seen: set[int]) -> None:
        before = len(seen)
        seen.update(directories)
        if len(seen) != before + len(directories):
            known: set[int] = set()
            for handle in directories:
                if handle in known:
                    break
                known.add(handle)
            raise FormatError("directory tree", self.offset(handle), "a directory is reached twice")

    def _check_names(self, names: list[bytes], counts: Ints, directories: Ints) -> None:
        """Sorted and fit for a file system; otherwise merges, which compare them, would go wrong."""
        if not names:
            return
        text = b"".join(names)
        if b"/" in text or b"\0" in text or not all(names) or max(map(len, names)) > MAX_NAME:
            row = next(row for row, name in enumerate(names) if not _is_name(name))
            handle = int(np.repeat(directories, counts)[row])
            raise FormatError("directory", self.offset(handle), f"{names[row][:300]!r} is no usable name")
        ascending = np.fromiter(map(lt, names, names[1:]), np.bool_, len(names) - 1)
        ends = np.cumsum(counts)[:-1]
        ascending[ends[(ends > 0) & (ends < len(names))] - 1] = True
        if not ascending.all():
            row = int(np.flatnonzero(~ascending)[0]) + 1
            handle = int(np.repeat(directories, counts)[row])
            raise FormatError("directory", self.offset(handle), f"{names[row]!r} behind {names[row - 1]!r}: not sorted")

    def _check_links(self, handles: Ints, inodes: NDArray[np.void]) -> None:
        """The names of one inode must describe one inode: writers store it once."""
        rows = np.flatnonzero(inodes["link"] > 0)
        if not len(rows):
            return
        _, index, inverse = np.unique(inodes["link"][rows], return_index=True, return_inverse=True)
        first = rows[index][inverse]
        differ = np.zeros(len(rows), np.bool_)
        for name in ("size", "xattrs", "count"):
            differ |= inodes[name][rows] != inodes[name][first]
        differ |= inodes["mode"][rows] & S_IFMT != inodes["mode"][first] & S_IFMT
        if differ.any():
            row = int(rows[differ][0])
            at = self.offset(int(handles[row]))
            raise FormatError("inode", at, "names of one file differ in type, size or attributes")

    def add_xattrs(self, raw: bytes, parse: Callable[[], dict[bytes, bytes]]) -> int:
        """Place of an attribute set in `xattrs`, -1 for an empty one. `raw`: its bytes; most sets occur many times."""
        place = self._known_xattrs.get(raw)
        if place is None:
            found = parse()
            place = len(self.xattrs) if found else -1
            if found:
                self.xattrs.append(found)
            self._known_xattrs[raw] = place
        return place


def _is_name(name: bytes) -> bool:
    return 0 < len(name) <= MAX_NAME and b"/" not in name and b"\0" not in name


def empty_inodes(count: int) -> NDArray[np.void]:
    """INODE rows with nothing in them."""
    made = np.zeros(count, INODE)
    made["xattrs"] = -1
    return made


def known_types(modes: NDArray[np.unsignedinteger]) -> NDArray[np.bool_]:
    """Which of these modes are of a type there is; one with bits above 16 is not."""
    found: NDArray[np.bool_] = _KNOWN_TYPES[np.minimum(modes >> 12, 15)]
    return found
