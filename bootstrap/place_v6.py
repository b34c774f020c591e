"""Where everything of a v6 tree lies: upstream's placement to the byte. Reference: RAFS format 5.2 and 5.3.

The order matters and each step depends on the one before, so this is the one loop over all paths that is Python.
"""

from __future__ import annotations

import stat
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from bootstrap.errors import BuildError
from bootstrap.flat import FlatTree, Ints
from bootstrap.layout import v6

SLOT = v6.NID_UNIT
INODE_SIZE = v6.INODE_EXTENDED.size
DIRENT_SIZE = v6.DIRENT.size

_REGULAR, _DIRECTORY, _LINK, _SPECIAL, _OTHER_NAME = range(5)


@dataclass(slots=True)
class Placement:
    """By row, in bytes from the start of the inode area. `data` counts only for directories and links.

    `sizes` is `i_size`; `heads` that of inode and attributes; `splits`: for directories of several dirent blocks, where
    in their listing (with "." and "..") blocks begin, the end included. `end`: of everything.
    """

    offsets: Ints
    data: Ints
    sizes: Ints
    heads: Ints
    inline: np.ndarray
    splits: dict[int, list[int]]
    end: int


def dots(names: list[bytes], first: int, end: int) -> tuple[int, int]:
    """Where "." and ".." belong in a sorted directory: the number of names before each."""
    if first == end or names[first] > b"..":
        return 0, 0
    return bisect_left(names, b".", first, end) - first, bisect_left(names, b"..", first, end) - first


def listing(names: list[bytes], first: int, end: int) -> list[bytes]:
    """All names of a directory as it stores them, "." and ".." included."""
    one, two = dots(names, first, end)
    return [*names[first : first + one], b".", *names[first + one : first + two], b"..", *names[first + two : end]]


