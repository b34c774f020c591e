"""Any bootstrap as a plain EROFS image whose file data lies on many small devices, every byte made anew, in a stream.

The kernel's format (`fs/erofs/erofs_fs.h`) is what RAFS v6 is made of. Nothing of the bootstrap is believed but through
the loaders, and what they refuse is refused. Same bootstrap and devices, same bytes.

An inode is of the compact form if it can be: 32 bytes instead of 64, so that one with the address of its chunk takes 64
instead of 96, and a walk reads a third less. Since Linux 6.15, which knows what a file may be read from, such an inode
has its own time: whole seconds since the image's epoch, here 1970.

The tree is walked twice, some thousand names at a time: for the places of inodes, which go to a file of four bytes for
each number there may be, and then to write. Inodes lie in the order of the walk, each directory before the files in it;
directories and links have their data behind the inode if a block holds both, like all images here; whole blocks of
directories lie behind all inodes.
"""

from __future__ import annotations

import mmap
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bootstrap.erofs_devices import Device
from bootstrap.errors import BuildError, FormatError
from bootstrap.flat import S_IFMT, Ints, ragged
from bootstrap.layout import v5, v6
from bootstrap.layout.common import round_up
from bootstrap.layout.tables import CHUNK, V6_COMPACT, V6_DIRENT, V6_INODE
from bootstrap.levels import MAX_DEPTH, Loader, known_types, refuse
from bootstrap.load import blob_info
from bootstrap.load_v5 import LoaderV5
from bootstrap.load_v6 import LoaderV6
from bootstrap.place_v6 import DIRENT_SIZE, dots, listing
from bootstrap.reader import Bootstrap, BootstrapV5, BootstrapV6
from bootstrap.write_v6 import FILE_TYPES, dirent_blocks, pack_xattrs

MAX_DEVICES = 0xFFFF
"""A chunk address has 16 bits for the device, and 0 is the image itself."""
MAX_SHORT_SIZE = 0xFFFF_FFFF  # of a compact inode
B = v6.BLOCK_SIZE
SLOT = v6.NID_UNIT
NAMES = 8192  # at a time, if one directory does not have more
CHUNKS = 16384


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


class _Source(ABC):
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


class _V5(_Source):
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
        found: NDArray[np.uint32] = self._v5._raw["nlink"]
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


class _V6(_Source):
    def __init__(self, image: BootstrapV6) -> None:
        self.loader = self._v6 = LoaderV6(image, [blob_info(blob) for blob in image.blobs])
        self.numbers = image.size // SLOT + 1
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
        found: NDArray[np.uint32] = self._v6._raw["nlink"]
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
        return blobs, (found >> np.uint64(32)).astype(np.int64) * B, np.full(len(found), -1, np.int64)


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


