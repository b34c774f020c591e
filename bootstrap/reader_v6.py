"""RAFS v6 from the mapped file. Reference: RAFS format 1 - 1.14; `ino` is the nid."""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from struct import Struct
from struct import error as StructError

from bootstrap.base import (
    DEVICE_TYPES,
    FILE_TYPES,
    MAX_NSEC,
    S_IFDIR,
    S_IFLNK,
    S_IFMT,
    S_IFREG,
    Attr,
    Bootstrap,
    ChunkRef,
    DirEntry,
    Extent,
)
from bootstrap.errors import FormatError
from bootstrap.layout import v6
from bootstrap.layout.common import (
    CHUNK_RECORD,
    MAX_NAME,
    BlobFeatures,
    SuperFlags,
    compressor_of,
    digester_of,
)
from bootstrap.tables_v6 import read_blobs, read_ext_superblock, read_superblock

_inode = v6.INODE_EXTENDED.unpack_from
_compact = v6.INODE_COMPACT.unpack_from
_address = v6.CHUNK_ADDRESS.unpack_from
_nid = Struct("<Q").unpack_from
_name_offset = _icount = Struct("<H").unpack_from
_name_span = Struct("<H10xH").unpack_from  # name offsets of a dirent and its successor, from offset 8 of the first
_DIRENT_SIZE = v6.DIRENT.size
_FORMAT_WRONG = ~v6.FORMAT_MASK | 2
# Directories of one block whose place is kept: programs look up many names in one, and to find it took a third of that.
MAX_ONLY_BLOCKS = 256


class _Directory:
    """Where the dirent blocks of one directory are."""

    __slots__ = ("blocks", "data", "full", "tail", "tail_size")

    def __init__(self, data: int, full: int, tail: int, tail_size: int) -> None:
        self.data = data
        self.full = full
        self.tail = tail
        self.tail_size = tail_size
        self.blocks = full + (tail_size > 0)