def place(tree: FlatTree, first_names: Ints, xattr_sizes: Ints, chunk_size: int, block: int) -> Placement:
    """`first_names`: by row, the first row of its inode. `xattr_sizes`: bytes of each entry of `tree.xattrs`.

    Raises BuildError for files whose chunks do not make up their size.
    """
    inodes, kinds = tree.inodes, tree.kinds()
    heads = np.full(len(inodes), INODE_SIZE, np.int64)
    with_xattrs = np.flatnonzero(inodes["xattrs"] >= 0)
    heads[with_xattrs] += xattr_sizes[inodes["xattrs"][with_xattrs]]
    sizes = inodes["size"].copy()
    regular = kinds == stat.S_IFREG
    counts = -(-sizes // chunk_size)
    if (wrong := np.flatnonzero(regular & (inodes["count"] != counts))).size:
        row = int(wrong[0])
        raise BuildError(f"{tree.path(row)}: {inodes['count'][row]} chunks instead of {counts[row]}")
    splits = _directory_sizes(tree, sizes, block)
    tails = sizes % block
    inline = (tails > 0) & (heads + tails <= block)
    needs = np.where(regular, (heads + 7 & ~7) + 8 * counts, heads)

    codes = np.full(len(inodes), _SPECIAL, np.uint8)
    codes[regular] = _REGULAR
    codes[regular & (first_names != np.arange(len(inodes)))] = _OTHER_NAME
    codes[kinds == stat.S_IFDIR] = _DIRECTORY
    codes[kinds == stat.S_IFLNK] = _LINK
    walk = _Walk(block, codes.tobytes(), _packed(needs), _packed(heads), _packed(sizes))
    firsts = _packed(first_names)
    visits = tree.visits()
    begin, count = inodes["first"][visits].tolist(), inodes["count"][visits].tolist()
    for directory, first, number in zip(visits, begin, count, strict=True):
        walk.tail(directory)
        walk.children(first, first + number, firsts)
    offsets, data = np.frombuffer(walk.offsets, np.int64), np.frombuffer(walk.data, np.int64)
    return Placement(offsets, data, sizes, heads, inline, splits, walk.cur)


def _packed(numbers: Ints) -> array[int]:
    """For a loop that meets each number once: 8 bytes each, where a list takes 40."""
    return array("q", numbers.astype(np.int64, copy=False).tobytes())


def _directory_sizes(tree: FlatTree, sizes: Ints, block: int) -> dict[int, list[int]]:
    """Fills in `i_size` of directories: names packed into blocks in byte order, "." and ".." among them (1.9)."""
    rows = tree.directories()
    names = tree.names
    ends = np.concatenate(([0], np.cumsum(np.fromiter(map(len, names), np.int64, len(names)))))
    first = tree.inodes["first"][rows]
    last = first + tree.inodes["count"][rows]
    sizes[rows] = 2 * DIRENT_SIZE + 3 + DIRENT_SIZE * (last - first) + ends[last] - ends[first]
    splits = {}
    for row in rows[sizes[rows] > block].tolist():
        start = int(tree.inodes["first"][row])
        stored = listing(names, start, start + int(tree.inodes["count"][row]))
        used = [0, *accumulate([DIRENT_SIZE + len(name) for name in stored])]
        borders = [0]
        while borders[-1] < len(used) - 1:
            borders.append(bisect_right(used, used[borders[-1]] + block) - 1)
        splits[row] = borders
        sizes[row] = (len(borders) - 2) * block + used[-1] - used[borders[-2]]
    return splits


class _Walk:
    """The growing virtual file and the unused ends of its blocks.

    `_free[k]` queues the blocks with k unused slots at their end; bit k of `_some` says that there are any (looking
    through 128 queues for each inode was a third of a merge).
    """

    def __init__(
        self, block: int, codes: bytes, needs: array[int], heads: array[int], sizes: array[int]
    ) -> None:
        self.cur = v6.BLOCK_SIZE
        self.offsets = array("q", bytes(8 * len(codes)))
        self.data = array("q", bytes(8 * len(codes)))
        self._block = block
        self._codes, self._needs, self._heads, self._sizes = codes, needs, heads, sizes
        self._free: list[deque[int]] = [deque() for _ in range(block // SLOT + 1)]
        self._some = 0

    def _note(self, at: int) -> None:
        """Remember the unused rest of the block `at` lies in."""
        used = at % self._block
        if used:
            k = (self._block - used) // SLOT
            self._free[k].append(at - used)
            self._some |= 1 << k

    def _take(self, size: int) -> int:
        """Space in a partly used block, or 0 (never a place: everything starts behind it)."""
        if size >= self._block:
            return 0
        need = -(-size // SLOT)
        enough = self._some >> need
        if not enough:
            return 0
        k = need + (enough & -enough).bit_length() - 1
        blocks = self._free[k]
        at = blocks.popleft() + self._block - SLOT * k
        if not blocks:
            self._some &= ~(1 << k)
        self._note(at + need * SLOT)
        return at

    def children(self, first: int, end: int, first_names: array[int]) -> None:
        """Place all children of a directory but the directories among them."""
        codes, needs, offsets = self._codes, self._needs, self.offsets
        for row in range(first, end):
            code = codes[row]
            if code == _REGULAR:
                need = needs[row]
                at = self._take(need) if self._some >> ((need + 31) >> 5) else 0
                if at:
                    offsets[row] = at
                else:
                    offsets[row] = self.cur
                    self.cur = (self.cur + need + 31) & ~31
            elif code == _LINK:
                self.tail(row)
            elif code == _OTHER_NAME:
                offsets[row] = offsets[first_names[row]]
            elif code == _SPECIAL:
                offsets[row] = self.cur
                self.cur = (self.cur + needs[row] + 31) & ~31

    def tail(self, row: int) -> None:
        """A directory or symbolic link: its data behind the inode if one block can hold both (FLAT_INLINE)."""
        block = self._block
        head, size = self._heads[row], self._sizes[row]
        tail = size % block
        if tail and head + tail <= block:
            at = self._take(head + tail)
            if not at:
                if block - self.cur % block < head + tail:
                    self._note(self.cur)
                    self.cur = -(-self.cur // block) * block
                at = self.cur
                self.cur += head + tail
            if size != tail:
                self._note(self.cur)
                self.cur = -(-self.cur // block) * block
            self.data[row] = self.cur
            self.cur += size - tail
        else:
            at = self._take(head)
            if not at:
                at = self.cur
                self.cur += head
            self._note(self.cur)
            self.cur = -(-self.cur // block) * block
            self.data[row] = self.cur
            self.cur = -(-(self.cur + size) // block) * block
        self.offsets[row] = at
        self.cur = (self.cur + 31) & ~31
