"""What the EROFS writer asks a bootstrap's loader beside its levels: v5 and v6 alike."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from bootstrap.flat import Ints, ragged
from bootstrap.layout import v5, v6
from bootstrap.layout.tables import CHUNK
from bootstrap.levels import Loader, refuse
from bootstrap.load import blob_info
from bootstrap.load_v5 import LoaderV5
from bootstrap.load_v6 import LoaderV6
from bootstrap.place_v6 import DIRENT_SIZE
from bootstrap.reader import Bootstrap, BootstrapV5, BootstrapV6


class Source(ABC):
    """What a loader does not tell about what its `level` was last called with, and where numbers of inodes end."""

    loader: Loader
    numbers: int

    @abstractmethod
    def inode_of(self, handles: Ints) -> Ints:
        """The inodes that names stand for: several names may be one."""

    @abstractmethod
    def modes(self, handles: Ints) -> NDArray[np.uint32]: ...
    @abstractmethod
    def names_in(self, handles: Ints) -> Ints:
        """About how many names these directories have, before anything is made for them."""

    @abstractmethod
    def nlinks(self) -> NDArray[np.uint32]: ...
    @abstractmethod
    def chunks(self, rows: Ints, counts: Ints) -> tuple[Ints, Ints, Ints]:
        """Of these files: the blob of each chunk, its offset there, and the bytes it has, -1: not told."""


class _V5(Source):
    def __init__(self, image: BootstrapV5) -> None:
        self.loader = self._v5 = LoaderV5(image, [blob_info(blob) for blob in image.blobs])
        self.numbers = image.node_count() + 1
        self._size = image.size
        self._blobs = len(image.blobs)
        self._words = np.frombuffer(image.data, "<u8", image.size // 8)

    def _at(self, handles: Ints) -> Ints:
        at = self._v5._offsets[handles - 1]
        outside = (at <= v5.SUPER_SIZE) | (at + v5.INODE.size > self._size)
        refuse("inode table", outside, at, lambda row: f"record at {at[row]:#x} lies outside the file")
        return at

    def inode_of(self, handles: Ints) -> Ints:
        at = self._at(handles)
        inos = self._words[at // 8 + 5]
        bad = (inos == 0) | (inos >= np.uint64(self.numbers))
        refuse("inode", bad, at, lambda row: f"number {inos[row]} in slot {handles[row]} leads nowhere")
        found: Ints = inos.astype(np.int64)
        again = self._words[self._at(found) // 8 + 5]
        refuse("inode", again != inos, at, lambda row: f"number {inos[row]} in slot {handles[row]} leads nowhere")
        return found

    def modes(self, handles: Ints) -> NDArray[np.uint32]:
        return (self._words[self._at(handles) // 8 + 7] >> np.uint64(32)).astype(np.uint32)

    def names_in(self, handles: Ints) -> Ints:
        found: Ints = (self._words[self._at(handles) // 8 + 12] & np.uint64(0xFFFF_FFFF)).astype(np.int64)
        return found

    def nlinks(self) -> NDArray[np.uint32]:
        found: NDArray[np.uint32] = self._v5._raw["nlink"].copy()  # and not all that the view is of
        return found

    def chunks(self, rows: Ints, counts: Ints) -> tuple[Ints, Ints, Ints]:
        raw, tables = self._v5._raw[rows], self._v5._tables[-1][rows]
        stored = raw["child_count"].astype(np.int64)
        refuse("inode", stored != counts, tables, lambda row: f"{stored[row]} chunks instead of {counts[row]}")
        ends = tables + counts * CHUNK.itemsize
        refuse("chunk records", ends > self._size, tables, lambda row: "reach behind the end of the file")
        at = np.repeat(tables // 8, counts) + ragged(counts) * (CHUNK.itemsize // 8)
        blobs = (self._words[at + 4] & np.uint64(0xFFFF_FFFF)).astype(np.int64)
        wrong = blobs >= self._blobs
        refuse("chunk record", wrong, at * 8, lambda row: f"blob {blobs[row]} of {self._blobs}")
        sizes = (self._words[at + 5] >> np.uint64(32)).astype(np.int64)
        return blobs, self._words[at + 7].astype(np.int64), sizes


class _V6(Source):
    def __init__(self, image: BootstrapV6) -> None:
        self.loader = self._v6 = LoaderV6(image, [blob_info(blob) for blob in image.blobs])
        self.numbers = image.size // v6.NID_UNIT + 1
        self._size = image.size
        self._blobs = len(image.blobs)
        self._addresses = np.frombuffer(image.data, "<u8", image.size // 8)

    def inode_of(self, handles: Ints) -> Ints:
        wrong = (handles <= 0) | (handles >= self.numbers)
        refuse("inode", wrong, handles, lambda row: f"number {handles[row]} lies outside the file")
        return handles

    def modes(self, handles: Ints) -> NDArray[np.uint32]:
        return self._v6._decode(handles)[0]["mode"].astype(np.uint32)

    def names_in(self, handles: Ints) -> Ints:
        return self._v6._decode(handles)[0]["size"].astype(np.int64) // (2 * DIRENT_SIZE)

    def nlinks(self) -> NDArray[np.uint32]:
        found: NDArray[np.uint32] = self._v6._raw["nlink"].copy()
        return found

    def chunks(self, rows: Ints, counts: Ints) -> tuple[Ints, Ints, Ints]:
        layouts = self._v6._raw["format"][rows] >> 1
        tables = self._v6._payloads[rows] + 7 & ~7
        wrong = layouts != v6.LAYOUT_CHUNK_BASED
        refuse("inode", wrong, tables, lambda row: f"data layout {layouts[row]} for a regular file")
        ends = tables + 8 * counts
        refuse("chunk addresses", ends > self._size, tables, lambda row: "reach behind the end of the file")
        at = np.repeat(tables // 8, counts) + ragged(counts)
        found = self._addresses[at]
        blobs = (found >> np.uint64(16) & np.uint64(0xFF)).astype(np.int64) - 1
        wrong = (blobs < 0) | (blobs >= self._blobs)
        refuse("chunk address", wrong, at * 8, lambda row: f"blob {blobs[row]} of {self._blobs}")
        return blobs, (found >> np.uint64(32)).astype(np.int64) * v6.BLOCK_SIZE, np.full(len(found), -1, np.int64)


def source_of(image: Bootstrap) -> Source:
    if isinstance(image, BootstrapV5):
        return _V5(image)
    assert isinstance(image, BootstrapV6)
    return _V6(image)
