"""Which file lies where on the devices of an EROFS mount: the kernel asks about a device, people think in files.

The map lies behind a metadata image, in three columns: `device << 32 | block` of each chunk, ascending (u64), the inode
(u64), and the chunk's number in it (u32). A chunk that several files share stands there for each; the first one counts.
It is only a hint: who uses an inode of it looks the inode up.
"""

from __future__ import annotations

import mmap
from bisect import bisect_left, bisect_right
from pathlib import Path

from nydusfs.segments import BLOCK

ROW_SIZE = 20


class FileMap:
    """Of an image whose body ends at byte `end`. Raises OSError, ValueError for a file that is too short."""

    def __init__(self, path: Path, end: int, rows: int, chunk_size: int) -> None:
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        view = memoryview(self._data)
        if end + rows * ROW_SIZE > len(view):
            raise ValueError("the file map is cut")
        self._chunk_size = chunk_size
        self._keys = view[end : end + 8 * rows].cast("Q")
        self._inodes = view[end + 8 * rows : end + 16 * rows].cast("Q")
        self._within = view[end + 16 * rows : end + 20 * rows].cast("I")

    def find(self, device: int, offset: int) -> tuple[int, int] | None:
        """The inode whose data is at this byte of a device, and the byte of the file that is."""
        wanted = device << 32 | offset // BLOCK
        row = bisect_right(self._keys, wanted) - 1
        if row < 0 or self._keys[row] >> 32 != device:
            return None
        key = self._keys[row]
        row = bisect_left(self._keys, key, 0, row)
        within = offset - (key & 0xFFFF_FFFF) * BLOCK
        if within >= self._chunk_size:
            return None
        return self._inodes[row], self._within[row] * self._chunk_size + within
