"""A v6 bootstrap as a plain EROFS image, in a stream: its inodes and directories stay where they are to each other.

A v6 bootstrap is an EROFS image with tables. So nothing has to be built: the part with inodes and directories is copied
behind a new superblock and device table, and only what names a place changes: the chunk addresses of files, and the
block numbers of directories and links whose data does not lie behind their inode. Memory is that of one window of
inodes and a bit for each 32 bytes, whatever the number of files.

The kernel parses what is copied, and a bootstrap may come from anybody. So the copy is made of regular images only:
each inode, directory block and attribute area is checked as `LoaderV6` checks it and they do not overlap, directories
are sorted, have their dots and are reached once. For all others there is `write_erofs`, which makes every byte anew.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from operator import lt
from typing import IO

import numpy as np
from numpy.typing import NDArray

from bootstrap.erofs_devices import Device
from bootstrap.errors import RafsError
from bootstrap.flat import S_IFMT, Ints, ragged
from bootstrap.layout import v6
from bootstrap.layout.common import MAX_NAME, BlobFeatures, SuperFlags, round_up
from bootstrap.levels import MAX_DEPTH, MAX_NSEC
from bootstrap.load import blob_info
from bootstrap.load_v6 import LoaderV6
from bootstrap.reader_v6 import BootstrapV6
from bootstrap.write_erofs import Places, References, put_superblock

B = v6.BLOCK_SIZE
WINDOW = 4096  # inodes at a time
DIRECTORY_BYTES = 128 << 10  # of dirents at a time
COPY_BYTES = 1 << 20
KNOWN_ATTRIBUTES = 4096  # attribute areas remembered: most occur many times
MAX_TYPE = 7  # EROFS_FT_SYMLINK, the last one
_START, _INSIDE = 1, 2


class IrregularError(RafsError):
    """No image to be copied; `write_erofs` may be able to write it."""


class ImageCopy(LoaderV6):
    """`scan` first. `scratch`: an empty file for 8 bytes per inode. All raise `IrregularError` or FormatError."""

    def __init__(self, image: BootstrapV6, scratch: IO[bytes]) -> None:
        super().__init__(image, [blob_info(blob) for blob in image.blobs])
        if image.flags & SuperFlags.TARFS or image.block_size != B:
            raise IrregularError("blocks of other sizes than 4096 bytes")
        if any(blob.features & (BlobFeatures.EXTERNAL | BlobFeatures.IS_CHUNKDICT_GENERATED) for blob in image.blobs):
            raise IrregularError("external blobs or a chunk dictionary")
        self._scratch = scratch
        table = image.ext.chunk_table_offset if image.ext.chunk_table_size else 0
        self._end = table if table > self._meta else image.size // B * B
        self._claims = np.zeros(image.size // v6.NID_UNIT + 2, np.uint8)
        self._attributes: set[bytes] = set()
        self.has_attributes = False

    # -- the walk

    def scan(self) -> None:
        """Check everything that would be copied, and write down which inodes have places."""
        root = np.array([self.root()], np.int64)
        self._inodes(root)
        pending: list[tuple[int, Ints, Ints]] = [(0, root, root)]  # depth, directories, what they lie in
        while pending:
            batch: list[tuple[Ints, Ints]] = []
            depth = count = 0
            while pending and count < WINDOW:
                level, nids, parents = pending.pop()
                room = WINDOW - count
                if len(nids) > room:
                    pending.append((level, nids[room:], parents[room:]))
                batch.append((nids[:room], parents[:room]))
                depth, count = max(depth, level), count + len(nids)
            if depth > MAX_DEPTH:
                raise IrregularError(f"more than {MAX_DEPTH} levels deep")
            directories, above = (np.concatenate(column) for column in zip(*batch, strict=True))
            for found, whose in self._listed(directories, above):
                below = self._inodes(found)
                if below.any():
                    pending.append((depth + 1, found[below], whose[below]))

    def _listed(self, directories: Ints, parents: Ints) -> Iterator[tuple[Ints, Ints]]:
        """The inodes in these directories and the one each is in, some at a time."""
        self._raw, self._payloads = self._decode(directories)
        owner, starts, spans = self._dirent_blocks(directories)
        dots = np.zeros(len(directories), np.int64)
        window = np.cumsum(spans) // DIRECTORY_BYTES
        last, last_owner = b"", -1
        for part in np.split(np.arange(len(starts)), np.flatnonzero(np.diff(window)) + 1):
            if not len(part):
                continue
            entries = self._dirents(starts[part], spans[part])
            if (entries.types > MAX_TYPE).any():
                raise IrregularError("a type of file that is none")
            whose = owner[part][entries.within]
            names = self._names(entries.begins, entries.ends)
            ascending = np.fromiter(map(lt, [last, *names], names), np.bool_, len(names))
            if not (ascending | np.diff(whose, prepend=last_owner).astype(np.bool_)).all():
                raise IrregularError("a directory is not sorted")
            text = b"".join(names)
            if b"/" in text or b"\0" in text or max(map(len, names)) > MAX_NAME:
                raise IrregularError("a name that is none")
            last, last_owner = names[-1], int(whose[-1])
            kept, own = ~entries.dots, np.flatnonzero(entries.dots)
            short = entries.ends[own] - entries.begins[own] == 1
            if (entries.nids[own] != np.where(short, directories[whose[own]], parents[whose[own]])).any():
                raise IrregularError("dots that lead elsewhere")
            dots += np.bincount(whose[own], minlength=len(directories))
            self.spend(len(names))
            yield entries.nids[kept], directories[whose[kept]]
        if (dots != 2).any():
            raise IrregularError("a directory without its dots")

    def _inodes(self, nids: Ints) -> NDArray[np.bool_]:
        """Check inodes that a directory names; which are directories."""
        at = self._meta + v6.NID_UNIT * nids
        inside = (nids > 0) & (at >= self._meta) & (at < self._end)
        if not inside.all():
            raise IrregularError("an inode outside of the inodes' part")
        known = self._claims[at // v6.NID_UNIT] == _START
        again, _ = self._decode(nids[known])
        fresh, counts = np.unique(nids[~known], return_counts=True)
        raw, payloads = self._decode(fresh)
        kinds = raw["mode"] & S_IFMT
        if ((kinds == stat.S_IFDIR) & (counts > 1)).any() or (again["mode"] & S_IFMT == stat.S_IFDIR).any():
            raise IrregularError("a directory is reached twice")
        self._claim(fresh, raw, payloads)
        if (raw["mtime_nsec"] > MAX_NSEC).any():
            raise IrregularError("times of more than a second")
        self._check_attributes(fresh, raw, payloads)
        for nid in fresh[kinds == stat.S_IFLNK].tolist():
            self._image.readlink(nid)
        placed = (kinds == stat.S_IFREG) | (kinds == stat.S_IFDIR) | (kinds == stat.S_IFLNK)
        self._scratch.write(fresh[placed & (raw["size"] > 0)].astype("<i8").tobytes())
        return np.isin(nids, fresh[kinds == stat.S_IFDIR])

    def _claim(self, nids: Ints, raw: NDArray[np.void], payloads: Ints) -> None:
        """What an inode consists of belongs to it alone."""
        kinds, layouts = raw["mode"] & S_IFMT, raw["format"] >> 1
        sizes = raw["size"].astype(np.int64)
        regular, filled = kinds == stat.S_IFREG, sizes > 0
        flat = (kinds == stat.S_IFDIR) | (kinds == stat.S_IFLNK)
        if (regular & filled & (layouts != v6.LAYOUT_CHUNK_BASED)).any() or (regular & (layouts & 1 != 0)).any():
            raise IrregularError("a file that is not made of chunks")
        inline = flat & (layouts == v6.LAYOUT_FLAT_INLINE)
        if (flat & ~inline & (layouts != v6.LAYOUT_FLAT_PLAIN)).any():
            raise IrregularError("a directory or link of an unknown layout")
        begins = self._meta + v6.NID_UNIT * nids
        ends = payloads.copy()
        counts = -(-sizes // self._chunk_size)
        ends[regular & filled] = ((payloads + 7 & ~7) + 8 * counts)[regular & filled]
        ends[inline] += sizes[inline] % B
        # an inline rest must not cross a block; all others may
        crossing = inline & (sizes % B > 0) & (payloads // B != (ends - 1) // B)
        if crossing.any():
            raise IrregularError("an inline rest crosses a block")
        bodies = np.where(inline, sizes // B * B, np.where(flat, sizes, 0))
        data = raw["union"].astype(np.int64) * B
        apart = np.flatnonzero(bodies > 0)
        self._take(begins, ends, _START)
        self._take(data[apart], data[apart] + bodies[apart], _INSIDE)

    def _take(self, begins: Ints, ends: Ints, mark: int) -> None:
        if not len(begins):
            return
        if (begins < self._meta).any() or (ends > self._end).any():
            raise IrregularError("data outside of the inodes' part")
        first = begins // v6.NID_UNIT
        counts = (ends - 1) // v6.NID_UNIT - first + 1
        if int(counts.sum()) > len(self._claims):
            raise IrregularError("structures overlap")
        slots = np.repeat(first, counts) + ragged(counts)
        if self._claims[slots].any() or len(np.unique(slots)) != len(slots):
            raise IrregularError("structures overlap")
        self._claims[slots] = _INSIDE
        self._claims[first] = mark

    def _check_attributes(self, nids: Ints, raw: NDArray[np.void], payloads: Ints) -> None:
        rows = np.flatnonzero(raw["xattr_icount"])
        self.has_attributes |= bool(len(rows))
        starts = self._meta + v6.NID_UNIT * nids + np.where(raw["format"] & 1, 64, 32)
        for row in rows.tolist():
            area = self._data[int(starts[row]) : int(payloads[row])]
            if area in self._attributes:
                continue
            if v6.XATTR_HEADER.unpack_from(area)[1]:
                raise IrregularError("shared attributes")
            self._image.xattrs(int(nids[row]))
            if len(self._attributes) >= KNOWN_ATTRIBUTES:
                self._attributes.clear()
            self._attributes.add(area)

    # -- files

    def _placed(self) -> Iterator[tuple[Ints, NDArray[np.void], Ints]]:
        self._scratch.seek(0)
        while data := self._scratch.read(8 * WINDOW):
            nids = np.frombuffer(data, "<i8").astype(np.int64)
            yield nids, *self._decode(nids)

    def references(self) -> Iterator[References]:
        """All chunks of all files, in the same order each time. A file of several names comes once."""
        addresses = np.frombuffer(self._data, "<u8", self._image.size // 8)
        for nids, raw, payloads in self._placed():
            rows = np.flatnonzero(raw["mode"] & S_IFMT == stat.S_IFREG)
            sizes = raw["size"][rows].astype(np.int64)
            counts = -(-sizes // self._chunk_size)
            ends = np.cumsum(counts)
            # files of many chunks make windows of their own
            for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(ends // (4 * WINDOW))) + 1):
                if not len(part):
                    continue
                whose = np.repeat(part, counts[part])
                within = ragged(counts[part])
                at = (payloads[rows][whose] + 7 & ~7) + 8 * within
                found = addresses[at // 8]
                blobs = (found >> np.uint64(16) & np.uint64(0xFF)).astype(np.int64) - 1
                if ((blobs < 0) | (blobs >= len(self._blobs))).any():
                    raise IrregularError("a chunk of a blob that is not there")
                offsets = (found >> np.uint64(32)).astype(np.int64) * B
                needed = np.minimum(self._chunk_size, sizes[whose] - within * self._chunk_size)
                yield References(nids[rows][whose], within, at, blobs, offsets, needed)

    # -- the copy

    def size(self, devices: int) -> int:
        """Bytes of the image."""
        return self._head(devices) + self._end - self._meta

    @staticmethod
    def _head(devices: int) -> int:
        return round_up(v6.DEVICE_TABLE_OFFSET + v6.DEVICE_SLOT.size * devices, B)

    def write(self, out: memoryview, devices: Sequence[Device], places: Places) -> None:
        """Fill `out`, of `size` bytes and empty."""
        head = self._head(len(devices))
        for begin in range(self._meta, self._end, COPY_BYTES):
            piece = self._data[begin : min(begin + COPY_BYTES, self._end)]
            out[head + begin - self._meta :][: len(piece)] = piece
        shift = head - self._meta
        words, halves = np.frombuffer(out, "<u8"), np.frombuffer(out, "<u4")
        bits = v6.CHUNK_FORMAT_INDEXES | self._chunk_size.bit_length() - B.bit_length()
        for nids, raw, _ in self._placed():
            unions = (self._meta + v6.NID_UNIT * nids + shift + 16) // 4
            regular = raw["mode"] & S_IFMT == stat.S_IFREG
            sizes = raw["size"].astype(np.int64)
            apart = ~regular & ((raw["format"] >> 1 == v6.LAYOUT_FLAT_PLAIN) | (sizes >= B))
            halves[unions[regular]] = bits
            halves[unions[apart]] = raw["union"][apart].astype(np.int64) + shift // B
        for found in self.references():
            device, byte = places(found)
            address = (device.astype(np.uint64) + np.uint64(1)) << np.uint64(16)
            words[(found.at + shift) // 8] = address | (byte // B).astype(np.uint64) << np.uint64(32)
        del words, halves
        image = self._image
        put_superblock(out, devices, inos=image.inode_count, meta=head, root=image.root)