class ErofsImage:
    """`scan` first. `scratch`: two empty files. All raise FormatError or BuildError."""

    def __init__(self, image: Bootstrap, scratch: IO[bytes], places: IO[bytes], *, xattrs: bool) -> None:
        if isinstance(image, BootstrapV5):
            self._source: _Source = _V5(image)
        else:
            assert isinstance(image, BootstrapV6)
            self._source = _V6(image)
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

    # -- the walk

    def scan(self) -> None:
        """Find a place for everything."""
        self._loader._budget = self._budget
        root = np.array([self._loader.root()], np.int64)
        pending: list[tuple[int, Ints, Ints]] = [(0, root, root)]  # depth, directories, what they lie in
        while pending:
            depth, directories, parents = pending.pop()
            if depth > MAX_DEPTH:
                raise FormatError("directory tree", 0, f"more than {MAX_DEPTH} levels deep")
            fit = int(np.searchsorted(np.cumsum(self._source.names_in(directories) + 1), NAMES)) or 1
            if fit < len(directories):
                pending.append((depth, directories[fit:], parents[fit:]))
                directories, parents = directories[:fit], parents[:fit]
            level = self._level(directories)
            names, handles, counts = self._children(directories)
            self._place_directories(directories, level, names, counts)
            inodes = self._source.inode_of(handles)
            kinds = self._source.modes(inodes) & np.uint32(S_IFMT)
            below = kinds == stat.S_IFDIR
            files = np.unique(inodes[~below & (self._nids[inodes] == 0)])
            self._place_files(files)
            self._write_down(_Batch(directories, parents, files))
            if below.any():
                found = inodes[below]
                if len(np.unique(found)) < len(found) or self._nids[found].any():
                    raise FormatError("directory tree", 0, "a directory is reached twice")
                whose = np.repeat(directories, counts)[below]
                self._nids[found] = 0xFFFF_FFFF  # it has a name
                pending.append((depth + 1, found, whose))

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

    def _children(self, directories: Ints) -> tuple[list[bytes], Ints, Ints]:
        names, handles, counts = self._loader.children(directories)
        self._loader._check_names(names, counts, directories)
        return names, handles, counts

    def _place_directories(self, directories: Ints, level: _Level, names: list[bytes], counts: Ints) -> None:
        sizes = _listing_sizes(names, counts)
        begins = (np.cumsum(counts) - counts).tolist()
        for row, size in enumerate(sizes.tolist()):
            number = int(directories[row])
            if size > B:
                stored = listing(names, begins[row], begins[row] + int(counts[row]))
                size = _size_of(_splits(stored), stored)
            self._data[number] = self._blocks
            self._nids[number] = self._put(int(level.heads[row]), size)

    def _put(self, head: int, size: int) -> int:
        """A directory or link: its data behind the inode if one block holds both. Its number."""
        rest = size % B
        inline = head + rest if rest and head + rest <= B else 0
        if inline and B - self._at % B < inline:
            self._at = round_up(self._at, B)
        at = self._at
        self._at = round_up(at + (inline or head), SLOT)
        self._blocks += size // B if inline else -(-size // B)
        return at // SLOT

    def _place_files(self, files: Ints) -> None:
        if not len(files):
            return
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
        for row in np.flatnonzero(link).tolist():
            self._data[files[row]] = self._blocks
            self._nids[files[row]] = self._put(int(level.heads[row]), int(level.made["size"][row]))
        if self._at // SLOT >= 0xFFFF_FFFF:
            raise BuildError("inodes are more than an image can hold")

    def _write_down(self, batch: _Batch) -> None:
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
        for batch in self._batches():
            if len(batch.files):
                yield from self._references(batch.files, self._level(batch.files))

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

    def write(self, out: memoryview, devices: Sequence[Device], places: Places) -> None:
        """Fill `out`, of `size` bytes and empty."""
        meta = _head(len(devices))
        self._loader._budget = self._budget
        slots, words = np.frombuffer(out, "V32"), np.frombuffer(out, "<u8")
        self._data += np.uint32((meta + round_up(self._at, B)) // B)
        for batch in self._batches():
            level = self._level(batch.directories)
            names, handles, counts = self._children(batch.directories)
            listings = self._listings(batch, names, self._source.inode_of(handles), counts)
            lengths = np.fromiter(map(len, listings), np.int64, len(listings))
            self._write_inodes(out, slots, meta, batch.directories, level, lengths, listings)
            if not len(batch.files):
                continue
            level = self._level(batch.files)
            self._write_inodes(out, slots, meta, batch.files, level, level.made["size"], level.targets)
            for found in self._references(batch.files, level):
                device, byte = places(found)
                address = (device.astype(np.uint64) + np.uint64(1)) << np.uint64(16)
                words[(meta + found.at) // 8] = address | (byte // B).astype(np.uint64) << np.uint64(32)
        del slots, words
        root = int(self._nids[self._loader.root()])
        put_superblock(out, devices, inos=self._image.inode_count, meta=meta, root=root)

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

    def _listings(self, batch: _Batch, names: list[bytes], inodes: Ints, counts: Ints) -> list[bytes]:
        """What stands in each of the directories. Those of one block with nothing before "..": all at once."""
        nids = self._nids[inodes].astype(np.int64)
        types = FILE_TYPES[self._source.modes(inodes) >> np.uint32(12)]
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
    borders, used = [0], 0
    for number, name in enumerate(stored):
        if used + DIRENT_SIZE + len(name) > B:
            borders.append(number)
            used = 0
        used += DIRENT_SIZE + len(name)
    return [*borders, len(stored)]


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
