"""RAFS v5 from the mapped file. Reference: RAFS format 2; `ino` is the inode number."""

from __future__ import annotations

import mmap
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from struct import Struct

from bootstrap.base import (
    DEVICE_TYPES,
    FILE_TYPES,
    HOLE,
    MAX_NSEC,
    S_IFDIR,
    S_IFLNK,
    S_IFMT,
    S_IFREG,
    Attr,
    Blob,
    Bootstrap,
    ChunkRef,
    DirEntry,
    Extent,
    blob_id,
)
from bootstrap.errors import FormatError
from bootstrap.layout import v5
from bootstrap.layout.common import (
    CHUNK_RECORD,
    INLINE_BLOB_ID,
    MAX_CHUNKS_PER_BLOB,
    MAX_NAME,
    SUPER_FLAGS_KNOWN,
    BlobFeatures,
    SuperFlags,
    compressor_of,
    data_size,
    digester_of,
    is_chunk_size,
)

_inode = v5.INODE.unpack_from
_record = CHUNK_RECORD.unpack_from
_table_entry = v5.INODE_OFFSET.unpack_from
_ino = Struct("<40xQ").unpack_from
_mode = Struct("<40xQ12xI").unpack_from  # inode number and mode of a record
_name_size = Struct("<100xH").unpack_from
_chunk_place = Struct("<32xI8xI8xQQ").unpack_from  # blob index, uncompressed size, uncompressed offset, file offset
_INODE_SIZE = v5.INODE.size
_RECORD_SIZE = CHUNK_RECORD.size
_DOTS = frozenset((b".", b".."))  # stored by no builder: the kernel has its own
_VECTOR_INODES = 20_000  # from here on importing numpy pays


