"""Any bootstrap as a plain EROFS image whose file data lies on many small devices, every byte made anew, in a stream.

The kernel's format (`fs/erofs/erofs_fs.h`) is what RAFS v6 is made of. Nothing of the bootstrap is believed but through
the loaders, and what they refuse is refused. Same bootstrap and devices, same bytes.

An inode is of the compact form if it can be: 32 bytes instead of 64, so that one with the address of its chunk takes 64
instead of 96, and a walk reads a third less. Since Linux 6.15, which knows what a file may be read from, such an inode
has its own time: whole seconds since the image's epoch, here 1970.

The tree is walked twice, some thousand names at a time: for the places of inodes, which go to a file of four bytes for
each number there may be, and then to write. What the first walk found is kept for the second as far as `KEPT` goes,
which spares images of usual size a third of the time. Inodes lie in the order of the walk, each directory before the
files in it; directories and links have their data behind the inode if a block holds both, like all images here; whole
blocks of directories lie behind all inodes.
"""

from __future__ import annotations

import mmap
import stat
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bootstrap.erofs_devices import Device
from bootstrap.erofs_source import source_of
from bootstrap.errors import BuildError, FormatError
from bootstrap.flat import S_IFMT, Ints, ragged
from bootstrap.layout import v6
from bootstrap.layout.common import round_up
from bootstrap.layout.tables import V6_COMPACT, V6_DIRENT, V6_INODE
from bootstrap.levels import MAX_DEPTH, known_types, refuse
from bootstrap.load_v5 import LoaderV5
from bootstrap.place_v6 import DIRENT_SIZE, dots, listing
from bootstrap.reader import Bootstrap
from bootstrap.write_v6 import FILE_TYPES, dirent_blocks, pack_xattrs

MAX_DEVICES = 0xFFFF
"""A chunk address has 16 bits for the device, and 0 is the image itself."""
MAX_SHORT_SIZE = 0xFFFF_FFFF  # of a compact inode
B = v6.BLOCK_SIZE
SLOT = v6.NID_UNIT
NAMES = 8192  # at a time, if one directory does not have more
CHUNKS = 16384
KEPT = 16 << 20  # bytes, about: 40,000 files


class References(NamedTuple):
    """Chunks that some files are made of, file by file. `inodes`: the file's number as the bootstrap's reader has it;
    `within`: the chunk's number in it; `at`: where its address lies, for who wrote this; `offsets`: in the uncompressed
    blob; `needed`: bytes of it."""

    inodes: Ints
    within: Ints
    at: Ints
    blobs: Ints
    offsets: Ints
    needed: Ints


Places = Callable[[References], tuple[Ints, Ints]]
"""Of references: the device's number and the byte on it."""


class _Batch(NamedTuple):
    """Directories, and the files met in them for the first time. `inodes`: of both, directories first."""

    directories: Ints
    parents: Ints
    files: Ints


class _Level(NamedTuple):
    """`made`: INODE rows (`flat`); `forms`: bytes of the inode; `heads`: of inode and attributes."""

    made: NDArray[np.void]
    nlinks: NDArray[np.uint32]
    kinds: NDArray[np.uint32]
    forms: Ints
    heads: Ints
    packed: list[bytes]
    targets: list[bytes]


class _Listed(NamedTuple):
    """What stands in directories, one after the other: names, the inodes they stand for and their modes, and how many
    each directory has. `level`: of the directories."""

    level: _Level
    names: list[bytes]
    inodes: Ints
    modes: NDArray[np.uint32]
    counts: Ints


class _Files(NamedTuple):
    level: _Level
    references: Iterable[References]
    weight: int  # bytes of both, about


