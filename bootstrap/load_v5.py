"""A v5 bootstrap as tables. Reference: RAFS format 2.2 - 2.6."""

from __future__ import annotations

import stat

import numpy as np
from numpy.typing import NDArray

from bootstrap.chunktable import BlobInfo
from bootstrap.errors import FormatError
from bootstrap.flat import LINKED, S_IFMT, Ints, ragged
from bootstrap.layout import v5
from bootstrap.layout.common import MAX_NAME
from bootstrap.layout.tables import CHUNK, V5_INODE
from bootstrap.levels import MAX_NSEC, Loader, empty_inodes, known_types, refuse
from bootstrap.reader import BootstrapV5


class LoaderV5(Loader):
    """Handles are table slots and not inode numbers: each name of a hard link has a record of its own."""

    def __init__(self, image: BootstrapV5, blobs: list[BlobInfo]) -> None:
        super().__init__(image.data, blobs, image.node_count())
        self._image = image
        self._chunk_size = image.chunk_size
        table = image.superblock
        offsets = np.frombuffer(image.data, "<u4", table.inode_table_entries, table.inode_table_offset)
        self._offsets = offsets.astype(np.int64) * 8
        self._words = np.frombuffer(image.data, "<u8", image.size // 8)
        self._raw = np.empty(0, V5_INODE)
        """The records of the level in work."""
        self._tables: list[Ints] = []
        """By level and row: where chunk records begin."""

    def root(self) -> int:
        return v5.ROOT_INO

    def offset(self, handle: int) -> int:
        return int(self._offsets[handle - 1])

    def level(self, handles: Ints) -> NDArray[np.void]:
        size = self._image.size
        at = self._offsets[handles - 1]
        entries = self._image.superblock.inode_table_offset + 4 * (handles - 1)
        outside = (at <= v5.SUPER_SIZE) | (at + V5_INODE.itemsize > size)
        refuse("inode table", outside, entries, lambda row: f"record at {at[row]:#x} lies outside the file")
        words = self._words[(at // 8)[:, None] + np.arange(V5_INODE.itemsize // 8)]
        raw = self._raw = words.view(V5_INODE).reshape(-1)
        mode, kinds = raw["mode"], raw["mode"] & np.uint32(S_IFMT)
        refuse("inode", raw["nlink"] == 0, at, lambda row: "link count 0")
        refuse("inode", ~known_types(mode), at, lambda row: f"mode {mode[row]:#o} is of no known type")
        name_sizes = raw["name_size"].astype(np.int64)
        unnamed = (name_sizes == 0) | (name_sizes > MAX_NAME + 1)
        refuse("inode", unnamed, at, lambda row: f"name of {name_sizes[row]} bytes")
        regular, link = kinds == stat.S_IFREG, kinds == stat.S_IFLNK
        largest = np.uint64(size // CHUNK.itemsize * self._chunk_size)
        refuse(
            "inode",
            regular & (raw["size"] > largest),
            at,
            lambda row: f"size {raw['size'][row]} does not fit a bootstrap of {size} bytes",
        )
        refuse(
            "inode",
            regular & (raw["flags"] & np.uint64(v5.INODE_HAS_HOLE) != 0),
            at,
            lambda row: "files with holes are not supported",
        )
        made = empty_inodes(len(raw))
        for name in ("mode", "uid", "gid", "rdev", "mtime"):
            made[name] = raw[name]
        made["mtime_nsec"] = np.minimum(raw["mtime_nsec"], MAX_NSEC)
        made["size"][regular] = raw["size"][regular]
        directory = kinds == stat.S_IFDIR
        made["size"][directory] = np.minimum(raw["size"][directory], np.uint64(size))
        marked = raw["flags"] & np.uint64(v5.INODE_HARDLINK) != 0
        made["flags"] = np.where(marked, LINKED, 0)
        several = (kinds != stat.S_IFDIR) & (marked | (raw["nlink"] > 1))
        made["link"] = np.where(several, raw["ino"], 0)

        tails = at + V5_INODE.itemsize + (name_sizes + 7 & ~7)
        target_sizes = np.where(link, raw["symlink_size"], 0).astype(np.int64)
        refuse("inode", tails + target_sizes > size, at, lambda row: "name or link target end behind the file")
        links = np.flatnonzero(link)
        made["first"][links] = np.arange(len(links)) + len(self.targets)
        made["size"][links] = target_sizes[links]
        for row, start, length in zip(
            links.tolist(), tails[links].tolist(), target_sizes[links].tolist(), strict=True
        ):
            target = self._data[start : start + length]
            if not target or b"\0" in target:
                raise FormatError("symbolic link", int(at[row]), f"target of {length} bytes is empty or has a NUL")
            self.targets.append(target)
        tails += target_sizes + 7 & ~7
        self._tables.append(self._read_xattrs(handles, made, tails))
        return made

    def _read_xattrs(self, handles: Ints, made: NDArray[np.void], tails: Ints) -> Ints:
        """Attribute sets of a level; returns where the chunk records begin. `tails`: where the attributes do."""
        size = self._image.size
        rows = np.flatnonzero(self._raw["flags"] & np.uint64(v5.INODE_XATTR))
        if not len(rows):
            return tails
        at = tails[rows]
        refuse("xattr block", at + 8 > size, at, lambda row: "lies behind the end of the file")
        totals = self._words[at // 8]
        refuse(
            "xattr block",
            totals > (size - at - 8).astype(np.uint64),
            at,
            lambda row: f"{totals[row]} bytes reach behind the end of the file",
        )
        lengths = totals.astype(np.int64)
        for row, start, length in zip(rows.tolist(), (at + 8).tolist(), lengths.tolist(), strict=True):
            slot = int(handles[row])
            area = self._data[start : start + length]
            made["xattrs"][row] = self.add_xattrs(area, lambda slot=slot: self._image.xattrs(slot))  # type: ignore[misc]
        found = tails.copy()
        found[rows] += 8 + (lengths + 7 & ~7)
        return found

    def children(self, handles: Ints) -> tuple[list[bytes], Ints, Ints]:
        rows = np.flatnonzero(self._raw["mode"] & np.uint32(S_IFMT) == stat.S_IFDIR)
        first = self._raw["child_index"][rows].astype(np.int64)
        counts = self._raw["child_count"][rows].astype(np.int64)
        wrong = (counts > 0) & ((first <= handles) | (first + counts - 1 > len(self._offsets)))
        refuse(
            "inode",
            wrong,
            self._offsets[handles - 1],
            lambda row: f"children {first[row]} to {first[row] + counts[row] - 1} of directory {handles[row]}",
        )
        self.spend(int(counts.sum()))
        slots = np.repeat(first, counts) + ragged(counts)
        at = self._offsets[slots - 1]
        entries = self._image.superblock.inode_table_offset + 4 * (slots - 1)
        outside = (at <= v5.SUPER_SIZE) | (at + V5_INODE.itemsize > self._image.size)
        refuse("inode table", outside, entries, lambda row: f"record at {at[row]:#x} lies outside the file")
        lengths = (self._words[at // 8 + 12] >> np.uint64(32) & np.uint64(0xFFFF)).astype(np.int64)
        begins = at + V5_INODE.itemsize
        text = self._data
        names = [text[a:b] for a, b in zip(begins.tolist(), (begins + lengths).tolist(), strict=True)]
        for row in np.flatnonzero(lengths <= 2).tolist():
            if names[row] in (b".", b".."):
                raise FormatError("inode", int(at[row]), f"{names[row]!r} is no usable name")
        return names, slots, counts

    def chunks(self, handles: Ints, inodes: NDArray[np.void]) -> tuple[Ints, NDArray[np.void]]:
        size = self._image.size
        rows = np.flatnonzero(inodes["mode"] & S_IFMT == stat.S_IFREG)
        tables = np.concatenate(self._tables)[rows]
        at = self._offsets[handles[rows] - 1]
        counts = -(-inodes["size"][rows] // self._chunk_size)
        stored = (self._words[at // 8 + 12] & np.uint64(0xFFFFFFFF)).astype(np.int64)
        refuse("inode", stored != counts, at, lambda row: f"{stored[row]} chunks for {inodes['size'][rows[row]]} bytes")
        refuse(
            "chunk records",
            tables + counts * CHUNK.itemsize > size,
            tables,
            lambda row: f"{counts[row]} reach behind the end of the file",
        )
        if int(counts.sum()) * CHUNK.itemsize > size:
            raise FormatError("chunk records", 0, "more than fit the file: inodes overlap")
        words = CHUNK.itemsize // 8
        starts = np.repeat(tables // 8, counts) + ragged(counts) * words
        records = self._words[starts[:, None] + np.arange(words)].view(CHUNK).reshape(-1)
        blobs = records["blob"]
        refuse(
            "chunk record",
            blobs >= len(self._blobs),
            starts * 8,
            lambda row: f"blob {blobs[row]} of {len(self._blobs)}",
        )
        inodes["first"][rows] = np.cumsum(counts) - counts
        inodes["count"][rows] = counts
        return np.arange(len(records)), records