class BootstrapV5(Bootstrap):
    """Reader of a v5 bootstrap."""

    version = 5
    root = v5.ROOT_INO

    def __init__(self, path: str, data: mmap.mmap, inline_id: str) -> None:
        super().__init__(path, data)
        self.superblock = self._read_superblock()
        self.flags = SuperFlags(self.superblock.flags)
        self.chunk_size = self.superblock.block_size
        self.compressor = compressor_of(self.flags)
        self.digester = digester_of(self.flags)
        self.inode_count = self.superblock.inodes_count
        self._table = self.superblock.inode_table_offset
        self._count = self.superblock.inode_table_entries
        self._max_size = self.size // _RECORD_SIZE * self.chunk_size
        self.blobs = self._read_blobs(inline_id)
        if self.attr(self.root).mode & S_IFMT != S_IFDIR:
            raise FormatError("v5 root inode", self._at(self.root), "is not a directory")
        self._check_end()

    # ---- tables

    def _read_superblock(self) -> v5.Superblock:
        name = "v5 superblock"
        if not v5.SUPER_SIZE < self.size <= v5.MAX_FILE_SIZE:
            raise FormatError(name, 0, f"a file of {self.size} bytes cannot be a bootstrap: truncated?")
        sb = v5.Superblock(*v5.SUPERBLOCK.unpack_from(self._map, 0))
        if sb.magic != v5.SUPER_MAGIC or sb.version != v5.SUPER_VERSION or sb.sb_size != v5.SUPER_SIZE:
            raise FormatError(name, 0, f"magic {sb.magic:#x}, version {sb.version:#x}, size {sb.sb_size:#x}")
        if not is_chunk_size(sb.block_size):
            raise FormatError(name, 12, f"chunk size {sb.block_size:#x}")
        if sb.flags & ~SUPER_FLAGS_KNOWN:
            raise FormatError(name, 16, f"unknown flags {sb.flags & ~SUPER_FLAGS_KNOWN:#x}")
        if sb.inodes_count > sb.inode_table_entries or not sb.inode_table_entries:
            raise FormatError(name, 24, f"{sb.inodes_count} inodes in a table of {sb.inode_table_entries}")
        tables = (
            ("inode table", sb.inode_table_offset, sb.inode_table_entries * v5.INODE_OFFSET.size),
            ("prefetch table", sb.prefetch_table_offset, sb.prefetch_table_entries * 4),
            ("blob table", sb.blob_table_offset, sb.blob_table_size),
            ("extended blob table", sb.extended_blob_table_offset, sb.extended_blob_table_entries * v5.EXT_BLOB.size),
        )
        spans = []
        for table, offset, size in tables:
            if not size:
                continue
            if offset % v5.ALIGNMENT or offset < v5.SUPER_SIZE or offset + size > self.size:
                raise FormatError(name, 32, f"{table} of {size} bytes at {offset:#x} is misplaced or cut")
            spans.append((offset, offset + size, table))
        spans.sort()
        for (_, end, first), (start, _, second) in pairwise(spans):
            if start < end:
                raise FormatError(name, 32, f"{first} and {second} overlap at {start:#x}")
        return sb

    def _read_blobs(self, inline_id: str) -> list[Blob]:
        sb = self.superblock
        at, end = sb.blob_table_offset, sb.blob_table_offset + sb.blob_table_size
        blobs: list[Blob] = []
        while end - at > v5.READAHEAD.size:
            readahead_offset, readahead_size = v5.READAHEAD.unpack_from(self._map, at)
            at += v5.READAHEAD.size
            stop = self._map.find(b"\0", at, end)
            stop = end if stop < 0 else stop
            if stop - at > 255 or len(blobs) > 0xFFFF:
                raise FormatError("blob table", at, f"id of {stop - at} bytes")
            index = len(blobs)
            chunks = features = uncompressed = compressed = 0
            if index < sb.extended_blob_table_entries:
                where = sb.extended_blob_table_offset + index * v5.EXT_BLOB.size
                chunks, features, uncompressed, compressed = v5.EXT_BLOB.unpack_from(self._map, where)
                if chunks > MAX_CHUNKS_PER_BLOB or uncompressed >> 44 or compressed >> 44:
                    raise FormatError("extended blob table", where, f"{chunks} chunks, {compressed} bytes")
            features &= sum(BlobFeatures)  # unknown ones are ignored in v5
            blobs.append(
                Blob(
                    index=index,
                    id=blob_id(self._map[at:stop], at, inline_id, INLINE_BLOB_ID),
                    chunk_size=self.chunk_size,
                    chunk_count=chunks,
                    compressor=self.compressor,
                    digester=self.digester,
                    features=BlobFeatures(features),
                    compressed_size=compressed,
                    uncompressed_size=uncompressed,
                    data_size=data_size(features, compressed, 0, 0),
                    readahead_offset=readahead_offset,
                    readahead_size=readahead_size,
                )
            )
            at = stop + 1
        if len({blob.id for blob in blobs}) != len(blobs):
            raise FormatError("blob table", sb.blob_table_offset, "a blob id occurs twice")
        return blobs

    def _check_end(self) -> None:
        """Refuse a cut file at once. Nothing in the format says how long it is; but one of two inodes is its last.

        Writers order records by depth (the last is at the end of the chain of last children) or by index.
        """
        last = self.root
        while (children := self._children(last)) and children[1]:
            last = children[0] + children[1] - 1
        for index in (last, self._count):
            end = self._at(index) + self.record_span(index)
            if end > self.size:
                raise FormatError("inode", self._at(index), f"ends at {end:#x}: the file of {self.size} bytes is cut")

    # ---- inodes

    def _at(self, index: int) -> int:
        """Offset of the record of a node (index from 1)."""
        if not 0 < index <= self._count:
            raise FormatError("inode table", self._table, f"inode {index} of {self._count}")
        at: int = _table_entry(self._map, self._table + 4 * index - 4)[0] * 8
        if at <= v5.SUPER_SIZE or at + _INODE_SIZE > self.size:
            raise FormatError("inode table", self._table + 4 * index - 4, f"record at {at:#x} lies outside the file")
        return at

    def node(self, index: int) -> v5.Inode:
        """The record in a table slot: with its own name and parent, unlike the handle that hard links share."""
        return v5.Inode(*self._fields(index)[1:])

    def node_name(self, index: int) -> bytes:
        return self._name(self._at(index))

    def node_count(self) -> int:
        return self._count

    def _fields(self, ino: int) -> tuple[
        int, bytes, int, int, int, int, int, int, int, int, int, int, int, int, int, int, int, int, int
    ]:  # fmt: skip
        """Offset of the record and its fields."""
        at = self._at(ino)
        fields = _inode(self._map, at)
        if not fields[10]:
            raise FormatError("inode", at, "link count 0")
        if fields[6] & S_IFMT not in FILE_TYPES or fields[6] >> 16:
            raise FormatError("inode", at, f"mode {fields[6]:#o} is of no known type")
        if not fields[13]:
            raise FormatError("inode", at, "empty name")
        if fields[7] > self._max_size and fields[6] & S_IFMT == S_IFREG:
            raise FormatError("inode", at, f"size {fields[7]} does not fit a bootstrap of {self.size} bytes")
        return (at, *fields)

    def attr(self, ino: int) -> Attr:
        (_, _, _, _, uid, gid, _, mode, size, blocks, _, nlink, _, _, _, _, rdev, nsec, mtime) = self._fields(ino)
        if mtime >> 63:
            mtime -= 1 << 64
        if mode & S_IFMT not in DEVICE_TYPES:
            rdev = 0
        if size >> 62:
            size = 0  # a directory or special file: nothing reads by it
        if nsec > MAX_NSEC:
            nsec = MAX_NSEC
        return Attr(mode, uid, gid, size, nlink, rdev, mtime, nsec, blocks & 0x7FFF_FFFF_FFFF)

    def readlink(self, ino: int) -> bytes:
        at, *fields = self._fields(ino)
        name_size, size = fields[13], fields[14]
        assert isinstance(name_size, int) and isinstance(size, int)
        if self.attr(ino).mode & S_IFMT != S_IFLNK:
            raise FormatError("inode", at, "is not a symbolic link")
        start = at + _INODE_SIZE + v5.align8(name_size)
        target = self._map[start : start + size]
        if not size or len(target) != size or b"\0" in target:
            raise FormatError("symbolic link", start, f"target of {size} bytes is empty, cut or has a NUL")
        return target

    def _tail(self, record: v5.Inode, at: int) -> int:
        """Offset of what follows name and link target."""
        links = v5.align8(record.symlink_size) if record.mode & S_IFMT == S_IFLNK else 0
        return at + _INODE_SIZE + v5.align8(record.name_size) + links

    def _xattr_area(self, record: v5.Inode, at: int) -> tuple[int, int]:
        """Offset and unpadded size of the xattr pairs."""
        start = self._tail(record, at)
        if not record.flags & v5.INODE_XATTR:
            return start, 0
        if start + 8 > self.size:
            raise FormatError("xattr block", start, "lies behind the end of the file")
        total: int = v5.XATTR_TOTAL.unpack_from(self._map, start)[0]
        if start + 8 + total > self.size:
            raise FormatError("xattr block", start, f"{total} bytes reach behind the end of the file")
        return start + 8, total

    def record_span(self, index: int) -> int:
        """Bytes of a record with all that follows it."""
        at = self._at(index)
        record = self.node(index)
        start, size = self._xattr_area(record, at)
        chunks = record.child_count if record.mode & S_IFMT == S_IFREG else 0
        return start + v5.align8(size) - at + chunks * _RECORD_SIZE

    def xattrs(self, ino: int) -> dict[bytes, bytes]:
        at, size = self._xattr_area(self.node(ino), self._at(ino))
        end = at + size
        found = {}
        while at < end:
            if at + 4 > end:
                raise FormatError("xattr pair", at, "is cut")
            pair = v5.XATTR_PAIR.unpack_from(self._map, at)[0]
            if at + 4 + pair > end:
                raise FormatError("xattr pair", at, f"{pair} bytes reach behind its block")
            name, nul, value = self._map[at + 4 : at + 4 + pair].partition(b"\0")
            if not name or not nul:
                raise FormatError("xattr pair", at, "has no name")
            found[name] = value
            at += 4 + pair
        return found

    # ---- directories

    def _name(self, at: int) -> bytes:
        size: int = _name_size(self._map, at)[0]
        if size > MAX_NAME + 1:
            raise FormatError("inode", at, f"name of {size} bytes")
        return self._map[at + _INODE_SIZE : at + _INODE_SIZE + size]

    def _children(self, ino: int) -> tuple[int, int] | None:
        """First index and number of the children; they come behind their directory, so trees cannot loop."""
        fields = self._fields(ino)
        if fields[7] & S_IFMT != S_IFDIR:
            return None
        first, count = fields[12], fields[13]
        if count and (first <= ino or first + count - 1 > self._count):
            raise FormatError("inode", fields[0], f"children {first} to {first + count - 1} of directory {ino}")
        return first, count

    def _handle(self, index: int, at: int) -> int:
        """The inode number a slot stands for: that of the first name for hard links."""
        ino: int = _ino(self._map, at)[0]
        if ino == index:
            return ino
        if not 0 < ino <= self._count or _ino(self._map, self._at(ino))[0] != ino:
            raise FormatError("inode", at, f"number {ino} in slot {index} leads nowhere")
        return ino

    def lookup(self, parent: int, name: bytes) -> int:
        if name == b".":
            return parent
        if name == b"..":
            return self.node(parent).parent or self.root
        children = self._children(parent)
        if children is None:
            return 0
        low = children[0]
        high = low + children[1]
        while low < high:
            middle = (low + high) >> 1
            at = self._at(middle)
            found = self._name(at)
            if found == name:
                return self._handle(middle, at)
            if found < name:
                low = middle + 1
            else:
                high = middle
        return 0

    def list_dir(self, ino: int, cookie: int = 0) -> Iterator[DirEntry]:
        children = self._children(ino)
        if children is None:
            raise FormatError("inode", self._at(ino), "is not a directory")
        first, count = children
        for number in range(cookie, count):
            index = first + number
            at = self._at(index)
            name = self._name(at)
            if not name or b"/" in name or b"\0" in name or name in _DOTS:
                raise FormatError("inode", at, f"name {name!r}")
            handle, mode = _mode(self._map, at)
            if handle != index:
                handle = self._handle(index, at)
            if mode & S_IFMT not in FILE_TYPES:
                raise FormatError("inode", at, f"mode {mode:#o} is of no known type")
            yield DirEntry(name, handle, mode >> 12 & 0xF, number + 1)

    # ---- data

    def _chunks(self, ino: int) -> tuple[int, int, int]:
        """Size of a regular file, offset and number of its chunk records, all of them inside the file."""
        at = self._at(ino)
        record = self.node(ino)
        if record.mode & S_IFMT != S_IFREG:
            raise FormatError("inode", at, "is not a regular file")
        start, size = self._xattr_area(record, at)
        start += v5.align8(size)
        if start + record.child_count * _RECORD_SIZE > self.size:
            raise FormatError("chunk records", start, f"{record.child_count} reach behind the end of the file")
        whole = -(-record.size // self.chunk_size)
        if record.child_count != whole and not (self.has_holes(ino) and record.child_count < whole):
            raise FormatError("inode", at, f"{record.child_count} chunks for {record.size} bytes")
        return record.size, start, record.child_count

    def has_holes(self, ino: int) -> bool:
        """Whether parts of a file may have no chunk. No current builder makes such files."""
        return bool(self.node(ino).flags & v5.INODE_HAS_HOLE)

    def extents(self, ino: int, offset: int, size: int) -> list[Extent]:
        file_size, table, count = self._chunks(ino)
        end = min(offset + size, file_size)
        if self.has_holes(ino):
            return list(self._around_holes(table, count, offset, end))
        chunk_size = self.chunk_size
        found = []
        while offset < end:
            number, within = divmod(offset, chunk_size)
            at = table + number * _RECORD_SIZE
            blob, length, start, file_offset = _chunk_place(self._map, at)
            piece = min(chunk_size - within, end - offset)
            if blob >= len(self.blobs):
                raise FormatError("chunk record", at, f"blob {blob} of {len(self.blobs)}")
            if file_offset != number * chunk_size or length < within + piece:
                raise FormatError("chunk record", at, f"{length} bytes for file offset {file_offset}")
            found.append(Extent(blob, start + within, piece, offset))
            offset += piece
        return found

    def _around_holes(self, table: int, count: int, offset: int, end: int) -> Iterator[Extent]:
        """Extents of a file whose chunks must be searched by their file offset (2.6)."""

        def file_offset(number: int) -> int:
            found: int = _chunk_place(self._map, table + number * _RECORD_SIZE)[3]
            return found

        number = max(0, bisect_right(range(count), offset, key=file_offset) - 1)
        while offset < end and number < count:
            at = table + number * _RECORD_SIZE
            blob, length, start, begin = _chunk_place(self._map, at)
            if blob >= len(self.blobs):
                raise FormatError("chunk record", at, f"blob {blob} of {len(self.blobs)}")
            if number + 1 < count and file_offset(number + 1) < begin + length:
                raise FormatError("chunk record", at, f"file offset {begin} and {length} bytes reach into the next one")
            if offset < begin:
                yield Extent(HOLE, 0, min(begin, end) - offset, offset)
                offset = min(begin, end)
            piece = min(begin + length, end) - offset
            if begin <= offset and piece > 0:
                yield Extent(blob, start + offset - begin, piece, offset)
                offset += piece
            number += 1
        if offset < end:
            yield Extent(HOLE, 0, end - offset, offset)

    def file_records(self, ino: int) -> Iterator[tuple[bytes, int, int, int, int, int, int, int, int, int]]:
        """CHUNK_RECORD fields of one regular file, in file order."""
        _, table, count = self._chunks(ino)
        return CHUNK_RECORD.iter_unpack(self._map[table : table + count * _RECORD_SIZE])

    def chunk_refs(self, ino: int) -> list[ChunkRef]:
        _, table, count = self._chunks(ino)
        found = []
        for at in range(table, table + count * _RECORD_SIZE, _RECORD_SIZE):
            record = _record(self._map, at)
            if record[1] >= len(self.blobs):
                raise FormatError("chunk record", at, f"blob {record[1]} of {len(self.blobs)}")
            found.append(ChunkRef(record[1], record[8], record[6]))
        return found

    def prefetch_inodes(self) -> list[int]:
        start = self.superblock.prefetch_table_offset
        found: list[int] = []
        for number in range(self.superblock.prefetch_table_entries):
            ino = _table_entry(self._map, start + 4 * number)[0]
            if not ino:
                break
            if ino > self._count:
                raise FormatError("prefetch table", start + 4 * number, f"inode {ino} of {self._count}")
            found.append(ino)
        return found

    def _record_spans(self) -> Iterator[tuple[int, int]]:
        """Offset and number of the chunk records of each regular file."""
        # Slots of further names of a hard link repeat the records of the first: skip them.
        budget = self.size // _RECORD_SIZE
        for index in range(1, self._count + 1):
            ino, mode = _mode(self._map, self._at(index))
            if ino == index and mode & S_IFMT == S_IFREG:
                _, table, count = self._chunks(index)
                budget -= count
                if budget < 0:
                    raise FormatError("chunk records", table, "more than fit the file: inodes overlap")
                yield table, count

    def record_places(self) -> Sequence[int]:
        if self._count >= _VECTOR_INODES and (many := self._many_places()) is not None:
            return many
        places = array("I")
        for table, count in self._record_spans():
            places.extend(range(table // 8, (table + count * _RECORD_SIZE) // 8, _RECORD_SIZE // 8))
        return places

    def _many_places(self) -> Sequence[int] | None:
        """The same of all inodes at once: 0.1 s for 1,000,000 instead of 2. None if anything is wrong with any."""
        import numpy as np

        words = np.frombuffer(self._map, "<u8", self.size // 8)
        at = np.frombuffer(self._map, "<u4", self._count, self._table).astype(np.int64)
        if at.min() * 8 <= v5.SUPER_SIZE or at.max() * 8 + _INODE_SIZE > self.size:
            return None
        # Word 5 of a record: inode number, 7: project and mode, 8: size, 10: flags, 12: children, name size, link size.
        first = words[at + 5] == np.arange(1, self._count + 1)
        at = at[first & (words[at + 7] >> 32 & S_IFMT == S_IFREG)]
        heads = words[at + 12]
        count = (heads & 0xFFFF_FFFF).astype(np.int64)
        start = at + _INODE_SIZE // 8 + (((heads >> 32 & 0xFFFF) + 7) >> 3).astype(np.int64)
        xattrs = words[at + 10] & v5.INODE_XATTR != 0
        if xattrs.any():
            where = start[xattrs]
            totals = words[np.minimum(where, len(words) - 1)]
            if where.max() >= len(words) or totals.max() > self.size:
                return None
            start[xattrs] += 1 + ((totals + 7) >> 3).astype(np.int64)
        sizes = words[at + 8]
        exact = (sizes + (self.chunk_size - 1)) // self.chunk_size == count
        step = _RECORD_SIZE // 8
        if not exact.all() or (start + count * step).max(initial=0) > len(words) or count.sum() * step > len(words):
            return None
        before = np.cumsum(count) - count
        places = np.repeat(start - before * step, count) + np.arange(count.sum()) * step
        return array("I", places.astype(np.uint32).tobytes())

    def chunk_records(self) -> Iterator[tuple[bytes, int, int, int, int, int, int, int, int, int]]:
        for table, count in self._record_spans():
            yield from CHUNK_RECORD.iter_unpack(self._map[table : table + count * _RECORD_SIZE])

    def _walk_budget(self) -> int:
        return self._count