class ErofsImage:
    """`scan` first. `scratch`: two empty files. All raise FormatError or BuildError."""

    def __init__(self, image: Bootstrap, scratch: IO[bytes], places: IO[bytes], *, xattrs: bool) -> None:
        self._source = source_of(image)
        self._image = image
        self._loader = self._source.loader
        self._chunk_size = image.chunk_size
        self._xattrs = xattrs
        self._scratch = scratch
        places.truncate(-(-8 * self._source.numbers // mmap.PAGESIZE) * mmap.PAGESIZE)
        map_ = mmap.mmap(places.fileno(), 0)
        self._nids = np.frombuffer(map_, "<u4", self._source.numbers)  # by number; 0: no place yet
        self._data = np.frombuffer(map_, "<u4", self._source.numbers, 4 * self._source.numbers)  # blocks of directories
        self._budget = self._loader._budget  # for each walk
        self._at = SLOT  # of the next inode, behind nid 0
        self._blocks = 0  # of directories
        self._kept: list[tuple[_Listed, _Files | None]] = []  # of the first batches
        self._room = KEPT

    # -- the walk

    def scan(self) -> None:
        """Find a place for everything."""
        self._loader._budget = self._budget
        root = np.array([self._loader.root()], np.int64)
        pending = [(root, root, np.zeros(1, np.int64))]  # directories, what they lie in, their depth
        while pending:
            directories, parents, depths = self._next(pending)
            if depths.max() > MAX_DEPTH:
                raise FormatError("directory tree", 0, f"more than {MAX_DEPTH} levels deep")
            listed = self._list(directories)
            inodes, counts = listed.inodes, listed.counts
            self._place_directories(directories, listed)
            kinds = listed.modes & np.uint32(S_IFMT)
            below = kinds == stat.S_IFDIR
            files = np.unique(inodes[~below & (self._nids[inodes] == 0)])
            found = self._place_files(files) if len(files) else None
            self._write_down(_Batch(directories, parents, files), listed, found)
            if below.any():
                whose = np.repeat(np.arange(len(directories)), counts)[below]
                found_below = inodes[below]
                if len(np.unique(found_below)) < len(found_below) or self._nids[found_below].any():
                    raise FormatError("directory tree", 0, "a directory is reached twice")
                self._nids[found_below] = 0xFFFF_FFFF  # it has a name
                pending.append((found_below, directories[whose], depths[whose] + 1))

    def _next(self, pending: list[tuple[Ints, Ints, Ints]]) -> list[Ints]:
        """Take directories with `NAMES` names, or one with more."""
        parts: list[tuple[Ints, ...]] = []
        left = NAMES
        while pending and left > 0:
            columns = pending.pop()
            ends = np.cumsum(self._source.names_in(columns[0]) + 1)
            fit = int(np.searchsorted(ends, left, side="right")) or (0 if parts else 1)
            if fit < len(ends):
                pending.append((columns[0][fit:], columns[1][fit:], columns[2][fit:]))
            if fit:
                parts.append(tuple(column[:fit] for column in columns))
                left -= int(ends[fit - 1])
            if fit < len(ends):
                break
        return [np.concatenate(columns) for columns in zip(*parts, strict=True)]

    def _list(self, directories: Ints) -> _Listed:
        level = self._level(directories)
        names, handles, counts = self._loader.children(directories)
        self._loader._check_names(names, counts, directories)
        inodes = self._source.inode_of(handles)
        return _Listed(level, names, inodes, self._source.modes(inodes), counts)

    def _level(self, handles: Ints) -> _Level:
        loader = self._loader
        loader.targets.clear()
        loader.xattrs.clear()
        loader._known_xattrs.clear()
        if isinstance(loader, LoaderV5):
            loader._tables.clear()
        made = loader.level(handles)
        kinds = made["mode"] & np.uint32(S_IFMT)
        if not self._xattrs:
            made["xattrs"] = -1
        packed = [self._pack(xattrs) for xattrs in loader.xattrs]
        nlinks = self._source.nlinks()
        forms = np.where(_fits_compact(made, nlinks), v6.INODE_COMPACT.size, v6.INODE_EXTENDED.size)
        heads = forms.copy()
        rows = np.flatnonzero(made["xattrs"] >= 0)
        heads[rows] += np.array([len(one) for one in packed], np.int64)[made["xattrs"][rows]]
        return _Level(made, nlinks, kinds, forms, heads, packed, list(loader.targets))

    def _pack(self, xattrs: dict[bytes, bytes]) -> bytes:
        packed = pack_xattrs(xattrs)
        if (len(packed) - v6.XATTR_HEADER.size) // 4 + 1 > 0xFFFF:
            raise BuildError("extended attributes of a file take more than 256 KiB together")
        return packed

    def _place_directories(self, directories: Ints, listed: _Listed) -> None:
        level, names, counts = listed.level, listed.names, listed.counts
        sizes = _listing_sizes(names, counts)
        begins = np.cumsum(counts) - counts
        for row in np.flatnonzero(sizes > B).tolist():
            stored = listing(names, int(begins[row]), int(begins[row] + counts[row]))
            sizes[row] = _size_of(_splits(stored), stored)
        self._put(directories, level.heads, sizes)

    def _put(self, numbers: Ints, heads: Ints, sizes: Ints) -> None:
        """Directories or links, one after the other: their data behind the inode if one block holds both."""
        at, blocks = self._at, self._blocks
        nids, data = [], []
        for head, size, rest in zip(heads.tolist(), sizes.tolist(), (sizes % B).tolist(), strict=True):
            inline = head + rest if rest and head + rest <= B else 0
            if inline and B - at % B < inline:
                at = -(-at // B) * B
            nids.append(at // SLOT)
            data.append(blocks)
            at = -(-(at + (inline or head)) // SLOT) * SLOT
            blocks += size // B if inline else -(-size // B)
        if at // SLOT >= 0xFFFF_FFFF:
            raise BuildError("inodes are more than an image can hold")
        self._nids[numbers], self._data[numbers] = nids, data
        self._at, self._blocks = at, blocks

    def _place_files(self, files: Ints) -> _Files:
        level = self._level(files)
        refuse("inode", ~known_types(level.made["mode"]), files, lambda row: "is of no known type")
        regular, link = level.kinds == stat.S_IFREG, level.kinds == stat.S_IFLNK
        counts = np.where(regular, -(-level.made["size"] // self._chunk_size), 0)
        usual = np.flatnonzero(~link)
        needs = np.where(counts > 0, (level.heads + 7 & ~7) + 8 * counts, level.heads)[usual] + SLOT - 1 & -SLOT
        ends = self._at + np.cumsum(needs)
        self._nids[files[usual]] = (ends - needs) // SLOT
        if len(ends):
            self._at = int(ends[-1])
        self._put(files[link], level.heads[link], level.made["size"][link])
        weight = _weight(level, 120 * len(files) + 48 * int(counts.sum()))
        return _Files(level, list(self._references(files, level)) if weight < self._room else (), weight)

    def _write_down(self, batch: _Batch, listed: _Listed, files: _Files | None) -> None:
        if self._room > 0:
            self._room -= _weight(listed.level, 200 * len(listed.names)) + (files.weight if files is not None else 0)
            if self._room > 0:
                self._kept.append((listed, files))
        head = np.array([len(batch.directories), len(batch.files)], np.int64)
        for column in (head, *batch):
            self._scratch.write(column.astype("<i8").tobytes())

    def _batches(self) -> Iterator[_Batch]:
        self._scratch.seek(0)
        while head := self._scratch.read(16):
            directories, files = np.frombuffer(head, "<i8").tolist()
            columns = [
                np.frombuffer(self._scratch.read(8 * count), "<i8").astype(np.int64)
                for count in (directories, directories, files)
            ]
            yield _Batch(*columns)

    # -- files

    def references(self) -> Iterator[References]:
        """All chunks of all files, in the same order each time. A file of several names comes once."""
        for number, batch in enumerate(self._batches()):
            if len(batch.files):
                yield from self._files(number, batch).references

    def _files(self, number: int, batch: _Batch) -> _Files:
        """Of a batch that has some."""
        if number < len(self._kept):
            kept = self._kept[number][1]
            assert kept is not None
            return kept
        level = self._level(batch.files)
        return _Files(level, self._references(batch.files, level), 0)

    def _references(self, files: Ints, level: _Level) -> Iterator[References]:
        """`level`: of these files, and the loader's last one."""
        sizes = level.made["size"].astype(np.int64)
        rows = np.flatnonzero((level.kinds == stat.S_IFREG) & (sizes > 0))
        counts = -(-sizes[rows] // self._chunk_size)
        # files of many chunks make windows of their own
        for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(np.cumsum(counts) // CHUNKS)) + 1):
            if not len(part):
                continue
            mine, many = rows[part], counts[part]
            if int(many.sum()) * 8 > self._image.size:
                raise FormatError("chunk records", 0, "more than fit the file: inodes overlap")
            blobs, offsets, stored = self._source.chunks(mine, many)
            whose, within = np.repeat(mine, many), ragged(many)
            needed = np.minimum(self._chunk_size, sizes[whose] - within * self._chunk_size)
            short = (stored >= 0) & (stored < needed)
            refuse("chunk record", short, files[whose], lambda row: "is shorter than its part of the file")
            tables = self._nids[files[whose]].astype(np.int64) * SLOT + (level.heads[whose] + 7 & ~7)
            yield References(files[whose], within, tables + 8 * within, blobs, offsets, needed)

    # -- the image

    def size(self, devices: int) -> int:
        """Bytes of the image."""
        return _head(devices) + round_up(self._at, B) + self._blocks * B

    def write(
        self, out: memoryview, devices: Sequence[Device], places: Places, listed: Callable[[], None] = lambda: None
    ) -> None:
        """Fill `out`, of `size` bytes and empty. `listed` is called when the table of devices is there."""
        meta = _head(len(devices))
        root = int(self._nids[self._loader.root()])
        put_superblock(out, devices, inos=self._image.inode_count, meta=meta, root=root)
        listed()
        self._loader._budget = self._budget
        slots, words = np.frombuffer(out, "V32"), np.frombuffer(out, "<u8")
        self._data += np.uint32((meta + round_up(self._at, B)) // B)
        for number, batch in enumerate(self._batches()):
            inside = self._kept[number][0] if number < len(self._kept) else self._list(batch.directories)
            listings = self._listings(batch, inside)
            lengths = np.fromiter(map(len, listings), np.int64, len(listings))
            self._write_inodes(out, slots, meta, batch.directories, inside.level, lengths, listings)
            if not len(batch.files):
                continue
            level, references, _ = self._files(number, batch)
            self._write_inodes(out, slots, meta, batch.files, level, level.made["size"], level.targets)
            for found in references:
                device, byte = places(found)
                address = (device.astype(np.uint64) + np.uint64(1)) << np.uint64(16)
                words[(meta + found.at) // 8] = address | (byte // B).astype(np.uint64) << np.uint64(32)
        del slots, words

    def _write_inodes(
        self,
        out: memoryview,
        slots: NDArray[np.void],
        meta: int,
        numbers: Ints,
        level: _Level,
        sizes: Ints,
        bodies: list[bytes],
    ) -> None:
        """`bodies`: of the directories and links among them, in their order."""
        source, kinds = level.made, level.kinds
        regular, flat = kinds == stat.S_IFREG, (kinds == stat.S_IFDIR) | (kinds == stat.S_IFLNK)
        rest = sizes % B
        inline = flat & (rest > 0) & (level.heads + rest <= B)
        layout = np.where(inline, v6.LAYOUT_FLAT_INLINE, v6.LAYOUT_FLAT_PLAIN)
        layout[regular] = v6.LAYOUT_CHUNK_BASED
        nids = self._nids[numbers].astype(np.int64)
        made = np.zeros(len(numbers), V6_INODE)
        wide = level.forms == v6.INODE_EXTENDED.size
        made["format"] = np.where(wide, v6.FORMAT_EXTENDED, 0) | layout << 1
        made["size"] = np.where(regular | flat, sizes, 0)
        if (made["size"][~wide] > MAX_SHORT_SIZE).any():
            raise BuildError("a directory is larger than an image can hold")
        made["union"] = np.where(flat, self._data[numbers], source["rdev"])
        made["union"][regular] = v6.CHUNK_FORMAT_INDEXES | self._chunk_size.bit_length() - B.bit_length()
        made["ino"] = nids & 0xFFFF_FFFF
        made["nlink"] = level.nlinks
        for field in ("mode", "uid", "gid", "mtime", "mtime_nsec"):
            made[field] = source[field]
        with_xattrs = np.flatnonzero(source["xattrs"] >= 0)
        areas = level.heads[with_xattrs] - level.forms[with_xattrs]
        made["xattr_icount"][with_xattrs] = (areas - v6.XATTR_HEADER.size) // 4 + 1
        at = meta // SLOT + nids
        halves = made[wide].view("V32").reshape(-1, 2)
        slots[at[wide]], slots[at[wide] + 1] = halves[:, 0], halves[:, 1]
        compact = np.zeros(len(at) - len(halves), V6_COMPACT)
        for field in ("format", "xattr_icount", "mode", "nlink", "size", "mtime", "union", "ino", "uid", "gid"):
            compact[field] = made[field][~wide]
        slots[at[~wide]] = compact.view("V32")
        begins = (at[with_xattrs] * SLOT + level.forms[with_xattrs]).tolist()
        for offset, number in zip(begins, source["xattrs"][with_xattrs].tolist(), strict=True):
            packed = level.packed[number]
            out[offset : offset + len(packed)] = packed
        rows = np.flatnonzero(flat)
        behind = (at[rows] * SLOT + level.heads[rows]).tolist()
        apart = (self._data[numbers[rows]].astype(np.int64) * B).tolist()
        for body, close, far, near in zip(bodies, inline[rows].tolist(), apart, behind, strict=True):
            whole = len(body) // B * B if close else len(body)
            out[far : far + whole] = body[:whole]
            out[near : near + len(body) - whole] = body[whole:]

    def _listings(self, batch: _Batch, listed: _Listed) -> list[bytes]:
        """What stands in each of the directories. Those of one block with nothing before "..": all at once."""
        names, counts = listed.names, listed.counts
        nids = self._nids[listed.inodes].astype(np.int64)
        types = FILE_TYPES[listed.modes >> np.uint32(12)]
        own, up = self._nids[batch.directories].astype(np.int64), self._nids[batch.parents].astype(np.int64)
        begins = np.cumsum(counts) - counts
        totals = counts + 2
        starts = np.cumsum(totals) - totals
        lengths = np.ones(int(totals.sum()), np.int64)
        dirents = np.zeros(len(lengths), V6_DIRENT)
        child = np.repeat(starts - begins + 2, counts) + np.arange(len(names))
        lengths[starts + 1] = 2
        lengths[child] = np.fromiter(map(len, names), np.int64, len(names))
        dirents["nid"][starts], dirents["nid"][starts + 1], dirents["nid"][child] = own, up, nids
        dirents["type"][starts] = dirents["type"][starts + 1] = FILE_TYPES[stat.S_IFDIR >> 12]
        dirents["type"][child] = types
        ends = np.cumsum(lengths)
        dirents["nameoff"] = ends - lengths + np.repeat(totals * DIRENT_SIZE - (ends - lengths)[starts], totals)
        heads = dirents.tobytes()
        found = []
        sizes = _listing_sizes(names, counts).tolist()
        for row, (begin, count) in enumerate(zip(begins.tolist(), counts.tolist(), strict=True)):
            end, start = begin + count, int(starts[row])
            one, two = dots(names, begin, end)
            if sizes[row] <= B and (one, two) == (0, 0):
                text = b"".join(names[begin:end])
                found.append(b"".join((heads[start * DIRENT_SIZE : (start + 2 + count) * DIRENT_SIZE], b"...", text)))
                continue
            here = np.insert(nids[begin:end], (one, two), (own[row], up[row]))
            kinds = np.insert(types[begin:end], (one, two), FILE_TYPES[stat.S_IFDIR >> 12])
            stored = listing(names, begin, end)
            found.append(dirent_blocks(stored, here, kinds, _splits(stored), B))
        return found


def _weight(level: _Level, rest: int) -> int:
    return rest + sum(map(len, level.packed)) + sum(map(len, level.targets))


def _fits_compact(made: NDArray[np.void], nlinks: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Which inodes the short form can hold."""
    short = (made["uid"] <= 0xFFFF) & (made["gid"] <= 0xFFFF) & (nlinks <= 0xFFFF) & (made["size"] <= MAX_SHORT_SIZE)
    found: NDArray[np.bool_] = short & (made["mtime_nsec"] == 0) & (made["mtime"] >= 0) & (made["mtime"] <= 0xFFFF_FFFF)
    return found


def _listing_sizes(names: list[bytes], counts: Ints) -> Ints:
    """Bytes of each directory if one block holds it."""
    ends = np.concatenate(([0], np.cumsum(np.fromiter(map(len, names), np.int64, len(names)))))
    last = np.cumsum(counts)
    found: Ints = 2 * DIRENT_SIZE + 3 + DIRENT_SIZE * counts + ends[last] - ends[last - counts]
    return found


def _splits(stored: list[bytes]) -> list[int]:
    """Where the blocks of a directory begin, the end included."""
    ends = list(accumulate([DIRENT_SIZE + len(name) for name in stored]))
    borders = [0]
    while (border := bisect_right(ends, B + (ends[borders[-1] - 1] if borders[-1] else 0))) < len(ends):
        borders.append(border)
    return [*borders, len(ends)]


def _size_of(splits: list[int], stored: list[bytes]) -> int:
    last = stored[splits[-2] :]
    return (len(splits) - 2) * B + DIRENT_SIZE * len(last) + sum(map(len, last))


def _head(devices: int) -> int:
    return round_up(v6.DEVICE_TABLE_OFFSET + v6.DEVICE_SLOT.size * devices, B)


def put_superblock(
    image: bytearray | memoryview, devices: Sequence[Device], *, inos: int, meta: int, root: int
) -> None:
    """Superblock and device table of an image whose inodes begin at byte `meta`."""
    for number, device in enumerate(devices):
        slot = v6.DEVICE_TABLE_OFFSET + v6.DEVICE_SLOT.size * number
        v6.DEVICE_SLOT.pack_into(image, slot, device.tag.encode(), device.blocks, 0)
    v6.SUPERBLOCK.pack_into(
        image,
        v6.SUPER_OFFSET,
        *v6.Superblock(
            feature_compat=0,
            root_nid=root,
            inos=inos,
            blocks=len(image) // B,
            meta_blkaddr=meta // B,
            extra_devices=len(devices),
        ),
    )
