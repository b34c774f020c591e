"""Writes a RAFS v5 bootstrap. Reference: RAFS format 2, 3 and 5.5."""

from __future__ import annotations

import hashlib
import stat
from array import array
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from blake3 import blake3

from bootstrap.digest import EMPTY
from bootstrap.errors import BuildError
from bootstrap.flat import LINKED, FlatTree, Ints
from bootstrap.layout import v5
from bootstrap.layout.common import MAX_BLOBS, Digester, SuperFlags, digester_of
from bootstrap.layout.tables import V5_INODE


def write_v5(tree: FlatTree, *, chunk_size: int, flags: SuperFlags, prefetch: Sequence[bytes]) -> bytearray:
    """The whole bootstrap; parameters as for `write_v6`. Raises BuildError for what v5 cannot hold."""
    return _Writer(tree, chunk_size, flags).write(prefetch)


class _Writer:
    def __init__(self, tree: FlatTree, chunk_size: int, flags: SuperFlags) -> None:
        if len(tree.blobs) > MAX_BLOBS:
            raise BuildError(f"{len(tree.blobs)} data blobs; an image can have at most {MAX_BLOBS}")
        self._tree = tree
        self._chunk_size = chunk_size
        self._flags = flags
        self._digester = digester_of(flags)
        self._xattrs = [_pack_xattrs(xattrs) for xattrs in tree.xattrs]
        inodes = tree.inodes
        self._kinds = tree.kinds()
        self._with_xattrs = np.flatnonzero(inodes["xattrs"] >= 0)
        self._name_sizes = np.fromiter(map(len, tree.names), np.int64, len(tree.names))
        self._target_sizes = np.where(self._kinds == stat.S_IFLNK, inodes["size"], 0)
        self._chunk_counts = np.where(self._kinds == stat.S_IFREG, inodes["count"], 0).astype(np.int64)
        self._check()

    def _check(self) -> None:
        tree = self._tree
        if (long := np.flatnonzero(self._target_sizes > v5.MAX_SYMLINK)).size:
            row = int(long[0])
            raise BuildError(f"{tree.path(row)}: link target of {self._target_sizes[row]} bytes")
        wanted = -(-tree.inodes["size"] // self._chunk_size)
        wrong = np.flatnonzero((self._kinds == stat.S_IFREG) & (self._chunk_counts != wanted))
        if wrong.size:
            row = int(wrong[0])
            raise BuildError(f"{tree.path(row)}: {self._chunk_counts[row]} chunks instead of {wanted[row]}")

    def write(self, prefetch: Sequence[bytes]) -> bytearray:
        tree, blobs, count = self._tree, self._tree.blobs, len(self._tree.names)
        targets = tree.prefetch_targets(prefetch)
        prefetch_at = v5.SUPER_SIZE + v5.align8(4 * count)
        blob_table_at = prefetch_at + v5.align8(4 * len(targets))
        text = b"\0".join(v5.READAHEAD.pack(b.readahead_offset, b.readahead_size) + b.id.encode() for b in blobs)
        blob_table = text.ljust(v5.align8(len(text)), b"\0")
        extended_at = blob_table_at + len(blob_table)
        records_at = extended_at + v5.EXT_BLOB.size * len(blobs)
        first_names, nlink = self._links()
        offsets, end = self._offsets(records_at)
        if end > v5.MAX_FILE_SIZE:
            raise BuildError(f"the bootstrap would have {end} bytes; v5 allows {v5.MAX_FILE_SIZE}: use version 6")
        flags = self._flags | (SuperFlags.HAS_XATTR if len(self._with_xattrs) else SuperFlags(0))
        superblock = v5.SUPERBLOCK.pack(
            *v5.Superblock(
                magic=v5.SUPER_MAGIC,
                version=v5.SUPER_VERSION,
                sb_size=v5.SUPER_SIZE,
                block_size=self._chunk_size,
                flags=int(flags),
                inodes_count=int(np.count_nonzero(first_names == np.arange(count))),
                inode_table_offset=v5.SUPER_SIZE,
                prefetch_table_offset=prefetch_at,
                blob_table_offset=blob_table_at,
                inode_table_entries=count,
                prefetch_table_entries=len(targets),
                blob_table_size=len(blob_table),
                extended_blob_table_entries=len(blobs),
                extended_blob_table_offset=extended_at,
            )
        )
        extended = b"".join(
            v5.EXT_BLOB.pack(b.chunk_count, int(b.features), b.uncompressed_size, b.compressed_size) for b in blobs
        )
        image = bytearray(end)
        with memoryview(image) as view:
            view[: len(superblock)] = superblock
            view[v5.SUPER_SIZE :][: 4 * count] = (offsets >> 3).astype("<u4").tobytes()
            view[prefetch_at:][: 4 * len(targets)] = (first_names[targets] + 1).astype("<u4").tobytes()
            view[blob_table_at:extended_at] = blob_table
            view[extended_at:records_at] = extended
            self._write_records(view, offsets, first_names, nlink)
        return image

    def _links(self) -> tuple[Ints, Ints]:
        """As `FlatTree.links`, but for what v5 cannot say.

        Readers refuse an inode number below that of the parent for all but regular files (2.6). Further names of links,
        devices and fifos become files of their own then; upstream writes what its loader refuses.
        """
        first, nlink = self._tree.links()
        lost = (first <= self._tree.parents()) & (first != np.arange(len(first)))
        lost &= (self._kinds != stat.S_IFREG) & (self._kinds != stat.S_IFDIR)
        rows = np.flatnonzero(lost)
        if len(rows):
            first[rows] = rows
            names = np.bincount(first, minlength=len(first))
            other = self._kinds != stat.S_IFDIR
            nlink[other] = names[first[other]]
        return first, nlink

    def _offsets(self, at: int) -> tuple[Ints, int]:
        """Where each record lies, depth first, and where the last one ends."""
        tree = self._tree
        sizes = v5.INODE.size + _align8(self._name_sizes) + _align8(self._target_sizes)
        sizes += self._chunk_counts * tree.chunks.dtype.itemsize
        areas = np.array([len(packed) for packed in self._xattrs], np.int64)
        sizes[self._with_xattrs] += areas[tree.inodes["xattrs"][self._with_xattrs]]
        whole = array("q", sizes.tobytes())  # of a directory: with everything below it
        rows = tree.visits()
        begins = tree.inodes["first"][rows].tolist()
        ends = (tree.inodes["first"][rows] + tree.inodes["count"][rows]).tolist()
        for row, begin, end in zip(reversed(rows), reversed(begins), reversed(ends), strict=True):
            whole[row] += sum(whole[begin:end])
        own = array("q", sizes.tobytes())
        found = array("q", [at]) * len(whole)
        for row, begin, end in zip(rows, begins, ends, strict=True):
            if begin < end:
                found[begin:end] = array("q", accumulate(whole[begin : end - 1], initial=found[row] + own[row]))
        return np.frombuffer(found, np.int64), at + whole[0]

    def _write_records(self, image: memoryview, offsets: Ints, first_names: Ints, nlink: Ints) -> None:
        """Each inode with its name, link target, attributes and chunks."""
        tree = self._tree
        inodes, kinds, names = tree.inodes, self._kinds, tree.names
        _, within, refs = tree.file_refs()
        chunks = tree.chunks[refs]
        chunks["file_offset"] = within * self._chunk_size
        ends = np.cumsum(self._chunk_counts)
        made = np.zeros(len(names), V5_INODE)
        made["digest"] = np.frombuffer(self._digests(chunks["digest"].tobytes(), ends), "V32")
        made["parent"] = tree.parents() + 1
        made["parent"][0] = 0
        made["ino"] = first_names + 1
        made["nlink"] = nlink
        for field in ("uid", "gid", "mode", "rdev", "mtime_nsec", "mtime"):
            made[field] = inodes[field]
        directory = kinds == stat.S_IFDIR
        made["size"] = inodes["size"]
        made["child_index"][directory] = inodes["first"][directory] + 1
        made["child_count"] = inodes["count"]
        made["name_size"] = self._name_sizes
        made["symlink_size"] = self._target_sizes
        flags = np.where(inodes["flags"] & LINKED, v5.INODE_HARDLINK, 0)
        flags |= np.where(kinds == stat.S_IFLNK, v5.INODE_SYMLINK, 0)
        flags[self._with_xattrs] |= v5.INODE_XATTR
        made["flags"] = flags
        areas = np.array([len(packed) - v5.XATTR_TOTAL.size for packed in self._xattrs], np.int64)
        blocks = made["size"].astype(np.int64)
        blocks[self._with_xattrs] += areas[inodes["xattrs"][self._with_xattrs]]
        made["blocks"] = -(-blocks // 512)

        heads, records = made.view("u1").data, chunks.view("u1").data
        size, record = V5_INODE.itemsize, chunks.dtype.itemsize
        for row, (at, name) in enumerate(zip(array("q", offsets.tobytes()), names, strict=True)):
            image[at : at + size] = heads[row * size : row * size + size]
            image[at + size : at + size + len(name)] = name
        behind = offsets + size + _align8(self._name_sizes)
        links = np.flatnonzero(kinds == stat.S_IFLNK)
        for at, number in zip(behind[links].tolist(), inodes["first"][links].tolist(), strict=True):
            target = tree.targets[number]
            image[at : at + len(target)] = target
        behind += _align8(self._target_sizes)
        for row in self._with_xattrs.tolist():
            packed, at = self._xattrs[inodes["xattrs"][row]], int(behind[row])
            image[at : at + len(packed)] = packed
            behind[row] += len(packed)
        files = np.flatnonzero(self._chunk_counts)
        sizes = (self._chunk_counts[files] * record).tolist()
        begin = 0
        for at, count in zip(array("q", behind[files].tobytes()), sizes, strict=True):
            image[at : at + count] = records[begin : begin + count]
            begin += count

    def _digests(self, chunk_digests: bytes, ends: Ints) -> bytearray:
        """Inode digests by row; directories from the end, so that what lies in them is there (section 3)."""
        tree = self._tree
        make = hashlib.sha256 if self._digester == Digester.SHA256 else blake3
        found = bytearray(EMPTY[self._digester]) * len(tree.names)
        files = np.flatnonzero(self._chunk_counts)
        for row, begin, end in zip(
            files.tolist(),
            (32 * (ends - self._chunk_counts)[files]).tolist(),
            (32 * ends[files]).tolist(),
            strict=True,
        ):
            found[32 * row : 32 * row + 32] = make(chunk_digests[begin:end]).digest()
        links = np.flatnonzero(self._kinds == stat.S_IFLNK)
        for row, number in zip(links.tolist(), tree.inodes["first"][links].tolist(), strict=True):
            if target := tree.targets[number]:
                found[32 * row : 32 * row + 32] = make(target).digest()
        rows = tree.visits()
        rows.reverse()
        first, count = tree.inodes["first"][rows].tolist(), tree.inodes["count"][rows].tolist()
        for row, begin, number in zip(rows, first, count, strict=True):
            if number:
                below = found[32 * begin : 32 * (begin + number)]
                found[32 * row : 32 * row + 32] = make(below).digest()
        return found


def _align8(sizes: Ints) -> Ints:
    return (sizes + 7) & ~7


def _pack_xattrs(xattrs: dict[bytes, bytes]) -> bytes:
    """The xattr block: unpadded size, pairs, padding (2.6)."""
    pairs = b"".join(
        v5.XATTR_PAIR.pack(len(name) + 1 + len(value)) + name + b"\0" + value for name, value in xattrs.items()
    )
    return v5.XATTR_TOTAL.pack(len(pairs)) + pairs.ljust(v5.align8(len(pairs)), b"\0")