class BootstrapV6(Bootstrap):
    """Reader of a v6 bootstrap (an EROFS image)."""

    version = 6

    def __init__(self, path: str, data: mmap.mmap, inline_id: str) -> None:
        super().__init__(path, data)
        self.superblock = read_superblock(data)
        self.ext = read_ext_superblock(data, self.superblock)
        self.block_size = 1 << self.superblock.blkszbits
        self._meta = self.superblock.meta_blkaddr * self.block_size
        self.flags = SuperFlags(self.ext.flags)
        self.chunk_size = self.ext.chunk_size
        self.compressor = compressor_of(self.flags)
        self.digester = digester_of(self.flags)
        self.root = self.superblock.root_nid
        self.inode_count = self.superblock.inos
        self.blobs = read_blobs(data, self.superblock, self.ext, inline_id)
        # A file needs 8 bytes here per chunk: larger sizes are lies, and may overflow what the kernel takes.
        self._max_size = max(self.size // 8 * self.chunk_size, self.size)
        self._external = {blob.index for blob in self.blobs if blob.features & BlobFeatures.EXTERNAL}
        self._external_places: dict[tuple[int, int], int] = {}
        self._only_blocks: dict[int, tuple[int, int, int]] = {}  # of directories where names were looked up
        # Only generated dictionaries have a name with a slash (reference 5.11); nobody can look it up.
        self._dictionary = any(blob.features & BlobFeatures.IS_CHUNKDICT_GENERATED for blob in self.blobs)
        if self.attr(self.root).mode & S_IFMT != S_IFDIR:
            raise FormatError("v6 root inode", self.inode_offset(self.root), "is not a directory")

    # ---- inodes

    def inode_offset(self, ino: int) -> int:
        """Where the inode lies in the file."""
        return self._meta + v6.NID_UNIT * ino

    def inode_number(self, ino: int) -> int:
        """i_ino, the builder's number: equal for all names of one file, also where old images repeat the inode."""
        return self._fields(ino)[6]

    def _fields(self, ino: int) -> tuple[int, int, int, int, int, int, int, int, int, int, int, int]:
        """Fields of an extended inode in order (a compact one is widened), its bounds and format checked."""
        at = self._meta + v6.NID_UNIT * ino
        if ino <= 0 or at + 32 > self.size:
            raise FormatError("inode", at, f"number {ino} lies outside the file")
        try:
            fields = _inode(self._map, at)
        except StructError:  # a compact inode may be the last thing in the file
            fields = (0,)
        form = fields[0]
        if not form & 1:
            form, icount, mode, nlink, size, _, u, number, uid, gid = _compact(self._map, at)
            if form & 1:
                raise FormatError("inode", at, "is cut by the end of the file")
            fields = (form, icount, mode, 0, size, u, number, uid, gid, 0, 0, nlink)
        if form & _FORMAT_WRONG:
            raise FormatError("inode", at, f"format {form:#x}")
        if not fields[11]:
            raise FormatError("inode", at, "link count 0")
        if fields[2] & S_IFMT not in FILE_TYPES:
            raise FormatError("inode", at, f"mode {fields[2]:#o} is of no known type")
        if fields[4] > self._max_size:
            raise FormatError("inode", at, f"size {fields[4]} does not fit a bootstrap of {self.size} bytes")
        return fields

    def _payload(self, ino: int, form: int, icount: int) -> int:
        """Offset of what follows inode and xattrs."""
        at = self._meta + v6.NID_UNIT * ino + (64 if form & 1 else 32)
        return at + 8 + 4 * icount if icount else at

    def inode_span(self, ino: int) -> int:
        """Bytes from the inode's start to the end of what follows it: xattrs, inline data, chunk addresses."""
        form, icount, _, _, size, *_ = self._fields(ino)
        head = self._payload(ino, form, icount) - self.inode_offset(ino)
        layout = form >> 1
        if layout == v6.LAYOUT_CHUNK_BASED:
            return (head + 7 & ~7) + -(-size // self.chunk_size) * 8
        return head + (size % self.block_size if layout == v6.LAYOUT_FLAT_INLINE else 0)

    def attr(self, ino: int) -> Attr:
        _, _, mode, _, size, u, _, uid, gid, mtime, nsec, nlink = self._fields(ino)
        if mtime >> 63:
            mtime -= 1 << 64
        rdev = u if mode & S_IFMT in DEVICE_TYPES else 0
        if nsec > MAX_NSEC:
            nsec = MAX_NSEC
        return Attr(mode, uid, gid, size, nlink, rdev, mtime, nsec, (size + 511) >> 9)

    def link_number(self, ino: int) -> int:
        """What the names of one file have in common where each has an inode record of its own: so in images of 2022
        (1.11). 0 where the handle itself says it, and for directories."""
        if all(blob.features & BlobFeatures.CAP_TAR_TOC for blob in self.blobs):
            return 0
        fields = self._fields(ino)
        return fields[6] if fields[11] > 1 and fields[2] & S_IFMT != S_IFDIR else 0

    def readlink(self, ino: int) -> bytes:
        form, icount, mode, _, size, u, *_ = self._fields(ino)
        at = self._meta + v6.NID_UNIT * ino
        if mode & S_IFMT != S_IFLNK:
            raise FormatError("inode", at, "is not a symbolic link")
        if not 1 <= size <= v6.MAX_SYMLINK:
            raise FormatError("symbolic link", at, f"target of {size} bytes")
        directory = self._flat(ino, form, icount, size, u)
        target = self._map[directory.data : directory.data + directory.full * self.block_size]
        target += self._map[directory.tail : directory.tail + directory.tail_size]
        if b"\0" in target:
            raise FormatError("symbolic link", at, "NUL in the target")
        return target

    def _flat(self, ino: int, form: int, icount: int, size: int, u: int) -> _Directory:
        """Position of the data of a flat inode, inside the file."""
        data = u * self.block_size
        full, tail_size = divmod(size, self.block_size)
        layout = form >> 1
        if layout == v6.LAYOUT_FLAT_INLINE:
            tail = self._payload(ino, form, icount)
        elif layout == v6.LAYOUT_FLAT_PLAIN:
            tail = data + full * self.block_size
        else:
            raise FormatError("inode", self.inode_offset(ino), f"data layout {layout} for a directory or link")
        if (full and data + full * self.block_size > self.size) or (tail_size and tail + tail_size > self.size):
            raise FormatError("inode", self.inode_offset(ino), f"its {size} bytes reach behind the end of the file")
        return _Directory(data, full, tail, tail_size)

    def xattrs(self, ino: int) -> dict[bytes, bytes]:
        form, icount, *_ = self._fields(ino)
        if not icount:
            return {}
        start = self._meta + v6.NID_UNIT * ino + (64 if form & 1 else 32)
        end = start + v6.xattr_area_size(icount)
        if end > self.size:
            raise FormatError("xattr area", start, f"{icount} words reach behind the end of the file")
        found = {}
        at = start + v6.XATTR_HEADER.size
        for _ in range(v6.XATTR_HEADER.unpack_from(self._map, start)[1]):
            if at + v6.SHARED_XATTR.size > end:
                raise FormatError("xattr area", start, "its shared attributes reach behind its end")
            name, value, _ = self._shared_xattr(v6.SHARED_XATTR.unpack_from(self._map, at)[0], at)
            found[name] = value
            at += v6.SHARED_XATTR.size
        while at + v6.XATTR_ENTRY.size <= end:
            name, value, at = self._xattr(at, end)
            found[name] = value
        return found

    def lacks_xattrs(self, ino: int) -> bool:
        at = self._meta + v6.NID_UNIT * ino
        if ino <= 0 or at + 32 > self.size:
            raise FormatError("inode", at, f"number {ino} lies outside the file")
        return not _icount(self._map, at + 2)[0]

    def _xattr(self, at: int, end: int) -> tuple[bytes, bytes, int]:
        """Name and value of the entry at an offset, and where the next one is."""
        name_size, index, value_size = v6.XATTR_ENTRY.unpack_from(self._map, at)
        prefix = v6.XATTR_PREFIXES.get(index)
        if prefix is None:
            raise FormatError("xattr entry", at, f"name index {index}")
        name_at = at + v6.XATTR_ENTRY.size
        value_at = name_at + name_size
        if value_at + value_size > end:
            raise FormatError("xattr entry", at, f"{name_size} + {value_size} bytes reach behind its area")
        following = at + ((v6.XATTR_ENTRY.size + name_size + value_size + 3) & ~3)
        return prefix + self._map[name_at:value_at], self._map[value_at : value_at + value_size], following

    def _shared_xattr(self, number: int, where: int) -> tuple[bytes, bytes, int]:
        """An attribute that many inodes refer to: images of other EROFS writers have them, upstream's do not (1.1)."""
        blocks = self.superblock.xattr_blkaddr
        at = blocks * self.block_size + 4 * number
        if not blocks or at + v6.XATTR_ENTRY.size > self.size:
            raise FormatError("xattr area", where, f"shared attribute {number} lies outside the file")
        return self._xattr(at, self.size)

    # ---- directories

    def _directory(self, ino: int) -> _Directory | None:
        form, icount, mode, _, size, u, *_ = self._fields(ino)
        if mode & S_IFMT != S_IFDIR:
            return None
        return self._flat(ino, form, icount, size, u)

    def _block(self, directory: _Directory, number: int) -> tuple[int, int, int]:
        """Offset, size and number of entries of a dirent block."""
        if number < directory.full:
            at, size = directory.data + number * self.block_size, self.block_size
        else:
            at, size = directory.tail, directory.tail_size
        first = _name_offset(self._map, at + 8)[0] if size >= _DIRENT_SIZE else 0
        count, rest = divmod(first, _DIRENT_SIZE)
        if rest or not count or first > size:
            raise FormatError("dirent block", at, f"first name at {first} of {size} bytes")
        return at, size, count

    def _name(self, at: int, size: int, count: int, number: int) -> bytes:
        """Name of one entry of the block at `at`."""
        if number + 1 < count:
            start, end = _name_span(self._map, at + _DIRENT_SIZE * number + 8)
            if not count * _DIRENT_SIZE <= start < end <= size:
                raise FormatError("dirent", at + _DIRENT_SIZE * number, f"name from {start} to {end} of {size}")
            return self._map[at + start : at + end]
        start = _name_offset(self._map, at + _DIRENT_SIZE * number + 8)[0]
        if not count * _DIRENT_SIZE <= start < size:
            raise FormatError("dirent", at + _DIRENT_SIZE * number, f"name from {start} of {size}")
        return self._map[at + start : at + size].split(b"\0", 1)[0]

    def lookup(self, parent: int, name: bytes) -> int:
        block = self._only_blocks.get(parent)
        if block is None:
            directory = self._directory(parent)
            if directory is None or not directory.blocks:
                return 0
            number = 1
            if directory.blocks > 1:
                number = bisect_right(
                    range(directory.blocks), name, key=lambda n: self._name(*self._block(directory, n), 0)
                )
                if not number:
                    return 0
            block = self._block(directory, number - 1)
            if directory.blocks == 1:
                if len(self._only_blocks) >= MAX_ONLY_BLOCKS:
                    self._only_blocks.clear()
                self._only_blocks[parent] = block
        at, size, count = block
        low, high, last = 0, count, count - 1
        floor, data = count * _DIRENT_SIZE, self._map
        while low < high:
            middle = (low + high) >> 1
            if middle < last:  # as `_name`, which takes twice as long
                start, end = _name_span(data, at + _DIRENT_SIZE * middle + 8)
                if not floor <= start < end <= size:
                    raise FormatError("dirent", at + _DIRENT_SIZE * middle, f"name from {start} to {end} of {size}")
                found = data[at + start : at + end]
            else:
                found = self._name(at, size, count, middle)
            if found == name:
                return self._child(at + _DIRENT_SIZE * middle)
            if found < name:
                low = middle + 1
            else:
                high = middle
        return 0

    def _child(self, at: int) -> int:
        nid: int = _nid(self._map, at)[0]
        if not nid or self._meta + v6.NID_UNIT * nid + 32 > self.size:
            raise FormatError("dirent", at, f"inode {nid} lies outside the file")
        return nid

    def list_dir(self, ino: int, cookie: int = 0) -> Iterator[DirEntry]:
        # A cookie is block << 12 | entries of it already given: a block of 4096 bytes has at most 315 entries.
        directory = self._directory(ino)
        if directory is None:
            raise FormatError("inode", self.inode_offset(ino), "is not a directory")
        skip = cookie & 0xFFF
        limit = self.size
        for block in range(cookie >> 12, directory.blocks):
            at, size, count = self._block(directory, block)
            data = self._map[at : at + size]
            entries = list(v6.DIRENT.iter_unpack(data[: count * _DIRENT_SIZE]))
            last = data.find(b"\0", entries[-1][1]) if entries[-1][1] < size else -1
            ends = [entry[1] for entry in entries[1:]]
            ends.append(size if last < 0 else last)
            position = (block << 12) + skip
            floor = count * _DIRENT_SIZE
            for number in range(skip, count):
                nid, start, kind, _ = entries[number]
                end = ends[number]
                position += 1
                name = data[start:end]
                if not floor <= start < end <= size or end - start > MAX_NAME + 1:
                    raise FormatError("dirent", at + _DIRENT_SIZE * number, f"name from {start} to {end} of {size}")
                if name == b"." or name == b"..":
                    continue
                if b"/" in name or b"\0" in name:
                    if self._dictionary:
                        continue
                    raise FormatError("dirent", at + _DIRENT_SIZE * number, f"name {name!r}")
                if not nid or self._meta + 32 * nid + 32 > limit:
                    raise FormatError("dirent", at + _DIRENT_SIZE * number, f"inode {nid} lies outside the file")
                if not 0 < kind < 8:
                    raise FormatError("dirent", at + _DIRENT_SIZE * number, f"file type {kind}")
                yield DirEntry(name, nid, v6.FILE_TYPE_TO_DT[kind], position)
            skip = 0

    def raw_entries(self, ino: int) -> Iterator[tuple[bytes, int, int]]:
        """Name, nid and file type of every dirent as stored, "." and ".." included: for checks."""
        directory = self._directory(ino)
        if directory is None:
            raise FormatError("inode", self.inode_offset(ino), "is not a directory")
        for block in range(directory.blocks):
            at, size, count = self._block(directory, block)
            for number in range(count):
                nid, _, kind, _ = v6.DIRENT.unpack_from(self._map, at + _DIRENT_SIZE * number)
                yield self._name(at, size, count, number), nid, kind

    # ---- data

    def _addresses(self, ino: int) -> tuple[int, int]:
        """Size of a regular file and the offset of its chunk addresses, all of them inside the file."""
        fields = self._fields(ino)
        form, icount, size = fields[0], fields[1], fields[4]
        at = self._meta + v6.NID_UNIT * ino
        if fields[2] & S_IFMT != S_IFREG:
            raise FormatError("inode", at, "is not a regular file")
        if form >> 1 != v6.LAYOUT_CHUNK_BASED:
            raise FormatError("inode", at, f"data layout {form >> 1} for a regular file")
        head = 64 if form & 1 else 32  # as `_payload`
        if icount:
            head = head + 8 + 4 * icount + 7 & ~7
        table = at + head
        if table + -(-size // self.chunk_size) * 8 > self.size:
            raise FormatError("chunk addresses", table, f"those of {size} bytes reach behind the end of the file")
        return size, table

    def extents(self, ino: int, offset: int, size: int) -> list[Extent]:
        file_size, table = self._addresses(ino)
        end = min(offset + size, file_size)
        chunk_size = self.chunk_size
        found = []
        while offset < end:
            number = offset // chunk_size
            within = offset - number * chunk_size
            low, high, block = _address(self._map, table + 8 * number)
            blob = (high & 0xFF) - 1
            if not 0 <= blob < len(self.blobs):
                raise FormatError("chunk address", table + 8 * number, f"blob {blob} of {len(self.blobs)}")
            piece = chunk_size - within
            if piece > end - offset:
                piece = end - offset
            start = block * self.block_size
            if blob in self._external:
                start = self._external_place(blob, low | high >> 8 << 16, table + 8 * number)
            found.append(Extent(blob, start + within, piece, offset))
            offset += piece
        return found

    def chunk_refs(self, ino: int) -> list[ChunkRef]:
        size, table = self._addresses(ino)
        found = []
        for at in range(table, table + -(-size // self.chunk_size) * 8, 8):
            low, high, block = _address(self._map, at)
            blob = (high & 0xFF) - 1
            if not 0 <= blob < len(self.blobs):
                raise FormatError("chunk address", at, f"blob {blob} of {len(self.blobs)}")
            index, start = low | high >> 8 << 16, block * self.block_size
            if blob in self._external:
                start = self._external_place(blob, index, at)
            found.append(ChunkRef(blob, index, start))
        return found

    def _external_place(self, blob: int, index: int, at: int) -> int:
        """Uncompressed offset of a chunk of an external blob: any byte offset, of which its address has only the block.

        Such a file may begin behind a tar header, say (5.15). So its records decide; they are collected once.
        """
        if not self._external_places:
            self._external_places = {
                (record[1], record[8]): record[6] for record in self.chunk_records() if record[1] in self._external
            }
        place = self._external_places.get((blob, index))
        if place is None:
            raise FormatError("chunk address", at, f"chunk {index} of external blob {blob} has no record")
        return place

    def prefetch_inodes(self) -> list[int]:
        start = self.ext.prefetch_table_offset
        found: list[int] = []
        for (nid,) in v6.NID.iter_unpack(self._map[start : start + self.ext.prefetch_table_size]):
            if not nid:
                break
            if self.inode_offset(nid) + 32 > self.size:
                raise FormatError("prefetch table", start + 4 * len(found), f"inode {nid} lies outside the file")
            found.append(nid)
        return found

    def record_places(self) -> Sequence[int]:
        if self.flags & SuperFlags.TARFS:
            return ()  # the table of a tarfs image holds one meaningless record (1.13)
        start = self.ext.chunk_table_offset // 8
        return range(start, start + self.ext.chunk_table_size // 8, CHUNK_RECORD.size // 8)

    def chunk_records(self) -> Iterator[tuple[bytes, int, int, int, int, int, int, int, int, int]]:
        start, size = self.ext.chunk_table_offset, self.ext.chunk_table_size
        for at in range(start, start + size, 80 * 1024):
            yield from CHUNK_RECORD.iter_unpack(self._map[at : min(at + 80 * 1024, start + size)])

    def _walk_budget(self) -> int:
        return self.size // _DIRENT_SIZE
